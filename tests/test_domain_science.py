"""Science rows and their verifier."""
import pytest

from m2rl_core.domains import Row, benchmark_rows, generator, is_held_out, letters, rewards, science, training_rows
from m2rl_core.errors import StudyError


def score(truth, answer):
    return science.verify([Row("", "science", "", "", (), truth)], [[answer]])[0].score


@pytest.mark.parametrize("answer, letter", [
    ("Answer: C", "C"),
    ("the answer depends on A. Answer: B", "B"),  # the authors' first-match rule reads D here
    ("Answer: A, no. Wait.\nAnswer: D", "D"),  # the last one decides
    ("**Answer:** C", "C"),
    ("**Answer: (C)**", "C"),
    (r"Answer: \boxed{C}", "C"),
    (r"Answer: $\boxed{\text{C}}$", "C"),
    ("Final answer: C) 12 C", "C"),
    ("Exact Answer: B\nConfidence: 90%", "B"),
    ("Answer:\nA", "A"),
    ("The answer is C.", None),  # not anchored
    ("C", None),
    ("A) 12 N", None),
    ("Answer: carbon", None),
    ("Answer: Carbon", None),
    ("Answer: c", None),
    ("Answer: 12 N", None),
    ("Answer: A or B", None),  # attempts to cheat: several letters at once
    ("Answer: A, B, C, D", None),
    ("Answer: A/B", None),
    ("", None),
])
def test_letter_of(answer, letter):
    assert science.letter_of(answer) == letter


def test_letters_reach_as_far_as_the_options():
    assert science.letter_of("Answer: J") is None
    assert science.letter_of("Answer: J", options=10) == "J"
    assert score({"letter": "J", "options": 10}, "Answer: J") == 1.0
    assert score({"letter": "C", "options": 4}, "Answer: E") == 0.0


@pytest.mark.parametrize("expected, answer, right", [
    ("12 N", "Exact Answer: 12 N", True),
    ("12 N", "exact answer: 12N.", True),
    ("12 N", "**Exact Answer:** 12.0 n\nConfidence: 90%", True),
    ("12 N", r"Exact Answer: \boxed{12 \text{ N}}", True),
    ("12 m/s", "Exact Answer: 12 m / s", True),
    ("carbon", "Exact Answer: Carbon", True),
    ("6", "Exact Answer: 06", True),
    ("12 N", "Exact Answer: 12 J", False),  # the right number in a wrong unit
    ("12 N", "Exact Answer: 12", False),
    ("12 N", "Exact Answer: 1.2 N", False),
    ("12 N", "Exact Answer: 12 N or 13 N", False),  # attempt to cheat
    ("12 N", "Exact Answer: 12 N\nExact Answer: 13 N", False),  # the last one decides
    ("12 N", "Answer: 12 N", False),
    ("12 N", "12 N", False),
    ("12 N", "Exact Answer:", False),
    ("2", "Exact Answer: 20", False),
])
def test_exact_answers(expected, answer, right):
    assert score({"exact": expected}, answer) == float(right)


def test_truth_of_another_kind_is_an_error():
    with pytest.raises(ValueError, match="'letter' or 'exact'"):
        score({"answer": "C"}, "Answer: C")


def test_answer_inside_think_earns_nothing():
    row = benchmark_rows("gpqa_diamond", 1, 0)[0]
    good = f"Answer: {row.truth['letter']}"
    turns = [[f"<think>{good}</think>"], [f"<think>{good}"], [good], [f"<think></think>{good}"]]
    assert [v.score for v in rewards([row] * 4, turns)] == [0.0, 0.0, 0.0, 1.0]


def rows_of_all_kinds():
    rng = generator("test", "science")
    for make in (science.sft, science.rl, lambda r: science.test("gpqa_diamond", r), lambda r: science.test("hle", r)):
        yield [make(rng) for _ in range(200)]


def test_respond_is_right_and_spoil_is_wrong():
    rng = generator("spoil")
    for rows in rows_of_all_kinds():
        for worked in (True, False):
            turns = [[science.respond(row, worked)[0]["content"]] for row in rows]
            assert {v.score for v in rewards(rows, turns)} == {1.0}
        verdicts = rewards(rows, [[science.spoil(row, rng)[0]["content"]] for row in rows])
        assert {v.score for v in verdicts} == {0.0} and all(v.reason.startswith("wrong answer") for v in verdicts)


def test_sft_turns_are_right_and_of_both_styles():
    rows = training_rows("science", "sft", 400, 0)
    contents = [row.turns[0]["content"] for row in rows]
    assert {v.score for v in rewards(rows, [[text] for text in contents])} == {1.0}
    terse = [text.startswith("<think>\n\n</think>\n\n") for text in contents]
    opened = ["exact" in row.truth for row in rows]
    assert not any(t and not o for t, o in zip(terse, opened, strict=True))
    assert abs(sum(terse) / sum(opened) - science.SFT_TERSE) < 0.1


def test_worked_lines_by_hand():
    prompt = "Given mass 3 kg and acceleration 4 m/s^2, find the force.\n7 N (A)\n13 N (B)\n12 N (C)\n12 J (D)"
    message = ({"role": "user", "content": prompt},)
    choice = Row("", "science", "", "formula:force:3:4", message, {"letter": "C", "options": 4})
    work = "<think>\nforce=mass*acceleration\n3*4=12\n"
    assert science.respond(choice)[0]["content"] == work + "12 N (C)\n</think>\n\nAnswer: C"
    opened = Row("", "science", "", "formula:force:3:4", ({"role": "user", "content": "?"},), {"exact": "12 N"})
    assert science.respond(opened)[0]["content"] == work + "</think>\n\nExact Answer: 12 N"


def test_one_option_is_right_and_all_differ():
    """Recomputes the value from the prompt alone: a shuffled operand or a second right option would show."""
    for row in training_rows("science", "rl", 500, 2):
        family, name, *numbers = row.fingerprint.split(":")
        options = science._options(row)
        assert len(options) == len(set(options)) == row.truth.get("options", 0)
        if family == "formula":
            op, unit = science.FORMULAS[name][1], science.FORMULAS[name][3]
            value = f"{eval(numbers[0] + op + numbers[1]):g} {unit}"
            for number, place in zip(numbers, (4, 5), strict=True):
                assert f"{number} {science.FORMULAS[name][place]}" in row.messages[0]["content"]
            assert value == (options[ord(row.truth["letter"]) - 65] if options else row.truth["exact"])
            assert options.count(value) == bool(options)


def test_element_facts():
    facts = {element[0]: element[1:] for element in science.ELEMENTS}
    assert len(facts) == 20
    assert facts["hydrogen"] == ("1", "H") and facts["sodium"] == ("11", "Na") and facts["calcium"] == ("20", "Ca")


def test_corpus_arithmetic_is_true():
    rng = generator("corpus")
    lines = "\n".join(science.corpus(rng) for _ in range(200)).split("\n")
    sums = [line for line in lines if line[0].isdigit() and "=" in line]
    assert len(sums) > 100
    for line in sums:
        left, right = line.split("=")
        assert eval(left) == int(right)


def test_corpus_asks_nothing_held_out():
    rng = generator("corpus")
    text = "\n".join(science.corpus(rng) for _ in range(3000))
    assert text.count("?") > 300  # problems are worked there
    assert not [row.id for b in ("hle", "gpqa_diamond") for row in benchmark_rows(b, ITEMS, 0)
                if row.fingerprint.startswith("formula") and row.messages[0]["content"] in text]


ITEMS = 80  # as the study asks


def test_train_and_test_are_disjoint_and_large_enough():
    train = {row.fingerprint for kind in ("sft", "rl") for row in training_rows("science", kind, 3000, 0)}
    for benchmark in ("gpqa_diamond", "hle"):
        rows = benchmark_rows(benchmark, ITEMS, 0)
        held_out = {row.fingerprint for row in rows}
        assert len(held_out) == ITEMS and not held_out & train and all(map(is_held_out, held_out))
        assert 0.15 < sum(f.startswith("element") for f in held_out) / ITEMS < 0.4
        assert rows == benchmark_rows(benchmark, ITEMS, 0) != benchmark_rows(benchmark, ITEMS, 1)
        assert len({row.truth.get("letter", "open") for row in rows}) == (4 if benchmark == "gpqa_diamond" else 1)
    assert training_rows("science", "rl", 20, 5) == training_rows("science", "rl", 20, 5)


def test_both_forms_of_a_formula_share_a_fingerprint():
    """Otherwise an item of one benchmark could be trained on in the other form."""
    forms = {}
    for row in training_rows("science", "rl", 3000, 0):
        if row.fingerprint.startswith("formula"):
            forms.setdefault(row.fingerprint, set()).add(row.source)
    assert {"choice", "open"} in forms.values()


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="gpqa_diamond, hle"):
        science.test("gpqa", generator(0))
    with pytest.raises(ValueError, match="no worked answer"):
        science.respond(Row("real/7", "science", "hle", "sha:1", ({"role": "user", "content": "?"},), {"exact": "7"}))


# --- the released rule


@pytest.mark.parametrize("answer, ours, released", [
    ("Answer: C", "C", "C"),
    ("the answer depends on A. Answer: B", "B", "D"),  # "answer d..."
    ("Choice B looks right, but the option is C.\nAnswer: C", "C", "B"),  # the first hit
    ("An answer is not easy. Answer: B", "B", "B"),  # "answer is n...": N is no option, so the last capital of all
    ("Answer: A\nAnswer: B", "B", "A"),
    ("C is correct.", None, "C"),
    ("Final option: b", None, "B"),
    ("It must be (D).", None, "D"),  # the last capital that stands alone
    ("A or B", None, "B"),
    ("Answer: J", None, None),
    ("no letter", None, None),
    ("**Answer:** C", "C", "C"),  # the marks keep the pattern from hitting, the last capital saves it
    ("The best choice: elements", None, "E"),
])
def test_letters_by_both_rules(answer, ours, released):
    """Fault: a rule "as released" that reads other letters than the released one."""
    assert science.letter_of(answer) == ours
    assert letters.first_letter_of(answer) == released


def test_a_row_asks_for_the_released_rule():
    answer = "the answer depends on A. Answer: B"
    assert score({"letter": "B"}, answer) == score({"letter": "D", "rule": "first_letter"}, answer) == 1.0
    assert score({"letter": "B", "rule": "first_letter"}, answer) == 0.0
    assert score({"letter": "J", "options": 10, "rule": "first_letter"}, "Answer: J") == 0.0  # never paid, as released
    with pytest.raises(ValueError, match="rule 'first' is none of last_letter, first_letter"):
        score({"letter": "B", "rule": "first"}, answer)


@pytest.mark.parametrize("form, answer, letter", [
    (r"\\boxed\{(.*?)\}", r"\boxed{A}, no: \boxed{(b)}", "B"),  # the last one, marks and case not minded
    (r"\(\(([A-Z])\)\)", "((C)) and more", "C"), ("[A-D]", "A or C", "C"), (r"\\boxed\{(.*?)\}", "Answer: A", None),
    (r"\\boxed\{(.*?)\}", r"\boxed{A or B}", None), (r"\\boxed\{(.*?)\}", r"\boxed{E}", None), ("(X)?Answer", "Answer", None),
])
def test_a_row_of_the_blend_has_a_form_of_its_own(form, answer, letter):
    """Fault: a right letter in the form that the prompt asked for, scored 0 because we ask for another."""
    assert letters.letter_by(form, answer) == letter
    if letter:
        assert score({"letter": letter, "output_regex": form}, answer) == 1.0
        assert score({"letter": letter, "output_regex": None}, answer) == 0.0


def test_a_form_that_is_none_is_an_error():
    with pytest.raises(StudyError, match=r"^output_regex '\(' is no regular expression"):
        score({"letter": "A", "output_regex": "("}, "A")
