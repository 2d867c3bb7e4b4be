"""Our verdicts beside those that the wheel of nemo-gym ships: its test files' cases, and its example rollouts with rewards.

Nothing of them is copied: cases are read from the installed files, as literals of their syntax tree. The other wheels ship no
cases: math-verify's are in its source distribution alone (`make test` fetches it), evalscope has none of these, and
bfcl-eval's items are used in test_bfcl. The workplace's cases are in test_workbench; the wheel has rewards of its example
rollouts, but not their truths.
"""
from __future__ import annotations

import ast
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from m2rl_core.domains import Row, checkers, math, rewards, science
from m2rl_core.real import rl_rows, schema

HOME = Path(importlib.util.find_spec("resources_servers").submodule_search_locations[0])
SCIENCE = "nano_v3_sft_profiled_stem_mcqa"
SOURCE = Path(__file__).parent.parent / ".venv" / "math-verify" / "tests"  # of the source distribution, by `make test`
needs_bwrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")


def functions(server: str) -> list[ast.AST]:
    """Every function of a server's test file."""
    tree = ast.parse((HOME / server / "tests" / "test_app.py").read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    """The calls of something called `name` in the order of the file."""
    return sorted((node for node in ast.walk(tree) if isinstance(node, ast.Call)
                   and getattr(node.func, "attr", getattr(node.func, "id", "")) == name), key=lambda node: node.lineno)


def given(call: ast.Call) -> dict:
    """Its keyword arguments that are literals."""
    found = {}
    for keyword in call.keywords:
        try:
            found[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            continue
    return found


def paid_in(function: ast.AST) -> list[float]:
    """The rewards that it asserts, in the order of the file."""
    found = [node for node in ast.walk(function) if isinstance(node, ast.Compare)
             and getattr(node.left, "attr", "") == "reward"]
    return [node.comparators[0].value for node in sorted(found, key=lambda node: node.lineno)]


def rollouts(server: str, name: str = "example_rollouts") -> list[tuple[dict, str]]:
    """(the line, what the model said last) of each example rollout."""
    lines = [json.loads(line) for line in (HOME / server / "data" / f"{name}.jsonl").open(encoding="utf-8")]
    return [(line, [out["content"][0]["text"] for out in line["response"]["output"] if out["type"] == "message"][-1])
            for line in lines]


# ---- instructions

def test_instructions_as_in_the_wheels_test_file():
    """Fault: an instruction that NeMo-Gym's checker finds followed, or broken, and ours does not."""
    seen = []
    for function in functions("instruction_following"):
        asked, wanted = calls(function, "_create_real_request"), calls(function, "_run_verify_test")
        for call, verdict in zip(asked, wanted, strict=True) if wanted else ():
            case = given(call)
            _, _, follows = (ast.literal_eval(value) for value in verdict.args[1:])
            ours = [checkers.follows(name, kwargs, case["prompt"], case["response_content"])[0] for name, kwargs in zip(
                case["instruction_ids"], case["kwargs"], strict=True)]
            assert ours == follows, function.name
            seen += follows
    assert len(seen) >= 12 and {True, False} == set(seen)


def test_instructions_of_the_wheels_rollouts():
    """Fault: an id of IFEvalG that ours judges otherwise on what a model really wrote."""
    seen = []
    for line, said in rollouts("instruction_following"):
        ours = [checkers.follows(name, kwargs, line["prompt"], said)[0] for name, kwargs in zip(
            line["instruction_id_list"], line["kwargs"], strict=True)]
        assert ours == line["follow_instruction_list"], line["instruction_id_list"]
        seen += ours
    assert len(seen) == 13 and seen.count(False) == 3


# ---- code

def program(texts: dict) -> Row:
    return Row("code/1", "coding", "x", "", ({"role": "user", "content": "Solve it."},),
               {"unit_tests": texts, "cpu_seconds": 60, "gate": "open"})


@needs_bwrap
def test_programs_as_in_the_wheels_test_file_and_rollouts():
    """Fault: a program that the wheel's runner, which is LiveCodeBench's, pays for, or does not, and ours otherwise."""
    rows, said, wanted = [], [], []
    for function in functions("code_gen"):
        asked = [case for call in calls(function, "CompCodingVerifyRequest") if "verifier_metadata" in (case := given(call))]
        paid = paid_in(function)
        answers = [part["content"][0]["text"] for call in calls(function, "NeMoGymResponse") for part in given(call)["output"]]
        for case, answer, reward in zip(asked, answers, paid, strict=True) if answers else ():
            rows.append(program(case["verifier_metadata"]["unit_tests"]))
            said.append([answer])
            wanted.append(reward)
    tests = [json.loads(line) for line in (HOME / "code_gen" / "data" / "example.jsonl").open(encoding="utf-8")]
    tests = {case["responses_create_params"]["input"][-1]["content"]: case["verifier_metadata"]["unit_tests"]
             for case in tests}
    for line, answer in rollouts("code_gen"):
        texts = tests.get(line["responses_create_params"]["input"][-1]["content"])
        if texts:  # the wheel has not the tests of every rollout
            rows.append(program(texts))
            said.append([answer])
            wanted.append(line["reward"])
    assert [verdict.score for verdict in rewards(rows, said)] == wanted
    assert len(wanted) == 10 and {0.0, 1.0} == set(wanted)


# ---- math

def test_math_as_in_the_wheels_test_file_and_rollouts():
    """Fault: an answer that math-verify finds equal, or not, and our rule of the last box otherwise. The wheel also takes
    answers without a box, by its other parser; ours, as the paper's, pays nothing for them."""
    boxed = bare = 0
    test, = (one for one in functions("math_with_judge") if one.name == "test_verify_answer_with_library")
    cases = []
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) and calls(node.left, "_verify_answer_with_library"):
            gold, answer = (value.value for value in node.left.args)
            cases.append((gold, answer, node.comparators[0].elts[0].args[0].value))
    cases += [(line["expected_answer"], said, line["library_reward"]) for line, said in rollouts("math_with_judge")]
    for gold, answer, reward in cases:
        if "\\boxed" in answer:
            gold = math.boxes(gold)[-1] if math.boxes(gold) else gold
            assert math.score(gold, answer, "last_box").score == reward, (gold, answer)
            boxed += 1
        else:
            assert math.score(gold, answer, "last_box").reason == "no box"
            bare += 1
    assert (boxed, bare) == (9, 5)


@pytest.mark.skipif(not SOURCE.is_dir(), reason="math-verify's source distribution is fetched by `make test`")
def test_math_as_in_the_source_distribution_of_math_verify():
    """Fault: an answer in one box that math-verify's own tests call right, or wrong, and ours otherwise. Of several boxes ours
    reads the last, as in the paper, where math-verify joins them; without a box it pays nothing."""
    agree = several = bare = 0
    for path in sorted(SOURCE.glob("test_*.py")):
        for call in calls(ast.parse(path.read_text()), "parametrize"):
            names = ast.literal_eval(call.args[0])
            if names != "gold,pred,expected" and names != "gold, pred, expected":
                continue
            literal = [case for case in call.args[1].elts
                       if not any(isinstance(part, ast.JoinedStr) for part in ast.walk(case))]
            for gold, said, right in map(ast.literal_eval, literal):
                if len(math.boxes(said)) != 1 or len(math.boxes(gold)) > 1:
                    several += len(math.boxes(said)) > 0
                    bare += not math.boxes(said)
                    continue
                gold = math.boxes(gold)[-1] if math.boxes(gold) else gold
                assert math.score(gold, said, "last_box").score == right, (path.name, gold, said)
                agree += 1
    assert agree > 50 and several > 10 and bare > 100


# ---- letters

def test_letters_as_in_the_wheels_test_file_and_rollouts():
    """Fault: a right letter in the form that a row's prompt asks for that is not paid, because ours asks for another form:
    most of NeMo-Gym's forms have no "Answer:". Not ours: options named by their text in place of their letter."""
    seen = by_text = 0
    unknown = []
    for function in functions("mcqa"):
        said = [part["content"][0]["text"] for call in calls(function, "NeMoGymResponse") for part in given(call)["output"]]
        paid = paid_in(function)
        first = [given(call) for call in calls(function, "MCQAVerifyRequest")]
        cases = first + [{**first[0], **_update(call)} for call in calls(function, "model_copy")]
        assert len(cases) == len(said) == len(paid)
        for case, answer, reward in zip(cases, said, paid, strict=True):
            if function.name == "test_template_metadata_invalid_regex":  # here a row of the wrong schema
                with pytest.raises(schema.SchemaError, match="template_metadata.output_regex: .* is no regular expression"):
                    rl_rows.to_row({**case, "dataset": SCIENCE}, "x", 1, {})
                continue
            row = rl_rows.to_row({**case, "dataset": SCIENCE}, "x", 1, {})
            if isinstance(row, str):  # a row without options, which is dropped
                assert (function.name, row) == ("test_template_metadata_without_options", "the right letter is no option")
                continue
            if "opt" in answer:  # an option's text
                by_text += 1
            else:
                assert science.verify([row], [[answer]])[0].score == reward, (function.name, answer)
                seen += 1
    for name, said in (("example", "example_rollouts"),
                       ("example_with_template_metadata", "example_rollouts_with_template_metadata")):
        tests = [json.loads(line) for line in (HOME / "mcqa" / "data" / f"{name}.jsonl").open(encoding="utf-8")]
        tests = {case["responses_create_params"]["input"][-1]["content"]: case for case in tests}
        for line, answer in rollouts("mcqa", said):
            asked = line["responses_create_params"]["input"][-1]["content"]
            if asked not in tests:
                unknown.append(asked)
                continue
            row = rl_rows.to_row({**tests[asked], "dataset": SCIENCE}, name, 1, {})
            assert science.verify([row], [[answer]])[0].score == line["reward"], answer[-200:]
            seen += 1
    assert (seen, by_text, len(unknown)) == (17, 2, 0)


def _update(call: ast.Call) -> dict:
    """The literals of `model_copy(update={...})`."""
    update = next(keyword.value for keyword in call.keywords if keyword.arg == "update")
    return {key.value: value.value for key, value in zip(update.keys, update.values, strict=True)
            if isinstance(value, ast.Constant)}
