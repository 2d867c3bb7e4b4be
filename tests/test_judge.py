"""Self-verification: what a judge is shown, what it is taught, and how its word is read."""
from __future__ import annotations

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pytest

from m2rl_core import judge
from m2rl_core.models import policy as policies
from m2rl_core.domains import BENCHMARKS, answer_of, benchmark_rows, generator, is_held_out, module, rewards
from m2rl_core.judge import MODES, judge_row, training_rows, verdict_of
from m2rl_core.profile import load_profile
from m2rl_core.views import judging as views

RIGHT = "<think>\n3*4=12\n</think>\n\n\\boxed{12}"


@pytest.mark.parametrize(("said", "verdict"), [
    ("<think>\n\n</think>\n\nYes", 1),
    ("<think>\n\n</think>\n\nNo", 0),
    ("<think>\nno, it is\n</think>\n\nyes.", 1),  # what it thinks does not count
    ("<think>\n\n</think>\n\n**No**, it is 4", 0),
    ("<think>\n\n</think>\n\nYES", 1),
    ("<think>\n\n</think>\n\nNot sure", -1),  # neither "no" nor "yes"
    ("<think>\n\n</think>\n\nYesterday", -1),
    ("<think>\n\n</think>\n\nIt is right: yes", -1),  # the first word decides
    ("<think>\n\n</think>\n\n", -1),
    ("Yes", -1),  # the format gate holds for judges too
    ("<think>\nyes", -1),
    ("", -1),
])
def test_verdict_table(said, verdict):
    """Faults: a word inside another, a word of the thinking, or silence taken for a verdict."""
    assert verdict_of(said) == verdict


@pytest.mark.parametrize("response", [
    RIGHT,
    "<think>\n3*4=12",  # cut off while thinking: there is no answer to show
    "<think>\n3*4=12\n</think>\n\n",
    "<think>\n</think>3*4=12</think> \\boxed{12}",
])
def test_the_outcome_judge_never_sees_the_thinking(response):
    """Fault: the work shown to the judge of outcomes where there is no answer."""
    row = judge_row("What is 3*4?", response, "outcome", True, "x")
    text = row.messages[0]["content"]
    assert "=12" not in text
    assert text.startswith("Judge the answer.\nTask: What is 3*4?\nAnswer: ")
    assert ("12" in text) == bool(answer_of(response))


def test_the_process_judge_sees_the_work_and_the_answer():
    """Faults: the thinking left out, or markers in the prompt that end the judge's own thinking."""
    text = judge_row("What is 3*4?", RIGHT, "process", True, "x").messages[0]["content"]
    assert "3*4=12\n" in text and "\\boxed{12}" in text
    assert "think>" not in text


def test_training_rows_are_half_right_in_every_corner():
    """Faults: a mode, a domain or a verdict that the judge can guess from another; a wrong answer called right."""
    rows = training_rows(160, 1)
    corners = Counter((r.source, r.truth["right"]) for r in rows)
    assert corners == {(mode, right): 40 for mode in MODES for right in (True, False)}
    assert all(verdict_of(r.turns[0]["content"]) == int(r.truth["right"]) for r in rows)
    assert len({r.id for r in rows}) == 160
    assert training_rows(40, 1) == rows[:40] != training_rows(40, 2)
    for row in rows:
        assert "think>" not in row.messages[0]["content"] and not row.truth.keys() - {"right"}


def test_training_rows_tell_the_truth(monkeypatch):
    """Fault: a spoilt answer that is right after all, or a right one that is not, taught as its opposite."""
    shown = []
    real = judge.judge_row
    monkeypatch.setattr(judge, "judge_row", lambda task, response, mode, right, name: (
        shown.append((task, response, right)), real(task, response, mode, right, name))[1])
    tasks = []
    made = judge._training_task
    monkeypatch.setattr(judge, "_training_task", lambda domain, rng: tasks.append(made(domain, rng)) or tasks[-1])
    training_rows(64, 3)
    verdicts = rewards(tasks, [[response] for _, response, _ in shown])
    assert [v.score == 1 for v in verdicts] == [right for _, _, right in shown]
    assert Counter(t.domain for t in tasks) == {"math": 16, "coding": 16, "science": 16, "if": 16}
    assert not any(is_held_out(t.fingerprint) for t in tasks)


def test_stage_judges_a_models_own_answers(policy, tmp_path):
    """Faults: other samples than the first, other benchmarks than Table 7's, truth taken from the wrong row, K or a
    mode left out. Some of the answers are made right, so that both truths occur."""
    parts = []
    for benchmark in ("aime24", "hle", "gpqa_diamond", "ifeval", "lcb_v5"):
        rows = benchmark_rows(benchmark, 3, 1)
        texts = [(module(BENCHMARKS[benchmark]).respond(r) if i != 1 else module(BENCHMARKS[benchmark]).spoil(
            r, generator(benchmark)))[0]["content"] for i, r in enumerate(rows)]
        for row, text in zip(rows, texts, strict=True):
            score = rewards([row], [[text]])[0].score
            asked = {"benchmark": benchmark, "item": row.id, "prompt": row.messages[-1]["content"]}
            parts += [asked | {"sample": 0, "response": text, "score": score},
                      asked | {"sample": 1, "response": "never judged", "score": 0.5}]
    answers = pd.DataFrame(parts)
    policies.save(policy, tmp_path / "model")
    (tmp_path / "eval").mkdir()
    answers.to_parquet(tmp_path / "eval" / "rows.parquet")
    ctx = SimpleNamespace(
        profile=dataclasses.replace(load_profile("smoke"), seed=1), out=tmp_path,
        inputs={"sft": tmp_path / "model", "eval-sft": tmp_path / "eval"}, stage=SimpleNamespace(
            name="judge-sft", settings={"items": 2, "k": 3, "temperature": 1.0, "max_new_tokens": 24}))
    judge.build(ctx)
    found = pd.read_parquet(tmp_path / "rows.parquet")
    assert len(found) == 4 * 2 * 2 * 3 and set(found["benchmark"]) == set(judge.JUDGED_BENCHMARKS)
    assert not found.duplicated(["benchmark", "item", "sample", "mode"]).any()
    truth = {a.item: int(a.score == 1) for a in answers[answers["sample"] == 0].itertuples()}
    assert (found["truth"] == found["item"].map(truth)).all() and set(found["truth"]) == {0, 1}
    assert (found["said"] == found["response"].map(verdict_of)).all()
    assert (found["correct"] == (found["said"] == found["truth"]).astype(int)).all()
    assert set(found["model"]) == {"sft"} and found["tokens"].between(1, judge.JUDGE_TOKENS).all()
    left = {mode: line["no room"] for mode, line in json.loads((tmp_path / "unjudged.json").read_text()).items()}
    assert left == {"outcome": 0, "process": 0}
    ctx.stage.settings["tokens"] = 40  # a judge that thinks
    judge.build(ctx)
    assert pd.read_parquet(tmp_path / "rows.parquet")["tokens"].max() == 40 > judge.JUDGE_TOKENS
    asked = [len(policies.encode_prompt(policy, judge_row(a.prompt, a.response, "process", True, a.item).messages))
             for a in answers[answers["sample"] == 0].groupby("benchmark").head(2).itertuples()
             if a.benchmark in judge.JUDGED_BENCHMARKS]
    room = sorted(asked)[3]  # half of the works are longer
    ctx.stage.settings["tokens"] = policy.config.max_position_embeddings - room
    judge.build(ctx)
    fewer = pd.read_parquet(tmp_path / "rows.parquet").drop_duplicates(["item", "mode"])["mode"].value_counts()
    left = json.loads((tmp_path / "unjudged.json").read_text())
    assert {mode: line["answers"] - line["no room"] for mode, line in left.items()} == fewer.to_dict()
    assert left["process"]["no room"] == sum(size > room for size in asked) > left["outcome"]["no room"]
    run = SimpleNamespace(need=lambda name: tmp_path, manifest=lambda name: {"seconds": 1.0})
    assert f"`sft` {left['process']['no room']} of 8 by process" in views.budget(run, found).data
