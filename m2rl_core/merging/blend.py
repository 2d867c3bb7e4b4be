"""Merges one piece by every recipe: looks up what each method needs and calls it; recipes that differ by lambda
alone share the result."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from m2rl_core.merging import average, sce, ties
from m2rl_core.merging import task_arithmetic as ta
from m2rl_core.merging.diagnosis import Tally
from m2rl_core.merging.pieces import Piece
from m2rl_core.merging.recipe import Recipe
from m2rl_core.merging.shifts import BASE, Input, Shifts
from m2rl_core.merging.statistics import selection_of

Put = Callable[[int, Piece, Tensor], None]  # takes (recipe, piece, merged values in the output type), in any thread


class Blend:
    """The counter of the last pass: merges a piece by every recipe, hands it on, and counts for the diagnosis."""

    def __init__(self, recipes: Sequence[Recipe], inputs: Sequence[Sequence[Input]], known: Mapping,
                 tallies: Sequence[Tally], put: Put):
        self.recipes, self.inputs, self.known, self.tallies, self.put = recipes, inputs, known, tallies, put

    def count(self, shifts: Shifts) -> list[tuple]:
        return [self._one(r, shifts) for r in range(len(self.recipes))]

    def _one(self, r: int, shifts: Shifts) -> tuple:
        recipe, inputs, piece = self.recipes[r], self.inputs[r], shifts.piece
        key = ("merged", recipe.method, tuple(inputs), *sorted(
            (name, value) for name, value in recipe.parameters.items() if name != "scale"))
        merged, wide = shifts.once(key, lambda: self._merged(recipe, inputs, shifts))
        scale = recipe.parameters.get("scale", 1.0)
        if scale != 1:
            merged = merged * scale
        if wide is None or scale != 1:
            wide = shifts.base + merged
        dtype = dtype_of(recipe, shifts.raw[BASE].dtype)
        out = wide.to(dtype)
        rounded = shifts.once(("rounded", dtype), lambda: shifts.base.to(dtype).float())
        result = Tally.count(shifts.base, rounded, merged, out)
        if not np.isfinite(result[-1]):
            refuse_overflow(out, recipe, piece)
        self.put(r, piece, out)
        return [shifts.nonzero(want) for want in inputs], result

    def _merged(self, recipe: Recipe, inputs: Sequence[Input], shifts: Shifts) -> tuple[Tensor, Tensor | None]:
        """(shift that the method gives before lambda, base + shift where that is what the method gives)."""
        p, base = recipe.parameters, shifts.base
        rows = [shifts.of(want) for want in inputs]
        weights = recipe.each("weight", len(rows)) if "weight" in p else []
        if recipe.method == "average" and p["average_of"] == "weights":
            models = [shifts.raw["expert", want.expert].to(base.device).float() for want in inputs]
            wide = average.of_weights(models, weights=weights, normalize=p["normalize"])
            return wide - base, wide
        if recipe.method == "average":
            return average.of_shifts(base, rows, weights=weights, normalize=p["normalize"]), None
        if recipe.method == "sce":
            selection = selection_of(recipe, [want.expert for want in inputs])
            weights = sce.expert_weights(self.known["squares", selection, shifts.piece.name], p["uniform_below"])
            if p["select_masks"] == "deltas":
                rows = shifts.selected(selection)
            return sce.merge(rows, weights=weights, divisor_floor=p["divisor_floor"]), None
        if recipe.method in ("ta", "ta-dare"):
            return ta.merge(rows, weights=weights, normalize=p["normalize"]), None
        sign = 1
        if p["zero_sign"] == "majority":
            sign = self.known["majority", tuple(inputs), p["vote"], tuple(weights)]
        return ties.merge(rows, weights=weights, vote=p["vote"], zero_sign=sign, normalize=p["normalize"]), None

    def add(self, piece: Piece, result: list[tuple]) -> None:
        for tally, (kept, counts) in zip(self.tallies, result, strict=True):
            tally.add(piece, kept, counts)


def refuse_overflow(out: Tensor, recipe: Recipe, piece: Piece) -> None:
    """ValueError where a merged piece holds NaN or Inf: its values are beyond the output type."""
    nan, inf = int(out.isnan().sum()), int(out.isinf().sum())
    if nan or inf:
        raise ValueError(f"the {recipe.method} merge, as {out.dtype}, holds {nan} NaN and {inf} Inf among "
                         f"{piece.count} values of {piece.name}: write float32, or take a smaller lambda")


def dtype_of(recipe: Recipe, base: torch.dtype) -> torch.dtype:
    """The type a recipe writes: its own, or the base's; what is not floating point stays so."""
    return getattr(torch, recipe.out_dtype) if recipe.out_dtype and base.is_floating_point else base
