"""The sweep of merging: one change at a time, the same draws for all, and a ranking that can be checked by hand."""
from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import toy_policy
from safetensors.torch import load_file

from m2rl_core import sweep
from m2rl_core.domains import BENCHMARKS
from m2rl_core.evaluate import evaluate, items_of
from m2rl_core.merging import merge_state
from m2rl_core.models import policy as policies
from m2rl_core.profile import load_profile
from m2rl_core.study import MERGES, study, variants, work
from m2rl_core.views import sensitivity

SMOKE = load_profile("smoke")


def test_variants_are_table_4_and_then_one_change_at_a_time():
    """Catches a change that sets two parameters, one that changes nothing, and two variants of one name."""
    found = variants(SMOKE.merge)
    assert [v["name"] for v in found[:6]] == list(MERGES)
    own = {v["name"]: v["parameters"] for v in found[:6]}
    assert own["merge-ties-dare"] == {"density": 0.2, "drop_rate": 0.8, "scale": 1.0}
    for v in found[6:]:
        model, change = v["name"].split(" ")
        key, value = change.split("=")
        differs = {k for k in v["parameters"] if v["parameters"][k] != own[model].get(k)}
        assert differs == {key} and str(v["parameters"][key]) == value and v["method"] == MERGES[model][0]
    assert len({v["name"] for v in found}) == len(found)
    assert {"scale", "density", "threshold", "drop_rate"} <= {v["name"].split(" ")[1].split("=")[0] for v in found[6:]}
    moved = variants(dataclasses.replace(SMOKE.merge, drop_rate=0.2))  # the own reading is no variant of itself
    assert not any(v["name"].endswith("drop_rate=0.2") for v in moved)


def test_work_counts_every_variant():
    settings = dataclasses.replace(SMOKE.analysis, sweep_items=3, sweep_k=2)
    stage = study(dataclasses.replace(SMOKE, analysis=settings))["sweep"]
    assert work(stage)["rollouts"] == len(variants(SMOKE.merge)) * 9 * 3 * 2


@pytest.fixture
def ctx(policy, other, tmp_path):
    """A sweep of three variants over two toy experts."""
    spec = dataclasses.replace(SMOKE.eval, items=dict.fromkeys(BENCHMARKS, 2), max_new_tokens=8)
    for name, made in {"sft": policy, "rl-math": other, "rl-if": toy_policy.make(policy.tokenizer, 5)}.items():
        policies.save(made, tmp_path / name)
    chosen = [v for v in variants(SMOKE.merge) if v["name"] in ("merge-ta", "merge-ta scale=0.4", "merge-ta-dare")]
    (tmp_path / "out" / "state").mkdir(parents=True)
    return SimpleNamespace(
        profile=dataclasses.replace(SMOKE, eval=spec), out=tmp_path / "out", state=tmp_path / "out" / "state",
        inputs={name: tmp_path / name for name in ("sft", "rl-math", "rl-if")},
        progress=SimpleNamespace(step=lambda *args: None), seed=1,
        stage=SimpleNamespace(settings={"variants": chosen, "items": 2, "k": 1, "seed": SMOKE.seed}))


def test_every_variant_is_merged_and_evaluated_as_itself(ctx):
    """Catches variants that get one another's weights, and draws that differ between variants."""
    sweep.build(ctx)
    rows = pd.read_parquet(ctx.out / "rows.parquet")
    assert list(dict.fromkeys(rows["model"])) == ["merge-ta", "merge-ta-dare", "merge-ta scale=0.4"]
    assert (rows.groupby("model").size() == 9 * 2 * 1).all()
    weights = {name: load_file(folder / "model.safetensors") for name, folder in ctx.inputs.items()}
    base = weights.pop("sft")
    for name, method, parameters in (("merge-ta scale=0.4", "ta", {"scale": 0.4}),
                                     ("merge-ta-dare", "ta-dare", {"drop_rate": 0.8})):
        merged = policies.load(ctx.inputs["sft"])
        merged.weights = merge_state(base, weights, method, seed=SMOKE.seed, **parameters)
        items = items_of(ctx.profile.eval, SMOKE.seed, 2)
        alone = evaluate(merged, name, items, dict.fromkeys(items, 1), ctx.profile.eval, SMOKE.seed)
        mine = rows[rows["model"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, alone.drop(columns=["prompt", "response"]), check_dtype=False)


def test_a_killed_sweep_goes_on_and_ends_with_the_same_rows(ctx, monkeypatch):
    """Catches rows that are lost, doubled or evaluated twice after a stop in the middle."""
    calls = []

    def dies(model, name, *args):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(model, name, *args)

    monkeypatch.setattr(sweep, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        sweep.build(ctx)
    sweep.build(ctx)
    assert calls == ["merge-ta", "merge-ta-dare", "merge-ta-dare", "merge-ta scale=0.4"]
    resumed = pd.read_parquet(ctx.out / "rows.parquet")
    for part in ctx.state.glob("rows-*"):
        part.unlink()
    sweep.build(ctx)
    pd.testing.assert_frame_equal(resumed, pd.read_parquet(ctx.out / "rows.parquet"))


def test_a_subset_is_merged_from_its_experts_and_tested_on_its_benchmarks_only(ctx):
    """Catches a subset that gets all experts' weights, and items of a domain whose expert is not in it."""
    whole = {"name": "both", "method": "ta", "parameters": {"scale": 1.0}}
    one = {"name": "one", "method": "ta", "parameters": {"scale": 1.0, "experts": ["rl-if"]}, "benchmarks": ["ifbench"]}
    ctx.stage.settings["variants"] = [whole, one]
    sweep.build(ctx)
    rows = pd.read_parquet(ctx.out / "rows.parquet")
    assert set(rows.loc[rows["model"] == "one", "benchmark"]) == {"ifbench"} and rows["benchmark"].nunique() == 9
    merged = load_file(ctx.state / "weights" / "1" / "model.safetensors")
    wanted = load_file(ctx.inputs["rl-if"] / "model.safetensors")
    assert all(float((merged[name] - wanted[name]).abs().max()) < 1e-6 for name in wanted)


def scored(**scores: float) -> pd.DataFrame:
    """Rows in which every item of every benchmark has the model's score; two items, one sample each."""
    return pd.DataFrame([{"model": model, "benchmark": b, "item": i, "sample": 0, "score": score, "category": ""}
                         for model, score in scores.items() for b in BENCHMARKS for i in range(2)])


def test_places_and_shifts_by_hand():
    """TA 0.5 and TIES 0.7 lead the rest at 0.2; TA at 0.4 has 0.8: +30 points, from the second place to the first."""
    rows = scored(**dict.fromkeys(MERGES, 0.2) | {"merge-ta": 0.5, "merge-ties": 0.7, "merge-ta scale=0.4": 0.8,
                                                  "merge-ties density=1.0": 0.1})
    found = sensitivity.readings(rows, np.random.default_rng(0), 50).set_index(["model", "value"])
    assert found["place"]["merge-ties", ""] == 1 and found["place"]["merge-ta", ""] == 2
    assert found["place"]["merge-average", ""] == 3
    up, down = found.loc[("merge-ta", "0.4")], found.loc[("merge-ties", "1.0")]
    assert up["place"] == 1 and up["shift"] == pytest.approx(30) and up["mean"] == pytest.approx(80)
    assert down["place"] == 6 and down["shift"] == pytest.approx(-60) and down["varied"] == "density"
    assert set(found["of"]) == {"mean of nine"} and "mean of nine" in sensitivity.shown(found.reset_index())
    said = sensitivity.sentence(found.reset_index()).data
    assert "takes the lead under 1 of 2 single changes (`merge-ta` at scale λ 0.4)" in said
    assert "loses it by changes of its own in 1 (`merge-ties` at density of TIES 1.0)" in said
    drawn = sensitivity.drawn(found.reset_index())
    assert list(drawn["label"][:2]) == ["merge-average", "merge-ta"] and drawn["own"].sum() == 6


def test_rounding_shows_the_bfloat16_variants_only():
    diagnosis = {"moved": 0.5, "lost": 0.25, "rounding": 0.125}
    found = sensitivity.rounding({"merge-ta": {"diagnosis": diagnosis},
                                  "merge-average out_dtype=bfloat16": {"diagnosis": diagnosis}})
    assert found.to_dict("records") == [{
        "merge": "merge-average", "moved by the merge (%)": "50.0", "undone by rounding (%)": "25.0",
        "rounding error / change (%)": "12.5"}]
