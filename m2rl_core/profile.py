"""A profile is one YAML file of params/, read into the frozen dataclasses of `specs`.

Every key must be known and of the right type; the error for anything else is one line that names the
file, the place in it and, where a name is wrong, the nearest right one. Nothing here imports torch.
"""
from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from m2rl_core.domains import BENCHMARKS, DOMAINS
from m2rl_core.specs import Profile

KINDS = ("base", "sft", "rl", "opd", "merge", "eval", "weights", "kl", "judge", "sweep")  # of stages
MEASURED = ("interference_every", "variance_every")  # 0: never


class ProfileError(ValueError):
    """A profile that does not exist or that cannot be read; the message is one line."""


def repo_root() -> Path:
    """The nearest folder, from here upwards, that holds params/; else the one the package was installed from."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parent.parent):
        if (folder / "params").is_dir():
            return folder
    raise ProfileError(f"no params/ folder in {Path.cwd()} or above it: run this inside a clone of the repository")


def profile_names(folder: Path | None = None) -> list[str]:
    """The names of all profiles in `folder` (params/ of the repository)."""
    return sorted(path.stem for path in (folder or repo_root() / "params").glob("*.yaml"))


def load_profile(name_or_path: str | Path) -> Profile:
    """The profile of that name in params/, or of that file (anything that ends in .yaml); raises ProfileError."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = repo_root() / "params" / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ProfileError(f"unknown profile {path.stem!r}: no file {path}{_nearest(path.stem, profile_names())}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ProfileError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(content, dict):
        raise ProfileError(f"{path}: expected `key: value` lines, found {type(content).__name__}")
    if "name" in content:
        raise ProfileError(f"{path}: name: not a key here; the file's own name is the profile's")
    profile = _build(Profile, {"name": path.stem, **content}, "", path)
    _check(profile, path)
    return profile


def _nearest(name: str, known) -> str:
    known = list(known)
    close = difflib.get_close_matches(str(name), known, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known) or 'none'}"


def _build(cls, content: Any, where: str, path: Path):
    """An instance of the dataclass `cls` from a mapping, checked key by key."""
    if not isinstance(content, dict):
        raise ProfileError(f"{path}: {where}: expected a group of keys, found {content!r}")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in content:
        if key not in hints:
            raise ProfileError(f"{path}: {prefix}{key}: unknown key{_nearest(key, hints)}")
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in content:
            values[field.name] = _convert(hints[field.name], content[field.name], prefix + field.name, path)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ProfileError(f"{path}: {prefix}{field.name}: missing; this key is needed")
    return cls(**values)


def _convert(kind, value, where: str, path: Path):
    """`value` as `kind`; ints pass for floats, and so does 1e-4, which YAML 1.1 reads as text."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where, path)
    if origin is Literal:
        if value in args:
            return value
        raise ProfileError(f"{path}: {where}: unknown value {value!r}{_nearest(value, args)}")
    if origin is tuple and isinstance(value, list):
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], item, f"{where}[{i}]", path) for i, item in enumerate(value))
        if len(value) == len(args):
            pairs = zip(args, value, strict=True)
            return tuple(_convert(arg, item, f"{where}[{i}]", path) for i, (arg, item) in enumerate(pairs))
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(args[1], item, f"{where}.{key}", path) for key, item in value.items()}
    if kind is float and not isinstance(value, bool):
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
            return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    name = kind.__name__ if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) else str(kind)
    raise ProfileError(f"{path}: {where}: expected {name}, found {value!r}")


def _check(profile: Profile, path: Path) -> None:
    """Rules that a type cannot say; raises ProfileError at the first one broken."""
    def fail(where, what):
        raise ProfileError(f"{path}: {where}: {what}")

    def names(where, found, known, all_of_them=True):
        for name in found:
            if name not in known:
                fail(f"{where}.{name}", f"unknown name{_nearest(name, known)}")
        for name in known if all_of_them else ():
            if name not in found:
                fail(where, f"{name!r} is missing")

    names("resources", profile.resources, KINDS, all_of_them=False)
    for kind, taken in profile.resources.items():
        if taken.gpus < 0 or taken.cpus < 0:
            fail(f"resources.{kind}", f"{taken.gpus:g} GPUs and {taken.cpus} cores: nothing takes less than none")
    names("rl.rows", profile.rl.rows, DOMAINS)
    names("eval.items", profile.eval.items, BENCHMARKS)
    names("eval.k", profile.eval.k, BENCHMARKS)
    names("sft.blend", [line.domain for line in profile.sft.blend], (*DOMAINS, "judge"), all_of_them=False)
    for i, line in enumerate(profile.sft.blend):
        if not re.fullmatch(r"random sampling|use all|repeat \d+ times", line.sampling):
            fail(f"sft.blend[{i}].sampling",
                 f"{line.sampling!r} is none of 'random sampling', 'use all', 'repeat N times'")
    total = sum(line.share for line in profile.sft.blend)
    if abs(total - 1) > 0.005:
        fail("sft.blend", f"the shares add up to {total:.3f}, not to 1")
    if profile.seeds < 1:
        fail("seeds", f"{profile.seeds}: every policy needs at least one training run")
    if profile.model.heads % profile.model.kv_heads:
        fail("model.kv_heads", f"{profile.model.kv_heads} does not divide heads = {profile.model.heads}")
    for name in ("kl", "entropy"):
        if getattr(profile.rl, name) < 0:
            fail(f"rl.{name}", f"{getattr(profile.rl, name)}: a weight below 0 would push the wrong way; 0 leaves it out")
    if profile.rl.group < 2:
        fail("rl.group", "GRPO compares the rollouts of a group: at least 2 are needed")
    if profile.jobs < 1:
        fail("jobs", f"{profile.jobs}: at least one stage must be made at a time")
    if not 0 < profile.gpu_memory < 1:
        fail("gpu_memory", f"{profile.gpu_memory} is not in (0, 1): vLLM and the trainer share the GPU")
    if not 0 < profile.merge.density <= 1:
        fail("merge.density", f"{profile.merge.density} is not in (0, 1]")
    if not 0 <= profile.merge.drop_rate < 1:
        fail("merge.drop_rate", f"{profile.merge.drop_rate} is not in [0, 1)")
    for spec in ("model", "base", "sft", "rl", "opd", "eval"):
        for field in dataclasses.fields(getattr(profile, spec)):
            value = getattr(getattr(profile, spec), field.name)
            for key, number in value.items() if isinstance(value, dict) else [("", value)]:
                if type(number) is int and number < (0 if field.name in ("warmup", *MEASURED) else 1):
                    fail(f"{spec}.{field.name}" + (f".{key}" if key else ""), f"must be at least 1, not {number}")
    for spec in ("rl", "opd", "eval"):
        sampled, context = getattr(profile, spec), profile.model.context
        if sampled.max_new_tokens >= context:
            fail(f"{spec}.max_new_tokens", f"{sampled.max_new_tokens} leave no room for a prompt in model.context = {context}")
        if sampled.temperature <= 0:
            fail(f"{spec}.temperature", f"{sampled.temperature}: logits are divided by it, so it must be above 0")
