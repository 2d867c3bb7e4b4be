"""SCE (Wan et al. 2025): select by variance, calculate a weight for each expert, erase minority signs.

The paper's authors run it without the select step. mergekit weighs all experts alike wherever the mean
squares add up to less than 1e-6, which shifts of RLVR always do: that is `uniform_below`.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m2rl_core.merging import ties
from m2rl_core.kernel import kernel
from m2rl_core.merging.few import BLOCK, singles
from m2rl_core.merging.stored import shift


@kernel
def variance(rows, base, out):
    """out := the population variance over the experts' shifts, float32 (P,), computed in float64; rows: E of (P,)."""
    means, squares = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    for first in range(0, len(out), BLOCK):
        found, origin = out[first : first + BLOCK], base[first : first + BLOCK]
        mean, square = means[: len(found)], squares[: len(found)]
        mean[:] = 0
        square[:] = 0
        for row in rows:
            here = row[first : first + len(found)]
            for i in range(len(here)):
                mean[i] += np.float64(shift(here[i], origin[i]))
        for i in range(len(found)):
            mean[i] /= len(rows)
        for row in rows:
            here = row[first : first + len(found)]
            for i in range(len(here)):
                square[i] += (np.float64(shift(here[i], origin[i])) - mean[i]) ** 2
        for i in range(len(found)):
            found[i] = np.float32(square[i] / len(rows))


def selected_rank(n: int, zeros: int, select: float) -> int:
    """The rank (from 1) of the smallest of `n` variances that is selected; 0 for none. Share `select` of those
    above 0, multiplied in float32 as mergekit and SCE's authors do."""
    keep = int(np.float32(n - zeros) * np.float32(select))
    return n - keep + 1 if keep else 0


@kernel
def squares(row, base):
    """The sum of the squares of a row's shifts, each in float32, added in float64."""
    lanes, total = np.zeros(BLOCK), 0.0  # a float sum keeps its order: only sums side by side are vectorised
    for first in range(0, len(base), BLOCK):
        here, origin = row[first : first + BLOCK], base[first : first + BLOCK]
        for i in range(len(here)):
            x = shift(here[i], origin[i])
            lanes[i] += np.float64(x * x)
    for lane in lanes:
        total += lane
    return total


def expert_weights(squares: Sequence[float], uniform_below: float) -> list[float]:
    """Each expert's mean square over the tensor, as a share; uniform where their sum is 0 or below the limit."""
    total = sum(squares)
    if total == 0 or total < uniform_below:
        return [1.0 / len(squares)] * len(squares)
    return [square / total for square in squares]


def merge(base: np.ndarray, rows: tuple[np.ndarray, ...], weights: Sequence[float], divisor_floor: float,
          out: np.ndarray) -> None:
    """out := the weighted mean of the shifts that agree with the sign of their sum (0 counts as +).

    To erase minority signs is what TIES does to shifts that are not trimmed; out float32 (P,). The
    sum of the weights that it is divided by counts at least `divisor_floor`.
    """
    trims = base, rows, singles([0.0] * len(rows)), singles([1.0] * len(rows))
    ties.merge(trims, weights, False, 1.0, True, divisor_floor, out)
