"""The exact k-th smallest magnitude without a sort, by counting float32 bit patterns in two levels.

The bits of |x|, read as an integer, grow with |x|. The upper 16 bits choose one of 32768 buckets, the
lower 16 the value inside it: two counting passes give the exact order statistic of any number of tensors,
one tensor in memory at a time.
"""
from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

HIGH, LOW = 1 << 15, 1 << 16


@dataclass(frozen=True)
class Cut:
    """Keep magnitudes whose bit pattern is above `bits`; of the equal ones, the first `quota` (None: all)."""

    bits: int
    quota: int | None


def magnitude_bits(x: Tensor) -> Tensor:
    """The bit patterns of |x| as int32 (n,), in the order of magnitude; x is float32 and finite."""
    return x.abs().reshape(-1).view(torch.int32)


def high_counts(x: Tensor) -> Tensor:
    """How many values of `x` fall in each of the 32768 buckets of the upper bits."""
    return torch.bincount(magnitude_bits(x) >> 16, minlength=HIGH)


def low_counts(x: Tensor, bucket: int) -> Tensor:
    """Inside one bucket of the upper bits: how many values of `x` have each of the 65536 lower bits."""
    bits = magnitude_bits(x)
    return torch.bincount(bits[(bits >> 16) == bucket] & (LOW - 1), minlength=LOW)


def locate(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bucket that holds the `rank`-th smallest (from 1), and how many values lie in lower buckets."""
    total = torch.cumsum(counts, 0)
    bucket = int(torch.searchsorted(total, rank))
    return bucket, int(total[bucket] - counts[bucket])


def rank_of(n: int, density: float, ties: str) -> int:
    """The rank (from 1) of the smallest magnitude that survives; 0 where everything does.

    "kept": the floor((1-density) n)-th smallest, and all its equals survive, so at least density*n do.
    "exact": floor(density n) survive. ValueError where that is none.
    """
    if ties == "kept":
        return int((1 - Fraction(str(density))) * n)
    keep = int(Fraction(str(density)) * n)
    if keep == 0:
        raise ValueError(f"density {density} keeps none of {n} values: raise it, or take threshold: global")
    return n - keep + 1


def cut_at(rank: int, n: int, high: Tensor, bucket: int, low: Tensor, ties: str) -> Cut:
    """The cut at the `rank`-th smallest of `n`, from the counts of both levels."""
    below = int(high[:bucket].sum())
    offset, lower = locate(low, rank - below)
    if ties == "kept":
        return Cut((bucket << 16) | offset, None)
    above = n - below - lower - int(low[offset])
    return Cut((bucket << 16) | offset, n - rank + 1 - above)


def cut_of(x: Tensor, density: float, ties: str) -> Cut:
    """The cut that leaves a share `density` of the largest magnitudes of one tensor."""
    rank = rank_of(x.numel(), density, ties)
    if rank == 0:
        return Cut(0, None)
    high = high_counts(x)
    bucket, _ = locate(high, rank)
    return cut_at(rank, x.numel(), high, bucket, low_counts(x, bucket), ties)


def mask_of(x: Tensor, cut: Cut) -> Tensor:
    """Which values of `x` survive the cut (bool, the shape of x); equals in order, lowest index first."""
    bits = magnitude_bits(x)
    if cut.quota is None:
        return (bits >= cut.bits).view(x.shape)
    equal = bits == cut.bits
    return ((bits > cut.bits) | (equal & (torch.cumsum(equal, 0) <= cut.quota))).view(x.shape)


def equals(x: Tensor, cut: Cut) -> int:
    """How many values of `x` lie on the cut itself."""
    return int((magnitude_bits(x) == cut.bits).sum())
