"""Math: chains worked modulo 10 ("aime24" miniature) and linear equations ("aime25" miniature).

The verifier reads `\\boxed{}` and also serves real AIME rows. Two plain integers are compared as such;
everything else goes to math-verify.
A departure from "the last box counts": every box must hold the right value, so that listing guesses earns nothing.
A row's "rule" says otherwise: "last_box", as benchmarks are scored, or "deepscaler", as the released code trains.
"""
from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from random import Random

from m2rl_core.domains import Row, Verdict, deepscaler, is_held_out, rule_of
from m2rl_core.errors import StudyError

# Difficulty, in one place. SFT sees shorter chains than RL and test, and half of its rows answer without working.
SFT_LENGTHS, RL_LENGTHS, TEST_LENGTHS = (1, 2), (1, 2, 3), (2, 3)  # steps of a chain
SFT_TERSE = 0.5  # share of SFT rows with an empty <think>
CHAINS = 0.6  # share of chains among training rows, the rest are equations
MULTIPLIERS = (2, 3, 4)  # few enough facts for a million weights
COEFFICIENTS = (2, 3, 4, 5)
CORPUS_LINES = 8

RULES = ("every_box", "last_box", "deepscaler")
CHAIN_WORDS = (  # start, one phrase for each operation, separator, end
    ("Start at {}", {"+": "Add {}", "-": "Subtract {}", "*": "Multiply by {}"}, ". ", ". Last digit?"),
    ("Take {}", {"+": "add {}", "-": "subtract {}", "*": "multiply by {}"}, ", ", ". What is the last digit?"),
    ("What is the last digit: {}", {"+": "plus {}", "-": "minus {}", "*": "times {}"}, ", ", "?"),
)
EQUATION_WORDS = ("Solve {}.", "Find x if {}.", "{}. What is x?")


# --- rows


def corpus(rng: Random) -> str:
    """One-step facts (`7+5>2` keeps the last digit only, `19-4=15` is ordinary arithmetic), or problems worked."""
    make = rng.choice((_last_digit_fact, _ordinary_fact, _worked_problem))
    return "\n".join(make(rng) for _ in range(3 if make is _worked_problem else CORPUS_LINES))


def sft(rng: Random) -> Row:
    """A training row with its answer, worked or terse."""
    row = _chain(rng, SFT_LENGTHS, "Math") if rng.random() < CHAINS else _equation(rng, "Math")
    turns = tuple(respond(row, worked=rng.random() >= SFT_TERSE))
    return Row(**{**row.__dict__, "turns": turns})


def rl(rng: Random) -> Row:
    """An RLVR prompt; chains are up to one step longer than in SFT."""
    return _chain(rng, RL_LENGTHS, "chain") if rng.random() < CHAINS else _equation(rng, "equation")


def test(benchmark: str, rng: Random) -> Row:
    """An item of a miniature: chains for "aime24", equations for "aime25"."""
    if benchmark == "aime24":
        return _chain(rng, TEST_LENGTHS, benchmark)
    if benchmark == "aime25":
        return _equation(rng, benchmark)
    raise ValueError(f"unknown math benchmark {benchmark!r}: one of aime24, aime25")


def respond(row: Row, worked: bool = True) -> list[dict]:
    """A right continuation of a row made here; ValueError for a row from elsewhere."""
    lines, value = _solve(row)
    return [_turn(lines if worked else [], value)]


def spoil(row: Row, rng: Random) -> list[dict]:
    """A wrong continuation of right form: one slip in one step, carried on to the end."""
    right = row.truth["answer"]
    while True:
        lines, value = _solve(row, slip_at=rng.randrange(4), slip=rng.randint(1, 9))
        if str(value) != right:
            return [_turn(lines if rng.random() < 0.5 else [], value)]


def _turn(lines: Sequence[str], value: int) -> dict:
    work = "\n".join(lines)
    return {"role": "assistant", "content": f"<think>\n{work}\n</think>\n\nAnswer: \\boxed{{{value}}}"}


def _row(source: str, fingerprint: str, prompt: str, answer: int) -> Row:
    message = {"role": "user", "content": prompt}
    return Row("", "math", source, fingerprint, (message,), {"answer": str(answer)})


def _chain(rng: Random, lengths: Sequence[int], source: str) -> Row:
    start = value = rng.randint(1, 9)
    steps = []
    for _ in range(rng.choice(lengths)):
        op = "+" if value == 0 else rng.choice("+-*")  # 0 would make the next two pointless
        number = rng.choice(MULTIPLIERS) if op == "*" else rng.randint(1, 9 if op == "+" else value)
        steps.append((op, number))
        value = _step(value, op, number)
    begin, phrases, separator, end = rng.choice(CHAIN_WORDS)
    words = [begin.format(start), *(phrases[op].format(number) for op, number in steps)]
    problem = f"{start}" + "".join(f"{op}{number}" for op, number in steps)
    return _row(source, f"chain:{problem}", separator.join(words) + end, value)


def _equation(rng: Random, source: str) -> Row:
    a, x, b, sign = rng.choice(COEFFICIENTS), rng.randint(0, 9), rng.randint(1, 5), rng.choice("+-")
    if a * x < b:
        sign = "+"  # no negative numbers
    problem = f"{a}*x{sign}{b}={a * x + b if sign == '+' else a * x - b}"
    return _row(source, f"equation:{problem}", rng.choice(EQUATION_WORDS).format(problem), x)


def _step(value: int, op: str, number: int) -> int:
    """One chain step; only the last digit is kept."""
    return {"+": value + number, "-": value - number, "*": value * number}[op] % 10


def _solve(row: Row, slip_at: int = -1, slip: int = 0) -> tuple[list[str], int]:
    """Worked lines and the value; step `slip_at` (modulo the number of steps) comes out `slip` too high, modulo 10."""
    family, _, problem = row.fingerprint.partition(":")
    if family == "chain":
        value, steps = int(problem[0]), re.findall(r"([-+*])(\d)", problem[1:])
        lines = []
        for i, (op, number) in enumerate(steps):
            after = _step(value, op, int(number))
            if slip and i == slip_at % len(steps):
                after = (after + slip) % 10
            lines.append(f"{value}{op}{number}>{after}")
            value = after
        return lines, value
    if family == "equation":
        a, sign, b, right = re.fullmatch(r"(\d+)\*x([-+])(\d+)=(\d+)", problem).groups()
        inverse, product = ("-", int(right) - int(b)) if sign == "+" else ("+", int(right) + int(b))
        x = (product // int(a) + slip) % 10
        return [f"{right}{inverse}{b}={product}", f"{product}/{a}={x}"], x
    raise ValueError(f"row {row.id!r}: no worked answer for the family {family!r} (chain and equation only)")


def _worked_problem(rng: Random) -> str:
    """A problem of SFT's lengths in plain text, with its working and its value."""
    while True:
        row = _chain(rng, SFT_LENGTHS, "corpus") if rng.random() < CHAINS else _equation(rng, "corpus")
        if not is_held_out(row.fingerprint):
            lines, value = _solve(row)
            return "\n".join([row.messages[0]["content"], *lines, str(value)])


def _last_digit_fact(rng: Random) -> str:
    op, value = rng.choice("+-*"), rng.randint(0, 9)
    if op == "-":
        value = max(value, 1)
    number = rng.choice(MULTIPLIERS) if op == "*" else rng.randint(1, 9 if op == "+" else value)
    return f"{value}{op}{number}>{_step(value, op, number)}"


def _ordinary_fact(rng: Random) -> str:
    a, x, b = rng.choice(COEFFICIENTS), rng.randint(0, 9), rng.randint(1, 9)
    facts = [f"{a}*{x}={a * x}", f"{a * x}/{a}={x}", f"{a * x + b}-{b}={a * x}"]
    if a * x >= b:
        facts.append(f"{a * x - b}+{b}={a * x}")
    return rng.choice(facts)


# --- verifier


def verify(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Verdict]:
    """1 where every box of the last turn holds `truth["answer"]`, or what its "rule" asks for; otherwise 0 and why."""
    return [score(row.truth["answer"], turns[-1], rule_of(row, RULES)) for row, turns in zip(rows, answers, strict=True)]


def boxes(text: str) -> list[str]:
    """Contents of all outermost `\\boxed{...}` with balanced braces, in order; an unclosed box is none."""
    found, at = [], 0
    while (at := text.find("\\boxed{", at)) >= 0:
        begin = end = at + len("\\boxed{")
        depth = 1
        while end < len(text) and depth:
            if text[end] == "\\" and text[end + 1:end + 2] in ("{", "}"):
                end += 1  # an escaped brace is a sign, not a bracket
            elif text[end] in "{}":
                depth += 1 if text[end] == "{" else -1
            end += 1
        if depth == 0:
            found.append(text[begin:end - 1].strip())
        at = begin if depth else end
    return found


def score(gold: str, answer: str, rule: str = RULES[0]) -> Verdict:
    """One answer's verdict by one of `RULES`; may take for ever, as with 9^{9^{9}}."""
    if rule == "deepscaler":
        right, found = deepscaler.right(answer, gold)
        return Verdict(1.0, "right") if right else Verdict(0.0, "no box" if found is None else f"wrong answer: {found[:40]}")
    found = boxes(answer)
    if not found:
        return Verdict(0.0, "no box")
    outcome = _equal(gold, found[-1])
    if outcome != "right":
        return Verdict(0.0, f"{outcome}: {found[-1][:40]}")
    if rule == "every_box" and any(_equal(gold, other) != "right" for other in set(found[:-1])):
        return Verdict(0.0, "several different boxes")
    return Verdict(1.0, "right")


def _equal(gold: str, prediction: str) -> str:
    """"right" or "wrong answer"."""
    values = [text.strip().strip("$").strip() for text in (gold, prediction)]
    if all(re.fullmatch(r"[-+]?[0-9]{1,1000}", text) for text in values):
        return "right" if int(values[0]) == int(values[1]) else "wrong answer"
    return "right" if _same_value(gold, prediction) else "wrong answer"


def load() -> None:
    """Import math-verify, and compare once: the first symbolic comparison is slow, later ones take milliseconds."""
    _same_value("x+1", "1+x")


@functools.lru_cache(maxsize=4096)
def _same_value(gold: str, prediction: str) -> bool:
    """Whether two LaTeX texts from inside of a box have the same value; may take for ever, as with 9^{9^{9}}."""
    parse, verify = _math_verify()
    # No time limit of its own: it could not interrupt C code, and the process that this runs in has one.
    return verify(*(parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, prediction)), timeout_seconds=None)


@functools.cache
def _math_verify() -> tuple[Callable, Callable]:
    """math-verify's `parse`, for boxes only, and `verify`; StudyError where they cannot be imported."""
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise StudyError(f"math-verify cannot be loaded ({error}): "
                         "pip install 'math-verify[antlr4-13-2]==0.9.0'") from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # what it cannot read, the verdict tells
    return functools.partial(parse, extraction_config=[LatexExtractionConfig(boxed_match_priority=0)]), verify
