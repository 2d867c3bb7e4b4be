"""The 29 instruction ids of the RL blend's rows that no published package has (IFEvalG: 25 ids of IFEval and these).

Each is one function of the text and the row's parameters, written anew from what the released checkers decide; their
oddities are kept, since they are the reward that was trained on, and named where they stand. Two departures: a
parameter that a row lacks is an error (released: drawn at random, so that the row asks for one thing and is judged
on another), and 0 counts as given. Keywords are regular expressions and count inside of other words, as released.
"""
from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable

from m2rl_core.domains import published

RELATIONS = ("less than", "at least")
DIVIDER = r"\s?\*\*\*\s?"  # the prompt of counting_composition writes it "* * *", its checker does not


def registry() -> dict[str, type]:
    """Instruction id -> class with the interface of the published checkers."""
    return {name: type(check.__name__, (_Checker,), {"check": staticmethod(check), "__module__": __name__})
            for name, check in CHECKS.items()}


class _Checker:
    """IFEval's interface around one function."""

    check: Callable[..., bool]

    def __init__(self, instruction_id: str):
        self.id, self.given = instruction_id, {}

    def build_description(self, **given) -> str:
        """Take the parameters; TypeError for one that is missing or unknown, ValueError for one of a wrong kind."""
        inspect.signature(self.check).bind("", **given)
        self.given = {name: PARAMETERS[name](value) for name, value in given.items()}
        return self.id

    def get_instruction_args(self) -> dict:
        return self.given

    def check_following(self, text: str) -> bool:
        return self.check(text, **self.given)


# --- parameters, by their names


def _whole(value) -> int:
    """A whole number, 0 or more; Arrow and JSON may have made it a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
        raise ValueError(f"{value!r} is no whole number of 0 or more")
    return int(value)


def _text(value) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is no text")
    return value.strip()


def _word(value) -> str:
    """A word, or the first of a list, as some rows have it."""
    return _text(value[0] if isinstance(value, list) and value else value)


def _verbatim(value) -> str:
    """A text whose outer spaces count: positions are counted in it."""
    _text(value)
    return value


def _relation(value) -> str:
    if value not in RELATIONS:
        raise ValueError(f"{value!r} is none of {', '.join(RELATIONS)}")
    return value


PARAMETERS = {
    **dict.fromkeys(("N", "n", "m", "small_n", "n_start", "n_end", "n_sent", "n_words", "frequency", "let_frequency"), _whole),
    **dict.fromkeys(("keyword", "keyword1", "keyword2", "first_word", "last_word"), _word),
    **dict.fromkeys(("relation", "let_relation"), _relation),
    "phrase": _text, "letter": _text, "prompt_to_repeat": _verbatim, "instruction": _verbatim,
}


# --- checks


def _compare(count: int, relation: str, number: int) -> bool:
    return count < number if relation == "less than" else count >= number


def _count(keyword: str, text: str) -> int:
    return len(re.findall(keyword, text, re.IGNORECASE))


def _same(left: str, right: str) -> bool:
    return left.strip().lower() == right.strip().lower()


def _parts(separator: str, text: str) -> list[str]:
    """What stands between separators; the first and the last part may be empty, nothing is found where another one is."""
    parts = re.split(separator, text)
    return [part for part in parts if part.strip()] if all(part.strip() for part in parts[1:-1]) else []


def repeat_phrase(text: str, phrase: str, small_n: int) -> bool:
    """The phrase `small_n` times, each at most one word off; only the last one has to be, as released.

    First and last word stand still, are looked for in this case, and are regular expressions.
    """
    words = phrase.split()
    found = [hit.split() for hit in re.findall(rf"{words[0]} .*? {words[-1]}", text)]
    if not found or len(found) != small_n or any(len(hit) != len(words) for hit in found):
        return False
    slips = [sum(a != b for a, b in zip(hit, words, strict=True)) for hit in found]
    return max(slips) <= 1 and slips[-1] == 1


def copy(text: str, prompt_to_repeat: str) -> bool:
    """The given text and nothing else; case and outer spaces do not count."""
    return _same(text, prompt_to_repeat)


def copying_multiple(text: str, prompt_to_repeat: str, N: int) -> bool:
    """The given text N times between six asterisks, and nothing else."""
    parts = text.split("******")
    return len(parts) == N and all(_same(part, prompt_to_repeat) for part in parts)


def copy_span_idx(text: str, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """Characters n_start to n_end of the given text; the prompt says "and including", the end is left out all the same."""
    return _same(text, prompt_to_repeat[n_start:n_end])


def sentence_hyphens(text: str) -> bool:
    """Sentences joined by hyphens without a space; as released, parts beyond the shorter list are not looked at."""
    sentences = published.sentences(text.replace("-", " "))
    return all(part == part.strip() == sentence for part, sentence in zip(text.split("-"), sentences, strict=False))


def square_brackets(text: str) -> bool:
    """Every word in square brackets."""
    return all(word.startswith("[") and word.endswith("]") for word in text.split())


def bigram_wrapping(text: str) -> bool:
    """Words in pairs <<like this>>; a last word without a partner is free."""
    words = text.split()
    return all(a.startswith("<<") and b.endswith(">>") for a, b in zip(words[::2], words[1::2], strict=False))


def no_adjacent_consecutive(text: str) -> bool:
    """No word starts with the letter that follows the first letter of the word before it."""
    firsts = [word[0].lower() for word in text.split()]
    if len(firsts) > 1 and any(len(first) != 1 for first in firsts):  # "İ" has two signs in lower case
        return False
    return all(ord(b) - ord(a) != 1 for a, b in zip(firsts, firsts[1:], strict=False))


def word_once(text: str, keyword: str) -> bool:
    """The keyword exactly once."""
    return _count(keyword, text) == 1


def word_count_different_numbers(text: str, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword less than, or at least, so many times; the prompt says "so many times" only."""
    return _compare(_count(keyword, text), relation, frequency)


def exclude_word_harder(text: str, keyword: str, instruction: str = "") -> bool:
    """The keyword nowhere between two spaces: at the start, the end or before a comma it passes, as released."""
    return f" {keyword} " not in text


def palindrome(text: str) -> bool:
    """A word that reads the same backwards, case and marks included; "a" is one."""
    return any(word == word[::-1] for word in text.split())


def keyword_specific_position(text: str, keyword: str, n: int, m: int) -> bool:
    """The m-th token of the n-th sentence is the keyword, in its case; a mark is a token too. Both count from 1."""
    sentences = published.sentences(text)
    tokens = published.tokens(sentences[n - 1]) if 0 < n <= len(sentences) else []
    return 0 < m <= len(tokens) and tokens[m - 1] == keyword


def start_end(text: str) -> bool:
    """First and last token are the same word."""
    tokens = published.tokens(text)
    return len(tokens) > 1 and tokens[0].lower() == tokens[-1].lower()


def paragraphs(text: str) -> bool:
    """Two paragraphs with *** between them."""
    return len(_parts(DIVIDER, text)) == 2


def paragraphs2(text: str) -> bool:
    """Two paragraphs with an empty line between them."""
    return len(_parts("\n\n", text)) == 2


def first_word_sent(text: str, first_word: str) -> bool:
    """Every sentence starts with the word."""
    return all(sentence.split()[:1] and _same(sentence.split()[0], first_word) for sentence in published.sentences(text))


def first_word_answer(text: str, first_word: str) -> bool:
    """The text starts with the word; a mark at its side makes it another."""
    return _same(text.split()[0], first_word)


def last_word_sent(text: str, last_word: str) -> bool:
    """Every sentence ends with the word; marks do not count."""
    return all(sentence.split() and _same(_bare(sentence.split()[-1]), last_word) for sentence in published.sentences(text))


def last_word_answer(text: str, last_word: str) -> bool:
    """The text ends with the word; marks do not count."""
    return _same(_bare(text.split()[-1]), last_word)


def _bare(word: str) -> str:
    return re.sub(r"[^\w\s]", "", word)


def punctuation_dot(text: str) -> bool:
    """No full stop."""
    return "." not in text


def punctuation_exclamation(text: str) -> bool:
    """No exclamation mark."""
    return "!" not in text


def lowercase_counting(text: str, N: int) -> bool:
    """At most N words of small ASCII letters."""
    return len(re.findall(r"\b[a-z]+\b", text)) <= N


def letter_counting(text: str, N: int, relation: str) -> bool:
    """Less than, or at least, N ASCII letters."""
    return _compare(len(re.findall("[a-zA-Z]", text)), relation, N)


def letter_counting2(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """One letter less than, or at least, so many times; case does not count."""
    return _compare(Counter(text.lower())[letter.lower()], let_relation, let_frequency)


def counting_composition(text: str, n_sent: int, n_words: int) -> bool:
    """Three paragraphs with *** between them, of n_sent sentences of n_words tokens; a final full stop is a token too."""
    found = [published.sentences(part) for part in re.split(DIVIDER, text)]
    return len(found) == 3 and all(len(part) == n_sent for part in found) and all(
        len(published.tokens(sentence)) == n_words for part in found for sentence in part)


def count_unique(text: str) -> bool:
    """No token twice; marks are tokens, and case counts."""
    tokens = published.tokens(text)
    return len(tokens) == len(set(tokens))


def count_increment_word(text: str, keyword1: str, keyword2: str) -> bool:
    """The first keyword once, the second twice."""
    return (_count(keyword1, text), _count(keyword2, text)) == (1, 2)


CHECKS: dict[str, Callable[..., bool]] = {
    "copy:copy": copy, "copy:copying_simple": copy, "copy:copying_multiple": copying_multiple,
    "copy:repeat_phrase": repeat_phrase, "new:copy_span_idx": copy_span_idx,
    "detectable_format:sentence_hyphens": sentence_hyphens, "detectable_format:square_brackets": square_brackets,
    "detectable_format:bigram_wrapping": bigram_wrapping,
    "keywords:no_adjacent_consecutive": no_adjacent_consecutive, "keywords:word_once": word_once,
    "keywords:word_count_different_numbers": word_count_different_numbers,
    "keywords:exclude_word_harder": exclude_word_harder, "keywords:palindrome": palindrome,
    "keywords:keyword_specific_position": keyword_specific_position, "keywords:start_end": start_end,
    "paragraphs:paragraphs": paragraphs, "paragraphs:paragraphs2": paragraphs2,
    "first_word:first_word_sent": first_word_sent, "first_word:first_word_answer": first_word_answer,
    "last_word:last_word_sent": last_word_sent, "last_word:last_word_answer": last_word_answer,
    "punctuation:punctuation_dot": punctuation_dot, "punctuation:punctuation_exclamation": punctuation_exclamation,
    "count:lowercase_counting": lowercase_counting, "count:counting_composition": counting_composition,
    "count:count_unique": count_unique, "count:count_increment_word": count_increment_word,
    "letters:letter_counting": letter_counting, "letters:letter_counting2": letter_counting2,
}
