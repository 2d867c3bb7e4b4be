"""Merges of model folders: many recipes in one read, each output complete under its name or not there."""
from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from m2rl_core.merging.blend import code_of
from m2rl_core.merging.checkpoint import SHARD_BYTES, Checkpoint, Digest, Writer, checksum, copy_sidecars, total_bytes
from m2rl_core.merging.driver import Merger
from m2rl_core.merging.pieces import Piece, grid
from m2rl_core.merging.recipe import Recipe
from m2rl_core.merging.shifts import BASE
from m2rl_core.merging.stored import DTYPES, count_of

Report = Callable[[str, int, int], None]


def merge_folders(
    base: Path, experts: Mapping[str, Path], recipes: Mapping[Path, Recipe], *, allow_identical: bool = False,
    shard_bytes: int = SHARD_BYTES, sha256: bool = False, report: Report | None = None,
) -> dict[Path, dict]:
    """Merges `experts` ({name: folder}) on `base`, one output folder a recipe; returns each output's merge.json.

    Folders are written beside their names and renamed when all are complete. ValueError for inputs that do
    not fit (see Merger) and for an output that exists; whatever fails, no output is left behind. `sha256` adds
    the digests of all files to merge.json.
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
                               sha256=sha256, report=report)
        for part, out in zip(parts, outs, strict=True):
            part.rename(out)
    return dict(zip(outs, results, strict=True))


def write_models(
    base: Path, experts: Mapping[str, Path], recipes: Mapping[Path, Recipe], *, allow_identical: bool = False,
    shard_bytes: int = SHARD_BYTES, sha256: bool = False, report: Report | None = None,
) -> list[dict]:
    """The same straight into folders that exist: weights, the base's config and tokenizer, merge.json last."""
    with ExitStack() as stack:
        origin = stack.enter_context(Checkpoint(base))
        others = {name: stack.enter_context(Checkpoint(folder)) for name, folder in experts.items()}
        merger = Merger(origin, others, list(recipes.values()), allow_identical=allow_identical, report=report,
                        digest=True)
        metas = [{name: (code_of(recipe, code), shape)
                  for name, (code, shape) in origin.meta.items()} for recipe in recipes.values()]
        check_room(recipes, sum(map(total_bytes, metas)))
        outputs = _merged(merger, origin, list(recipes), metas, shard_bytes)
        models = {BASE: origin, **{("expert", name): other for name, other in others.items()}}
        inputs = {model: checkpoint.digested(merger.digests[model]) for model, checkpoint in models.items()}
        files = {model: checkpoint.sha256() for model, checkpoint in models.items()} if sha256 else {}
    results = []
    for r, (folder, recipe) in enumerate(recipes.items()):
        copy_sidecars(Path(base), folder, recipe.out_dtype)
        used = {"base": BASE, **{name: ("expert", name) for name in recipe.experts or others}}
        results.append({
            "recipe": asdict(recipe), "inputs": {name: inputs[model] for name, model in used.items()},
            "output": outputs[r], "diagnosis": merger.diagnoses[r],
            "versions": {"python": platform.python_version(), **{
                package: version(package) for package in ("numpy", "numba", "safetensors")}},
        })
        if sha256:
            results[-1]["sha256"] = {name: files[model] for name, model in used.items()}
            results[-1]["sha256"]["output"] = Checkpoint(folder).sha256()
        (folder / "merge.json").write_text(json.dumps(results[-1], indent=2) + "\n")
    return results


def _merged(merger: Merger, origin: Checkpoint, folders: Sequence[Path], metas: Sequence[dict],
            shard_bytes: int) -> list[str]:
    """Runs a merge into one writer a folder; returns the digests of what was written."""
    digests, sums = [Digest() for _ in folders], {}
    with ExitStack() as stack:
        writers = [stack.enter_context(Writer(folder, meta, shard_bytes))
                   for folder, meta in zip(folders, metas, strict=True)]

        def put(r: int, piece: Piece, part: np.ndarray) -> None:
            writers[r].put(piece.name, piece.first, part)
            sums[r, piece.name, piece.index] = checksum(part)

        for name in merger.merge(lambda names: None, put):
            for r, digest in enumerate(digests):
                for piece in grid(name, merger.reader.sizes[name]):
                    digest.add(name, sums.pop((r, name, piece.index)))
                if not merger.reader.sizes[name]:
                    whole = np.empty(count_of(metas[r][name]), DTYPES[metas[r][name][0]])
                    if len(whole):  # no floating point: the base's
                        origin.read(name, 0, whole)
                    writers[r].put(name, 0, whole)
    results = []
    for folder, digest in zip(folders, digests, strict=True):
        with Checkpoint(folder) as output:
            results.append(output.digested(digest))
    return results


def check_room(folders: Iterable[Path], needed: int) -> None:
    """ValueError where a folder's disk has less than `needed` bytes left."""
    for folder in folders:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed: "
                             "make room, or write elsewhere")
