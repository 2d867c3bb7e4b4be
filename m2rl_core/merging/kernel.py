"""How loops over weights are compiled: by numba, to vector instructions, outside of Python's lock.

No fast math: every operation is rounded by itself, in the order written, so that results have the same bits
everywhere. Loops go block by block, so that what they keep for each weight stays in the nearest cache. numba notices
changes to a kernel's own file only: after one to what it takes from another file, remove __pycache__.
"""
from __future__ import annotations

from collections.abc import Callable

from numba import njit

BLOCK = 1024  # weights; what a kernel keeps for each fits the first cache beside as many of five experts


def kernel(function: Callable) -> Callable:
    """The function, compiled at its first call for each kind of arguments; the machine code is kept on disk."""
    options = {"nogil": True, "error_model": "numpy"}  # x / 0 as numpy has it, without a branch
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder that it may write to: every process compiles for itself
        return njit(**options)(function)
