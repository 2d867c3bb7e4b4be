"""TIES (Yadav et al. 2023): trim small shifts, elect a sign, average the shifts that agree with it.

The trim needs a cut, and a global cut needs all tensors: the driver finds it first (see `threshold`).
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m2rl_core.merging import threshold


def trim(delta: Tensor, cut: threshold.Cut, rescale: str) -> Tensor:
    """`delta` with what the cut drops set to zero; "l1" scales the rest back to the tensor's L1 norm."""
    return rescaled(delta, delta * threshold.mask_of(delta, cut), rescale)


def rescaled(before: Tensor, after: Tensor, rescale: str) -> Tensor:
    """`after` scaled to the L1 norm of `before` ("l1"; not where a norm is below 1e-7, as in mergekit)."""
    if rescale == "none":
        return after
    old, new = (float(x.abs().sum(dtype=torch.float64)) for x in (before, after))
    return after if min(old, new) < 1e-7 else after * (old / new)


def vote_sum(deltas: Sequence[Tensor], weights: Sequence[float], vote: str) -> Tensor:
    """What the sign is elected from: the sum of the trimmed shifts, each times its weight if "weighted"."""
    if vote == "unweighted":
        return sum(deltas)
    return sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))


def merge(
    base: Tensor, deltas: Sequence[Tensor], *, weights: Sequence[float], vote: str, zero_sign: int, normalize: bool,
    scale: float,
) -> Tensor:
    """scale * disjoint mean of the trimmed `deltas`; float32, any shape. `base` is not used.

    zero_sign is the sign of a coordinate whose vote is exactly 0: +1, -1, or 0 (nothing survives there).
    Without `normalize` the survivors are added, not averaged. A zero shift never counts in the mean.
    """
    votes = vote_sum(deltas, weights, vote)
    sign = torch.sign(votes)
    sign[votes == 0] = zero_sign
    total, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for weight, delta in zip(weights, deltas, strict=True):
        agrees = delta * sign > 0
        total += weight * delta * agrees
        count += weight * agrees
    if normalize:
        total /= torch.where(count == 0, 1.0, count)
    return scale * total
