"""How loops over weights are compiled: by numba, to vector instructions, outside of Python's lock.

No fast math in a `kernel`: every operation is rounded by itself, in the order written, so that results have the same
bits everywhere; sums of an analysis may be `fused`. Loops either take all experts of one weight in registers, or go
block by block, so that what they keep for each weight stays in the nearest cache. Machine code is kept on disk until
the kernel's file or any file beside this one changes.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numba import njit

BLOCK = 1024  # weights; what a kernel keeps for each fits the first cache beside as many of five experts
MOST, FEW = 7, 4  # experts that a loop takes at once where it writes one row, and two: no more fit the vector units
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def kernel(function: Callable, **options) -> Callable:
    """The function, compiled at its first call for each kind of arguments; the machine code is kept on disk."""
    options |= {"nogil": True, "error_model": "numpy"}  # x / 0 as numpy has it, without a branch
    try:
        compiled = njit(cache=True, **options)(function)
        own = Path(function.__code__.co_filename).read_bytes()  # numba's own stamp sees this file, not what it calls
        compiled._cache._cache_file._source_stamp = SOURCES + hashlib.sha256(own).hexdigest()
        return compiled
    except RuntimeError:  # numba finds no folder that it may write to: every process compiles for itself
        return njit(**options)(function)


def fused(function: Callable) -> Callable:
    """A kernel that may reorder sums and round x * y + z once: its bits are those of one machine, whatever the threads."""
    return kernel(function, fastmath={"contract", "reassoc", "nsz"})


def singles(values: Sequence[float]) -> tuple[np.float32, ...]:
    """What a kernel takes for one number an expert."""
    return tuple(map(np.float32, values))


def few(n: int, most: int = FEW) -> Iterator[slice]:
    """Slices of at most `most` of n experts."""
    return (slice(first, first + most) for first in range(0, n, most))
