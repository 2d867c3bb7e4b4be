"""SCE (Wan et al. 2025): select by variance, calculate a weight for each expert, erase minority signs.

The paper's authors run it without the select step. mergekit weighs all experts alike wherever the mean
squares add up to less than 1e-6, which shifts of RLVR always do: that is `uniform_below`.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m2rl_core.merging.ties import divisor, elected, votes


def variance(deltas: Sequence[Tensor]) -> Tensor:
    """The population variance over the experts of each coordinate; flat float32, computed in float64."""
    stack = torch.stack(list(deltas)).double()  # (E, P)
    stack -= stack.mean(0)
    return stack.square_().mean(0).float()


def selected_rank(n: int, zeros: int, select: float) -> int:
    """The rank (from 1) of the smallest of `n` variances that is selected; 0 for none. Share `select` of those
    above 0, multiplied in float32 as mergekit and SCE's authors do."""
    keep = int(torch.tensor(n - zeros) * select)
    return n - keep + 1 if keep else 0


def expert_weights(squares: Sequence[float], uniform_below: float) -> list[float]:
    """Each expert's mean square over the tensor, as a share; uniform where their sum is 0 or below the limit."""
    total = sum(squares)
    if total == 0 or total < uniform_below:
        return [1.0 / len(squares)] * len(squares)
    return [square / total for square in squares]


def merge(deltas: Sequence[Tensor], *, weights: Sequence[float], divisor_floor: float) -> Tensor:
    """Weighted mean of the shifts that agree with the sign of their sum (0 counts as +); flat float32.

    The sum of the weights that it is divided by counts at least `divisor_floor`.
    """
    sign = elected(votes(deltas, weights, "unweighted"), 1)
    total, count, agreeing = torch.zeros_like(sign), torch.zeros_like(sign), torch.empty_like(sign)
    for weight, delta in zip(weights, deltas, strict=True):
        torch.mul(delta, sign, out=agreeing).clamp_min_(0)  # what has the elected sign, made positive
        total += weight * agreeing
        count += agreeing.sign_().mul_(weight)
    total /= divisor(count, 1.0, divisor_floor)
    return total.mul_(sign).add_(0.0)  # adding 0 turns -0 into 0
