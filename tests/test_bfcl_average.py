"""BFCL v3's averaging: by hand, as the official code has it, and inside every score with its interval."""
from __future__ import annotations

import random

import numpy as np
import pandas as pd
import pytest
from test_bfcl import official

from m2rl_core.claims.evidence import Evidence
from m2rl_core.domains import NO_ROOM
from m2rl_core.domains.bfcl import CATEGORIES
from m2rl_core.metrics import bfcl, bfcl_parts, stats
from m2rl_core.metrics.measured import measure
from m2rl_core.views import categories

SIMPLE, LIVE = ("simple", "java", "javascript"), [name for name in CATEGORIES if name.startswith("live_")]


def rows(right: dict[str, int], items: dict[str, int] = CATEGORIES, model: str = "m") -> pd.DataFrame:
    """Evaluation rows in which the first `right[category]` items of each category are right."""
    return pd.DataFrame([
        {"model": model, "benchmark": "bfcl_v3", "category": name, "item": f"{name}_{i}", "sample": 0,
         "score": float(i < right.get(name, 0))} for name, n in items.items() for i in range(n)])


def test_weights_by_hand():
    """Catches live categories that weigh alike, items that weigh alike, and Java that weighs as much as multiple."""
    share = bfcl.shares(CATEGORIES)
    assert sum(share.values()) == pytest.approx(1) and set(share) == set(CATEGORIES)
    assert [share[name] for name in SIMPLE] == pytest.approx([1 / 45] * 3)
    assert share["multiple"] == share["irrelevance"] == pytest.approx(1 / 15)
    assert share["multi_turn_base"] == pytest.approx(1 / 12)
    assert share["live_multiple"] == pytest.approx(1053 / 2251 / 3) and share["live_relevance"] == pytest.approx(18 / 2251 / 3)


def test_the_overall_score_is_the_official_one():
    rng = random.Random(1)
    right = {name: rng.randint(0, n) for name, n in CATEGORIES.items()}
    wanted = official(scores={name: [right[name] / n, n] for name, n in CATEGORIES.items()})["scores"]
    frame = rows(right)
    assert 100 * bfcl.average(frame) == pytest.approx(wanted, abs=0.005)
    table = stats.score_table(frame, ["m"], ["bfcl_v3"], np.random.default_rng(0))
    assert table.loc[0, "bfcl_v3"] == pytest.approx(wanted, abs=0.005)
    assert table.loc[0, "bfcl_v3_low"] < wanted < table.loc[0, "bfcl_v3_high"]


def test_the_interval_is_that_of_the_weighted_mean():
    """Catches weights that reach the score and not its interval: the standard error is that of the weighted parts."""
    right = {name: n // 2 for name, n in CATEGORIES.items()}
    found = measure(rows(right), np.random.default_rng(0)).contrast({("bfcl_v3", "m"): 1.0})
    share = bfcl.shares(CATEGORIES)
    parts = [share[name] ** 2 * (p := right[name] / n) * (1 - p) / (n - 1) for name, n in CATEGORIES.items()]
    assert found.se == pytest.approx(100 * sum(parts) ** 0.5) and found.n == 4441


def test_what_was_not_run_has_no_weight():
    assert bfcl.shares({"simple": 5, "java": 1}) == {"simple": 0.5, "java": 0.5}
    assert bfcl.shares({"simple": 5, "live_simple": 1, "live_multiple": 3}) == {
        "simple": 0.5, "live_simple": 0.125, "live_multiple": 0.375}
    with pytest.raises(ValueError, match="no rows"):
        bfcl.average(rows({}).iloc[:0])


def test_the_miniature_weighs_its_categories_alike():
    items = {"simple": 10, "parallel": 20, "irrelevance": 5, "multi_turn": 40}
    assert set(bfcl.shares(items).values()) == {0.25} and bfcl.shares({"": 7}) == {"": 1.0}
    assert bfcl.average(rows({"simple": 10, "multi_turn": 20}, items)) == pytest.approx((1 + 0.5) / 4)


def test_the_parts_of_a_score():
    """Catches a group that is averaged by items where the benchmark averages by categories, and the reverse; an item that
    did not fit and is not counted; categories of a miniature under the names of BFCL's."""
    frame = pd.concat([rows({**dict.fromkeys(SIMPLE, 10), "live_simple": 258}), rows({}, model="other")])
    found = bfcl_parts.breakdown(frame, "m", np.random.default_rng(0)).set_index("part")
    simple = (10 / 400 + 10 / 100 + 10 / 50) / 3
    assert found.loc["Non-Live", "estimate"] == pytest.approx(100 * simple / 5)
    assert found.loc["Live", "estimate"] == pytest.approx(100 * 258 / 2251)
    assert found.loc["overall", "estimate"] == pytest.approx(100 * (simple / 5 + 258 / 2251) / 3)
    assert found.loc["java", "estimate"] == pytest.approx(10) and found.loc["live_simple", "estimate"] == 100
    frame.loc[frame["item"] == "multi_turn_base_7", "reason"] = f"{NO_ROOM}a prompt of 9 tokens, but 8 fit"
    evidence = Evidence(scores=frame.fillna({"reason": "wrong"}), resamples=200)
    parts = categories.parts(evidence, ["m", "other", "not evaluated"]).set_index(["model", "part"])
    assert parts.loc[("m", "Non-Live"), "estimate"] == pytest.approx(100 * simple / 5) and len(parts) == 2 * 21
    lost = parts["no_room"]
    assert lost["other", "Multi-Turn"] == lost["other", "multi_turn_base"] == lost["m", "overall"] == 1 and lost.sum() == 6
    shown = categories.shown(parts.reset_index()).data
    assert shown.count("1 no room") == 6 and "NON-LIVE" in shown and "4441" in shown
    told = categories.room(evidence).data
    assert "* bfcl_v3 (miniature): `m` 1 of 4,441, `other` 1 of 4,441" in told
    own = Evidence(scores=rows({}, {"simple": 2, "multi_turn": 2}).assign(reason="wrong"))
    assert "*not run*" in categories.shown(categories.parts(own, ["m"])).data
    assert "found room in its model's context (4 samples)" in categories.room(own).data
    assert found.loc["Live", "n"] == sum(CATEGORIES[name] for name in LIVE) and len(found) == 1 + 3 + 17
