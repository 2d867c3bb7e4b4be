"""Instruction following: write about a topic under constraints, verified by the checkers of IFEval, IFBench, IFEvalG.

SFT shows one constraint, sometimes two; RL draws one to three; the miniature "ifeval" asks for combinations of ids and
parameters that no training row shows, and "ifbench" for ids that no training row names. `verify` serves real rows too.
"""
from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

from m2rl_core.domains import Row, Verdict, checkers, generator, rule_of
from m2rl_core.domains.constraints import FILLERS, JOINED, KINDS, NAMES, SEEN, TOPICS, UNSEEN, draft

# Tuning: the first four weigh prompts of 1, 2 and 3 constraints.
SFT_COUNTS = (3, 1, 0)
RL_COUNTS = (2, 2, 1)
IFEVAL_COUNTS = (0, 3, 2)
IFBENCH_COUNTS = (2, 1, 0)  # the first is of an unseen kind, the second of a seen one
SFT_WORKED = 0.5  # share of SFT answers that name their constraints in the think part
CORPUS_STORIES = 0.4  # share of pre-training documents without a constraint
MAX_PIECES = 32  # words, marks and line breaks of an answer, so that it fits the miniature model's response
MAX_FILLERS = 9

RULES = ("strict", "loose")  # of IFEval; the first is that of training
OPENERS = ("Write about the {}.", "Tell me about the {}.")


def corpus(rng: random.Random) -> str:
    """A short document for pre-training: a plain story, or one seen constraint named above a text that obeys it."""
    topic = rng.choice(sorted(TOPICS))
    order = rng.sample(FILLERS, len(FILLERS))
    if rng.random() < CORPUS_STORIES:
        first, second = rng.sample(NAMES, 2)
        numbers = " ".join(str(rng.randint(0, 9)) for _ in range(rng.randint(1, 4)))
        extra = (f"It knows {first} and {second}.", f"It counts {numbers}.", rng.choice(JOINED))
        return " ".join([draft(topic, {}, rng.randint(0, 3), order), *rng.sample(extra, rng.randint(0, 2))])
    name = rng.choice(sorted(SEEN))
    kwargs = SEEN[name].draw(rng)
    return f"{SEEN[name].plan(kwargs)}\n{draft(topic, {name: kwargs}, 0, order)}"


def sft(rng: random.Random) -> Row:
    """One or two seen constraints, with an answer; half the answers carry their plan in the think part."""
    row = _row(rng, "Chat", SFT_COUNTS, SEEN)
    return Row(**{**row.__dict__, "turns": tuple(respond(row, worked=rng.random() < SFT_WORKED))})


def rl(rng: random.Random) -> Row:
    """One to three seen constraints."""
    return _row(rng, "constraints", RL_COUNTS, SEEN)


def test(benchmark: str, rng: random.Random) -> Row:
    """An item of "ifeval" (two or three seen kinds) or "ifbench" (an unseen kind, sometimes with a seen one)."""
    if benchmark == "ifeval":
        return _row(rng, benchmark, IFEVAL_COUNTS, SEEN)
    if benchmark == "ifbench":
        return _row(rng, benchmark, IFBENCH_COUNTS, UNSEEN)
    raise ValueError(f"unknown instruction benchmark {benchmark!r}: one of ifeval, ifbench")


def respond(row: Row, worked: bool = True) -> list[dict]:
    """A right answer to one of this module's rows; `worked` names the constraints, in the prompt's order, first."""
    wanted = _wanted(row)
    text = _answer(row.truth["topic"], wanted, row.messages[0]["content"])
    plan = "; ".join(KINDS[name].plan(kwargs) for name, kwargs in wanted.items()) if worked else ""
    return _turn(plan, text)


def spoil(row: Row, rng: random.Random) -> list[dict]:
    """A fluent answer to one of this module's rows that misses exactly one of its constraints."""
    wanted = _wanted(row)
    for name in rng.sample(list(wanted), len(wanted)):
        meant = dict(wanted)
        if (other := KINDS[name].miss(wanted[name])) is None:
            del meant[name]
        else:
            meant[name] = other
        text = _answer(row.truth["topic"], meant, row.messages[0]["content"])
        if text is not None and [missed for missed in wanted if not _obeys(missed, wanted[missed], text)] == [name]:
            return _turn("; ".join(KINDS[n].plan(kwargs) for n, kwargs in meant.items()), text)
    raise ValueError(f"row {row.id!r}: no constraint of {list(wanted)} can be missed alone")


def verify(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Verdict]:
    """Prompt-level IFEval: 1 where the last turn's text obeys every instruction of its row, else 0.

    `truth` has IFEval's keys: "instruction_id_list", and "kwargs" in the same order; its "rule" is "strict" (where it
    has none) or "loose". The reason names the first instruction that is missed. Raises ValueError for a row with an
    unknown id or rule, or with parameters that do not fit it.
    """
    return [_verdict(row, turns[-1]) for row, turns in zip(rows, answers, strict=True)]


def outcomes(row: Row, response: str) -> dict[str, list[bool]]:
    """"strict" and "loose": whether each instruction of the row is obeyed, in order; all four of IFEval's numbers."""
    prompt, pairs = row.messages[-1]["content"], _pairs(row)
    return {rule: [checkers.follows(name, kwargs, prompt, response, loose=rule == "loose")[0] for name, kwargs in pairs]
            for rule in RULES}


def load() -> None:
    """Import the published checkers and what they need; ImportError says how to install it."""
    checkers.ids()


def _verdict(row: Row, response: str) -> Verdict:
    rule = rule_of(row, RULES)
    for name in row.truth["instruction_id_list"]:
        checkers.require(name)  # also where an earlier instruction is missed
    if not response.strip():
        return Verdict(0.0, "empty answer")
    prompt = row.messages[-1]["content"]
    for name, kwargs in _pairs(row):
        followed, stumbled = checkers.follows(name, kwargs, prompt, response, loose=rule == "loose")
        if not followed:
            return Verdict(0.0, f"missed {name}" + (f" ({stumbled})" if stumbled else ""))
    return Verdict(1.0, "right")


def _pairs(row: Row) -> list[tuple[str, dict | None]]:
    return list(zip(row.truth["instruction_id_list"], row.truth["kwargs"], strict=True))


def _row(rng, source, counts, first):
    """A row with one constraint of `first`, the others of seen kinds; those that no answer can join are drawn anew.

    Its fingerprint is its set of constraints. A single one is a primitive that all rows build on; only there does the
    topic count too.
    """
    while True:
        names = [rng.choice(sorted(first))]
        names += rng.sample(sorted(set(SEEN) - set(names)), rng.choices((0, 1, 2), counts)[0])
        wanted = {name: KINDS[name].draw(rng) for name in rng.sample(names, len(names))}
        topic = rng.choice(sorted(TOPICS))
        prompt = " ".join([rng.choice(OPENERS).format(topic), *(KINDS[n].say(kwargs) for n, kwargs in wanted.items())])
        if _distinct_words(wanted) and _answer(topic, wanted, prompt) is not None:
            break
    problem = [sorted(wanted.items()), topic if len(wanted) == 1 else ""]
    truth = {"instruction_id_list": list(wanted), "kwargs": list(wanted.values()), "topic": topic}
    return Row("", "if", source, json.dumps(problem, sort_keys=True), ({"role": "user", "content": prompt},), truth)


def _distinct_words(wanted):
    """Whether no keyword is asked for twice: one of two such constraints could not be missed alone."""
    words = [word for kwargs in wanted.values() for word in kwargs.get("keywords", ())]
    words += [kwargs[key] for kwargs in wanted.values() for key in ("keyword", "word") if key in kwargs]
    return len(words) == len(set(words))


def _answer(topic, wanted, prompt):
    """The shortest draft that obeys every constraint; None where none does. The prompt decides the filler words."""
    order = generator("if", prompt).sample(FILLERS, len(FILLERS))
    for fillers in range(MAX_FILLERS + 1):
        text = draft(topic, wanted, fillers, order)
        if len(re.findall(r"\w+|[^\w ]", text)) > MAX_PIECES:
            return None
        if all(_obeys(name, kwargs, text) for name, kwargs in wanted.items()):
            return text
    return None


def _wanted(row: Row) -> dict[str, dict]:
    return dict(zip(row.truth["instruction_id_list"], row.truth["kwargs"], strict=True))


def _turn(plan: str, text: str) -> list[dict]:
    return [{"role": "assistant", "content": f"<think>\n{plan}\n</think>\n\n{text}"}]


def _obeys(name: str, kwargs: dict, text: str) -> bool:
    return checkers.follows(name, kwargs, "", text)[0]
