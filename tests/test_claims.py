"""Each rule on evidence made to support it, to contradict it and to leave it open; and the list of claims itself."""
import json

import numpy as np
import pandas as pd
import pytest

from m2rl_core import claims, paper
from m2rl_core.claims import Evidence, evidence as lines, judging, mechanisms, scores
from m2rl_core.claims.evidence import EXPERT, JUDGED, OWN
from m2rl_core.domains import BENCHMARKS, DOMAINS
from m2rl_core.metrics.stats import Estimate

MODELS = ("sft", *EXPERT.values(), "rl-multi", *scores.MERGES, "mt-opd")


def world(levels=None, n=200, noise=0.0, models=MODELS):
    """Scores rows, K = 1: `levels` maps (model, benchmark), (model, domain) or model to an accuracy; 0.5 otherwise.

    Without noise, item i is solved exactly where i / n < accuracy, so paired differences have no extra spread.
    """
    rng, levels, out = np.random.default_rng(0), levels or {}, []
    for model in models:
        for benchmark, domain in BENCHMARKS.items():
            level = levels.get((model, benchmark), levels.get((model, domain), levels.get(model, 0.5)))
            place = (np.arange(n) + 0.5) / n + rng.normal(0, noise, n) if noise else (np.arange(n) + 0.5) / n
            out.append(pd.DataFrame({
                "model": model, "benchmark": benchmark, "category": "", "sample": 0,
                "item": [f"{benchmark}/{i}" for i in range(n)], "score": (place < level).astype(float)}))
    return pd.concat(out, ignore_index=True)


def evidence(*args, **settings):
    return Evidence(scores=world(*args, **settings), resamples=500)


# -- from intervals to verdicts

@pytest.mark.parametrize(("low", "high", "above", "within"), [
    (1, 1.5, "supported", "supported"), (-5, -3, "contradicted", "contradicted"), (-1, 1, "undecided", "supported"),
    (3, 5, "supported", "contradicted"), (-5, 1, "undecided", "undecided"), (-1, 9, "undecided", "undecided"),
])
def test_lines(low, high, above, within):
    e = Estimate((low + high) / 2, low, high, 50, (high - low) / 4)
    assert lines.above(e).verdict == above and lines.within(e, 2).verdict == within
    assert lines.below(e).verdict == {"supported": "contradicted", "contradicted": "supported"}.get(above, above)


def test_undecided_says_what_would_tell():
    assert "about 197 items would tell" in lines.above(Estimate(10, -4, 24, 40, 50 / 40**0.5)).note


def test_every_part_must_hold():
    good, bad, open_ = (lines.Verdict(v, 1, 0, 2, 9) for v in ("supported", "contradicted", "undecided"))
    assert lines.every({"a": good, "b": good}).verdict == "supported"
    assert lines.every({"a": good, "b": open_}).verdict == "undecided"
    assert lines.every({"a": open_, "b": bad, "c": good}).verdict == "contradicted"
    assert "shown: b" in lines.every({"a": open_, "b": bad}).note


def test_parts_share_the_error():
    rows = world({"rl-math": 0.6}, noise=0.3)
    one, twenty = (Evidence(scores=rows).contrast({("aime24", "rl-math"): 1.0}, parts) for parts in (1, 20))
    assert twenty.high - twenty.low > 1.3 * (one.high - one.low)


# -- scores

def test_no_harm():
    assert scores.no_harm(evidence({})).verdict == "undecided"  # alike on 200 items is not yet alike within 2 points
    assert scores.no_harm(evidence({m: 0.55 for m in EXPERT.values()})).verdict == "supported"
    harmed = scores.no_harm(evidence({("rl-if", "math"): 0.3, **{m: 0.55 for m in EXPERT.values()}}))
    assert harmed.verdict == "contradicted" and "rl-if - sft on aime24 + aime25" in harmed.note
    assert harmed.estimate == pytest.approx(-20)
    assert scores.no_harm(evidence(n=10, noise=0.5)).verdict == "undecided"


def test_lifts_and_unmoved():
    up = evidence({(EXPERT[a], b): 0.7 for a in DOMAINS for b in DOMAINS})
    assert scores.lifts(up, ["math"], ["coding", "science"]).verdict == "supported"
    assert scores.unmoved(up, ["math"], "agent").verdict == "contradicted"
    down = evidence({"rl-math": 0.3})
    assert scores.lifts(down, ["math"], ["coding"]).verdict == "contradicted"
    still = evidence({("rl-math", "agent"): 0.505, ("rl-if", "agent"): 0.495}, n=400)
    assert scores.unmoved(still, ["math", "if"], "agent").verdict == "supported"


def test_best_at_home():
    home = {(EXPERT[d], d): 0.8 for d in DOMAINS}
    assert scores.best_at_home(evidence(home), list(DOMAINS)).verdict == "supported"
    assert scores.best_at_home(evidence({**home, ("rl-agent", "math"): 0.9}), ["math"]).verdict == "contradicted"


def test_as_good_as_merging_takes_the_best_merge():
    base = {"merge-sce": 0.7, "rl-multi": 0.705}
    same = scores.as_good_as_merging(evidence(base), "rl-multi")
    assert same.verdict == "supported" and "against merge-sce" in same.note
    assert scores.as_good_as_merging(evidence({**base, "rl-multi": 0.5}), "rl-multi").verdict == "contradicted"
    assert scores.as_good_as_merging(evidence(base, n=12, noise=0.5), "rl-multi").verdict == "undecided"


def test_ranked_and_seesaw():
    best = evidence({"merge-ties": 0.7, "merge-average": 0.3})
    assert scores.ranked(best, "merge-ties").verdict == "supported"
    assert scores.ranked(best, "merge-average", last=True).verdict == "supported"
    assert scores.ranked(best, "merge-average").verdict == "contradicted"
    assert scores.seesaw(best).verdict == "contradicted"
    mixed = {(m, b): 0.8 for m, b in zip(scores.MERGES, BENCHMARKS, strict=False)}
    assert scores.seesaw(evidence(mixed)).verdict == "supported"


def test_beside_own_experts_weighs_benchmarks_alike():
    levels = {(EXPERT[d], d): 0.7 for d in DOMAINS} | {"merge-ties": 0.7, ("merge-ties", "agent"): 0.25}
    found = scores.beside_own_experts(evidence(levels), "merge-ties", margin=-2)
    assert found.estimate == pytest.approx(-45 / 9) and found.verdict == "contradicted"


def test_cheaper():
    costs = pd.DataFrame({"model": [*EXPERT.values(), "rl-multi"], "hours": [1, 1, 1, 1, 1, 3.0]})
    found = scores.cheaper(Evidence(costs=costs), "rl-multi", 80)
    assert (found.verdict, found.estimate) == ("supported", 60)
    both = costs.assign(cpu_hours=[1, 1, 1, 1, 1, 4.5])  # the clock says 60 %, the processors 90 %
    assert scores.cheaper(Evidence(costs=both), "rl-multi", 80).verdict == "undecided"
    costs.loc[5, "hours"] = 6
    assert scores.cheaper(Evidence(costs=costs), "rl-multi", 80).verdict == "contradicted"
    with pytest.raises(claims.Missing, match="rl-agent"):
        scores.cheaper(Evidence(costs=costs[costs["model"] != "rl-agent"]), "rl-multi", 80)


def test_steady():
    def along(late):
        parts = [world({m: 0.5 if step == 0 else late for m in MODELS}).assign(step=step) for step in (0, 10, 20, 30)]
        return Evidence(along=pd.concat(parts), resamples=500)
    assert scores.steady(along(0.7)).verdict == "supported"
    assert scores.steady(along(0.4)).verdict == "contradicted"


# -- weights, policies, skills

def weights(shift=0.2, share=0.3, cosine=0.1, inner=0.1):
    pairs = [(a, b) for i, a in enumerate(DOMAINS) for b in DOMAINS[i + 1:]]
    rows = [{"layer": layer, "matrix": m, "a": a, "b": b, "bf16": bf16, "jaccard_random": 0.18, "jaccard": 0.18 + shift,
             "jaccard_null": 0.3, "share_a": share, "share_b": share,
             "cosine_projected": cosine + inner * (a in lines.REASONING and b in lines.REASONING) + 0.001 * layer}
            for layer in range(4) for m in "qkvo" for a, b in pairs for bf16 in (False, True)]
    frame = pd.DataFrame(rows)
    return Evidence(jaccard=frame, cosine=frame, resamples=500)


def test_weight_claims():
    assert mechanisms.overlap_above_chance(weights()).verdict == "supported"
    assert mechanisms.overlap_above_chance(weights()).n == 4 * 4 * 10  # weights as stored only
    assert mechanisms.overlap_above_chance(weights(shift=-0.1)).verdict == "contradicted"
    assert mechanisms.changed_share(weights(), 20, 40).verdict == "supported"
    assert mechanisms.changed_share(weights(share=0.9), 20, 40).verdict == "contradicted"
    assert mechanisms.directions_agree(weights()).verdict == "supported"
    assert mechanisms.directions_agree(weights(cosine=-0.3)).verdict == "contradicted"
    rng = np.random.default_rng(0)
    noisy = weights()
    noisy.cosine = noisy.cosine.assign(cosine_projected=rng.normal(0.05, 0.3, len(noisy.cosine)))
    assert mechanisms.directions_agree(noisy).verdict == "undecided"


def test_reasoning_closer():
    found = weights()
    found.cosine["cosine_projected"] += np.random.default_rng(0).normal(0, 0.01, len(found.cosine))
    assert mechanisms.reasoning_closer(found).verdict == "supported"
    found.cosine["cosine_projected"] *= -1
    assert mechanisms.reasoning_closer(found).verdict == "contradicted"


def divergences(level):
    """kl rows; `level(domain, expert domain)` is the divergence in nats of 10-token trajectories."""
    rng = np.random.default_rng(0)
    return pd.DataFrame([
        {"policy": policy, "expert": EXPERT[e], "domain": d, "prompt": p, "sample": 0, "tokens": 10,
         "kl_exact": (level(d, e) + rng.normal(0, 0.01)) / 10}
        for policy in ("sft", "rl-multi", "merge-ties") for d in DOMAINS for e in DOMAINS for p in range(30)])


def test_neighbourhoods():
    near = {("math", "coding")}
    kl = divergences(lambda d, e: 0.1 if d == e else 0.12 if (d, e) in near else 1.0)
    found = Evidence(kl=kl, resamples=500)
    assert mechanisms.nearest(found, "math", "rl-math", "rl-multi").verdict == "supported"
    assert mechanisms.nearest(found, "math", "rl-coding", "rl-multi").verdict == "contradicted"
    asymmetric = mechanisms.asymmetric(found, "merge-ties")
    assert asymmetric.verdict == "supported" and asymmetric.note == "coding is near math, not the reverse"
    assert mechanisms.asymmetric(Evidence(kl=divergences(lambda d, e: 0.1)), "merge-ties").verdict == "contradicted"
    far = Evidence(kl=divergences(lambda d, e: 0.1 if d == e else 1.0))
    assert mechanisms.asymmetric(far, "merge-ties").verdict == "undecided"


def test_neighbours_are_found_before_merges_are_compared():
    kl = divergences(lambda d, e: 0.1 if d == e else 0.12 if (d, e) in {("math", "if"), ("coding", "agent")} else 1.0)
    pairs = [f"pair-{a}-{b}" for i, a in enumerate(DOMAINS) for b in DOMAINS[i + 1:]]
    levels = {"pair-math-if": 0.7, "pair-coding-agent": 0.7}
    rows = world(levels, models=(*EXPERT.values(), *pairs))
    found = Evidence(scores=rows, kl=kl, resamples=500)
    assert mechanisms.neighbour_helps(found, ["math", "coding"]).verdict == "supported"
    assert mechanisms.neighbour_beats_others(found, ["math", "coding"]).estimate == pytest.approx(20)
    other = Evidence(scores=rows, kl=divergences(lambda d, e: 0.1 if d == e else 0.12 if e == "science" else 1.0))
    assert mechanisms.neighbour_beats_others(other, ["math", "coding"]).verdict == "contradicted"
    with pytest.raises(claims.Missing, match="no scores of pair-math"):
        mechanisms.neighbour_helps(Evidence(scores=world(), kl=kl), ["math"])


def test_kl_and_change():
    order = dict(zip(DOMAINS, (0.1, 0.3, 0.5, 0.7, 0.9), strict=True))
    kl = divergences(lambda d, e: order[d])
    linked = {(m, d): 0.9 - 0.5 * order[d] for m in ("rl-multi", "merge-ties") for d in DOMAINS}
    found = mechanisms.no_link(Evidence(scores=world(linked), kl=kl, resamples=500))
    assert found.verdict == "contradicted" and found.estimate < -0.9


def skilled(same):
    """Experts gain on the first items; merge-ties gains there too, rl-multi and mt-opd on others unless `same`."""
    out = []
    for model in MODELS:
        for benchmark in BENCHMARKS:
            i = np.arange(80)
            expert, other = (i < 20) | (i % 16 == 0), (i >= 60) | (i % 16 == 0)
            right = {"sft": i < 0, "merge-ties": expert, "rl-multi": expert if same else other,
                     "mt-opd": expert if same else other}.get(model, expert)
            for k in range(2):
                out.append(pd.DataFrame({"model": model, "benchmark": benchmark, "category": "", "sample": k,
                                         "item": i, "score": right.astype(float)}))
    return Evidence(scores=pd.concat(out), resamples=500)


def test_skills():
    trio = ["rl-multi", "merge-ties", "mt-opd"]
    assert mechanisms.more_consistent(skilled(False), "merge-ties", ["rl-multi", "mt-opd"]).verdict == "supported"
    assert mechanisms.more_consistent(skilled(False), "rl-multi", ["merge-ties"]).verdict == "contradicted"
    assert mechanisms.more_consistent(skilled(True), "merge-ties", ["rl-multi", "mt-opd"]).verdict == "undecided"
    assert mechanisms.gains_overlap(skilled(True), trio).verdict == "supported"
    assert mechanisms.gains_overlap(skilled(False), trio).verdict != "supported"


# -- judges

def judged(level, n=60, k=2, models=("sft", *EXPERT.values(), "merge-ties", "rl-multi", "mt-opd")):
    """Judge rows; `level(model, benchmark, mode)` is the share judged rightly."""
    return pd.DataFrame([
        {"model": m, "benchmark": b, "item": i, "sample": s, "mode": mode,
         "correct": int((i + 0.5) / n < level(m, b, mode))}
        for m in models for b in JUDGED for mode in ("outcome", "process") for i in range(n) for s in range(k)])


def test_judges():
    def level(m, b, mode):
        if mode == "outcome":
            return 0.5
        return {"rl-multi": 0.2, "rl-agent": 0.95}.get(m, 0.4 if b == "ifeval" else 0.75)
    found = Evidence(scores=world(), judged=judged(level), resamples=500)
    reasoning = ["aime24", "lcb_v5", "gpqa_diamond"]
    assert judging.process_better(found, reasoning, consistently=True).verdict == "contradicted"  # rl-multi
    assert judging.process_better(found, reasoning, consistently=False).verdict == "supported"
    assert judging.best_judge(found, "rl-agent", list(EXPERT.values()), "process").verdict == "supported"
    assert judging.best_judge(found, "rl-math", list(EXPERT.values()), "process").verdict == "contradicted"
    assert judging.judge_falls(found, "rl-multi", 10).verdict == "supported"
    assert judging.judge_falls(found, "rl-agent", 10).verdict == "contradicted"
    assert judging.judge_keeps(found, ["rl-multi"], 5).verdict == "contradicted"
    plain = Evidence(judged=judged(lambda m, b, mode: 0.5 if mode == "outcome" else 0.3), resamples=500)
    assert judging.outcome_better(plain, ["ifeval"]).verdict == "supported"
    assert judging.outcome_better(plain, ["ifeval"]).estimate == pytest.approx(20)
    small = Evidence(judged=judged(lambda m, b, mode: 0.5 if mode == "outcome" else 0.7, n=4), resamples=500)
    assert judging.judge_falls(small, "rl-multi", 10).verdict == "undecided"


def test_items_judged_in_one_mode_only_are_left_out():
    rows = judged(lambda m, b, mode: 0.5)
    rows = rows[~((rows["mode"] == "process") & (rows["item"] >= 30))]
    e = Evidence(judged=rows, resamples=100).contrast({("ifeval", "sft/outcome"): 1.0}, of="judged")
    assert e.estimate == 100 and e.n == 30  # the first 30 items are those judged rightly


def test_correlation_over_models():
    order = {m: i / 20 for i, m in enumerate(("sft", *EXPERT.values(), "merge-ties", "rl-multi", "mt-opd"))}
    rows = world({m: 0.4 + x for m, x in order.items()})
    up = Evidence(scores=rows, judged=judged(lambda m, b, mode: 0.3 + order[m]), resamples=200)
    assert judging.judge_correlation(up, "process", 1).verdict == "supported"
    assert judging.judge_correlation(up, "process", -1).verdict == "contradicted"
    mixed = {m: (i * 4 % 9) / 20 for i, m in enumerate(order)}
    found = judging.judge_correlation(
        Evidence(scores=rows, judged=judged(lambda m, b, mode: 0.3 + mixed[m]), resamples=200), "process", 1)
    assert found.verdict == "undecided" and "leaving one model out" in found.note and found.n == 9


# -- the list

def test_claims_are_well_formed():
    known = paper.claims()
    assert len({claim["id"] for claim in known}) == len(known) >= 25
    assert {claim["section"] for claim in known} == {"1", "3.2", "3.3", "3.4", "3.5", "3.6"}
    for claim in known:
        assert set(claim) == {"id", "section", "text", "printed", "rule", "test", "params"}, claim["id"]
        assert claim["test"] in claims.TESTS and claim["text"] and claim["rule"], claim["id"]
        assert claim["printed"] == "" or isinstance(claim["printed"], int | float), claim["id"]
    assert {claim["test"] for claim in known} == set(claims.TESTS)  # no rule without a claim


def test_nothing_is_decided_without_evidence():
    found = claims.decide(None, Evidence())
    assert len(found) == len(paper.claims()) and {line["run_verdict"] for line in found} == {"not run"}
    assert all(tuple(line) == claims.KEYS and line["note"] for line in found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    with pytest.raises(ValueError, match="3.2"):
        claims.decide("3.9", Evidence())


def test_paper_verdicts_are_computed_from_its_tables():
    found = {line["id"]: line["paper_verdict"] for line in claims.decide("4", Evidence())}
    assert found["mix-costs-less"] == found["merge-exceeds-experts"] == found["masks-overlap"] == "supported"
    assert found["process-consistently-better"] == "contradicted"  # 3 of 27 cells of Table 7
    assert found["ties-best-merge"] == found["process-opposes-generation"] == "undecided"
    assert found["directions-agree"] == found["math-most-consistent"] == "cannot be decided from printed numbers"
    assert set(found.values()) == {"supported", "contradicted", "undecided", "cannot be decided from printed numbers"}


def test_paper_estimates_by_hand():
    found = {line["id"]: line for line in claims.decide(None, Evidence())}
    assert found["mix-equals-merge"]["paper_estimate"] == pytest.approx(0.18)
    assert found["mix-costs-less"]["paper_estimate"] == pytest.approx(63.698, abs=1e-3)
    assert found["mix-process-collapse"]["paper_estimate"] == pytest.approx(-25.2)
    assert found["agent-best-process"]["paper_estimate"] == pytest.approx(7.875)  # against RL-Science
    neighbour = ((80.29 - 77.66 + 72.44 - 70.42) + (66.49 - 65 + 62.86 - 58.86)) / 4
    others = ((75.07 + 78.11 + 72.94) / 3 - 77.66 + (67.65 + 69.04 + 63.31) / 3 - 70.42
              + (60.42 + 63.84 + 59.30) / 3 - 65 + (57.17 + 60.00 + 59.43) / 3 - 58.86) / 4
    assert found["neighbour-beats-others"]["paper_estimate"] == pytest.approx(neighbour - others, abs=1e-4)


def test_whole_list_on_a_run():
    """Scores and costs are there, weights and judges are not: those are not run, the rest is decided."""
    costs = pd.DataFrame({"model": [*EXPERT.values(), "rl-multi"], "hours": [1, 1, 1, 1, 1, 3.0]})
    run = Evidence(scores=world(noise=0.2, n=40), costs=costs, resamples=500)
    found = {line["id"]: line for line in claims.decide(None, run)}
    assert found["mix-costs-less"]["run_verdict"] == "supported" and found["mix-costs-less"]["estimate"] == 60
    assert found["mix-equals-merge"]["run_verdict"] != "not run" and found["mix-equals-merge"]["n"] == 9 * 40
    assert found["as-good-as-official"]["run_verdict"] == "not run"
    assert found["as-good-as-official"]["note"] == "no scores of qwen3-4b-thinking on aime24"
    assert found["masks-overlap"]["run_verdict"] == found["agent-best-process"]["run_verdict"] == "not run"


def test_domains_own_their_benchmarks():
    assert sum(map(len, OWN.values())) == 9 and OWN["agent"] == ["bfcl_v3"]
