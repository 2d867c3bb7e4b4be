"""Average of the experts' weights (Wortsman et al. 2022, model soups; mergekit's `linear`)."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import types
from numba.extending import intrinsic

from m2rl_core.kernel import kernel
from m2rl_core.merging.few import MOST, few, singles
from m2rl_core.merging.stored import shift, wide


def of_shifts(base: np.ndarray, rows: tuple[np.ndarray, ...], weights: Sequence[float], normalize: bool,
              out: np.ndarray) -> None:
    """out := the shift from `base` to sum_i w_i theta_i, divided by sum_i w_i where `normalize`.

    theta_i = base + shift_i; base, out: float32 (P,). Normalised, the base cancels and what is left is
    the weighted mean of the shifts; otherwise the base itself counts sum_i w_i times, as in mergekit.
    """
    total = sum(weights)
    weighted_sum(base, rows, weights, total if normalize else 1.0, out)
    if not normalize:
        out += np.float32(total - 1.0) * base


def of_weights(models: np.ndarray, which: Sequence[int], weights: Sequence[float], normalize: bool,
               out: np.ndarray) -> None:
    """out := sum_i w_i theta_i, divided by sum_i w_i where `normalize`, straight from the formula; float32 (P,).

    theta_i = models[which[i]], as stored. The same as `base + of_shifts` but for the last bit; the operations are
    mergekit's, so the bits are too.
    """
    for some in few(len(which), MOST):
        by = total_of(weights) if normalize and some.stop >= len(which) else np.float32(1)
        _add_fused(tuple(models[i] for i in which[some]), singles(weights[some]), some.start > 0, by, out)


def total_of(weights: Sequence[float]) -> np.float32:
    """The sum of the weights in float32, added in the order of torch's `sum`, as mergekit calls it."""
    terms, total = np.array(weights, np.float32), np.float32(0)
    if len(terms) < 8:
        return _by_fours(terms)
    rest = len(terms) % 8
    for term in (*terms[len(terms) - rest :], *_by_fours(terms[: len(terms) - rest].reshape(-1, 8))):
        total += term
    return total


def _by_fours(terms: np.ndarray):
    """The sum over the first axis: every fourth term by itself, what is left with the first of the four."""
    sums = [np.zeros_like(terms[0])] * 4
    for i, term in enumerate(terms):
        four = i % 4 if i < len(terms) // 4 * 4 else 0
        sums[four] = sums[four] + term
    return sums[0] + sums[1] + sums[2] + sums[3]


def weighted_sum(base: np.ndarray, rows: tuple[np.ndarray, ...], weights: Sequence[float], divisor: float,
                 out: np.ndarray) -> None:
    """out := sum_i w_i shift_i / divisor, added in the order given; float32 (P,)."""
    for some in few(len(rows), MOST):
        by = divisor if some.stop >= len(rows) else 1
        _add(base, rows[some], singles(weights[some]), some.start > 0, np.float32(by), out)


@kernel
def _add(base, rows, weights, more, divisor, out):
    for i in range(len(out)):
        total = out[i] if more else np.float32(0)
        for e in range(len(rows)):
            total += weights[e] * shift(rows[e][i], base[i])
        out[i] = total / divisor


@intrinsic
def fused(_, a, b, c):
    """a b + c in float32, rounded once: so does torch's addcmul, and so come out the bits of mergekit's linear merge."""
    return types.float32(types.float32, types.float32, types.float32), lambda _, builder, __, args: builder.fma(*args)


@kernel
def _add_fused(models, weights, more, divisor, out):
    for i in range(len(out)):
        total = out[i] if more else np.float32(0)
        for e in range(len(models)):
            total = fused(weights[e], wide(models[e][i]), total)
        out[i] = total / divisor
