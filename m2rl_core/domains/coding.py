"""Coding: a prompt asks for a small program over a line of integers; the answer must pass all of its unit tests.

"lcb_v5" (miniature): parts that training shows, in compositions that it does not. "lcb_v6" (miniature): longer ones,
with two changes or a change before the choice. Programs run in the sandbox, as in LiveCodeBench; expected outputs
come from `programs.evaluate`, never from running text, and stay outside of the sandbox.
"""
from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from random import Random

from m2rl_core import sandbox
from m2rl_core.domains import Row, Verdict, livecodebench, programs
from m2rl_core.domains.programs import CHANGES, KEEPS, PRINTS, READ, Parts
from m2rl_core.errors import one_line

# Difficulty, in one place. SFT sees a part of the kinds of compositions and half of its rows answer without working.
SFT_TERSE = 0.5  # share of SFT rows with an empty <think>
SFT_KINDS = 0.25  # share of the kinds of "both" and "long" compositions that SFT shows; of the others it shows all
SFT_SHAPES = {"keep": 0.47, "change": 0.48, "both": 0.03, "long": 0.02}  # shares of the shapes of compositions
RL_SHAPES = {"keep": 0.1, "change": 0.1, "both": 0.2, "long": 0.6}
TEST_SHAPES = {"lcb_v5": {"keep": 0.1, "change": 0.1, "both": 0.8}, "lcb_v6": {"long": 1.0}}


def corpus(rng: Random) -> str:
    """Lines of code for a few parts, with the words for each: no composition, so none that is held out."""
    lines = []
    for _ in range(2):
        keep, change = programs.draw_part(rng, KEEPS), programs.draw_part(rng, CHANGES)
        lines += [f"# keep {programs.words(keep)}", f"if {programs.python(keep)}"]
        lines += [f"# {programs.words(change, rng.choice(('each', 'each one', 'them')))}", programs.python(change)]
    last = rng.choice(tuple(PRINTS)), None
    return "\n".join([*lines, f"# print {programs.words(last)}",
                      f"print({programs.python(last, f'[x for x in {READ}]')})"])


def sft(rng: Random) -> Row:
    """A training row with its answer, worked or terse, of a kind of composition that SFT shows."""
    row = _row(rng, SFT_SHAPES, "Code", shown)
    return Row(**{**row.__dict__, "turns": tuple(respond(row, worked=rng.random() >= SFT_TERSE))})


def rl(rng: Random) -> Row:
    """An RLVR prompt, of any kind of composition."""
    return _row(rng, RL_SHAPES, "programs")


def test(benchmark: str, rng: Random) -> Row:
    """An item of the miniature `lcb_v5` or `lcb_v6`."""
    return _row(rng, TEST_SHAPES[benchmark], benchmark)


test.__test__ = False  # it makes rows: not for pytest to collect


def respond(row: Row, worked: bool = True) -> list[dict]:
    """The right answer; worked: the parts are named first, in the order of the work."""
    return _answer(programs.parts_of(row.fingerprint), worked)


def spoil(row: Row, rng: Random) -> list[dict]:
    """An answer of the right format whose program prints something else on at least one of the row's tests."""
    tests = row.truth["unit_tests"]
    lists = [[int(word) for word in text.split()] for text in tests["inputs"]]
    wrong = [slip for slip in programs.slips(programs.parts_of(row.fingerprint))
             if any(programs.evaluate(slip, numbers) != output.strip()
                    for numbers, output in zip(lists, tests["outputs"], strict=True))]
    return _answer(rng.choice(wrong), rng.random() >= SFT_TERSE)


def shown(parts: Parts) -> bool:
    """Whether SFT shows this kind of composition: its names without constants decide, by SHA-256."""
    kind = " ".join(name for name, _ in parts)
    return len(parts) == 2 or int(hashlib.sha256(kind.encode()).hexdigest()[:8], 16) / 16**8 < SFT_KINDS


def _row(rng: Random, shapes: dict[str, float], source: str, allowed: Callable[[Parts], bool] = lambda _: True) -> Row:
    shape, tests = rng.choices(tuple(shapes), tuple(shapes.values()))[0], None
    while tests is None:
        parts = programs.draw_composition(rng, shape)
        tests = programs.draw_tests(rng, parts) if allowed(parts) else None
    messages = ({"role": "user", "content": programs.prompt(rng, parts)},)
    return Row("", "coding", source, programs.fingerprint(parts), messages, {"unit_tests": tests})


def _answer(parts: Parts, worked: bool) -> list[dict]:
    code, steps = programs.program(parts)
    work = "\n".join(steps) if worked else ""
    return [{"role": "assistant", "content": f"<think>\n{work}\n</think>\n\n```python\n{code}\n```"}]


# --- the verifier


def verify(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Verdict]:
    """1.0 where the last python block passes every unit test; all programs run in one batch in the sandbox.

    `truth` holds `unit_tests` {inputs, outputs}, and may hold `cpu_seconds` (all tests together, default 1), or else
    LiveCodeBench's fields, see `livecodebench.verify`. ValueError names a row without tests.
    """
    verdicts: list[Verdict | None] = [None] * len(rows)
    official = [i for i, row in enumerate(rows) if "private_test_cases" in row.truth]
    others = [i for i in range(len(rows)) if i not in set(official)]
    for check, places in ((_unit_tests, others), (livecodebench.verify, official)):
        found = check([rows[i] for i in places], [answers[i] for i in places]) if places else []
        for i, verdict in zip(places, found, strict=True):
            verdicts[i] = verdict
    return verdicts


def _unit_tests(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Verdict]:
    batch: dict[int, sandbox.Program] = {}
    for i, (row, turns) in enumerate(zip(rows, answers, strict=True)):
        tests = row.truth["unit_tests"]
        if not tests["inputs"] or len(tests["inputs"]) != len(tests["outputs"]):
            raise ValueError(f"row {row.id!r}: unit_tests needs as many inputs as outputs, and at least one")
        code = code_of(turns[-1])
        if code is not None:
            batch[i] = sandbox.Program(code, tuple(tests["inputs"]), row.truth.get("cpu_seconds", 1))
    outcomes = dict(zip(batch, sandbox.shared().run(list(batch.values())), strict=True)) if batch else {}
    return [_verdict(outcomes[i], row.truth["unit_tests"]["outputs"]) if i in outcomes
            else Verdict(0.0, "no code block") for i, row in enumerate(rows)]


def code_of(answer: str) -> str | None:
    """The text of the last closed ```python block; None where there is none."""
    blocks = re.findall(r"```python[ \t]*\n(.*?)```", answer, re.DOTALL)
    return blocks[-1] if blocks else None


def _verdict(outcome: sandbox.Outcome, expected: Sequence[str]) -> Verdict:
    for number, (got, want) in enumerate(zip(outcome.outputs, expected, strict=True), 1):
        if got is None:
            return Verdict(0.0, outcome.error)
        if not livecodebench.same(got, want):
            return Verdict(0.0, f"wrong answer on input {number}: {one_line(got, 40)}")
    return Verdict(1.0, "right")
