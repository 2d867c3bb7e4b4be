"""A few threads that work on pieces; results come back in the order of the pieces, whichever is ready first."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Some threads. Kernels and reads let other threads run."""

    def __init__(self, threads: int):
        self._workers = ThreadPoolExecutor(threads, "merge")

    def map(self, work: Callable, pieces: Iterable) -> Iterator:
        """work(piece) for every piece, in order; the first that fails stops the rest and raises its error here."""
        pieces = list(pieces)
        return map(work, pieces) if len(pieces) == 1 else self._workers.map(work, pieces)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        """Drops what has not begun and waits for what has."""
        self._workers.shutdown(cancel_futures=True)
