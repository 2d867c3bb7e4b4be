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
import torch
import torch.nn.functional as F
from torch import Tensor

from m2rl_core.merging.counting import array, count

TOP = 0x7F800000  # infinity: nothing finite is above
BUCKETS = 1 << 18
MARGIN = 6.0  # half the bracket, in standard errors of the sample's rank; neighbours are alike, so more than usual


@dataclass(frozen=True)
class Cut:
    """Keep magnitudes above the pattern `bits`; of the equal ones the first `quota` (None: all).

    equals[tensor, piece]: how many equal ones lie in earlier pieces, and in this one; only where there is a quota.
    """

    bits: int
    quota: int | None = None
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


def as_float(bits: int) -> float:
    return float(np.int32(bits).view(np.float32))


def as_bits(value: np.ndarray) -> np.ndarray:
    """The patterns of magnitudes (float32, not negative) as int32."""
    return value.view(np.int32)


def keep_large(x: Tensor, bits: int, quota: int | None = None) -> Tensor:
    """`x` with magnitudes below the cut set to 0; of those on it the first `quota` stay (None: all). Flat float32."""
    if bits == 0:
        return x
    if quota is None:  # |x| >= cut is |x| > the number before it, which is what hardshrink keeps
        return F.hardshrink(x, as_float(bits - 1))
    kept = F.hardshrink(x, as_float(bits))
    if quota:
        equal = x.abs() == as_float(bits)
        kept += x * (equal & (torch.cumsum(equal, 0) <= quota))
    return kept


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

    def count(self, x: Tensor) -> tuple:
        """What one piece of magnitudes adds: zeros, the four counts and the values in between."""
        values, low, high = array(x), as_float(self.low), as_float(self.high)
        below = values < low
        counts = [count(below), count(values <= low)]
        inside = np.empty(0, np.float32)
        if self.low < self.high:
            under = values < high
            counts += [count(under), count(values <= high)]
            between = under & (values > low)
            inside = values[between] if isinstance(values, np.ndarray) else values[between].cpu().numpy()
        else:
            counts += counts
        zeros = 0 if isinstance(self.rank, int) else x.numel() - count(values != 0)
        return zeros, counts, inside

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
            np.add.at(self.inside, (as_bits(inside) - (self.low + 1)) >> self.shift, 1)

    def settled(self) -> bool:
        """After a whole pass: whether the cut is found; if not, the bracket is narrower and another pass is due."""
        rank = self.rank if isinstance(self.rank, int) else self.rank(self.zeros)
        less_low, upto_low, less_high, upto_high = (int(c) for c in self.below)
        if rank == 0:
            self.cut = Cut(TOP + 1)
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
            self.cut = Cut(bits)
        elif end is None:
            self._look(bits, bits)  # once more, to learn in which pieces the equal ones lie
        else:
            equals, before = {}, 0
            for place, found in self.equals.items():
                equals[place] = before, found[end]
                before += found[end]
            self.cut = Cut(bits, quota, equals)
