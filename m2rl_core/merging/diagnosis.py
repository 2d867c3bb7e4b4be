"""What a user should know about a merge: how much was changed, in conflict, trimmed and lost to rounding.

Counted piece by piece, beside the merge: `count` in any thread, `add` in the order of pieces.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m2rl_core.kernel import kernel
from m2rl_core.merging.few import BLOCK
from m2rl_core.merging.pieces import Piece
from m2rl_core.merging.shifts import Shifts
from m2rl_core.merging.stored import DTYPES, narrow

MERGEKIT_SCE_LIMIT = 1e-6  # below it mergekit's SCE gives every expert the same weight, without a word


class NotFinite(Exception):
    """An input holds NaN or Inf; the argument is the tensor's name."""


class Survey:
    """Counts over the experts' shifts before any method touches them; shared by all recipes of a run."""

    def __init__(self, experts: Sequence[str]):
        self.experts, self.changed_in = list(experts), {}  # {tensor: {expert: how many shifts are not 0}}
        self.values = self.shared = self.conflicts = 0

    def count(self, shifts: Shifts) -> tuple:
        """Raises NotFinite."""
        *found, finite = shifts.survey()
        if not finite:
            raise NotFinite(shifts.piece.name)
        return tuple(found)

    def add(self, piece: Piece, result: tuple) -> None:
        changed, shared, conflicts = result
        here = self.changed_in.setdefault(piece.name, dict.fromkeys(self.experts, 0))
        for expert, more in zip(self.experts, changed, strict=True):
            here[expert] += more
        self.values += piece.count
        self.shared += shared
        self.conflicts += conflicts

    def settled(self) -> bool:
        return True

    def changed(self) -> dict[str, int]:
        """How many shifts of each expert are not 0."""
        return {expert: sum(here[expert] for here in self.changed_in.values()) for expert in self.experts}

    def unchanged(self) -> list[str]:
        return [expert for expert, n in self.changed().items() if n == 0]

    def result(self) -> dict:
        """Shares in [0, 1]: weights that each expert changed; of those that two or more changed, signs in conflict."""
        return {
            "weights": self.values,
            "changed": {expert: _share(n, self.values) for expert, n in self.changed().items()},
            "sign_conflict": _share(self.conflicts, self.shared),
        }


class Tally:
    """Counts over one recipe's pieces: what reached the merge, and what of the result the output type holds."""

    def __init__(self, experts: Sequence[str]):
        self.kept = dict.fromkeys(experts, 0)
        self.values = self.moved = self.lost = 0
        self.change = self.error = 0.0

    def add(self, piece: Piece, kept: Sequence[int], result: tuple[int, int, float, float]) -> None:
        for expert, more in zip(self.kept, kept, strict=True):
            self.keep(expert, more)
        moved, lost, change, error = result
        self.values += piece.count
        self.moved += moved
        self.lost += lost
        self.change += change
        self.error += error

    def keep(self, expert: str, more: int) -> None:
        self.kept[expert] += more

    def result(self) -> dict:
        """density: share of weights each expert still moves; lost: of the weights the merge moves, those that rounding
        puts back; rounding: the sum of absolute rounding errors over the sum of absolute changes."""
        return {
            "density": {expert: _share(n, self.values) for expert, n in self.kept.items()},
            "moved": _share(self.moved, self.values),
            "lost": _share(self.lost, self.moved),
            "rounding": self.error / self.change if self.change else 0.0,
        }


def rounded(base: np.ndarray, shift: np.ndarray, wide: np.ndarray | None, code: str) -> tuple[np.ndarray, tuple]:
    """(base + shift, or `wide` where that is given, in the output type; what `Tally.add` takes); float32 (P,).

    The last number, the rounding error, is NaN or Inf where the output holds one.
    """
    sums = np.zeros(4)
    if code == "BF16":
        out = np.empty(len(base), DTYPES[code])
        _round(base, shift, base if wide is None else wide, wide is None, out, sums)
    else:
        out = narrow(base + shift if wide is None else wide, code)
        _compare(base, shift, out.astype(np.float32), narrow(base, code).astype(np.float32), sums)
    return out, (int(sums[0]), int(sums[1]), float(sums[2]), float(sums[3]))


@kernel
def bfloat16(x):
    """The bits of the bfloat16 nearest to a float32, of two the even one."""
    bits = np.float32(x).view(np.uint32)
    if x != x:
        return np.uint32(0x7FC0)
    even = (bits >> np.uint32(16)) & np.uint32(1)  # numba's sums of uint32 are uint64
    return np.uint32(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


@kernel
def _round(base, shift, wide, add, out, sums):
    """out := base + shift (or wide) as bfloat16, uint16 (P,); sums as in `_compare`."""
    lanes = np.zeros(2 * BLOCK, np.float32)  # sums side by side, as a float sum keeps its order; in one array, which
    for first in range(0, len(base), BLOCK):  # spares the loop the test that its arrays are apart
        here, shifts = base[first : first + BLOCK], shift[first : first + BLOCK]
        given, bits = wide[first : first + BLOCK], out[first : first + BLOCK]
        moved = lost = np.int32(0)
        for i in range(len(here)):
            x = bfloat16(here[i] + shifts[i] if add else given[i])
            bits[i] = x
            moved = np.int32(moved + (shifts[i] != 0))
            lost = np.int32(lost + ((shifts[i] != 0) & (x == bfloat16(here[i]))))
            lanes[i] += abs(shifts[i])
            lanes[BLOCK + i] += abs(np.uint32(x << np.uint32(16)).view(np.float32) - here[i] - shifts[i])
        sums[0] += moved
        sums[1] += lost
    _collect(lanes, sums)


@kernel
def _compare(base, shift, back, held, sums):
    """sums := weights moved, of these put back by rounding, sum of |shift|, sum of |rounding error|.

    back, held: the merged weights and the base as the output type has them, in float32 again; all (P,).
    """
    lanes = np.zeros(2 * BLOCK, np.float32)
    for first in range(0, len(base), BLOCK):
        here, shifts = base[first : first + BLOCK], shift[first : first + BLOCK]
        merged, before = back[first : first + BLOCK], held[first : first + BLOCK]
        moved = lost = np.int32(0)
        for i in range(len(here)):
            moved = np.int32(moved + (shifts[i] != 0))
            lost = np.int32(lost + ((shifts[i] != 0) & (merged[i] == before[i])))
            lanes[i] += abs(shifts[i])
            lanes[BLOCK + i] += abs(merged[i] - here[i] - shifts[i])
        sums[0] += moved
        sums[1] += lost
    _collect(lanes, sums)


@kernel
def _collect(lanes, sums):
    for i in range(BLOCK):
        sums[2] += lanes[i]
        sums[3] += lanes[BLOCK + i]


def warnings(unchanged: Sequence[str], result: dict, squares: Sequence[Sequence[float]]) -> list[str]:
    """One sentence for each thing that a user should look at before using the merge.

    squares: the experts' mean squares of each tensor; empty for all methods but SCE.
    """
    found = [f"{expert} is identical to the base: it adds nothing" for expert in unchanged]
    if result["lost"] > 0.2:
        found.append(f"rounding to the output type undoes the merge in {result['lost']:.0%} of the weights it moves: "
                     "write float32 to see whether that matters")
    faint = sum(sum(each) < MERGEKIT_SCE_LIMIT for each in squares)
    if faint:
        found.append(f"in {faint} of {len(squares)} tensors the experts' mean squares add up to less than "
                     f"{MERGEKIT_SCE_LIMIT:g}: there mergekit's SCE gives all experts one weight")
    return found


def _share(n: int, total: int) -> float:
    return n / total if total else 0.0
