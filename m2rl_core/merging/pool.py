"""A few threads that work on pieces; results come back in the order of the pieces, whichever is ready first."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


class Pool:
    """Threads with one torch thread each: pieces are small enough to keep one core's cache busy and no more.

    torch and numpy let other threads run while they compute. `threads` 0 means as many as torch would use.
    """

    def __init__(self, threads: int = 0):
        self.threads = threads or torch.get_num_threads()
        self._before = torch.get_num_threads()
        self._workers = ThreadPoolExecutor(self.threads, "merge", initializer=torch.set_num_threads, initargs=(1,))

    def map(self, work: Callable, pieces: Iterable) -> Iterator:
        """work(piece) for every piece, in order; the first that fails stops the rest and raises its error here."""
        pieces = list(pieces)
        return map(work, pieces) if len(pieces) == 1 else self._workers.map(work, pieces)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        """Drops what has not begun and waits for what has."""
        self._workers.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)  # torch keeps one number for threads that are yet to come
