"""How loops are compiled: by numba, to vector instructions, outside of Python's lock; over weights, and between products.

No fast math in a `kernel`: every operation is rounded by itself, in the order written, so that results have the same
bits everywhere; sums of an analysis may be `fused`, and what a policy computes may be `quick`, as in the libraries that
compute the rest of it. Machine code is kept on disk until a file changes that a kernel may be made of: those beside its
own, and those of `merging`, whose loops others call.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from numba import njit

SHARED = Path(__file__).with_name("merging")


@lru_cache
def digest(folder: Path) -> str:
    """Of all sources in a folder."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()


def kernel(function: Callable, **options) -> Callable:
    """The function, compiled at its first call for each kind of arguments; the machine code is kept on disk."""
    options |= {"nogil": True, "error_model": "numpy"}  # x / 0 as numpy has it, without a branch
    try:
        compiled = njit(cache=True, **options)(function)
        own = Path(function.__code__.co_filename).parent  # numba's own stamp sees the one file, not what it calls
        compiled._cache._cache_file._source_stamp = digest(own) + digest(SHARED)
        return compiled
    except RuntimeError:  # numba finds no folder that it may write to: every process compiles for itself
        return njit(**options)(function)


def fused(function: Callable) -> Callable:
    """A kernel that may reorder sums and round x * y + z once: its bits are those of one machine, whatever the threads."""
    return kernel(function, fastmath={"contract", "reassoc", "nsz"})


def quick(function: Callable, **options) -> Callable:
    """A fused kernel that may also multiply by a reciprocal, and expects no NaN: what comes of one is arbitrary."""
    return kernel(function, fastmath={"contract", "reassoc", "nsz", "arcp", "nnan"}, **options)
