"""How a process uses a CPU: so many threads, and memory that was freed is kept for the next tensor."""
from __future__ import annotations

import ctypes
import sys

import torch

TRIM, TOP_PAD, MMAP, HEAPS = -1, -2, -3, -8  # glibc's M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX
KEPT = {MMAP: 2**25, TRIM: 2**30, TOP_PAD: 2**26, HEAPS: 2}  # bytes, and heaps: threads that begin anew share what others left


def settle(threads: int) -> None:
    """Let torch compute with `threads` threads.

    With glibc, tensors of up to 32 MB also come from a heap that is not given back to the system at once: by
    default each step of sampling and training gives back and asks again for the same pages (7 to 8 % of the time).
    """
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        for name, value in KEPT.items() if mallopt else ():
            mallopt(name, value)
