"""Several training seeds: intervals that know of them (coverage by simulation), their parts, and a run that makes them."""
import dataclasses
from math import inf, isnan, nan, sqrt

import numpy as np
import pandas as pd
import pytest
import toy_study
import yaml

from m2rl_core import claims
from m2rl_core import run as runs
from m2rl_core.__main__ import main
from m2rl_core.claims.evidence import Evidence, above, first_seed
from m2rl_core.domains import BENCHMARKS
from m2rl_core.jobs.tasks import notebook_stages
from m2rl_core.metrics import stats
from m2rl_core.metrics.measured import Spread
from m2rl_core.metrics.stats import Estimate, difference
from m2rl_core.notebook import seeds_note
from m2rl_core.profile import repo_root
from m2rl_core.study import EXPERTS
from m2rl_core.views import deciding


def simulated(rng, studies, seeds, between, inside=0.0, n=40, k=2):
    """Studies without a difference of a and z: items' difficulties, training runs of sd `between`, items by runs of sd
    `inside` (both of the difference, as shares), and samples. Each study is called a benchmark here."""
    shape = studies, 2, seeds, n, k
    easy = rng.beta(0.8, 0.8, (studies, 1, 1, n, 1))
    own = rng.normal(0, between / sqrt(2), (studies, 2, seeds, 1, 1))
    own = own + rng.normal(0, inside / sqrt(2), (studies, 2, seeds, n, 1))
    i = np.indices(shape).reshape(5, -1)
    return pd.DataFrame({"benchmark": i[0], "model": np.array(["a", "z"])[i[1]], "seed": i[2] + 1, "item": i[3],
                         "sample": i[4], "score": ((rng.random(shape) < easy) + own).ravel()})


def coverage(rows, rng):
    """The share of studies whose interval for a minus z holds 0."""
    found = stats.measure(rows, rng, resamples=500)
    held = [found.contrast(difference("a", "z", [b])) for b in dict.fromkeys(rows["benchmark"])]
    return np.mean([e.low <= 0 <= e.high for e in held])


@pytest.mark.parametrize("seeds", [3, 5])
def test_coverage_over_training_seeds(seeds):
    """60 studies of 40 items whose training runs differ by 20 points: the interval holds the truth in 95 % of them
    within binomial tolerance (and at most in all); one over items alone holds it in some 70 %."""
    rng = np.random.default_rng(seeds)
    rows = simulated(rng, 60, seeds, 0.2, k=1)
    assert coverage(rows, rng) >= 0.95 - 3 * sqrt(0.95 * 0.05 / 60)
    assert coverage(rows.drop(columns="seed"), rng) < 0.8


def test_seeds_that_do_not_differ_are_not_dear():
    """Without any spread between runs the interval errs on the wide side, by less than twice one over items alone."""
    rng = np.random.default_rng(0)
    rows = simulated(rng, 20, 5, 0.0, k=1)
    pooled, alone = stats.measure(rows, rng, resamples=500), stats.measure(rows.drop(columns="seed"), rng, resamples=500)
    widths = [[found.contrast(difference("a", "z", [b])) for b in range(20)] for found in (pooled, alone)]
    ratio = np.median([a.high - a.low for a in widths[0]]) / np.median([b.high - b.low for b in widths[1]])
    assert 1 < ratio < 2


def test_one_seed_changes_nothing():
    """Catches a column of seeds that moves a score of those who have one: same draws, same bits."""
    rng = np.random.default_rng(4)
    rows = simulated(rng, 3, 1, 0.0)
    plain, seeded = (stats.measure(r, np.random.default_rng(1), resamples=300).contrast(difference("a", "z", [0, 1, 2]))
                     for r in (rows.drop(columns="seed"), rows))
    assert plain == seeded and plain.spread is None


def frame(scores, seed, model="m"):
    """Rows of one benchmark from an (items, K) array."""
    return pd.DataFrame([{"model": model, "benchmark": "b", "item": i, "sample": k, "seed": seed, "score": float(v)}
                         for i, line in enumerate(scores) for k, v in enumerate(line)])


def test_pooling_by_hand():
    """Two items, two seeds: means of seeds 75 and 25, of items 50 and 50; only the seeds vary."""
    rows = pd.concat([frame([[1, 0], [1, 1]], 1), frame([[1, 0], [0, 0]], 2)])
    e = stats.measure(rows, np.random.default_rng(0)).contrast({("b", "m"): 1.0})
    assert (e.estimate, e.n) == (50, 2)
    assert e.se == pytest.approx(sqrt(50**2 / 2 / 2))  # var(75, 25) = 1250, over two seeds


def test_a_shared_model_has_no_spread_of_its_own():
    """SFT is trained once: its own interval is over items, and against it only the other side's seeds vary."""
    sft = frame([[1, 0], [1, 1], [0, 0]], 0, "sft")
    rl = pd.concat([frame([[1, 1], [1, 1], [0, 1]], 1, "rl"), frame([[1, 0], [1, 1], [0, 0]], 2, "rl")])
    found = stats.measure(pd.concat([sft, rl]), np.random.default_rng(0))
    alone = stats.measure(sft, np.random.default_rng(0)).contrast({("b", "sft"): 1.0})
    assert found.contrast({("b", "sft"): 1.0}).se == pytest.approx(alone.se)
    gap = found.contrast(difference("rl", "sft", ["b"]))
    assert gap.estimate == pytest.approx(100 / 6 + 100 / 12 - 100 / 12) and gap.spread.runs == 2


def test_what_was_made_on_one_seed_is_compared_on_that_seed():
    """A merge of two experts exists once: beside the mean of its experts' seeds it would not be paired."""
    pair = frame([[1, 1], [1, 0], [0, 0]], 1, "pair")
    rl = pd.concat([frame([[1, 0], [1, 0], [0, 0]], 1, "rl"), frame([[0, 0], [0, 0], [0, 0]], 2, "rl")])
    found = stats.measure(pd.concat([pair, rl]), np.random.default_rng(0))
    gap = found.contrast(difference("pair", "rl", ["b"]))
    assert gap.estimate == pytest.approx(100 / 6) and gap.spread is None
    assert found.contrast({("b", "rl"): 1.0}).estimate == pytest.approx(100 / 6)


def test_seeds_on_different_items_are_refused():
    rows = pd.concat([frame([[1], [0]], 1), frame([[1], [0], [1]], 2)])
    with pytest.raises(ValueError, match="b: seeds 1 and 2 were not measured on the same items"):
        stats.measure(rows, np.random.default_rng(0))


# -- the parts of a variance, and what would shrink them

def test_parts_of_the_variance_are_those_that_were_planted():
    """Catches parts that are mixed up: 10 points between runs, 20 between items by runs, and the samples' p (1 - p)."""
    rng = np.random.default_rng(2)
    found = stats.measure(simulated(rng, 60, 4, 0.1, 0.2, k=8), rng, resamples=20)
    mean = np.mean([found.spread(difference("a", "z", [b]))[:3] for b in range(60)], axis=0)
    of_one = 0.25 - 0.8**2 / (1.6**2 * 2.6)  # p (1 - p), p from this beta
    assert mean[0] == pytest.approx(20**2 / 4 / 40, rel=0.2)
    assert mean[1] == pytest.approx(2 * 100**2 * of_one / 4 / 8 / 40, rel=0.1)
    assert mean[2] == pytest.approx(10**2 / 4, rel=0.25)


def test_parts_add_up_with_one_seed_and_with_one_sample():
    rng = np.random.default_rng(3)
    rows = simulated(rng, 1, 1, 0.0, 0.1)
    found = stats.measure(rows, rng, resamples=20)
    parts, e = found.spread(difference("a", "z", [0])), found.contrast(difference("a", "z", [0]))
    assert parts.items + parts.samples == pytest.approx(e.se**2) and isnan(parts.seeds)
    single = stats.measure(rows[rows["sample"] == 0], rng, resamples=20)
    parts, e = single.spread(difference("a", "z", [0])), single.contrast(difference("a", "z", [0]))
    assert parts.items == pytest.approx(e.se**2) and isnan(parts.samples)


def test_levers_by_hand():
    """A difference of 2.8016 must be 2.8016 standard errors away: a variance of 1 is allowed."""
    far = 1.95996 + 0.84162
    found = stats.levers(Spread(1.5, 0.5, nan), far)
    assert found["items"] == pytest.approx(2, rel=1e-4) and found["samples"] == inf and isnan(found["seeds"])
    found = stats.levers(Spread(0.5, 1.0, 0.25, 3), far)
    assert found["items"] == pytest.approx(2, rel=1e-4)  # 1.5 must become 0.75
    assert found["samples"] == pytest.approx(4, rel=1e-4)  # 1.0 must become 0.25
    assert found["seeds"] == pytest.approx(2.5, rel=1e-4)  # 1.25 must become 0.5
    assert stats.levers(Spread(0.1, nan, 1.5, 3), far)["items"] == inf
    assert isnan(stats.levers(Spread(0.1, nan, 1.5, 3), far)["samples"])


def test_a_note_says_what_deciding_would_cost():
    """197 items by hand (test_stats); the 157 that are missing cost 157 / 40 of what these 40 took."""
    e = Estimate(10, -4, 24, 40, 50 / 40**0.5, seconds=60.0)
    assert above(e).note == "about 197 items would tell, 4 minutes of evaluation more"
    assert above(e._replace(seconds=nan)).note == "about 197 items would tell"
    far = Estimate(2.8016, -9, 9, 40, 2.0, Spread(0.5, 0.4, 1.5, 3), 60.0)
    assert above(far).note == "no number of items, but about 12 training seeds would tell"  # 1.9 must become 0.5: 3.8 x 3


def test_the_papers_numbers_have_no_price():
    """Catches seconds of this machine beside a claim that is decided on printed numbers."""
    rows = rows_of(dict.fromkeys(("rl-multi", "merge-ties"), 0.5), (1,), n=20)
    lines = claims.decide("3.2", Evidence(scores=rows, prices=dict.fromkeys(set(rows["model"]), 0.5), resamples=100))
    found = {line["id"]: line for line in lines}["mix-equals-merge"]
    assert "of evaluation more" in found["note"] and "evaluation" not in found["paper_note"]


# -- a run that makes them

@pytest.fixture
def profile(tmp_path):
    """smoke with `seeds: 2`, as a file."""
    content = yaml.safe_load((repo_root() / "params" / "smoke.yaml").read_text())
    path = tmp_path / "twice.yaml"
    path.write_text(yaml.safe_dump(content | {"seeds": 2}))
    return path


@pytest.fixture
def run(profile, tmp_path, monkeypatch):
    """That profile's study with builders that take milliseconds."""
    made = toy_study.toy_run(tmp_path, profile)
    runs.BUILDERS["eval"] = "toy_study:score"
    return made


def test_a_run_makes_both_seeds_and_pools_them(run):
    """From the profile to the table: replicas are made of their own experts, seeds reach the rows, scores are pooled."""
    models = ("sft", "rl-math", "merge-ties")
    rows = run.scores(models)
    assert set(zip(rows["model"], rows["seed"], strict=True)) == {
        ("sft", 0), ("rl-math", 1), ("rl-math", 2), ("merge-ties", 1), ("merge-ties", 2)}
    assert "seed" not in run.scores(["sft"])  # set beside rows of a first seed, which have none
    merged = run.manifest("merge-ties@2")
    assert merged["inputs"].keys() == {"sft", *(f"{name}@2" for name in EXPERTS)}
    assert (run.path("merge-ties@2") / "from-rl-if.txt").read_text() == (run.path("rl-if@2") / "numbers.txt").read_text()
    assert (run.path("rl-if@2") / "numbers.txt").read_text() != (run.path("rl-if") / "numbers.txt").read_text()
    table = stats.score_table(rows, models, list(BENCHMARKS), np.random.default_rng(0)).set_index("model")
    own = rows[rows["model"] == "rl-math"]
    assert table.loc["rl-math", "avg"] == pytest.approx(100 * own["score"].mean())
    firsts = own[own["seed"] == 1]["score"].mean()
    assert firsts != own["score"].mean() and first_seed(own)["score"].mean() == firsts
    gap = Evidence(scores=rows).contrast(difference("merge-ties", "rl-math", BENCHMARKS))
    assert gap.spread.runs == 2 and gap.low < gap.estimate < gap.high


def test_raising_the_number_of_seeds_trains_no_first_seed_again(run, tmp_path):
    one = runs.Run(dataclasses.replace(run.profile, seeds=1), tmp_path)
    one.need("eval-mt-opd")
    assert run.has("eval-mt-opd") and set(run.missing("eval-mt-opd@2")) == {
        *(f"{name}@2" for name in EXPERTS), "mt-opd@2", "eval-mt-opd@2"}
    assert [path.name.split("-", 2)[1] for path in run.need_seeds("rl-math")] == ["math", "math@2"]


def test_commands_know_the_seeds(run, profile, tmp_path, monkeypatch, capsys):
    """status, estimate and why list every seed; what was never made is expected to take as long as the first seed."""
    monkeypatch.setenv("M2RL_ARTIFACTS", str(tmp_path))
    run.need("rl-math")
    time_of = run.expected_seconds("rl-math")
    assert time_of is not None and run.expected_seconds("rl-math@2") == time_of and not run.has("rl-math@2")
    assert "eval-rl-math@2" in notebook_stages(run, "3.2") and "rl-math@2" in notebook_stages(run, "3.2_train")
    assert "judge-rl-math@2" not in run.stages
    for command in (["status"], ["estimate"], ["why", "rl-math@2"]):
        assert main([*command, "--profile", str(profile)]) == 0
        assert "rl-math@2" in capsys.readouterr().out
    assert main(["why", "rl-math@3", "--profile", str(profile)]) == 2
    assert "did you mean 'rl-math@2'" in capsys.readouterr().err


def rows_of(levels, seeds, n=40, k=2):
    """Rows of models whose item i is right with the chance of its level, drawn anew by seed."""
    rng = np.random.default_rng(0)
    return pd.concat([pd.DataFrame({
        "model": m, "benchmark": b, "category": "", "item": np.repeat(np.arange(n), k), "sample": np.tile(np.arange(k), n),
        "seed": s, "score": (rng.random(n * k) < level).astype(float)})
        for m, level in levels.items() for b in BENCHMARKS for s in seeds], ignore_index=True)


def test_what_would_decide_it(run):
    """An open question names its cheapest lever and its price; a decided one names none."""
    levels = {"rl-multi": 0.5, "merge-ties": 0.5, "merge-ta": 0.3, "mt-opd": 0.9}
    rows = rows_of(levels, (1, 2))
    found = deciding.levers(run, Evidence(scores=rows, prices=dict.fromkeys(levels, 0.01)))
    assert list(zip(found["a"], found["b"], strict=True))[::2] == [("rl-multi", "merge-ties"), ("mt-opd", "merge-ties")]
    shown = deciding.shown(found).set_index(["difference", "question"])
    assert found[["items_share", "samples_share", "seeds_share"]].sum(axis=1).to_numpy() == pytest.approx(100)
    last = shown.iloc[-2]
    assert last["answer"] == "higher" and last["more items"] == "–"
    still = found[found["verdict"] == ""]
    assert len(still) and still["seeds_seconds"].isna().all()  # nothing was trained here: no time is known
    line = still.iloc[0]
    spent = len(BENCHMARKS) * 40 * 2 * 2 * 2 * 0.01  # items, K, seeds, models, seconds
    assert line["samples_seconds"] == pytest.approx((line["times_samples"] - 1) * spent)
    assert line["items_seconds"] == pytest.approx((line["times_items"] - 1) * spent) and line["times_items"] > 1
    assert "cheapest way is **" in deciding.sentence(found).data
    assert "decided" in deciding.sentence(found[found["verdict"] != ""]).data


def test_notes_on_seeds(run, tmp_path):
    """One seed is said where scores are compared and nowhere else; of several, each section says what it shows."""
    one = runs.Run(dataclasses.replace(run.profile, seeds=1), tmp_path)
    assert seeds_note(one, "3.3") is None and "One training run" in seeds_note(one, "3.2").data
    assert "looks at the first" in seeds_note(run, "3.3").data
    for section in ("3.2", "4"):
        said = seeds_note(run, section).data
        assert "pooled over 2 training seeds" in said and "the first seed's" in said
