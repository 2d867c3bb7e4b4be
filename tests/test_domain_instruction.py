"""Instruction following: the published checkers decide, the rows are solvable, and nothing leaks."""
import random
import subprocess
import sys

import pytest

from m2rl_core.domains import Row, benchmark_rows, generator, is_held_out, rewards, training_rows
from m2rl_core.domains import checkers, constraints, instruction

AT_LEAST_2 = {"keyword": "hill", "frequency": 2, "relation": "at least"}
RANGE = {"min_words": 3, "max_words": 5}
# id, parameters, a text that obeys, one that does not. Written by hand from the benchmarks' own descriptions.
CASES = [
    ("punctuation:no_comma", {}, "A cat and a dog.", "A cat, and a dog."),
    ("startend:quotation", {}, '"A cat."', '"A cat.'),
    ("startend:end_checker", {"end_phrase": "The end."}, "A cat.\nThe end.", "The end. A cat."),
    ("detectable_format:title", {}, "<<A cat>>\nIt is red.", "<A cat>\nIt is red."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "Hi.\n* a\n* b", "Hi.\n* a\n* b\n* c"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "A *cat* is *red*.", "A *cat* is red."),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "A cat.\nP.S. It is red.", "A cat. It is red."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "A cat.\nP.P.S It is red.", "A cat.\nP.S. Red."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Ask [name] [place].", "Ask [name] place."),
    ("keywords:existence", {"keywords": ["hill", "moon"]}, "The moon, a hill.", "The moon."),
    ("keywords:forbidden_words", {"forbidden_words": ["is"]}, "This cat looks red.", "This cat is red."),
    ("keywords:frequency", AT_LEAST_2, "A hill. A hill.", "A hill."),
    ("count:numbers", {"N": 2}, "It counts 1 22.", "It counts 1 2 2."),
    ("count:word_count_range", RANGE, "One two three four.", "One two three four five six."),
    ("count:unique_word_count", {"N": 3}, "A red cat.", "A cat. A cat."),
    ("count:pronouns", {"N": 2}, "It is red and she is old.", "It is red and old."),
    ("count:conjunctions", {"small_n": 2}, "Red and old but happy.", "Red and old and happy."),
    ("count:person_names", {"N": 2}, "It knows Emma and Mia.", "It knows Emma and Miami."),
    ("sentence:keyword", {"word": "hill", "N": 2}, "A cat. It sees the hill.", "A hill. It sees the cat."),
    ("format:no_bullets_bullets", {}, "A cat. It is red.\n* a\n* b", "A cat.\n* a\n* b"),
]
BENCHMARKS = ("ifeval", "ifbench")


def row(ids, kwargs):
    truth = {"instruction_id_list": ids, "kwargs": kwargs}
    return Row("hand", "if", "ifeval", "", ({"role": "user", "content": "Write."},), truth)


def verdict(ids, kwargs, text):
    return instruction.verify([row(ids, kwargs)], [[text]])[0]


def rows_of(kind, n=200):
    return benchmark_rows(kind, n, seed=1) if kind in BENCHMARKS else training_rows("if", kind, n, seed=1)


def answers(rows, write):
    return [[turn["content"] for turn in write(row)] for row in rows]


@pytest.mark.parametrize("name, kwargs, good, bad", CASES)
def test_official_checker_on_texts_judged_by_hand(name, kwargs, good, bad):
    """A wrong class behind an id, lost parameters, or good and bad swapped."""
    assert verdict([name], [kwargs], good).score == 1.0
    assert verdict([name], [kwargs], bad).score == 0.0


def test_every_kind_has_a_case_and_is_really_of_its_benchmark():
    """A kind added without a hand-judged text; or an IFBench id among those that training shows."""
    assert {case[0] for case in CASES} == set(constraints.KINDS)
    origin = {name: checkers.require(name).__module__.split(".")[2] for name in checkers.ids()}
    assert {origin[name] for name in constraints.SEEN} == {"ifeval"}
    assert {origin[name] for name in constraints.UNSEEN} == {"ifbench"}
    assert sorted(origin.values()) == ["ifbench"] * 58 + ["ifeval"] * 25 + ["ifevalg"] * 29


def test_all_must_hold_and_the_reason_names_the_first_missed():
    """Scoring the share that holds, or any of them; naming the last."""
    ids, kwargs = ["detectable_format:title", "punctuation:no_comma", "startend:quotation"], [{}, None, {}]
    assert verdict(ids, kwargs, '"<<A>> b"').reason == "right"
    missed = verdict(ids, kwargs, "<<A>> b, c")
    assert (missed.score, missed.reason) == (0.0, "missed punctuation:no_comma")
    assert verdict(ids, kwargs, " \n").score == 0.0  # an empty text obeys "no comma", but answers nothing


def test_none_is_dropped_and_zero_is_kept():
    """Arrow fills absent parameters with None (refused by a checker); dropping 0 too makes it draw one at random."""
    padded = {"N": 0, "keywords": None, "end_phrase": None}
    assert verdict(["count:numbers"], [padded], "No digit.").score == 1.0
    assert verdict(["count:numbers"], [padded], "1").score == 0.0


def test_unknown_id_raises_even_behind_a_missed_one():
    """Scoring 0 for an instruction that nobody checks."""
    with pytest.raises(ValueError, match=r"'punctuation:no_coma'.*'punctuation:no_comma'"):
        verdict(["startend:quotation", "punctuation:no_coma"], [{}, {}], "no quotes")
    with pytest.raises(ValueError, match="'startend:quotation' refuses .*colour"):
        verdict(["startend:quotation"], [{"colour": "red"}], '"a"')
    with pytest.raises(ValueError):
        verdict(["startend:quotation"], [], '"a"')  # fewer parameters than instructions


def test_a_checker_that_stumbles_on_a_text_scores_zero():
    """One strange rollout that stops a training run."""
    assert verdict(["words:alphabet"], [{}], "...").reason == "missed words:alphabet (IndexError)"
    assert verdict(["detectable_format:json_format"], [{}], "[" * 30000).reason.endswith("(RecursionError)")
    assert verdict(["custom:csv_city"], [{}], "a\rb").reason == "missed custom:csv_city (Error)"
    assert verdict(["keywords:existence"], [{"keywords": ["(c"]}], "(c").reason == "missed keywords:existence (error)"


@pytest.mark.parametrize("kind", ["sft", "rl", *BENCHMARKS])
def test_respond_is_right_and_spoil_is_wrong(kind):
    """Constraints that exclude each other, a template that breaks one, a spoiled answer that still obeys."""
    rows = rows_of(kind)
    for worked in (True, False):
        right = rewards(rows, answers(rows, lambda row: instruction.respond(row, worked=worked)))
        assert [v.reason for v in right] == ["right"] * 200
    spoiled = rewards(rows, answers(rows, lambda row: instruction.spoil(row, generator(row.id))))
    assert [v.score for v in spoiled] == [0.0] * 200
    assert all(v.reason.startswith("missed ") for v in spoiled)


def test_plain_text_is_no_answer():
    """Constraints that the default text obeys anyway: then there is nothing to learn."""
    for kind in ("sft", "rl", "ifeval"):
        rows = rows_of(kind)
        plain = [f"<think>\n\n</think>\n\n{constraints.draft(r.truth['topic'], {}, 0, ('red',))}" for r in rows]
        assert not any(v.score for v in rewards(rows, [[text] for text in plain]))


def test_sft_turns_are_right_and_half_of_them_plan():
    """Training on wrong answers; one of the two styles missing."""
    rows = rows_of("sft", 400)
    turns = answers(rows, lambda row: row.turns)
    assert all(v.score == 1.0 for v in rewards(rows, turns))
    assert 140 < sum(turn[0].startswith("<think>\n\n</think>") for turn in turns) < 260


def test_what_training_shows_and_what_only_tests_ask():
    """Test items seen in training: an IFBench id named, or an IFEval combination repeated in other words or order."""
    trained = rows_of("sft", 1000) + rows_of("rl", 1000)
    assert {name for row in trained for name in row.truth["instruction_id_list"]} == set(constraints.SEEN)
    ifeval, ifbench = rows_of("ifeval", 300), rows_of("ifbench", 300)
    combinations = {frozenset(map(repr, instruction._wanted(row).items())) for row in trained}
    assert not combinations & {frozenset(map(repr, instruction._wanted(row).items())) for row in ifeval}
    assert {len(row.truth["kwargs"]) for row in ifeval} == {2, 3}
    assert all(len(set(row.truth["instruction_id_list"]) & set(constraints.UNSEEN)) == 1 for row in ifbench)
    for rows, held_out in ((trained, False), (ifeval + ifbench, True)):
        assert {is_held_out(row.fingerprint) for row in rows} == {held_out}
    assert len({row.fingerprint for row in ifeval}) == len({row.fingerprint for row in ifbench}) == 300


def test_the_order_of_constraints_does_not_change_the_fingerprint():
    """A held-out combination that training shows the other way round."""
    prints = {}
    for row in rows_of("rl", 3000):
        if len(row.truth["kwargs"]) > 1:
            prints.setdefault(frozenset(map(repr, instruction._wanted(row).items())), set()).add(row.fingerprint)
    assert max(map(len, prints.values())) == 1


def test_a_text_inside_think_is_not_an_answer():
    """Grading what the model thought instead of what it said."""
    one = row(["punctuation:no_comma"], [{}])
    turns = ["<think>\nA cat.\n</think>\n\n", "<think>\nA cat.\n", "<think>\na, b\n</think>\n\nA cat."]
    assert [v.score for v in rewards([one] * 3, [[turn] for turn in turns])] == [0.0, 0.0, 1.0]


def test_verify_is_deterministic_and_leaves_random_alone():
    """The published letter checker draws a random letter where the row's is no letter: scores that change by luck."""
    draws = {"letter": "#", "let_frequency": 1, "let_relation": "at least"}
    before = random.getstate()
    verdicts = set()
    for seed in range(30):
        random.seed(seed)
        state = random.getstate()
        verdicts.add(verdict(["keywords:letter_frequency"], [draws], "the cat and the dog").score)
        verdicts.add(verdict(["keywords:letter_frequency"], [draws], "the cat and the dog").score)
        assert random.getstate() == state
    random.setstate(before)
    assert len(verdicts) == 1


def test_rows_depend_on_the_seed_alone():
    """Global randomness, or the order of a set, in the makers."""
    random.seed(1)
    first = [row.to_json() for row in rows_of("sft", 50) + rows_of("ifbench", 50)]
    random.seed(2)
    assert first == [row.to_json() for row in rows_of("sft", 50) + rows_of("ifbench", 50)]
    assert first[:50] != [row.to_json() for row in training_rows("if", "sft", 50, seed=2)]
    assert instruction.corpus(generator(3)) == instruction.corpus(generator(3))


LOAD = """
import socket, sys
import nltk
def refuse(*a, **k): raise AssertionError("a download was attempted")
nltk.download = nltk.downloader.Downloader.download = socket.socket.connect = refuse
from m2rl_core.domains import checkers
assert "langdetect" not in sys.modules, "loaded before it was needed"
assert len(checkers.ids()) == 83 + 29
assert checkers.follows("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "",
                        "A cat. A dog.") == (True, "")
assert checkers.follows("words:words_position", {"keyword": "is"}, "", "It is what it is, no.") == (True, "")
try:
    checkers.follows("words:start_verb", {}, "", "Run.")
except checkers.MissingData as error:
    assert "python -m nltk.downloader averaged_perceptron_tagger_eng" in str(error)
else:
    nltk.data.find("taggers/averaged_perceptron_tagger_eng")
assert not [name for name in sys.modules if name.startswith("evalscope")], "the stand-ins stayed behind"
import langdetect
assert langdetect.DetectorFactory.seed == 0
"""


def test_checkers_load_alone_without_any_download():
    """NLTK data fetched on import, the whole evaluation framework pulled in, or empty stand-ins left in its place."""
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_unknown_benchmark():
    """A misspelt benchmark that quietly gives the other one's items."""
    with pytest.raises(ValueError, match="ifbenhc"):
        instruction.test("ifbenhc", generator(0))
