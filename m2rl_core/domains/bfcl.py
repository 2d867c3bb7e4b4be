"""BFCL v3: the calls of a model in Qwen3's form, the official verdict on them, and the world of its multi-turn items.

What counts as a call is what the wheel's own handler for Qwen3 reads. In the wheel, names and arguments of calls become
code: here that code is built anew from JSON (a known name, identifiers, literals), all else is refused, and what is left
runs inside the sandbox. Departures: a refused call's error message is worded here; functions that a turn adds are
written as the tools are, not as Python; the thinking of earlier turns stays in the context, where the handler drops it.
"""
from __future__ import annotations

import json
import keyword
import re
from collections.abc import Sequence

from m2rl_core.domains import Row, UserSays, Verdict, bfcl_wheel
from m2rl_core.errors import StudyError, one_line

KIND = "bfcl"  # truth["kind"] of its rows
SINGLE = {  # category: official number of items
    "simple": 400, "multiple": 200, "parallel": 200, "parallel_multiple": 200, "java": 100, "javascript": 50,
    "irrelevance": 240, "live_simple": 258, "live_multiple": 1053, "live_parallel": 16, "live_parallel_multiple": 24,
    "live_irrelevance": 882, "live_relevance": 18,
}
MULTI = {f"multi_turn_{name}": 200 for name in ("base", "miss_func", "miss_param", "long_context")}
CATEGORIES = {**SINGLE, **MULTI}
LANGUAGES = {"java": "Java", "javascript": "JavaScript"}
STEPS = 20  # with calls in one turn; one more ends the episode
BLOCK = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
REFUSED = "no_such_function()"  # stands for a call that must not become code; it has no meaning in the wheel
Call = tuple[str, dict]  # name, arguments


# --- what the model says


def calls_of(answer: str, multi_turn: bool = False) -> list[Call]:
    """The calls of one answer; none where any block of it is no call, as the handler for Qwen3 has it.

    A block is JSON between the two marks, each on a line of its own, with a name and arguments; in multi-turn items
    the arguments may also be a text that holds JSON.
    """
    found = []
    for block in BLOCK.findall(answer):
        try:
            call = json.loads(block)
            name, arguments = call["name"], call["arguments"]
            if multi_turn and isinstance(arguments, str):
                arguments = json.loads(arguments)
        except (ValueError, RecursionError, TypeError, KeyError):
            return []
        if not isinstance(call, dict) or not isinstance(arguments, dict) or isinstance(name, list | dict):
            return []
        found.append((name if isinstance(name, str) else json.dumps(name), arguments))
    return found


def code_of(call: Call, known: Sequence[str]) -> str:
    """The call as the line of Python that the wheel evaluates; REFUSED where anything but a literal would become code."""
    name, arguments = call
    if fault_of(call, known):
        return REFUSED
    return f"{name}({','.join(f'{key}={value!r}' for key, value in arguments.items())})"


def fault_of(call: Call, known: Sequence[str]) -> str:
    """Why a call is refused, in Python's words as the wheel would give them; "" where it may run."""
    name, arguments = call
    if name not in known:
        return f"Error during execution: name '{name.split('.')[0]}' is not defined"
    if not all(key.isidentifier() and not keyword.iskeyword(key) for key in arguments):
        return "Error during execution: invalid syntax (<string>, line 1)"
    return ""


# --- the episode


class Episode:
    """Which turn and step an episode is at, from the model's answers alone: the environment and the verdict share it.

    A turn of the user's ends with the first answer without a call; the episode ends after the last turn, or with the
    twenty-first step of a turn.
    """

    def __init__(self, row: Row):
        self.row, self.last = row, len(row.truth["turns"])
        self.turns: list[list[list[Call]]] = [[]]
        self.over = False

    def take(self, answer: str) -> list[Call]:
        """The calls of the next answer, after which the episode stands where they lead."""
        calls = calls_of(answer, multi_turn=True)
        if calls:
            self.turns[-1].append(calls)
            self.over = len(self.turns[-1]) > STEPS
        elif len(self.turns) > self.last:
            self.over = True
        else:
            self.turns.append([])
        return calls

    def code(self) -> list[list[list[str]]]:
        """All calls so far as lines of Python: turns of steps."""
        return [[[code_of(call, self.row.truth["names"]) for call in step] for step in turn] for turn in self.turns]


class Environment:
    """One episode of an item: the tools answer, and where the model calls none, the user goes on. A single-turn item is
    over after its first turn.

    The wheel's world is built anew for each step and all calls up to it are run, in the sandbox; nothing outlives a step.
    """

    def __init__(self, row: Row):
        self.row, self.episode = row, Episode(row) if row.truth["category"] in MULTI else None

    def step(self, answer: str) -> list[str] | None:
        """The tools' answers to one turn's text after `</think>`, or the user's next words; None at the end."""
        episode = self.episode
        if episode is None or episode.over:
            return None
        calls = episode.take(answer)
        if episode.over:
            return None
        return self._run(calls) if calls else [UserSays(self.row.truth["turns"][len(episode.turns) - 2])]

    def _run(self, calls: list[Call]) -> list[str]:
        steps = [step for turn in self.episode.code() for step in turn]
        found = bfcl_wheel.ask([{"kind": "execute", "steps": steps, **_item(self.row)}])[0]
        if isinstance(found, str):  # for example the time limit, at a power of a power
            found = {"results": [f"Error during execution: {found}"] * len(calls)}
        return [fault_of(call, self.row.truth["names"]) or result.encode(errors="replace").decode()  # no half characters
                for call, result in zip(calls, found["results"], strict=True)]


def environment(row: Row) -> Environment:
    """A fresh episode of `row`: two rollouts of one row share nothing."""
    return Environment(row)


def steps_here(row: Row) -> bool:
    """Whether an episode lives in this process: what can hang is in the sandbox."""
    return True


def _item(row: Row) -> dict:
    truth = row.truth
    item = {"id": truth["test"], "initial_config": truth["initial_config"], "involved_classes": truth["involved_classes"]}
    return {"item": item, "category": truth["category"]}


# --- the verdict


def here() -> bool:
    """Whether answers are verified in this process: what can hang is in the sandbox."""
    return True


def verify(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Verdict]:
    """The official verdicts, in order; `answers[i]` holds the assistant's turns of row i, each after its `</think>`.

    StudyError for a row of another category, and where wheel or sandbox are missing.
    """
    asked = [_question(row, turns) for row, turns in zip(rows, answers, strict=True)]
    found = iter(bfcl_wheel.ask([one for one in asked if isinstance(one, dict)]))
    return [_verdict(next(found)) if isinstance(one, dict) else one for one in asked]


def _question(row: Row, answers: Sequence[str]) -> dict | Verdict:
    """What the checker is asked, or the verdict where it needs none."""
    category = row.truth["category"]
    if category in MULTI:
        return _episode(row, answers)
    if category not in SINGLE:
        raise StudyError(f"row {row.id!r}: category {category!r} is none of BFCL v3: {', '.join(CATEGORIES)}")
    if len(answers) != 1:
        return Verdict(0.0, "went on after the end")
    calls = calls_of(answers[0])
    if category.endswith("relevance"):
        if bool(calls) == category.endswith("irrelevance"):
            return Verdict(0.0, "called a tool" if calls else "no call")
        return Verdict(1.0, "right")
    return {"kind": "ast", "functions": row.truth["functions"], "calls": [{name: given} for name, given in calls],
            "ground_truth": row.truth["ground_truth"], "language": LANGUAGES.get(category, "Python"), "category": category}


def _episode(row: Row, answers: Sequence[str]) -> dict | Verdict:
    episode, truth = Episode(row), row.truth["ground_truth"]
    for answer in answers:
        if episode.over:
            return Verdict(0.0, "went on after the end")
        episode.take(answer)
    if len(episode.turns) != len(truth):  # an item whose truth has another number of turns is wrong for everybody
        return Verdict(0.0, f"ended in turn {len(episode.turns)} of {len(truth)}")
    return {"kind": "multi_turn", "turns": episode.code(), "ground_truth": truth, **_item(row)}


def _verdict(found: dict | str) -> Verdict:
    if isinstance(found, str):
        return Verdict(0.0, f"checker ended: {found}"[:200], failed=True)
    return Verdict(1.0, "right") if found["valid"] else Verdict(
        0.0, one_line(f"{found['error_type']}: {found['error']}"))
