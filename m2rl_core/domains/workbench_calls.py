"""Calls of the workplace assistant's tools: how an answer's are read, what the model is told, when an episode is over."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

from m2rl_core.domains import Row
from m2rl_core.domains.tool_calls import CALL

MAX_TURNS = 6  # as in the released code


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
