"""Environments that reply to a rollout, each step within a time limit: what breaks or hangs costs its own rollout.

A module that verifies rows, or a file of one's own, may have `environment(row)`, an object whose `step(answer)` takes the
text after `</think>` and gives the tools' replies, a list of texts (UserSays: the user's words), or None where the
episode is over. Such objects live in processes that can be killed (`environment_host`); where one has been, the others'
answers are played again in a new one. A module whose environments cannot hang says so by `steps_here(row)`; one whose
steps may take longer than LIMIT sets STEP_SECONDS. With M2RL_ENVIRONMENTS they live on other machines (`far_environments`).
"""
from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from m2rl_core.domains import MODULES, OWN, Row, Verdict, environment_host, home_of
from m2rl_core.domains.environment_host import Failed, Host, host, made, replies
from m2rl_core.errors import StudyError

if TYPE_CHECKING:
    from m2rl_core.domains.far_environments import Far, Lane

LIMIT = 10.0  # seconds of wall time for a step, as the released code allows a tool
PLAYED_OTHER = "environment lost with its process; played again, it replied something else"

_numbers = itertools.count()


def open_environment(row: Row) -> Here | Hosted | Far | None:
    """A fresh episode of `row`, whose `step` raises nothing that is the row's own fault; None where nobody replies."""
    if row.domain not in MODULES and row.domain not in OWN:  # a judge's question belongs to no domain
        return None
    home = home_of(row)
    if not hasattr(home, "environment"):
        return None
    if getattr(home, "steps_here", lambda _: False)(row):
        return Here(home.environment, row)
    if os.environ.get("M2RL_ENVIRONMENTS"):
        from m2rl_core.domains.far_environments import Far
        return Far(home.__name__, row, getattr(home, "STEP_SECONDS", LIMIT))
    return Hosted(home.__name__, row, getattr(home, "STEP_SECONDS", LIMIT))


def step_all(environments: Sequence[Here | Hosted | Far], answers: Sequence[str]) -> list[list[str] | None]:
    """One step of each, in order; those that live in different processes at the same time."""
    lanes: dict[int | Lane, list[int]] = {}
    for i, environment in enumerate(environments):
        lanes.setdefault(environment.lane, []).append(i)
    found: list[list[str] | None] = [None] * len(environments)

    def work(indices: list[int]) -> None:
        for i in indices:
            found[i] = environments[i].step(answers[i])

    if len(lanes) < 2:
        work(list(range(len(environments))))
    else:
        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(work, lanes.values()))
    return found


def verdicts(rollouts: Sequence, rewards: Callable) -> list[Verdict]:
    """`rewards(rows, transcripts)` of rollouts; one whose environment failed scores 0, marked, and no verifier sees it."""
    whole = [r for r in rollouts if not r.failed]
    found = iter(rewards([r.row for r in whole], [r.turns for r in whole]))
    return [Verdict(0.0, r.failed, failed=True) if r.failed else next(found) for r in rollouts]


class Here:
    """An environment of this process; `failed` says why the last step gave nothing ("" where the episode is over)."""

    lane = -1

    def __init__(self, make: Callable, row: Row):
        self.make, self.row, self.environment, self.failed = make, row, None, ""

    def step(self, answer: str) -> list[str] | None:
        """The replies, or None. Raises StudyError and ImportError, which say that it cannot work here at all."""
        try:
            if self.environment is None:
                self.environment = made(self.make, self.row)
            return replies(self.environment, answer)
        except Failed as failure:
            self.failed = str(failure)
        return None


class Hosted:
    """An environment of a process that can be killed, made when it is first asked; otherwise as `Here`."""

    def __init__(self, home: str, row: Row, seconds: float):
        self.home, self.row, self.seconds, self.failed = home, row, seconds, ""
        self.number = next(_numbers)
        self.lane = self.number % environment_host.HOSTS
        self.past: list[tuple[str, list[str] | None]] = []  # answers and replies, to make it again
        weakref.finalize(self, environment_host.forget, self.lane, self.number)

    def step(self, answer: str) -> list[str] | None:
        """As `Here.step`; StudyError also where its module does not load."""
        try:
            found = self._asked(answer)
        except Failed as failure:
            self.failed = str(failure)
            return None
        self.past.append((answer, found))
        return found

    def _asked(self, answer: str) -> list[str] | None:
        for last in (False, True):
            try:
                with host(self.lane) as process:
                    process.load(self.home)
                    if self.number not in process.episodes:
                        self._make_again(process)
                    return self._ask(process, answer)
            except TimeoutError:
                raise Failed(f"environment killed after {self.seconds:g} s") from None
            except (EOFError, ConnectionError):  # it may have been somebody else who killed it: once more, in a new one
                if last and self.home not in process.loaded:
                    raise StudyError(f"the environments of {self.home} end their process while they are loaded; "
                                     "its own message stands above") from None
                if last:
                    raise Failed("environment died") from None

    def _make_again(self, process: Host) -> None:
        """Make it in a new process, and bring it to where it was; `Failed` where it then says other things."""
        process.episodes.add(self.number)
        process.ask((self.home, self.number, self.row, None, self.seconds), self.seconds)
        for answer, replied in self.past:
            if self._ask(process, answer) != replied:
                raise Failed(PLAYED_OTHER)

    def _ask(self, process: Host, answer: str) -> list[str] | None:
        return process.ask((self.home, self.number, None, answer, self.seconds), self.seconds)
