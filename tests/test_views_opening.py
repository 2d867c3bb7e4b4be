"""What notebooks 0 to 3.2_train and A show: sentences say what frames say, and notebooks keep the house form."""
import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from m2rl_core import claims, paper
from m2rl_core.domains import BENCHMARKS, DOMAINS
from m2rl_core.paper import audit as checks
from m2rl_core.pictures import drawing, plots
from m2rl_core.profile import load_profile, profile_names
from m2rl_core.study import MERGES, study
from m2rl_core.views import audit, details, opening, preliminary, toys, training

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ("0_plan", "1_introduction", "2_related_work", "3.1_preliminary", "3.2_train", "A_training_details")


def gain(steps=40, model="rl-math"):
    """A run whose reward climbs from 0.2 to 0.6; every tenth step all groups are unanimous."""
    step, reward = np.arange(1, steps + 1), np.linspace(0.2, 0.6, steps)
    return pd.DataFrame({
        "step": step, "reward": reward, f"reward_{model.removeprefix('rl-')}": reward, "kept": 1.0,
        "skipped_groups": np.where(step % 10 == 0, 1.0, 0.25), "entropy": np.where(step % 10 == 0, 0.0, 0.5),
        "mismatch": 2e-6, "mismatch_mean": 3e-7, "grad_norm": 1.0, "length": 20.0, "truncated": 0.0, "response_tokens": 1000,
        "rollouts": 192})


def plan(seconds=60.0):
    frame = pd.DataFrame([{"stage": s.name, "kind": s.kind, "done": s.name in ("base", "sft"), "steps": 2,
                           "rollouts": 4,
                           "tokens": 100, "seconds": seconds, "from": ""}
                           for s in study(load_profile("smoke")).values()])
    return frame


def test_intervals_say_what_is_undefined():
    assert opening.interval(61.23, 58.1, 64.0) == "61.2 [58.1, 64.0]"
    assert opening.interval(np.nan, np.nan, np.nan) == "–"
    assert opening.interval(50.0, np.nan, np.nan) == "50.0 [undefined]"


def test_a_table_escapes_what_a_model_wrote():
    """Catches a response with markup in it that would break (or script) the page."""
    text = opening.show(pd.DataFrame({"response": ["<script>x</script>\n\n</think>"], "score": [np.nan], "n": [1234]}),
                        {"n": ","}).data
    assert "<script>" not in text
    assert all(part in text for part in ("&lt;/think&gt;", "<br>", ">–<", ">1,234<"))


def test_the_plan_counts_what_is_left_and_says_what_was_never_timed():
    frame = plan()
    left = len(frame) - 2
    assert f"2 of {len(frame)} stages are made. {left} are left" in opening.plan_sentence(frame)
    assert opening.by_kind(frame).set_index("kind").loc["base", "time left"] == "–"
    blank = plan(np.nan)
    assert "not known" in opening.plan_sentence(blank)
    assert f"{left} have never been timed" in opening.plan_sentence(blank)
    assert set(opening.by_kind(blank)["time left"]) == {"–", "not measured yet"}
    assert "Nothing would run" in opening.plan_sentence(frame.assign(done=True))
    for each in (frame, blank):
        assert drawing.png(opening.plan_chart(each))[:4] == b"\x89PNG"


def test_the_ledger_counts_every_claim_once():
    frame = audit.ledger(claims.decide(None, claims.Evidence()))
    assert len(frame) == len(paper.claims()) and frame["id"].is_unique
    numbers = [int(n) for n in re.findall(r"\d+", audit.ledger_sentence(frame))]
    assert numbers[0] == len(frame) == sum(numbers[1:])


def test_the_audit_finds_the_one_share_that_is_off():
    summary = audit.audit_summary(np.random.default_rng(0))
    assert summary.loc[~summary["agrees"], "where"].tolist() == ["Table 1"]
    assert "Science: printed 16.04 %, the samples give 16.03 %" in audit.audit_sentence(summary, checks.blend())


def test_the_printed_means_are_within_their_own_noise():
    """0.18 points between rl-multi and the best merge: catches a reach that is not that of a difference."""
    frame = audit.means_with_noise()
    text = audit.means_sentence(frame)
    assert "leads the best weight merge (merge-ties) by 0.18 points" in text
    draws = frame[frame["kind"] == "draws"].set_index("model")
    reach = 1.96 * np.hypot(*[checks.standard_errors(m).iloc[-1]["se_draws"] for m in ("rl-multi", "merge-ties")])
    assert f"±{reach:.2f}" in text and reach > draws.loc["rl-multi", "high"] - draws.loc["rl-multi", "value"]
    links = checks.judge_correlations(np.random.default_rng(0))
    assert all(drawing.png(chart)[:4] == b"\x89PNG" for chart in (audit.means_chart(frame),
                                                                audit.correlation_chart(links)))


@pytest.mark.parametrize("domain", DOMAINS)
def test_specimens_are_paid_as_they_are_labelled(domain):
    assert preliminary.specimen(domain, 1)["reward"].tolist()[1:] == [1.0, 0.0, 0.0]


def test_no_cheat_is_paid():
    """Catches a verifier that pays for two boxes, an answer in the thoughts, one test's output, or an unlisted tool."""
    found = preliminary.cheats(1)
    assert found["reward"].tolist() == [0.0] * len(found) and len(found) >= 6
    assert (found["reason"] != "").all()


def test_the_blend_is_compared_without_the_judge_rows():
    blend = pd.DataFrame([{"type": name, "domain": "math", "pool": 1, "sampling": "use all", "rows": int(line.samples)}
                          for name, line in paper.table(1).drop("Total").iterrows()])
    judge = {"type": "Judge", "domain": "judge", "pool": 1, "sampling": "use all", "rows": 900_000}
    table = preliminary.blend_table(pd.concat([blend, pd.DataFrame([judge])], ignore_index=True))
    assert "more than 0.01 points (Science)" in preliminary.blend_sentence(table)
    assert table["rows"].iloc[-1] == table["rows"].iloc[:-1].sum()


def test_smoothing_keeps_the_mean_and_shows_the_range():
    frame = training.smoothed(gain(), "reward")
    assert training.window(40) == 4 and len(frame) == 40
    assert (frame["low"] <= frame["value"]).all() and (frame["value"] <= frame["high"]).all()
    assert abs(frame["value"].iloc[20] - gain()["reward"].iloc[18:22].mean()) < 1e-12


def test_idle_steps_are_undefined_not_zero():
    """Catches an entropy of 0 drawn for a step in which nothing was updated."""
    steps = training.defined(gain())
    assert steps["entropy"].isna().sum() == 4 and steps["entropy"].min() == 0.5
    assert training.defined(gain().assign(reverse_kl=0.1))["entropy"].notna().all()  # distillation always updates
    assert "undefined" in training.match_sentence(gain().assign(skipped_groups=1.0))
    assert "at most 2.0e-06 nats" in training.match_sentence(gain())


def test_failures_of_the_verifier_are_shown_where_there_are_any():
    """Catches a reward that fell because the verifier broke down, with nothing in the notebooks that says so."""
    broken = gain().assign(verifier_failures=[np.nan, 3, np.nan, 2, *[np.nan] * 36])
    assert "broke down on 5 of 7,680 answers** (steps 2 to 4)" in training.reward_sentence(broken, "rl-math")
    assert "broke down" not in training.reward_sentence(gain(), "rl-math")
    manifest = {"seconds": 1.0, "key": "k" * 64, "digests": {"model.safetensors": "d" * 64}}
    table = details.policy_table({"rl-math": broken, "rl-if": gain()}, {"rl-math": manifest, "rl-if": manifest})
    assert table["verifier failures"].tolist() == [5, 0]
    assert "verifier failures" not in details.policy_table({"rl-if": gain()}, {"rl-if": manifest})


def test_the_worst_step_of_all_runs_is_told():
    """Catches idle steps counted as perfect agreement, a share shown as percent twice, and a run without a mismatch."""
    runs = {"rl-math": gain(), "rl-if": gain().assign(mismatch=0.25, kept=[0.5] + [0.75] * 39), "mt-opd": gain().drop(
        columns="mismatch")}
    frame = details.agreement(runs)
    assert set(frame["model"]) == {"rl-math", "rl-if"}
    assert frame.groupby(["model", "panel"])["value"].count().tolist() == [36] * 6
    kept = frame[frame["panel"] == "tokens kept (%)"]
    assert set(kept[kept["model"] == "rl-if"]["value"].dropna()) == {50.0, 75.0}
    largest = frame[frame["panel"].str.startswith("largest")].groupby("model")["value"].max()
    assert np.allclose(largest, np.log10([0.25, 2e-6]))
    assert "differ by 3e-07 nats on average" in details.agreement_sentence(runs, "vllm")
    text = details.agreement_sentence(runs, "vllm")
    assert "Sampled by vllm: over 72 steps" in text and "at most 2.5e-01 (rl-if, step" in text
    assert "kept is 50.00 % of its tokens (rl-if, step 1)" in text
    assert "no token was masked" in details.agreement_sentence({"rl-math": gain().assign(kept=1.0)}, "torch")
    assert "overlap" not in text
    idle = {"rl-math": gain().assign(skipped_groups=1.0)}
    assert "No step recorded" in details.agreement_sentence(idle, "torch")
    for shown in (frame, details.agreement(idle)):  # a run of a few idle steps must not end the notebook
        assert drawing.png(plots.trajectories(shown, "t", "", "panel", "g", 2)).startswith(b"\x89PNG")


def test_staleness_is_told_beside_what_it_makes():
    """Catches runs without overlap, or first steps, counted among the stale ones."""
    stale = gain().assign(staleness=[0] + [1] * 39, mismatch_mean=[1e-6] + [0.02] * 39, kept=[1.0] + [0.9] * 39)
    text = details.agreement_sentence({"rl-math": stale, "rl-if": gain()}, "vllm")
    old = int(training.defined(stale)["kept"].iloc[1:].notna().sum())
    assert f"one update behind in {old} of 72 steps (rl-math). " in text
    assert "Rollouts one update old: mean mismatch 2e-02 nats, 90.00 % of the tokens kept; fresh ones: mean" in text
    assert "overlap" not in details.agreement_sentence({"rl-math": gain().assign(staleness=0)}, "vllm")


def test_step_zero_is_the_sft_model_on_the_same_items():
    """Catches a start that averages over items which the run never saw."""
    def line(step, item, score, sample=0):
        return {"model": "rl-math", "benchmark": benchmark, "category": "", "item": f"{benchmark}/{item}",
                "sample": sample,
                "score": score, "step": step}

    along, sft = [], []
    for benchmark in training.FIGURE2.values():
        along += [line(10, item, 1.0) for item in range(3)]
        sft += [line(0, item, 0.0) for item in range(3)] + [line(0, item, 1.0) for item in range(3, 9)]
        sft += [line(0, item, 1.0, sample=1) for item in range(3)]
    start = pd.DataFrame(sft).drop(columns="step").assign(model="sft")
    frame = training.on_the_way(pd.DataFrame(along), start, np.random.default_rng(0), 50)
    assert frame.loc[frame["step"] == 0, "value"].tolist() == [0.0] * 5
    assert frame.loc[frame["step"] == 10, "value"].tolist() == [100.0] * 5


def test_the_cost_of_a_run_adds_up():
    timing = pd.DataFrame({"seconds_sample": [3.0, 3.0], "seconds_verify": [0.5, 0.5], "seconds_update": [1.0, 1.0]})
    table = training.cost_table(timing, gain(2), 12.0).set_index("part")
    assert table.loc["all", "seconds"] == 12.0 and table.loc["evaluation on the way, checkpoints, loading",
                                                             "seconds"] == 3.0
    ahead = training.cost_table(timing.assign(seconds_wait=[1.5, np.nan]), gain(2), 12.0).set_index("part")["seconds"]
    assert ahead["waiting for rollouts and verdicts"] == 3.5 + 1.5 and ahead["all"] == 12.0  # once, not beside the update too
    text = training.cost_sentence(timing, gain(2), "rl-multi", 12.0)
    assert "2,000 tokens at 333 a second" in text and "10,050.6 GPU hours, 63.7 %" in text


@pytest.mark.parametrize("name", profile_names(ROOT / "params"))
def test_every_stated_setting_has_its_used_value(name):
    """Catches a setting renamed in settings.yaml, whose value would silently become a dash."""
    stated, used = paper.settings(), details.used(load_profile(name))
    known = set(zip(stated["stage"], stated["name"], strict=True))
    assert set(used) <= known
    assert known - set(used) == {("analysis", "changed share of weights"), ("sft", "average response length")}


def test_table8_shows_both_blocks():
    columns = [f"{b}{end}" for b in [*BENCHMARKS, "avg"] for end in ("", "_low", "_high")]
    ours = pd.DataFrame({"model": ["base", "merge-sce"], **{column: [10.0, 30.0] for column in columns}})
    printed = paper.table(8).rename_axis("model").reset_index()
    printed["model"] += " (paper)"
    table = pd.concat([ours, printed], ignore_index=True)
    assert details.table8_sentence(table) == ("Here merge-sce is +20.0 points from base; in the paper merge-ties is "
                                              "+8.1 points from "
                                              "the official qwen3-4b-thinking.")
    assert details.table8_shown(table).iloc[-1].tolist() == ["mean of nine", "10.0 [10.0, 10.0]",
                                                             "30.0 [30.0, 30.0]", "52.9", "61.0"]


def test_table8_without_a_benchmark():
    """Faults: no Table 8 at all because of one benchmark; ours over eight beside the paper's printed mean of nine."""
    frame = pd.DataFrame([{"model": model, "benchmark": b, "item": i, "sample": 0, "score": float(i < n), "category": ""}
                          for model, n in [("base", 1), *((m, 2) for m in MERGES)]
                          for b in BENCHMARKS if b != "hle" for i in range(4)])
    run = SimpleNamespace(profile=load_profile("smoke"), scores=lambda models: frame, not_run=lambda: {"hle": "a login"})
    shown = details.table8_shown(details.table8(run, np.random.default_rng(0))).set_index("benchmark")
    assert list(shown.index)[-1] == "mean of 8 (without hle)" and not shown.index.str.startswith("hle").any()
    theirs = paper.table(8).drop(columns=["avg", "hle"]).mean(axis=1)
    assert shown.iloc[-1, 2:].tolist() == [f"{value:.1f}" for value in theirs] and (shown.iloc[-1, 0].split()[0] == "25.0")


def test_sampled_distillation_goes_where_the_full_one_goes():
    """Catches a sampled loss of the wrong sign: the student would run away from its teacher."""
    goal = torch.tensor([-1.0, 1.0, 0.0])
    paths = toys.distil_paths(torch.tensor([2.0, -1.5]), goal, steps=120, tokens=16, lr=0.4, seed=1)
    ends = paths.groupby("path").last()
    assert len(ends) == 2 and (ends["kl"] < 0.02).all() and (paths.groupby("path").first()["kl"] > 1).all()


def test_dare_keeps_the_mean():
    base, experts = {"w": torch.ones(2)}, {"a": {"w": torch.tensor([5.0, 2.0])}, "b": {"w": torch.tensor([-1.0, 4.0])}}
    cloud = toys.dare_cloud(base, experts, (0.0, 0.5), seeds=200)
    spread = cloud.groupby("rate")[["x", "y"]].agg(["mean", "std"])
    assert spread.loc[0.0].tolist() == [3.0, 0.0, 5.0, 0.0]  # nothing dropped: task arithmetic itself
    assert abs(spread.loc[0.5, ("x", "mean")] - 3) < 1.1 and abs(spread.loc[0.5, ("y", "mean")] - 5) < 0.8
    assert set(cloud.loc[cloud["rate"] == 0.5, "x"]) == {1.0, 9.0, -3.0, 5.0}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_keep_the_house_form(name):
    """No logic in notebooks: no def, short cells, literals as parameters, nothing executed, a title and an end."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    assert texts[0].startswith("# ") and "?" in texts[0] and "What the paper says" in texts[1]
    assert "## What this does not show" in texts[-1]
    assert len({cell["id"] for cell in cells}) == len(cells)
    tagged = [text for cell, text in zip(cells, texts, strict=True) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1 and all(line.count("=") == 1 for line in tagged[0].splitlines())
    for cell, text in zip(cells, texts, strict=True):
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None
        assert not any(isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef)
                       for node in ast.walk(ast.parse(text))), text
        assert "start(profile" in text or len(text.splitlines()) <= 10, text
