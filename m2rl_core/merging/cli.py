"""`python -m m2rl_core merge RECIPE.yaml ... OUT_DIR`: recipes in mergekit's YAML, with mergekit's meaning.

`preset: paper` (or released-code) at the top level gives the names the paper's meaning instead, and any
parameter of `recipe` may stand beside mergekit's under `parameters`. `density` under dare_ties and dare_linear
is what DARE keeps, as in mergekit; under our own names for them it is what TIES keeps. Arithmetic is always
float32: `dtype` sets the output's type where `out_dtype` does not.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import yaml

from m2rl_core.merging import recipe as recipes
from m2rl_core.merging.folders import merge_folders

TOP = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "preset")
NOT_HERE = ("slices", "modules", "tokenizer", "chat_template", "output_dtype")
PER_MODEL = ("weight", "density", "drop_rate")
RENAMED = {"lambda": "scale", "select_topk": "select"}


def main(argv: Sequence[str]) -> int:
    """Runs the merges in one read; returns 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m m2rl_core merge", description="Merge models by mergekit recipes.")
    parser.add_argument("recipe", type=Path, nargs="+", metavar="RECIPE.yaml",
                        help="several on one base are merged in one read, each into OUT_DIR/<name of the recipe>")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0, help="which shifts DARE drops (default 0)")
    parser.add_argument("--allow-identical", action="store_true", help="go on where an expert is the base itself")
    parser.add_argument("--sha256", action="store_true", help="also put SHA-256 of every weight file into merge.json")
    args = parser.parse_args(argv)
    try:
        done = merge(args.recipe, args.out, args)
    except (ValueError, OSError) as error:
        print(f"merge: {error}", file=sys.stderr)
        return 2
    for out, result in done.items():
        describe(out, result["diagnosis"])
    return 0


def merge(recipes: Sequence[Path], out: Path, args: argparse.Namespace) -> dict[Path, dict]:
    """Reads the recipes, which must have one base, and merges; as `merge_folders`, plus errors of `read`."""
    plans = {path: read(path, args.seed) for path in recipes}
    outs = {path: out / path.stem if len(plans) > 1 else out for path in plans}
    if len(set(outs.values())) < len(recipes):
        raise ValueError(f"two recipes have one name, and so one folder in {out}: rename one")
    if out.exists():
        raise ValueError(f"{out} exists: choose another output folder, or remove it first")
    bases = {base: path for path, (base, _, _) in plans.items()}
    if len(bases) > 1:
        (one, first), (two, second) = list(bases.items())[:2]
        raise ValueError(f"{first} starts from {one} and {second} from {two}: merge them one at a time")
    experts = {name: folder for _, models, _ in plans.values() for name, folder in models.items()}
    base = next(iter(bases))
    # a linear merge without a base_model borrows its first model's config and is not compared with it
    allow = args.allow_identical or base in experts.values()
    try:
        return merge_folders(base, experts, {outs[path]: plan for path, (_, _, plan) in plans.items()},
                             allow_identical=allow, sha256=args.sha256, report=_progress)
    except BaseException:
        if len(plans) > 1 and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise


def describe(out: Path, diagnosis: dict) -> None:
    """Prints what a user should know of a finished merge."""
    for name, share in diagnosis["changed"].items():
        if name in diagnosis["density"]:
            print(f"{name}: changes {share:.1%} of the weights, {diagnosis['density'][name]:.1%} reach the merge")
    print(f"signs in conflict where two or more changed: {diagnosis['sign_conflict']:.1%}; "
          f"lost to rounding: {diagnosis['lost']:.1%} of the moved weights")
    for warning in diagnosis["warnings"]:
        print(f"warning: {warning}")
    print(f"{out}: written, see merge.json")


def read(path: Path, seed: int = 0) -> tuple[Path, dict[str, Path], recipes.Recipe]:
    """(base folder, {model as written: folder}, recipe) of a YAML file; ValueError names the file and the key."""
    try:
        config = yaml.safe_load(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("is not a mapping of keys to values")
        return parse(config, seed)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse(config: dict, seed: int = 0) -> tuple[Path, dict[str, Path], recipes.Recipe]:
    """The same from a parsed recipe."""
    for key in config:
        if key in NOT_HERE:
            raise ValueError(f"{key!r} is mergekit's but not supported here: give whole models under 'models'")
        recipes.known(key, TOP, "key")
    if config.get("tokenizer_source", "base") != "base":
        raise ValueError("tokenizer_source: only 'base' is supported, as embeddings are never re-cut here")
    method, preset = config.get("merge_method"), config.get("preset", "mergekit")
    recipes.known(method, (*recipes.MERGEKIT_NAMES, *recipes.METHODS), "merge_method")
    models, own = _models(config)
    shared = _named(config.get("parameters") or {}, method, "the recipe")
    method = recipes.MERGEKIT_NAMES.get(method, method)
    base = config.get("base_model")
    if method == "average" and base is None:
        base = next(iter(models), None)  # only config and tokenizer are taken from it
    elif method != "average":
        models.pop(base, None)
        if base is None:
            raise ValueError(f"{config['merge_method']} needs base_model: the model that the experts started from")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"base_model must be a folder's name, not {base!r}")
    if not models:
        raise ValueError("'models' names no expert: list at least one")
    values = {name: value for name, value in shared.items() if name not in PER_MODEL}
    for name in PER_MODEL:
        each = [own[model].get(name, shared.get(name)) for model in models]
        missing = [model for model, value in zip(models, each, strict=True) if value is None]
        if not missing:
            values[name] = each
        elif len(missing) < len(each):
            default = recipes.PRESETS[preset][method].get(name) if preset in recipes.PRESETS else None
            values[name] = [default if value is None else value for value in each]
        if name == "weight" and missing and preset == "mergekit" and method != "sce":
            raise ValueError(f"{missing[0]} has no weight: mergekit needs one under its 'parameters'")
    plan = recipes.make(method, preset, experts=tuple(models), seed=seed,
                        out_dtype=config.get("out_dtype") or config.get("dtype") or "", **values)
    return Path(base), {model: Path(model) for model in models}, plan


def _models(config: dict) -> tuple[dict[str, None], dict[str, dict]]:
    """The models in order, and each one's own parameters by our names."""
    models, own = {}, {}
    for entry in config.get("models") or ():
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            raise ValueError(f"an entry of 'models' needs 'model: FOLDER', this has none: {entry!r}")
        for key in entry:
            recipes.known(key, ("model", "parameters"), f"key of {entry['model']}")
        if entry["model"] in models:
            raise ValueError(f"{entry['model']} is listed twice: give it one entry and a weight")
        models[entry["model"]] = None
        own[entry["model"]] = _named(entry.get("parameters") or {}, config["merge_method"], entry["model"],
                                     PER_MODEL)
    return models, own


def _named(parameters: dict, written: str, where: str, only: Sequence[str] = ()) -> dict:
    """Parameters of a recipe by our names; int8_mask, which changes no value, is left out.

    `written` is the method as the recipe has it; `only` are the names that a single model may set.
    """
    ours = recipes.PRESETS["paper"][recipes.MERGEKIT_NAMES.get(written, written)]
    dare = written in ("dare_ties", "dare_linear")
    rescale = "drop_rescale" if "drop_rescale" in ours else "trim_rescale"
    renamed = {old: new for old, new in (*RENAMED.items(), ("rescale", rescale)) if new in ours} | {"int8_mask": ""}
    allowed = {*ours, *renamed, *(["density"] if dare else [])} & (set(only) or {*ours, *renamed, "density"})
    found = {}
    if not isinstance(parameters, dict):
        raise ValueError(f"'parameters' of {where} must be a mapping of names to values, not {parameters!r}")
    for key, value in parameters.items():
        recipes.known(key, sorted(allowed), f"parameter of {where}")
        if key in PER_MODEL and isinstance(value, (list, dict)):
            raise ValueError(f"{where}: {key} by layer or by filter is not supported: give one number")
        if key == "density" and dare:
            found["drop_rate"] = float(1 - Fraction(str(value)))
        elif key == "rescale":
            found[rescale] = "l1" if value else "none"
        elif key != "int8_mask":
            found[renamed.get(key, key)] = value
    return found


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what}: {done} of {total} tensors\033[K", end="\n" if done == total else "", file=sys.stderr)
