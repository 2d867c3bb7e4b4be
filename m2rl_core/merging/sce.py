"""SCE (Wan et al. 2025): select by variance, calculate a weight for each expert, erase minority signs.

The paper's authors run it without the select step. mergekit weighs all experts alike wherever the mean
squares add up to less than 1e-6, which shifts of RLVR always do: that is `uniform_below`.
"""
from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from m2rl_core.merging import threshold


def selected(deltas: Sequence[Tensor], select: float) -> Tensor:
    """Mask of the share `select` of the coordinates with the highest variance over experts, of those above 0."""
    mean = sum(deltas) / len(deltas)
    variance = sum((delta - mean) ** 2 for delta in deltas) / len(deltas)
    keep = int(Fraction(str(select)) * int(torch.count_nonzero(variance)))
    if keep == 0:
        return torch.zeros_like(variance, dtype=torch.bool)
    return threshold.mask_of(variance, threshold.cut_of(variance, Fraction(keep, variance.numel()), "exact"))


def expert_weights(deltas: Sequence[Tensor], uniform_below: float) -> list[float]:
    """Each expert's mean square over the tensor, as a share; uniform where their sum is 0 or below the limit."""
    squares = [float(delta.square().sum(dtype=torch.float64)) / delta.numel() for delta in deltas]
    total = sum(squares)
    if total == 0 or total < uniform_below:
        return [1.0 / len(deltas)] * len(deltas)
    return [square / total for square in squares]


def merge(
    base: Tensor, deltas: Sequence[Tensor], *, select: float, select_masks: str, uniform_below: float,
) -> Tensor:
    """Weighted mean of the shifts that agree with the sign of their sum (0 counts as +); one whole tensor.

    select_masks: "deltas" merges selected coordinates only; "weights" lets the selection shape the weights
    alone, as the authors' code does. `base` is not used.
    """
    weighed = deltas
    if select < 1:
        mask = selected(deltas, select)
        weighed = [delta * mask for delta in deltas]
        deltas = weighed if select_masks == "deltas" else deltas
    weights = expert_weights(weighed, uniform_below)
    sign = torch.where(sum(deltas) >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for weight, delta in zip(weights, deltas, strict=True):
        agrees = delta * sign > 0
        total += weight * delta * agrees
        count += weight * agrees
    return total / torch.where(count == 0, 1.0, count)
