"""Neighbours under resampling, the test over all pairs and merges of subsets, against numbers worked out by hand."""
from __future__ import annotations

from itertools import combinations, permutations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from m2rl_core.claims.evidence import EXPERT, OWN, Evidence
from m2rl_core.domains import BENCHMARKS, DOMAINS
from m2rl_core.metrics import nearness, stats
from m2rl_core.views import divergences, neighbours, partners


def trajectories(kl, prompts=6, spread=0.0, policies=neighbours.POLICIES):
    """KL rows whose mean over prompts is kl(data, expert); `spread` moves the prompts up and down by turns."""
    return pd.DataFrame([
        {"policy": p, "expert": EXPERT[e], "domain": d, "prompt": i, "sample": s, "tokens": 10,
         "kl_exact": (kl(d, e) + spread * (-1) ** i) / 10, "kl_seq": kl(d, e) + spread * (-1) ** i + (-1) ** s,
         "kl_token": (kl(d, e) + spread * (-1) ** i + (-1) ** s) / 10}
        for p in policies for d in DOMAINS for e in DOMAINS for i in range(prompts) for s in range(2)])


def evaluated(score, models, n=6, k=2):
    """Rows of `models`; score(model, domain, item) in [0, 1]."""
    return pd.DataFrame([
        {"model": m, "benchmark": b, "category": "", "item": f"{b}/{i}", "sample": s, "score": score(m, d, i)}
        for m in models for b, d in BENCHMARKS.items() if d in m or m.startswith("merge") for i in range(n)
        for s in range(k)])


GROUPS = [group for size in range(1, 6) for group in combinations(DOMAINS, size)]
NAMES = {partners.merged(group): group for group in GROUPS}


def test_a_contrast_is_drawn_around_its_estimate():
    """Fault: draws of one column that belong to another, or that are not centred on the score."""
    rows = evaluated(lambda m, d, i: i / 5 if m == "rl-math" else 0.5, ["rl-math", "merge-ties"])
    found = stats.measure(rows, np.random.default_rng(0), resamples=3000)
    drawn = found.drawn({("aime24", "rl-math"): 1.0})
    e = found.contrast({("aime24", "rl-math"): 1.0})
    assert drawn.shape == (3000,) and drawn.mean() == pytest.approx(e.estimate, abs=1.5)
    assert drawn.std() == pytest.approx(e.se, rel=0.1)
    assert (found.drawn({("aime24", "merge-ties"): 1.0}) == 50).all()
    with pytest.raises(KeyError, match="ghost"):
        found.drawn({("aime24", "ghost"): 1.0})


def test_eq1_on_arrays_agrees_with_the_frame():
    """Fault: the two indices swapped, or a domain that is its own neighbour."""
    kl = np.random.default_rng(1).uniform(0.5, 2, (5, 5))
    frame = pd.DataFrame([{"policy": "merge-ties", "data": a, "expert": b, "kl": kl[i, j]}
                          for i, a in enumerate(DOMAINS) for j, b in enumerate(DOMAINS)])
    named = neighbours.neighbours(frame, "merge-ties")
    mine = nearness.near(kl, neighbours.FACTOR)
    assert [mine[DOMAINS.index(r.domain), DOMAINS.index(r.expert)] for r in named.itertuples()] == list(named["near"])
    assert mine.sum() == named["near"].sum() > 0
    for i, a in enumerate(DOMAINS):
        part = named[named["domain"] == a]
        assert DOMAINS[nearness.nearest(kl)[i]] == part.loc[part["kl"].idxmin(), "expert"]


def test_agreement_by_hand():
    """Nearest helps most, and so on down: 6 of 6; turned around -6; one swap of neighbours costs 2."""
    kl = np.array([[1.0, 2, 3, 4]])
    assert nearness.agreement(kl, np.array([[4.0, 3, 2, 1]])) == 6
    assert nearness.agreement(kl, np.array([[1.0, 2, 3, 4]])) == -6
    assert nearness.agreement(kl, np.array([[3.0, 4, 2, 1]])) == 4
    assert nearness.agreement(kl, np.zeros((1, 4))) == 0


def test_chance_is_every_order_of_every_domain():
    """Fault: partners that change places between domains, and a fold that loses orders: enumerated for two domains."""
    rng = np.random.default_rng(2)
    kl, change = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))
    orders = [change[0, list(p)] for p in permutations(range(3))], [change[1, list(p)] for p in permutations(range(3))]
    every = [int(nearness.agreement(kl, np.stack([x, y]))) for x in orders[0] for y in orders[1]]
    found = nearness.chance(kl, change)
    assert sum(found.values()) == pytest.approx(1)
    for count, share in found.items():
        assert share == pytest.approx(every.count(count) / 36)
    assert nearness.p_value(6, found) == pytest.approx(2 / 36) and nearness.p_value(0, found) == 1


def test_the_test_over_all_pairs_finds_a_planted_link_and_none_in_noise():
    """Nearness decides the planted changes: tau 1, p = 2 / 24^5; with one constant change there is nothing to rank."""
    place = {(d, e): 1 + abs(DOMAINS.index(d) - DOMAINS.index(e)) + 0.1 * DOMAINS.index(e) for d in DOMAINS for e in DOMAINS}
    models = [*EXPERT.values(), *(m for m, group in NAMES.items() if len(group) == 2)]

    def planted(model, domain, item):
        group = NAMES[model]
        return 0.5 if len(group) == 1 else 1 - place[domain, (set(group) - {domain}).pop()] / 10

    rows = trajectories(lambda d, e: place[d, e])
    evidence = Evidence(scores=evaluated(planted, models), kl=rows, resamples=100)
    two = neighbours.pairs(evidence, neighbours.divergences(evidence))
    found = partners.test(two, evidence)
    assert found["tau"] == found["low"] == 1 and found["p"] == pytest.approx(2 / 24**5) and found["n"] == 20
    assert found["comparisons"] == 30 and "more**" in partners.sentence(two, evidence).data
    flat = Evidence(scores=evaluated(lambda m, d, i: 0.5, models), kl=rows, resamples=100)
    two = neighbours.pairs(flat, neighbours.divergences(flat))
    assert partners.test(two, flat)["p"] == pytest.approx(1) and "undecided" in partners.sentence(two, flat).data
    assert partners.OFF in partners.sentence(two.iloc[:0], flat).data
    assert partners.OFF in str(partners.all_pairs(two.iloc[:0]).to_dict())


def test_neighbours_minus_strangers_by_hand():
    """Only math has both: its neighbour coding +40 points, the three strangers -10: a gap of 50; swapped it is -50."""
    models = [*EXPERT.values(), *(m for m, group in NAMES.items() if len(group) == 2)]
    scores = evaluated(lambda m, d, i: 0.5 if m in EXPERT.values() else 0.9 if m == "pair-math-coding" else 0.4, models)
    kl = trajectories(lambda d, e: 1.0 if d == e else 1.2 if (d, e) == ("math", "coding") else 9.0)
    evidence = Evidence(scores=scores, kl=kl, resamples=50)
    two = neighbours.pairs(evidence, neighbours.divergences(evidence))
    found = partners.test(two, evidence)
    assert found["domains"] == ["math"] and found["gap"] == pytest.approx(50)
    other = partners.test(two.assign(near=(two["domain"] == "math") & (two["partner"] != "coding")), evidence)
    assert other["gap"] == pytest.approx(-50)


def test_steadiness_tells_the_sure_from_the_toss_up():
    """An expert far below the line is a neighbour always; one that sits on the line about every other time."""
    far = {("math", "coding"): 1.0, ("math", "if"): 1.5}
    rows = trajectories(lambda d, e: far.get((d, e), 1.0 if d == e else 4.0), prompts=8)
    moved = rows["domain"].eq("math") & rows["expert"].eq("rl-if")
    rows.loc[moved, "kl_exact"] += 0.03 * (-1.0) ** rows.loc[moved, "prompt"]
    found = neighbours.steadiness(Evidence(kl=rows, resamples=2000)).set_index(["domain", "expert"])
    assert found.loc[("math", "coding"), ["share", "one_way", "first"]].tolist() == [1, 1, 1]
    assert 0.25 < found.loc[("math", "if"), "share"] < 0.75 and found.loc[("math", "if"), "first"] == 0
    assert found.drop(index=[("math", "coding"), ("math", "if")])["share"].max() == 0
    said = neighbours.steadiness_sentence(found.reset_index()).data
    assert "19 of 20 ordered pairs" in said and "open: IF near Math" in said and "Coding near Math 100%" in said


def test_a_single_prompt_is_said_and_not_drawn():
    """Fault: a share of 0 or 1, which would read as certainty, where nothing can be resampled."""
    evidence = Evidence(kl=trajectories(lambda d, e: 1.0, prompts=1), resamples=20)
    found = neighbours.steadiness(evidence)
    assert found["share"].isna().all() and "single prompt" in neighbours.steadiness_sentence(found).data
    assert "single prompt" in str(neighbours.steadiness_picture(found).to_dict())
    assert "Too few prompts" in divergences.sentence(divergences.readings(evidence)).data


def test_four_readings_by_hand():
    """2 nats over 10 tokens: 2 by the response and 0.2 by the token, sampled or exact; fault: units mixed up."""
    found = divergences.readings(Evidence(kl=trajectories(lambda d, e: 2.0, spread=0.5), resamples=200))
    assert len(found) == 3 * 25
    for name, value in zip(divergences.READINGS, (2, 2, 0.2, 0.2), strict=True):
        assert found[name].tolist() == pytest.approx([value] * 75)
    assert (found["sampled_response_se"] / found["exact_response_se"]).tolist() == pytest.approx([1] * 75)
    assert "**1.00** times" in divergences.sentence(found).data and len(divergences.shown(found)) == 15


# -- subsets ---------------------------------------------------------------------------------------------------------

WORTH = {"math": 0.02, "coding": -0.03, "science": 0.0, "if": 0.01, "agent": -0.05}


def worlds():
    """Every merge scores 0.5 plus what each partner is worth, whoever else is in it."""
    def score(model, domain, item):
        group = NAMES[model] if model in NAMES else DOMAINS
        return 0.5 + sum(WORTH[d] for d in group if d != domain) + 0.01 * item
    small = [m for m, group in NAMES.items() if len(group) in (1, 2, 5)]
    some = [m for m, group in NAMES.items() if len(group) in (3, 4)]
    return evaluated(score, some, n=3, k=1), evaluated(score, small, n=5, k=4)


def test_effects_of_partners_are_the_planted_ones_and_add_up():
    """Faults: a merge looked up under another's name, weights that do not cancel, a score of other items."""
    subsets, scores = worlds()
    found = stats.measure(partners.together(subsets, scores), np.random.default_rng(0), resamples=50)
    added = partners.effects(found).set_index(["domain", "partner"])
    for (domain, partner), r in added.iterrows():
        assert r["change"] == pytest.approx(100 * WORTH[partner]), (domain, partner)
    for domain in DOMAINS:
        whole = found.contrast(stats.difference("merge-ties", EXPERT[domain], OWN[domain])).estimate
        assert added.loc[domain, "change"].sum() == pytest.approx(whole)
    grown = partners.growth(found).set_index(["model", "step"])
    assert grown.loc[("rl-math", 1), "value"] == pytest.approx(51)  # the first three items: 0.50, 0.51, 0.52
    assert grown["low"].min() >= 0 and grown["high"].max() <= 100
    assert grown.loc[("rl-math", 5), "change"] == pytest.approx(-7)
    assert grown.loc[("all five", 3), "change"] == pytest.approx(100 * 2 * sum(WORTH.values()) / 5)  # two partners


def test_rows_that_do_not_fit_are_refused_with_both_names():
    """Fault: merges compared on other items, or on other numbers of samples, without a word."""
    subsets, scores = worlds()
    together = partners.together(subsets, scores)
    assert together.groupby(["model", "benchmark"]).size().nunique() == 1  # the same items, one sample each
    short = scores[~((scores["model"] == "rl-if") & (scores["item"] == "ifeval/1"))]
    with pytest.raises(ValueError, match=r"ifeval: rl-if has 2 of the 3 .* ties-math-coding-science has; evaluate both"):
        partners.together(subsets, short)


def test_a_profile_without_pairs_says_so():
    assert partners.measured(SimpleNamespace(stages={}), Evidence()) is None
    grown, added = partners.growth(None), partners.effects(None)
    assert grown.empty and added.empty and partners.OFF in partners.growth_sentence(grown, added, grown).data
    for picture in (partners.growth_picture(grown), partners.effects_picture(added)):
        assert partners.OFF in str(picture.to_dict())


def test_another_k_is_refused_with_both_names():
    """Fault: a model with fewer samples beside the others, without a word."""
    rows = evaluated(lambda m, d, i: 0.5, ["merge-ties", "merge-ta"])
    with pytest.raises(ValueError, match=r"aime24: merge-ta and merge-ties have different K \(2 and 1 samples of"):
        stats.measure(rows[(rows["model"] != "merge-ties") | (rows["sample"] == 0)], np.random.default_rng(0), resamples=5)
