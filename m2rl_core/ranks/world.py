"""The connection of several processes ("ranks") that train one model: who is who, and what is said when one is lost.

`accelerate launch` or torchrun start them and tell each its place by environment variables. Torch says only that a
connection broke or that a call took too long; which rank has ended, or stays away, is told by how far each has come,
kept in torch's own store. Nothing here imports torch before it is needed.
"""
from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache

from m2rl_core.errors import StudyError

PATIENCE = 1800.0  # seconds in which every rank must come to the same point; the environment's M2RL_RANK_TIMEOUT
ROLL_CALL = 3.0  # seconds in which a rank that is alive notices that another is not
GRACE = 6.0  # seconds between the launcher's SIGTERM and the end; torchrun would wait 30
WIRE = "(?i)gloo|nccl|connection|process ?group|c10d"  # words of torch's errors for a peer that is gone or silent
_alone = [False]
_stopped = threading.Event()


class RankLost(StudyError):
    """Another rank has ended or does not answer; the message names it."""


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


class World:
    """The connection to the other ranks: `control` for small things on the CPU, the default group for tensors."""

    def __init__(self):
        import torch
        import torch.distributed as dist
        from datetime import timedelta
        self.seconds = float(os.environ.get("M2RL_RANK_TIMEOUT", PATIENCE))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            if torch.cuda.device_count() < here():
                raise StudyError(f"{here()} processes on {socket.gethostname()}, a GPU each, and they see "
                                 f"{torch.cuda.device_count()} GPUs: start as many as that")
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
def connection() -> World:
    return World()


def control():
    """The group of all ranks for what lies on the CPU; None where there is one process."""
    return connection().control if launched() else None


def device():
    """Where this rank computes."""
    return connection().device


def together(work: Callable):
    """`work(torch.distributed, world)`, which every rank runs at this point; RankLost where one has not come."""
    import torch.distributed as dist
    world = connection()
    beat()
    try:
        return work(dist, world)
    except RuntimeError as error:  # torch says in many ways that a peer closed the connection or did not answer
        raise lost(world, error) from error


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, a call to the other ranks that torch makes by itself (FSDP gathers weights) and that fails is RankLost, too."""
    try:
        yield
    except RuntimeError as error:
        if launched() and re.search(WIRE, str(error)):
            raise lost(connection(), error) from error
        raise


def beat() -> None:
    """Tell the others that this rank has come one step further."""
    if launched():
        world = connection()
        go_on()
        world.beats += 1
        with contextlib.suppress(RuntimeError):  # whoever keeps the store has ended: the next call that needs it says so
            world.store.set(f"beat/{rank()}", str(world.beats))


def _on_sigterm(*_) -> None:
    """The launcher stops all ranks when one has ended: stay long enough to come to the next meeting and to say which."""
    if not _stopped.is_set():
        _stopped.set()
        timer = threading.Timer(GRACE, os._exit, (128 + signal.SIGTERM,))
        timer.daemon = True
        timer.start()


def go_on() -> None:
    """Nothing, unless the launcher has asked to stop and everybody is still there."""
    if _stopped.is_set():
        raise lost(connection(), RuntimeError("stopped by the launcher"))


def lost(world: World, error: Exception) -> RankLost:
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


def leave(code: int) -> None:
    """End this process with `code`; one that is connected ends at once, without Python's own tidying up.

    Gloo's threads drop the tensors of finished calls when they come to it. One that does so while Python ends is stopped
    inside of a destructor, which aborts the process: a rank that had done all its work would end with an error.
    """
    if connection.cache_info().currsize == 0:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tell(error: Exception) -> None:
    """Print an error as one line, once for all ranks: the first of those that are left speaks."""
    if not launched() or connection.cache_info().currsize == 0:
        if first():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return
    store, gone = connection().store, getattr(error, "gone", [])
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
