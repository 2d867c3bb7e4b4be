"""Right answers to the items of BFCL v3, written from their truths, and wrong ones made of these."""
from __future__ import annotations

import ast
import json
import random

from m2rl_core.domains import Row
from m2rl_core.domains.bfcl import LANGUAGES, MULTI, STEPS

Call = tuple[str, dict]
DONE = "Nothing to call."


def write(calls: list[Call]) -> str:
    """One turn after its `</think>`."""
    return "\n".join(f"<tool_call>\n{json.dumps({'name': name, 'arguments': given})}\n</tool_call>"
                     for name, given in calls) or DONE


def gold(row: Row) -> list[str]:
    """The assistant's turns that the truth asks for."""
    category = row.truth["category"]
    if category in MULTI:
        return spoken(steps(gold_turns(row)))
    if category.endswith("irrelevance"):
        return [DONE]
    if category == "live_relevance":
        return [write([(row.tools[0]["function"]["name"], {})])]
    return [write(gold_calls(row))]


def gold_calls(row: Row) -> list[Call]:
    """A single-turn item's calls: the first allowed value of each argument that is not optional."""
    as_text = row.truth["category"] in LANGUAGES
    found = []
    for truth in row.truth["ground_truth"]:
        (name, allowed), = truth.items()
        given = {key: _filled(next(value for value in values if value != ""))
                 for key, values in allowed.items() if any(value != "" for value in values)}
        found.append((name, {key: _text(value) if as_text else value for key, value in given.items()}))
    return found


def _filled(value):
    """A dict of the truth holds allowed values, at one depth."""
    if isinstance(value, dict):
        return {key: _filled(next((one for one in options if one != ""), "")) if isinstance(options, list) else options
                for key, options in value.items() if options != [""]}
    return [_filled(one) for one in value] if isinstance(value, list) and value and isinstance(value[0], dict) else value


def _text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def gold_turns(row: Row) -> list[list[Call]]:
    """A multi-turn item's calls, a list for each turn of the user's."""
    added = [json.loads(line) for text in row.truth["turns"] for line in text.splitlines() if line.startswith('{"type"')]
    order = {tool["function"]["name"]: list(tool["function"]["parameters"]["properties"]) for tool in (*row.tools, *added)}
    return [[_parsed(text, order) for text in turn] for turn in row.truth["ground_truth"]]


def _parsed(text: str, order: dict[str, list[str]]) -> Call:
    call = ast.parse(text, mode="eval").body
    name = ast.unparse(call.func)
    given = dict(zip(order[name], map(ast.literal_eval, call.args)))
    return name, given | {word.arg: ast.literal_eval(word.value) for word in call.keywords}


def steps(turns: list[list[Call]]) -> list[list[list[Call]]]:
    """One call a step, but all in one where a turn has more than the steps that it may have."""
    return [[[call] for call in turn] if len(turn) < STEPS else [turn] for turn in turns]


def spoken(turns: list[list[list[Call]]]) -> list[str]:
    """The model's turns: each step's calls, and a word without a call after the last."""
    return [said for turn in turns for said in [*map(write, turn), DONE]]


def wrong(row: Row, rng: random.Random) -> list[list[str]]:
    """Answers that miss the truth, each in another way, or that only look as if they did."""
    if row.truth["category"] in MULTI:
        return _wrong_turns(row, rng)
    if row.truth["category"].endswith("relevance"):
        name = row.tools[0]["function"]["name"] if row.tools else "f"
        return [[write([(name, {})])], [DONE], [f"<tool_call>\n{{{name}\n</tool_call>"],
                [f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>']]
    calls = gold_calls(row)
    (name, given), *rest = calls
    key = rng.choice(sorted(given)) if given else "x"
    value = given.get(key, 1)
    other = value + 1 if isinstance(value, (int, float)) and not isinstance(value, bool) else "another value"
    same = value.upper() if isinstance(value, str) else value
    return [[write(answer)] for answer in (
        rest, [*calls, calls[0]], calls[::-1], [(name + "_", given), *rest], [(name, {**given, key: other}), *rest],
        [(name, {**given, key: same}), *rest], [(name, {**given, "nobody_asked": 1}), *rest],
        [(name, {k: v for k, v in given.items() if k != key}), *rest], [(name, {**given, key: [value]}), *rest],
        [(name, {**given, key: str(value)}), *rest],
    )] + [[write(calls).replace("\n", " ")], [write(calls) + "\n<tool_call>\n{\n</tool_call>"],
          [f"<tool_call>\n{json.dumps({'name': name, 'arguments': json.dumps(given)})}\n</tool_call>"]]


def _wrong_turns(row: Row, rng: random.Random) -> list[list[str]]:
    turns = steps(gold_turns(row))
    at = rng.choice([i for i, turn in enumerate(turns) if turn])
    (name, given), *others = turns[at][0]
    changed = {key: f"{value}x" if isinstance(value, str) else value for key, value in given.items()} or {"x": 1}
    together = [[[call for step in turn for call in step]] if turn else [] for turn in turns]

    def instead(turn: list) -> list[str]:
        return spoken([*turns[:at], turn, *turns[at + 1:]])

    return [instead(turns[at][:-1]), instead([[(name, changed), *others], *turns[at][1:]]),
            instead([*turns[at], turns[at][0]]), instead([[("no_such_tool", {"a": 1})], *turns[at]]),
            instead([[(name, {**given, "a b": 1})], *turns[at]]),
            instead(turns[at][::-1]), spoken(together), spoken(turns)[:-1], spoken(turns[:-1]),
            [said.replace('"arguments": {}', '"arguments": "{}"') for said in spoken(turns)]]
