"""DARE (Yu et al. 2024): drop shifts at random, scale the rest up. A sparsifier that runs before a merge.

Whether an element survives is a hash of (seed, model, tensor, index) and nothing else: SplitMix64, started
at a point of its own for each (seed, model, tensor). Word i // 2 of the stream decides on element i: the low
31 bits of its low half for an even i, of its high half for an odd one. So the bits do not depend on pieces,
threads or the order of work, and no two tensors share a mask.
"""
from __future__ import annotations

import hashlib
from fractions import Fraction
from functools import lru_cache

import numpy as np

from m2rl_core.kernel import kernel
from m2rl_core.merging.few import BLOCK
from m2rl_core.merging.stored import shift

GAMMA = 0x9E3779B97F4A7C15
MIX_1, MIX_2, STEP = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(GAMMA)
HALF = np.uint32(0x7FFFFFFF)  # the 31 bits of either half that are used


@lru_cache(maxsize=4096)
def start_of(seed: int, model: str, tensor: str) -> int:
    """Where the stream of one tensor of one model begins (64 bits of SHA-256)."""
    return int.from_bytes(hashlib.sha256(repr((seed, model, tensor)).encode()).digest()[:8], "little")


@kernel
def fill(state, out):
    """out[i] := SplitMix64's output for state + i GAMMA; uint64."""
    for i in range(len(out)):
        z = state + np.uint64(i) * STEP
        z = (z ^ (z >> np.uint64(30))) * MIX_1
        z = (z ^ (z >> np.uint64(27))) * MIX_2
        out[i] = z ^ (z >> np.uint64(31))


def words(start: int, first: int, count: int) -> np.ndarray:
    """Words first .. first+count-1 of a stream: uint64 (count,)."""
    out = np.empty(count, np.uint64)
    fill(state_of(start, first), out)
    return out


def state_of(start: int, word: int) -> np.uint64:
    return np.uint64((start + (word + 1) * GAMMA) % 2**64)


@kernel
def _drop(row, base, state, odd, limit, factor, out):
    """out := factor * shift where the half word is at least `limit`, else 0; returns how many are not 0.

    The first element goes by the half `odd` (0 or 1) of the word for `state`. row: see `shifts.Shifts`; out (P,).
    """
    drawn, nonzero = np.empty(BLOCK // 2 + 1, np.uint64), 0
    for first in range(0, len(out), BLOCK):
        here, origin, kept = row[first : first + BLOCK], base[first : first + BLOCK], out[first : first + BLOCK]
        fill(state + np.uint64(first // 2) * STEP, drawn)
        halves = drawn.view(np.uint32)[odd : odd + len(kept)]
        left = np.int32(0)
        for i in range(len(kept)):
            x = shift(here[i], origin[i]) * factor if (halves[i] & HALF) >= limit else np.float32(0)
            kept[i] = x
            left = np.int32(left + (x != 0))
        nonzero += left
    return nonzero


def drop(row: np.ndarray, base: np.ndarray, drop_rate: float, factor: float, start: int, first: int,
         out: np.ndarray) -> int:
    """out := a row's shifts, each dropped with chance `drop_rate` and the others times `factor`; float32 (P,).

    The row begins at element `first` of the stream's tensor. Returns how many are not 0.
    """
    return _drop(row, base, state_of(start, first // 2), first % 2, np.uint32(_limit(drop_rate)), np.float32(factor), out)


@kernel
def _norms(row, base, state, odd, limit, sums):
    """sums += the magnitudes of a row's shifts, and those of the shifts that `_drop` leaves; in float64 (2,)."""
    drawn, lanes = np.empty(BLOCK // 2 + 1, np.uint64), np.zeros(2 * BLOCK)  # sums side by side: see `diagnosis._round`
    for first in range(0, len(row), BLOCK):
        here, origin = row[first : first + BLOCK], base[first : first + BLOCK]
        fill(state + np.uint64(first // 2) * STEP, drawn)
        halves = drawn.view(np.uint32)[odd : odd + len(here)]
        for i in range(len(here)):
            x = abs(shift(here[i], origin[i]))
            lanes[i] += np.float64(x)
            lanes[BLOCK + i] += np.float64(x if (halves[i] & HALF) >= limit else np.float32(0))
    for i in range(BLOCK):
        sums[0] += lanes[i]
        sums[1] += lanes[BLOCK + i]


def norms(row: np.ndarray, base: np.ndarray, drop_rate: float, start: int, first: int) -> np.ndarray:
    """The L1 norms of a row's shifts before and after dropping, without rescaling; float64 (2,)."""
    sums = np.zeros(2)
    _norms(row, base, state_of(start, first // 2), first % 2, np.uint32(_limit(drop_rate)), sums)
    return sums


@lru_cache(maxsize=64)
def _limit(drop_rate: float) -> int:
    """An element survives where its 31 bits are at least this."""
    return int(Fraction(str(drop_rate)) * 2**31)


def keep_mask(start: int, first: int, count: int, drop_rate: float) -> np.ndarray:
    """Which of the elements first .. first+count-1 survive, each with chance 1 - drop_rate: bool (count,)."""
    out = np.ones(count, np.float32)
    drop(out, out, drop_rate, 1.0, start, first, out)
    return out != 0


@lru_cache(maxsize=64)
def inverse(drop_rate: float) -> float:
    """1 / (1 - drop_rate), which keeps the mean."""
    return float(1 / (1 - Fraction(str(drop_rate))))
