"""LiveCodeBench: packed tests that are not trusted, both kinds of programs, and the official rule of comparison."""
from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import pickle
import random
import shutil
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest

from m2rl_core import sandbox
from m2rl_core.domains import Row, livecodebench, rewards
from m2rl_core.domains.livecodebench import decoded
from m2rl_core.errors import StudyError
from m2rl_core.sandbox import Outcome
from m2rl_core.sandbox.interpreter import Interpreter

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None,
                                 reason="bwrap is not installed: apt-get install bubblewrap")
STDIN = [("1 2\n", "3\n"), ("0.5 1\n", "1.50"), ("-4 4", "0")]
CALLS = [("[1, 2]\n3", "[1, 3]"), ("[5]\n\"x\"", "[5, \"x\"]")]
ADD = "print(sum(map(float, input().split())))"
PAIR = "class Solution:\n    def pair(self, numbers: List[int], other) -> list:\n        return [numbers[0], other]"


def packed(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value, protocol=4))).decode()


def item(cases, function=None, **fields) -> Row:
    """An item of the data set's schema: the first test public, the others private and packed."""
    kind = "functional" if function else "stdin"
    found = [{"input": given, "output": printed, "testtype": kind} for given, printed in cases]
    truth = {"public_test_cases": json.dumps(found[:1]), "private_test_cases": packed(json.dumps(found[1:])),
             "metadata": json.dumps({"func_name": function} if function else {}), **fields}
    return Row("lcb/7", "coding", "lcb_v6", "", (), truth)


def block(code: str) -> str:
    return f"</think>\n```python\n{code}\n```"


def reasons(row, *codes) -> list[str]:
    found = rewards([row] * len(codes), [[block(code)] for code in codes])
    assert all((one.score == 1.0) == (one.reason == "right") for one in found)
    return [one.reason for one in found]


# --- tests of an item


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_both_packings_give_the_same_tests():
    cases = [{"input": "1", "output": "2"}]
    assert decoded(json.dumps(cases)) == decoded(packed(json.dumps(cases))) == decoded(packed(cases)) == cases
    assert decoded(packed([{"input": ("1", 2.5, None, True), "output": {"a": -3}}]))[0]["input"] == ("1", 2.5, None, True)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    """Fault: `pickle.loads`, as in every published reader: whoever writes the data set then runs code here."""
    row = item(STDIN, private_test_cases=packed(Malicious(tmp_path / "made")))
    with pytest.raises(StudyError, match=r"^row 'lcb/7': private_test_cases holds a pickle that asks for \w+\.mkdir:"):
        rewards([row], [[block(ADD)]])
    assert not (tmp_path / "made").exists()
    for value in (int, {1, 2}.union, object(), bytearray(b"x")):  # names of any kind, harmless ones too
        with pytest.raises(StudyError, match="a pickle that asks for"):
            decoded(packed(value))


@pytest.mark.parametrize("text", ["", "no base64!", "QUJD", packed("[")[:-8], packed("no json"),
                                  base64.b64encode(zlib.compress(b"\x80\x04.")).decode()])
def test_a_field_that_is_neither_is_named(text):
    with pytest.raises(StudyError, match="^row 'lcb/7': private_test_cases holds (neither JSON|more than)"):
        rewards([item(STDIN, private_test_cases=text)], [[block(ADD)]])


def test_a_bomb_is_not_unpacked(monkeypatch):
    """Fault: a field of a few kilobytes that fills the memory."""
    monkeypatch.setattr(livecodebench, "LARGEST", 1000)
    with pytest.raises(StudyError, match="^more than 1000 bytes"):
        decoded(packed("0" * 10**6))


def test_a_pickle_that_asks_for_much_memory_is_refused():
    """Fault: nine bytes (LONG_BINPUT with the largest number) for which the reader takes 32 gigabytes."""
    text = base64.b64encode(zlib.compress(b"]r\xff\xff\xff\xff.")).decode()
    with pytest.raises(StudyError, match="^a pickle that would fill the memory"):
        decoded(text)


@pytest.mark.parametrize("fields, said", [
    ({"private_test_cases": '{"a": 1}'}, "private_test_cases is no list of cases"),
    ({"private_test_cases": "[3]"}, "private_test_cases is no list of cases"),
    ({"private_test_cases": '[{"input": "1"}]'}, "private_test_cases is no list of cases"),
    ({"private_test_cases": '[{"input": "1", "output": 2}]'}, "an input and an output, both texts"),
    ({"private_test_cases": "[]", "public_test_cases": "[]"}, "there must be one at least"),
    ({"metadata": "func_name"}, "metadata is no JSON object"),
])
def test_a_row_of_another_schema_is_named(fields, said):
    with pytest.raises(StudyError, match=f"^row 'lcb/7': .*{said}"):
        rewards([item(STDIN, **fields)], [[block(ADD)]])


def test_public_tests_come_first_and_the_function_is_read():
    row = item(CALLS, "pair")
    found = livecodebench.tests(*(row.truth[name] for name in ("public_test_cases", "private_test_cases", "metadata")))
    assert found.cases == tuple(CALLS) and found.function == "pair"


# --- programs


@needs_bwrap
def test_programs_that_read_standard_input():
    """Faults: only the first test run; a preamble missing; outputs compared as texts only; a failure that passes."""
    assert reasons(
        item(STDIN), ADD, "a, b = map(Decimal, input().split())\nprint(a + b)", "print(3)", "print('3 0')", "1/0",
        "import sys\nfor line in sys.stdin:\n    print(fsum(map(float, line.split())))", "print(input(",
    ) == ["right", "test 1: NameError: name 'Decimal' is not defined", "wrong answer on test 2: 3",
          "wrong answer on test 1: 3 0", "test 1: ZeroDivisionError: division by zero", "right",
          "test 1: SyntaxError: '(' was never closed (program.py, line 2)"]


@needs_bwrap
def test_functions_that_are_called():
    """Faults: what a program prints taken for what it returns; types lost on the way; a function outside of a class."""
    assert reasons(
        item(CALLS, "pair"), PAIR, PAIR.replace("return ", "print(0); return "),
        PAIR.replace("[numbers[0], other]", "numbers[0], other"),
        PAIR.replace("return ", "print([1, 3]); "), "def pair(numbers, other):\n    return numbers[:1] + [other]",
        PAIR.replace("[numbers[0], other]", "[numbers[0], str(other)]"), PAIR.replace("[numbers[0], other]", "deque([1, 3])"),
        "def other(): pass", PAIR.replace("[numbers[0], other]", "[float(numbers[0]), other]"),
    ) == ["right", "right", "right", "wrong answer on test 1: null", "right", 'wrong answer on test 1: [1, "3"]',
          'wrong answer on test 1: {"other": "deque"}',
          "test 1: AttributeError: module '__main__' has no attribute 'pair'", "right"]


@pytest.mark.parametrize("printed, wanted, right", [
    ('{"tuple": [1, 2]}', "[1, 2]", True),  # a tuple is as good as a list
    ('[{"tuple": [1, 2]}]', "[[1, 2]]", False),  # not so inside of a list, as in the official comparison
    ("1.0", "1", True), ("true", "1", True), ('"1"', "1", False), ("NaN", "NaN", False), ("null", "null", True),
    ('{"dict": [["a", 1]]}', '{"a": 1}', True), ('{"dict": [[1, 1]]}', '{"1": 1}', False),
    ('{"other": "Same"}', "null", False), ("[" * 100_000, "[]", False), ("", "null", False),
    ('{"dict": [[[], 1]]}', "{}", False),
    ('{"tuple": [], "dict": []}', "[]", False), ('{"other": "x"}', '{"other": "x"}', False),
])
def test_comparison_of_values(printed, wanted, right):
    asked = livecodebench.Tests((("", wanted),), "f")
    assert (livecodebench.failure(Outcome((printed,)), asked, 0) == "") is right


@pytest.mark.parametrize("answer, code", [
    ("```python\na\n```", "a"), ("```\na\nb\n```", "a\nb"), ("```python\na\n```\nno:\n```py\nb\n```", "b"),
    ("no code", None), ("```python\na", None), ("```python\n```", None),
])
def test_the_last_block_counts(answer, code):
    assert livecodebench.code_of(answer) == code


class Counting:
    """A box that remembers how many tests each round held, and lets programs pass that say so."""

    kind, rounds = "counting", ()

    def run(self, programs):
        self.rounds = (*self.rounds, len(programs))
        assert all(len(program.inputs) == 1 and program.cpu_seconds == 6 for program in programs)
        return [Outcome(("1",)) if "good" in program.code else Outcome((None,), "input 1: time limit") for program in programs]


def test_a_failure_ends_a_program_after_few_tests(monkeypatch):
    """Fault: an endless program that costs 6 seconds for each of its tests."""
    box = Counting()
    monkeypatch.setattr(sandbox, "shared", lambda limits: box)
    assert reasons(item([("1", "1")] * 30), "good", "bad", "good") == ["right", "test 1: time limit", "right"]
    assert box.rounds == (3, 8, 32, 18)  # 1, 4, 16 and the last 9 tests of those that still run


def test_few_items_are_unpacked_at_once(monkeypatch):
    """Faults: the tests of a whole benchmark in memory; verdicts in the places of other items."""
    box = Counting()
    monkeypatch.setattr(sandbox, "shared", lambda limits: box)
    rows = [Row(**{**item([("1", "1")]).__dict__, "id": f"lcb/{i % 10}"}) for i in range(20)]
    found = rewards(rows, [[block("good" if i % 3 else "bad")] for i in range(20)])
    assert [one.score for one in found] == [float(i % 3 > 0) for i in range(20)]
    assert box.rounds == (16, 4)  # two answers to each of eight items, then of two


def test_without_a_sandbox_nothing_is_scored(monkeypatch):
    """Fault: a score of 0 on LiveCodeBench because this machine cannot run programs."""
    monkeypatch.setattr(sandbox, "shared", lambda limits: Interpreter("a test"))
    with pytest.raises(StudyError, match="^LiveCodeBench runs real programs, .* M2RL_SANDBOX=http"):
        rewards([item(STDIN)], [[block(ADD)]])


@needs_bwrap
def test_both_kinds_of_coding_rows_in_one_batch_keep_their_places():
    """Fault: verdicts of one kind in the places of the other."""
    unit = Row("hand/0", "coding", "", "", (), {"unit_tests": {"inputs": ["1 2"], "outputs": ["3.0"]}})
    found = rewards([unit, item(STDIN), unit, item(STDIN)], [[block(code)] for code in (ADD, "print(3)", "print(4)", ADD)])
    assert [one.score for one in found] == [1.0, 0.0, 0.0, 1.0]


@needs_bwrap
def test_a_large_output_is_no_failure():
    """Fault: LiveCodeBench's long answers cut off by the limits of the miniature."""
    assert reasons(item([("300000", "7\n" * 300_000)]), "print('7\\n' * int(input()))") == ["right"]


# --- beside the published code


@pytest.fixture(scope="module")
def published():
    """LiveCodeBench's own grading, from evalscope's wheel, without evalscope's framework around it."""
    names = ("evalscope", "evalscope.utils", "evalscope.utils.io_utils", "evalscope.utils.logger")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    file = Path(importlib.util.find_spec("evalscope").origin).parent / "benchmarks/live_code_bench/testing_util.py"
    for name in names:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = []
    sys.modules[names[2]].current_time = sys.modules[names[3]].get_logger = lambda: None
    try:
        spec = importlib.util.spec_from_file_location("published_livecodebench", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)
    return module


def passes(grade, *arguments) -> bool:
    """What the published code says; like its caller, an error of its own is a failure."""
    try:
        return grade(*arguments, 6)[0][-1] is True
    except (ArithmeticError, ValueError):
        return False


def test_outputs_are_compared_as_published(published):
    """Fault: a rule of comparison that drifts from LiveCodeBench's on some odd output."""
    rng = random.Random(5)
    parts = ("1", "1.0", "01", "1e0", "nan", "snan", "inf", "-0", "0", "Yes", "yes", " ", "  ", "\n", "\n\n", "1_0",
             "\t", "\r\n", "٣")

    def draw():
        return "".join(rng.choice(parts) for _ in range(rng.randint(1, 4)))
    agreed = set()
    for _ in range(600):
        want = draw()
        got = rng.choice((want.replace("1", "1.0"), f" {want}\n", want.replace(" ", "  "), draw()))
        program = f"import sys\nsys.stdout.write({got!r})"
        right = passes(published.grade_stdio, program, [""], [want])
        assert livecodebench.same(got, want) is right, (got, want)
        agreed.add(right)
    assert agreed == {True, False}


def test_values_are_compared_as_published(published, monkeypatch):
    """Fault: a value that changes on its way out of the sandbox. Our program runs here, for its text is this file's."""
    values = ("[1,2]", "(1,2)", "[(1,2)]", "[[1,2]]", "1", "1.0", "True", "'1'", "None", "{'a':1}", "{1:1}", "()",
              "float('nan')", "float('inf')", "{1}", "[None]", "deque([1])", "defaultdict(int,{'a':1})", "range(2)", "10**30",
              "[{'a':(1,)}]")
    wanted = ("[1,2]", "[[1,2]]", "1", "true", "\"1\"", "null", "{\"a\":1}", "{\"1\":1}", "[]", "[null]", "Infinity", "NaN",
              "[0,1]", "1" + "0" * 30, "[{\"a\":[1]}]")
    limit = sys.getrecursionlimit()
    for value in values:
        code = f"class Solution:\n    def f(self, x):\n        return {value}"
        monkeypatch.setattr(sys, "stdin", io.StringIO("1"))
        monkeypatch.setattr(sys, "stdout", printed := io.StringIO())
        exec(livecodebench.program(code, "f"), {"__name__": "__main__"})
        monkeypatch.undo()
        for want in wanted:
            ours = livecodebench.failure(Outcome((printed.getvalue(),)), livecodebench.Tests((("1", want),), "f"), 0) == ""
            assert ours is passes(published.grade_call_based, code, ["1"], [want], "f"), (value, want)
    sys.setrecursionlimit(limit)
