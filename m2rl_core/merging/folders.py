"""Merges of model folders: many recipes in one read, each output complete under its name or not there."""
from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from m2rl_core.merging.checkpoint import SHARD_BYTES, Checkpoint, Writer, copy_sidecars, total_bytes
from m2rl_core.merging.driver import Merger, dtype_of
from m2rl_core.merging.recipe import Recipe

Report = Callable[[str, int, int], None]


def merge_folders(
    base: Path, experts: Mapping[str, Path], recipes: Mapping[Path, Recipe], *, allow_identical: bool = False,
    shard_bytes: int = SHARD_BYTES, report: Report | None = None,
) -> dict[Path, dict]:
    """Merges `experts` ({name: folder}) on `base`, one output folder a recipe; returns each output's merge.json.

    Folders are written beside their names and renamed when all are complete. ValueError for inputs that do
    not fit (see Merger) and for an output that exists; whatever fails, no output is left behind.
    """
    outs = [Path(out) for out in recipes]
    for out in outs:
        if out.exists():
            raise ValueError(f"{out} exists: choose another output folder, or remove it first")
    with ExitStack() as stack:
        parts = {}
        for out, recipe in zip(outs, recipes.values(), strict=True):
            out.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
            stack.callback(shutil.rmtree, part, ignore_errors=True)  # nothing is there any more after the rename
            part.chmod(0o755)
            parts[part] = recipe
        results = write_models(base, experts, parts, allow_identical=allow_identical, shard_bytes=shard_bytes,
                               report=report)
        for part, out in zip(parts, outs, strict=True):
            part.rename(out)
    return dict(zip(outs, results, strict=True))


def write_models(
    base: Path, experts: Mapping[str, Path], recipes: Mapping[Path, Recipe], *, allow_identical: bool = False,
    shard_bytes: int = SHARD_BYTES, report: Report | None = None,
) -> list[dict]:
    """The same straight into folders that exist: weights, the base's config and tokenizer, merge.json last."""
    origin = Checkpoint(base)
    others = {name: Checkpoint(folder) for name, folder in experts.items()}
    merger = Merger(origin, others, list(recipes.values()), allow_identical=allow_identical, report=report)
    metas = [{name: (dtype_of(recipe, dtype) if dtype.is_floating_point else dtype, shape)
              for name, (dtype, shape) in origin.meta.items()} for recipe in recipes.values()]
    needed = {folder: total_bytes(meta) for folder, meta in zip(recipes, metas, strict=True)}
    for folder in recipes:
        free = shutil.disk_usage(folder).free
        if free < sum(needed.values()):
            raise ValueError(f"{folder}: {free / 1e9:.1f} GB free, {sum(needed.values()) / 1e9:.1f} GB needed: "
                             "make room, or write elsewhere")
    with ExitStack() as stack:
        writers = [stack.enter_context(Writer(folder, meta, shard_bytes))
                   for folder, meta in zip(recipes, metas, strict=True)]
        for name, tensors in merger:
            for writer, tensor in zip(writers, tensors, strict=True):
                writer.write(name, tensor)
    inputs = {name: checkpoint.digest() for name, checkpoint in {"base": origin, **others}.items()}
    results = []
    for (folder, recipe), diagnosis in zip(recipes.items(), merger.diagnoses, strict=True):
        copy_sidecars(Path(base), folder, recipe.out_dtype)
        used = ("base", *(recipe.experts or others))
        results.append({
            "recipe": asdict(recipe), "inputs": {name: inputs[name] for name in used},
            "output": Checkpoint(folder).digest(), "diagnosis": diagnosis,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "safetensors": version("safetensors")},
        })
        (folder / "merge.json").write_text(json.dumps(results[-1], indent=2) + "\n")
    return results
