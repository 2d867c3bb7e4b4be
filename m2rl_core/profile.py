"""A profile is one YAML file of params/, read into the frozen dataclasses of `specs`.

Every key must be known and of the right type; the error for anything else is one line that names the
file, the place in it and, where a name is wrong, the nearest right one. Nothing here imports torch.
`extends: other` takes everything from another profile but what the file says itself: groups of keys are joined, a list
or a value replaces the other's, `~` removes a key. Paths in a profile start at the folder that holds params/, for
a profile elsewhere at its own folder.
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

from m2rl_core.domains import BENCHMARKS, DOMAINS, module
from m2rl_core.specs import ModelSpec, PretrainedSpec, Profile, Resources

KINDS = ("base", "sft", "rl", "opd", "merge", "eval", "weights", "kl", "judge", "sweep",
         "import")  # of stages
TOGETHER = ("base", "sft", "rl", "opd", "eval")  # kinds that several processes make together
SEVERAL = ("FSDP", "MULTI_GPU")  # accelerate's distributed_type, where its launcher starts as many processes as it is told
MEASURED = ("interference_every", "variance_every")  # 0: never
MAY_BE_0 = ("warmup", "overlap", *MEASURED)


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
    path = _file(name_or_path)
    content, files = _content(path)
    profile = _placed(_build(Profile, {"name": path.stem, **content}, "", files), path)
    _check(profile, files)
    return _narrowed(profile)


class Files(dict):
    """Which file said what: place -> file, for overlays; `of` answers for any place."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def of(self, place: str) -> Path:
        found = [known for known in self if place == known or place.startswith((f"{known}.", f"{known}["))]
        return self[max(found, key=len)] if found else self.path


def _file(name_or_path: str | Path, at: str = "") -> Path:
    """The file of a profile's name, or the file itself; `at` begins the error."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = repo_root() / "params" / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ProfileError(f"{at}unknown profile {path.stem!r}: no file {path}{_nearest(path.stem, profile_names())}")
    return path


def _content(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict, Files]:
    """What a file says, over what the profile says that it extends; and which file said what."""
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
    if "extends" not in content:
        return content, Files(path)
    parent = content.pop("extends")
    if not isinstance(parent, str):
        raise ProfileError(f"{path}: extends: expected a profile's name or file, found {parent!r}")
    if parent.endswith((".yaml", ".yml")):
        parent = path.parent / parent
    elif (path.parent / f"{parent}.yaml").is_file():
        parent = path.parent / f"{parent}.yaml"
    base = _file(parent, f"{path}: extends: ").resolve()
    if base in (path.resolve(), *above):
        circle = " -> ".join(file.stem for file in (*above, path, base))
        raise ProfileError(f"{path}: extends: {circle} is a circle; leave it out in one of them")
    under, files = _content(base, (*above, path.resolve()))
    files.path, inherited = path, Files(base)
    inherited.update(dict.fromkeys(under, base) | files)
    files.clear()
    files.update(inherited)
    return _over(under, content, "", path, files), files


def _over(under: dict, over: dict, where: str, path: Path, files: Files) -> dict:
    """`over` laid on `under`; a group of keys on a group joins them."""
    found = dict(under)
    for key, value in over.items():
        place = f"{where}{key}"
        if value is None:
            if key not in found:
                raise ProfileError(f"{files.path}: {place}: ~ removes a key, but there is none{_nearest(key, found)}")
            del found[key]
            files[place] = path
            continue
        other = found.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            if place == "model" and ("source" in value) != ("source" in other) and {"source", "hidden"} & value.keys():
                other = {}  # the other way to say a model
            value = _over(other, value, f"{place}.", path, files)
        else:
            for known in [known for known in files if known.startswith((f"{place}.", f"{place}["))]:
                del files[known]
            files[place] = path
        found[key] = value
        files.setdefault(place, path)
    return found


def _placed(profile: Profile, path: Path) -> Profile:
    """The profile with absolute paths: of folders that are there, of files of domains and of accelerate's config files."""
    path = path.absolute()
    home = path.parent.parent if path.parent.name == "params" else path.parent

    def full(source: str) -> str:
        name = Path(source).expanduser()
        there = bool(source) and (home / name).is_dir()
        return str((home / name).absolute()) if there or source.startswith(("/", "./", "../", "~")) else source

    domains = tuple(str((home / Path(entry).expanduser()).absolute()) if entry.endswith(".py") else entry
                    for entry in profile.domains)
    model = profile.model
    if isinstance(model, PretrainedSpec):
        model = dataclasses.replace(model, source=full(model.source))
    resources = {kind: dataclasses.replace(taken, config=str((home / Path(taken.config).expanduser()).absolute()))
                 if taken.config else taken for kind, taken in profile.resources.items()}
    return dataclasses.replace(profile, domains=domains, model=model, resources=resources,
                               imports={name: full(source) for name, source in profile.imports.items()})


def _narrowed(profile: Profile) -> Profile:
    """Without what an overlay inherits for domains and benchmarks that are not its own."""
    if profile.domains == DOMAINS:
        return profile
    rows = {name: n for name, n in profile.rl.rows.items() if name in profile.domain_names}
    items, k = ({name: n for name, n in told.items() if name in profile.benchmarks}
                for told in (profile.eval.items, profile.eval.k))
    return dataclasses.replace(profile, rl=dataclasses.replace(profile.rl, rows=rows),
                               eval=dataclasses.replace(profile.eval, items=items, k=k))


def _nearest(name: str, known) -> str:
    known = list(known)
    close = difflib.get_close_matches(str(name), known, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known) or 'none'}"


def _build(cls, content: Any, where: str, files: Files):
    """An instance of the dataclass `cls` from a mapping, checked key by key."""
    if not isinstance(content, dict):
        raise ProfileError(f"{files.of(where)}: {where}: expected a group of keys, found {content!r}")
    hints = typing.get_type_hints(cls)
    known = {field.metadata.get("key", field.name): field for field in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in content:
        if key not in known:
            raise ProfileError(f"{files.of(prefix + str(key))}: {prefix}{key}: unknown key{_nearest(key, known)}")
    values = {}
    for key, field in known.items():
        if key in content:
            values[field.name] = _convert(hints[field.name], content[key], prefix + key, files)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ProfileError(f"{files.of(prefix + key)}: {prefix}{key}: missing; this key is needed")
    return cls(**values)


def _convert(kind, value, where: str, files: Files):
    """`value` as `kind`; ints pass for floats, and so does 1e-4, which YAML 1.1 reads as text."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        args = [arg for arg in args if arg is not types.NoneType]  # a key that may be left out
        fits = [arg for arg in args if not (isinstance(value, dict) and ("source" in value) != (arg is PretrainedSpec))]
        return _convert(fits[0] if len(args) > 1 and fits else args[0], value, where, files)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where, files)
    if origin is Literal:
        if value in args:
            return value
        raise ProfileError(f"{files.of(where)}: {where}: unknown value {value!r}{_nearest(value, args)}")
    if origin is tuple and isinstance(value, list):
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], item, f"{where}[{i}]", files) for i, item in enumerate(value))
        if len(value) == len(args):
            pairs = zip(args, value, strict=True)
            return tuple(_convert(arg, item, f"{where}[{i}]", files) for i, (arg, item) in enumerate(pairs))
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(args[1], item, f"{where}.{key}", files) for key, item in value.items()}
    if kind is float and not isinstance(value, bool):
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
            return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    name = kind.__name__ if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) else str(kind)
    raise ProfileError(f"{files.of(where)}: {where}: expected {name}, found {value!r}")


def _check(profile: Profile, files: Files) -> None:
    """Rules that a type cannot say; raises ProfileError at the first one broken."""
    def fail(where, what):
        raise ProfileError(f"{files.of(where)}: {where}: {what}")

    def names(where, found, known, needed=()):
        for name in found:
            if name not in known:
                fail(f"{where}.{name}", f"unknown name{_nearest(name, known)}")
        for name in needed:
            if name not in found:
                fail(where, f"{name!r} is missing")

    names("resources", profile.resources, KINDS)
    for kind, taken in profile.resources.items():
        _check_taken(f"resources.{kind}", kind, taken, fail)
    _check_models(profile, fail)
    own = tuple(profile.files)
    names("rl.rows", profile.rl.rows, (*DOMAINS, *own), profile.domain_names)
    names("eval.items", profile.eval.items, (*BENCHMARKS, *own), profile.benchmarks)
    names("eval.k", profile.eval.k, (*BENCHMARKS, *own), profile.benchmarks)
    for name in ("sampling", "revisions", "rules"):
        names(f"eval.{name}", getattr(profile.eval, name), (*BENCHMARKS, *own))
    names("sft.blend", [line.domain for line in profile.sft.blend], (*DOMAINS, *own, "judge"))
    for name, rule in profile.data.rules.items():
        if name not in DOMAINS:
            fail(f"data.rules.{name}", f"unknown name{_nearest(name, DOMAINS)}")
        rules = getattr(module(name), "RULES", ())
        if rule not in rules:
            fail(f"data.rules.{name}", f"unknown rule {rule!r}{_nearest(rule, rules)}")
    for i, line in enumerate(profile.sft.blend):
        if not re.fullmatch(r"random sampling|use all|repeat \d+ times", line.sampling):
            fail(f"sft.blend[{i}].sampling",
                 f"{line.sampling!r} is none of 'random sampling', 'use all', 'repeat N times'")
    total = sum(line.share for line in profile.sft.blend)
    if abs(total - 1) > 0.005:
        fail("sft.blend", f"the shares add up to {total:.3f}, not to 1")
    if profile.seeds < 1:
        fail("seeds", f"{profile.seeds}: every policy needs at least one training run")
    if isinstance(profile.model, ModelSpec) and profile.model.heads % profile.model.kv_heads:
        fail("model.kv_heads", f"{profile.model.kv_heads} does not divide heads = {profile.model.heads}")
    for name in ("kl", "entropy"):
        if getattr(profile.rl, name) < 0:
            fail(f"rl.{name}", f"{getattr(profile.rl, name)}: a weight below 0 would push the wrong way; 0 leaves it out")
    if profile.rl.group < 2:
        fail("rl.group", "GRPO compares the rollouts of a group: at least 2 are needed")
    for name in ("rl", "opd"):
        _check_overlap(name, getattr(profile, name), fail)
    if profile.jobs < 1:
        fail("jobs", f"{profile.jobs}: at least one stage must be made at a time")
    for name in ("replicas", "tensor_parallel"):
        number = getattr(profile.vllm, name)
        if number < 1:
            fail(f"vllm.{name}", f"{number}: at least one GPU computes")
        if number > 1 and profile.vllm.servers:
            fail(f"vllm.{name}", f"{number}, beside vllm.servers, which have what they were started with: give one of them")
    for i, address in enumerate(profile.vllm.servers):
        if not re.fullmatch(r"([^:\s]+|\[[\da-fA-F:]+\]):\d+", address):
            fail(f"vllm.servers[{i}]", f"{address!r} is no server: write host:port, as in node2:8123")
        if profile.vllm.servers.count(address) > 1:
            fail("vllm.servers", f"{address} stands there twice")
    if profile.vllm.servers and profile.jobs > 1:
        fail("jobs", f"{profile.jobs} stages at a time, but a vLLM server serves one of them: jobs: 1")
    if not 0 < profile.gpu_memory < 1:
        fail("gpu_memory", f"{profile.gpu_memory} is not in (0, 1): vLLM and the trainer share the GPU")
    if not 0 < profile.merge.density <= 1:
        fail("merge.density", f"{profile.merge.density} is not in (0, 1]")
    if not 0 <= profile.merge.drop_rate < 1:
        fail("merge.drop_rate", f"{profile.merge.drop_rate} is not in [0, 1)")
    for spec in ("model", "base", "sft", "rl", "opd", "eval"):
        for field in dataclasses.fields(getattr(profile, spec)) if getattr(profile, spec) else ():
            value = getattr(getattr(profile, spec), field.name)
            for key, number in value.items() if isinstance(value, dict) else [("", value)]:
                if type(number) is int and number < (0 if field.name in MAY_BE_0 else 1):
                    fail(f"{spec}.{field.name}" + (f".{key}" if key else ""), f"must be at least 1, not {number}")
    for spec in ("rl", "opd", "eval"):
        sampled, context = getattr(profile, spec), profile.model and profile.model.context
        if context and sampled.max_new_tokens >= context:
            fail(f"{spec}.max_new_tokens", f"{sampled.max_new_tokens} leave no room for a prompt in model.context = {context}")
        if sampled.temperature <= 0:
            fail(f"{spec}.temperature", f"{sampled.temperature}: logits are divided by it, so it must be above 0")
    asked = profile.analysis.layers
    if asked and profile.analysis.layer not in asked:
        fail("analysis.layers", f"{profile.analysis.layer} is not among them, which 3.3 shows (analysis.layer)")
    if len(set(asked)) < len(asked) or min(asked, default=0) < 0:
        fail("analysis.layers", f"{', '.join(map(str, asked))}: each layer once, counted from 0")
    if isinstance(profile.model, ModelSpec) and max(asked, default=0) >= profile.model.layers:
        fail("analysis.layers", f"layer {max(asked)} is asked for, model.layers is {profile.model.layers}")
    if not 0 < profile.data.share <= 1:
        fail("data.share", f"{profile.data.share} is not in (0, 1]: it is the part of Table 1's samples")
    if min(profile.data.first, profile.data.prompt_tokens, profile.data.row_tokens) < 0:
        fail("data", "first, prompt_tokens and row_tokens: at least 0, which is no limit")
    told, context = profile.analysis.judge_tokens, profile.model and profile.model.context
    if told < 0 or context and told >= context:
        fail("analysis.judge_tokens", f"{told} is not from 0 (one word) to below model.context = {context}")
    for name in profile.eval.items:
        asked, where = profile.eval.sampled_by(name), f"eval.sampling.{name}" if name in profile.eval.sampling else "eval"
        if not 0 < asked["top_p"] <= 1:
            fail(f"{where}.top_p", f"{asked['top_p']} is not in (0, 1]: the share of the likeliest tokens that is drawn from")
        if min(asked.values()) < 0:
            fail(where, f"{asked}: nothing of this can be below 0")


def _check_taken(where: str, kind: str, taken: Resources, fail) -> None:
    """What a kind of stage takes, and by how many processes it is made; `fail(place, what)`."""
    n, nodes = taken.processes, taken.nodes
    if taken.gpus < 0 or taken.cpus < 0:
        fail(where, f"{taken.gpus:g} GPUs and {taken.cpus} cores: nothing takes less than none")
    if n < 1 or nodes < 1 or n % nodes:
        fail(where, f"{n} processes on {nodes} nodes: each node has as many as the others, at least one")
    if n > 1 and not taken.config:
        fail(f"{where}.config", f"missing; a file of params/accelerate says how {n} processes hold the model")
    if not taken.config:
        return
    if kind not in TOGETHER:
        fail(where, f"one process makes a stage of kind {kind}; several make {', '.join(TOGETHER)}")
    if taken.gpus and n > taken.gpus * nodes:
        fail(where, f"{n // nodes} processes on a node that gives {taken.gpus:g} GPUs: each takes one")
    try:
        content = yaml.safe_load(Path(taken.config).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        fail(f"{where}.config", f"{taken.config} cannot be read ({str(error).splitlines()[0]}): name a file of accelerate's, "
                                "such as params/accelerate/fsdp-1node-8.yaml")
    how = content.get("distributed_type") if isinstance(content, dict) else None
    if how not in SEVERAL:
        fail(f"{where}.config", f"{taken.config}: distributed_type is {how}, and this trainer has {' and '.join(SEVERAL)}")


def _check_overlap(name: str, spec, fail) -> None:
    """Rollouts that are one update old need importance weights, or the gradient is another policy's."""
    if not 0 <= spec.overlap <= 1:
        fail(f"{name}.overlap", f"{spec.overlap} is neither 0 nor 1: a batch is sampled at most one step ahead")
    if spec.overlap and spec.is_correction == "none":
        fail(f"{name}.overlap", f"1 samples with weights that are one update old, and {name}.is_correction: none would leave "
                                "that bias in the gradient; set it to mis or tis, or overlap to 0")
    if spec.overlap and spec.loss == "full":
        fail(f"{name}.overlap", f"1 needs importance weights, which {name}.loss: full has not; set it to sampled, or "
                                "overlap to 0")


def _check_models(profile: Profile, fail) -> None:
    """Which domains and models there are; `fail(place, what)`."""
    for i, entry in enumerate(profile.domains):
        name, where = profile.domain_names[i], f"domains[{i}]"
        if entry not in DOMAINS and not entry.endswith(".py"):
            fail(where, f"{entry!r} is none of the five and no Python file{_nearest(entry, DOMAINS)}")
        if profile.domain_names.count(name) > 1:
            fail(where, f"{name!r} stands there twice")
        if entry.endswith(".py") and not Path(entry).is_file():
            fail(where, f"no file {entry}: give it from the folder that holds params/")
        taken = name in (*DOMAINS, *BENCHMARKS, "multi", "judge")
        if entry.endswith(".py") and (taken or not re.fullmatch(r"[a-z][a-z0-9_]*", name)):
            fail(where, f"a domain's name is its file's, here {name!r}: small letters, digits and _, no name that is taken")
    if not profile.domains:
        fail("domains", "at least one is needed")
    model, imported = profile.model, profile.imports
    if model is None and "sft" not in imported:
        fail("model", "missing; give a shape, or `source: folder or owner/name`, or import `sft`")
    if isinstance(model, ModelSpec) and profile.base is None and "sft" not in imported:
        fail("base", "missing; a model that is trained from scratch needs it")
    if isinstance(model, PretrainedSpec):
        _check_source("model.source", model.source + (f"@{model.revision}" if model.revision else ""), fail)
    trained = (*(f"rl-{name}" for name in profile.domain_names), "rl-multi", "mt-opd")
    for name, source in imported.items():
        if name == "base":
            fail("import.base", "give it as `model: {source: ..., context: ...}`")
        if name not in ("sft", *trained):
            if name.removeprefix("rl-") in DOMAINS:
                fail(f"import.{name}", f"its domain is not in `domains`, which has {', '.join(profile.domain_names)}")
            fail(f"import.{name}", f"unknown model{_nearest(name, ('sft', *trained))}")
        if source:
            _check_source(f"import.{name}", source, fail)
    for name in profile.train or ():
        if name not in ("sft", *trained):
            fail("train", f"unknown policy {name!r}{_nearest(name, trained)}")
        if name in imported:
            fail("train", f"{name!r} is imported; it cannot be trained, too")
    if profile.seeds > 1 and set(imported) - {"sft"}:
        fail("seeds", f"{profile.seeds}, but {', '.join(set(imported) - {'sft'})} is brought once: use seeds: 1")


def _check_source(where: str, source: str, fail) -> None:
    if not source.startswith("/") and not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source):
        fail(where, f"{source!r} is neither a folder that is there nor a hub id, owner/name@revision")
