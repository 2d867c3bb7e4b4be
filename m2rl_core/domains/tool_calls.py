"""Tool calls in Qwen's `<tool_call>` format: how they are read, matched (BFCL's AST rule) and averaged.

Nothing here runs a call, and nothing that a model wrote is evaluated: a call is data that has passed its
tool's schema, or it is a fault with a reason.
"""
from __future__ import annotations

import json
import re

JSON_TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
NON_LIVE = ("simple", "parallel", "irrelevance")


def _strict_object(pairs: list[tuple]) -> dict:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _no_constant(text: str):
    raise ValueError(f"{text} is not JSON")


def _fits(value, kind: str | None) -> bool:
    """Whether a value has a schema's JSON type; a boolean is no number, an untyped argument takes anything."""
    if kind is None:
        return True
    if kind not in JSON_TYPES:
        raise ValueError(f"tool schema: unknown type {kind!r}; the types are {', '.join(JSON_TYPES)}")
    return isinstance(value, JSON_TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _fault_of(call, tools: dict[str, dict]) -> str:
    """Why one decoded call may not run; "" where it may."""
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return "a call needs a name and arguments"
    name, arguments = call["name"], call["arguments"]
    if not isinstance(name, str) or name not in tools:
        return f"not in the tool list: {str(name)[:40]}"
    if not isinstance(arguments, dict):
        return "arguments are not an object"
    properties = tools[name].get("properties", {})
    for key, value in arguments.items():
        if key not in properties:
            return f"{name} has no argument {key[:40]}"
        if not _fits(value, properties[key].get("type")):
            return f"{name}: {key} is no {properties[key]['type']}"
    missing = [key for key in tools[name].get("required", ()) if key not in arguments]
    return f"{name} lacks {missing[0]}" if missing else ""


def parse_calls(answer: str, tools: tuple[dict, ...]) -> tuple[list[dict], str]:
    """The tool calls of one answer and "", or no calls and why it has a call that may not run.

    A call is strict JSON between `<tool_call>` and `</tool_call>`: a tool of the list, its schema's
    argument names and types, all required ones. One invalid call spoils the turn.
    """
    blocks = CALL.findall(answer)
    if not len(blocks) == answer.count("<tool_call>") == answer.count("</tool_call>"):
        return [], "an open tool call"
    known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    calls = []
    for block in blocks:
        try:
            call = json.loads(block, object_pairs_hook=_strict_object, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return [], "a call that is not JSON"
        fault = _fault_of(call, known)
        if fault:
            return [], fault
        calls.append(call)
    return calls, ""


def equal(a, b) -> bool:
    """Equal values; texts without regard to case, and true is not 1."""
    if isinstance(a, str) and isinstance(b, str):
        return a.casefold() == b.casefold()
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _matches(call: dict, gold: dict) -> bool:
    """BFCL's rule for one call: each argument among its allowed values; "" among them lets it be absent."""
    allowed, given = gold["arguments"], call["arguments"]
    return (call["name"] == gold["name"] and set(given) <= set(allowed)
            and all(any(equal(given[key], value) for value in values) if key in given else "" in values
                    for key, values in allowed.items()))


def all_match(calls: list[dict], golds: list[dict]) -> bool:
    """Whether calls and truths pair off one to one, in any order."""
    if len(calls) != len(golds):
        return False
    return not golds or any(_matches(call, golds[0]) and all_match(calls[:i] + calls[i + 1:], golds[1:])
                            for i, call in enumerate(calls))


def bfcl_average(by_category: dict[str, float]) -> float:
    """BFCL v3's overall score on the miniature's categories, from each category's mean score.

    The unweighted mean of the groups: Non-Live = the unweighted mean of simple, parallel and irrelevance,
    Multi-Turn = multi_turn. BFCL's third group, Live, has no miniature and is absent; so is a group without
    scores. ValueError for an unknown category and for none at all.
    """
    unknown = sorted(set(by_category) - {*NON_LIVE, "multi_turn"})
    if unknown or not by_category:
        raise ValueError(f"bfcl_average: {f'unknown category {unknown[0]!r}' if unknown else 'no category'}; "
                         f"give some of {', '.join(NON_LIVE)}, multi_turn")
    non_live = [by_category[name] for name in NON_LIVE if name in by_category]
    groups = [sum(non_live) / len(non_live)] if non_live else []
    groups += [by_category["multi_turn"]] if "multi_turn" in by_category else []
    return sum(groups) / len(groups)
