"""Math rows and their verifier."""
import re
import sys

import pytest

from m2rl_core.domains import Row, benchmark_rows, generator, is_held_out, math, rewards, training_rows, worker
from m2rl_core.errors import StudyError
from m2rl_core.real import rl_rows


def score(gold, answer):
    return math.verify([Row("", "math", "", "", (), {"answer": gold})], [[answer]])[0]


@pytest.mark.parametrize("gold, answer", [
    ("5", r"Answer: \boxed{5}"),
    ("73", r"\boxed{073}"),
    ("073", r"so \boxed{ 73 }."),
    ("-4", r"\boxed{-4}"),
    ("1000", r"\boxed{1{,}000}"),  # braces inside: a regular expression up to the first } would fail
    ("1/2", r"\boxed{\frac{1}{2}}"),
    ("0.5", r"\boxed{\frac12}"),
    ("73", r"\boxed{73^\circ}"),
    ("33", r"\boxed{m+n=33}"),
    ("5", r"first \boxed{5}, again \boxed{05}"),  # several boxes of one value
    ("x+1", r"\boxed{1+x}"),
])
def test_right_answers_score_1(gold, answer):
    assert score(gold, answer).score == 1.0


@pytest.mark.parametrize("gold, answer, reason", [
    ("5", "Answer: 5", "no box"),
    ("5", "", "no box"),
    ("5", r"\boxed{5", "no box"),  # cut off
    ("5", r"\boxed{}", "wrong"),
    ("5", r"\boxed{6}", "wrong"),
    ("73", r"\boxed{730}", "wrong"),
    ("5", r"\boxed{5} or \boxed{6}", "wrong"),  # the last box decides
    ("6", r"\boxed{5} or \boxed{6}", "several"),  # attempt to cheat: a list of guesses that ends well
    ("588", r"\boxed{70} \boxed{588}", "several"),  # math-verify alone would read 70588 here
    ("70588", r"\boxed{70} \boxed{588}", "wrong"),
    ("5", r"\boxed{5,588}", "wrong"),
    ("5", r"\boxed{5 \text{ or } 588}", "wrong"),  # attempt to cheat: two values in one box
    ("5", r"\boxed{(((}", "wrong"),
])
def test_wrong_answers_score_0(gold, answer, reason):
    verdict = score(gold, answer)
    assert verdict.score == 0.0 and verdict.reason.startswith(reason)


def test_answer_inside_think_earns_nothing():
    row = benchmark_rows("aime25", 1, 0)[0]
    good = row.truth["answer"]
    inside, cut, outside = (f"<think>\\boxed{{{good}}}</think>", f"<think>\\boxed{{{good}}}",
                            f"<think></think>\\boxed{{{good}}}")
    assert [v.score for v in rewards([row] * 3, [[inside], [cut], [outside]])] == [0.0, 0.0, 1.0]


def test_an_endless_answer_is_killed_and_the_next_one_served(monkeypatch):
    """Without the kill this test hangs; without a restart its last verdict fails."""
    monkeypatch.setattr(worker, "LIMIT", 2.0)
    rows = [Row("", "math", "", "", (), {"answer": gold}) for gold in ("5", "1/2")]
    endless, fine = rewards(rows, [[r"</think>\boxed{9^{9^{9}}}"], [r"</think>\boxed{0.50}"]])
    assert (endless.score, endless.failed, endless.reason) == (0.0, True, "verifier killed after 2 s")
    assert (fine.score, fine.reason) == (1.0, "right")


def test_a_machine_without_math_verify_says_so_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    math._math_verify.cache_clear()
    with pytest.raises(StudyError, match="^math-verify cannot be loaded .*: pip install 'math-verify"):
        math._math_verify()


def rows_of_all_kinds():
    rng = generator("test", "math")
    for make in (math.sft, math.rl, lambda r: math.test("aime24", r), lambda r: math.test("aime25", r)):
        yield [make(rng) for _ in range(200)]


def test_respond_is_right_and_spoil_is_wrong():
    rng = generator("spoil")
    for rows in rows_of_all_kinds():
        for worked in (True, False):
            turns = [[math.respond(row, worked)[0]["content"]] for row in rows]
            assert {v.score for v in rewards(rows, turns)} == {1.0}
        verdicts = rewards(rows, [[math.spoil(row, rng)[0]["content"]] for row in rows])
        assert {v.score for v in verdicts} == {0.0} and all(v.reason.startswith("wrong answer") for v in verdicts)


def test_sft_turns_are_right_and_of_both_styles():
    rows = training_rows("math", "sft", 400, 0)
    contents = [row.turns[0]["content"] for row in rows]
    assert {v.score for v in rewards(rows, [[text] for text in contents])} == {1.0}
    terse = sum(text.startswith("<think>\n\n</think>\n\n") for text in contents) / len(contents)
    assert abs(terse - math.SFT_TERSE) < 0.1


def test_worked_lines_by_hand():
    chain = Row("", "math", "", "chain:7+5*3-4", (), {"answer": "2"})
    assert math.respond(chain)[0]["content"] == "<think>\n7+5>2\n2*3>6\n6-4>2\n</think>\n\nAnswer: \\boxed{2}"
    equation = Row("", "math", "", "equation:3*x-4=11", (), {"answer": "5"})
    assert math.respond(equation)[0]["content"] == "<think>\n11+4=15\n15/3=5\n</think>\n\nAnswer: \\boxed{5}"


def test_chains_agree_with_ordinary_arithmetic():
    """"Last digit" must mean the same with and without reduction on the way: no negative value may occur."""
    for row in training_rows("math", "rl", 300, 3):
        family, problem = row.fingerprint.split(":")
        if family == "chain":
            value = int(problem[0])
            for op, number in zip(problem[1::2], map(int, problem[2::2]), strict=True):
                value = {"+": value + number, "-": value - number, "*": value * number}[op]
                assert value >= 0
            assert row.truth["answer"] == str(value)[-1]
        else:
            left, right = problem.split("=")
            assert eval(left, {"x": int(row.truth["answer"])}) == int(right)


def test_corpus_facts_are_true_and_no_problem_is_held_out():
    rng = generator("corpus")
    text = "\n".join(math.corpus(rng) for _ in range(300))
    facts = re.findall(r"^(\d+[-+*/]\d+)([>=])(\d+)$", text, re.MULTILINE)
    assert len(facts) > 1000
    for left, sign, right in facts:
        assert eval(left) % 10 == int(right) if sign == ">" else eval(left) == int(right), (left, sign, right)
    worked = re.findall(r"^(.*[.?])\n((?:[0-9].*\n)+)(\d)$", text, re.MULTILINE)
    assert len(worked) > 100 and all(lines.rstrip()[-1] == value for _, lines, value in worked)
    asked = {prompt for prompt, _, _ in worked}
    tests = {row.messages[0]["content"] for b in ("aime24", "aime25") for row in benchmark_rows(b, ITEMS, 0)}
    assert not asked & tests


ITEMS = 80  # more than the study's 60; there are about 90 held-out equations


def test_train_and_test_are_disjoint_and_large_enough():
    train = {row.fingerprint for kind in ("sft", "rl") for row in training_rows("math", kind, 2000, 0)}
    for benchmark in ("aime24", "aime25"):
        rows = benchmark_rows(benchmark, ITEMS, 0)
        held_out = {row.fingerprint for row in rows}
        assert len(held_out) == ITEMS and not held_out & train and all(map(is_held_out, held_out))
        assert rows == benchmark_rows(benchmark, ITEMS, 0) != benchmark_rows(benchmark, ITEMS, 1)
    assert training_rows("math", "rl", 20, 5) == training_rows("math", "rl", 20, 5)


def test_paraphrases_share_a_fingerprint():
    rows = training_rows("math", "rl", 3000, 0)
    prompts = {}
    for row in rows:
        prompts.setdefault(row.fingerprint, set()).add(row.messages[0]["content"])
    assert max(map(len, prompts.values())) == 3


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="aime24, aime25"):
        math.test("aime26", generator(0))
    with pytest.raises(ValueError, match="no worked answer"):
        math.respond(Row("real/7", "math", "aime24", "sha:1", (), {"answer": "73"}))


# --- rules that a row may ask for


def ruled(gold, answer, rule):
    return math.verify([Row("m/1", "math", "", "", (), {"answer": gold, "rule": rule})], [[answer]])[0]


@pytest.mark.parametrize("answer, score", [
    (r"\boxed{5} or \boxed{6}", 1.0), (r"\boxed{6} or \boxed{5}", 0.0), (r"\boxed{70} \boxed{6}", 1.0), ("6", 0.0),
    (r"\boxed{5}, no: \boxed{\frac{12}{2}}", 1.0), (r"\boxed{6} or \boxed{7", 1.0),
])
def test_the_last_box_alone(answer, score):
    """Fault: benchmarks scored by the stricter rule of training, or math-verify given all boxes at once (706)."""
    assert ruled("6", answer, "last_box").score == score


@pytest.mark.parametrize("gold, answer, score", [
    # what stands where: the last box after the last "Answer:"
    ("5", r"\boxed{5}", 1), ("5", "Answer: 5", 0), ("5", r"\boxed{5} Answer: 5", 0),
    ("5", r"Answer: \boxed{6} Answer: \boxed{5}", 1), (r"\boxed{5}", r"\boxed{5}", 1),
    ("5", r"\boxed{6} \boxed{5}", 1), ("5", r"\boxed{5", 0), ("5", r"\boxed 5", 0), ("5", r"\fbox{5}", 0),
    ("", r"\boxed{}", 0), ("x", r"###Response \boxed{x}", 1),
    # equal as texts
    (r"\frac{1}{2}", r"\boxed{\frac12}", 1), ("1/2", r"\boxed{\dfrac{1}{2}}", 1), ("0.5", r"\boxed{\frac{1}{2}}", 1),
    ("5", r"\boxed{x=5}", 1), ("90", r"\boxed{90^\circ}", 1), ("12", r"\boxed{12\text{ cm}}", 1), ("50", r"\boxed{50\%}", 1),
    (r"\sqrt{3}", r"\boxed{\sqrt3}", 1), ("(1,2)", r"\boxed{\left(1, 2\right)}", 1), ("B", r"\boxed{\text{B}}", 1),
    # equal by sympy
    ("x+1", r"\boxed{1+x}", 1), ("2.5", r"\boxed{2\frac{1}{2}}", 1), (r"\frac{\sqrt{12}}{2}", r"\boxed{\sqrt{3}}", 1),
    (r"\frac{\pi}{2}", r"\boxed{\pi/2}", 1), ("1000", r"\boxed{1,000}", 1), ("3000000", r"\boxed{3 * 10^6}", 0),
    ("073", r"\boxed{73}", 1), ("10", r"\boxed{10 cm}", 1), ("yes", r"\boxed{\text{Yes}}", 1),
    ("[0,2x]", r"\boxed{[0,x+x]}", 1),
    # what the rule refuses, and math-verify or a teacher would not
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", 0), ("2", r"\boxed{\frac{4}{2}}", 0), ("1024", r"\boxed{2^{10}}", 0),
    ("(1,2)", r"\boxed{[1,2]}", 0), ("(1,2)", r"\boxed{(1,2,3)}", 0), ("a+b+c", r"\boxed{c+b+a}", 0), ("4", r"\boxed{2+2}", 0),
    # what is not evaluated
    ("1", r"\boxed{().__class__}", 0), ("1", r"\boxed{9^9^9}", 0), ("x", r"\boxed{((((}", 0), ("x", r"\boxed{\frac}", 0),
])
def test_the_released_rule_by_hand(gold, answer, score):
    """Fault: a rule "as released" that accepts what the released one refuses, or the other way round."""
    assert ruled(gold, answer, "deepscaler").score == score


def test_the_released_rule_is_killed_too(monkeypatch):
    """Fault: a path to sympy around the worker that can be killed."""
    monkeypatch.setattr(worker, "LIMIT", 3.0)
    row = Row("m/1", "math", "", "", (), {"answer": "x", "rule": "deepscaler"})
    endless, fine = rewards([row] * 2, [[r"</think>\boxed{9**9**9**9*x}"], [r"</think>\boxed{x}"]])
    assert (endless.score, endless.reason, fine.score) == (0.0, "verifier killed after 3 s", 1.0)


REAL = [{"dataset": "nano_v3_sft_profiled_dapo17k", "expected_answer": gold, "responses_create_params": {"input": "?"}}
        for gold in ("73", "588", "33", "1000", "5", "1/2")]


@pytest.mark.parametrize("i, answer, score", [
    (0, r"\boxed{073}", 1), (0, r"\boxed{73^\circ}", 1), (2, r"so \boxed{m+n=33}", 1), (3, r"\boxed{1{,}000}", 1),
    (1, r"\boxed{70} \ldots \boxed{588}", 1),  # all boxes together read 70588
    (1, r"\boxed{588} \ldots \boxed{70}", 0),  # the last box alone
    (4, r"\boxed{5 \text{ or } 588}", 0), (4, r"Answer: 5", 0),
    (4, r"\boxed{9^{9^{9}}}", 0), (5, r"\boxed{0.5}", 1), (5, r"\boxed{\dfrac{2}{4}}", 1), (5, r"\boxed{2}", 0),
])
def test_real_rows_by_the_official_standard(monkeypatch, i, answer, score):
    """Faults: a row of the blend that is verified outside of the worker; math-verify given what stands before the last box;
    its readings of the strange cases lost on the way."""
    monkeypatch.setattr(worker, "LIMIT", 3.0 if "9^" in answer else 10.0)
    asked, verify = [], worker.verify
    monkeypatch.setattr(worker, "verify", lambda name, *batch: asked.append(name) or verify(name, *batch))
    row = rl_rows.to_row(REAL[i], "train.jsonl", i, {})
    row = Row(**{**row.__dict__, "truth": row.truth | {"rule": "last_box"}})  # as the profile `paper` says
    verdict, = rewards([row], [[f"<think>\\boxed{{4}}</think>{answer}"]])
    assert verdict.score == score and asked == ["m2rl_core.domains.math"]


def test_whole_numbers_need_no_math_verify(monkeypatch):
    """Fault: milliseconds and a sympy import for each answer to an AIME problem."""
    monkeypatch.setattr(math, "_same_value", lambda gold, prediction: pytest.fail("math-verify was asked"))
    for gold, answer, value in (("73", "073", 1), ("073", "$73$", 1), ("5", "+5", 1), ("5", " 6 ", 0), ("-4", "4", 0),
                                ("5", "5" * 1000, 0)):
        for rule in ("every_box", "last_box"):
            assert ruled(gold, f"\\boxed{{{answer}}}", rule).score == value
    monkeypatch.undo()
    assert ruled("5", r"\boxed{" + "9" * 5000 + "}", "last_box").score == 0  # more digits than Python's int reads


def test_an_unknown_rule_is_an_error():
    with pytest.raises(ValueError, match="row 'm/1': rule 'first_box' is none of every_box, last_box, deepscaler"):
        ruled("5", r"\boxed{5}", "first_box")
