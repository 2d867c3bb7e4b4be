"""Gain vectors with planted answers: known cosines, undefined cases, items that only one side solves."""
from math import isnan, sqrt

import numpy as np
import pandas as pd
import pytest

from m2rl_core.metrics import skills, solved

EXPERTS = ("e1", "e2")


def planted(accuracy, k=4, benchmark="b"):
    """Rows with exactly these per-item accuracies (multiples of 1 / k)."""
    return pd.DataFrame([
        {"model": model, "benchmark": benchmark, "item": f"i{i}", "sample": s, "score": float(s < round(a * k))}
        for model, line in accuracy.items() for i, a in enumerate(line) for s in range(k)])


WORLD = {"sft": [0, 0, 0.5, 1], "e1": [1, 0, 0.5, 0], "e2": [0.5, 0, 1, 1], "mix": [1, 1, 0, 1], "same": [1, 0, 1, 1]}


def consistency(world, models, **settings):
    settings = {"experts": EXPERTS, "resamples": 200, **settings}
    return skills.consistency(planted(world), models, ["b"], np.random.default_rng(0), **settings).set_index("model")


def test_gains_and_union_by_hand():
    gain = skills.gains(skills.item_accuracy(planted(WORLD), "b", list(WORLD)))
    assert gain["e1"].tolist() == [1, 0, 0, 0]  # a loss on the last item is no gain
    assert gain["e2"].tolist() == [0.5, 0, 0.5, 0]
    assert skills.union(gain, EXPERTS).tolist() == [1, 0, 0.5, 0]


def test_planted_cosines():
    """union (1, 0, .5, 0); mix gains (1, 1, 0, 0): cosine 1 / (sqrt(1.25) sqrt(2)); `same` equals the union."""
    found = consistency(WORLD, ["mix", "same"])
    assert found.loc["mix", "cosine"] == pytest.approx(1 / sqrt(1.25 * 2))
    assert found.loc["same", "cosine"] == pytest.approx(1)
    assert found.loc["mix", "gained"] == 2 and found.loc["mix", "n"] == 4
    chance = 4 * 0.375 * 0.5 / sqrt(1.25 * 2)  # n mean(u) mean(g) / (|u| |g|)
    assert found.loc["mix", "chance"] == pytest.approx(chance)


def test_chance_is_the_mean_over_shuffles():
    rng = np.random.default_rng(0)
    u, g = np.array([1, 0, 0.5, 0]), np.array([1, 1, 0, 0.0])
    shuffled = [skills.cosine(u, rng.permutation(g)) for _ in range(4000)]
    assert consistency(WORLD, ["mix"]).loc["mix", "chance"] == pytest.approx(np.mean(shuffled), abs=0.02)


def test_no_gain_is_undefined_and_says_so():
    found = consistency({**WORLD, "idle": WORLD["sft"]}, ["idle"])
    assert isnan(found.loc["idle", "cosine"]) and isnan(found.loc["idle", "low"])
    assert found.loc["idle", "note"] == "undefined: idle gains on no item"
    still = {name: WORLD["sft"] for name in ("sft", *EXPERTS)} | {"mix": WORLD["mix"]}
    assert consistency(still, ["mix"]).loc["mix", "note"] == "undefined: no expert gains on any item"


def test_ceiling_is_one_without_noise_and_lower_with_it():
    """Items that are always or never solved give the same gains in both halves; coin flips do not."""
    sure = {"sft": [0, 0, 0, 0], "e1": [1, 0, 1, 0], "e2": [0, 0, 1, 0], "mix": [1, 1, 0, 0]}
    found = consistency(sure, ["mix"])
    assert found.loc["mix", "ceiling"] == pytest.approx(1) and found.loc["mix", "ceiling_union"] == pytest.approx(1)
    flips = {name: [0.5] * 40 for name in ("sft", "e1", "e2", "mix")}
    assert consistency(flips, ["mix"]).loc["mix", "ceiling"] < 0.8
    assert isnan(skills.ceilings(planted(sure, k=1), "b", ["mix"], np.random.default_rng(0), EXPERTS)[0]["mix"])


def test_interval_holds_the_cosine():
    rng = np.random.default_rng(0)
    world = {m: rng.integers(0, 5, 60) / 4 for m in ("sft", *EXPERTS, "mix")}
    found = consistency(world, ["mix"]).loc["mix"]
    assert found["low"] < found["cosine"] < found["high"]


def test_gap_is_paired():
    gap, low, high, n = skills.consistency_gap(
        planted(WORLD), "same", ["mix"], ["b"], np.random.default_rng(0), EXPERTS, resamples=200)
    assert gap == pytest.approx(1 - 1 / sqrt(2.5)) and low <= gap <= high and n == 4
    idle = planted({**WORLD, "idle": WORLD["sft"]})
    assert skills.consistency_gap(idle, "idle", ["mix"], ["b"], np.random.default_rng(0), EXPERTS, resamples=50)[3] == 0


def test_items_solved_apart():
    found = solved.apart(planted(WORLD), "b", "mix", EXPERTS).set_index("item")
    assert found["who"].to_dict() == {"i1": "model only", "i2": "experts only"}
    assert found.loc["i2", "best_expert"] == "e2" and found.loc["i1", "best_accuracy"] == 0


def test_ceiling_shares_sft_as_the_cosine_does_and_the_split_does_not():
    """Fault: the luck of SFT's samples, shared by both sides of a bar, missing from its ceiling or left in the split.

    Nobody gains anything: all solve every item with one half. What is left are gains over SFT's luck.
    """
    rng = np.random.default_rng(3)
    frame = pd.DataFrame([{"model": m, "benchmark": "b", "item": f"i{i:03d}", "sample": s, "score": float(rng.integers(2))}
                          for m in ("sft", *EXPERTS, "mix") for i in range(200) for s in range(8)])
    found = skills.consistency(frame, ["mix"], ["b"], rng, experts=EXPERTS, resamples=50).iloc[0]
    assert found["ceiling"] > found["split_ceiling"] + 0.05 and found["cosine"] > found["split"] + 0.05
    assert found["split"] == pytest.approx(found["split_chance"], abs=0.03)  # nothing is shared once SFT's luck is not


def test_luck_by_hand():
    """A copy of a sure expert never differs from it; one that guesses does, and no model of the same accuracy does more.

    Fault: the copy held against the very samples that the experts' union is made of, which finds no difference ever.
    """
    def luck(world, k=4):
        return solved.by_luck(planted(world, k), "b", "mix", "e1", np.random.default_rng(0), EXPERTS)
    sure = luck({"mix": [1, 1, 0, 0], "e1": [1, 0, 1, 0], "e2": [0, 0, 0, 1]})
    wanted = {"alone": 1, "experts": 2, "copy_alone": 0, "copy_experts": 1}  # e2 has an item that e1 lacks
    assert {name: sure[name] for name in wanted} == wanted
    assert sure["alone_se"] == pytest.approx(1) and sure["experts_se"] == pytest.approx(1)  # one item of four: 4 x 1/4
    once = luck({"mix": [0] * 30, "e1": [0.25] * 30, "e2": [0] * 30})  # one sample of four: just one half solves it
    assert once["copy_alone"] + once["copy_experts"] == pytest.approx(30) and once["copy_alone"] == pytest.approx(15, abs=3)
    assert once["alone"] == 0 and once["experts"] == once["copy_experts"]
    assert all(isnan(value) for value in luck({"mix": [1], "e1": [1], "e2": [1]}, k=1).values())


def test_other_numbers_of_samples_are_refused_with_both_names():
    """Fault: a model with fewer samples, whose luck makes larger gains, beside the others."""
    frame = pd.concat([planted({"sft": WORLD["sft"], "e1": WORLD["e1"]}), planted({"mix": WORLD["mix"]}, k=2)])
    with pytest.raises(ValueError, match=r"b: sft and mix have different K \(4 and 2 samples"):
        skills.item_accuracy(frame, "b", ["sft", "e1", "mix"])


def test_missing_rows_are_named():
    with pytest.raises(ValueError, match="no rows of ghost"):
        skills.item_accuracy(planted(WORLD), "b", ["mix", "ghost"])
    frame = planted(WORLD)
    with pytest.raises(ValueError, match="e1 was not measured on item 'i3'"):
        skills.item_accuracy(frame[~((frame["model"] == "e1") & (frame["item"] == "i3"))], "b", ["mix", "e1"])
