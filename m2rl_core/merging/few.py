"""How much a loop over weights takes at once: all experts of one weight in registers, or block by block.

What it keeps for each weight of a block stays in the nearest cache.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

BLOCK = 1024  # weights; what a kernel keeps for each fits the first cache beside as many of five experts
MOST, FEW = 7, 4  # experts that a loop takes at once where it writes one row, and two: no more fit the vector units


def singles(values: Sequence[float]) -> tuple[np.float32, ...]:
    """What a kernel takes for one number an expert."""
    return tuple(map(np.float32, values))


def few(n: int, most: int = FEW) -> Iterator[slice]:
    """Slices of at most `most` of n experts."""
    return (slice(first, first + most) for first in range(0, n, most))
