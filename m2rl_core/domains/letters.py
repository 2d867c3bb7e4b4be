"""Which option of a multiple choice an answer names: the last `Answer: X`, a prompt's own form, or the released rule."""
from __future__ import annotations

import re
import string

from m2rl_core.errors import StudyError

ALPHABET = string.ascii_uppercase
BOXED = r"\\boxed\{[^A-Za-z]*(?:\\text\{)?[^A-Za-z]*([A-Z])[^A-Za-z]*\}"  # one capital and no other letter
RELEASED_LETTERS = "ABCDEFGH"  # so the authors' training never pays an item whose answer is I or J
RELEASED = (r"(?:answer|option|choice)\s*(?:is|:)?\s*([A-Z])", r"([A-Z])\s*(?:is\s*(?:the)?\s*correct)",
            r"final\s*(?:answer|option)\s*(?:is|:)?\s*([A-Z])")


def letter_of(text: str, options: int = 4) -> str | None:
    """The letter of the last `Answer: X`, X among the first `options` letters (26 at most); None where there is none.

    The colon and the capital are required; bold, brackets and `\\boxed{}` around the letter are not minded. A letter
    with a second one at its side ("Answer: A or B") is no answer.
    """
    last = ALPHABET[min(options, len(ALPHABET)) - 1]
    mark = r"(?:\\boxed\{|\\text\{|[*_$(\[{\s])*"
    letter = rf"{mark}([A-{last}])(?![A-Za-z0-9'])"
    second = rf"[*_$)\]}}\s]*(?:,|/|&|\bor\b|\band\b){mark}[A-{last}](?![A-Za-z0-9'])"
    found = list(re.finditer(rf"(?i:\banswer)[*_]*\s*:{letter}(?P<more>{second})?", text))
    return found[-1][1] if found and not found[-1]["more"] else None


def letter_by(form: str, text: str, options: int = 4) -> str | None:
    """The letter in the last match of a regular expression (its first group, or all of it), which a row's prompt asks for.

    Case and marks around the letter are not minded, as by NeMo-Gym; where the form is not met, one capital in a box is taken,
    as there. None for anything but one letter of the first `options`. StudyError for a form that is no regular expression.
    """
    try:
        found = list(re.finditer(form, text, 0 if form == BOXED else re.IGNORECASE)) or list(re.finditer(BOXED, text))
    except re.error as error:
        raise StudyError(f"output_regex {form!r} is no regular expression: {error}") from error
    said = re.sub(r"[\W_]", "", found[-1][1 if found[-1].re.groups else 0] or "").upper() if found else ""
    return said if len(said) == 1 and said in ALPHABET[:options] else None


def first_letter_of(text: str, valid: str = RELEASED_LETTERS) -> str | None:
    """The letter that the released code reads: the first hit of one of its patterns, in any case and anywhere.

    So "the answer depends" is the answer D. Where no hit is among `valid`, the last capital that stands alone counts.
    """
    hits = [re.search(pattern, text, re.IGNORECASE) for pattern in RELEASED]
    found = [hit[1].upper() for hit in hits if hit] + re.findall(r"\b([A-Z])\b", text)[::-1]
    return next((letter for letter in found if letter in valid), None)
