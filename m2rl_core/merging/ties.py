"""TIES (Yadav et al. 2023): trim small shifts, elect a sign, average the shifts that agree with it.

The trim needs a cut, and a cut needs to have seen the whole tensor, or all of them: see `threshold`. All arrays are
float32: `rows` (E, P) the experts' shifts, `cuts`, `factors`, `weights` (E,); P weights of one piece.
"""
from __future__ import annotations

import numpy as np

from m2rl_core.merging.kernel import BLOCK, kernel

ZERO, ONE = np.float32(0), np.float32(1)


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
def _add_votes(rows, first, cuts, factors, weights, votes, kept):
    """votes := sum_i w_i trimmed_i from weight `first` on; kept[i] += how many trimmed shifts are not 0."""
    votes[:] = ZERO
    for e in range(len(rows)):
        row, here = rows[e, first : first + len(votes)], np.int32(0)
        cut, factor, weight = cuts[e], factors[e], weights[e]
        for i in range(len(row)):
            x = trimmed(row[i], cut, factor)
            here = np.int32(here + (x != 0))
            votes[i] += weight * x
        kept[e] += here


@kernel
def merge(rows, cuts, factors, weights, weighted, zero_sign, normalize, floor, out, kept):
    """out := the disjoint mean of the trimmed shifts; (P,). The driver multiplies by lambda.

    `weighted`: a shift votes, and has its sign, with its weight, as in mergekit. zero_sign is the sign of a weight
    whose vote is exactly 0. Without `normalize` the survivors are added, not averaged; the sum of their weights,
    which divides, counts at least `floor`. A zero shift never counts in the mean. kept[i] += shifts i that stay.
    """
    voting = weights if weighted else np.ones_like(weights)
    after = np.ones_like(weights) if weighted else weights
    votes, counts = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for first in range(0, rows.shape[1], BLOCK):
        total = out[first : first + BLOCK]
        sign, count = votes[: len(total)], counts[: len(total)]
        _add_votes(rows, first, cuts, factors, voting, sign, kept)
        for i in range(len(total)):
            sign[i] = elected(sign[i], zero_sign)
        total[:] = ZERO
        count[:] = ZERO
        for e in range(len(rows)):
            row, cut, factor = rows[e, first : first + len(total)], cuts[e], factors[e]
            before, then, weight = voting[e], after[e], weights[e]
            for i in range(len(row)):
                agreeing = positive(before * trimmed(row[i], cut, factor) * sign[i])  # as a magnitude
                total[i] += then * agreeing
                count[i] += weight if agreeing > 0 else ZERO
        for i in range(len(total)):
            by = count[i] if count[i] > floor else floor if floor > 0 else count[i]
            by = by if normalize and by != 0 else ONE  # nothing agrees, or weights below 0 cancel
            total[i] = total[i] / by * sign[i] + ZERO  # adding 0 turns -0 into 0


@kernel
def balance(rows, cuts, factors, voting):
    """How many votes are above 0, less those below."""
    votes, found, kept = np.empty(BLOCK, np.float32), 0, np.zeros(len(rows), np.int64)
    for first in range(0, rows.shape[1], BLOCK):
        here, up, down = votes[: rows.shape[1] - first], np.int32(0), np.int32(0)
        _add_votes(rows, first, cuts, factors, voting, here, kept)
        for i in range(len(here)):
            up = np.int32(up + (here[i] > 0))
            down = np.int32(down + (here[i] < 0))
        found += up - down
    return found
