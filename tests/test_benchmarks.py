"""The nine real benchmarks from small files of the true schema: wording, truth, counts, refusals, verdicts, and going on."""
from __future__ import annotations

import ast
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import toy_benchmarks as toy
import toy_policy

from m2rl_core import domains, notebook
from m2rl_core import evaluate as evaluation
from m2rl_core.claims import scores as rules
from m2rl_core.claims.evidence import Evidence, Missing
from m2rl_core.domains import BENCHMARKS, Row, rewards
from m2rl_core.errors import StudyError
from m2rl_core.evaluate import build, evaluate, items_of
from m2rl_core.metrics import stats
from m2rl_core.models import policy as policies
from m2rl_core.profile import load_profile
from m2rl_core.publishing import not_run
from m2rl_core.real import benchmarks, hub
from m2rl_core.real.decontamination import FROM
from m2rl_core.run import Run
from m2rl_core.specs import Sampling, keyed
from m2rl_core.store import NOT_RUN
from m2rl_core.views import preliminary, verdicts

SMOKE = load_profile("smoke")
NO_TESTS = [case for case in toy.FILES if not case.startswith("lcb")]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No judge, no hub, and small benchmarks."""
    for name in ("M2RL_JUDGE", "M2RL_JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def small(put, monkeypatch):
    """All eight data sets by hand, three items each; BFCL's rows are another file's to test."""
    toy.write_all(put)
    toy.shrink(monkeypatch)


def spec(**changes):
    """An evaluation of the small benchmarks."""
    return dataclasses.replace(SMOKE.eval, **{"rows": "real", "items": toy.COUNTS, "k": dict.fromkeys(BENCHMARKS, 2),
                                              "max_new_tokens": 8, **changes})


# ---- items

def test_each_benchmark_asks_in_its_own_words(small):
    """Faults: another wording than the official or the released one, a system message left out, an answer that is shown."""
    asked = {name: benchmarks.load(name, 3)[0] for name in toy.COUNTS}
    math = ("Solve the following math problem step by step. The last line of your response should be of the form Answer: "
            "\\boxed{$Answer} (without quotes) where $Answer is the answer to the problem.\n\n")
    assert asked["aime24"].messages == ({"role": "user", "content": math + "What is $0 + 70$?"},)
    assert asked["aime25"].messages[0]["content"] == math + "Find 7."
    system, user = asked["lcb_v6"].messages
    assert system["role"] == "system" and system["content"].startswith("You are an expert Python programmer. You will be")
    assert user["content"] == (
        "### Question:\nAdd up 11.\n\n### Format: Read the inputs from stdin solve the problem and write the answer to stdout "
        "(do not directly test on the sample inputs). Enclose your code within delimiters as follows.\n```python\n# YOUR CODE "
        "HERE\n```\n\n### Answer: (use the provided format with backticks)\n\n")
    method = benchmarks.load("lcb_v5", 3)[2].messages[1]["content"]
    assert ("use the following starter code to write the solution to the problem and enclose your code within delimiters.\n"
            f"```python\n{toy.STARTER}\n```\n\n") in method
    hle, choice = (row.messages for row in benchmarks.load("hle", 3)[:2])
    assert "\nExact Answer: {your succinct, final answer}\nConfidence:" in hle[0]["content"]
    assert hle[1]["content"] == "Six times seven?" and "\nAnswer: {your chosen answer}\n" in choice[0]["content"]
    text = asked["gpqa_diamond"].messages[0]["content"]
    assert text.startswith("Answer the following multiple choice question. The last line of your response should be of the "
                           "following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by "
                           "step before answering.\n\nWhich, 0?\nThink.\n\nA) ")
    assert asked["ifeval"].messages == ({"role": "user", "content": "Write 0 without commas."},)


def test_items_are_those_of_the_benchmark(small):
    """Faults: pictures in HLE, contests outside of v5's window, GPQA's right answer always first or in an order that
    changes, None-filled parameters, ids that differ from run to run."""
    loaded = {name: benchmarks.load(name, 3) for name in toy.COUNTS}
    assert [row.id for row in loaded["hle"]] == ["hle/a2", "hle/a3", "hle/a4"]
    assert [row.id for row in loaded["lcb_v5"]] == ["lcb_v5/q2", "lcb_v5/q3", "lcb_v5/q5"]
    letters = [row.truth["letter"] for row in loaded["gpqa_diamond"]]
    assert letters == ["A", "C", "A"]  # drawn by SHA-256 once and for ever
    for i, (row, letter) in enumerate(zip(loaded["gpqa_diamond"], letters, strict=True)):
        shown = dict(line.split(") ", 1) for line in row.messages[0]["content"].splitlines()[-4:])
        assert shown[letter] == f"right {i}" and sorted(shown.values()) == sorted([f"right {i}", "x", "y, z", "3"])
    assert [row.truth["answer"] for row in loaded["aime24"]] == ["070", "071", "072"]
    assert loaded["ifbench"][0].truth["kwargs"] == [{"N": 2}] and loaded["ifbench"][0].truth["rule"] == "strict"
    assert all(row.domain == BENCHMARKS[name] and row.source == name and Row.from_json(row.to_json()) == row
               for name, rows in loaded.items() for row in rows)


@pytest.mark.parametrize("name", toy.FILES)
def test_right_and_wrong_answers_by_the_one_route(name, small):
    """Faults: a row that goes to another verifier or by another rule than its benchmark's; a gate that official code does
    not have; an answer inside of thoughts that never ended."""
    for row in benchmarks.load(name, 3):
        right, wrong = toy.answers(row)
        turns = [f"<think>\nhm\n</think>\n\n{right}", f"<think>\nhm\n</think>\n\n{wrong}", right, f"<think>\n{right}"]
        assert [v.score for v in rewards([row] * 4, [[turn] for turn in turns])] == [1, 0, 1, 0]


def test_bfcl_goes_the_same_way():
    """Faults: items of BFCL without the open gate, a trial of one category alone, a row that its verifier does not take."""
    pytest.importorskip("bfcl_eval")
    rows = benchmarks.load("bfcl_v3", 40)
    assert len(rows) == 40 and len({row.truth["category"] for row in rows}) > 9
    assert {row.truth["gate"] for row in rows} == {"open"} and {row.domain for row in rows} == {"agent"}
    quiet = next(row for row in rows if row.truth["category"] == "irrelevance")
    asked = next(row for row in rows if row.truth["category"] == "simple")
    (name, given), = asked.truth["ground_truth"][0].items()
    right = json.dumps({"name": name, "arguments": {k: values[0] for k, values in given.items()}})
    said = ["I have no tool for that.", f"<tool_call>\n{right}\n</tool_call>"]
    assert [[v.score for v in rewards([row] * 2, [[text] for text in said])] for row in (quiet, asked)] == [[1, 0], [0, 1]]


def test_the_gate_stays_for_all_other_rows():
    """Fault: training rewards for answers without thoughts, which appendix A gives none."""
    row = Row("x", "math", "", "", ({"role": "user", "content": "?"},), {"answer": "7"})
    assert [v.score for v in rewards([row] * 2, [["\\boxed{7}"], ["</think>\\boxed{7}"]])] == [0, 1]


def test_the_registry_knows_all_nine(monkeypatch):
    """Faults: a benchmark without a data set, K or count; a count other than the data sets' own."""
    assert list(benchmarks.NINE) == list(BENCHMARKS) == list(FROM)
    assert {name: about.k for name, about in benchmarks.NINE.items()} == {
        "aime24": 64, "aime25": 64, "lcb_v5": 8, "lcb_v6": 2, "hle": 1, "gpqa_diamond": 4, "ifeval": 1, "ifbench": 1,
        "bfcl_v3": 1}
    assert {name: about.full("") for name, about in benchmarks.NINE.items()} == {
        "aime24": (30,), "aime25": (30,), "lcb_v5": (279,), "lcb_v6": (175,), "hle": (2158,), "gpqa_diamond": (198,),
        "ifeval": (541,), "ifbench": (300, 294), "bfcl_v3": (4441,)}
    assert benchmarks.NINE["ifbench"].full(hub.sources()["allenai/IFBench_test"].revision) == (300,)


# ---- another number of items

@pytest.mark.parametrize(("name", "held", "wanted", "told"), [
    ("aime25", 3, 30, "aime25: math-ai/aime25 (test.jsonl, by hand, 1 files, "),
    ("ifbench", 293, 294, "holds 293 items, not 300 or 294: another version of the benchmark, or a part of it"),
    ("ifbench", 300, 294, "holds 300 items, not 294 as the profile asks for (eval.items.ifbench): "),
    ("ifeval", 5, 7, "holds 5 items, not 7 as the profile asks for (eval.items.ifeval): ")])
def test_another_number_of_items_is_refused(put, name, held, wanted, told, tmp_path):
    """Faults: a score on a part of a benchmark, or on its other version, under the benchmark's name."""
    repo, path, rows = toy.FILES[name]
    put(repo, path, [{**rows[0], "id": str(i), "key": str(i)} for i in range(held)])
    with pytest.raises(StudyError) as caught:
        benchmarks.load(name, wanted, tmp_path)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert str(held) in str(caught.value) and str(wanted) in str(caught.value)


def test_both_versions_of_ifbench_and_a_trial(put):
    """Faults: the paper's 294 items refused; a trial that is of other items than the first, or refused."""
    repo, path, (row, *_) = toy.FILES["ifbench"]
    for number in (294, 300):
        put(repo, path, [{**row, "key": str(i)} for i in range(number)])
        assert len(benchmarks.load("ifbench", number)) == number
    assert [r.id for r in benchmarks.load("ifbench", 2)] == ["ifbench/0", "ifbench/1"]
    with pytest.raises(StudyError, match=r"^eval.items.ifbench: 301, but it has 300 or 294$"):
        benchmarks.load("ifbench", 301)


# ---- rows of another schema

@pytest.mark.parametrize(("name", "change", "told"), [
    ("aime24", {"solution": "72"}, r"aime24/test-00000-of-00001.parquet, line 2: field solution: it has no \boxed{}: "),
    ("aime24", {"solution": "\\boxed{1001}"}, "an answer of AIME is a whole number from 0 to 999, found '1001'"),
    ("aime25", {"answer": "7/2"}, "math-ai/aime25/test.jsonl, line 2: field answer: an answer of AIME is a whole number"),
    ("aime25", {"problem": None}, "line 2: field problem: expected a text, found none"),
    ("aime25", {"id": "7"}, "line 2: field id: 'aime25/7' stands in math-ai/aime25/test.jsonl, line 1 already"),
    ("lcb_v6", {"contest_date": 2025}, "test6.jsonl, line 2: field contest_date: expected a text, found 2025"),
    ("lcb_v6", {"private_test_cases": ""}, "line 2: field private_test_cases: it is empty"),
    ("hle", {"answer_type": "essay"}, "line 2: field answer_type: 'essay' is none of exactMatch, multipleChoice"),
    ("gpqa_diamond", {"Question": ""}, "gpqa_diamond.csv, line 2: field Question: "),
    ("ifeval", {"instruction_id_list": ["punctuation:no_coma"]},
     "line 2: field instruction_id_list[0]: unknown instruction id 'punctuation:no_coma'; the nearest of "),
    ("ifeval", {"kwargs": [{}, {}]}, "line 2: field kwargs: 2 for 1 instructions"),
    ("ifeval", {"prompt": "\ud800"}, "line 2: field prompt: it holds half a character")])
def test_a_row_of_another_schema_names_file_line_and_field(put, monkeypatch, name, change, told):
    """Faults: a traceback, an item that is skipped in silence, an unknown instruction that scores 0 for every model."""
    repo, path, rows = toy.FILES[name]
    toy.shrink(monkeypatch)
    put(repo, path, [rows[0], {**rows[1], **change}, *rows[2:]])
    with pytest.raises(StudyError) as caught:
        items_of(spec(items={name: 3}), 1)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_rules_of_a_profile(small):
    """Faults: a rule that is asked for and not used; an unknown one that is found after hours of sampling."""
    rows = benchmarks.load("gpqa_diamond", 3, rule="first_letter")
    assert rewards(rows[:1], [["the answer depends on A. Answer: B"]])[0].reason == "wrong answer: D"
    for name, rule in (("aime24", "loose"), ("hle", "strict")):
        with pytest.raises(StudyError, match=f"^eval.rules.{name}: '{rule}' is none of "):
            benchmarks.load(name, 3, rule=rule)


# ---- in a profile

def test_a_profile_of_real_rows_has_keys_of_its_own():
    """Faults: a setting that changes scores and no key; defaults that make every evaluation of tiny again."""
    assert set(keyed(SMOKE.eval)) == {"items", "k", "temperature", "max_new_tokens", "max_turns"}
    own = spec(top_p=0.7, sampling={"aime24": Sampling(temperature=0.6)}, revisions={"ifbench": "a" * 40},
               rules={"hle": "x"})
    assert {"rows", "top_p", "sampling", "revisions", "rules"} < set(keyed(own))
    assert own.sampled_by("aime24") == {"temperature": 0.6, "top_p": 0.7, "max_new_tokens": 8, "max_turns": 2}
    assert own.sampled_by("hle")["temperature"] == 1.0


def test_every_model_is_asked_the_items_of_one_commit(put, monkeypatch, tmp_path):
    """Faults: a hub that is asked again for each model; items of another commit for later models; files by hand that are
    swapped between two models' evaluations."""
    toy.shrink(monkeypatch)
    repo, path, rows = toy.FILES["aime25"]
    file, asked = put(repo, path, rows), []

    def files(source, splits=()):
        asked.append(source.revision)
        source = dataclasses.replace(source, revision=source.revision or "f" * 40)
        return [hub.File(source, "test", path, str(file))]

    with monkeypatch.context() as patch:
        patch.setattr(hub, "files", files)
        patch.setattr(hub, "folder_of", lambda source: None)
        first = items_of(spec(items={"aime25": 3}, revisions={"aime25": "a" * 40}), 1, None, tmp_path)
        assert items_of(spec(items={"aime25": 3}, revisions={"aime25": "a" * 40}), 1, 2, tmp_path) == {
            "aime25": first["aime25"][:2]}
        assert asked == ["a" * 40]
    assert items_of(spec(items={"aime25": 3}), 1, None, tmp_path) == first
    put(repo, path, [*rows, rows[0]])
    with pytest.raises(StudyError, match=r"was begun with math-ai/aime25 from by hand, .* another folder, or remove it and "):
        items_of(spec(items={"aime25": 3}), 1, None, tmp_path)


# ---- evaluating

@pytest.fixture(scope="module")
def reader(words):
    """A policy whose context holds the prompts."""
    return toy_policy.make(words, spec=dataclasses.replace(toy_policy.SPEC, context=1600))


def context(tmp_path, policy, **changes):
    """What a builder gets, for an evaluation of `policy`."""
    folder = tmp_path / "model"
    if not folder.is_dir():
        folder.mkdir()
        policies.save(policy, folder)
    out = tmp_path / "store" / "evals" / "eval-one"
    (out / "state").mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(profile=dataclasses.replace(SMOKE, eval=spec(**changes), seed=1), inputs={"one": folder}, out=out,
                           stage=SimpleNamespace(name="eval-one", settings={}), state=out / "state",
                           progress=SimpleNamespace(step=lambda done, total: None))


def test_real_benchmarks_go_the_way_of_the_miniatures(small, reader, tmp_path):
    """Faults: other columns, an item or a sample that is lost; a benchmark that cannot be had which stops the others, or
    is left out without a word."""
    ctx = context(tmp_path, reader, items={**toy.COUNTS, "bfcl_v3": 4441}, sampling={"hle": Sampling(max_new_tokens=3)})
    (Path(os.environ["M2RL_DATA"]) / "Idavidrein__gpqa" / "gpqa_diamond.csv").unlink()
    (Path(os.environ["M2RL_DATA"]) / "Idavidrein__gpqa").rmdir()
    (Path(os.environ["M2RL_DATA"]) / "gorilla-llm__Berkeley-Function-Calling-Leaderboard").mkdir()
    build(ctx)
    rows = pd.read_parquet(ctx.out / "rows.parquet")
    assert rows.groupby("benchmark").size().to_dict() == {name: 6 for name in toy.COUNTS if name != "gpqa_diamond"}
    assert (rows.groupby(["benchmark", "item"])["sample"].agg(tuple) == (0, 1)).all()
    assert rows[rows["benchmark"] == "hle"]["tokens"].max() <= 3 < rows[rows["benchmark"] == "ifeval"]["tokens"].max()
    told = json.loads((ctx.out / NOT_RUN).read_text())
    assert set(told) == {"gpqa_diamond", "bfcl_v3"}
    assert told["gpqa_diamond"].startswith("gpqa_diamond is not run: Idavidrein/gpqa at 633f5ee89ab8 cannot be read "
                                           "(HF_HUB_OFFLINE is set): accept its terms on its page, then `hf auth login`; or ")
    assert "\n" not in "".join(told.values())
    ctx.profile = dataclasses.replace(ctx.profile, eval=spec(items={"gpqa_diamond": 3}))
    with pytest.raises(StudyError, match="^eval-one: no benchmark can be had; gpqa_diamond is not run: "):
        build(ctx)


def test_what_could_not_be_had_is_evaluated_later_and_nothing_else(put, reader, tmp_path, monkeypatch):
    """Faults: days of sampling again for one benchmark whose terms were accepted late; rows in another order, or of an
    evaluation that was set aside for another reason."""
    toy.shrink(monkeypatch)
    whole, later = tmp_path / "whole", tmp_path / "later"
    toy.write_all(put, ["hle", "ifeval"])
    for folder in (whole, later):
        folder.mkdir()
    wanted = {"hle": 3, "gpqa_diamond": 3, "ifeval": 3}
    ctx = context(later, reader, items=wanted)
    build(ctx)
    (later / "store/set-aside").mkdir()
    ctx.out.rename(later / "store/set-aside/eval-one.1")
    toy.write_all(put, ["gpqa_diamond"])
    build(context(whole, reader, items=wanted))
    asked, measure = [], evaluation._measure
    monkeypatch.setattr(evaluation, "_measure", lambda *args: asked.append(args[2]) or measure(*args))
    build(ctx := context(later, reader, items=wanted))
    assert asked == ["gpqa_diamond"] and not (ctx.out / NOT_RUN).exists()
    assert (ctx.out / "rows.parquet").read_bytes() == (whole / "store/evals/eval-one/rows.parquet").read_bytes()
    ctx.out.rename(later / "store/set-aside/eval-one.2")
    (later / "store/set-aside/eval-one.1" / NOT_RUN).unlink()
    build(context(later, reader, items=wanted))
    assert asked[1:] == ["hle", "gpqa_diamond", "ifeval"]


def test_a_verifier_that_cannot_work_here_is_found_before_sampling(small, monkeypatch):
    """Fault: hours of sampling before LiveCodeBench's first program finds no sandbox."""
    def rewards(rows, turns):
        if rows[0].domain == "coding":
            raise StudyError("no sandbox")
        return []

    monkeypatch.setattr(benchmarks, "rewards", rewards)
    missing = {}
    assert set(items_of(spec(), 1, missing=missing)) == set(NO_TESTS)
    assert missing == {name: f"{name} is not run: no sandbox" for name in ("lcb_v5", "lcb_v6")}


def test_a_prompt_that_does_not_fit_scores_zero_and_says_so(small, policy):
    """Fault: one long prompt among thousands that ends the evaluation, or that shifts its neighbours' scores."""
    items = {"ifeval": benchmarks.load("ifeval", 3)}
    long = dataclasses.replace(items["ifeval"][1], messages=({"role": "user", "content": "word " * 999},))
    rows = evaluate(policy, "one", {"ifeval": [items["ifeval"][0], long, items["ifeval"][2]]}, {"ifeval": 2}, spec(), 1)
    assert rows["item"].tolist() == [row.id for row in items["ifeval"] for _ in range(2)]
    assert rows["tokens"].gt(0).tolist() == [True, True, False, False, True, True]
    assert rows["score"][2] == 0 and rows["truncated"][2] and " tokens, but 376 fit" in rows["reason"][2]


def test_a_report_holds_no_text_of_hle_and_gpqa(tmp_path):
    """Fault: items in a page that is published, although their authors ask that they be published nowhere."""
    run = SimpleNamespace(profile=dataclasses.replace(SMOKE, eval=spec()))
    rows = pd.DataFrame({"benchmark": list(BENCHMARKS), "prompt": "p", "response": "r", "score": 1.0})
    shown = Run._shown(run, rows.copy())
    hidden = shown["benchmark"].isin(["hle", "gpqa_diamond"])
    assert set(shown[~hidden]["prompt"]) == {"p"}
    assert not {"p", "r"} & set(shown[hidden][["prompt", "response"]].to_numpy().flat)
    pd.testing.assert_frame_equal(Run._shown(SimpleNamespace(profile=SMOKE), rows.copy()), rows)


def test_prompts_are_shown_without_items():
    """Faults: a benchmark that the table leaves out; sampling settings of the profile in place of the benchmark's own."""
    profile = dataclasses.replace(SMOKE, eval=spec(items=dict.fromkeys(BENCHMARKS, 5), sampling={"hle": Sampling(top_p=0.7)}))
    shown = preliminary.benchmark_items(profile).set_index("prompt")
    assert len(shown) == 9 and shown["top_p"].tolist() == [1, 1, 1, 1, 0.7, 1, 1, 1, 1]
    parts = ("{problem}", "### Question:\n{question}", "A) {A}", "{prompt}")
    assert [sum(part in text for text in shown.index) for part in parts] == [2, 2, 1, 2]


def test_tables_call_real_benchmarks_by_their_names(tmp_path, monkeypatch):
    """Faults: real scores under the name of a miniature; a trial that looks like the whole benchmark; a miniature after a
    real run in one process that is called real."""
    monkeypatch.setattr(domains, "LABELS", {})
    for rows, names in (("real", ["ifeval", "ifbench", "hle (first 20)"]),
                        ("miniature", ["ifeval (miniature)", "ifbench (miniature)", "hle (miniature)"])):
        items = SMOKE.eval.items | {"ifeval": 541, "ifbench": 294, "hle": 20}
        Run(dataclasses.replace(SMOKE, eval=dataclasses.replace(SMOKE.eval, items=items, rows=rows)), tmp_path)
        assert [domains.called(name) for name in ("ifeval", "ifbench", "hle")] == names
    assert domains.called("avg") == "avg"


def test_a_cell_without_its_benchmark_says_so_and_the_next_goes_on(capsys):
    """Faults: a notebook that stops at the first table of a benchmark that could not be had; a later cell that takes an
    older value for what was not made; a fault of ours that is called "not run"."""
    shell = SimpleNamespace(user_ns={"found": "old"}, ast_transformers=[])
    not_run.install(shell)
    rows = pd.DataFrame({"model": "sft", "benchmark": "ifeval", "item": ["a", "b"], "sample": 0, "score": [1.0, 0.0]})
    shell.user_ns |= {"measured": stats.measure(rows, np.random.default_rng(0))}
    for cell in ("found = measured.contrast({('hle', 'sft'): 1.0})", "found", "measured.contrast({('ifeval', 'sft'): 1.0})"):
        exec(compile(shell.ast_transformers[0].visit(ast.parse(cell)), "cell", "exec"), shell.user_ns)
    told = capsys.readouterr().out
    assert shell.user_ns["_m2rl_not_run"].unset == {"found": "no scores of sft on hle"}
    assert told.count("Markdown") == 2 and "estimate=50.0" in told
    with pytest.raises(KeyError, match="other"):
        exec(compile(shell.ast_transformers[0].visit(ast.parse("{}['other']")), "cell", "exec"), shell.user_ns)


def test_evidence_without_a_benchmark(tmp_path):
    """Faults: a domain that loses its picture although another benchmark of it was run; a domain without any that ends the
    notebook; a claim on all nine that is decided on eight; a run card that does not say what is missing."""
    nine = {b: d for b, d in BENCHMARKS.items() if b != "gpqa_diamond"}
    assert Evidence(benchmarks=nine).figure2["science"] == "hle" and Evidence(benchmarks=nine).own["science"] == ["hle"]
    run = Run(SMOKE, tmp_path)
    run.not_run = lambda: {name: f"{name} is not run: a login" for name in ("hle", "gpqa_diamond")}
    told = notebook.card(run, "3.2")
    assert "| not run: hle | a login |" in told and "| of the other 7 here, also where a title says nine |" in told
    assert "not run" not in notebook.card(Run(SMOKE, tmp_path), "3.2")
    run.stages = {}  # so nothing is made
    found = verdicts.evidence(run, "cosine")
    assert set(found.own) == {"math", "coding", "if", "agent"} and len(found.benchmarks) == 7
    rows = pd.concat([pd.DataFrame({"model": m, "benchmark": b, "item": ["a", "b"], "sample": 0, "score": [1.0, 0.0]})
                      for m in ("rl-multi", "merge-ties") for b in nine])
    with pytest.raises(Missing, match="^no scores of rl-multi on gpqa_diamond$"):
        rules.higher(Evidence(scores=rows, benchmarks=nine), "rl-multi", "merge-ties")


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:2]
import pytest, test_benchmarks as t, toy_benchmarks as toy
from pathlib import Path
from m2rl_core import evaluate
from m2rl_core.models import policy
patch, calls, measure = pytest.MonkeyPatch(), [], evaluate._measure
toy.shrink(patch)

def dies(*args):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(*args)

evaluate._measure, evaluate.CHUNK = dies, 4
evaluate.build(t.context(Path(sys.argv[2]), policy.load(Path(sys.argv[2]) / "model"), items=t.KEPT))
"""
KEPT = {"aime25": 3, "hle": 3, "gpqa_diamond": 3}


def test_a_killed_evaluation_ends_with_the_same_bytes(small, reader, tmp_path, monkeypatch):
    """Faults: what was sampled before the kill is sampled again, lost or doubled; draws that depend on what ran before."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    monkeypatch.setattr(evaluation, "CHUNK", 4)
    build(context(whole, reader, items=KEPT))
    ctx = context(killed, reader, items=KEPT)
    here = Path(__file__).parent
    died = subprocess.run([sys.executable, "-c", KILLED, str(here), str(killed)], cwd=here.parent,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert died.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in ctx.state.glob("rows-*.parquet")}
    assert sorted(path.name for path in kept) == ["rows-aime25-0.parquet", "rows-aime25-2.parquet", "rows-hle-0.parquet"]
    build(ctx)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (ctx.out / "rows.parquet").read_bytes() == (whole / "store/evals/eval-one/rows.parquet").read_bytes()
    rows = pd.read_parquet(ctx.out / "rows.parquet")
    assert len(rows) == 18 and not rows.duplicated(["benchmark", "item", "sample"]).any()
