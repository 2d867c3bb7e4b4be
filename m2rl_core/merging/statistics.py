"""What a merge must know of a tensor, or of all, before it can merge a piece of it: gathered by reading the pieces.

A statistic has `count(shifts)`, which any thread may call, `add(piece, result)`, called in the order of pieces, and
`settled()`, called after a pass: it stores what was found in `known`, or says that another pass is due. Counts are
integers; sums are added in the order of pieces; so the number of threads changes no bit.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from m2rl_core.merging import sce, ties
from m2rl_core.kernel import kernel
from m2rl_core.merging.pieces import Piece
from m2rl_core.merging.recipe import Recipe
from m2rl_core.merging.shifts import Input, Selection, Shifts, Source, Trimmed, cut_key, inputs_of
from m2rl_core.merging.stored import shift
from m2rl_core.merging.threshold import Cut, Search, rank_of

RUN = 64  # values added in float32
STEPS = 3  # a statistic of one step may need those of the steps before


class L1:
    """The factor that gives a dropped or trimmed tensor its L1 norm back; 1 where a norm is below 1e-7 (mergekit)."""

    def __init__(self, want: Input, tensor: str, known: dict):
        self.want, self.tensor, self.known, self.norms = want, tensor, known, [0.0, 0.0]

    def count(self, shifts: Shifts) -> list[float]:
        if isinstance(self.want, Source):
            return shifts.norms(self.want)
        before, _ = shifts.row(self.want.source)
        (_, (after,), (cut,), _), _ = shifts.trims([self.want])
        return [l1_norm(before, shifts.base, np.float32(0)), l1_norm(after, shifts.base, cut)]

    def add(self, piece: Piece, result: list[float]) -> None:
        self.norms = [a + b for a, b in zip(self.norms, result, strict=True)]

    def settled(self) -> bool:
        before, after = self.norms
        self.known[self.want, self.tensor] = 1.0 if min(before, after) < 1e-7 else before / after
        return True


@kernel
def l1_norm(row, base, cut):
    """The sum of the magnitudes of a row's shifts that reach the cut.

    Runs of 64 are added in float32, in the order of torch, which mergekit's sums follow; these in float64.
    """
    total, lanes = 0.0, np.empty(8, np.float32)
    runs = len(row) // RUN
    x = np.zeros(RUN, np.float32)
    for r in range(runs):
        run, origin = row[r * RUN : (r + 1) * RUN], base[r * RUN : (r + 1) * RUN]
        for i in range(RUN):
            magnitude = abs(shift(run[i], origin[i]))
            x[i] = magnitude if magnitude >= cut else np.float32(0)
        for i in range(8):
            lanes[i] = (((x[i] + x[i + 32]) + (x[i + 8] + x[i + 40])) + (x[i + 16] + x[i + 48])) + (
                x[i + 24] + x[i + 56])
        here = np.float32(0)
        for lane in lanes:
            here += lane
        total += np.float64(here)
    for i in range(runs * RUN, len(row)):
        magnitude = abs(shift(row[i], base[i]))
        total += np.float64(magnitude) if magnitude >= cut else 0.0
    return total


class Order:
    """The cut of a trim (`key` a CutKey) or of SCE's selection, by a `Search` over what `row` gives."""

    def __init__(self, key, search: Search, row: Callable[[Shifts], np.ndarray], known: dict):
        self.key, self.search, self.row, self.known = key, search, row, known

    def count(self, shifts: Shifts) -> tuple:
        return self.search.count(self.row(shifts), shifts.base)

    def add(self, piece: Piece, result: tuple) -> None:
        self.search.add((piece.name, piece.index), result)

    def settled(self) -> bool:
        if self.search.settled():
            self.known[self.key] = self.search.cut
        return self.search.cut is not None


class Squares:
    """The mean square of each expert's shifts of one tensor, as SCE weighs them."""

    def __init__(self, selection: Selection, tensor: str, size: int, known: dict):
        self.selection, self.tensor, self.size, self.known = selection, tensor, size, known
        self.sums = [0.0] * len(selection.experts)

    def count(self, shifts: Shifts) -> list[float]:
        return [sce.squares(row, shifts.base) for row in shifts.selected(self.selection)]

    def add(self, piece: Piece, result: list[float]) -> None:
        self.sums = [a + b for a, b in zip(self.sums, result, strict=True)]

    def settled(self) -> bool:
        self.known["squares", self.selection, self.tensor] = [s / self.size for s in self.sums]
        return True


class Balance:
    """The sign that wins over all weights, for zero votes: 1, -1, or 0 where neither does."""

    def __init__(self, recipe: Recipe, inputs: Sequence[Input], known: dict):
        self.inputs, self.vote, self.known, self.balance = tuple(inputs), recipe.parameters["vote"], known, 0
        self.weights = recipe.each("weight", len(inputs))

    @property
    def key(self) -> tuple:
        """Recipes that differ by lambda alone share the statistic."""
        return ("majority", self.inputs, self.vote, tuple(self.weights))

    def count(self, shifts: Shifts) -> int:
        trims, _ = shifts.trims(self.inputs)
        return ties.balance(trims, self.weights, self.vote == "weighted")

    def add(self, piece: Piece, result: int) -> None:
        self.balance += result

    def settled(self) -> bool:
        self.known[self.key] = (self.balance > 0) - (self.balance < 0)
        return True


class Needs:
    """Which statistics some recipes need; makes those that are not known yet."""

    def __init__(self, recipes: Sequence[Recipe], experts: Sequence[str], sizes: Mapping[str, int], known: dict):
        self.sizes, self.known = sizes, known
        self.inputs = [inputs_of(recipe, recipe.experts or experts) for recipe in recipes]
        wanted = dict.fromkeys(want for inputs in self.inputs for want in inputs)  # each once, in order
        self.trims = [want for want in wanted if isinstance(want, Trimmed)]
        sources = [want.source if isinstance(want, Trimmed) else want for want in wanted]
        self.dropped = list(dict.fromkeys(source for source in sources if source.rescale == "l1"))
        self.selections = list(dict.fromkeys(
            selection_of(recipe, recipe.experts or experts) for recipe in recipes if recipe.method == "sce"))
        balances = [Balance(recipe, inputs, known) for recipe, inputs in zip(recipes, self.inputs, strict=True)
                    if recipe.parameters.get("zero_sign") == "majority"]
        self.balances = list({balance.key: balance for balance in balances}.values())

    def of_tensor(self, name: str, step: int) -> list:
        """The statistics of one step of one tensor; none that is known."""
        size, known = self.sizes[name], self.known
        if step == 0:
            found = [L1(want, name, known) for want in self.dropped if (want, name) not in known]
            return found + [Squares(s, name, size, known) for s in self.selections
                            if s.select == 1 and ("squares", s, name) not in known]
        if step == 1:
            found = [order for want in self.trims if want.threshold == "tensor"
                     for order in self._order(want, name, size)]
            return list({order.key: order for order in found}.values()) + [
                self._selected(s, name, size) for s in self.selections if s.select < 1 and (s, name) not in known]
        found = [L1(want, name, known) for want in self.trims if want.rescale == "l1" and (want, name) not in known]
        return found + [Squares(s, name, size, known) for s in self.selections if ("squares", s, name) not in known]

    def of_all(self) -> list[Order]:
        """The global cuts."""
        found = [order for want in self.trims if want.threshold == "global"
                 for order in self._order(want, "", sum(self.sizes.values()))]
        return list({order.key: order for order in found}.values())

    def _order(self, want: Trimmed, name: str, size: int) -> list[Order]:
        key, rank = cut_key(want, name), rank_of(size, want.density, want.ties)
        if key in self.known:
            return []
        if rank == 0:
            self.known[key] = Cut(0)  # nothing is small enough to go
            return []
        search = Search(size, rank, quota=want.ties == "exact")
        return [Order(key, search, lambda shifts: shifts.row(want.source)[0], self.known)]

    def _selected(self, selection: Selection, name: str, size: int) -> Order:
        search = Search(size, lambda zeros: sce.selected_rank(size, zeros, selection.select), quota=True)
        return Order((selection, name), search, lambda shifts: shifts.variance(selection), self.known)


def survivors(want: Input, sizes: Mapping[str, int], known: Mapping, changed: Mapping[str, Mapping[str, int]]) -> int:
    """How many shifts of an input stay, as far as no piece needs to be looked at: `Shifts.trims` counts the others.

    changed[tensor][expert]: how many of an expert's shifts are not 0, as `Survey` counts them.
    """
    source, names = getattr(want, "source", want), [name for name, size in sizes.items() if size]
    cuts = {}  # of each cut, the tensors that it concerns
    for name in names if isinstance(want, Trimmed) else ():
        cuts.setdefault(cut_key(want, name), []).append(name)
    counted = sum(known[key].survivors or 0 for key in cuts)
    whole = [name for key, group in cuts.items() if known[key].survivors is None for name in group] if cuts else names
    return counted + (0 if source.drop_rate else sum(changed[name][source.expert] for name in whole))


def selection_of(recipe: Recipe, experts: Sequence[str]) -> Selection:
    return Selection(tuple(experts), recipe.parameters["select"])


