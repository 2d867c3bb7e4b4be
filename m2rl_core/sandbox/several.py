"""Several SandboxFusion servers as one sandbox: M2RL_SANDBOX=http://one:8080,http://two:8080.

So many programs are on their way to each server and no more: who has another one waits. One goes to the server that has
the fewest; where that one is lost, or slower than its limit, it goes to another, and to each once at most. A lost server
is asked again, by one program, after a while.
"""
from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from m2rl_core import post
from m2rl_core.errors import StudyError
from m2rl_core.sandbox import Limits, Outcome, Program
from m2rl_core.sandbox.fusion import AT_ONCE, WHO, Client

AGAIN = 30.0  # seconds after which a lost server is asked again


class _Place:
    """One server: how many programs are there, and since when and why it is taken for lost."""

    def __init__(self, endpoint: str, limits: Limits):
        self.endpoint, self.limits = endpoint.strip(), limits
        self.shown = post.shown(post.check(self.endpoint, "M2RL_SANDBOX"))
        self.client: Client | None = None
        self.busy, self.lost, self.why = 0, 0.0, ""

    def run(self, program: Program) -> Outcome:
        if self.client is None:
            self.open()
        return self.client.one(program)

    def open(self) -> None:
        """StudyError where the server is none; post.Unreachable where it is not there."""
        self.client = Client(self.endpoint, self.limits, patience=1)

    def room(self) -> bool:
        if not self.why:
            return self.busy < AT_ONCE
        return self.busy == 0 and time.monotonic() - self.lost >= AGAIN


class Several:
    """Programs run by whichever server has room; use as a context manager, or close it."""

    kind = "SandboxFusion"

    def __init__(self, endpoints: Sequence[str], limits: Limits = Limits()):
        """Asks all of them: StudyError where one is none, or none is there; one that is not there is told by a warning."""
        self.places = [_Place(endpoint, limits) for endpoint in endpoints if endpoint.strip()]
        self.limits, self._changed = limits, threading.Condition()
        with ThreadPoolExecutor(len(self.places)) as pool:
            list(pool.map(self._open, self.places))
        if all(place.why for place in self.places):
            raise self._all_lost()
        for place in self.places:
            if place.why:
                warnings.warn(f"{place.why}; the others run its programs", stacklevel=4)
        self.about = f"{WHO} at {', '.join(place.shown for place in self.places)}"
        self._pool = ThreadPoolExecutor(AT_ONCE * len(self.places), "sandbox-fusion")

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """The outcome of each program, in order; equal programs run once. StudyError where a server fails, or all are lost."""
        different = list(dict.fromkeys(programs))
        found = dict(zip(different, self._pool.map(self._one, different), strict=True))
        return [found[program] for program in programs]

    def _one(self, program: Program) -> Outcome:
        tried: list[_Place] = []
        while True:
            place, lost = self._take(tried), None
            try:
                return place.run(program)
            except post.Unreachable as error:
                lost = error
                tried.append(place)
            finally:
                self._give(place, lost)

    def _take(self, tried: list[_Place]) -> _Place:
        """A server with room that has not been tried, as soon as there is one; StudyError where all are lost."""
        with self._changed:
            while True:
                left = [place for place in self.places if place not in tried]
                if not left:
                    raise self._all_lost()
                alive = [place for place in left if not place.why]
                found = [place for place in left if place.room()]
                if not alive and not found:  # the last resort: what is taken for lost may be back
                    found = [place for place in left if place.busy < AT_ONCE]
                if found:
                    place = min(found, key=lambda place: (place.busy, self.places.index(place)))
                    place.busy += 1
                    return place
                self._changed.wait()

    def _give(self, place: _Place, lost: Exception | None) -> None:
        with self._changed:
            place.busy -= 1
            place.why, place.lost = str(lost or ""), time.monotonic()
            self._changed.notify_all()

    def _open(self, place: _Place) -> None:
        try:
            place.open()
        except post.Unreachable as error:
            place.why, place.lost = str(error), time.monotonic()

    def _all_lost(self) -> StudyError:
        why = "; ".join(f"{place.shown}: {place.why.partition(' cannot be reached ')[2] or place.why}"
                        for place in self.places)
        return StudyError(f"all {len(self.places)} servers of M2RL_SANDBOX are lost: {why}")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for place in self.places:
            if place.client is not None:
                place.client.close()

    def __enter__(self) -> Several:
        return self

    def __exit__(self, *_) -> None:
        self.close()
