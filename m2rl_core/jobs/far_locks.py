"""Who makes a stage, at the store's address: so that two machines that share nothing else do not make the same one at once.

As in `locks`: who wants a stage puts its mark there first and looks at the others then, so of two that come at once at
least one sees the other and steps back. A mark is a small file whose name says who; it is written again and again, and
one that was not for a minute, on the address's own clock, is a lost machine's.
"""
from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator

from m2rl_core.jobs import locks
from m2rl_core.jobs.address import Address, RemoteError
from m2rl_core.jobs.locks import LockLost, Mark

FOLDER = ".lock"
BEAT = 10.0  # seconds between two writings of a mark


class FarLease:
    """A stage that is held at the address, and here as `near`. `check` raises LockLost where it no longer is."""

    def __init__(self, at: Address, mark: Mark, near: locks.Lease | None):
        self.at, self.mark, self.near = at, mark, near
        self._lost, self._over = False, threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._over.wait(min(BEAT, locks.LOST / 4)):
            with contextlib.suppress(RemoteError):  # an address that does not answer now may answer the next time
                if self.mark.name not in self.at.names(FOLDER):
                    self._lost = True
                    return
                self.at.write(f"{FOLDER}/{self.mark.name}", b".")

    def check(self) -> None:
        if self.near is not None:
            self.near.check()
        if self._lost:
            raise LockLost(f"{self.mark.stage}: {self.mark.host} was not heard of at {self.at.shown} for {locks.LOST:.0f} "
                           "seconds, so another machine took over; it goes on there")

    def end(self) -> None:
        self._over.set()
        with contextlib.suppress(RemoteError):  # it is void in a minute
            self.at.remove(f"{FOLDER}/{self.mark.name}")


@contextlib.contextmanager
def hold(at: Address, near: contextlib.AbstractContextManager, stage: str, say: Callable[[str], None]) -> Iterator[FarLease]:
    """Hold a stage at the address and, by `near`, on this machine. Who must wait says for whom."""
    with near as lease:
        mark, told = Mark.own("far", stage, False), -locks.NOTICE
        path = f"{FOLDER}/{mark.name}"
        while True:
            at.write(path, b".")
            other = _other(at, mark)
            if other is None:
                break
            at.remove(path)
            if time.monotonic() - told >= locks.NOTICE:
                told = time.monotonic()
                say(f"waiting: process {other.pid} on {other.host} works on {stage} (its mark is at {at.shown}/{FOLDER})")
            time.sleep(0.5 + random.random())
        held = FarLease(at, mark, lease)
        try:
            yield held
        finally:
            held.end()


def _other(at: Address, mine: Mark) -> Mark | None:
    """Somebody else who makes the stage; marks of those that are lost are removed."""
    for name in at.names(FOLDER):
        mark = Mark.read(name)
        if mark is None or mark == mine or mark.stage != mine.stage:
            continue
        if _lives(at, mark, mine):
            return mark
        at.remove(f"{FOLDER}/{name}")
    return None


def _lives(at: Address, mark: Mark, mine: Mark) -> bool:
    if mark.machine == mine.machine:
        return locks.born(mark.pid) == mark.born
    try:
        theirs, ours = at.touched(f"{FOLDER}/{mark.name}"), at.touched(f"{FOLDER}/{mine.name}")
    except FileNotFoundError:
        return False
    return theirs is None or ours is None or ours - theirs < locks.LOST
