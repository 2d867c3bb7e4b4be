"""Model merging: one method a file, pure functions over arrays; `driver` streams tensors through recipes.

    merge_state(base, {"a": a, "b": b}, "ties", density=0.5)     dicts of tensors, for a look by hand
    folders.merge_folders(base, experts, {out: recipe.make("ties"), ...})     model folders, one read for all
    python -m m2rl_core merge RECIPE.yaml OUT_DIR
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from m2rl_core.merging import recipe as recipes
from m2rl_core.merging.folders import write_models

if TYPE_CHECKING:
    from torch import Tensor


def merge_state(
    base_state: Mapping[str, Tensor], expert_states: Mapping[str, Mapping[str, Tensor]], method: str, *,
    preset: str = "paper", seed: int = 0, out_dtype: str = "", **parameters,
) -> dict[str, Tensor]:
    """The merged state dict, in the base's types unless `out_dtype`; arguments as in `recipe.make`."""
    from m2rl_core.merging.states import StateMerger  # here, as a merge of folders does without torch
    plan = recipes.make(method, preset, seed=seed, out_dtype=out_dtype, **parameters)
    return {name: merged for name, (merged,) in StateMerger(base_state, expert_states, [plan], allow_identical=True)}


def build(ctx) -> None:
    """The merge stages of the study: the experts in ctx.inputs on `sft`, into ctx.out.

    Settings: method (a key of recipe.METHODS) and those of density, drop_rate and scale that the stage reads;
    all else is the paper's preset. SCE has no density: the paper's authors leave out its select step.
    """
    settings = ctx.stage.settings
    method = settings["method"]
    recipes.known(method, recipes.METHODS, "merge method")
    values = {name: settings[name] for name in ("density", "drop_rate", "scale")
              if name in settings and name in recipes.PRESETS["paper"][method]}
    plan = recipes.make(method, seed=settings.get("seed", 0), **values)
    experts = {name: ctx.inputs[name] for name in settings.get("experts", ctx.inputs) if name != "sft"}
    write_models(ctx.inputs["sft"], experts, {ctx.out: plan}, allow_identical=True)
