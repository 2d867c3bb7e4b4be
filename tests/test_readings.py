"""The main claims under other readings: a planted flip is shown as one, a reading that changes nothing as such."""
import json

import numpy as np
import pandas as pd
import pytest
from test_claims import divergences, judged, weights, world

from m2rl_core import paper
from m2rl_core.claims import Evidence, readings
from m2rl_core.claims.evidence import EXPERT, MERGES
from m2rl_core.claims.readings import Reading
from m2rl_core.domains import DOMAINS
from m2rl_core.pictures import drawing
from m2rl_core.views import readings as views

PAIRS = [f"pair-{a}-{b}" for i, a in enumerate(DOMAINS) for b in DOMAINS[i + 1:]]


def verdicts(found, group):
    """{(claim, reading): (verdict, flips)} of one group."""
    part = found[found["group"] == group]
    return {(r.id, r.reading): (r.verdict, r.flips) for r in part.itertuples()}


def sampled(levels, k, n=60, models=("sft", *EXPERT.values(), "rl-multi", *MERGES, "mt-opd")):
    """`world` with `k` samples an item; `levels[s]` are those of sample s (of the last one given, from there on)."""
    return pd.concat([world(levels[min(s, len(levels) - 1)], n=n, models=models).assign(sample=s) for s in range(k)])


def test_the_planted_eta_flips_and_the_others_do_not():
    """Masks overlap as stored and at eta 0.01, not at 0.0001 and not in bfloat16."""
    found = weights()
    low = found.jaccard["bf16"]
    masks = found.jaccard.assign(eta=0.001, jaccard=found.jaccard["jaccard"].where(~low, 0.1))
    etas = [pd.concat([frame.assign(eta=0.01), (frame.assign(jaccard=0.1) if i == 0 else frame).assign(eta=0.0001)])
            for i, frame in enumerate((found.jaccard, found.cosine))]
    decided = readings.decided(readings.weights(Evidence(jaccard=masks, cosine=found.cosine), None, etas))
    seen = verdicts(decided, "changed weights")
    assert seen["masks-overlap", "as stored"] == ("supported", False)
    assert seen["masks-overlap", "bfloat16"] == ("contradicted", True)
    assert seen["masks-overlap", "η 0.01"] == ("supported", False)
    assert seen["masks-overlap", "η 0.0001"] == ("contradicted", True)
    assert seen["directions-agree", "bfloat16"] == ("supported", False)
    assert not any(claim == "few-interferences" for claim, _ in seen)  # it reads no weights


def test_layers_from_0_and_from_1():
    found = weights()
    frame = found.cosine
    found.cosine = frame.assign(cosine_projected=np.where(frame["layer"] == 1, -0.9, frame["cosine_projected"]))
    seen = verdicts(readings.decided(readings.weights(found, 2, None)), "layer")
    assert seen["directions-agree", "2, from 0"] == ("supported", True)  # all four layers together: contradicted
    assert seen["directions-agree", "2, from 1"] == ("contradicted", False) == seen["directions-agree", "all"]
    assert not [r for r in readings.weights(found, 0, None) if r.name == "0, from 1"]  # there is no layer -1


def test_a_variant_takes_its_methods_place_on_the_sweeps_items():
    """TIES is the best merge; at half its density it is the worst. Averaging's variant changes nothing."""
    rows = sampled([{"merge-ties": 0.8, "rl-multi": 0.8}], 2)
    cut = rows[rows["model"].isin(MERGES) & rows["item"].str.match(r".*/[0-3]?\d$") & (rows["sample"] == 0)]
    worse = cut[cut["model"] == "merge-ties"].assign(model="merge-ties density=0.1", score=0.0)
    same = cut[cut["model"] == "merge-average"].assign(model="merge-average out_dtype=bfloat16")
    found = readings.variants(Evidence(scores=rows, resamples=300), pd.concat([cut, worse, same]))
    for reading in found:  # all models on the sweep's items and samples, once each
        assert not reading.evidence.scores.duplicated(["model", "item", "sample"]).any()
        assert reading.evidence.scores.groupby(["model", "benchmark"]).size().nunique() == 1
    seen = verdicts(readings.decided(found, {"ties-best-merge": "best", "merge-most-consistent": "inherit"}), "merging")
    assert seen["ties-best-merge", "as in Table 4"] == ("supported", False)
    assert seen["ties-best-merge", "merge-ties density=0.1"] == ("contradicted", True)
    assert seen["ties-best-merge", "merge-average out_dtype=bfloat16"] == ("supported", False)
    assert ("merge-most-consistent", "merge-average out_dtype=bfloat16") not in seen  # it is about TIES alone
    assert readings.variants(Evidence(scores=rows), None) == []
    seeds = pd.concat([rows.assign(seed=1), rows.assign(seed=2, score=0.0)])  # the sweep is of the first seed, so are they
    again = readings.variants(Evidence(scores=seeds, resamples=300), pd.concat([cut, worse, same]))
    named = {"ties-best-merge": "best", "merge-most-consistent": "inherit"}
    assert verdicts(readings.decided(again, named), "merging") == seen


def test_fewer_samples_are_the_first_ones():
    """Only the later half of the samples harms: with half of them the claim holds. Catches shares of rows or of items."""
    good, bad = dict.fromkeys(EXPERT.values(), 0.7), dict.fromkeys(EXPERT.values(), 0.0)
    rows = sampled([good, good, bad, bad], 4, n=80)
    half = readings.fewer(rows, 0.5)
    assert set(half["sample"]) == {0, 1} and half["item"].nunique() == rows["item"].nunique()
    assert set(readings.fewer(rows, 0.1)["sample"]) == {0}
    decided = readings.decided(readings.samples(Evidence(scores=rows, resamples=300)), {"few-interferences": "harm"})
    seen = verdicts(decided, "K: samples")
    assert seen["few-interferences", "all"][0] == "contradicted"
    assert seen["few-interferences", "half"] == seen["few-interferences", "a quarter"] == ("supported", True)
    assert readings.samples(Evidence(scores=world())) == []  # one sample an item: there is nothing less


def test_estimators_of_the_divergence_by_hand():
    """Exact and sampled agree by response; by token the coding expert, whose responses are long, comes near."""
    kl = divergences(lambda d, e: 0.1 if d == e else 0.5)
    far = (kl["domain"] == "math") & (kl["expert"] == "rl-coding")
    kl = kl.assign(tokens=kl["tokens"].where(~far, 50), kl_exact=kl["kl_exact"].where(~far, 0.01))
    kl = kl.assign(kl_seq=kl["kl_exact"] * kl["tokens"], kl_token=kl["kl_exact"])
    seen = verdicts(readings.decided(readings.estimators(Evidence(kl=kl, resamples=200))), "KL")
    assert seen["neighbours-one-way", "exact, by response"] == seen["neighbours-one-way", "sampled, by response"] == (
        "undecided", False)
    assert seen["neighbours-one-way", "exact, by token"] == seen["neighbours-one-way", "sampled, by token"] == (
        "supported", True)
    assert seen["neighbour-lifts", "exact, by token"][0] == "not run"  # without scores


def test_epsilon_decides_who_is_near():
    kl = divergences(lambda d, e: 0.1 if d == e else 0.17 if (d, e) == ("math", "coding") else 1.0)
    seen = verdicts(readings.decided(readings.thresholds(Evidence(kl=kl, resamples=200))), "epsilon / own KL")
    assert seen["neighbours-one-way", "1.5"] == ("undecided", False) == seen["neighbours-one-way", "1"]
    assert seen["neighbours-one-way", "2"] == ("supported", True) == seen["neighbours-one-way", "3"]


def test_what_hours_stand_for():
    spent = pd.DataFrame({"model": [*EXPERT.values(), "rl-multi"], "hours": [1.0] * 5 + [3], "cpu_hours": [1.0] * 5 + [3],
                          "tokens": [10] * 5 + [45]})
    seen = verdicts(readings.decided(readings.costs(Evidence(costs=spent))), "cost")
    assert seen["mix-costs-less", "both clocks"] == seen["mix-costs-less", "processor"] == ("supported", False)
    assert seen["mix-costs-less", "tokens"] == ("contradicted", True)


def made(*flips):
    """Three headlines under two groups; `flips` are the (claim, group) pairs that change to undecided."""
    names = {"mix-equals-merge": "mix", "ties-best-merge": "ties", "masks-overlap": "masks"}
    return pd.DataFrame([{
        "id": name, "headline": readings.HEADLINES[name], "group": group, "reading": "own" if own else "other", "own": own,
        "verdict": "undecided" if not own and (name, group) in flips else "supported", "before": "supported",
        "estimate": 0.0, "flips": not own and (name, group) in flips}
        for own in (True, False) for group in ("K: samples", "merging") for name in names])


def test_the_sentence_counts_who_hangs_on_what():
    still = views.sentence(made()).data
    assert "Of 3 headlines, **3 keep" in still and "3 supported (mix scores like the best merge, " in still
    assert "0 hang on one thing" in still and "No reading turns" in still
    one = views.sentence(made(("masks-overlap", "merging"))).data
    assert "**2 keep" in one and "1 hang on one thing" in one
    assert "*masks overlap beyond chance* on merging (other: supported becomes undecided)" in one
    both = views.sentence(made(("masks-overlap", "merging"), ("masks-overlap", "K: samples"))).data
    assert "0 hang on one thing" in both
    assert "1 change under several: *masks overlap beyond chance* (K: samples, merging)" in both
    turned = made(("masks-overlap", "merging"))
    turned.loc[turned["flips"], "verdict"] = "contradicted"
    assert "or the reverse, in 1 of 6 cells" in views.sentence(turned).data


def test_the_picture_reads_in_black_and_white():
    """Each verdict has its letter, and the flipped tile its frame; the study's own reading stands first."""
    chart = views.figure(made(("masks-overlap", "merging")))
    spec = chart.to_dict()
    rows = [row for data in spec["datasets"].values() for row in data]
    assert {row["letter"] for row in rows} == {"S", "?"} and sum(row["flips"] for row in rows) == 1
    assert json.dumps(spec).count('"filter": "datum.flips"') == 2
    assert spec["hconcat"][0]["layer"][0]["encoding"]["x"]["sort"] == ["own (own)", "other"]
    assert drawing.png(chart)[:4] == b"\x89PNG"
    assert views.label("merge-ties density=0.1") == "ties: density of TIES 0.1" and views.label("half") == "half"


def test_headlines_are_claims_and_every_reading_is_tried():
    assert set(readings.HEADLINES) <= {claim["id"] for claim in paper.claims()}
    models = ("sft", *EXPERT.values(), "rl-multi", *MERGES, "mt-opd", *PAIRS)
    rows = sampled([{}], 2, n=20, models=models)
    kl = divergences(lambda d, e: 0.2).assign(kl_seq=0.2, kl_token=0.02)
    frame = weights()
    spent = pd.DataFrame({"model": [*EXPERT.values(), "rl-multi"], "hours": 1.0, "cpu_hours": 1.0})
    whole = Evidence(scores=rows, judged=judged(lambda m, b, mode: 0.5, n=10), kl=kl, jaccard=frame.jaccard,
                     cosine=frame.cosine, costs=spent, resamples=100)
    sweep = rows[rows["model"].isin(MERGES)]
    changed = sweep[sweep["model"] == "merge-ta"].assign(model="merge-ta scale=0.4")
    found = readings.every(whole, pd.concat([sweep, changed]), 2)
    groups = {reading.group for reading in found}
    assert groups == {"K: samples", "cost", "merging", "changed weights", "layer", "KL", "epsilon / own KL"}
    assert all(sum(r.own for r in found if r.group == group) == 1 for group in groups)
    decided = readings.decided(found)
    assert set(decided["id"]) == set(readings.HEADLINES) and not (decided["flips"] & decided["own"]).any()


def test_a_reading_without_its_own_is_an_error():
    with pytest.raises(KeyError):
        readings.decided([Reading("K: samples", "half", Evidence(), ("scores",))])
