"""What of one piece reaches the methods: the experts' shifts, after DARE and after TIES' trim, each computed once."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from m2rl_core.merging import dare, sce
from m2rl_core.merging.counting import array, count
from m2rl_core.merging.pieces import Piece
from m2rl_core.merging.recipe import Recipe
from m2rl_core.merging.threshold import keep_large


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
    """One piece: `base` and `deltas` {expert: flat float32}, `raw` {BASE or ("expert", name): as stored}.

    `known` holds the statistics gathered so far (see `statistics`): {CutKey: Cut}, {(Selection, tensor): Cut},
    {(Source or Trimmed, tensor): factor of the L1 rescale} and {"masks": dare.Masks}. Rows are shared:
    nobody changes one in place.
    """

    def __init__(self, piece: Piece, base: Tensor, deltas: Mapping[str, Tensor], raw: Mapping[str, Tensor],
                 known: Mapping):
        self.piece, self.base, self.deltas, self.raw, self.known = piece, base, deltas, raw, known
        self._made: dict[tuple, Tensor] = {}

    def once(self, key, make: Callable[[], Tensor]):
        """make(), at the first call for `key` only."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def of(self, want: Input) -> Tensor:
        """A source or a trimmed one, rescaled."""
        if isinstance(want, Source) and want.drop_rate == 0:
            return self.deltas[want.expert]
        return self.once(want, lambda: self._rescaled(want))

    def _rescaled(self, want: Input) -> Tensor:
        row = self.bare(want)
        if want.rescale == "none":
            return row
        factor = dare.inverse(want.drop_rate) if want.rescale == "inverse" else self.known[want, self.piece.name]
        return row if factor == 1 else row * factor

    def bare(self, want: Input) -> Tensor:
        """The same before it is rescaled."""
        return self.once(("bare", want), lambda: self._bare(want))

    def _bare(self, want: Input) -> Tensor:
        name, first = self.piece.name, self.piece.first
        if isinstance(want, Source):
            return self.known["masks"].drop(self.deltas[want.expert], want.drop_rate, want.seed, want.expert, name,
                                            first)
        cut = self.known[cut_key(want, name)]
        return keep_large(self.of(want.source), cut.bits, cut.left(name, self.piece.index))

    def before(self, want: Input) -> Tensor:
        """What is dropped from or trimmed."""
        return self.deltas[want.expert] if isinstance(want, Source) else self.of(want.source)

    def magnitudes(self, source: Source) -> Tensor:
        return self.once(("magnitudes", source), lambda: self.of(source).abs())

    def nonzero(self, want: Input) -> int:
        """How many of its values are not 0."""
        return self.once(("nonzero", want), lambda: count(array(self.of(want)) != 0))

    def variance(self, selection: Selection) -> Tensor:
        return self.once(selection, lambda: sce.variance([self.deltas[expert] for expert in selection.experts]))

    def selected(self, selection: Selection) -> list[Tensor]:
        """The experts' shifts where SCE selects and 0 elsewhere."""
        if selection.select == 1:
            return [self.deltas[expert] for expert in selection.experts]
        return self.once(("selected", selection), lambda: self._selected(selection))

    def _selected(self, selection: Selection) -> list[Tensor]:
        cut = self.known[selection, self.piece.name]
        kept = keep_large(self.variance(selection), cut.bits, cut.left(self.piece.name, self.piece.index))
        mask = kept.sign()
        return [self.deltas[expert] * mask for expert in selection.experts]


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
