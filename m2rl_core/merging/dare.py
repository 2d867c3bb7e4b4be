"""DARE (Yu et al. 2024): drop shifts at random, scale the rest up. A sparsifier that runs before a merge.

Whether an element survives is a hash of (seed, model, tensor, index) and nothing else: SplitMix64, started
at a point of its own for each (seed, model, tensor) and read at its index. So the bits do not depend on
chunks, threads or the order of work, and no two tensors share a mask.
"""
from __future__ import annotations

import hashlib
from fractions import Fraction

import torch
from torch import Tensor

from m2rl_core.merging.ties import rescaled

CHUNK = 1 << 20  # elements hashed at a time: bounds memory, does not change a bit
GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def start_of(seed: int, model: str, tensor: str) -> int:
    """Where the stream of one tensor of one model begins (64 bits of SHA-256)."""
    return int.from_bytes(hashlib.sha256(repr((seed, model, tensor)).encode()).digest()[:8], "little")


def keep_mask(start: int, first: int, count: int, drop_rate: float) -> Tensor:
    """Which of the elements first .. first+count-1 survive: bool (count,), each with chance 1 - drop_rate."""
    state = torch.arange(first + 1, first + 1 + count, dtype=torch.int64)
    state = state * _signed(GAMMA) + _signed(start)  # int64 arithmetic wraps modulo 2**64
    state = (state ^ _shifted(state, 30)) * _signed(MIX_1)
    state = (state ^ _shifted(state, 27)) * _signed(MIX_2)
    state = state ^ _shifted(state, 31)
    return _shifted(state, 11) >= int(Fraction(str(drop_rate)) * 2**53)


def drop(delta: Tensor, *, drop_rate: float, rescale: str, seed: int, model: str, tensor: str) -> Tensor:
    """`delta` with each element dropped with chance `drop_rate`; float32, one whole tensor.

    rescale: "inverse" multiplies what is left by 1/(1 - drop_rate), which keeps the mean; "l1" restores the
    tensor's L1 norm (mergekit); "none" does neither.
    """
    if drop_rate == 0:
        return delta
    start, flat = start_of(seed, model, tensor), delta.reshape(-1)
    kept = torch.empty_like(flat)
    for first in range(0, flat.numel(), CHUNK):
        part = flat[first : first + CHUNK]
        kept[first : first + CHUNK] = part * keep_mask(start, first, part.numel(), drop_rate)
    kept = kept.view(delta.shape)
    if rescale == "inverse":
        return kept * float(1 / (1 - Fraction(str(drop_rate))))
    return rescaled(delta, kept, rescale)


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def _shifted(state: Tensor, by: int) -> Tensor:
    """Logical shift to the right; torch's own is arithmetic."""
    return (state >> by) & ((1 << (64 - by)) - 1)
