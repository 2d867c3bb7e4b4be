"""What a user should know about a merge: how much was changed, in conflict, trimmed and lost to rounding."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MERGEKIT_SCE_LIMIT = 1e-6  # below it mergekit's SCE gives every expert the same weight, without a word


class Survey:
    """Counts over the experts' shifts before any method touches them; shared by all recipes of a run."""

    def __init__(self, experts: Sequence[str]):
        self.changed = dict.fromkeys(experts, 0)
        self.values = self.shared = self.conflicts = 0
        self.tensors = self.faint = 0

    def add(self, deltas: dict[str, Tensor]) -> None:
        """Counts one tensor's shifts, {expert: float32 tensor of one shape}."""
        up = sum((delta > 0).to(torch.uint8) for delta in deltas.values())
        down = sum((delta < 0).to(torch.uint8) for delta in deltas.values())
        for expert, delta in deltas.items():
            self.changed[expert] += int(torch.count_nonzero(delta))
        self.values += up.numel()
        self.shared += int((up + down >= 2).sum())
        self.conflicts += int(((up > 0) & (down > 0)).sum())
        squares = sum(float(d.square().sum(dtype=torch.float64)) for d in deltas.values()) / max(up.numel(), 1)
        self.tensors += 1
        self.faint += squares < MERGEKIT_SCE_LIMIT

    def unchanged(self) -> list[str]:
        return [expert for expert, count in self.changed.items() if count == 0]

    def result(self) -> dict:
        """Shares in [0, 1]: weights that each expert changed; of those that two or more changed, signs in conflict."""
        return {
            "weights": self.values,
            "changed": {expert: _share(count, self.values) for expert, count in self.changed.items()},
            "sign_conflict": _share(self.conflicts, self.shared),
        }


class Tally:
    """Counts over one recipe's tensors: what reached the merge, and what of the result the output type holds."""

    def __init__(self, experts: Sequence[str]):
        self.kept = dict.fromkeys(experts, 0)
        self.values = self.moved = self.lost = 0
        self.change = self.error = 0.0

    def add(self, base: Tensor, inputs: Sequence[Tensor], merged: Tensor, out: Tensor) -> None:
        """base, inputs, merged: float32; `out` is base + merged in the output type."""
        for expert, delta in zip(self.kept, inputs, strict=True):
            self.kept[expert] += int(torch.count_nonzero(delta))
        moved = merged != 0
        self.values += merged.numel()
        self.moved += int(moved.sum())
        self.lost += int((moved & (out == base.to(out.dtype))).sum())
        self.change += float(merged.abs().sum(dtype=torch.float64))
        self.error += float((out.float() - base - merged).abs().sum(dtype=torch.float64))

    def result(self) -> dict:
        """density: share of weights each expert still moves; lost: of the weights the merge moves, those that rounding
        puts back; rounding: the sum of absolute rounding errors over the sum of absolute changes."""
        return {
            "density": {expert: _share(count, self.values) for expert, count in self.kept.items()},
            "moved": _share(self.moved, self.values),
            "lost": _share(self.lost, self.moved),
            "rounding": self.error / self.change if self.change else 0.0,
        }


def warnings(survey: Survey, result: dict, method: str) -> list[str]:
    """One sentence for each thing that a user should look at before using the merge."""
    found = [f"{expert} is identical to the base: it adds nothing" for expert in survey.unchanged()]
    if result["lost"] > 0.2:
        found.append(f"rounding to the output type undoes the merge in {result['lost']:.0%} of the weights it moves: "
                     "write float32 to see whether that matters")
    if method == "sce" and survey.faint:
        found.append(f"in {survey.faint} of {survey.tensors} tensors the experts' mean squares add up to less than "
                     f"{MERGEKIT_SCE_LIMIT:g}: there mergekit's SCE gives all experts one weight")
    return found


def _share(count: int, total: int) -> float:
    return count / total if total else 0.0
