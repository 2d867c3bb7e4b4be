"""TIES (Yadav et al. 2023): trim small shifts, elect a sign, average the shifts that agree with it.

The trim needs a cut, and a cut needs to have seen the whole tensor, or all of them: see `threshold`. Kernels take
tuples of E: `rows` (P,) of one piece, as in `shifts.Shifts`, and `cuts`, `factors`, `weights` of numbers, float32.
They are compiled for each E, so that the loop over experts runs in registers; more than MOST go by a few.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m2rl_core.kernel import kernel
from m2rl_core.merging.few import BLOCK, MOST, few, singles
from m2rl_core.merging.stored import shift

ZERO, ONE = np.float32(0), np.float32(1)
# base, rows, cuts, factors
Trims = tuple[np.ndarray, tuple[np.ndarray, ...], tuple[np.float32, ...], tuple[np.float32, ...]]


@kernel
def trimmed(x, cut, factor):
    """A shift, times `factor`, if its magnitude reaches the cut; else 0."""
    return (x if abs(x) >= cut else ZERO) * factor


@kernel
def elected(vote, zero_sign):
    """The sign of a vote, 1 or -1; a vote of exactly 0 has the sign `zero_sign`: 1, -1 or 0 (neither)."""
    return ONE if vote > 0 else -ONE if vote < 0 else zero_sign


@kernel
def positive(x):
    return ZERO if x <= 0 else x


@kernel
def _vote(vote, base, rows, cuts, factors, voting, i):
    """vote + sum_e v_e trimmed_e of weight i."""
    for e in range(len(rows)):
        vote += voting[e] * trimmed(shift(rows[e][i], base[i]), cuts[e], factors[e])
    return vote


@kernel
def _agreed(total, count, base, rows, cuts, factors, voting, after, weights, sign, i):
    """(total + the magnitudes of weight i that agree with `sign`, each times its `after`, count + their weights)."""
    for e in range(len(rows)):
        agreeing = positive(voting[e] * trimmed(shift(rows[e][i], base[i]), cuts[e], factors[e]) * sign)
        total += after[e] * agreeing
        count += weights[e] if agreeing > 0 else ZERO
    return total, count


@kernel
def _mean(total, count, sign, normalize, floor):
    by = count if count > floor else floor if floor > 0 else count
    by = by if normalize and by != 0 else ONE  # nothing agrees, or weights below 0 cancel
    return total / by * sign + ZERO  # adding 0 turns -0 into 0


@kernel
def _merge(base, rows, cuts, factors, voting, after, weights, zero_sign, normalize, floor, out):
    for i in range(len(out)):
        sign = elected(_vote(ZERO, base, rows, cuts, factors, voting, i), zero_sign)
        total, count = _agreed(ZERO, ZERO, base, rows, cuts, factors, voting, after, weights, sign, i)
        out[i] = _mean(total, count, sign, normalize, floor)


@kernel
def _add_votes(base, rows, cuts, factors, voting, votes):
    for i in range(len(votes)):
        votes[i] = _vote(votes[i], base, rows, cuts, factors, voting, i)


@kernel
def _add_agreed(base, rows, cuts, factors, voting, after, weights, zero_sign, votes, sums):
    """sums (2P,): the totals, then the counts; in one array, which spares the loop a test that they are apart."""
    n = len(votes)
    for i in range(n):
        sums[i], sums[n + i] = _agreed(sums[i], sums[n + i], base, rows, cuts, factors, voting, after, weights,
                                       elected(votes[i], zero_sign), i)


@kernel
def _divide(votes, sums, zero_sign, normalize, floor, out):
    for i in range(len(out)):
        out[i] = _mean(sums[i], sums[len(out) + i], elected(votes[i], zero_sign), normalize, floor)


def merge(trims: Trims, weights: Sequence[float], weighted: bool, zero_sign: float, normalize: bool, floor: float,
          out: np.ndarray) -> None:
    """out := the disjoint mean of the trimmed shifts; (P,). The driver multiplies by lambda.

    `weighted`: a shift votes, and has its sign, with its weight, as in mergekit. zero_sign is the sign of a weight
    whose vote is exactly 0. Without `normalize` the survivors are added, not averaged; the sum of their weights,
    which divides, counts at least `floor`. A zero shift never counts in the mean.
    """
    own, same = singles(weights), singles([1.0] * len(weights))
    voting, after = (own, same) if weighted else (same, own)
    zero_sign, floor = np.float32(zero_sign), np.float32(floor)
    if len(weights) <= MOST:
        _merge(*trims, voting, after, own, zero_sign, normalize, floor, out)
        return
    votes, sums = _votes(trims, voting, len(out)), np.zeros(2 * len(out), np.float32)
    for some in few(len(weights)):
        _add_agreed(trims[0], *(part[some] for part in (*trims[1:], voting, after, own)), zero_sign, votes, sums)
    _divide(votes, sums, zero_sign, normalize, floor, out)


def _votes(trims: Trims, voting: tuple[np.float32, ...], size: int) -> np.ndarray:
    votes = np.zeros(size, np.float32)
    for some in few(len(voting)):
        _add_votes(trims[0], *(part[some] for part in (*trims[1:], voting)), votes)
    return votes


def balance(trims: Trims, weights: Sequence[float], weighted: bool) -> int:
    """How many votes are above 0, less those below."""
    voting = singles(weights if weighted else [1.0] * len(weights))
    if len(voting) > MOST:
        votes = _votes(trims, voting, len(trims[0]))
        return int((votes > 0).sum()) - int((votes < 0).sum())
    return _balance(*trims, voting)


@kernel
def _balance(base, rows, cuts, factors, voting):
    found = 0
    for first in range(0, len(base), BLOCK):
        up = down = np.int32(0)
        for j in range(min(BLOCK, len(base) - first)):
            i = np.uint64(first) + np.uint64(j)  # unsigned, so never counted from the end
            vote = _vote(ZERO, base, rows, cuts, factors, voting, i)
            up = np.int32(up + (vote > 0))
            down = np.int32(down + (vote < 0))
        found += up - down
    return found
