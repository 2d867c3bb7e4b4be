"""The 54 instruction ids of the RL blend's rows, and strict and loose reading of every instruction."""
from __future__ import annotations

import random

import pytest

from m2rl_core.domains import Row, checkers, ifevalg, instruction

SAY = {"prompt_to_repeat": " Say it. "}
# id, parameters, a text that obeys, one that does not. Written by hand from the prompts' own wording.
CASES = [
    ("copy:copy", SAY, "say it.\n", "Say it. I do."),
    ("copy:copying_simple", SAY, "Say it.", "Sure: Say it."),
    ("copy:copying_multiple", {**SAY, "N": 2}, "Say it.\n******\nsay it.", "Say it. ****** Say it. ****** Say it."),
    ("copy:repeat_phrase", {"phrase": "the red cat sat", "small_n": 2}, "So the old cat sat. And the red dog sat.",
     "the old dog sat, the red dog sat"),
    ("new:copy_span_idx", {"prompt_to_repeat": "abcdef", "n_start": 0, "n_end": 3}, "ABC", "abcd"),
    ("detectable_format:sentence_hyphens", {}, "It is red.-It is old.", "It is red.- It is old."),
    ("detectable_format:square_brackets", {}, "[A] [red] [cat.]", "[A] red [cat.]"),
    ("detectable_format:bigram_wrapping", {}, "<<I am>> <<at home>> now", "<<I am>> at home"),
    ("keywords:no_adjacent_consecutive", {}, "a cat eats", "a big dog"),
    ("keywords:word_once", {"keyword": "cat"}, "A Cat sat.", "A cat and a category."),
    ("keywords:word_count_different_numbers", {"keyword": "cat", "frequency": 2, "relation": "at least"}, "cat, Cat", "cat"),
    ("keywords:exclude_word_harder", {"keyword": "red"}, "It is red, so it is redder.", "It is red now."),
    ("keywords:palindrome", {}, "We saw a radar there", "We saw my Radar."),
    ("keywords:keyword_specific_position", {"keyword": "cat", "n": 2, "m": 3}, "It is. See the cat.", "It is. See, the cat."),
    ("keywords:start_end", {}, "Cats like other cats", "Cats like other cats."),
    ("paragraphs:paragraphs", {}, "One.\n***\nTwo.", "One.\n***\nTwo.\n***\nThree."),
    ("paragraphs:paragraphs2", {}, "One.\n\nTwo.\nStill two.\n\n", "One.\nTwo."),
    ("first_word:first_word_sent", {"first_word": ["So"]}, "So it is. so it was!", "So it is. It was so."),
    ("first_word:first_word_answer", {"first_word": "so"}, "So it is. It was.", "So, it is."),
    ("last_word:last_word_sent", {"last_word": "so"}, "It is so. Was it SO?", "It is so. It was."),
    ("last_word:last_word_answer", {"last_word": "so"}, "It is. It was so!\n", "It was so good."),
    ("punctuation:punctuation_dot", {}, "It is red!", "It is 3.5 m"),
    ("punctuation:punctuation_exclamation", {}, "It is red.", "It is red!"),
    ("count:lowercase_counting", {"N": 2}, "IT is RED and A1b Old", "it is red"),
    ("count:counting_composition", {"n_sent": 2, "n_words": 3}, "It is. We do.\n***\nI am. No no!\n***\nYou go. So so.",
     "It is. We do.\n***\nI am. No, no!\n***\nYou go. So so."),
    ("count:count_unique", {}, "A red cat saw an old dog.", "A cat saw a cat."),
    ("count:count_increment_word", {"keyword1": ["cat"], "keyword2": "dog"}, "A dog, a cat and a Dog.", "A dog and a cat."),
    ("letters:letter_counting", {"N": 5, "relation": "less than"}, "Ab 12 cd", "Abcde"),
    ("letters:letter_counting2", {"letter": "A", "let_frequency": 2, "let_relation": "at least"}, "Anna", "Ann"),
]
PUBLISHED = {  # ids that cannot draw what a row omits
    "combination:repeat_prompt": SAY, "repeat:repeat_change": SAY,
    "repeat:repeat_span": {**SAY, "n_start": 0, "n_end": 1},
    "count:words_japanese": {"N": 2}, "ratio:overlap": {"reference_text": "A cat.", "percentage": 10},
}


@pytest.mark.parametrize("name, kwargs, good, bad", CASES, ids=[case[0] for case in CASES])
def test_texts_judged_by_hand(name, kwargs, good, bad):
    """Fault: a check that reads the wrong part, counts one too many, or lets everything pass."""
    assert checkers.follows(name, {**kwargs, "colour": None}, "", good) == (True, "")
    assert checkers.follows(name, kwargs, "", bad) == (False, "")


@pytest.mark.parametrize("name, kwargs, text, follows", [
    # what the released checkers decide, where that is not what their prompt says
    ("copy:repeat_phrase", {"phrase": "the red cat sat", "small_n": 2}, "the red cat sat, the old cat sat", True),
    ("copy:repeat_phrase", {"phrase": "the red cat sat", "small_n": 2}, "the old cat sat, the red cat sat", False),
    ("detectable_format:sentence_hyphens", {}, "It is red. It is old.", False),
    ("detectable_format:sentence_hyphens", {}, "It is red.", True),
    ("keywords:exclude_word_harder", {"keyword": "red", "instruction": "Say red."}, "red. It is red", True),
    ("keywords:palindrome", {}, "There is a cat.", True),
    ("paragraphs:paragraphs", {}, "***\nOne.\n***\nTwo.\n***", True),
    ("paragraphs:paragraphs", {}, "One.\n***\n\n***\nTwo.", False),
    ("count:counting_composition", {"n_sent": 1, "n_words": 2}, "***\nGo.\n***\nGo.\n***\nGo.", False),
    ("count:counting_composition", {"n_sent": 1, "n_words": 2}, "Go.\n***\nGo.\n***\nGo.", True),
    ("count:count_unique", {}, "A cat, an old dog, my cow.", False),  # the comma twice
    ("keywords:word_once", {"keyword": "c.t"}, "A cut.", True),  # a regular expression
    ("letters:letter_counting2", {"letter": "#", "let_frequency": 1, "let_relation": "at least"}, "# #", True),
])
def test_what_the_released_checkers_do(name, kwargs, text, follows):
    """Fault: an oddity mended unseen, so that our reward is not the one that the paper's models were trained on."""
    assert checkers.follows(name, kwargs, "", text)[0] is follows


@pytest.mark.parametrize("name, kwargs, said", [
    ("letters:letter_counting", {"relation": "at least"}, "missing a required argument: 'N'"),
    ("letters:letter_counting", {"N": 2.5, "relation": "at least"}, "2.5 is no whole number"),
    ("letters:letter_counting", {"N": 2, "relation": "at most"}, "'at most' is none of less than, at least"),
    ("keywords:palindrome", {"N": 2}, "unexpected keyword argument 'N'"),
    ("copy:copy", {"prompt_to_repeat": " "}, "is no text"),
])
def test_a_row_that_does_not_fit_is_an_error(name, kwargs, said):
    """Fault: a parameter drawn at random in place of the row's, or a wrong row scored 0 for ever."""
    with pytest.raises(ValueError, match=f"instruction '{name}' refuses the parameters .*{said}"):
        checkers.follows(name, kwargs, "", "A text.")


def test_a_float_of_arrow_is_the_whole_number():
    assert checkers.follows("new:copy_span_idx", {"prompt_to_repeat": "abcdef", "n_start": 1.0, "n_end": 3.0}, "", "bc")[0]


def test_every_id_is_there_once():
    """Fault: a training row whose id nobody checks; or one of ours in the place of a published checker."""
    assert [case[0] for case in CASES] == list(dict.fromkeys(case[0] for case in CASES))
    assert {case[0] for case in CASES} == set(ifevalg.CHECKS) and len(CASES) == 29
    published, _ = checkers.published()
    assert len(published) == 25 + 58 and not set(published) & set(ifevalg.CHECKS)
    ifeval = [name for name in published if checkers.require(name).__module__.split(".")[2] == "ifeval"]
    assert len(ifeval) + len(CASES) == 54
    with pytest.raises(ValueError, match="unknown instruction id 'keywords:palindrom'; .*'keywords:palindrome'"):
        checkers.require("keywords:palindrom")


@pytest.mark.parametrize("loose", [False, True])
def test_every_published_id_gives_the_same_verdict_twice(loose):
    """Fault: a checker that cannot be built, or whose verdict is luck (langdetect, drawn parameters)."""
    needs_data = set()
    text = "Hello, cat. It is a good day.\nBye."
    for name in set(checkers.ids()) - set(ifevalg.CHECKS):
        verdicts = set()
        for seed in range(2):
            random.seed(seed)
            try:
                verdicts.add(checkers.follows(name, PUBLISHED.get(name, {}), "Say hi to the cat.", text, loose=loose))
            except checkers.MissingData as error:
                assert "python -m nltk.downloader" in str(error)
                needs_data.add(name)
        assert len(verdicts) == (0 if name in needs_data else 1), name
    assert needs_data <= {"ratio:stop_words", "words:start_verb"}


@pytest.mark.parametrize("response, strict, loose", [
    ('"A cat"', True, True),
    ('Here it is:\n"A cat"', False, True),  # without the first line
    ('"A cat"\nDone.', False, True),  # without the last
    ('Here it is:\n"A cat"\nDone.', False, True),  # without both
    ('*"A cat"*', False, True),  # without asterisks
    ('Here it is:\n**"A cat"**\nDone.', False, True),
    ('Here\nit is:\n"A cat"', False, False),
    ("A cat", False, False),
])
def test_loose_drops_a_first_and_a_last_line_and_asterisks(response, strict, loose):
    """Fault: one of IFEval's eight readings missing, or a ninth."""
    row = Row("hand", "if", "", "", ({"role": "user", "content": "?"},),
              {"instruction_id_list": ["startend:quotation", "punctuation:no_comma"], "kwargs": [{}, None]})
    assert instruction.outcomes(row, response) == {"strict": [strict, True], "loose": [loose, True]}
    relaxed = Row(**{**row.__dict__, "truth": {**row.truth, "rule": "loose"}})
    found = instruction.verify([row, relaxed], [[response]] * 2)
    assert [one.score for one in found] == [float(strict), float(loose)]


def test_an_unknown_rule_is_an_error():
    truth = {"instruction_id_list": [], "kwargs": [], "rule": "lose"}
    with pytest.raises(ValueError, match="row 'hand': rule 'lose' is none of strict, loose"):
        instruction.verify([Row("hand", "if", "", "", ({"role": "user", "content": "?"},), truth)], [["A"]])
