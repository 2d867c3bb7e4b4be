"""Intervals and comparisons: hand-worked numbers, coverage by simulation, refusals to compare what does not match."""
import time
from math import isnan, sqrt

import numpy as np
import pandas as pd
import pytest

from m2rl_core.metrics import planted, stats


def rows(scores, model="m", benchmark="b", category=""):
    """Rows of one model from an (items, K) array."""
    return pd.DataFrame([
        {"model": model, "benchmark": benchmark, "category": category, "item": f"{benchmark}/{category}{i}",
         "sample": k, "score": float(score)} for i, line in enumerate(scores) for k, score in enumerate(line)])


def test_score_is_mean_over_items_of_mean_over_samples():
    frame = rows([[1, 0], [1, 1], [0, 0], [1, 0]])
    table = stats.score_table(frame, ["m"], ["b"], np.random.default_rng(0))
    assert list(table.columns) == ["model", "b", "b_low", "b_high", "avg", "avg_low", "avg_high"]
    assert table.loc[0, "b"] == 50.0 and table.loc[0, "b_low"] < 50 < table.loc[0, "b_high"]


def test_categories_weigh_alike():
    """BFCL: nine items of one category and one of another count half each; a plain mean would be 10."""
    frame = pd.concat([rows([[0]] * 9, category="single"), rows([[1], [1]], category="parallel")])
    assert stats.measure(frame, np.random.default_rng(0)).contrast({("b", "m"): 1.0}).estimate == 50.0


def test_standard_error_by_hand():
    e = stats.measure(rows([[1], [0], [1], [1]]), np.random.default_rng(0), resamples=20000).contrast({("b", "m"): 1.0})
    assert e.se == pytest.approx(100 * sqrt(0.75 * 0.25 / 3)) and e.n == 4
    wide = stats.measure(rows([[1], [0]] * 50), np.random.default_rng(0), resamples=20000).contrast({("b", "m"): 1.0})
    assert wide.high - wide.low == pytest.approx(2 * 1.984 * wide.se, rel=0.05)  # t with 99 degrees


def test_coverage_of_the_cluster_bootstrap():
    """300 simulated benchmarks of 20 items x 4 samples that share an item's difficulty: the interval holds the truth
    in 95 % of them within binomial tolerance; one that took samples as independent would hold it in some 80 %."""
    rng = np.random.default_rng(1)
    hits = naive = 0
    for _ in range(300):
        p = rng.beta(0.8, 0.8, 20)
        scores = rng.random((20, 4)) < p[:, None]
        e = stats.measure(rows(scores), rng, resamples=400).contrast({("b", "m"): 1.0})
        hits += e.low <= 50 <= e.high
        naive += abs(e.estimate - 50) <= 196 * sqrt(0.25 / 80)
    assert 0.95 - 3 * sqrt(0.95 * 0.05 / 300) <= hits / 300 <= 1.0
    assert naive < 0.9 * 300


def coverage(frame, truth, contrasts, rng, resamples=1000):
    """In what share of worlds, which are models of one frame, the interval holds the truth (in points)."""
    found = stats.measure(frame, rng, resamples=resamples)
    held = [e.low <= truth <= e.high for e in (stats.widen(found.contrast(c)) for c in contrasts)]
    return np.mean(held)


LEAST = 0.95 - 3 * sqrt(0.95 * 0.05 / 400)  # of 400 worlds, for a sound 95 % interval


@pytest.mark.parametrize(("n", "k", "level", "least"), [
    (10, 4, 0.5, LEAST - 0.02), (20, 1, 0.5, LEAST), (40, 4, 0.5, LEAST), (20, 4, 0.03, LEAST),
    # A known weakness: where only a handful of items is not like all others, the bootstrap sees too little of the longer
    # tail (and where none is, `widen` steps in). Measured over 1000 worlds: 0.90, 0.92, 0.84 and 0.86.
    (20, 4, 0.9, 0.85), (40, 4, 0.1, 0.88), (40, 4, 0.98, 0.79), (60, 8, 0.02, 0.81),
])
def test_coverage_of_scores(n, k, level, least):
    """Few, easy and hard items; most items are nearly always or nearly never solved. Fault: an interval without the
    stretch for small n, or an empty one where all items agree."""
    rng = np.random.default_rng(n + k)
    chances = {f"m{i}": planted.difficulties(n, level, 0.0, rng)["a"] for i in range(400)}
    found = coverage(planted.rows(chances, k, rng), 100 * level, [{("b", m): 1.0} for m in chances], rng)
    assert least <= found


@pytest.mark.parametrize(("n", "level", "gap", "least"), [
    (10, 0.4, 0.1, LEAST - 0.03), (20, 0.4, 0.0, LEAST - 0.02), (40, 0.4, 0.1, LEAST), (40, 0.02, 0.03, LEAST - 0.02),
    (40, 0.9, 0.05, LEAST - 0.02),
])
def test_coverage_of_paired_differences(n, level, gap, least):
    rng = np.random.default_rng(n)
    chances = {}
    for i in range(400):
        chances |= {f"{m}{i}": chance for m, chance in planted.difficulties(n, level, gap, rng).items()}
    pairs = [stats.difference(f"a{i}", f"b{i}", ["b"]) for i in range(400)]
    assert least <= coverage(planted.rows(chances, 4, rng), 100 * gap, pairs, rng)


def test_coverage_of_a_mean_over_benchmarks_of_unlike_size():
    """Fault: items of all benchmarks thrown together, which weighs the large one most: it has another level."""
    rng, sizes = np.random.default_rng(0), {"small": (10, 0.3), "middle": (40, 0.5), "large": (80, 0.7)}
    parts, names = [], [f"m{i}" for i in range(400)]
    for benchmark, (n, level) in sizes.items():
        parts.append(planted.rows({m: planted.difficulties(n, level, 0.0, rng)["a"] for m in names}, 4, rng, benchmark))
    frame, contrasts = pd.concat(parts), [stats.average(m, sizes) for m in names]
    assert LEAST <= coverage(frame, 50, contrasts, rng)
    assert coverage(frame.assign(benchmark="b"), 50, [{("b", m): 1.0} for m in names], rng) < 0.8


def test_coverage_of_pearson_over_nine_models():
    """Fault: the plain percentile interval, which is too narrow at nine pairs, most of all where one stands apart."""
    rng, worlds, new, plain = np.random.default_rng(0), 600, 0, 0
    for i in range(worlds):
        rho = (0.0, -0.5, 0.9)[i % 3]
        pair = np.stack(planted.correlated(9, 0.0, rng)) * np.where(rng.random(9) < 0.1, 4, 1)  # an outlier now and then
        x, y = pair[0], rho * pair[0] + sqrt(1 - rho**2) * pair[1]
        e = stats.pearson(x, y, rng, resamples=600)
        new += e.low <= rho <= e.high
        drawn = rng.integers(9, size=(600, 9))
        low, high = np.nanquantile(stats._r(x[drawn], y[drawn]), [0.025, 0.975])
        plain += low <= rho <= high
    assert 0.92 <= new / worlds <= 0.98 and plain / worlds < 0.91


def test_pearson_of_two_points_has_no_interval():
    e = stats.pearson([0, 1], [0, 1], np.random.default_rng(0))
    assert e.estimate == pytest.approx(1) and isnan(e.low) and isnan(e.high)


def test_all_right_is_not_certain():
    table = stats.score_table(rows([[1]] * 20), ["m"], ["b"], np.random.default_rng(0))
    assert table.loc[0, "b_high"] == 100 and table.loc[0, "b_low"] == pytest.approx(100 * 0.025 ** (1 / 20))


def test_models_that_agree_on_few_items_may_still_differ():
    frame = pd.concat([rows([[1], [0]] * 10, "a"), rows([[1], [0]] * 10, "z")])
    e = stats.paired_difference(frame, "a", "z", ["b"], np.random.default_rng(0))
    assert (e.low, e.estimate, e.high) == pytest.approx((-16.84, 0, 16.84), abs=0.01)  # 1 - 0.025^(1/20)


def test_paired_is_narrower_than_apart():
    rng = np.random.default_rng(0)
    p = rng.beta(0.5, 0.5, 60)
    a, b = rng.random((60, 8)) < p[:, None], rng.random((60, 8)) < np.clip(p - 0.1, 0, 1)[:, None]
    frame = pd.concat([rows(a, "a"), rows(b, "b-model")])
    e = stats.paired_difference(frame, "a", "b-model", ["b"], rng)
    assert e.estimate == pytest.approx(100 * (a.mean() - b.mean()))
    alone = [stats.measure(frame[frame["model"] == m], rng).contrast({("b", m): 1.0}).se for m in ("a", "b-model")]
    assert e.se < 0.6 * sqrt(alone[0] ** 2 + alone[1] ** 2)


def test_paired_refuses_what_does_not_match():
    left = rows([[1, 0], [0, 0], [1, 1]], "a")
    cases = {
        "different items": rows([[1, 0], [0, 0]], "z"),
        "different K": rows([[1], [0], [1]], "z"),
        "z has no rows": rows([[1, 0]], "other"),
    }
    for message, right in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            stats.paired_difference(pd.concat([left, right]), "a", "z", ["b"], np.random.default_rng(0))
        assert "a and z" in str(error.value)
    with pytest.raises(ValueError, match="z and a were not measured on the same items"):
        stats.score_table(pd.concat([left, cases["different items"]]), ["a", "z"], ["b"], np.random.default_rng(0))


def test_missing_scores_are_nan_and_not_zero():
    frame = pd.concat([rows([[1], [0]], "a"), rows([[1], [0]], "a", "c"), rows([[1], [1]], "z")])
    table = stats.score_table(frame, ["a", "z"], ["b", "c"], np.random.default_rng(0)).set_index("model")
    assert isnan(table.loc["z", "c"]) and isnan(table.loc["z", "avg"]) and table.loc["a", "avg"] == 50
    with pytest.raises(KeyError):
        stats.measure(frame, np.random.default_rng(0)).contrast({("c", "z"): 1.0})


def test_items_needed_by_hand():
    assert stats.items_needed(50, 10) == 197  # ((1.95996 + 0.84162) x 50 / 10)^2 = 196.2
    assert stats.items_needed(50, 5) == 785  # half the difference, four times the items
    e = stats.Estimate(10, -5, 25, 40, 50 / sqrt(40))
    assert stats.needed(e) == 197
    assert stats.needed(e, threshold=10) is None


def test_one_item_has_no_interval():
    e = stats.measure(rows([[1, 0]]), np.random.default_rng(0)).contrast({("b", "m"): 1.0})
    assert e.estimate == 50 and isnan(e.low) and isnan(e.se)


def test_same_generator_same_interval():
    frame = rows(np.random.default_rng(5).random((30, 3)))
    found = [stats.score_table(frame, ["m"], ["b"], np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert found[0].equals(found[1]) and not found[0].equals(found[2])


def test_pearson():
    x = np.arange(9.0)
    e = stats.pearson(x, 3 - 2 * x, np.random.default_rng(0))
    assert e.estimate == pytest.approx(-1) and e.high == pytest.approx(-1) and e.n == 9
    noisy = x + np.random.default_rng(0).normal(0, 3, 9)
    e = stats.pearson(x, noisy, np.random.default_rng(0))
    assert e.estimate == pytest.approx(np.corrcoef(x, noisy)[0, 1]) and e.low < e.estimate < e.high
    assert isnan(stats.pearson(x, np.ones(9), np.random.default_rng(0)).estimate)


def test_leave_one_out():
    x, y = [0, 1, 2, 10], [0, 1, 2, -10]
    left = stats.leave_one_out(["a", "b", "c", "odd"], x, y).set_index("dropped")["r"]
    assert left["odd"] == pytest.approx(1) and left["a"] < 0
    assert stats.leave_one_out(["a", "b", "c"], [1, 1, 1], [1, 2, 3])["r"].isna().all()


def test_whole_table_is_fast():
    """15 models x 9 benchmarks x 2000 resamples in less than two seconds."""
    rng = np.random.default_rng(0)
    models, benchmarks = [f"m{i}" for i in range(15)], [f"b{i}" for i in range(9)]
    frame = pd.concat([rows(rng.random((60, 4)) < 0.5, m, b) for m in models for b in benchmarks])
    start = time.process_time()
    table = stats.score_table(frame, models, benchmarks, rng)
    assert time.process_time() - start < 2 and table.shape == (15, 1 + 3 * 10)
