"""What of one piece reaches the methods: the experts' shifts, after DARE and with the cuts of TIES' trim."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from m2rl_core.merging import dare, sce, ties
from m2rl_core.kernel import kernel
from m2rl_core.merging.few import BLOCK, MOST, few, singles
from m2rl_core.merging.pieces import Piece
from m2rl_core.merging.recipe import Recipe
from m2rl_core.merging.stored import not_finite, shift, wide
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
    """One piece of all models: `base` float32 (P,) and what each of `experts` learned, as rows.

    A row, as kernels take it with `base`, is the expert's weights as stored where these are bfloat16, else its shifts
    in float32 (see `stored.shift`): half the bytes to read, and nothing to write. stored: base and experts as the files
    have them (E+1, P), or as float32 where kernels lack the type; raw: the same in the very types of the files,
    `codes`. `known` holds the statistics gathered so far (see `statistics`): {CutKey: Cut}, {(Selection, tensor): Cut}
    and {(Source or Trimmed, tensor): factor of the L1 rescale}. All arrays are shared: nobody changes one in place.
    """

    def __init__(self, piece: Piece, experts: Sequence[str], stored: np.ndarray, memory: np.ndarray, known: Mapping,
                 raw: Sequence[np.ndarray], codes: Sequence[str]):
        n, size = len(experts), piece.count
        self.piece, self.experts, self.stored, self.known = piece, list(experts), stored, known
        self.raw, self.codes = raw, codes
        self.base = memory[0, :size]
        widen(stored[0], self.base)
        self._memory = memory[0, size : (n + 1) * size].reshape(n, size)
        self._dropped = memory[1, : n * size].reshape(n, size)  # by DARE: of each expert, what was last asked for
        self._held: dict[int, tuple[Source, float, int]] = {}
        self._variance: tuple[Selection, np.ndarray] | None = None

    @cached_property
    def deltas(self) -> np.ndarray:
        """All experts' shifts, float32 (E, P)."""
        for row, out in zip(self.stored[1:], self._memory, strict=True):
            subtract(row, self.base, out)
        return self._memory

    def delta(self, expert: str) -> np.ndarray:
        return self.deltas[self.experts.index(expert)]

    def values(self, row: np.ndarray) -> np.ndarray:
        """The shifts of a row, or what else is float32; (P,)."""
        if row.dtype == np.float32:
            return row
        out = np.empty(len(row), np.float32)
        subtract(row, self.base, out)
        return out

    def plain(self, i: int) -> np.ndarray:
        """The row of expert i before DARE."""
        return self.stored[1 + i] if self.stored.dtype == np.uint16 else self.deltas[i]

    def survey(self) -> tuple[list[int], int, int, bool]:
        """(of each expert, how many shifts are not 0; how many weights two or more changed; how many of these were
        shifted both up and down; whether all stored values are finite)."""
        rows = tuple(self.plain(i) for i in range(len(self.experts)))
        found = [changes(row, self.base) for row in rows]
        shared, conflicts = conflict(rows, self.base)
        finite = not any(bad for _, bad in found) or not any(  # an infinite shift may be of finite weights
            sum(not_finite(values, code)) for values, code in zip(self.raw, self.codes, strict=True))
        return [changed for changed, _ in found], shared, conflicts, finite

    def row(self, source: Source) -> tuple[np.ndarray, int]:
        """(an expert's row after DARE, how many of its shifts were left; 0 without DARE, as then `Survey` knows)."""
        i = self.experts.index(source.expert)
        if source.drop_rate == 0:
            return self.plain(i), 0
        inverse = source.rescale == "inverse"
        factor = dare.inverse(source.drop_rate) if inverse else self.known.get((source, self.piece.name), 1.0)
        if self._held.get(i, ())[:2] != (source, factor):
            start, row = dare.start_of(source.seed, source.expert, self.piece.name), self.plain(i)
            self._held[i] = source, factor, sum(
                dare.drop(row[place], self.base[place], source.drop_rate, factor, start, first, self._dropped[i, place])
                for first, place in self.piece.places())
        return self._dropped[i], self._held[i][2]

    def norms(self, source: Source) -> list[float]:
        """The L1 norms of an expert's shifts, before DARE and after it without rescaling."""
        row = self.plain(self.experts.index(source.expert))
        start = dare.start_of(source.seed, source.expert, self.piece.name)
        return sum(dare.norms(row[place], self.base[place], source.drop_rate, start, first)
                   for first, place in self.piece.places()).tolist()

    def rows(self, sources: Sequence[Source]) -> tuple[tuple[np.ndarray, ...], list[int]]:
        """(the rows of several, their counts)."""
        found, counts = zip(*map(self.row, sources), strict=True)
        if len({row.dtype for row in found}) > 1:  # some are dropped: kernels take rows of one kind
            found = [row if row.dtype == np.float32 else self.delta(source.expert)
                     for row, source in zip(found, sources, strict=True)]
        return tuple(found), list(counts)

    def trims(self, inputs: Sequence[Input]) -> tuple[ties.Trims, list[int]]:
        """(what the kernels of `ties` take, how many shifts of each input stay that neither `Survey` nor
        `Cut.survivors` counts)."""
        sources = [want.source if isinstance(want, Trimmed) else want for want in inputs]
        rows, counts = self.rows(sources)
        rows, cuts, factors = list(rows), [np.float32(0)] * len(rows), [1.0] * len(rows)
        for i, want in enumerate(inputs):
            if isinstance(want, Trimmed):
                cut = self.known[cut_key(want, self.piece.name)]
                left = cut.left(self.piece.name, self.piece.index)
                if left and cut.bits and rows[i].dtype != np.float32:  # the quota ends here: some rows change
                    rows = [self.delta(source.expert) for source in sources]
                rows[i], cuts[i] = at_least(rows[i], cut.bits, left)
                factors[i] = self.known.get((want, self.piece.name), 1.0)
                counts[i] = counts[i] if cut.survivors is None else 0
        return (self.base, tuple(rows), tuple(cuts), singles(factors)), counts

    def variance(self, selection: Selection) -> np.ndarray:
        """Of the experts' shifts at each weight; float32 (P,)."""
        if self._variance is None or self._variance[0] != selection:
            out = np.empty(self.piece.count, np.float32)
            sce.variance(self.rows([Source(expert) for expert in selection.experts])[0], self.base, out)
            self._variance = selection, out
        return self._variance[1]

    def selected(self, selection: Selection) -> tuple[np.ndarray, ...]:
        """The experts' rows, with shifts of 0 where SCE does not select."""
        if selection.select == 1:
            return self.rows([Source(expert) for expert in selection.experts])[0]
        cut = self.known[selection, self.piece.name]
        kept = keep_large(self.variance(selection), cut.bits, cut.left(self.piece.name, self.piece.index))
        signs = np.sign(kept)
        return tuple(self.delta(expert) * signs for expert in selection.experts)


@kernel
def widen(stored, out):
    """out := stored values, in float32; (P,)."""
    for i in range(len(out)):
        out[i] = wide(stored[i])


@kernel
def subtract(stored, base, out):
    """out := stored values less the base's, in float32; (P,)."""
    for i in range(len(out)):
        out[i] = wide(stored[i]) - base[i]


@kernel
def changes(row, base):
    """How many shifts of a row are not 0, and how many are not finite."""
    changed, bad = 0, 0
    for first in range(0, len(base), BLOCK):
        here, origin = row[first : first + BLOCK], base[first : first + BLOCK]
        moved = infinite = np.int32(0)
        for i in range(len(here)):
            x = shift(here[i], origin[i])
            moved = np.int32(moved + (x != 0))
            infinite = np.int32(infinite + (not abs(x) <= LARGEST))
        changed += moved
        bad += infinite
    return changed, bad


def conflict(rows: Sequence[np.ndarray], base: np.ndarray) -> tuple[int, int]:
    """How many weights two or more of the rows changed, and how many were shifted both up and down."""
    if len(rows) <= MOST:
        return _conflict(rows, base)
    votes = np.zeros(len(base), np.int32)
    for some in few(len(rows), MOST):
        _add_signs(rows[some], base, votes)
    up, down = votes & (DOWN - 1), votes >> 16
    return int((up + down > 1).sum()), int(((up > 0) & (down > 0)).sum())


@kernel
def _signs(signs, rows, base, i):
    """signs + how many shifts of weight i go up + DOWN times how many go down."""
    for row in range(len(rows)):
        x = shift(rows[row][i], base[i])
        signs = np.int32(signs + np.int32(x > 0) + DOWN * np.int32(x < 0))
    return signs


@kernel
def _conflict(rows, base):
    shared, conflicts = 0, 0
    for first in range(0, len(base), BLOCK):
        both = more = np.int32(0)
        for j in range(min(BLOCK, len(base) - first)):
            signs = _signs(np.int32(0), rows, base, np.uint64(first) + np.uint64(j))  # unsigned: not from the end
            up, down = np.int32(signs & (DOWN - 1)), np.int32(signs >> 16)
            more = np.int32(more + (np.int32(up + down) > 1))
            both = np.int32(both + ((up > 0) & (down > 0)))
        shared += more
        conflicts += both
    return shared, conflicts


@kernel
def _add_signs(rows, base, signs):
    for i in range(len(signs)):
        signs[i] = _signs(signs[i], rows, base, i)


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
