"""Streams pieces of tensors through any number of recipes: what they share is read and computed once.

A pass reads pieces in threads and hands each to counters. Global cuts (TIES) take one pass over everything, the
majority sign of zero votes another, the merge itself the last; what only concerns one tensor is gathered just before
its pieces are needed, while its bytes are still in the page cache. In memory: a few pieces for each thread.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from m2rl_core.merging.blend import Blend, Put
from m2rl_core.merging.checkpoint import Digest, checksum
from m2rl_core.merging.checks import check_recipes, check_shapes
from m2rl_core.merging.diagnosis import NotFinite, Survey, Tally, warnings
from m2rl_core.merging.pieces import Piece, grid, groups, sample
from m2rl_core.merging.pool import Pool
from m2rl_core.merging.reader import Reader
from m2rl_core.merging.recipe import Recipe
from m2rl_core.merging.shifts import BASE, Shifts
from m2rl_core.merging.statistics import STEPS, Needs, selection_of, survivors


class Merger:
    """Merges a model by any number of recipes; `diagnoses` is filled at the end.

    base, experts[name]: a `Checkpoint`, entered, or a `states.State`. ValueError, naming model, tensor and count, for names
    or shapes that differ, NaN or Inf and, unless `allow_identical`, an expert with the base's very weights.
    `report(what, done, total)` is called as tensors are done. With `digest`, `digests` has one for each model, made
    on the way. `threads` 0: one a core, as far as memory goes.
    """

    def __init__(
        self, base, experts: Mapping, recipes: Sequence[Recipe], *, allow_identical: bool = False,
        report: Callable[[str, int, int], None] | None = None, threads: int = 0, digest: bool = False,
    ):
        check_recipes(recipes, experts)
        check_shapes(base, experts)
        self.recipes, self.allow_identical = list(recipes), allow_identical
        self.report = report or (lambda what, done, total: None)
        self.threads = threads
        self.reader, self.known = Reader(base, experts), {}
        self.names = [list(recipe.experts or experts) for recipe in self.recipes]
        self.needs = Needs(self.recipes, tuple(experts), self.reader.sizes, self.known)
        self.survey, self._seen = Survey(list(experts)), set()
        models = [BASE, *(("expert", expert) for expert in experts)]
        self.digests = {model: Digest() for model in models} if digest else {}
        self.tallies = [Tally(names) for names in self.names]
        self.diagnoses: list[dict] = []

    def merge(self, begin: Callable[[Sequence[str]], None], put: Put) -> Iterator[str]:
        """The names, each when `put` has had all its pieces; before that, begin(names) is called.

        A tensor of size 0 in `reader.sizes` is left to the caller.
        """
        blend = Blend(self.recipes, self.needs.inputs, self.known, self.tallies,
                      {name: code for name, (code, _) in self.reader.meta.items()}, put)
        with Pool(self.threads or self.reader.threads()) as self.pool:
            self._find_global()
            done = 0
            for group in groups(self.reader.sizes):
                begin(group)
                self._find(group)
                self._pass(group, lambda name: [blend])
                yield from group
                done += len(group)
                self.report("merge", done, len(self.reader.sizes))
            self._refuse_identical()
        for r, (recipe, tally) in enumerate(zip(self.recipes, self.tallies, strict=True)):
            for want in self.needs.inputs[r]:
                tally.keep(getattr(want, "source", want).expert, survivors(
                    want, self.reader.sizes, self.known, self.survey.changed_in))
            diagnosis = self.survey.result() | tally.result()
            squares = []
            if recipe.method == "sce":
                selection = selection_of(recipe, self.names[r])
                squares = [self.known["squares", selection, name] for name, n in self.reader.sizes.items() if n]
            unchanged = [name for name in self.survey.unchanged() if name in self.names[r]]
            self.diagnoses.append(diagnosis | {"warnings": warnings(unchanged, diagnosis, squares)})

    def _pass(self, names: Sequence[str], counters: Callable[[str], list]) -> None:
        """Reads all pieces of `names` once and hands each to the counters of its tensor."""
        plan = {name: self._firsts(name) + counters(name) for name in names}
        self._read([piece for name in names for piece in grid(name, self.reader.sizes[name])], plan)
        self._seen.update(names)

    def _firsts(self, name: str) -> list:
        """What is counted the first time that a tensor is read."""
        return [] if name in self._seen else [self.survey, *(
            DigestCounter(i, digest) for i, digest in enumerate(self.digests.values()))]

    def _read(self, pieces: Sequence[Piece], plan: Mapping[str, list]) -> None:
        def work(piece: Piece) -> list:
            shifts = self.reader.load(piece, self.known)
            return [counter.count(shifts) for counter in plan[piece.name]]
        try:
            for piece, results in zip(pieces, self.pool.map(work, pieces), strict=True):
                for counter, result in zip(plan[piece.name], results, strict=True):
                    counter.add(piece, result)
        except NotFinite as error:
            self.reader.refuse_nonfinite(str(error))

    def _find(self, names: Sequence[str], steps: int = STEPS) -> None:
        """Gathers what is needed of each of these tensors."""
        names = [name for name in names if self.reader.sizes[name]]
        for step in range(steps):
            left = {name: self.needs.of_tensor(name, step) for name in names}
            self._guess({name: [s for s in found if hasattr(s, "search")] for name, found in left.items()})
            while any(left.values()):
                self._pass([name for name in names if left[name]], left.__getitem__)
                left = {name: [s for s in found if not s.settled()] for name, found in left.items()}

    def _guess(self, orders: Mapping[str, list]) -> None:
        """Tells searches where to look, by a sample of each one's tensor."""
        orders = {name: found for name, found in orders.items() if found}
        samples = {name: sample({name: self.reader.sizes[name]}) for name in orders}
        takers = {name: [Taker(order) for order in found] for name, found in orders.items()}
        self._read([piece for pieces, _ in samples.values() for piece in pieces], takers)
        for name, found in takers.items():
            for taker in found:
                taker.guess(samples[name][1])

    def _find_global(self) -> None:
        """The cuts and signs that concern all tensors; ValueError for an expert identical to the base, if known."""
        names = groups(self.reader.sizes)
        orders, every = self.needs.of_all(), sorted(name for name, size in self.reader.sizes.items() if size)
        if orders:
            for group in names if self.needs.dropped else ():
                self._find(group, 1)
            pieces, everything = sample({name: self.reader.sizes[name] for name in every})
            takers = [Taker(order) for order in orders]
            self._read(pieces, dict.fromkeys(every, takers))
            for taker in takers:
                taker.guess(everything)
        while orders:
            self._global_pass("find thresholds", orders, steps=0)
            orders = [order for order in orders if not order.settled()]
        if self.needs.balances:
            self._global_pass("count signs", self.needs.balances, steps=STEPS)
            for balance in self.needs.balances:
                balance.settled()

    def _global_pass(self, what: str, counters: list, steps: int) -> None:
        """One pass over all tensors, which also gathers what is needed of each and asks for no other."""
        done = 0
        for group in groups(self.reader.sizes):
            self._find(group, steps)
            rides = {name: self.needs.of_tensor(name, 0) if self.reader.sizes[name] else [] for name in group}
            self._pass(group, lambda name, rides=rides: counters + rides[name])
            for found in rides.values():
                for statistic in found:
                    statistic.settled()
            done += len(group)
            self.report(what, done, len(self.reader.sizes))
        self._refuse_identical()

    def _refuse_identical(self) -> None:
        if not self.allow_identical and self.survey.unchanged():
            raise ValueError(f"{self.survey.unchanged()[0]} is identical to the base, so nothing comes from it: "
                             "check its path, or pass --allow-identical")


class DigestCounter:
    """Digests one model on the way."""

    def __init__(self, index: int, digest: Digest):
        self.index, self.digest = index, digest

    def count(self, shifts: Shifts) -> int:
        return checksum(shifts.raw[self.index])

    def add(self, piece: Piece, result: int) -> None:
        self.digest.add(piece.name, result)


class Taker:
    """Takes a sample for a search."""

    def __init__(self, order):
        self.order, self.parts = order, []

    def count(self, shifts: Shifts) -> np.ndarray:
        return np.abs(shifts.values(self.order.row(shifts)))

    def add(self, piece: Piece, result: np.ndarray) -> None:
        self.parts.append(result)

    def guess(self, everything: bool) -> None:
        self.order.search.guess(np.concatenate(self.parts), everything)
