"""What a user should know about a merge: how much was changed, in conflict, trimmed and lost to rounding.

Counted piece by piece, beside the merge: `count` in any thread, `add` in the order of pieces.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from m2rl_core.merging.counting import array, count, sign_counts
from m2rl_core.merging.pieces import Piece
from m2rl_core.merging.shifts import Shifts, Source

MERGEKIT_SCE_LIMIT = 1e-6  # below it mergekit's SCE gives every expert the same weight, without a word


class NotFinite(Exception):
    """An input holds NaN or Inf; the argument is the tensor's name."""


class Survey:
    """Counts over the experts' shifts before any method touches them; shared by all recipes of a run."""

    def __init__(self, experts: Sequence[str]):
        self.changed = dict.fromkeys(experts, 0)
        self.values = self.shared = self.conflicts = 0

    def count(self, shifts: Shifts) -> tuple:
        """Raises NotFinite. A sum that is finite has finite terms; where it is not, the values are looked at."""
        if not all(math.isfinite(float(row.sum())) for row in shifts.deltas.values()):
            if not all(bool(torch.isfinite(stored).all()) for stored in shifts.raw.values()):
                raise NotFinite(shifts.piece.name)
        return [shifts.nonzero(Source(expert)) for expert in shifts.deltas], *sign_counts(list(shifts.deltas.values()))

    def add(self, piece: Piece, result: tuple) -> None:
        changed, shared, conflicts = result
        for expert, more in zip(self.changed, changed, strict=True):
            self.changed[expert] += more
        self.values += piece.count
        self.shared += shared
        self.conflicts += conflicts

    def settled(self) -> bool:
        return True

    def unchanged(self) -> list[str]:
        return [expert for expert, n in self.changed.items() if n == 0]

    def result(self) -> dict:
        """Shares in [0, 1]: weights that each expert changed; of those that two or more changed, signs in conflict."""
        return {
            "weights": self.values,
            "changed": {expert: _share(n, self.values) for expert, n in self.changed.items()},
            "sign_conflict": _share(self.conflicts, self.shared),
        }


class Tally:
    """Counts over one recipe's pieces: what reached the merge, and what of the result the output type holds."""

    def __init__(self, experts: Sequence[str]):
        self.kept = dict.fromkeys(experts, 0)
        self.values = self.moved = self.lost = 0
        self.change = self.error = 0.0

    @staticmethod
    def count(base: Tensor, rounded: Tensor, merged: Tensor, out: Tensor) -> tuple[int, int, float, float]:
        """base, merged: float32, what was and what is to be added; `out`: their sum in the output type; `rounded`:
        the base as the output type has it, in float32 again.

        The last number, the rounding error, is NaN or Inf where `out` holds one.
        """
        wide = out.to(torch.float32, copy=True)
        moved = array(merged) != 0
        lost = moved & (array(wide) == array(rounded))
        error = wide.sub_(base).sub_(merged).abs_()
        return count(moved), count(lost), float(merged.abs().sum()), float(error.sum())

    def add(self, piece: Piece, kept: Sequence[int], result: tuple[int, int, float, float]) -> None:
        for expert, more in zip(self.kept, kept, strict=True):
            self.kept[expert] += more
        moved, lost, change, error = result
        self.values += piece.count
        self.moved += moved
        self.lost += lost
        self.change += change
        self.error += error

    def result(self) -> dict:
        """density: share of weights each expert still moves; lost: of the weights the merge moves, those that rounding
        puts back; rounding: the sum of absolute rounding errors over the sum of absolute changes."""
        return {
            "density": {expert: _share(n, self.values) for expert, n in self.kept.items()},
            "moved": _share(self.moved, self.values),
            "lost": _share(self.lost, self.moved),
            "rounding": self.error / self.change if self.change else 0.0,
        }


def warnings(unchanged: Sequence[str], result: dict, squares: Sequence[Sequence[float]]) -> list[str]:
    """One sentence for each thing that a user should look at before using the merge.

    squares: the experts' mean squares of each tensor; empty for all methods but SCE.
    """
    found = [f"{expert} is identical to the base: it adds nothing" for expert in unchanged]
    if result["lost"] > 0.2:
        found.append(f"rounding to the output type undoes the merge in {result['lost']:.0%} of the weights it moves: "
                     "write float32 to see whether that matters")
    faint = sum(sum(each) < MERGEKIT_SCE_LIMIT for each in squares)
    if faint:
        found.append(f"in {faint} of {len(squares)} tensors the experts' mean squares add up to less than "
                     f"{MERGEKIT_SCE_LIMIT:g}: there mergekit's SCE gives all experts one weight")
    return found


def _share(n: int, total: int) -> float:
    return n / total if total else 0.0
