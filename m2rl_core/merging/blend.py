"""Merges one piece by every recipe: looks up what each method needs and calls it; recipes that differ by lambda
alone share the result."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from m2rl_core.merging import average, sce, ties
from m2rl_core.merging import task_arithmetic as ta
from m2rl_core.merging.diagnosis import Tally, rounded
from m2rl_core.merging.pieces import Piece
from m2rl_core.merging.recipe import Recipe
from m2rl_core.merging.shifts import Input, Shifts
from m2rl_core.merging.statistics import selection_of
from m2rl_core.merging.stored import CODES, FLOATS, not_finite

Put = Callable[[int, Piece, np.ndarray], None]  # takes (recipe, piece, merged values as stored), in any thread


class Blend:
    """The counter of the last pass: merges a piece by every recipe, hands it on, and counts for the diagnosis."""

    def __init__(self, recipes: Sequence[Recipe], inputs: Sequence[Sequence[Input]], known: Mapping,
                 tallies: Sequence[Tally], codes: Mapping[str, str], put: Put):
        self.recipes, self.inputs, self.known = recipes, inputs, known
        self.tallies, self.codes, self.put = tallies, codes, put
        alike: dict[tuple, list[int]] = {}
        for r, (recipe, wanted) in enumerate(zip(recipes, inputs, strict=True)):
            alike.setdefault((*wanted, recipe.method, *sorted(
                (name, value) for name, value in recipe.parameters.items() if name != "scale")), []).append(r)
        sources = [[getattr(want, "source", want) for want in wanted] for wanted in inputs]
        self.groups = sorted(alike.values(), key=lambda group: sources.index(sources[group[0]]))  # DARE's side by side

    def count(self, shifts: Shifts) -> list[tuple]:
        results: list[tuple] = [()] * len(self.recipes)
        for group in self.groups:
            shift, wide, kept = self._merged(self.recipes[group[0]], self.inputs[group[0]], shifts)
            for r in group:
                results[r] = kept, self._written(r, shifts, shift, wide)
        return results

    def _written(self, r: int, shifts: Shifts, shift: np.ndarray, wide: np.ndarray | None) -> tuple:
        recipe, piece = self.recipes[r], shifts.piece
        scale, code = recipe.parameters.get("scale", 1.0), code_of(recipe, self.codes[piece.name])
        if scale != 1:
            shift = shift * np.float32(scale)
        out, result = rounded(shifts.base, shift, wide, code)
        if not np.isfinite(result[-1]):
            refuse_overflow(out, code, recipe, piece)
        self.put(r, piece, out)
        return result

    def _merged(self, recipe: Recipe, inputs: Sequence[Input], shifts: Shifts) -> tuple:
        """(shift that the method gives before lambda, base + shift where that is what the method gives, how many
        of each expert's shifts took part, but for those that `statistics.survivors` counts)."""
        p, base, out = recipe.parameters, shifts.base, np.empty(shifts.piece.count, np.float32)
        weights = recipe.each("weight", len(inputs)) if "weight" in p else []
        if recipe.method in ("ties", "ties-dare"):
            sign = 1
            if p["zero_sign"] == "majority":
                sign = self.known["majority", tuple(inputs), p["vote"], tuple(weights)]
            trims, kept = shifts.trims(inputs)
            ties.merge(trims, weights, p["vote"] == "weighted", sign, p["normalize"], 0.0, out)
            return out, None, kept
        rows, kept = shifts.rows(inputs)
        if recipe.method == "average" and p["average_of"] == "weights":
            which = [1 + shifts.experts.index(want.expert) for want in inputs]
            average.of_weights(shifts.stored, which, weights, p["normalize"], out)
            return out - base, out, kept
        if recipe.method == "average":
            average.of_shifts(base, rows, weights, p["normalize"], out)
        elif recipe.method == "sce":
            selection = selection_of(recipe, [want.expert for want in inputs])
            weights = sce.expert_weights(self.known["squares", selection, shifts.piece.name], p["uniform_below"])
            if p["select_masks"] == "deltas":
                rows = shifts.selected(selection)
            sce.merge(base, rows, weights, p["divisor_floor"], out)
        else:
            ta.merge(base, rows, weights, p["normalize"], out)
        return out, None, kept

    def add(self, piece: Piece, result: list[tuple]) -> None:
        for tally, (kept, counts) in zip(self.tallies, result, strict=True):
            tally.add(piece, kept, counts)


def refuse_overflow(out: np.ndarray, code: str, recipe: Recipe, piece: Piece) -> None:
    """ValueError where a merged piece holds NaN or Inf: its values are beyond the output type."""
    nan, inf = not_finite(out, code)
    if nan or inf:
        raise ValueError(f"the {recipe.method} merge, as {code}, holds {nan} NaN and {inf} Inf among "
                         f"{piece.count} values of {piece.name}: write float32, or take a smaller lambda")


def code_of(recipe: Recipe, base: str) -> str:
    """The type a recipe writes: its own, or the base's; what is not floating point stays so."""
    return CODES[recipe.out_dtype] if recipe.out_dtype and base in FLOATS else base
