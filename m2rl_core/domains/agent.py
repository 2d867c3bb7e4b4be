"""Agent: tool calls in Qwen's `<tool_call>` format, in one turn (as BFCL) or in several (as NeMo-Gym).

Single, parallel and irrelevance rows compare the calls with the truth's (BFCL's AST rule); multi-turn rows
replay them on a fresh workplace and compare the final state. Departures from the released code: an invalid
call scores 0 in every kind, also in irrelevance, and ends the episode, as a reply without a call does.
"""
from __future__ import annotations

import json
import random
import sys
from types import ModuleType

from m2rl_core.domains import Row, Verdict, bfcl, is_held_out, workbench
from m2rl_core.domains.agent_tasks import (
    ID_SLOT, KINDS, MAX_TURNS, POOLS, SFT_KINDS, SFT_WORKED, WORDS, make, notes, plain, requests)
from m2rl_core.domains.tool_calls import all_match, bfcl_average, equal, parse_calls
from m2rl_core.domains.workplace import World, compact, signature

__all__ = ("bfcl_average", "corpus", "environment", "home", "parse_calls", "respond", "rl", "sft", "spoil", "test", "verify")

SFT_TYPE = "Conversational Agent"  # the row of Table 1
REFUSAL = "No tool can do this."
RULES = workbench.RULES  # where rows of NeMo-Gym's workplace are verified; no other rows ask for one


# ---- the episode

class Environment:
    """One episode of one row: a fresh workplace and the calls so far. Nothing outlives it."""

    def __init__(self, row: Row):
        self.tools, self.multi_turn = row.tools, row.truth["kind"] == "multi_turn"
        self.turns_left = row.truth.get("max_turns", MAX_TURNS) if self.multi_turn else 1
        self.world = World(row.truth.get("state", {}))
        self.calls: list[dict] = []
        self.fault, self.done = "", False

    def step(self, answer: str) -> list[str] | None:
        """Take one turn's text after `</think>`; the tools' answers as JSON, or None: the episode is over.

        It is over after a turn without a call or with one that may not run, after `max_turns`, and after
        the first turn of every row that is not multi-turn. The calls of the last turn still count.
        """
        if self.done:
            return None
        calls, self.fault = parse_calls(answer, self.tools)
        self.calls += calls
        outputs = [self.world.run(call) for call in calls] if self.multi_turn else []
        self.turns_left -= 1
        self.done = not calls or self.turns_left == 0
        return None if self.done else outputs


def environment(row: Row) -> Environment:
    """A fresh episode of `row`: two rollouts of one row share nothing."""
    return Environment(row)


def steps_here(row: Row) -> bool:
    """Whether an episode lives in this process: the miniature workplace cannot hang."""
    return True


def home(row: Row) -> ModuleType:
    """The module that verifies a row of this domain: NeMo-Gym's workplace and BFCL's own items have theirs."""
    kind = row.truth.get("kind")
    if kind == bfcl.KIND:
        return bfcl
    return workbench.home(row) if kind == workbench.KIND else sys.modules[__name__]


# ---- the reward

def _replayed(row: Row, calls: list[dict]) -> World:
    world = World(row.truth["state"])
    for call in calls:
        world.run(call)
    return world


def _verdict(row: Row, answers: list[str]) -> Verdict:
    episode = environment(row)
    for answer in answers:
        if episode.done:
            return Verdict(0.0, "went on after the end")
        episode.step(answer)
    if episode.fault:
        return Verdict(0.0, episode.fault)
    kind, calls, golds = row.truth["kind"], episode.calls, row.truth["calls"]
    if kind == "irrelevance":
        right, wrong = not calls and bool(answers and answers[0].strip()), "called a tool" if calls else "empty"
    elif not calls:
        right, wrong = False, "no call"
    elif kind == "multi_turn":
        right, wrong = episode.world.snapshot() == _replayed(row, golds).snapshot(), "wrong final state"
    elif kind in ("single", "parallel"):
        right, wrong = all_match(calls, golds), "wrong calls"
    else:
        raise ValueError(f"row {row.id!r}: unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")
    return Verdict(1.0, "right") if right else Verdict(0.0, wrong)


def verify(rows: list[Row], answers: list[list[str]]) -> list[Verdict]:
    """One verdict a row; `answers[i]` holds the assistant's turns of row i, each after its `</think>`."""
    return [_verdict(row, turns) for row, turns in zip(rows, answers, strict=True)]


# ---- making rows

def sft(rng: random.Random) -> Row:
    """A row of Table 1's agent type, mostly single calls and refusals, over fewer names and words."""
    row = make(rng, rng.choices(list(SFT_KINDS), list(SFT_KINDS.values()))[0], SFT_TYPE, narrow=True)
    return Row(**{**row.__dict__, "turns": tuple(respond(row, rng.random() < SFT_WORKED))})


def rl(rng: random.Random) -> Row:
    """A training prompt of any kind, evenly."""
    kind = rng.choice(KINDS)
    return make(rng, kind, kind)


def test(benchmark: str, rng: random.Random) -> Row:
    """An item of the miniature BFCL v3, each category as often; `truth["category"]` names it."""
    kind = rng.choice(KINDS)
    while True:  # choosing the kind first keeps the categories even
        row = make(rng, kind, benchmark)
        if is_held_out(row.fingerprint):
            return row


# ---- right and wrong answers

def _say(think: str, answer: str) -> dict:
    return {"role": "assistant", "content": f"<think>\n{think}\n</think>\n\n{answer}"}


def _write(calls: list[dict]) -> str:
    return "\n".join(f"<tool_call>\n{compact(call)}\n</tool_call>" for call in calls)


def _thought(calls: list[dict]) -> str:
    """What a worked one-turn answer thinks before these calls."""
    return f"need {calls[0]['name']}: listed" if len(calls) == 1 else f"need {len(calls)} calls"


def _play(row: Row, calls: list[dict], worked: bool) -> list[dict]:
    """A whole multi-turn episode: a turn for each call with what the tool answered, then "Done."."""
    episode, messages, think = environment(row), [], f"need id: {calls[0]['name']}"
    for i, call in enumerate(calls):
        messages.append(_say(think if worked else "", _write([call])))
        outputs = episode.step(_write([call]))
        if outputs is None:
            return messages
        messages += [{"role": "tool", "content": output} for output in outputs]
        found = json.loads(outputs[0]).get("id", "")
        think = f"id {found}: {calls[i + 1]['name']}" if i + 1 < len(calls) else "all done"
    return [*messages, _say(think if worked else "", "Done.")]


def respond(row: Row, worked: bool = True) -> list[dict]:
    """The right assistant turns of `row` with the tools' answers between; `worked` fills the thinking."""
    kind, golds = row.truth["kind"], row.truth["calls"]
    if kind == "multi_turn":
        return _play(row, golds, worked)
    if kind == "irrelevance":
        return [_say(f"need {', '.join(row.truth.get('needs', ['a tool']))}: not listed" if worked else "", REFUSAL)]
    calls = [plain(gold) for gold in golds]
    return [_say(_thought(calls) if worked else "", _write(calls))]


def _spoiled(call: dict, rng: random.Random) -> dict:
    """The same call with one argument changed to another value of its pool."""
    key = rng.choice(sorted(call["arguments"]))
    old = call["arguments"][key]
    new = rng.choice([value for value in POOLS.get(key, WORDS) if not equal(value, old)])
    return {"name": call["name"], "arguments": {**call["arguments"], key: new}}


def spoil(row: Row, rng: random.Random) -> list[dict]:
    """A plausible wrong continuation of right format: a wrong argument, a call too few, or one too many."""
    kind, worked = row.truth["kind"], rng.random() < 0.5
    if kind == "irrelevance":
        function = rng.choice(row.tools)["function"]
        arguments = {key: rng.choice(POOLS.get(key, WORDS)) for key in function["parameters"].get("required", ())}
        calls = [{"name": function["name"], "arguments": arguments}]
        return [_say(_thought(calls) if worked else "", _write(calls))]
    short = rng.random() < 0.25
    if kind == "multi_turn":
        *first, last = row.truth["calls"]
        return _play(row, first if first and short else [*first, _spoiled(last, rng)], worked)
    calls = [plain(gold) for gold in row.truth["calls"]]
    think = _thought(calls) if worked else ""
    if short:
        return [_say(think, _write(calls[:-1]))] if len(calls) > 1 else [_say("", REFUSAL)]
    i = rng.randrange(len(calls))
    return [_say(think, _write([*calls[:i], _spoiled(calls[i], rng), *calls[i + 1:]]))]


# ---- plain text for pre-training

def corpus(rng: random.Random) -> str:
    """A short document: notes of what requests give, a tool list with calls, or a found id that is used."""
    kind = rng.choice(("calls", "notes", "notes", "chain"))
    if kind == "notes":
        return "\n".join(f"{text}\n{compact(said)}" for text, said in notes(rng, 7))
    if kind == "calls":
        tools, asked = requests(rng, 3)
        return "\n".join([*(signature(tool) for tool in tools), *(
            f"{text}\n{_write([plain(call)])}" for text, call in asked)])
    while True:
        row = make(rng, "multi_turn", "corpus")
        if not is_held_out(row.fingerprint):
            break
    find, act = row.truth["calls"]
    found = act["arguments"][ID_SLOT[act["name"]]]
    return "\n".join([*(signature(tool) for tool in row.tools), row.messages[0]["content"], _write([find]),
                      f"<tool_response>\n{compact({'id': found})}\n</tool_response>", _write([act])])
