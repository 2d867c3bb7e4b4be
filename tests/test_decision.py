"""What to take: the cheapest option that is not shown to be lower, on worlds whose answer is known."""
import pandas as pd
import pytest
from test_views import rows, spent

from m2rl_core.claims.evidence import EXPERT, MERGES, Evidence
from m2rl_core.domains import BENCHMARKS
from m2rl_core.views import decision

EXPERTS = tuple(EXPERT.values())


def evidence(levels, multi=3.0, **sizes):
    low = {m: 0.1 for m in ("sft", "base", *EXPERTS, *MERGES, "mt-opd", "rl-multi")}
    return Evidence(scores=rows({**low, **levels}, **sizes), costs=spent(multi), resamples=300)


def taken(found, experts_at_hand=False):
    frame = decision.options(found, experts_at_hand)
    return frame.loc[frame["chosen"], "model"].item()


def test_costs_from_scratch_and_with_the_experts_at_hand():
    """Catches a merge that counts as free from scratch, and one that counts its experts twice when they are there."""
    scratch, there = decision.cost(spent(3.0, 0.5)), decision.cost(spent(3.0, 0.5), experts_at_hand=True)
    assert scratch["merge-ties"] == 100 and there["merge-ties"] == 0
    assert scratch["mt-opd"] == 110 and there["mt-opd"] == 10
    assert scratch["rl-multi"] == there["rl-multi"] == 60 and scratch["rl-math"] == 20 and there["rl-math"] == 0
    assert scratch["sft"] == there["sft"] == 0


def test_the_cheapest_that_is_not_lower_is_taken():
    equal = {"rl-multi": 0.8, "merge-ties": 0.8}
    assert taken(evidence(equal)) == "rl-multi" and taken(evidence(equal), True) == "merge-ties"
    assert taken(evidence(equal, multi=9.0)) == "merge-ties"  # the mix costs more than the experts together
    assert taken(evidence({"rl-multi": 0.9, "merge-ties": 0.5}), True) == "rl-multi"  # free but lower
    assert taken(evidence({"merge-ties": 0.9, "rl-multi": 0.5})) == "merge-ties"
    assert taken(evidence(dict.fromkeys((*EXPERTS, *MERGES, "rl-multi", "mt-opd"), 0.1))) == "sft"  # nothing helped


def test_of_equally_cheap_ones_the_best():
    found = evidence({"merge-ties": 0.8, "merge-sce": 0.85, "merge-ta": 0.8}, n=20)
    assert taken(found, True) == "merge-sce"


def test_intervals_are_shared_and_the_columns_follow_from_them():
    frame = decision.options(evidence({"rl-multi": 0.8, "merge-ties": 0.7}, n=40))
    assert len(frame) == 14 and frame["cost"].is_monotonic_increasing
    best = frame[frame["model"] == "rl-multi"].iloc[0]
    assert best["gap"] == best["gap_low"] == 0 and best["comparable"] and not best["lower"]
    assert ((frame["gap_high"] < 0) == frame["lower"]).all() and ((frame["gap_low"] > -2) == frame["comparable"]).all()
    assert frame["chosen"].sum() == 1
    single = evidence({"rl-multi": 0.8, "merge-ties": 0.7}, n=40)
    alone = single.contrast(decision.difference("merge-ties", "rl-multi", BENCHMARKS))
    tie = frame[frame["model"] == "merge-ties"].iloc[0]
    assert tie["gap"] == pytest.approx(-10) and tie["gap_high"] - tie["gap_low"] > alone.high - alone.low


def said(found):
    return decision.sentence(found, decision.options(found), decision.options(found, True)).data


def test_the_sentence_says_choice_cost_and_risk():
    clear = said(evidence({"rl-multi": 0.9}))
    assert "from SFT: `rl-multi`** (training 60 % by the clock of what" in clear.replace("Starting from", "from")
    assert clear.count("every other one is shown to be lower") == 2 and "By the paper's printed numbers" in clear
    tokens = evidence({"rl-multi": 0.9})
    tokens.costs = tokens.costs.assign(tokens=[1] * 5 + [2, 1])
    assert "60 % by the clock, 40 % by sampled tokens" in said(tokens)


def test_a_choice_that_is_not_the_best_says_what_it_risks():
    """The mix is a little lower on one item in twenty, within noise: it is taken for its cost, with its risk."""
    found = evidence({"merge-ties": 0.8, "rl-multi": 0.8, ("rl-multi", "math"): 0.75}, n=20)
    frame = decision.options(found)
    assert frame.loc[frame["chosen"], "model"].item() == "rl-multi" and frame["gap"].min() < 0
    text = said(found).split("**With")[0]
    assert "The best, `merge-ties`, costs 100 % and is not shown to score higher" in text
    gap = frame.loc[frame["chosen"]].iloc[0]
    assert gap["gap"] == pytest.approx(-5 * 2 / 9) and not gap["comparable"]
    assert f"it may be up to {-gap['gap_low']:.1f} points lower, about " in text and "items would tell the two apart" in text


def test_without_intervals_nothing_is_advised():
    """Catches advice from one item a benchmark, where no option can be shown to be lower."""
    text = said(evidence({"rl-multi": 0.9}, n=1))
    assert text.count("cannot tell.** There are too few items") == 2 and "Starting from SFT: cannot tell" in text


def test_domains_are_compared_one_by_one():
    levels = {"merge-ties": 0.5, "rl-multi": 0.5, ("rl-multi", "math"): 0.9, ("merge-ties", "agent"): 0.95}
    found = decision.by_domain(evidence(levels)).set_index("domain")
    assert found.loc["Math", "ahead"] == "rl-multi" and found.loc["Agent", "ahead"] == "merge-ties"
    assert found.loc["Coding", "ahead"] == "not decided" and list(found.columns[:2]) == ["rl-multi", "merge-ties"]
    shown = decision.shown(decision.options(evidence(levels)), decision.options(evidence(levels), True))
    assert isinstance(shown, pd.DataFrame) and (shown["the rule takes it"] != "").sum() in (1, 2)
