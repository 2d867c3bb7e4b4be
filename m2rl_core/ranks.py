"""One model on several processes ("ranks"): which of them this is, who does what, and how they put it together.

`accelerate launch` or torchrun start them, all with the same command, and every rank runs the same code: it does its
share of a list, and what the shares have in common is gathered, so that all go on with the same numbers. Only rank 0
keeps what is written. With one process every function here gives back what it was given. What lies on a rank, whole
or in parts, is the business of `sharded`. Nothing here imports torch before it is needed.
"""
from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

from m2rl_core.errors import StudyError

PATIENCE = 1800.0  # seconds in which every rank must come to the same point; the environment's M2RL_RANK_TIMEOUT
ROLL_CALL = 3.0  # seconds in which a rank that is alive notices that another is not
GRACE = 6.0  # seconds between the launcher's SIGTERM and the end; torchrun would wait 30
_alone = [False]


class RankLost(StudyError):
    """Another rank has ended or does not answer; the message names it."""


# Who is who -------------------------------------------------------------------------------------------------------------

def launched() -> bool:
    """Whether a launcher started this process as one of several, or as a single one that shards (FSDP)."""
    sharding = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return "RANK" in os.environ and (int(os.environ.get("WORLD_SIZE", 1)) > 1 or sharding) and not _alone[0]


def size() -> int:
    """How many processes work on this model."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ["RANK"]) if launched() else 0


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def here() -> int:
    """How many ranks share this machine, and with it the cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() else 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Rank 0 does something by itself: inside, it is the only one."""
    before, _alone[0] = _alone[0], True
    try:
        yield
    finally:
        _alone[0] = before


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
    return together(lambda dist, world: _gathered(dist, world, value))


def agree(value):
    """Rank 0's value on all ranks; the others wait for it as long as rank 0 lives."""
    if size() == 1:
        return value
    world = _world()
    world.agreed += 1
    key = f"agree/{world.agreed}"
    if first():
        world.store.set(key, pickle.dumps(value))
        return value
    try:
        while not world.store.check([key]):
            _go_on()
            time.sleep(0.05)
        return pickle.loads(world.store.get(key))
    except RuntimeError as error:
        raise _lost(world, error) from error


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


def together(work: Callable):
    """`work(torch.distributed, world)`, which every rank runs at this point; RankLost where one has not come."""
    import torch.distributed as dist
    world = _world()
    beat()
    try:
        return work(dist, world)
    except RuntimeError as error:  # torch says in many ways that a peer closed the connection or did not answer
        raise _lost(world, error) from error


def beat() -> None:
    """Tell the others that this rank has come one step further."""
    if launched():
        world = _world()
        _go_on()
        world.beats += 1
        with contextlib.suppress(RuntimeError):  # whoever keeps the store has ended: the next call that needs it says so
            world.store.set(f"beat/{rank()}", str(world.beats))


def scratch() -> Path:
    """A folder for what ranks other than the first write, which nobody reads; gone with the process."""
    folder = Path(tempfile.mkdtemp(prefix=f"m2rl-rank-{rank()}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "state").mkdir()
    return folder


# Starting, and ending when one is lost ----------------------------------------------------------------------------------

class _World:
    """The connection to the other ranks: `control` for small things on the CPU, the default group for tensors."""

    def __init__(self):
        import torch
        import torch.distributed as dist
        from datetime import timedelta
        self.seconds = float(os.environ.get("M2RL_RANK_TIMEOUT", PATIENCE))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        limit = timedelta(seconds=self.seconds)
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo", timeout=limit)
        self.control = dist.new_group(backend="gloo", timeout=limit)
        self.store = dist.PrefixStore("m2rl", dist.distributed_c10d._get_default_store())
        self.beats = self.agreed = 0
        self.store.set(f"who/{rank()}", f"process {os.getpid()} on {socket.gethostname()}")
        self.store.set(f"beat/{rank()}", "0")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _on_sigterm)


@cache
def _world() -> _World:
    return _World()


def control():
    """The group of all ranks for what lies on the CPU; None where there is one process."""
    return _world().control if launched() else None


def device():
    """Where this rank computes."""
    return _world().device


def _gathered(dist, world, value) -> list:
    found = [None] * size()
    dist.all_gather_object(found, value, group=world.control)
    return found


_stopped = threading.Event()


def _on_sigterm(*_) -> None:
    """The launcher stops all ranks when one has ended: stay long enough to come to the next meeting and to say which."""
    if not _stopped.is_set():
        _stopped.set()
        timer = threading.Timer(GRACE, os._exit, (128 + signal.SIGTERM,))
        timer.daemon = True
        timer.start()


def _go_on() -> None:
    """Nothing, unless the launcher has asked to stop and everybody is still there."""
    if _stopped.is_set():
        raise _lost(_world(), RuntimeError("stopped by the launcher"))


def _lost(world: _World, error: Exception) -> RankLost:
    """Which ranks are behind or silent, in one line."""
    others = [r for r in range(size()) if r != rank()]
    try:
        world.store.set(f"noticed/{rank()}", "")
        until = time.monotonic() + ROLL_CALL
        while True:
            beats = {r: int(world.store.get(f"beat/{r}")) for r in others}
            silent = [r for r in others if not world.store.check([f"noticed/{r}"])]
            gone = [r for r in silent if beats[r] < world.beats] or [r for r in others if world.store.check([f"why/{r}"])]
            if gone or not silent or time.monotonic() > until:
                break
            time.sleep(0.1)
        gone = gone or silent
        names = [f"rank {r} of {size()} ({world.store.get(f'who/{r}').decode()})" for r in gone]
        why = [world.store.get(f"why/{r}").decode() for r in gone if world.store.check([f"why/{r}"])]
    except RuntimeError:
        gone, names, why = [0], [f"rank 0 of {size()}, which keeps the ranks' store,"], []
    hung = "imed out" in str(error) or "imeout" in str(error)
    how = f"did not answer within {world.seconds:g} s (M2RL_RANK_TIMEOUT)" if hung and not why else "has ended"
    what = f"{' and '.join(names)} {how}" if names else f"the ranks lost each other ({str(error).splitlines()[0]})"
    found = RankLost(f"{what}{': ' + '; '.join(why) if why else ''}; all ranks stop, what was made is kept, and the same "
                     "command, with any number of processes, goes on from the last checkpoint")
    found.gone = gone
    return found


def tell(error: Exception) -> None:
    """Print an error as one line, once for all ranks: the first of those that are left speaks."""
    if not launched() or _world.cache_info().currsize == 0:
        if first():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return
    store, gone = _world().store, getattr(error, "gone", [])
    with contextlib.suppress(RuntimeError):  # nobody keeps the store any more: better two lines than none
        if not gone:
            store.set(f"why/{rank()}", str(error))
            store.set(f"noticed/{rank()}", "")
        until = time.monotonic() + (0.0 if rank() == min(set(range(size())) - set(gone)) else ROLL_CALL)
        while time.monotonic() < until and not store.check(["told"]):
            time.sleep(0.1)
        if store.add("told", 1) > 1:
            return
    print(f"error: {error}" if not rank() or gone else f"error: rank {rank()}: {error}", file=sys.stderr, flush=True)
