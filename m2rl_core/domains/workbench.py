"""NeMo-Gym's workplace assistant: an episode of real agent rows, and its reward.

The 27 tools, their five tables and the verdict are the nemo-gym wheel's (`workbench_wheel`) or a server's
(`workbench_server`): a row's "rule" asks for "wheel" or "server", and without one M2RL_WORKPLACE decides. What the model
reads is what the released code gives it: replies as text, a call that does not fit its schema answered with why, several
calls in a turn, at most six turns; a call that cannot be read ends the rollout with 0. A row whose truth changes nothing
rewards whoever changes nothing. Departures: a turn needs its `</think>`, and an open <tool_call> cannot be read.
"""
from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from m2rl_core.domains import Row, Verdict, rule_of
from m2rl_core.domains.tool_calls import CALL
from m2rl_core.domains.workbench_wheel import load, run_on_fresh_tables, same_state

__all__ = ("Episode", "calls_of", "environment", "home", "idle", "load", "read_calls", "verify")

KIND = "workplace"  # truth["kind"] of its rows
RULES = ("wheel", "server")
MAX_TURNS = 6  # as in the released code
IDLE = "right: nothing was to be changed"


def home(row: Row) -> ModuleType:
    """The module that verifies a row of the workplace: this one, or the one that asks a server."""
    from m2rl_core.domains import workbench_server
    served = rule_of(row, RULES) == "server" if "rule" in row.truth else workbench_server.address() is not None
    return workbench_server if served else sys.modules[__name__]


# ---- calls


def read_calls(answer: str) -> list[dict] | None:
    """The calls of one answer, [{name, arguments}] in order; None where one cannot be read, which ends a rollout."""
    blocks = CALL.findall(answer)
    if not len(blocks) == answer.count("<tool_call>") == answer.count("</tool_call>"):
        return None
    calls = []
    for block in blocks:
        try:
            call = json.loads(block, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            return None
        calls.append({"name": call["name"], "arguments": arguments})
    return calls


def _no_constant(text: str):
    raise ValueError(f"{text} is not JSON")


def fault_of(call: dict, tools: dict[str, dict]) -> str:
    """What the released code tells the model of a call that does not fit its tool's schema; "" where it may run."""
    name, arguments = call["name"], call["arguments"]
    if name not in tools:
        return f"Model attempted to call undefined function: {name}"
    known = tools[name].get("properties", {})
    for key in arguments:
        if key not in known:
            return f"{name}() got an unexpected keyword argument '{key}'"
    for key in tools[name].get("required", ()):
        if key not in arguments:
            return f"{name}() missing required argument '{key}'"
    return ""


def schemas(row: Row) -> dict[str, dict]:
    """Tool name -> JSON schema of its arguments, of the tools that a row lists."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in row.tools}


def said(output) -> str:
    """What a tool gave, as the text that the model reads: JSON for tables and lists, other values as they print."""
    return json.dumps(_plain(output)) if isinstance(output, (dict, list)) else str(output)


def _plain(value):
    """Numbers that JSON does not know become null, as on the way through the server."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- the episode


class Episode:
    """One episode of one row; `run(call)` runs a call that fits its schema, and gives its output as text."""

    def __init__(self, row: Row, run: Callable[[dict], str]):
        self.run, self.tools = run, schemas(row)
        self.left, self.done = row.truth.get("max_turns", MAX_TURNS), False

    def step(self, answer: str) -> list[str] | None:
        """The tools' replies to one turn's text after `</think>`; None after a turn without a call, with one that cannot
        be read, or after the last turn."""
        calls = None if self.done else read_calls(answer)
        self.left -= 1
        self.done = not calls or self.left <= 0
        return None if self.done else [fault_of(call, self.tools) or self.run(call) for call in calls]


def environment(row: Row) -> Episode:
    """A fresh episode of `row`: two rollouts of one row share nothing. It must run where it can be killed."""
    return Episode(row, run_on_fresh_tables(said))


# ---- the reward


def calls_of(row: Row, answers: Sequence[str]) -> tuple[list[dict], str]:
    """All calls of a transcript, and why it is worth nothing whatever they do ("" where it may be right)."""
    calls: list[dict] = []
    over = False
    for number, answer in enumerate(answers, 1):
        if over:
            return [], "went on after the end"
        found = read_calls(answer)
        if found is None:
            return [], "a call that cannot be read"
        calls += found
        over = not found or number >= row.truth.get("max_turns", MAX_TURNS)
    return calls, ""


def as_text(calls: Sequence[dict]) -> list[dict]:
    """Calls with their arguments as JSON texts, the form that the wheel and the server take."""
    return [{"name": call["name"], "arguments": json.dumps(call["arguments"])} for call in calls]


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
