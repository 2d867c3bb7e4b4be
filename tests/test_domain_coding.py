"""The coding domain: rows that hold together, tests that tell right from wrong, and a verifier that is not fooled."""
from __future__ import annotations

import os
import random
import shutil

import pytest

from m2rl_core import sandbox
from m2rl_core.domains import (
    Row, benchmark_rows, coding, generator, is_held_out, livecodebench, module, programs, rewards, training_rows)
from m2rl_core.sandbox.interpreter import Interpreter

ADD_UP = {"unit_tests": {"inputs": ["1 2 3\n", "-4 6\n", "7\n"], "outputs": ["4\n", "0\n", "7\n"]}}  # sum of the odd
RIGHT = "print(sum(x for x in map(int,input().split()) if x%2==1))"
ROW = Row("hand/0", "coding", "hand", "coding: odd, sum", ({"role": "user", "content": "?"},), ADD_UP)


needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None,
                                 reason="bwrap is not installed: apt-get install bubblewrap")


def block(code: str) -> str:
    return f"```python\n{code}\n```"


def verdict(answer: str, row: Row = ROW):
    return coding.verify([row], [[answer]])[0]


# --- compositions, by hand


@pytest.mark.parametrize(("name", "numbers", "printed", "code"), [
    ("coding: even, sum", [1, 2, -4, 6], "4", "print(sum([x for x in map(int,input().split()) if x%2==0]))"),
    ("coding: odd, last", [-3, 2, -5, 8], "-5", "print([x for x in map(int,input().split()) if x%2==1][-1])"),
    ("coding: divisible 3, count", [0, 3, 4, -6], "3", "print(len([x for x in map(int,input().split()) if x%3==0]))"),
    ("coding: greater 5, square, smallest", [5, 6, 9], "36",
     "print(min([x**2 for x in map(int,input().split()) if x>5]))"),
    ("coding: subtract 4, all", [1, 9], "-3 5", "print(*[x-4 for x in map(int,input().split())])"),
    ("coding: add 3, less 5, largest", [0, 1, 2, 9], "4",
     "print(max([x+3 for x in map(int,input().split()) if (x+3)<5]))"),
    ("coding: even, add 1, square, first", [3, 4, 6], "25",
     "print([(x+1)**2 for x in map(int,input().split()) if x%2==0][0])"),
    ("coding: even, square, negate, sum", [2, 3], "-4",
     "print(sum([-(x**2) for x in map(int,input().split()) if x%2==0]))"),
    ("coding: times 3, negate, sum", [1, 2], "-9", "print(sum([-(x*3) for x in map(int,input().split())]))"),
    ("coding: even, first", [1, 3], None, "print([x for x in map(int,input().split()) if x%2==0][0])"),
])
def test_what_a_composition_computes_and_how_it_is_written(name, numbers, printed, code):
    """Catches a swapped order, a missing bracket, and a fingerprint that loses a constant."""
    parts = programs.parts_of(name)
    assert programs.fingerprint(parts) == name
    assert programs.evaluate(parts, numbers) == printed
    assert programs.program(parts)[0] == code


def test_a_foreign_fingerprint_is_named():
    for name in ("math: 1+1", "coding: even", "coding: odd 3, fly, sum"):
        with pytest.raises(ValueError, match="not a coding row of the miniature"):
            programs.parts_of(name)


def test_a_composition_with_an_idle_part_gets_no_tests():
    """The largest of those greater than 5 is the largest: no input shows whether the choice was made."""
    rng = random.Random(0)
    assert programs.draw_tests(rng, programs.parts_of("coding: greater 5, largest")) is None
    assert programs.draw_tests(rng, programs.parts_of("coding: times 4, odd, sum")) is None  # nothing is ever left
    assert programs.draw_tests(rng, programs.parts_of("coding: less 5, largest")) is not None


# --- rows


@pytest.fixture(scope="module")
def rows():
    return (training_rows("coding", "sft", 150, 0) + training_rows("coding", "rl", 150, 0)
            + benchmark_rows("lcb_v5", 60, 0) + benchmark_rows("lcb_v6", 60, 0))


def test_right_answers_score_one_and_spoiled_ones_zero(rows):
    """Catches an answer that its own tests refuse, and tests that a slip passes."""
    rng = random.Random(1)
    for worked in (True, False):
        found = rewards(rows, [[turn["content"] for turn in coding.respond(row, worked)] for row in rows])
        assert [verdict.reason for verdict in found] == ["right"] * len(rows)
    found = rewards(rows, [[turn["content"] for turn in coding.spoil(row, rng)] for row in rows])
    assert [verdict.score for verdict in found] == [0.0] * len(rows)
    assert all(verdict.reason.startswith(("wrong answer", "input ")) for verdict in found)


def test_the_miniature_is_served_without_a_sandbox(rows, monkeypatch):
    """Catches an answer of ours outside of the restricted interpreter's grammar, and other code that it pays."""
    monkeypatch.setattr(sandbox, "_shared", [(os.getpid(), Interpreter("a test"))])
    found = rewards(rows, [[turn["content"] for turn in coding.respond(row)] for row in rows])
    assert [verdict.reason for verdict in found] == ["right"] * len(rows)
    assert verdict(block("import sys\n" + RIGHT)).reason == "input 1: not in the miniature's grammar: Import in line 1"


def test_leaving_out_a_part_shows_on_some_test(rows):
    for row in rows:
        parts, tests = programs.parts_of(row.fingerprint), row.truth["unit_tests"]
        lists = [[int(word) for word in text.split()] for text in tests["inputs"]]
        outputs = [output.removesuffix("\n") for output in tests["outputs"]]
        assert len(lists) == 5 and [programs.evaluate(parts, numbers) for numbers in lists] == outputs
        for i in range(len(parts) - 1):
            less = parts[:i] + parts[i + 1:]
            assert [programs.evaluate(less, numbers) for numbers in lists] != outputs, (row.fingerprint, i)


def test_nothing_of_a_benchmark_is_trained_on(rows):
    """Catches a composition on both sides, a benchmark of the wrong shape, and too few items."""
    train = {row.fingerprint for row in rows[:300]}
    v5, v6 = rows[300:360], rows[360:]
    held_out = {row.fingerprint for row in v5 + v6}
    assert len(held_out) == 120 and not held_out & train and all(map(is_held_out, held_out))
    keeps, changes, prints = programs.KEEPS, programs.CHANGES, programs.PRINTS
    for benchmark, shapes in ((v5, ([keeps, prints], [changes, prints], [keeps, changes, prints])),
                              (v6, ([changes, keeps, prints], [keeps, changes, changes, prints]))):
        for row in benchmark:
            names = [name for name, _ in programs.parts_of(row.fingerprint)]
            assert any(len(names) == len(shape) and all(map(lambda name, kind: name in kind, names, shape))
                       for shape in shapes), row.fingerprint
    assert len(benchmark_rows("lcb_v5", 300, 3)) == len(benchmark_rows("lcb_v6", 300, 3)) == 300


def test_sft_shows_a_part_of_the_kinds_and_rl_more():
    kinds = {}
    for kind in ("sft", "rl"):
        found = training_rows("coding", kind, 400, 0)
        kinds[kind] = {tuple(name for name, _ in programs.parts_of(row.fingerprint)) for row in found}
        assert all(coding.shown(programs.parts_of(row.fingerprint)) for row in found) == (kind == "sft")
    assert len({k for k in kinds["rl"] if len(k) > 2} - kinds["sft"]) > 30
    terse = sum("<think>\n\n</think>" in row.turns[0]["content"] for row in training_rows("coding", "sft", 400, 0))
    assert 150 < terse < 250


def test_rows_repeat_and_survive_json(rows):
    assert training_rows("coding", "sft", 20, 0) == rows[:20]
    assert training_rows("coding", "sft", 20, 1) != rows[:20]
    assert [Row.from_json(row.to_json()) for row in rows[:5]] == rows[:5]
    assert module("coding") is coding


def test_texts_are_short(rows):
    """Catches texts too long for the model, a terse answer that works after all, and a growing vocabulary."""
    for row in rows:
        assert len(row.messages) == 1 and len(row.messages[0]["content"]) <= 160
        assert row.messages[0]["content"].isascii()
        assert len(coding.respond(row)[0]["content"]) <= 180
        assert not any(char.isdigit() for char in coding.respond(row, worked=False)[0]["content"].split("```")[0])
    words = {word.strip(".,").lower() for row in rows for word in row.messages[0]["content"].split()}
    assert len(words - set("123456789")) <= 50


def test_pretraining_texts_hold_parts_and_no_composition():
    for i in range(50):
        text = coding.corpus(generator(i))
        assert text.count("\n") == 9 and " if " not in text and text.isascii()
        last = text.splitlines()[-1]
        assert last.startswith("print(") and "[x for x in map(int,input().split())]" in last


# --- the verifier


@pytest.mark.parametrize(("answer", "reason"), [
    (block(RIGHT), "right"),
    (f"Here it is:\n{block(RIGHT)}\nDone.", "right"),
    (block("print(0)") + "\nno, this:\n" + block(RIGHT), "right"),  # the last block counts
    (block(RIGHT + "\nimport sys\nsys.exit()"), "right"),
    (block(RIGHT.replace("print(", "print(' ',") + "\nprint()"), "right"),  # outer spaces and lines do not count
    (block(RIGHT.replace("print(", "print(1.0*")), "right"),  # 4.0 is 4 as a decimal number
    (block(RIGHT) + "\n" + block("print(0)"), "wrong answer on input 1: 0"),
    (block("print(4)"), "wrong answer on input 2: 4"),  # the expected output of one test
    (block("print(4)\nprint(0)\nprint(7)"), "wrong answer on input 1: 4 0 7"),  # of all of them
    (block("print('4\\n0\\n7')"), "wrong answer on input 1: 4 0 7"),
    (block(""), "wrong answer on input 1: "),
    (block(RIGHT.replace("==1", "==0")), "wrong answer on input 1: 2"),
    (block(RIGHT + "\n1/0"), "input 1: ZeroDivisionError: division by zero"),  # printed, then failed
    (block(RIGHT + "\nimport sys\nsys.exit(1)"), "input 1: exit code 1"),
    (block("print('snan')"), "wrong answer on input 1: snan"),
    (block("print('4 ' * 2)"), "wrong answer on input 1: 4 4"),
    (block("class Same(str):\n    __eq__ = lambda a, b: True\nprint(Same('9'))"), "wrong answer on input 1: 9"),
    (RIGHT, "no code block"),
    ("```\n" + RIGHT + "\n```", "no code block"),
    ("```python\n" + RIGHT, "no code block"),  # never closed
    ("", "no code block"),
])
@needs_bwrap
def test_verdicts(answer, reason):
    """Hand-worked answers to "the sum of the odd ones"; catches each of the ways to be paid for less."""
    found = verdict(answer)
    assert (found.reason, found.score) == (reason, float(reason == "right"))


def test_code_inside_think_is_not_an_answer():
    """Catches a program that is taken from before </think>."""
    found = rewards([ROW, ROW], [[f"<think>\n{block(RIGHT)}\n</think>\n\nI am done."], [block(RIGHT)]])
    assert [(one.score, one.reason) for one in found] == [(0.0, "no code block"), (0.0, "no </think>")]


@needs_bwrap
def test_one_bad_program_costs_the_batch_nothing():
    bad = ["while True: pass", "import os\nos.kill(os.getppid(), 9)", "print('9' * 10**7)"]
    found = coding.verify([ROW] * 6, [[block(code)] for one in bad for code in (one, RIGHT)])
    assert [one.score for one in found] == [0.0, 1.0] * 3
    assert coding.verify([], []) == []


def test_a_row_without_tests_is_an_error_not_a_pass():
    for tests in ({"inputs": [], "outputs": []}, {"inputs": ["1"], "outputs": []}):
        row = Row(**{**ROW.__dict__, "truth": {"unit_tests": tests}})
        with pytest.raises(ValueError, match="row 'hand/0': unit_tests needs"):
            verdict(block(RIGHT), row)


@pytest.mark.parametrize(("got", "want", "equal"), [
    ("4\n", "4", True), (" 4 \n\n", "4\n", True), ("4.00", "4", True), ("1e1 2", "10 2.0", True), ("4\n5",
    "4 5", False),
    ("0.1", "0.10000000000000001", False), ("nan", "nan", True), ("nan", "0", False), ("snan", "snan ", True),
    ("snan", "1", False), ("Yes", "yes", False), ("a 1", "a 1.0", False), ("", "0", False), ("4\n\n5", "4\n5", False),
])
def test_comparison_as_in_livecodebench(got, want, equal):
    assert livecodebench.same(got, want) is equal
