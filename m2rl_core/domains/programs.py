"""Small programs over a list of integers, composed of parts: keep some, change each, print a result.

A composition is the tuple of its parts. Here is what it computes (`evaluate`, in functions of our own), how it reads
in words and in Python, what slips a careless programmer makes, and inputs on which those slips show.
"""
from __future__ import annotations

from collections.abc import Sequence
from random import Random

DIVISORS, BOUNDS, TERMS, FACTORS = (3, 4, 5), range(1, 9), range(1, 10), (2, 3, 4, 5)  # constants of the parts
TESTS, NUMBERS, LOWEST, HIGHEST = 5, (4, 7), -9, 20  # tests a program, integers a test, their range
DRAWS = 8  # of inputs, until they tell a program from its slips

KEEPS = {  # name: (test of a number, its Python with the value as {}, its words, its constants)
    "even": (lambda v, k: v % 2 == 0, "{}%2==0", "even numbers", (None,)),
    "odd": (lambda v, k: v % 2 == 1, "{}%2==1", "odd numbers", (None,)),
    "divisible": (lambda v, k: v % k == 0, "{}%{k}==0", "numbers divisible by {k}", DIVISORS),
    "greater": (lambda v, k: v > k, "{}>{k}", "numbers greater than {k}", BOUNDS),
    "less": (lambda v, k: v < k, "{}<{k}", "numbers less than {k}", BOUNDS),
}
CHANGES = {  # name: (function, its Python, its words, its constants)
    "square": (lambda v, k: v * v, "{}**2", "square {them}", (None,)),
    "negate": (lambda v, k: -v, "-{}", "negate {them}", (None,)),
    "add": (lambda v, k: v + k, "{}+{k}", "add {k} to {them}", TERMS),
    "subtract": (lambda v, k: v - k, "{}-{k}", "subtract {k} from {them}", TERMS),
    "times": (lambda v, k: v * k, "{}*{k}", "multiply {them} by {k}", FACTORS),
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
MIXED_UP = {"even": "odd", "odd": "even", "greater": "less", "less": "greater", "add": "subtract", "subtract": "add"}
WORDS = (  # opening, choice, whom to change, showing
    ("Write Python. Read integers.", "Keep the {}", "each", "Print {}"),
    ("Write Python. Given a line of integers,", "keep only {}", "each one", "print {}"),
    ("Python: read integers.", "Take only {}", "them", "Show {}"),
)
READ = "map(int,input().split())"
Part = tuple[str, int | None]  # name and constant; the last part of a composition prints
Parts = tuple[Part, ...]


# --- what it is


def draw_part(rng: Random, kinds: dict, but: Sequence[str] = ()) -> Part:
    """One part of KEEPS or CHANGES with its constant, but none of the names in `but`."""
    name = rng.choice([name for name in kinds if name not in but])
    return name, rng.choice(kinds[name][3])


def draw_composition(rng: Random, shape: str) -> Parts:
    """A composition of a shape: "keep", "change", "both" (in this order), "long" (a change first, or two changes)."""
    keep, change = draw_part(rng, KEEPS), draw_part(rng, CHANGES)
    sums = ("add", "subtract")  # two of them would be one
    second = draw_part(rng, CHANGES, but=sums if change[0] in sums else (change[0],))
    middle = {"keep": [keep], "change": [change], "both": [keep, change],
              "long": rng.choice(([change, keep], [keep, change, second]))}[shape]
    names = [name for name in PRINTS if name != "count" or middle[-1][0] in KEEPS]  # a change changes no count
    return (*middle, (rng.choice(names), None))


def evaluate(parts: Parts, numbers: Sequence[int]) -> str | None:
    """What the right program prints for a list of integers; None where nothing is left to print."""
    values = list(numbers)
    for name, k in parts[:-1]:
        if name in KEEPS:
            values = [v for v in values if KEEPS[name][0](v, k)]
        else:
            values = [CHANGES[name][0](v, k) for v in values]
    return str(PRINTS[parts[-1][0]][0](values)) if values else None


def slips(parts: Parts) -> list[Parts]:
    """What a careless program computes: a part left out (these come first), two swapped, a constant or name off."""
    found = [parts[:i] + parts[i + 1:] for i in range(len(parts) - 1)]
    found += [parts[:i] + (parts[i + 1], parts[i]) + parts[i + 2:] for i in range(len(parts) - 2)]
    for i, (name, k) in enumerate(parts[:-1]):
        others = [(name, k + step) for step in (-1, 1) if k is not None and k + step > 0]
        others += [(MIXED_UP[name], k)] if name in MIXED_UP else []
        found += [(*parts[:i], other, *parts[i + 1:]) for other in others]
    return found + [(*parts[:-1], (name, None)) for name in PRINTS if name != parts[-1][0]]


def draw_tests(rng: Random, parts: Parts) -> dict | None:
    """Inputs on which slips show, and their outputs: {"inputs": [...], "outputs": [...]}, a line each.

    Leaving out any part shows on at least one of them; None where it cannot (the largest of those greater than 5), or
    where there is seldom anything to print (times 4, then odd). Every input leaves something to print.
    """
    careless, best = slips(parts), (0, False, [], [])
    for _ in range(DRAWS):
        drawn = [[rng.randint(LOWEST, HIGHEST) for _ in range(rng.randint(*NUMBERS))] for _ in range(4 * TESTS)]
        lists = [numbers for numbers in drawn if evaluate(parts, numbers) is not None][:TESTS]
        if len(lists) < TESTS:
            return None
        outputs = [evaluate(parts, numbers) for numbers in lists]
        shows = [any(evaluate(slip, numbers) != output for numbers, output in zip(lists, outputs, strict=True))
                 for slip in careless]
        best = max(best, (sum(shows), all(shows[:len(parts) - 1]), lists, outputs), key=lambda one: one[0])
        if all(shows):
            break
    _, needs_all, lists, outputs = best
    inputs = [" ".join(map(str, numbers)) + "\n" for numbers in lists]
    return {"inputs": inputs, "outputs": [output + "\n" for output in outputs]} if needs_all else None


# --- how it is written


def fingerprint(parts: Parts) -> str:
    """The problem behind the wording, for example "coding: greater 5, add 4, sum"."""
    return "coding: " + ", ".join(name if k is None else f"{name} {k}" for name, k in parts)


def parts_of(name: str) -> Parts:
    """The composition that a fingerprint names; ValueError for a row that is not of the miniature."""
    head, _, names = name.partition("coding: ")
    found = tuple((part, int(k) if k else None) for part, _, k in (one.partition(" ") for one in names.split(", ")))
    if head or found[-1][0] not in PRINTS or any(part not in KEEPS | CHANGES for part, _ in found[:-1]):
        raise ValueError(f"not a coding row of the miniature: fingerprint {name!r}")
    return found


def words(part: Part, them: str = "each") -> str:
    """A part in words: "even numbers", "add 4 to each", "the sum"."""
    name, k = part
    return (KEEPS | CHANGES | PRINTS)[name][2].format(k=k, them=them)


def prompt(rng: Random, parts: Parts) -> str:
    """The task in one of three wordings."""
    opening, keep, them, show = rng.choice(WORDS)
    said = [keep.format(words(part)) if part[0] in KEEPS else words(part, them) for part in parts[:-1]]
    said.append(show.format(words(parts[-1])))
    if opening.endswith(","):
        return f"{opening} {', '.join(said)}."
    return " ".join([opening, *(text[0].upper() + text[1:] + "." for text in said)])


def python(part: Part, value: str = "x") -> str:
    """A part as Python on an expression, in brackets where that is more than a name: "(x+4)**2"."""
    text = (KEEPS | CHANGES | PRINTS)[part[0]][1]
    return text.replace("{}", f"({value})" if part[0] not in PRINTS and value != "x" else value).replace(
        "{k}", str(part[1]))


def program(parts: Parts) -> tuple[str, list[str]]:
    """The Python of a composition, and the steps of working it out, a line each."""
    value, condition, steps = "x", "", []
    for part in parts[:-1]:
        if part[0] in KEEPS:
            condition = python(part, value)
            steps.append(f"keep {condition}")
        else:
            value = python(part, value)
            steps.append(f"map {value}")
    steps.append(f"print {parts[-1][0]}")
    listed = f"[{value} for x in {READ}{' if ' + condition if condition else ''}]"
    return f"print({python(parts[-1], listed)})", steps
