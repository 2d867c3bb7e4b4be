"""What of one piece reaches the methods: the experts' shifts, after DARE and with the cuts of TIES' trim."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from m2rl_core.merging import dare, sce, ties
from m2rl_core.merging.kernel import BLOCK, kernel, singles
from m2rl_core.merging.pieces import Piece
from m2rl_core.merging.recipe import Recipe
from m2rl_core.merging.stored import wide
from m2rl_core.merging.threshold import at_least, keep_large

LARGEST = np.finfo(np.float32).max
DOWN = np.int32(1 << 16)

BASE = ("base", "")  # the key of the base's stored values; an expert's is ("expert", name)


class Source(NamedTuple):
    """An expert's shifts after DARE, where drop_rate is above 0."""

    expert: str
    drop_rate: float = 0.0
    rescale: str = "none"
    seed: int = 0


class Trimmed(NamedTuple):
    """A source after TIES' trim; threshold, ties and rescale as in `recipe`."""

    source: Source
    density: float
    threshold: str
    ties: str
    rescale: str


Input = Source | Trimmed


class Selection(NamedTuple):
    """The coordinates that SCE selects from these experts' shifts."""

    experts: tuple[str, ...]
    select: float


class CutKey(NamedTuple):
    """The order statistic of a trim; `tensor` is "" where it is global."""

    source: Source
    density: float
    ties: str
    tensor: str


class Shifts:
    """One piece of all models: `base` float32 (P,), `deltas` float32 (E, P) in the order of `experts`.

    stored: base and experts as the files have them (E+1, P), or as float32 where kernels lack the type; raw: the
    same in the very types of the files. changed (E,): how many of each expert's shifts are not 0; shared: of the
    weights those that two experts or more changed; conflicts: those with shifts of both signs. `known` holds the
    statistics gathered so far (see `statistics`): {CutKey: Cut}, {(Selection, tensor): Cut} and {(Source or
    Trimmed, tensor): factor of the L1 rescale}. All arrays are shared: nobody changes one in place.
    """

    def __init__(self, piece: Piece, experts: Sequence[str], stored: np.ndarray, memory: np.ndarray, known: Mapping,
                 raw: Sequence[np.ndarray]):
        n, size = len(experts), piece.count
        self.piece, self.experts, self.stored, self.known, self.raw = piece, list(experts), stored, known, raw
        self.base = memory[0, :size]
        self.deltas = memory[0, size : (n + 1) * size].reshape(n, size)
        self.changed = np.zeros(n, np.int64)
        self.shared, self.conflicts, bad = subtract(stored, self.base, self.deltas, self.changed)
        self.finite = bad == 0
        self._dropped = memory[1, : n * size].reshape(n, size)  # by DARE: of each expert, what was last asked for
        self._held: dict[int, tuple[Source, float, int]] = {}
        self._variance: tuple[Selection, np.ndarray] | None = None

    def row(self, source: Source, factor: float | None = None) -> tuple[np.ndarray, int]:
        """(an expert's shifts after DARE, how many are not 0); `factor` in place of what rescales them."""
        i = self.experts.index(source.expert)
        if source.drop_rate == 0:
            return self.deltas[i], int(self.changed[i])
        if factor is None:
            inverse = source.rescale == "inverse"
            factor = dare.inverse(source.drop_rate) if inverse else self.known.get((source, self.piece.name), 1.0)
        if self._held.get(i, ())[:2] != (source, factor):
            start = dare.start_of(source.seed, source.expert, self.piece.name)
            self._held[i] = source, factor, sum(
                dare.drop(self.deltas[i, place], source.drop_rate, factor, start, first, self._dropped[i, place])
                for first, place in self.piece.places())
        return self._dropped[i], self._held[i][2]

    def rows(self, sources: Sequence[Source]) -> tuple[np.ndarray, list[int]]:
        """(the same of several as (E, P), counts); no copy where they are all experts in order, or all dropped."""
        found, counts = zip(*map(self.row, sources), strict=True)
        if [source.expert for source in sources] == self.experts:
            if all(source.drop_rate == 0 for source in sources):
                return self.deltas, list(counts)
            if all(source.drop_rate for source in sources):
                return self._dropped, list(counts)
        return np.stack(found), list(counts)

    def trims(self, inputs: Sequence[Input]) -> tuple[ties.Trims, list[int]]:
        """(what the kernels of `ties` take, how many of each input's shifts are above 0 and stay, as far as that
        is not said by `Cut.survivors`)."""
        rows, cuts, factors, counts = [], [], [], []
        for want in inputs:
            trim = isinstance(want, Trimmed)
            row, count = self.row(want.source if trim else want)
            cut, factor = np.float32(0), 1.0
            if trim:
                found = self.known[cut_key(want, self.piece.name)]
                row, cut = at_least(row, found.bits, found.left(self.piece.name, self.piece.index))
                factor = self.known.get((want, self.piece.name), 1.0)
                count = count if found.survivors is None else 0
            rows.append(row)
            cuts.append(cut)
            factors.append(factor)
            counts.append(count)
        return (tuple(rows), tuple(cuts), singles(factors)), counts

    def variance(self, selection: Selection) -> np.ndarray:
        """Of the experts' shifts at each weight; float32 (P,)."""
        if self._variance is None or self._variance[0] != selection:
            out = np.empty(self.piece.count, np.float32)
            sce.variance(self.rows([Source(expert) for expert in selection.experts])[0], out)
            self._variance = selection, out
        return self._variance[1]

    def selected(self, selection: Selection) -> np.ndarray:
        """The experts' shifts where SCE selects and 0 elsewhere; (E, P)."""
        rows, _ = self.rows([Source(expert) for expert in selection.experts])
        if selection.select == 1:
            return rows
        cut = self.known[selection, self.piece.name]
        kept = keep_large(self.variance(selection), cut.bits, cut.left(self.piece.name, self.piece.index))
        return rows * np.sign(kept)


@kernel
def subtract(stored, base, deltas, changed):
    """base := stored[0], deltas := stored[1:] - base, in float32; changed[e] += shifts of expert e that are not 0.

    stored (E+1, P), base (P,), deltas (E, P), changed (E,). Returns how many weights two experts or more changed,
    how many were shifted both up and down, and how many shifts are not finite.
    """
    signs = np.empty(BLOCK, np.int32)  # of each weight: how many shifts go up, and DOWN times how many down
    shared, conflicts, bad = 0, 0, 0
    for first in range(0, len(base), BLOCK):
        origin, given = base[first : first + BLOCK], stored[0, first : first + BLOCK]
        sign = signs[: len(origin)]
        for i in range(len(origin)):
            origin[i] = wide(given[i])
            sign[i] = 0
        for e in range(len(deltas)):
            row, shift = stored[e + 1, first : first + BLOCK], deltas[e, first : first + BLOCK]
            here = infinite = np.int32(0)
            for i in range(len(row)):
                x = wide(row[i]) - origin[i]
                shift[i] = x
                sign[i] += np.int32(x > 0) + DOWN * np.int32(x < 0)
                here = np.int32(here + (x != 0))
                infinite = np.int32(infinite + (not abs(x) <= LARGEST))
            changed[e] += here
            bad += infinite
        both = more = np.int32(0)
        for i in range(len(origin)):
            up, down = np.int32(sign[i] & (DOWN - 1)), np.int32(sign[i] >> 16)
            more = np.int32(more + (np.int32(up + down) > 1))
            both = np.int32(both + ((up > 0) & (down > 0)))
        shared += more
        conflicts += both
    return shared, conflicts, bad


def cut_key(trimmed: Trimmed, tensor: str) -> CutKey:
    """Which order statistic a trim of `tensor` goes by."""
    where = tensor if trimmed.threshold == "tensor" else ""
    return CutKey(trimmed.source, trimmed.density, trimmed.ties, where)


def inputs_of(recipe: Recipe, experts: Sequence[str]) -> list[Input]:
    """What a recipe merges, one for each expert."""
    p, n = recipe.parameters, len(experts)
    sources = [Source(expert) for expert in experts]
    if "drop_rate" in p:
        rates = recipe.each("drop_rate", n)
        sources = [Source(expert, rate, p["drop_rescale"], recipe.seed) if rate else Source(expert)
                   for expert, rate in zip(experts, rates, strict=True)]
    if "threshold" not in p:
        return sources
    return [source if density == 1 else Trimmed(source, density, p["threshold"], p["ties"], p["trim_rescale"])
            for source, density in zip(sources, recipe.each("density", n), strict=True)]
