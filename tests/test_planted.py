"""Planted worlds: the real measures recover the known answer at the rate that their intervals claim, and wrong ones do not."""
from __future__ import annotations

import dataclasses
import itertools
import time
from math import sqrt
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from m2rl_core.claims.evidence import Evidence
from m2rl_core.domains import DOMAINS
from m2rl_core.merging.states import State
from m2rl_core.metrics import interference, masks, planted, skills, solved, stats, weights
from m2rl_core.metrics import planted_models as models
from m2rl_core.metrics.divergence import trajectory_kl
from m2rl_core.profile import load_profile
from m2rl_core.views import instruments, judging, neighbours

SIZE = (96, 96)
BOXES = ("scores", "weights", "neighbourhoods", "skills", "judging")


def torch_rng(seed):
    return torch.Generator().manual_seed(seed)


def nominal(hits, worlds, rate=0.95):
    """Within three standard errors of the rate."""
    return abs(hits / worlds - rate) <= 3 * sqrt(rate * (1 - rate) / worlds)


def many(worlds, n, k, level, gap, rng):
    """Worlds as pairs of models a0, b0, a1, ... on n items each, in one frame: one call resamples them all."""
    chances = {}
    for i in range(worlds):
        chances |= {f"{name}{i}": chance for name, chance in planted.difficulties(n, level, gap, rng).items()}
    return stats.measure(planted.rows(chances, k, rng), rng, resamples=1000)


# -- scores ----------------------------------------------------------------------------------------------------------

def test_paired_differences_are_recovered():
    """Faults: pairs torn apart (an interval that is too wide, for both models find the same items hard); half an interval."""
    worlds, rng = 400, np.random.default_rng(0)
    found = many(worlds, 40, 4, 0.4, 0.1, rng)
    hits = half = narrower = 0
    for i in range(worlds):
        e = found.contrast(stats.difference(f"a{i}", f"b{i}", ["b"]))
        hits += e.low <= 10 <= e.high
        half += abs(e.estimate - 10) <= (e.high - e.low) / 4
        a, b = (found.contrast({("b", f"{name}{i}"): 1.0}) for name in "ab")
        narrower += e.high - e.low < sqrt((a.high - a.low) ** 2 + (b.high - b.low) ** 2)
    assert nominal(hits, worlds) and narrower > 0.99 * worlds and half < 0.8 * worlds


def test_a_score_is_recovered_and_the_unclustered_interval_is_not_one():
    worlds, rng = 400, np.random.default_rng(1)
    found = many(worlds, 40, 8, 0.5, 0.0, rng)
    hits = naive = 0
    for i in range(worlds):
        e = found.contrast({("b", f"a{i}"): 1.0})
        hits += e.low <= 50 <= e.high
        naive += abs(e.estimate - 50) <= 196 * sqrt(0.25 / (40 * 8))
    assert nominal(hits, worlds) and naive < 0.8 * worlds


def test_worlds_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="level 0.95 with a gap of 0.1"):
        planted.difficulties(3, 0.95, 0.1, np.random.default_rng(0))


# -- weights ---------------------------------------------------------------------------------------------------------

def measured(made, seed=0, k=256):
    """The rows of one planted matrix, weights as stored."""
    base, a, b = (State({models.MATRIX.format("q"): tensor}) for tensor in made)
    found = weights.measure(base, {"a": a, "b": b}, k=k, seed=seed)
    return [frame[~frame["bf16"]].iloc[0] for frame in found]


def test_shared_masks_are_recovered():
    """Fault: the share of one mask, or of their intersection in all weights, for the overlap."""
    worlds, hits, wrong, truth = 60, 0, 0, models.shared_overlap(0.2, 0.15)
    for seed in range(worlds):
        line = measured(models.shared_mask(SIZE, 0.2, 0.15, torch_rng(seed)))[0]
        j, low, high, _ = instruments._overlap(line, 0.0, SIZE)
        hits += low <= truth <= high
        wrong += low <= 0.2 <= high or low <= line["share_a"] <= high
        assert j > line["jaccard_random"] + 0.2 and j > line["jaccard_null"] + 0.2
    assert hits >= 0.95 * worlds - 3 * sqrt(0.95 * 0.05 * worlds) and not wrong


def test_overlap_by_magnitude_alone_is_explained_by_the_right_null_only():
    """Fault: the null of masks that know nothing of |w|, which calls unrelated runs alike."""
    worlds, hits, wrong = 60, 0, 0
    for seed in range(worlds):
        line = measured(models.alike_by_magnitude(SIZE, 5e-4, torch_rng(seed)))[0]
        for null in ("jaccard_null", "jaccard_random"):
            _, low, high, _ = instruments._overlap(line, line[null], SIZE)
            hits += null == "jaccard_null" and low <= 0 <= high
            wrong += null == "jaccard_random" and low <= 0 <= high
    assert hits >= 0.95 * worlds - 3 * sqrt(0.95 * 0.05 * worlds) and not wrong


@pytest.mark.parametrize("rho", [-0.4, 0.0, 0.6])
def test_turned_shifts_are_recovered(rho):
    """Faults: the cosine of the weights for that of the shifts; a band that forgets how many values are projected on."""
    worlds, hits, wrong = 60, 0, 0
    for seed in range(worlds):
        base, a, b = models.turned(SIZE, rho, torch_rng(seed))
        line = measured((base, a, b), seed, k=64)[1]
        assert line["cosine"] == pytest.approx(rho, abs=2 / base.numel()) and line["n"] == base.numel()
        off = abs(line["cosine_projected"] - rho)
        hits += off <= 1.96 * line["projection_sd"]
        wrong += off <= 1.96 * (1 - rho**2) / sqrt(base.numel())
        assert masks.cosine(a, b) > 0.99
    assert hits >= 0.95 * worlds - 3 * sqrt(0.95 * 0.05 * worlds) and wrong < worlds / 2


def test_planted_gradients():
    for rho in (-1.0, -0.2, 0.0, 0.7):
        found = interference.cosines(models.gradients(500, rho, torch_rng(0)), 1)
        assert found["cosine"].tolist() == pytest.approx([rho] * 2) and found["norm_b"].tolist() == pytest.approx([7] * 2)


# -- divergence ------------------------------------------------------------------------------------------------------

def test_chain_kl_is_that_of_all_responses():
    """Fault: the closed form itself. Every response of three tokens is spelled out; and the planted Qwen3 says the same."""
    p, q = models.transitions(3, torch_rng(0)), models.transitions(3, torch_rng(1))
    total = 0.0
    for path in itertools.product(range(3), repeat=4):
        logs = [sum(float(t.double().log_softmax(-1)[a, b]) for a, b in itertools.pairwise(path)) for t in (p, q)]
        total += np.exp(logs[0]) / 3 * (logs[0] - logs[1])
    assert models.chain_kl(p, q, 3) == pytest.approx(total) and models.chain_kl(p, p, 3) == 0
    walk = models.walks(p, [0], 1, 5, torch_rng(2))
    path = walk[0].prompt + walk[0].tokens
    gap = sum(float(p.log_softmax(-1)[a, b] - q.log_softmax(-1)[a, b]) for a, b in itertools.pairwise(path))
    assert trajectory_kl(models.chain(p), {"q": models.chain(q)}, walk, 1.0)[0]["kl_seq"] == pytest.approx(gap, abs=1e-4)


def test_divergences_are_recovered_from_the_experts_responses():
    """Faults: responses of the other policy (another direction, another number), a mean for a sum over tokens."""
    worlds, prompts, samples, length = 60, 40, 4, 6
    hits = {"kl_exact": 0, "kl_token": 0, "from the other policy": 0, "a token": 0}
    for seed in range(worlds):
        g, rng = torch_rng(seed), np.random.default_rng(seed)
        p = models.transitions(5, g)
        q = models.transitions(5, g, p, by=0.9)
        starts, truth = torch.randint(5, (prompts,), generator=g).tolist(), models.chain_kl(p, q, length)
        for drawn_from, columns in ((p, ("kl_exact", "kl_token")), (q, ("kl_token",))):
            walks = models.walks(drawn_from, starts, samples, length, g)
            found = pd.DataFrame(trajectory_kl(models.chain(p), {"q": models.chain(q)}, walks, 1.0))
            assert np.allclose(found["kl_seq"], found["kl_token"] * length, atol=1e-5)
            found = found.assign(model="m", benchmark="b", item=found["rollout"] // samples, sample=found["rollout"] % samples)
            for column in columns:
                score = found[column] * found["tokens"]
                e = stats.measure(found.assign(score=score), rng, scale=1.0, resamples=400).contrast({("b", "m"): 1.0})
                hits[column if drawn_from is p else "from the other policy"] += e.low <= truth <= e.high
                hits["a token"] += drawn_from is p and e.low / length <= truth <= e.high / length
    for column in ("kl_exact", "kl_token"):
        assert hits[column] >= 0.95 * worlds - 3 * sqrt(0.95 * 0.05 * worlds), hits
    assert hits["from the other policy"] < worlds / 10 and hits["a token"] < worlds / 10, hits


def test_planted_neighbours_are_recovered():
    """Faults: prompts and experts exchanged, which turns one-way neighbours round; neighbours where there are none."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        for pairs in (instruments.PAIRS, set()):
            kl = planted.divergences(pairs, DOMAINS, "p", 24, 4, rng)
            table = neighbours.divergences(Evidence(kl=kl, resamples=50), ["p"])
            found, turned = neighbours.neighbours(table, "p"), neighbours.neighbours(
                table.rename(columns={"data": "expert", "expert": "data"}), "p")
            near, wrong = ({(r.domain, r.expert) for r in f.itertuples() if r.near} for f in (found, turned))
            assert near == pairs and (wrong != pairs or not pairs)
            assert int((found["near"] & ~found["mutual"]).sum()) == (1 if pairs else 0)


# -- skills ----------------------------------------------------------------------------------------------------------

def test_certain_gains_are_recovered():
    """Faults: the cosine of accuracies instead of gains; a chance or a ceiling of other items; solvers exchanged."""
    worlds, hits, wrong, truth = 100, 0, 0, planted.gain_cosine(instruments.KINDS)
    for seed in range(worlds):
        rng = np.random.default_rng(seed)
        chances, kind = planted.gains(80, instruments.KINDS, rng)
        frame = planted.rows(chances, 2, rng)
        line = skills.consistency(frame, ["model"], ["b"], rng, resamples=400).iloc[0]
        hits += line["low"] <= truth <= line["high"]
        shares = np.bincount(kind, minlength=4) / 80
        assert line["cosine"] == pytest.approx(planted.gain_cosine(shares)) and line["ceiling"] == pytest.approx(1)
        assert line["chance"] == pytest.approx(planted.gain_chance(shares))
        who = solved.apart(frame, "b", "model")["who"].value_counts()
        assert [who["model only"], who["experts only"]] == [(kind == 1).sum(), (kind == 2).sum()]
        wrong += line["low"] <= planted.gain_chance(instruments.KINDS) <= line["high"]
    assert hits >= 0.95 * worlds - 3 * sqrt(0.95 * 0.05 * worlds), hits
    assert wrong < worlds / 10


def test_noisy_gains_are_not_recovered():
    """What the box of section 3.5 warns of: with four samples of uncertain items, equal gains have a cosine far below
    one, and gains on wholly different items one above chance, for all subtract the same samples of SFT."""
    cosines = {}
    for shares in (instruments.SAME, instruments.OTHER):
        lines = []
        for seed in range(10):
            rng = np.random.default_rng(seed)
            frame = planted.rows(planted.gains(80, shares, rng, before=0.3, after=0.7)[0], 4, rng)
            lines.append(skills.consistency(frame, ["model"], ["b"], rng, resamples=200).iloc[0])
        cosines[shares] = pd.DataFrame(lines)
    same, other = cosines[instruments.SAME], cosines[instruments.OTHER]
    assert (same["high"] < planted.gain_cosine(instruments.SAME) - 0.1).all()
    assert (other["low"] > planted.gain_cosine(instruments.OTHER) + 0.3).all()
    assert (other["cosine"] > other["chance"]).all()


# -- judges ----------------------------------------------------------------------------------------------------------

def test_judges_are_recovered():
    """Faults: accuracy for balanced accuracy, which calls a judge without skill a good one; samples taken as items."""
    worlds, hits, yes, wrong = 100, {"accuracy": 0, "balanced": 0}, 0, 0
    for seed in range(worlds):
        rng = np.random.default_rng(seed)
        rows = planted.judged(80, 4, 0.7, 0.9, 0.6, rng)
        e = Evidence(judged=rows, resamples=400).contrast({("b", "sft/outcome"): 1.0}, of="judged")
        hits["accuracy"] += e.low <= 81 <= e.high
        wrong += e.low <= 75 <= e.high
        value, low, high = instruments._balanced(rows, rng)
        hits["balanced"] += low <= 75 <= high
        assert low < value < high
        rows = planted.judged(80, 4, 0.7, 1.0, 0.0, rng)
        line = judging.quality(rows, Evidence(judged=rows, resamples=100)).iloc[0]
        yes += line["balanced"] == 50 and line["accuracy"] > 52
    for name, count in hits.items():
        assert count >= 0.95 * worlds - 3 * sqrt(0.95 * 0.05 * worlds), name
    assert yes == worlds and wrong < worlds / 2


# -- the boxes -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run():
    return SimpleNamespace(profile=load_profile("tiny"))


MISSED = {"weights": ["small |w| alone: overlap beyond random masks"], "skills": [
    f"gains through 4 noisy samples an item: cosine of {name}" for name in ("the same skills", "other skills",
                                                                            "other skills, less chance")]}


@pytest.mark.parametrize("name", BOXES)
def test_boxes_say_what_works(run, name):
    """Faults: a box that calls everything recovered, or that takes longer than its section."""
    start = time.process_time()
    first = getattr(instruments, name)(run)
    assert time.process_time() - start < 4
    shown = instruments.shown(first)
    assert shown.loc[shown["verdict"] == "missed", "measure"].tolist() == MISSED.get(name, [])
    said = instruments.sentence(first).data
    assert said.startswith(f"**{len(shown) - len(MISSED.get(name, []))} of {len(shown)} measures recover")
    assert all(measure in said for measure in MISSED.get(name, [])) and ("Missed" in said) == (name in MISSED)


def test_boxes_hang_on_the_seed_alone(run):
    first, same = (instruments.judging(run) for _ in range(2))
    other = instruments.judging(SimpleNamespace(profile=dataclasses.replace(run.profile, seed=2)))
    assert first.equals(same) and not first.equals(other)


def test_a_broken_instrument_is_called_so(run, monkeypatch):
    """Fault: verdicts that no fault of an instrument can reach. Accuracy is passed off as balanced accuracy."""
    real = judging.quality
    monkeypatch.setattr(judging, "quality", lambda *given: (f := real(*given)).assign(
        balanced=f["accuracy"], low=f["accuracy"] - 9, high=f["accuracy"] + 9))
    shown = instruments.shown(instruments.judging(run)).set_index("measure")["verdict"]
    assert shown["balanced accuracy of a judge that always says yes"] == "missed"
    assert shown["accuracy (percent)"] == "recovered"


def test_how_many_worlds_are_enough():
    """By hand: of 20 sound intervals 14 or fewer hold with chance 0.0003, 15 or fewer with 0.0026; exact means always."""
    def part(held, exact=False):
        low = [0.0] * held + [1.5] * (20 - held)
        return pd.DataFrame({"planted": 1.0, "recovered": 1.0, "low": low, "high": 2.0, "exact": exact})
    assert instruments.works(part(15)) and not instruments.works(part(14))
    assert instruments.works(part(20, True)) and not instruments.works(part(19, True))
    undefined = part(20).assign(low=float("nan"))
    assert not instruments.works(undefined)
