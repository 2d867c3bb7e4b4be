"""NeMo-Gym's workplace assistant: an episode of real agent rows, and its reward.

The 27 tools, their five tables and the verdict are the nemo-gym wheel's (`workbench_wheel`) or a server's
(`workbench_server`): a row's "rule" asks for "wheel" or "server", and without one M2RL_WORKPLACE decides. What the model
reads is what the released code gives it: replies as text, a call that does not fit its schema answered with why, several
calls in a turn, at most six turns; a call that cannot be read ends the rollout with 0. A row whose truth changes nothing
rewards whoever changes nothing. Departures: a turn needs its `</think>`, and an open <tool_call> cannot be read.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

from m2rl_core.domains import Row, Verdict, rule_of, workbench_server
from m2rl_core.domains.workbench_calls import Episode, as_text, calls_of, read_calls, said
from m2rl_core.domains.workbench_wheel import load, run_on_fresh_tables, same_state

__all__ = ("Episode", "calls_of", "environment", "home", "idle", "load", "read_calls", "verify")

KIND = "workplace"  # truth["kind"] of its rows
RULES = ("wheel", "server")
IDLE = "right: nothing was to be changed"


def home(row: Row) -> ModuleType:
    """The module that verifies a row of the workplace: this one, or the one that asks a server."""
    served = rule_of(row, RULES) == "server" if "rule" in row.truth else workbench_server.address() is not None
    return workbench_server if served else sys.modules[__name__]


def environment(row: Row) -> Episode:
    """A fresh episode of `row`: two rollouts of one row share nothing. It must run where it can be killed."""
    return Episode(row, run_on_fresh_tables(said))


def verify(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Verdict]:
    """1 where the calls of all turns leave the five tables as those of the truth do; otherwise 0 and why."""
    return [_verdict(row, turns) for row, turns in zip(rows, answers, strict=True)]


def _verdict(row: Row, answers: Sequence[str]) -> Verdict:
    calls, fault = calls_of(row, answers)
    if fault:
        return Verdict(0.0, fault)
    if not same_state(as_text(calls), as_text(row.truth["calls"])):
        return Verdict(0.0, "wrong final state" if calls else "no call")
    return Verdict(1.0, IDLE if idle(row) else "right")


def idle(row: Row) -> bool:
    """Whether a row's truth leaves the tables as they are, so that an answer without a call is right."""
    return same_state([], as_text(row.truth["calls"]))
