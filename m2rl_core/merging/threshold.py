"""The exact k-th smallest magnitude of any number of values, by counting: nothing is sorted but a small sample.

The bits of |x|, read as an integer, grow with |x|. A sample says between which two patterns the k-th lies, most
likely. One pass then counts how many values lie below, on and above the two, and puts the few in between into
buckets. Where the sample was wrong the counts say on which side to look, and where a bucket is wider than one
value the next pass looks inside it: at most four passes, and one for nearly all tensors.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from m2rl_core.kernel import kernel
from m2rl_core.merging.few import BLOCK
from m2rl_core.merging.stored import shift

TOP = 0x7F800000  # infinity: nothing finite is above
MAGNITUDE = np.int32(0x7FFFFFFF)  # the bits of a float32 but for its sign
BUCKETS = 1 << 18
MARGIN = 6.0  # half the bracket, in standard errors of the sample's rank; neighbours are alike, so more than usual


@dataclass(frozen=True)
class Cut:
    """Keep magnitudes above the pattern `bits`; of the equal ones the first `quota` (None: all).

    equals[tensor, piece]: how many equal ones lie in earlier pieces, and in this one; only where there is a quota.
    survivors: how many are kept, where all of these are above 0; None where everything above 0 is kept.
    """

    bits: int
    quota: int | None = None
    survivors: int | None = None
    equals: Mapping[tuple[str, int], tuple[int, int]] = field(default_factory=dict, repr=False)

    def left(self, name: str, index: int) -> int | None:
        """How many equal ones of a piece survive; None for all."""
        if self.quota is None:
            return None
        before, here = self.equals[name, index]
        return None if before + here <= self.quota else max(0, self.quota - before)


def rank_of(n: int, density: float, ties: str) -> int:
    """The rank (from 1) of the smallest magnitude that survives; 0 where everything does.

    "kept": the floor((1-density) n)-th smallest, and all its equals survive, so at least density*n do.
    "exact": int(density * n) survive, in floating point and at least one, as in mergekit.
    """
    if ties == "kept":
        return int((1 - Fraction(str(density))) * n)
    return 0 if density >= 1 else n - max(1, int(density * n)) + 1


def as_float(bits: int) -> np.float32:
    return np.int32(bits).view(np.float32)


def as_bits(value: np.ndarray) -> np.ndarray:
    """The patterns of magnitudes (float32, not negative) as int32."""
    return value.view(np.int32)


def keep_large(x: np.ndarray, bits: int, quota: int | None = None) -> np.ndarray:
    """`x` with magnitudes below the cut set to 0; of those on it the first `quota` stay (None: all). Flat float32."""
    x, cut = at_least(x, bits, quota)
    return np.where(np.abs(x) >= cut, x, np.float32(0))


def at_least(x: np.ndarray, bits: int, quota: int | None) -> tuple[np.ndarray, np.float32]:
    """(`x` or a copy, cut) so that the magnitudes that reach the cut are those that `keep_large` keeps."""
    if quota == 0:
        return x, as_float(bits + 1)
    if quota is None or bits == 0:
        return x, as_float(bits)
    x, cut = x.copy(), as_float(bits)  # the one piece of a tensor, or of all, where the quota ends
    x[np.flatnonzero(np.abs(x) == cut)[quota:]] = 0
    return x, cut


@kernel
def count_around(row, base, low, high, counts, inside):
    """counts += magnitudes < low, <= low, < high, <= high, = 0; inside := those between; returns how many these are.

    Of the shifts of a row, as bits of float32, of which the sign is not looked at.
    """
    found, span = 0, np.uint32(high - low - 1)
    magnitudes = np.empty(BLOCK, np.int32)
    for first in range(0, len(base), BLOCK):
        here, origin = row[first : first + BLOCK], base[first : first + BLOCK]
        bits = magnitudes[: len(here)]
        for i in range(len(bits)):
            bits[i] = np.float32(shift(here[i], origin[i])).view(np.int32) & MAGNITUDE
        less_low = upto_low = less_high = upto_high = zero = np.int32(0)
        for i in range(len(bits)):
            x = bits[i]
            less_low = np.int32(less_low + (x < low))
            upto_low = np.int32(upto_low + (x <= low))
            less_high = np.int32(less_high + (x < high))
            upto_high = np.int32(upto_high + (x <= high))
            zero = np.int32(zero + (x == 0))
        counts[0] += less_low
        counts[1] += upto_low
        counts[2] += less_high
        counts[3] += upto_high
        counts[4] += zero
        if less_high > upto_low:
            for i in range(len(bits)):  # without a branch, as which ones are inside is as good as random
                x = bits[i]
                inside[np.uint64(found)] = x
                found += np.uint32(x - low - 1) < span  # low < x < high: what is below wraps around to the top
    return found


@kernel
def into_buckets(inside, first, shift, buckets):
    """buckets[(x - first) >> shift] += 1 for every pattern."""
    for x in inside:
        buckets[(x - first) >> shift] += 1


class Search:
    """One order statistic over many pieces: `count` in any thread, `add` each result, then `settled`.

    n values, `rank` from 1, or a function from the number of zeros among them to a rank (0: nothing survives).
    With `quota` exactly n - rank + 1 values are to survive.
    """

    def __init__(self, n: int, rank: int | Callable[[int], int], quota: bool):
        self.n, self.rank, self.quota = n, rank, quota
        self.cut: Cut | None = None
        self.low, self.high = 0, TOP
        self._clear()

    def _clear(self) -> None:
        self.zeros, self.below, self.inside = 0, np.zeros(4, np.int64), None  # < low, <= low, < high, <= high
        self.shift = max(0, (self.high - self.low - 1).bit_length() - BUCKETS.bit_length() + 1)
        self.equals: dict[tuple[str, int], tuple[int, int]] = {}

    def guess(self, magnitudes: np.ndarray, everything: bool) -> None:
        """Sets the bracket from a sample (float32 magnitudes); `everything`: the sample is all n values."""
        size = len(magnitudes)
        rank = self.rank if isinstance(self.rank, int) else self.rank(
            round(self.n * (size - np.count_nonzero(magnitudes)) / size))
        bits, share = np.sort(as_bits(magnitudes)), rank / self.n
        margin = 0 if everything else int(MARGIN * np.sqrt(size * share * (1 - share))) + 2
        low, high = int(share * size) - 1 - margin, int(share * size) + margin
        if everything:
            low = high = max(rank - 1, 0)
        self.low = int(bits[low]) if low >= 0 else 0
        self.high = int(bits[high]) if high < size else TOP
        self._clear()

    def count(self, row: np.ndarray, base: np.ndarray) -> tuple:
        """What one piece adds: zeros, the four counts and the patterns in between; of a row's shifts, of any sign."""
        counts, inside = np.zeros(5, np.int64), np.empty(len(row), np.int32)
        found = count_around(row, base, np.int32(self.low), np.int32(self.high), counts, inside)
        return int(counts[4]), counts[:4].tolist(), inside[:found].copy()

    def add(self, place: tuple[str, int], result: tuple) -> None:
        """Adds the result of the piece at (tensor, index)."""
        zeros, counts, inside = result
        self.zeros += zeros
        self.below += counts
        if self.quota:
            self.equals[place] = (counts[1] - counts[0], counts[3] - counts[2])
        if len(inside):
            if self.inside is None:
                self.inside = np.zeros(((self.high - self.low - 2) >> self.shift) + 1, np.int64)
            into_buckets(inside, self.low + 1, self.shift, self.inside)

    def settled(self) -> bool:
        """After a whole pass: whether the cut is found; if not, the bracket is narrower and another pass is due."""
        rank = self.rank if isinstance(self.rank, int) else self.rank(self.zeros)
        less_low, upto_low, less_high, upto_high = (int(c) for c in self.below)
        if rank == 0:
            self.cut = Cut(TOP + 1, survivors=0)
        elif rank <= less_low:
            self._look(0, self.low - 1)
        elif rank <= upto_low:
            self._found(self.low, upto_low, upto_low - less_low, rank, 0)
        elif rank > upto_high:
            self._look(self.high + 1, TOP)
        elif rank > less_high:
            self._found(self.high, upto_high, upto_high - less_high, rank, 1)
        else:
            running = np.cumsum(self.inside)
            bucket = int(np.searchsorted(running, rank - upto_low))
            first = self.low + 1 + (bucket << self.shift)
            if self.shift:
                self._look(first, min(first + (1 << self.shift), self.high) - 1)
            else:
                self._found(first, upto_low + int(running[bucket]), int(self.inside[bucket]), rank, None)
        return self.cut is not None

    def _look(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self._clear()

    def _found(self, bits: int, upto: int, equal: int, rank: int, end: int | None) -> None:
        """`upto` values are at most `bits`, `equal` are it; end: 0 or 1 where the bracket's low or high end is it."""
        quota = (self.n - rank + 1) - (self.n - upto)
        if not self.quota or quota == equal:
            self.cut = Cut(bits, survivors=self.n - upto + equal if bits else None)
        elif end is None:
            self._look(bits, bits)  # once more, to learn in which pieces the equal ones lie
        else:
            equals, before = {}, 0
            for place, found in self.equals.items():
                equals[place] = before, found[end]
                before += found[end]
            self.cut = Cut(bits, quota, self.n - rank + 1 if bits else None, equals)
