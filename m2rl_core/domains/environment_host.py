"""Processes that environments live in and that can be killed; see `environments`.

Each of `HOSTS` processes takes one step at a time, so that as many steps run at once and no more wait inside of it.
"""
from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from m2rl_core.domains import Row
from m2rl_core.domains.worker import START_LIMIT, Worker, loaded
from m2rl_core.errors import StudyError, one_line

HOSTS = max(1, min(16, (os.cpu_count() or 1) - 1))  # one core is for what samples

_gone: dict[int, list[int]] = defaultdict(list)  # lane -> episodes that nobody asks any more
_hosts: dict[int, Host] = {}
_locks = [threading.Lock() for _ in range(16)]


class Failed(Exception):
    """A step that gave no reply; says why, in one line."""


class Host:
    """One process of environments: which modules it has loaded, and which episodes it has."""

    def __init__(self, lane: int):
        self.lane, self.process, self.loaded, self.episodes = lane, Worker(__name__), set(), set()

    def load(self, home: str) -> None:
        """StudyError where it takes too long."""
        if home in self.loaded:
            return
        try:
            self.ask((home, None, None, None, START_LIMIT), START_LIMIT)
        except TimeoutError:
            raise StudyError(f"the environments of {home} were not loaded within {START_LIMIT:g} s") from None
        self.loaded.add(home)

    def ask(self, request: tuple, seconds: float):
        """The reply to one request; TimeoutError, EOFError or ConnectionError where none comes."""
        forgotten = [_gone[self.lane].pop() for _ in range(len(_gone[self.lane]))]
        self.episodes.difference_update(forgotten)
        self.process.line.send((forgotten, *request))
        reply = self.process.receive(seconds)
        if isinstance(reply, Exception):
            raise reply
        return reply


@contextlib.contextmanager
def host(lane: int) -> Iterator[Host]:
    """The process of a lane, or a new one where it was ended or belongs to the process that this one was forked from.

    It is kept only where nothing but `Failed` is raised inside: late replies must not be read as the next ones.
    """
    with _locks[lane]:
        one = _hosts.pop(lane, None)
        if one is None or one.process.owner != os.getpid():
            one = Host(lane)
        try:
            yield one
        except Failed:
            _hosts[lane] = one
            raise
        except BaseException:
            one.process.end()
            raise
        _hosts[lane] = one


def forget(lane: int, number: int) -> None:
    """Let the process of a lane drop an episode, with the next step that it is asked for."""
    _gone[lane].append(number)


def made(make: Callable, row: Row):
    """A fresh episode; `Failed` for all that is raised but StudyError and ImportError."""
    with _failing():
        return make(row)


def replies(environment, answer: str) -> list[str] | None:
    """What `step` gives, made sound; `Failed` for all that it raises but StudyError and ImportError, and for no replies."""
    if environment is None:  # nobody replies to this row
        return None
    with _failing():
        found = environment.step(answer)
        if isinstance(found, str):
            raise Failed(one_line(f"environment replied {found!r}, which is one text and no list of texts"))
        found = None if found is None else list(found)
    if found is not None and not all(isinstance(text, str) for text in found):
        raise Failed(one_line(f"environment replied {found!r}, which is no list of texts"))
    return found


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except (Failed, StudyError, ImportError):
        raise
    except Exception as error:  # whatever an environment of one's own raises, it must not cost the step
        raise Failed(one_line(f"environment failed: {type(error).__name__}: {error}")) from None


# --- inside


def serve(line: Connection) -> None:
    """Answers (gone, module, number, row, answer, seconds): loads the module, makes an episode of the row, or takes a step."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    episodes: dict[int, object] = {}
    while True:
        forgotten, home, number, row, answer, seconds = line.recv()
        for old in forgotten:
            episodes.pop(old, None)
        signal.alarm(math.ceil(2 * seconds))  # the owner kills after `seconds`; without one the kernel does
        try:
            make, reply = loaded(home).environment, None
            if row is not None:
                episodes[number] = made(make, row)
            elif number is not None:
                reply = replies(episodes[number], answer)
        except (Failed, StudyError, ImportError) as error:
            reply = error
        line.send(reply)
        signal.alarm(0)


if __name__ == "__main__":
    from m2rl_core.domains import environment_host  # under its own name, by which the owner knows what it sends
    with contextlib.suppress(EOFError, ConnectionError):  # the owner is gone
        environment_host.serve(Connection(int(sys.argv[1])))
