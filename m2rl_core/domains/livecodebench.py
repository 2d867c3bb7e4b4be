"""LiveCodeBench's verdicts: its test cases read without trusting them, its rule of comparison, every program in the sandbox.

`truth` holds three fields of the data set's rows as they are: `public_test_cases`, `private_test_cases`, `metadata`
(`livecodebench/code_generation_lite`). Each test runs on its own for at most 6 seconds, here of CPU, in the official code
of wall time. A program is run as the script that it is; the official code wraps it into a function, which a few fail for.
"""
from __future__ import annotations

import base64
import binascii
import decimal
import functools
import io
import json
import pickle
import pickletools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from m2rl_core import sandbox
from m2rl_core.domains import Row, Verdict
from m2rl_core.errors import StudyError, one_line

SECONDS = 6  # a test
LIMITS = sandbox.Limits(memory_bytes=4 * 2**30, output_bytes=8 * 2**20)
LARGEST = 2**30  # bytes of an item's tests, decompressed
ITEMS = 8  # whose tests are unpacked at once: some hold a hundred megabytes
FIRST, MORE = 1, 4  # tests of a program in the first round, and how many times as many in each one after it

# What every program finds imported, in the official order: later names hide earlier ones.
STARS = ("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
         "functools", "operator", "io", "sys", "json", "builtins", "typing")
MODULES = tuple(name for name in STARS if name not in ("builtins", "typing"))
BEFORE = "; ".join([*(f"from {name} import *" for name in STARS), f"import {', '.join(MODULES)}",
                    "sys.setrecursionlimit(50000)"]) + "\n"

# Around a program whose function is called: what it prints goes nowhere, what it returns is printed with its types.
QUIET = "import io as _io, json as _json, sys as _sys; _out, _sys.stdout = _sys.stdout, _io.StringIO()\n"
CALL = """
def _plain(value):
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(part) for part in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(name), _plain(part)] for name, part in value.items()]}
    return {"other": type(value).__name__}
_asked = Solution() if "Solution" in globals() else _sys.modules["__main__"]
_given = [_json.loads(line) for line in _sys.stdin.read().strip("\\n").split("\\n")]
_said = getattr(_asked, FUNCTION)(*_given)
_out.write(_json.dumps(_plain(_said)))
_out.flush()
"""


@dataclass(frozen=True)
class Tests:
    """An item's tests: (input, expected output) of each, and the name of the function to call (None: standard input)."""

    cases: tuple[tuple[str, str], ...]
    function: str | None

    __test__ = False  # not for pytest to collect


class _Unpickler(pickle.Unpickler):
    """Builds texts, numbers, lists, tuples and dicts; everything else of a pickle starts with a name, which is refused."""

    def find_class(self, module: str, name: str):
        raise StudyError(f"a pickle that asks for {module}.{name}: it would run code, so it is refused")


def decoded(text: str) -> list[dict]:
    """The test cases that a field holds: JSON, or the base64 of the zlib of a pickle of JSON.

    StudyError where a pickle asks for more than plain values, and where the field is neither.
    """
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(text, validate=True), LARGEST)
        if stream.unconsumed_tail or not stream.eof:
            raise StudyError(f"more than {LARGEST} bytes, or cut off")
        for code, number, at in pickletools.genops(data):
            if "PUT" in code.name and number > at:  # a part's number makes room for as many
                raise StudyError("a pickle that would fill the memory")
        found = _Unpickler(io.BytesIO(data)).load()
        return json.loads(found) if isinstance(found, str) else found
    except StudyError:
        raise
    except (binascii.Error, zlib.error, ValueError, pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError,
            MemoryError, OverflowError) as error:
        raise StudyError(f"neither JSON nor a packed pickle of it ({type(error).__name__}: {error})") from error


@functools.lru_cache(maxsize=ITEMS)
def tests(public: str, private: str, metadata: str, row: str = "") -> Tests:
    """Public tests, then private ones, as the official code runs them; StudyError names the row and the field."""
    cases = []
    for field, text in (("public_test_cases", public), ("private_test_cases", private)):
        try:
            found = decoded(text)
            cases += [(case["input"], case["output"]) for case in found]
        except StudyError as error:
            raise StudyError(f"row {row!r}: {field} holds {error}") from error
        except (TypeError, KeyError) as error:
            raise StudyError(f"row {row!r}: {field} is no list of cases with input and output") from error
    if not cases or not all(isinstance(part, str) for case in cases for part in case):
        raise StudyError(f"row {row!r}: test cases need an input and an output, both texts, and there must be one at least")
    try:
        return Tests(tuple(cases), json.loads(metadata or "{}").get("func_name"))
    except (ValueError, AttributeError) as error:
        raise StudyError(f"row {row!r}: metadata is no JSON object: {metadata[:60]!r}") from error


def code_of(answer: str) -> str | None:
    """What stands between the last two lines with a ```; None where there are no two, or nothing is between them."""
    lines = answer.split("\n")
    marks = [i for i, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[marks[-2] + 1:marks[-1]]) or None if len(marks) > 1 else None


def program(code: str, function: str | None) -> str:
    """The whole source that runs on one test."""
    if function is None:
        return BEFORE + code
    return QUIET + BEFORE + code + CALL.replace("FUNCTION", repr(function))


def verify(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Verdict]:
    """1 where the last block of code passes every test of its row; a program's first failure ends it.

    StudyError for a row whose tests cannot be read, and where there is no sandbox for real programs.
    """
    box = sandbox.shared(LIMITS)
    if box.kind == "interpreter":
        raise StudyError(f"LiveCodeBench runs real programs, which the {box.about} cannot: apt-get install bubblewrap, "
                         "or M2RL_SANDBOX=http://... for a SandboxFusion server")
    items: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        items.setdefault(row.id, []).append(i)
    verdicts: list[Verdict | None] = [None] * len(rows)
    groups = list(items.values())
    for start in range(0, len(groups), ITEMS):
        places = [i for item in groups[start:start + ITEMS] for i in item]
        for i, verdict in zip(places, _verdicts(box, [rows[i] for i in places], [answers[i] for i in places]), strict=True):
            verdicts[i] = verdict
    return verdicts


def _verdicts(box, rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Verdict]:
    asked = [tests(row.truth["public_test_cases"], row.truth["private_test_cases"], row.truth.get("metadata", ""), row.id)
             for row in rows]
    codes = [code_of(turns[-1]) for turns in answers]
    verdicts = [Verdict(0.0, "no code block") if code is None else None for code in codes]
    done, size = 0, FIRST
    while running := [i for i, verdict in enumerate(verdicts) if verdict is None]:
        jobs = [(i, number) for i in running for number in range(done, min(done + size, len(asked[i].cases)))]
        outcomes = box.run([sandbox.Program(program(codes[i], asked[i].function), (asked[i].cases[number][0],), SECONDS)
                            for i, number in jobs])
        for (i, number), outcome in zip(jobs, outcomes, strict=True):
            if verdicts[i] is None and (wrong := failure(outcome, asked[i], number)):
                verdicts[i] = Verdict(0.0, wrong)
        done, size = done + size, size * MORE
        for i in running:
            if verdicts[i] is None and done >= len(asked[i].cases):
                verdicts[i] = Verdict(1.0, "right")
    return verdicts


def failure(outcome: sandbox.Outcome, asked: Tests, number: int) -> str:
    """Why a program failed test `number` (from 0), in one line; "" where it passed."""
    got, want = outcome.outputs[0], asked.cases[number][1]
    if got is None:
        return f"test {number + 1}: {outcome.error.removeprefix('input 1: ')}"
    right = same(got, want) if asked.function is None else returned(got) == json.loads(want)
    return "" if right else f"wrong answer on test {number + 1}: {one_line(got, 40)}"


def returned(text: str) -> Any:
    """The value that the call gave, a tuple as a list (inside of it, tuples stay); equal to nothing for what is none."""
    try:
        value = _value(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return _Nothing()
    return list(value) if isinstance(value, tuple) else value


class _Nothing:
    """Equal to nothing that JSON holds."""


def _value(part):
    if isinstance(part, list):
        return [_value(each) for each in part]
    if not isinstance(part, dict):
        return part
    ((kind, parts),) = part.items()
    if kind == "tuple":
        return tuple(_value(each) for each in parts)
    return {_value(name): _value(each) for name, each in parts} if kind == "dict" else _Nothing()


def same(got: str, want: str) -> bool:
    """LiveCodeBench's rule: as many lines, each equal without its outer spaces, or equal as decimal numbers."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (got, want))
    return len(ours) == len(theirs) and all(a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_numbers(ours: str, theirs: str) -> bool:
    try:
        return [decimal.Decimal(word) for word in ours.split()] == [decimal.Decimal(word) for word in theirs.split()]
    except decimal.InvalidOperation:  # no number, or a signalling NaN
        return False
