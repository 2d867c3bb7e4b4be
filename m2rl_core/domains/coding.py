"""Coding: small programs over a line of integers, from composed parts: keep some, change each, print a result.

"lcb_v5" (miniature): parts that training shows, in compositions that it does not. "lcb_v6" (miniature): longer ones,
with two changes or a change before the choice. A program must pass all of its tests in the sandbox, as in
LiveCodeBench; expected outputs come from `evaluate`, never from running text, and stay outside of the sandbox.
"""
from __future__ import annotations

import decimal
import hashlib
import re
from collections.abc import Sequence
from random import Random

from m2rl_core import sandbox
from m2rl_core.domains import Row, Verdict

# Difficulty, in one place. SFT sees a part of the kinds of compositions and half of its rows answer without working.
SFT_TERSE = 0.5  # share of SFT rows with an empty <think>
SFT_KINDS = 0.5  # share of the kinds of full and long compositions that SFT shows; two-part ones are all shown
SFT_SHAPES = {"keep": 0.3, "change": 0.3, "both": 0.3, "long": 0.1}  # shares of the shapes of compositions
RL_SHAPES = {"keep": 0.1, "change": 0.1, "both": 0.5, "long": 0.3}
TEST_SHAPES = {"lcb_v5": {"keep": 0.1, "change": 0.1, "both": 0.8}, "lcb_v6": {"long": 1.0}}
KEEP_DIVISORS, KEEP_BOUNDS, CHANGE_TERMS, CHANGE_FACTORS = (3, 4, 5), range(1, 9), range(1, 10), (2, 3, 4, 5)
TESTS, NUMBERS, LOWEST, HIGHEST = 5, (4, 7), -9, 20  # tests a program, integers a test, their range
DRAWS = 30  # of inputs, until they tell a program from its slips

KEEPS = {  # name: (test of a number, its Python with the value as {}, its words)
    "even": (lambda v, k: v % 2 == 0, "{}%2==0", "even numbers"),
    "odd": (lambda v, k: v % 2 == 1, "{}%2==1", "odd numbers"),
    "divisible": (lambda v, k: v % k == 0, "{}%{k}==0", "numbers divisible by {k}"),
    "greater": (lambda v, k: v > k, "{}>{k}", "numbers greater than {k}"),
    "less": (lambda v, k: v < k, "{}<{k}", "numbers less than {k}"),
}
CHANGES = {  # name: (function, its Python, its words)
    "square": (lambda v, k: v * v, "{}*{}", "square {them}"),
    "negate": (lambda v, k: -v, "-{}", "negate {them}"),
    "add": (lambda v, k: v + k, "{}+{k}", "add {k} to {them}"),
    "subtract": (lambda v, k: v - k, "{}-{k}", "subtract {k} from {them}"),
    "times": (lambda v, k: v * k, "{}*{k}", "multiply {them} by {k}"),
}
PRINTS = {  # name: (function of the list, its Python, its words)
    "sum": (sum, "sum({})", "the sum"),
    "largest": (max, "max({})", "the largest"),
    "smallest": (min, "min({})", "the smallest"),
    "count": (len, "len({})", "how many"),
    "first": (lambda vs: vs[0], "{}[0]", "the first"),
    "last": (lambda vs: vs[-1], "{}[-1]", "the last"),
    "all": (lambda vs: " ".join(map(str, vs)), "*{}", "all"),
}
WORDS = (  # opening, choice, whom to change, showing
    ("Write Python. Read integers.", "Keep the {}", "each", "Print {}"),
    ("Write Python. Given a line of integers,", "keep only {}", "each one", "print {}"),
    ("Python: read integers.", "Take only {}", "them", "Show {}"),
)
Part = tuple[str, int | None]  # name and constant; a composition is a tuple of parts, the last of them prints


# --- compositions


def evaluate(parts: Sequence[Part], numbers: Sequence[int]) -> str | None:
    """What the right program prints for a list of integers; None where nothing is left to print."""
    values = list(numbers)
    for name, k in parts[:-1]:
        if name in KEEPS:
            values = [v for v in values if KEEPS[name][0](v, k)]
        else:
            values = [CHANGES[name][0](v, k) for v in values]
    return str(PRINTS[parts[-1][0]][0](values)) if values else None


def fingerprint(parts: Sequence[Part]) -> str:
    """The problem behind the wording, for example "coding: greater 5, add 4, sum"."""
    return "coding: " + ", ".join(name if k is None else f"{name} {k}" for name, k in parts)


def parts_of(print_of: str) -> tuple[Part, ...]:
    """The composition that `fingerprint` names; ValueError for a row that this module did not make."""
    head, _, names = print_of.partition("coding: ")
    found = tuple((name, int(k) if k else None) for name, _, k in (part.partition(" ") for part in names.split(", ")))
    if head or not found or found[-1][0] not in PRINTS or any(n not in KEEPS | CHANGES for n, _ in found[:-1]):
        raise ValueError(f"no coding row of the miniature: fingerprint {print_of!r}")
    return found


def _keep(rng: Random) -> Part:
    name = rng.choice(tuple(KEEPS))
    constants = {"divisible": KEEP_DIVISORS, "greater": KEEP_BOUNDS, "less": KEEP_BOUNDS}.get(name)
    return name, rng.choice(constants) if constants else None


def _change(rng: Random, but: tuple[str, ...] = ()) -> Part:
    name = rng.choice([name for name in CHANGES if name not in but])
    constants = {"add": CHANGE_TERMS, "subtract": CHANGE_TERMS, "times": CHANGE_FACTORS}.get(name)
    return name, rng.choice(constants) if constants else None


def _composition(rng: Random, shapes: dict[str, float]) -> tuple[Part, ...]:
    """Parts of a shape drawn by its share: keep, change, both (in this order), or long."""
    shape = rng.choices(tuple(shapes), tuple(shapes.values()))[0]
    keep, change = _keep(rng), _change(rng)
    sums = ("add", "subtract")  # two of them would be one
    second = _change(rng, but=sums if change[0] in sums else (change[0],))
    middle = {"keep": [keep], "change": [change], "both": [keep, change],
              "long": rng.choice(([change, keep], [keep, change, second]))}[shape]
    names = [name for name in PRINTS if name != "count" or middle[-1][0] in KEEPS]  # a change changes no count
    return (*middle, (rng.choice(names), None))


def _shown(parts: Sequence[Part]) -> bool:
    """Whether SFT shows this kind of composition: its names without constants decide, by SHA-256."""
    kind = " ".join(name for name, _ in parts)
    return len(parts) == 2 or int(hashlib.sha256(kind.encode()).hexdigest()[:8], 16) / 16**8 < SFT_KINDS


def _slips(parts: tuple[Part, ...]) -> list[tuple[Part, ...]]:
    """Compositions that a careless program computes: a part left out, two in the wrong order, a constant or name off."""
    slips = [parts[:i] + parts[i + 1:] for i in range(len(parts) - 1)]
    slips += [parts[:i] + (parts[i + 1], parts[i]) + parts[i + 2:] for i in range(len(parts) - 2)]
    for i, (name, k) in enumerate(parts[:-1]):
        if k is not None:
            slips += [parts[:i] + ((name, k + d),) + parts[i + 1:] for d in (-1, 1) if k + d > 0]
        slips += [parts[:i] + ((other, k),) + parts[i + 1:] for other in _opposite(name)]
    return slips + [(*parts[:-1], (name, None)) for name in PRINTS if name != parts[-1][0]]


def _opposite(name: str) -> tuple[str, ...]:
    return {"even": ("odd",), "odd": ("even",), "greater": ("less",), "less": ("greater",), "add": ("subtract",),
            "subtract": ("add",)}.get(name, ())


def _tests(rng: Random, parts: tuple[Part, ...]) -> dict | None:
    """Inputs that tell the program from its slips, with outputs; None for a composition with an idle part."""
    slips, best = _slips(parts), None
    for _ in range(DRAWS):
        lists = []
        while len(lists) < TESTS:
            numbers = [rng.randint(LOWEST, HIGHEST) for _ in range(rng.randint(*NUMBERS))]
            if evaluate(parts, numbers) is not None:
                lists.append(numbers)
        outputs = [evaluate(parts, numbers) for numbers in lists]
        caught = [any(evaluate(slip, numbers) != output for numbers, output in zip(lists, outputs, strict=True))
                  for slip in slips]
        if best is None or sum(caught) > best[0]:
            best = sum(caught), all(caught[:len(parts) - 1]), lists, outputs  # leaving out comes first in the slips
        if all(caught):
            break
    _, told, lists, outputs = best
    inputs = [" ".join(map(str, numbers)) + "\n" for numbers in lists]
    return {"unit_tests": {"inputs": inputs, "outputs": [output + "\n" for output in outputs]}} if told else None


# --- rows


def corpus(rng: Random) -> str:
    """A snippet for each of a few parts, with the words for it: no composition, so none that is held out."""
    lines = ["# read integers", "a=map(int,input().split())"]
    for _ in range(2):
        keep, change = _keep(rng), _change(rng)
        lines += [f"# keep the {_keep_words(keep)}", f"[x for x in a if {_python(keep, 'x')}]"]
        lines += [f"# {_change_words(change, rng.choice(WORDS)[2])}", f"[{_python(change, 'x')} for x in a]"]
    name = rng.choice(tuple(PRINTS))
    return "\n".join([*lines, f"# print {PRINTS[name][2]}", f"print({PRINTS[name][1].format('a')})"])


def sft(rng: Random) -> Row:
    """A training row with its answer, worked or terse, of a kind of composition that SFT shows."""
    while True:
        row = _row(rng, SFT_SHAPES, "Code")
        if _shown(parts_of(row.fingerprint)):
            return Row(**{**row.__dict__, "turns": tuple(respond(row, worked=rng.random() >= SFT_TERSE))})


def rl(rng: Random) -> Row:
    """An RLVR prompt, of any kind of composition."""
    return _row(rng, RL_SHAPES, "programs")


def test(benchmark: str, rng: Random) -> Row:
    """An item of the miniature `lcb_v5` or `lcb_v6`."""
    return _row(rng, TEST_SHAPES[benchmark], benchmark)


test.__test__ = False  # a maker of rows, not a test for pytest to collect


def respond(row: Row, worked: bool = True) -> list[dict]:
    """The right answer; worked: the parts are named first, in the order of the work."""
    return _answer(parts_of(row.fingerprint), worked)


def spoil(row: Row, rng: Random) -> list[dict]:
    """An answer of the right format whose program prints something else on at least one of the row's tests."""
    tests = row.truth["unit_tests"]
    lists = [[int(word) for word in text.split()] for text in tests["inputs"]]
    wrong = [slip for slip in _slips(parts_of(row.fingerprint))
             if any(evaluate(slip, numbers) != output.strip()
                    for numbers, output in zip(lists, tests["outputs"], strict=True))]
    return _answer(rng.choice(wrong), rng.random() >= SFT_TERSE)


def _row(rng: Random, shapes: dict[str, float], source: str) -> Row:
    truth = None
    while truth is None:
        parts = _composition(rng, shapes)
        truth = _tests(rng, parts)
    return Row("", "coding", source, fingerprint(parts), ({"role": "user", "content": _prompt(rng, parts)},), truth)


def _keep_words(part: Part) -> str:
    return KEEPS[part[0]][2].format(k=part[1])


def _change_words(part: Part, them: str) -> str:
    return CHANGES[part[0]][2].format(k=part[1], them=them)


def _prompt(rng: Random, parts: Sequence[Part]) -> str:
    opening, keep, them, show = rng.choice(WORDS)
    said = [keep.format(_keep_words(part)) if part[0] in KEEPS else _change_words(part, them) for part in parts[:-1]]
    said.append(show.format(PRINTS[parts[-1][0]][2]))
    if opening.endswith(","):
        return f"{opening} {', '.join(said)}."
    return " ".join([opening, *(text[0].upper() + text[1:] + "." for text in said)])


def _python(part: Part, value: str) -> str:
    """The Python of one part on an expression; brackets where the expression is more than a name."""
    text = (KEEPS | CHANGES)[part[0]][1]
    return text.replace("{}", value if value == "x" else f"({value})").replace("{k}", str(part[1]))


def _answer(parts: Sequence[Part], worked: bool) -> list[dict]:
    value, test_of, steps = "x", "", []
    for part in parts[:-1]:
        if part[0] in KEEPS:
            test_of = _python(part, value)
            steps.append(f"keep: {test_of}")
        else:
            value = _python(part, value)
            steps.append(f"map: {value}")
    steps.append(f"print: {parts[-1][0]}")
    listed = f"[{value} for x in a{' if ' + test_of if test_of else ''}]"
    code = f"a=map(int,input().split())\nprint({PRINTS[parts[-1][0]][1].format(listed)})"
    work = "\n".join(steps) if worked else ""
    return [{"role": "assistant", "content": f"<think>\n{work}\n</think>\n\n```python\n{code}\n```"}]


# --- the verifier


def verify(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Verdict]:
    """1.0 where the last python block passes every unit test; all programs run in one batch in the sandbox.

    `truth` holds `unit_tests` {inputs, outputs}, and may hold `cpu_seconds` (all tests together, default 1).
    ValueError names a row without tests.
    """
    programs: dict[int, sandbox.Program] = {}
    for i, (row, turns) in enumerate(zip(rows, answers, strict=True)):
        tests = row.truth["unit_tests"]
        if not tests["inputs"] or len(tests["inputs"]) != len(tests["outputs"]):
            raise ValueError(f"row {row.id!r}: unit_tests needs as many inputs as outputs, and at least one")
        code = code_of(turns[-1])
        if code is not None:
            programs[i] = sandbox.Program(code, tuple(tests["inputs"]), row.truth.get("cpu_seconds", 1))
    outcomes = dict(zip(programs, sandbox.shared().run(list(programs.values())), strict=True)) if programs else {}
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
        if not same(got, want):
            return Verdict(0.0, f"wrong answer on input {number}: {' '.join(got.split())[:40]}")
    return Verdict(1.0, "right")


def same(got: str, want: str) -> bool:
    """LiveCodeBench's rule: as many lines, each equal without its outer spaces, or equal as decimal numbers."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (got, want))
    return len(ours) == len(theirs) and all(
        a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_numbers(ours: str, theirs: str) -> bool:
    try:
        return [decimal.Decimal(word) for word in ours.split()] == [decimal.Decimal(word) for word in theirs.split()]
    except decimal.InvalidOperation:  # no number, or a signalling NaN
        return False
