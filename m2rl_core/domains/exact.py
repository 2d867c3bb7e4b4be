"""A short answer that is right or wrong: what stands behind the last `Exact Answer:`, and when two such texts are equal."""
from __future__ import annotations

import re
from decimal import Decimal


def exact_of(text: str) -> str | None:
    """What stands on the line of the last `Exact Answer:`; None where there is none."""
    found = re.findall(r"exact answer[*_]*\s*:[ \t]*([^\n]*)", text, re.IGNORECASE)
    return found[-1].strip() if found else None


def same_text(left: str, right: str) -> bool:
    """Equal but for case, spacing, markup and a final full stop; leading numbers are compared as numbers."""
    (number, unit), (other_number, other_unit) = _split(left), _split(right)
    return unit == other_unit and number == other_number


def _split(text: str) -> tuple[Decimal | None, str]:
    plain = re.sub(r"\\(?:boxed|text|mathrm)|[{}$*_`\\\s]", "", text).casefold().rstrip(".")
    number = re.match(r"[-+]?[0-9]+(?:\.[0-9]+)?(?![0-9.,])", plain)
    return (Decimal(number[0]), plain[number.end():]) if number else (None, plain)
