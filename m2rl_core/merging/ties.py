"""TIES (Yadav et al. 2023): trim small shifts, elect a sign, average the shifts that agree with it.

The trim needs a cut, and a cut needs to have seen the whole tensor, or all of them: see `threshold`.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m2rl_core.merging.average import weighted_sum

LEAST = 1.4e-45  # the smallest float32 above 0


def votes(deltas: Sequence[Tensor], weights: Sequence[float], vote: str) -> Tensor:
    """What the sign is elected from: the sum of the trimmed shifts, each times its weight if "weighted"."""
    return weighted_sum(deltas, weights if vote == "weighted" else [1.0] * len(deltas))


def elected(votes: Tensor, zero_sign: int) -> Tensor:
    """The sign of each vote, as 1.0 and -1.0; a vote of exactly 0 has the sign `zero_sign`: 1, -1 or 0 (neither)."""
    if zero_sign == 0:
        return torch.sign(votes)
    sign = torch.empty_like(votes)
    (torch.ge if zero_sign > 0 else torch.gt)(votes, 0, out=sign)
    return sign.mul_(2).sub_(1)


def merge(
    deltas: Sequence[Tensor], *, weights: Sequence[float], vote: str, zero_sign: int, normalize: bool,
) -> Tensor:
    """The disjoint mean of the trimmed `deltas`; flat float32. The driver multiplies by lambda.

    zero_sign is the sign of a coordinate whose vote is exactly 0: +1, -1, or 0 (nothing survives there).
    Without `normalize` the survivors are added, not averaged. A zero shift never counts in the mean.
    With a "weighted" vote a shift's own sign is that of weight * shift, as in mergekit.
    """
    sign = elected(votes(deltas, weights, vote), zero_sign)
    total, count, agreeing = torch.zeros_like(sign), torch.zeros_like(sign), torch.empty_like(sign)
    for weight, delta in zip(weights, deltas, strict=True):
        if vote == "weighted" and weight != 1:
            torch.mul(weight * delta, sign, out=agreeing).clamp_min_(0)  # what has the elected sign, made positive
            total += agreeing
        else:
            torch.mul(delta, sign, out=agreeing).clamp_min_(0)
            total += agreeing if weight == 1 else weight * agreeing
        if normalize:
            count += agreeing.sign_() if weight == 1 else weight * agreeing.sign_()
    if normalize:
        total /= divisor(count, min(weights))
    return total.mul_(sign).add_(0.0)  # adding 0 turns -0 into 0


def divisor(count: Tensor, least_weight: float, floor: float = 0.0) -> Tensor:
    """`count` where it is not 0 (nothing is divided there), at least `floor`; in place."""
    if least_weight > 0:
        return count.clamp_min_(max(floor, LEAST))
    return count.masked_fill_(count == 0, 1.0)  # weights below 0 can cancel
