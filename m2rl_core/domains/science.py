"""Science: formulas with small numbers and 20 elements, asked as multiple choice or openly.

"gpqa_diamond" (miniature) is four options and `Answer: C`; "hle" (miniature) is `Exact Answer: 12 N`. The verifier
serves real rows too: letters as far as the row has options; rows of HLE go to `hle.py`. The authors' code takes the
first "answer ... X" in the text, which a row may ask for ("rule": "first_letter"); here the last `Answer: X` counts.
"""
from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from random import Random
from types import ModuleType

from m2rl_core.domains import Row, Verdict, hle, is_held_out, rule_of
from m2rl_core.domains.exact import exact_of, same_text
from m2rl_core.domains.letters import first_letter_of, letter_by, letter_of

# Difficulty, in one place. All facts are in the pre-training text.
SFT_TERSE = 0.5  # share of open SFT rows with an empty <think>; a letter is always worked out, else it is learnt by heart
CHOICES = 0.5  # share of multiple choice among training rows
ELEMENT_SHARE = 0.25
OPERANDS = range(2, 8)
OPTIONS = 4
CORPUS_LINES = 6

RULES = ("last_letter", "first_letter")

# result: (left, operation, right, unit of result, of left, of right)
FORMULAS = {
    "force": ("mass", "*", "acceleration", "N", "kg", "m/s^2"),
    "voltage": ("current", "*", "resistance", "V", "A", "ohm"),
    "distance": ("speed", "*", "time", "m", "m/s", "s"),
    "charge": ("current", "*", "time", "C", "A", "s"),
    "energy": ("power", "*", "time", "J", "W", "s"),
    "work": ("force", "*", "distance", "J", "N", "m"),
    "power": ("voltage", "*", "current", "W", "V", "A"),
    "mass": ("density", "*", "volume", "kg", "kg/L", "L"),
    "density": ("mass", "/", "volume", "kg/L", "kg", "L"),
    "speed": ("distance", "/", "time", "m/s", "m", "s"),
    "current": ("voltage", "/", "resistance", "A", "V", "ohm"),
    "pressure": ("force", "/", "area", "Pa", "N", "m^2"),
}
UNITS = sorted({formula[3] for formula in FORMULAS.values()})
FORMULA_WORDS = ("If {} is {} and {} is {}, what is the {}?", "Given {} {} and {} {}, find the {}.")
ELEMENTS = tuple(
    (name, str(number), symbol) for number, (name, symbol) in enumerate((
        ("hydrogen", "H"), ("helium", "He"), ("lithium", "Li"), ("beryllium", "Be"), ("boron", "B"), ("carbon", "C"),
        ("nitrogen", "N"), ("oxygen", "O"), ("fluorine", "F"), ("neon", "Ne"), ("sodium", "Na"), ("magnesium", "Mg"),
        ("aluminum", "Al"), ("silicon", "Si"), ("phosphorus", "P"), ("sulfur", "S"), ("chlorine", "Cl"),
        ("argon", "Ar"), ("potassium", "K"), ("calcium", "Ca")), start=1)
)
NAME, NUMBER, SYMBOL = range(3)  # columns of ELEMENTS
DIRECTIONS = {  # what is asked: (column given, column wanted, wordings)
    "number": (NAME, NUMBER, ("What is the atomic number of {}?", "Find the atomic number of {}.")),
    "symbol": (NAME, SYMBOL, ("What is the symbol of {}?", "Find the symbol of {}.")),
    "element-by-number": (NUMBER, NAME, ("What element has atomic number {}?", "Find the element with number {}.")),
    "element-by-symbol": (SYMBOL, NAME, ("What element has symbol {}?", "Find the element with symbol {}.")),
    "symbol-by-number": (NUMBER, SYMBOL, ("What symbol has atomic number {}?", "Find the symbol with number {}.")),
    "number-by-symbol": (SYMBOL, NUMBER, ("What is the atomic number of {}?", "Find the atomic number of {}.")),
}


# --- rows


def corpus(rng: Random) -> str:
    """One short document: arithmetic, formulas with units, element facts, options listed again, or problems worked."""
    kind = rng.choice(("arithmetic", "formula", "element", "options", "options", "worked"))
    if kind == "worked":
        return "\n".join(_worked_problem(rng) for _ in range(2))
    if kind == "arithmetic":
        pairs = [(rng.choice(OPERANDS), rng.choice(OPERANDS)) for _ in range(CORPUS_LINES)]
        return "\n".join(f"{a}*{b}={a * b}" if rng.random() < 0.6 else f"{a * b}/{b}={a}" for a, b in pairs)
    if kind == "formula":
        names = rng.sample(sorted(FORMULAS), CORPUS_LINES // 2)
        return "\n".join(f"{_formula(name)} in {FORMULAS[name][3]}" for name in names)
    if kind == "element":
        elements = rng.sample(ELEMENTS, CORPUS_LINES)
        return "\n".join(_element_fact(element, rng.randrange(3)) for element in elements)
    if rng.random() < 1 - ELEMENT_SHARE:
        unit = rng.choice(UNITS)
        options = [f"{value} {unit}" for value in rng.sample(range(1, 82), OPTIONS)]
    else:
        options = _column(rng.randrange(3), rng.sample(ELEMENTS, OPTIONS))
    listed = [_option(text, at) for at, text in enumerate(options)]
    return "\n".join([*listed, *(line for _ in range(2) for line in rng.sample(listed, OPTIONS))])


def sft(rng: Random) -> Row:
    """A training row with its answer: multiple choice worked, open worked or terse."""
    row = _draw(rng, rng.random() < CHOICES, "Science")
    turns = tuple(respond(row, worked="letter" in row.truth or rng.random() >= SFT_TERSE))
    return Row(**{**row.__dict__, "turns": turns})


def rl(rng: Random) -> Row:
    """An RLVR prompt in either form."""
    choice = rng.random() < CHOICES
    return _draw(rng, choice, "choice" if choice else "open")


def test(benchmark: str, rng: Random) -> Row:
    """An item of a miniature: multiple choice for "gpqa_diamond", open for "hle"."""
    if benchmark not in ("gpqa_diamond", "hle"):
        raise ValueError(f"unknown science benchmark {benchmark!r}: one of gpqa_diamond, hle")
    return _draw(rng, benchmark == "gpqa_diamond", benchmark)


def respond(row: Row, worked: bool = True) -> list[dict]:
    """A right continuation of a row made here; ValueError for a row from elsewhere."""
    return [_turn(row, _answer(row), worked)]


def spoil(row: Row, rng: Random) -> list[dict]:
    """A wrong continuation of right form: another option, or the value of a common slip."""
    right = _answer(row)
    options = _options(row) or _wrong(row.fingerprint, right, rng)
    return [_turn(row, rng.choice([option for option in options if option != right]), rng.random() < 0.5)]


def _draw(rng: Random, choice: bool, source: str) -> Row:
    """One row. A formula's fingerprint is its numbers in either form. An element's has the direction asked and the

    wrong options too: a fact cannot be composed, so a way of asking is held out, never the fact.
    """
    if rng.random() < ELEMENT_SHARE:
        direction, element = rng.choice(sorted(DIRECTIONS)), rng.choice(ELEMENTS)
        given, wanted, wordings = DIRECTIONS[direction]
        right, fingerprint = element[wanted], f"element:{direction}:{element[given]}"
        prompt = rng.choice(wordings).format(element[given])
    else:
        name = rng.choice(sorted(FORMULAS))
        left, op, right_name, unit, left_unit, right_unit = FORMULAS[name]
        a, b = rng.choice(OPERANDS), rng.choice(OPERANDS)
        if op == "/":
            a *= b
        right, fingerprint = f"{a * b if op == '*' else a // b} {unit}", f"formula:{name}:{a}:{b}"
        given = [(left, f"{a} {left_unit}"), (right_name, f"{b} {right_unit}")]
        rng.shuffle(given)
        prompt = rng.choice(FORMULA_WORDS).format(*given[0], *given[1], name)
    if not choice:
        return _row(source, fingerprint, prompt, {"exact": right})
    options = rng.sample(_wrong(fingerprint, right, rng), OPTIONS - 1)
    at = rng.randrange(OPTIONS)
    options.insert(at, right)
    return _row(source, fingerprint, f"{prompt}\n{_listed(options)}", {"letter": _letter(at), "options": OPTIONS})


def _worked_problem(rng: Random) -> str:
    """A question in plain text with its working."""
    while True:
        row = _draw(rng, rng.random() < CHOICES, "corpus")
        if not is_held_out(row.fingerprint):
            return "\n".join([row.messages[0]["content"], *_working(row, _answer(row))])


def _row(source: str, fingerprint: str, prompt: str, truth: dict) -> Row:
    return Row("", "science", source, fingerprint, ({"role": "user", "content": prompt},), truth)


def _wrong(fingerprint: str, right: str, rng: Random) -> list[str]:
    """Wrong answers: common slips for a formula (one of them in a wrong unit), other elements for a fact."""
    family, name, *given = fingerprint.split(":")
    if family == "element":
        return [value for value in _column(DIRECTIONS[name][1], ELEMENTS) if value != right]
    a, b, value = int(given[0]), int(given[1]), int(right.split(" ")[0])
    op, unit = FORMULAS[name][1], FORMULAS[name][3]
    slips = {a + b, abs(a - b), value + 1} | ({value - a, value + b, value - b} if op == "*" else {value + b, a})
    other = f"{value} {rng.choice([each for each in UNITS if each != unit])}"
    return sorted(f"{slip} {unit}" for slip in slips if slip not in (0, value)) + [other]


def _answer(row: Row) -> str:
    """The right answer's text (of a multiple choice row: the option's)."""
    if "exact" in row.truth:
        return row.truth["exact"]
    return _options(row)[ord(row.truth["letter"]) - ord("A")]


def _working(row: Row, answer: str) -> list[str]:
    """The lines that lead to `answer`; where that is wrong, they slip in their last step."""
    family, name, *given = row.fingerprint.split(":")
    if family == "formula":
        op = FORMULAS[name][1]
        lines = [_formula(name), f"{given[0]}{op}{given[1]}={answer.split(' ')[0]}"]
    elif family == "element":
        column = DIRECTIONS[name][0]
        lines = [_element_fact(next(e for e in ELEMENTS if e[column] == given[0]), column)]
    else:
        raise ValueError(f"row {row.id!r}: no worked answer for the family {family!r} (formula and element only)")
    options = _options(row)
    return [*lines, _option(answer, options.index(answer))] if options else lines


def _turn(row: Row, answer: str, worked: bool) -> dict:
    """The assistant's turn that ends in `answer`."""
    options, lines = _options(row), _working(row, answer)
    final = f"Answer: {_letter(options.index(answer))}" if options else f"Exact Answer: {answer}"
    work = "\n".join(lines if worked else [])
    return {"role": "assistant", "content": f"<think>\n{work}\n</think>\n\n{final}"}


def _options(row: Row) -> list[str]:
    """The options as the prompt lists them; empty for an open question."""
    return re.findall(r"^(.+) \([A-J]\)$", row.messages[-1]["content"], re.MULTILINE)


def _listed(options: Sequence[str]) -> str:
    return "\n".join(_option(option, i) for i, option in enumerate(options))


def _option(text: str, at: int) -> str:
    """`24 N (C)`: the letter comes last, for what follows a text is easier to find than what precedes it."""
    return f"{text} ({_letter(at)})"


def _letter(at: int) -> str:
    return chr(ord("A") + at)


def _formula(name: str) -> str:
    left, op, right = FORMULAS[name][:3]
    return f"{name}={left}{op}{right}"


def _column(column: int, elements: Sequence[tuple]) -> list[str]:
    return [element[column] for element in elements]


def _element_fact(element: tuple, first: int) -> str:
    """Name, number and symbol, what is given first: `carbon 6 C`, `6 carbon C`, `C carbon 6`."""
    return " ".join([element[first], *(value for i, value in enumerate(element) if i != first)])


# --- verifier


def verify(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Verdict]:
    """1 where the last turn ends in the right letter (`truth["letter"]`) or value (`truth["exact"]`), otherwise 0.

    A row with letters may have the `output_regex` of its prompt's form, and may ask for one of `RULES`; a row of HLE
    (`truth["answer_type"]`) goes to `hle.verify`.
    """
    return [_verify_one(row, turns[-1]) for row, turns in zip(rows, answers, strict=True)]


def home(row: Row) -> ModuleType:
    """The module that verifies a row of this domain: this one, or that of HLE."""
    return hle if "answer_type" in row.truth else sys.modules[__name__]


def _letter_said(row: Row, answer: str) -> str | None:
    options = row.truth.get("options", OPTIONS)
    if rule_of(row, RULES) == "first_letter":
        return first_letter_of(answer)
    if row.truth.get("output_regex"):
        return letter_by(row.truth["output_regex"], answer, options)
    return letter_of(answer, options)


def _verify_one(row: Row, answer: str) -> Verdict:
    if "answer_type" in row.truth:
        return home(row).verify([row], [[answer]])[0]
    if "letter" in row.truth:
        said, expected = _letter_said(row, answer), row.truth["letter"]
        missing, right = "no letter" if row.truth.get("output_regex") else "no letter after 'Answer:'", said == expected
    elif "exact" in row.truth:
        said, expected = exact_of(answer), row.truth["exact"]
        missing, right = "no 'Exact Answer:'", said is not None and same_text(said, expected)
    else:
        raise ValueError(f"science row {row.id!r}: its truth needs 'letter' or 'exact', it has {sorted(row.truth)}")
    if said is None:
        return Verdict(0.0, missing)
    return Verdict(1.0, "right") if right else Verdict(0.0, f"wrong answer: {said[:40]}")
