"""Environments that reply to a rollout, each step within a time limit: what breaks or hangs costs its own rollout.

A module that verifies rows, or a file of one's own, may have `environment(row)`, an object whose `step(answer)` takes the
text after `</think>` and gives the tools' replies, a list of texts (UserSays: the user's words), or None where the
episode is over. Such objects live in one process that can be killed; if it has been, the others' answers are played again
in a new one. A module whose environments cannot hang says so by `steps_here(row)`; one whose steps may take longer than
LIMIT sets STEP_SECONDS.
"""
from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from m2rl_core.domains import MODULES, OWN, Row, Verdict, home_of
from m2rl_core.domains.worker import START_LIMIT, Worker, loaded
from m2rl_core.errors import StudyError

LIMIT = 10.0  # seconds of wall time for a step, as the released code allows a tool

_lock = threading.Lock()
_numbers = itertools.count()
_gone: list[int] = []  # episodes that nobody asks any more
_current: _Host | None = None


class Failed(Exception):
    """A step that gave no reply; says why, in one line."""


def open_environment(row: Row) -> Here | Hosted | None:
    """A fresh episode of `row`, whose `step` raises nothing that is the row's own fault; None where nobody replies."""
    if row.domain not in MODULES and row.domain not in OWN:  # a judge's question belongs to no domain
        return None
    home = home_of(row)
    if not hasattr(home, "environment"):
        return None
    if getattr(home, "steps_here", lambda _: False)(row):
        return Here(home.environment, row)
    return Hosted(home.__name__, row, getattr(home, "STEP_SECONDS", LIMIT))


def verdicts(rollouts: Sequence, rewards: Callable) -> list[Verdict]:
    """`rewards(rows, transcripts)` of rollouts; one whose environment failed scores 0, marked, and no verifier sees it."""
    whole = [r for r in rollouts if not r.failed]
    found = iter(rewards([r.row for r in whole], [r.turns for r in whole]))
    return [Verdict(0.0, r.failed, failed=True) if r.failed else next(found) for r in rollouts]


class Here:
    """An environment of this process; `failed` says why the last step gave nothing ("" where the episode is over)."""

    def __init__(self, make: Callable, row: Row):
        self.make, self.row, self.environment, self.failed = make, row, None, ""

    def step(self, answer: str) -> list[str] | None:
        """The replies, or None. Raises StudyError and ImportError, which say that it cannot work here at all."""
        try:
            if self.environment is None:
                self.environment = _made(self.make, self.row)
            return _replies(self.environment, answer)
        except Failed as failure:
            self.failed = str(failure)
        return None


class Hosted:
    """An environment of the process that can be killed, made when it is first asked; otherwise as `Here`."""

    def __init__(self, home: str, row: Row, seconds: float):
        self.home, self.row, self.seconds, self.failed = home, row, seconds, ""
        self.number = next(_numbers)
        self.past: list[tuple[str, list[str] | None]] = []  # answers and replies, to make it again
        weakref.finalize(self, _gone.append, self.number)

    def step(self, answer: str) -> list[str] | None:
        """As `Here.step`; StudyError also where its module does not load."""
        with _lock:
            try:
                replies = self._asked(answer)
            except Failed as failure:
                self.failed = str(failure)
                return None
        self.past.append((answer, replies))
        return replies

    def _asked(self, answer: str) -> list[str] | None:
        for last in (False, True):
            host = _take()
            try:
                host.load(self.home)
                if self.number not in host.episodes:
                    self._make_again(host)
                replies = host.ask((self.home, self.number, None, answer, self.seconds), self.seconds)
            except TimeoutError:
                host.process.end()
                raise Failed(f"environment killed after {self.seconds:g} s") from None
            except (EOFError, ConnectionError):  # it may have been somebody else who killed it: once more, in a new one
                host.process.end()
                if last and self.home not in host.loaded:
                    raise StudyError(f"the environments of {self.home} end their process while they are loaded; "
                                     "its own message stands above") from None
                if last:
                    raise Failed("environment died") from None
            except Failed:
                _keep(host)
                raise
            except BaseException:  # an interrupt, or no environment: late replies must not be read as the next ones
                host.process.end()
                raise
            else:
                _keep(host)
                return replies

    def _make_again(self, host: _Host) -> None:
        """Make it in a new process, and bring it to where it was; `Failed` where it then says other things."""
        host.episodes.add(self.number)
        host.ask((self.home, self.number, self.row, None, self.seconds), self.seconds)
        for answer, replied in self.past:
            if host.ask((self.home, self.number, None, answer, self.seconds), self.seconds) != replied:
                raise Failed("environment lost with its process; played again, it replied something else")


class _Host:
    """The process of environments: which modules it has loaded, and which episodes it has."""

    def __init__(self):
        self.process, self.loaded, self.episodes = Worker(__name__), set(), set()

    def load(self, home: str) -> None:
        """StudyError where it takes too long, or ends the process."""
        if home in self.loaded:
            return
        try:
            self.ask((home, None, None, None, START_LIMIT), START_LIMIT)
        except TimeoutError:
            raise StudyError(f"the environments of {home} were not loaded within {START_LIMIT:g} s") from None
        self.loaded.add(home)

    def ask(self, request: tuple, seconds: float):
        """The reply to one request; TimeoutError, EOFError or ConnectionError where none comes."""
        gone = [_gone.pop() for _ in range(len(_gone))]
        self.episodes.difference_update(gone)
        self.process.line.send((gone, *request))
        reply = self.process.receive(seconds)
        if isinstance(reply, Exception):
            raise reply
        return reply


def _take() -> _Host:
    """The host of this process, or a new one; it is kept no longer until `_keep`."""
    global _current
    host, _current = _current, None
    return host if host is not None and host.process.owner == os.getpid() else _Host()


def _keep(host: _Host) -> None:
    global _current
    _current = host


def _made(make: Callable, row: Row):
    with _failing():
        return make(row)


def _replies(environment, answer: str) -> list[str] | None:
    """What `step` gives, made sound; `Failed` for all that it raises but StudyError and ImportError, and for no replies."""
    if environment is None:  # nobody replies to this row
        return None
    with _failing():
        found = environment.step(answer)
        if isinstance(found, str):
            raise Failed(_line(f"environment replied {found!r}, which is one text and no list of texts"))
        found = None if found is None else list(found)
    if found is not None and not all(isinstance(text, str) for text in found):
        raise Failed(_line(f"environment replied {found!r}, which is no list of texts"))
    return found


@contextlib.contextmanager
def _failing():
    try:
        yield
    except (Failed, StudyError, ImportError):
        raise
    except Exception as error:  # whatever an environment of one's own raises, it must not cost the step
        raise Failed(_line(f"environment failed: {type(error).__name__}: {error}")) from None


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


# --- inside


def _serve(line: Connection) -> None:
    """Answers (gone, module, number, row, answer, seconds): loads the module, makes an episode of the row, or takes a step."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    episodes: dict[int, object] = {}
    while True:
        gone, home, number, row, answer, seconds = line.recv()
        for old in gone:
            episodes.pop(old, None)
        signal.alarm(math.ceil(2 * seconds))  # the owner kills after `seconds`; without one the kernel does
        try:
            make, reply = loaded(home).environment, None
            if row is not None:
                episodes[number] = _made(make, row)
            elif number is not None:
                reply = _replies(episodes[number], answer)
        except (Failed, StudyError, ImportError) as error:
            reply = error
        line.send(reply)
        signal.alarm(0)


if __name__ == "__main__":
    from m2rl_core.domains import environments  # under its own name, by which the owner knows what it sends
    with contextlib.suppress(EOFError, ConnectionError):  # the owner is gone
        environments._serve(Connection(int(sys.argv[1])))
