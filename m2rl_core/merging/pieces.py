"""Work is cut into pieces: ranges of one flat tensor, large enough that most of the time is spent in kernels.

The grid is fixed, as digests and the last bits of sums depend on it; merged weights do not depend on threads.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

PIECE = 1 << 19  # the best of 2^16 .. 2^20 as measured: smaller ones cost Python's time, larger ones outgrow caches
GROUP = 1 << 24  # tensors are taken together up to this many values: fewer waits for the last piece
RUN, RUNS = 2048, (32, 512)  # a sample: so many values in a row, from at least and at most so many places


class Piece(NamedTuple):
    """Values of the flat tensor `name`, as runs of (first, count): one run, its index-th piece; or a sample (-1)."""

    name: str
    index: int
    runs: tuple[tuple[int, int], ...]

    @property
    def first(self) -> int:
        return self.runs[0][0]

    @property
    def count(self) -> int:
        return sum(count for _, count in self.runs)

    def places(self) -> Iterator[tuple[int, slice]]:
        """(where a run begins in the tensor, where it lies in memory) of each run, as they are read into a row."""
        end = 0
        for first, count in self.runs:
            end += count
            yield first, slice(end - count, end)


def grid(name: str, size: int) -> list[Piece]:
    """All pieces of a tensor of `size` values, in order."""
    return [Piece(name, i, ((first, min(PIECE, size - first)),)) for i, first in enumerate(range(0, size, PIECE))]


def groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names in order, in groups of at most GROUP values or of one tensor."""
    found: list[list[str]] = []
    held = GROUP + 1
    for name in sorted(sizes):
        if held + sizes[name] > GROUP:
            found.append([])
            held = 0
        found[-1].append(name)
        held += sizes[name]
    return found


def sample(sizes: Mapping[str, int]) -> tuple[list[Piece], bool]:
    """Short runs spread evenly over tensors, about 1 in 64 values, and whether they are all values there are."""
    n = sum(sizes.values())
    runs = min(max(n // 64 // RUN, RUNS[0]), RUNS[1])
    if n <= runs * RUN:
        return [piece for name in sizes for piece in grid(name, sizes[name])], True
    found: dict[str, list[tuple[int, int]]] = {}
    names, end, begin, name = iter(sizes), 0, 0, ""
    for start in ((2 * j + 1) * n // (2 * runs) for j in range(runs)):
        while start >= end:
            name = next(names)
            begin, end = end, end + sizes[name]
        first = (start - begin) // 2 * 2
        found.setdefault(name, []).append((first, min(RUN, sizes[name] - first)))
    most = PIECE // RUN
    return [Piece(name, -1, tuple(places[i : i + most])) for name, places in found.items()
            for i in range(0, len(places), most)], False
