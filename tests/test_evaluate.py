"""Avg@K: who is asked what, with which draws, and the one row a sample that every score comes from."""
from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pandas as pd
import pytest
import toy_policy

from m2rl_core.domains import BENCHMARKS, Row, Verdict, rewards
from m2rl_core.engines.rollout import Rollout
from m2rl_core.evaluate import END_OF_TURN, Watch, build, evaluate, frame, items_of
from m2rl_core.models import policy as policies
from m2rl_core.profile import load_profile

SMOKE = load_profile("smoke")
SPEC = dataclasses.replace(SMOKE.eval, items=dict.fromkeys(BENCHMARKS, 3), k=dict.fromkeys(BENCHMARKS, 2),
                           max_new_tokens=12)
COLUMNS = ["model", "benchmark", "domain", "category", "item", "sample", "prompt", "response", "score", "reason",
           "tokens", "truncated"]


@pytest.fixture(scope="module")
def items():
    return items_of(SPEC, 1)


@pytest.fixture(scope="module")
def scores(policy, items):
    return evaluate(policy, "one", items, SPEC.k, SPEC, 1)


def test_one_row_for_each_sample(scores, items):
    """Faults: K left out for some benchmark, samples not numbered within their item, a benchmark of another domain."""
    assert list(scores.columns) == COLUMNS
    assert len(scores) == 9 * 3 * 2 and not scores.duplicated(["model", "benchmark", "item", "sample"]).any()
    assert (scores.groupby(["benchmark", "item"])["sample"].agg(list).map(tuple) == (0, 1)).all()
    assert scores.groupby("benchmark")["domain"].first().to_dict() == BENCHMARKS
    for name, rows in items.items():
        asked = scores[(scores["benchmark"] == name) & (scores["sample"] == 0)]
        assert asked["item"].tolist() == [r.id for r in rows]
        assert asked["prompt"].tolist() == [r.messages[-1]["content"] for r in rows]
    kinds = set(scores[scores["benchmark"] == "bfcl_v3"]["category"])
    assert kinds and kinds <= {"simple", "parallel", "irrelevance", "multi_turn"}
    assert scores["tokens"].between(1, 12).all() and (scores["tokens"][scores["truncated"]] == 12).all()


def test_every_model_is_asked_the_same_with_the_same_draws(policy, other, scores, items):
    """Faults: items or draws that depend on the model, by which paired differences would lose their pairs."""
    same = evaluate(toy_policy.clone(policy), "two", items, SPEC.k, SPEC, 1)
    pd.testing.assert_frame_equal(same.drop(columns="model"), scores.drop(columns="model"))
    assert set(same["model"]) == {"two"}
    unlike = evaluate(other, "three", items, SPEC.k, SPEC, 1)
    asked = ["benchmark", "item", "sample", "prompt"]
    pd.testing.assert_frame_equal(unlike[asked], scores[asked])
    assert (unlike["response"] != scores["response"]).mean() > 0.9


def test_a_benchmark_alone_gives_the_same_rows(policy, scores, items):
    """Fault: draws that depend on which benchmarks ran before."""
    alone = evaluate(policy, "one", {"hle": items["hle"]}, SPEC.k, SPEC, 1)
    pd.testing.assert_frame_equal(alone, scores[scores["benchmark"] == "hle"].reset_index(drop=True))


def test_seeds_and_benchmarks_have_draws_of_their_own(policy, scores, items):
    """Fault: a seed that does nothing, or one series of draws for all benchmarks."""
    again = evaluate(policy, "one", items, SPEC.k, SPEC, 2)
    assert (again["response"] != scores["response"]).mean() > 0.7
    twice = {"aime24": items["aime24"], "aime25": items["aime24"]}
    found = evaluate(policy, "one", twice, SPEC.k, SPEC, 1)
    assert (found["response"][:6].to_numpy() != found["response"][6:].to_numpy()).sum() > 4


def test_items_are_stable_when_there_are_more_of_them(items):
    """Fault: accuracy on the way measured on other items than the evaluation's first ones."""
    more = items_of(dataclasses.replace(SPEC, items=dict.fromkeys(BENCHMARKS, 9)), 1)
    assert list(items) == list(BENCHMARKS)
    assert all(more[name][:3] == items[name] for name in items)
    assert all(len({r.fingerprint for r in rows}) == 9 for rows in more.values())
    assert {len(rows) for rows in items_of(SPEC, 1, limit=2).values()} == {2}
    assert items_of(SPEC, 2) != items


def test_scores_can_be_recomputed_from_the_rows(scores, items):
    """Fault: a score that is not that of the response beside it."""
    asked = {row.id: row for rows in items.values() for row in rows}
    verdicts = rewards([asked[i] for i in scores["item"]], [r.split(END_OF_TURN) for r in scores["response"]])
    assert [v.score for v in verdicts] == scores["score"].tolist()
    assert [v.reason for v in verdicts] == scores["reason"].tolist()


def test_frame_by_hand():
    """Faults: tool tokens counted as the model's, turns run together, samples numbered across items."""
    rows = [Row(f"bfcl_v3/{i}", "agent", "bfcl_v3", "", ({"role": "user", "content": f"ask {i}"},),
                {"category": "simple"}) for i in range(2)]
    rollouts = [Rollout(rows[i // 2], [1], [5, 6, 7], [True, False, True], [0.0] * 3, ["a", "b"], i == 3)
                for i in range(4)]
    found = frame("m", "bfcl_v3", rollouts, [Verdict(i / 4, f"r{i}") for i in range(4)], 2)
    assert found["item"].tolist() == ["bfcl_v3/0"] * 2 + ["bfcl_v3/1"] * 2
    assert found["sample"].tolist() == [0, 1, 0, 1] and found["score"].tolist() == [0, 0.25, 0.5, 0.75]
    assert set(found["response"]) == {"a<|im_end|>b"} and set(found["tokens"]) == {2}
    assert found["truncated"].tolist() == [False, False, False, True] and found["reason"][3] == "r3"


def context(tmp_path, name, inputs, **settings):
    (tmp_path / "out").mkdir(exist_ok=True)
    return SimpleNamespace(profile=dataclasses.replace(SMOKE, eval=SPEC, seed=1), inputs=inputs, out=tmp_path / "out",
                           stage=SimpleNamespace(name=name, settings=settings), state=tmp_path / "state",
                           progress=SimpleNamespace(step=lambda done, total: None))


def test_stage_writes_the_rows_of_its_benchmarks(policy, scores, tmp_path):
    """Faults: a pair's evaluation over all nine benchmarks; rows that depend on the folder they came through."""
    policies.save(policy, tmp_path / "model")
    ctx = context(tmp_path, "eval-one", {"one": tmp_path / "model"}, benchmarks=["hle", "aime24"])
    build(ctx)
    found = pd.read_parquet(ctx.out / "rows.parquet")
    wanted = scores[scores["benchmark"].isin(["hle", "aime24"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False)


def test_watch_looks_where_it_is_due(policy, tmp_path):
    """Faults: an evaluation before any step (that is SFT's own), one step too late, none of the model that
    the run ends with, a step's rows overwritten."""
    spec = dataclasses.replace(SMOKE.rl, eval_every=2, eval_items=2, eval_k=1)
    ctx = context(tmp_path, "rl-math", {}, steps=5)
    watch = Watch(ctx, spec)
    for step in range(6):
        watch.observe(step, policy)
    row = Row("math/rl/1", "math", "", "", ({"role": "user", "content": "1+1"},), {})
    for step in range(12):
        watch.keep_examples(step, [Rollout(row, [1], [2], [True], [0.0], ["two"])] * 6, [Verdict(1.0, "right")] * 6)
    watch.keep_batch(tmp_path / "batch.jsonl")
    assert [json.loads(line)["tokens"] for line in (tmp_path / "batch.jsonl").read_text().splitlines()] == [[2]] * 6
    watch.finish()
    along = pd.read_parquet(ctx.out / "along.parquet")
    assert along.groupby("step").size().to_dict() == {2: 18, 4: 18, 5: 18}
    assert set(along["model"]) == {"rl-math"} and not {"prompt", "response", "reason"} & set(along.columns)
    kept = [json.loads(line) for line in (ctx.out / "rollouts.jsonl").read_text().splitlines()]
    assert [k["step"] for k in kept] == [1] * 4 + [11] * 4 and kept[0]["response"] == "two"


def test_answers_that_broke_the_verifier_are_kept(tmp_path):
    """Faults: a count of failures whose reasons nobody can read; one of them twice; a file that grows with all of them."""
    ctx = context(tmp_path, "rl-math", {}, steps=5)
    watch = Watch(ctx, dataclasses.replace(SMOKE.rl, eval_items=1))
    row = Row("math/rl/1", "math", "", "", ({"role": "user", "content": "1+1"},), {})
    broken = Verdict(0.0, "verifier died", failed=True)
    for step, failed in ((0, (1, 5)), (1, ()), (2, range(6)), (3, (2,))):
        rollouts = [Rollout(row, [1], [2], [True], [0.0], [str(i)]) for i in range(6)]
        watch.keep_examples(step, rollouts, [broken if i in failed else Verdict(1.0, "right") for i in range(6)])
    watch.finish()
    kept = [json.loads(line) for line in (ctx.out / "rollouts.jsonl").read_text().splitlines()]
    assert [(k["step"], k["response"]) for k in kept] == [(1, i) for i in "01235"] + [(3, i) for i in "0123"] + [(4, "2")]
    assert [k["reason"] for k in kept[-5:]] == ["verifier died"] * 5
