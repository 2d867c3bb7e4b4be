"""One model on several processes ("ranks"): which of them this is, who does what, and how they put it together.

`accelerate launch` or torchrun start them, all with the same command, and every rank runs the same code: it does its
share of a list, and what the shares have in common is gathered, so that all go on with the same numbers. Only rank 0
keeps what is written. With one process every function here gives back what it was given. What lies on a rank, whole
or in parts, is the business of `sharded`. Nothing here imports torch before it is needed.
"""
from __future__ import annotations

import atexit
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from m2rl_core.ranks.world import (  # noqa: F401  all that the others ask for, under one name
    RankLost, alone, beat, connection, control, device, first, go_on, here, launched, leave, lost, rank, size, tell, together,
    watched)

# Dividing the work ------------------------------------------------------------------------------------------------------

def bounds(n: int) -> tuple[int, int]:
    """This rank's part of n things in a row: as even as n allows, which may be nothing."""
    return n * rank() // size(), n * (rank() + 1) // size()


def spread(work: Callable, *lists: Sequence) -> list:
    """`work(*lists)`, a result for each entry, every rank on its part of the lists; all results, in order, on all ranks."""
    if size() == 1:
        return work(*lists)
    begin, end = bounds(len(lists[0]))
    return [found for part in gather(work(*(entries[begin:end] for entries in lists))) for found in part]


def balanced(costs: Sequence[float], n: int) -> list[list[int]]:
    """Indices of things in n shares of like cost, each in the old order: the dearest goes first, to the lightest share."""
    shares: list[list[int]] = [[] for _ in range(n)]
    filled = [0.0] * n
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = min(range(n), key=lambda r: (filled[r], r))
        shares[lightest].append(i)
        filled[lightest] += costs[i]
    return [sorted(share) for share in shares]


def share(rollouts: list) -> list:
    """The rollouts that this rank learns from: whole groups, shared out by tokens."""
    if size() == 1:
        return rollouts
    groups = [list(g) for _, g in groupby(rollouts, key=lambda r: r.prompt)]
    costs = [len(g[0].prompt) + sum(len(r.tokens) for r in g) for g in groups]
    return [r for i in balanced(costs, size())[rank()] for r in groups[i]]


def share_rows(rows: list[tuple[list[int], list[bool]]]) -> list[tuple[list[int], list[bool]]]:
    """The rows of next-token training that this rank learns from, shared out by tokens."""
    return [rows[i] for i in balanced([len(ids) for ids, _ in rows], size())[rank()]]


# Putting it together ----------------------------------------------------------------------------------------------------

def gather(value) -> list:
    """What each rank has, in the order of the ranks, on all of them."""
    if size() == 1:
        return [value]
    found = [None] * size()
    together(lambda dist, world: dist.all_gather_object(found, value, group=world.control))
    return found


def agree(value):
    """Rank 0's value on all ranks; the others wait for it as long as rank 0 lives."""
    if size() == 1:
        return value
    world = connection()
    world.agreed += 1
    key = f"agree/{world.agreed}"
    if first():
        world.store.set(key, pickle.dumps(value))
        return value
    try:
        while not world.store.check([key]):
            go_on()
            time.sleep(0.05)
        return pickle.loads(world.store.get(key))
    except RuntimeError as error:
        raise lost(world, error) from error


def total(value: float) -> float:
    """The sum over all ranks."""
    return sum(gather(value))


def mean(parts: list) -> float:
    """The mean over the numbers of all tensors of `parts`, on all ranks; not a number where there are none."""
    import torch
    if size() == 1:
        return float(torch.cat(parts).mean())
    found = gather((sum(float(x.sum()) for x in parts), sum(len(x) for x in parts)))
    count = sum(n for _, n in found)
    return sum(value for value, _ in found) / count if count else float("nan")


def joined(stats: dict[str, float], rollouts: Sequence) -> dict[str, float]:
    """What `grpo.backward` tells of each rank's rollouts, as of all: the loss is a sum, others are means over tokens."""
    if size() == 1:
        return stats
    parts = gather((stats, sum(r.length for r in rollouts)))
    tokens = sum(n for _, n in parts)
    mean_of = {name: sum(s[name] * n for s, n in parts) / tokens if tokens else stats[name] for name in stats}
    return mean_of | {"loss": sum(s["loss"] for s, _ in parts), "mismatch": max(s["mismatch"] for s, _ in parts)}


def scratch() -> Path:
    """A folder for what ranks other than the first write, which nobody reads; gone with the process."""
    folder = Path(tempfile.mkdtemp(prefix=f"m2rl-rank-{rank()}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "state").mkdir()
    return folder
