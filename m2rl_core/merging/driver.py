"""Streams tensors through any number of recipes: every tensor of base and experts is read once a pass.

Recipes share a pass. The last pass merges. Only TIES needs others before it: two counting passes for an
exact global threshold, one for the majority sign of zero votes. In memory: the tensors of one name.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m2rl_core.merging import dare, threshold, ties
from m2rl_core.merging.diagnosis import Survey, Tally, warnings
from m2rl_core.merging.recipe import METHODS, Recipe, known


class Source(NamedTuple):
    """An expert's shifts as they reach a method: after DARE, where drop_rate is above 0."""

    expert: str
    drop_rate: float
    rescale: str
    seed: int


class Merger:
    """Iterates over (name, one merged tensor a recipe) in the order of names; `diagnoses` is filled at the end.

    base, experts[name]: mappings from name to tensor (a `Checkpoint` or a plain dict). Tensors that are not
    floating point are the base's. ValueError, naming model, tensor and count, for names or shapes that differ,
    NaN or Inf and, unless `allow_identical`, an expert with the base's very weights.
    `report(what, done, total)` is called after each tensor.
    """

    def __init__(
        self, base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], recipes: Sequence[Recipe],
        *, allow_identical: bool = False, report: Callable[[str, int, int], None] | None = None,
    ):
        check_recipes(recipes, experts)
        check_shapes(base, experts)
        self.base, self.experts, self.recipes = base, experts, list(recipes)
        self.allow_identical, self.report = allow_identical, report or (lambda what, done, total: None)
        self.survey, self.surveyed = Survey(list(experts)), False
        self.sources = [sources_of(recipe, list(recipe.experts or experts)) for recipe in self.recipes]
        self.cuts: dict[tuple[Source, float, str], threshold.Cut] = {}  # global ones
        self.quotas: dict[tuple[int, int], int] = {}  # (recipe, expert): equals at a global cut still to keep
        self.zero_signs: dict[int, int] = {}
        self.diagnoses: list[dict] = []

    def __iter__(self) -> Iterator[tuple[str, list[Tensor]]]:
        self._find_cuts()
        self._find_zero_signs()
        tallies = [Tally([source.expert for source in sources]) for sources in self.sources]
        for name, base, deltas in self._pass("merge"):
            if not base.is_floating_point():
                yield name, [base] * len(self.recipes)
                continue
            wide, cache, outs = base.float(), {}, []
            for r, recipe in enumerate(self.recipes):
                inputs = self._inputs(r, name, deltas, cache)
                merged = METHODS[recipe.method](wide, inputs, **self._arguments(r))
                outs.append((wide + merged).to(dtype_of(recipe, base.dtype)))
                finite(outs[-1], f"the {recipe.method} merge, as {outs[-1].dtype},", name)
                tallies[r].add(wide, inputs, merged, outs[-1])
            yield name, outs
        self.diagnoses = [self.survey.result() | tally.result() for tally in tallies]
        for recipe, diagnosis in zip(self.recipes, self.diagnoses, strict=True):
            diagnosis["warnings"] = warnings(self.survey, diagnosis, recipe.method)

    def _pass(self, what: str) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """One read of everything: (name, base as stored, float32 shift of each expert); the first read is checked."""
        self.quotas = {}
        for done, name in enumerate(sorted(self.base), 1):
            base, deltas = self.base[name], {}
            if base.is_floating_point():
                wide = base.float() if self.surveyed else finite(base, "the base", name).float()
                for expert, tensors in self.experts.items():
                    other = tensors[name] if self.surveyed else finite(tensors[name], expert, name)
                    deltas[expert] = other.float() - wide
                if not self.surveyed:
                    self.survey.add(deltas)
            yield name, base, deltas
            self.report(what, done, len(self.base))
        if not self.surveyed and not self.allow_identical and self.survey.unchanged():
            raise ValueError(f"{self.survey.unchanged()[0]} is identical to the base, so nothing comes from it: "
                             "check its path, or pass --allow-identical")
        self.surveyed = True

    def _find_cuts(self) -> None:
        """The global thresholds of TIES, exact, by two counting passes (none where no recipe asks for one)."""
        wanted = {(source, density, recipe.parameters["ties"])
                  for recipe, sources in zip(self.recipes, self.sources, strict=True)
                  if recipe.parameters.get("threshold") == "global"
                  for source, density in zip(sources, recipe.each("density", len(sources)), strict=True)}
        if not wanted:
            return
        high = {source: torch.zeros(threshold.HIGH, dtype=torch.int64) for source, _, _ in wanted}
        for name, _, deltas in self._pass("count magnitudes"):
            for source in high if deltas else ():
                high[source] += threshold.high_counts(sparse(source, name, deltas))
        n = self.survey.values
        ranks = {want: threshold.rank_of(n, want[1], want[2]) for want in wanted}
        buckets = {want: threshold.locate(high[want[0]], rank)[0] for want, rank in ranks.items() if rank}
        low = {(want[0], bucket): torch.zeros(threshold.LOW, dtype=torch.int64) for want, bucket in buckets.items()}
        for name, _, deltas in self._pass("count within buckets"):
            cache: dict[Source, Tensor] = {}
            for source, bucket in low if deltas else ():
                low[source, bucket] += threshold.low_counts(sparse(source, name, deltas, cache), bucket)
        for want, rank in ranks.items():
            source, _, rule = want
            self.cuts[want] = threshold.Cut(0, None) if rank == 0 else threshold.cut_at(
                rank, n, high[source], buckets[want], low[source, buckets[want]], rule)

    def _find_zero_signs(self) -> None:
        """The sign that wins over all weights, for the recipes that give it to zero votes; 0 where none does."""
        wanted = [r for r, recipe in enumerate(self.recipes) if recipe.parameters.get("zero_sign") == "majority"]
        balance = dict.fromkeys(wanted, 0)
        for name, _, deltas in self._pass("count signs") if wanted else ():
            cache: dict[Source, Tensor] = {}
            for r in wanted if deltas else ():
                inputs, vote = self._inputs(r, name, deltas, cache), self.recipes[r].parameters["vote"]
                votes = ties.vote_sum(inputs, self.recipes[r].each("weight", len(inputs)), vote)
                balance[r] += int((votes > 0).sum()) - int((votes < 0).sum())
        self.zero_signs = {r: (total > 0) - (total < 0) for r, total in balance.items()}

    def _inputs(self, r: int, name: str, deltas: dict[str, Tensor], cache: dict[Source, Tensor]) -> list[Tensor]:
        """What recipe `r` merges: its experts' shifts after DARE and after TIES' trim."""
        dropped = [sparse(source, name, deltas, cache) for source in self.sources[r]]
        p = self.recipes[r].parameters
        if "threshold" not in p:
            return dropped
        trimmed, densities = [], self.recipes[r].each("density", len(dropped))
        for e, (delta, density) in enumerate(zip(dropped, densities, strict=True)):
            if p["threshold"] == "global":
                cut = self._left(r, e, self.cuts[self.sources[r][e], density, p["ties"]], delta)
            else:
                try:
                    cut = threshold.cut_of(delta, density, p["ties"])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            trimmed.append(ties.trim(delta, cut, p["trim_rescale"]))
        return trimmed

    def _left(self, r: int, e: int, cut: threshold.Cut, delta: Tensor) -> threshold.Cut:
        """The global cut with what earlier tensors of this pass left of its quota."""
        if cut.quota is None:
            return cut
        left = self.quotas.get((r, e), cut.quota)
        self.quotas[r, e] = max(0, left - threshold.equals(delta, cut))
        return threshold.Cut(cut.bits, left)

    def _arguments(self, r: int) -> dict:
        """The keyword arguments of recipe `r`'s method, zero votes resolved to a sign."""
        p, n = self.recipes[r].parameters, len(self.sources[r])
        names = ("normalize", "scale", "vote", "select", "select_masks", "uniform_below")
        arguments = {name: p[name] for name in names if name in p}
        if "weight" in p:
            arguments["weights"] = self.recipes[r].each("weight", n)
        if "zero_sign" in p:
            arguments["zero_sign"] = self.zero_signs.get(r, 1)
        return arguments


def sparse(source: Source, name: str, deltas: dict[str, Tensor], cache: dict[Source, Tensor] | None = None) -> Tensor:
    """One expert's shift of one tensor after DARE, from `cache` where it is there."""
    if cache is not None and source in cache:
        return cache[source]
    kept = dare.drop(deltas[source.expert], drop_rate=source.drop_rate, rescale=source.rescale, seed=source.seed,
                     model=source.expert, tensor=name)
    if cache is not None:
        cache[source] = kept
    return kept


def sources_of(recipe: Recipe, experts: Sequence[str]) -> list[Source]:
    """The experts of a recipe, each with its own DARE setting."""
    if "drop_rate" not in recipe.parameters:
        return [Source(expert, 0.0, "none", 0) for expert in experts]
    rates = recipe.each("drop_rate", len(experts))
    return [Source(expert, rate, recipe.parameters["drop_rescale"], recipe.seed)
            for expert, rate in zip(experts, rates, strict=True)]


def check_recipes(recipes: Sequence[Recipe], experts: Mapping) -> None:
    """ValueError for no experts, unknown or repeated ones, lists of the wrong length, weights that cancel."""
    if not experts:
        raise ValueError("no experts to merge: name at least one")
    for recipe in recipes:
        names = recipe.experts or tuple(experts)
        for name in names:
            known(name, experts, "expert")
        if len(set(names)) < len(names):
            raise ValueError(f"an expert is named twice in {', '.join(names)}: give it one entry and a weight")
        for name in ("weight", "density", "drop_rate"):
            if name in recipe.parameters:
                recipe.each(name, len(names))
        if recipe.parameters.get("normalize") and sum(recipe.each("weight", len(names))) == 0:
            raise ValueError("the weights add up to 0 and normalize divides by their sum: change a weight")


def check_shapes(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """ValueError unless every expert has the base's tensor names and shapes; reads no weights of a Checkpoint."""
    shapes = shapes_of(base)
    for expert, tensors in experts.items():
        theirs = shapes_of(tensors)
        for names, words in ((shapes.keys() - theirs.keys(), "lacks {}, which the base has"),
                             (theirs.keys() - shapes.keys(), "has {}, which the base lacks")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise ValueError(f"{expert} {words.format(min(names) + more)}: merge models of one architecture only")
        for name in sorted(shapes):
            if shapes[name] != theirs[name]:
                raise ValueError(f"{expert}: {name} has shape {theirs[name]} and the base {shapes[name]}: "
                                 "merge models of one size and one vocabulary only")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, from the files' headers where it is a Checkpoint."""
    if hasattr(tensors, "meta"):
        return {name: shape for name, (_, shape) in tensors.meta.items()}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def finite(tensor: Tensor, model: str, name: str) -> Tensor:
    """The tensor itself; ValueError with the counts where it holds NaN or Inf."""
    if not torch.isfinite(tensor).all():
        nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        raise ValueError(f"{model}: {name} holds {nan} NaN and {inf} Inf of {tensor.numel()} values: nothing to merge")
    return tensor


def dtype_of(recipe: Recipe, base: torch.dtype) -> torch.dtype:
    """The type a recipe writes: its own, or the base's."""
    return getattr(torch, recipe.out_dtype) if recipe.out_dtype else base
