"""What notebooks 3.2 to 4 show, on small frames whose tables can be worked out by hand."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from m2rl_core import claims
from m2rl_core.claims.evidence import EXPERT, JUDGED, MERGES, OWN, Evidence, Missing
from m2rl_core.domains import BENCHMARKS, DOMAINS
from m2rl_core.study import MODELS
from m2rl_core.views import decision, judging, mechanisms, neighbours, preliminary, scores, skills, verdicts
from m2rl_core.views.grid import grid

NAN = float("nan")


def rows(levels=None, n=20, models=MODELS, k=2):
    """Item i is right where i / n < the model's level (0.5 unless given by (model, domain) or model)."""
    levels = levels or {}
    return pd.DataFrame([
        {"model": m, "benchmark": b, "domain": d, "category": "", "item": f"{b}/{i}", "sample": s, "prompt": "2 + 2?",
         "response": "<think>\n\n</think>\n\n4", "reason": "right",
         "score": float((i + 0.5) / n < levels.get((m, d), levels.get(m, 0.5)))}
        for m in models for b, d in BENCHMARKS.items() for i in range(n) for s in range(k)])


def spent(multi=3.0, opd=0.5):
    hours = {**dict.fromkeys(EXPERT.values(), 1.0), "rl-multi": multi, "mt-opd": opd}
    return pd.DataFrame({"model": list(hours), "hours": list(hours.values())})


# -- tables ----------------------------------------------------------------------------------------------------------

def test_grid_escapes_and_prints_small():
    """Model text must not become markup; the interval stands below its score."""
    text = grid(pd.DataFrame({"m (miniature)": ["61.2\n[58.1, 64.0]", "<b>x</b>"]})).data
    assert "<b>" not in text and "&lt;b&gt;x" in text
    assert text.index("61.2") < text.index("<br>", text.index("61.2")) < text.index("[58.1, 64.0]")


def test_score_table_for_the_eye():
    table = pd.DataFrame({"model": ["sft", "mine"], "aime24": [61.24, NAN], "aime24_low": [58.1, NAN],
                          "aime24_high": [64, NAN]})
    shown = scores.beside(table, scores.printed_scores())
    assert list(shown["aime24 (miniature)"]) == ["61.2\n[58.1, 64.0]\npaper 56.0", "–"]
    assert scores.mean_of(BENCHMARKS) == "mean of nine"
    assert list(scores.titled(table)) == ["model", *(f"aime24 (miniature){end}" for end in ("", "_low", "_high"))]


def test_printed_scores_hold_every_model_once():
    printed = scores.printed_scores()
    assert printed.index.is_unique and set(MODELS) == set(printed.index)
    assert printed.loc["merge-ties", "avg"] == pytest.approx(61.00, abs=0.01)


# -- section 3.2 -----------------------------------------------------------------------------------------------------

def test_a_mean_says_what_it_is_the_mean_of():
    """Faults: "mean of nine" over eight; beside it the paper's mean of nine; a missing benchmark listed as tested; a domain
    of which only a part was run that does not say so."""
    eight = {b: d for b, d in BENCHMARKS.items() if b != "hle"}
    name = "mean of 8 (without hle)"
    assert scores.mean_of(eight) == name and scores.mean_of([*eight, "units"]).startswith("mean of 9 (aime24, ")
    assert scores.mean_of(["ifeval", "aime24"]) == "mean of 2 (ifeval, aime24)"
    frame = rows({"rl-multi": 0.7, "merge-ties": 0.8})
    found = Evidence(scores=frame[frame["benchmark"] != "hle"], costs=spent(), benchmarks=eight, resamples=100)
    table, printed = scores.table(found, ["sft", "rl-multi"]), scores.printed_scores(eight)
    assert printed.loc["rl-multi", "avg"] == pytest.approx(scores.printed_scores().loc["rl-multi", list(eight)].mean())
    assert "avg" not in scores.printed_scores([*eight, "units"])
    assert name in scores.beside(table, printed) and {name, f"{name}_low"} <= set(scores.titled(table))
    assert name in scores.titled(printed) and name in scores.against_best(found)
    assert scores.against_best(found)["paper: mean"].iloc[0] == f"{printed['avg']['rl-multi']:.2f}"
    home = scores.at_home(found).set_index("domain")
    assert home.loc["science", "benchmarks"] == "gpqa_diamond"
    gain = printed.loc["rl-science", "gpqa_diamond"] - printed.loc["sft", "gpqa_diamond"]
    assert home.loc["science", "paper"] == pytest.approx(gain)
    assert scores.at_home_shown(home.reset_index())["benchmarks"].tolist()[2] == "gpqa_diamond (miniature)"
    compared = verdicts.quality_and_cost(found)
    assert set(compared["of"]) == {name} and f"{name} (%)" in str(verdicts.headline(compared).to_dict())
    assert "points in the mean of 8 (without hle), at" in verdicts.mix_or_merge(found).data
    options = decision.options(found)
    assert f"{name} [95 %]" in decision.shown(options, options)
    assert decision.by_domain(found)["domain"].tolist()[2] == "Science (without hle)"
    start = preliminary.beside_paper(table, ["sft"]).set_index("benchmark")
    assert start.loc[name, "sft, paper"] == f"{printed['avg']['sft']:.1f}"


def test_cost_shares():
    """The denominator is the five experts alone: counting the mix or MT-OPD in it would hide the ratio."""
    share = scores.shares(spent())
    assert share["rl-multi"] == 60 and share["mt-opd"] == 10 and share[list(EXPERT.values())].sum() == 100


def test_way_starts_at_sft():
    """Step 0 is SFT on the same items and no more samples; otherwise the first step shows a jump that is not there."""
    along = rows(models=["rl-math", "rl-if"], n=4, k=1).assign(step=10)
    found = scores.along_with_start(along, rows(models=["sft"], n=9, k=3))
    start = found[found["step"] == 0]
    assert set(start["model"]) == {"rl-math", "rl-if"} and set(start["item"]) == set(along["item"])
    assert set(start["sample"]) == {0} and len(start) == len(along)


def test_home_and_away():
    levels = {("rl-math", "math"): 0.8, ("rl-math", "if"): 0.2}
    evidence = Evidence(scores=rows(levels), resamples=200)
    home = scores.at_home(evidence).set_index("domain")
    assert home.loc["math", "difference"] == pytest.approx(30) and home.loc["if", "difference"] == 0
    assert home.loc["math", "paper"] == pytest.approx((77.66 - 56.04 + 70.42 - 51.30) / 2)
    assert "1 of 5 experts" in scores.at_home_sentence(home.reset_index()).data
    said = scores.interference_sentence(scores.interference(evidence)).data
    assert "0 of 20 cells are above" in said and "1 below" in said and "`rl-math` on IF" in said


def test_trajectory_band_belongs_to_the_own_expert():
    along = pd.concat([rows(models=EXPERT.values(), n=6).assign(step=s) for s in (0, 10)])
    way = scores.trajectories(Evidence(along=along, resamples=100), EXPERT.values())
    assert len(way) == 5 * 5 * 2
    assert set(way.loc[way["low"].notna(), "model"]) == set(EXPERT.values()) and way["low"].notna().sum() == 10


def test_merge_diagnosis():
    def entry(warnings):
        return {"recipe": {"method": "ties", "parameters": {"density": 0.2, "vote": "unweighted"}}, "diagnosis": {
            "changed": {"a": 0.9, "b": 0.95}, "sign_conflict": 0.7, "density": {"a": 0.2, "b": 0.2}, "moved": 0.5,
            "lost": 0.0, "warnings": warnings}}
    found = {"merge-ties": entry(["w"]), "merge-sce": entry(["w", "v"])}
    line = scores.diagnosis_table(found).iloc[0]
    assert line["recipe"] == "ties, density 0.2" and line["changed by the experts (%)"] == "90.0 to 95.0"
    assert line["density that reaches the merge (%)"] == "20.0"
    said = scores.warning_text(found).data
    assert said.count("* w") == 1 and "all merges" in said and "* v (`merge-sce`)" in said


# -- section 3.3 -----------------------------------------------------------------------------------------------------

def weights(value=0.5, share=0.4):
    pairs = [(a, b) for i, a in enumerate(DOMAINS) for b in DOMAINS[i + 1:]]
    cells = [{"layer": layer, "matrix": m, "a": a, "b": b, "bf16": bf16} for layer in (0, 1)
             for m in ("q", "k", "v", "o", "down", "up", "gate") for a, b in pairs for bf16 in (False, True)]
    jaccard = [{**c, "jaccard": value, "jaccard_random": 0.25, "jaccard_null": 0.6, "share_a": share, "share_b": share}
               for c in cells]
    inner = {"math", "coding", "science"}
    cosine = [{**c, "cosine": 0.3 if {c["a"], c["b"]} <= inner else 0.1, "cosine_projected": 0.2, "projection_sd": 0.06,
               "cosine_sd": 0.02} for c in cells]
    return pd.DataFrame(jaccard), pd.DataFrame(cosine)


def test_overlap_is_held_against_both_nulls():
    """0.5 beats random masks of that density everywhere, and masks that know |w| nowhere."""
    table5 = mechanisms.table5(weights()[0], 1)
    assert len(table5) == 10 and list(table5)[:2] == ["pair", "q"] and "ffn_down_null" in table5
    said = mechanisms.overlap_sentence(table5, 1).data
    assert "of 70 cells, 70 exceed" in said and "and 0 exceed" in said
    shown = mechanisms.table5_shown(table5)
    assert list(shown["pair"][-2:]) == ["random masks", "random masks given |w|"]
    assert shown.loc[0, "q"] == "0.50\npaper 0.47"


def test_nothing_changed_is_said():
    """Masks without a single weight have no overlap; 0.00 or a crash would both be wrong."""
    jaccard, cosine = weights(NAN, 0.0)
    table5 = mechanisms.table5(jaccard, 0)
    assert "undefined" in mechanisms.overlap_sentence(table5, 0).data
    assert mechanisms.table5_shown(table5).loc[0, "q"].startswith("undefined")
    assert mechanisms.precision(jaccard, cosine)["overlap"].tolist() == ["undefined", "undefined"]


def test_directions_by_group():
    _, cosine = weights()
    found = mechanisms.directions(cosine).set_index(["group", "layer"])
    assert found.loc[("reasoning with reasoning", 0), "exact"] == pytest.approx(0.3)
    assert found.loc[("IF with agent", 1), "cells"] == 7  # one pair, seven matrices, weights as stored only
    square = mechanisms.figure3(cosine, 0)
    assert len(square) == 2 * 20
    # attention has four matrices, of 0.02 each: 1.96 x 0.02 / sqrt(4) = 0.02; FFN three: 1.96 x 0.02 / sqrt(3) = 0.02
    assert set(square["exact"]) == {"exact 0.30±0.02", "exact 0.10±0.02"}
    # Pairs of one matrix do not add to what is known (seven matrices: 0.02 / sqrt(7)), or 21 cells would give 0.004.
    assert found.loc[("reasoning with reasoning", 0), "error"] == pytest.approx(0.02 / 7**0.5)
    assert found.loc[("reasoning with reasoning", 0), "noise"] == pytest.approx(0.06 / 7**0.5)
    shown = mechanisms.directions_shown(mechanisms.directions(cosine))
    assert shown.loc[0, "layer 1"] == "0.20 (0.30±0.01)"


def test_both_ways_to_count_layers_are_shown():
    """Layer 1 from 0 is the second; the same number counted from 1 is the first. A layer 0 has no other reading."""
    jaccard, _ = weights()
    jaccard.loc[jaccard["layer"] == 0, "jaccard"] = 0.7
    shown = mechanisms.index_bases(jaccard, 1)
    assert len(shown) == 10 and shown.loc[0, "q"] == "0.50\nfrom 1: 0.70"
    said = mechanisms.index_sentence(jaccard, 1).data
    assert "0.50 (from 0) and 0.70 (from 1)" in said and "0.20 at most; 0 and 70 of 70" in said
    assert mechanisms.index_bases(jaccard, 0).empty and "is the first" in mechanisms.index_sentence(jaccard, 0).data


def test_an_expert_that_is_sft_is_named():
    """Science changed nothing in one matrix; nothing is said where all changed something."""
    jaccard, _ = weights()
    assert mechanisms.unchanged_sentence(jaccard).data == ""
    here = (jaccard["layer"] == 1) & (jaccard["matrix"] == "v")
    for side in "ab":
        jaccard.loc[here & (jaccard[side] == "science"), f"share_{side}"] = 0.0
    said = mechanisms.unchanged_sentence(jaccard).data
    assert "Science's expert is identical to SFT in 1 of 14 matrices" in said and "undefined" in said


def test_on_bfloat16_eta_decides_nothing_and_a_larger_one_would():
    """The sentence counts; at 2^-6 the test misses neighbours that differ in a bit."""
    said = mechanisms.eta_sentence(1e-3).data
    assert "Of all 32,639 pairs" in said and "32,639 pass" in said and "32,639 differ" in said and said.endswith("0 and 0.")
    assert "32,639 pass" not in mechanisms.eta_sentence(2**-6).data


# -- section 3.4 -----------------------------------------------------------------------------------------------------

def divergence(near=()):
    return pd.DataFrame([{"policy": p, "data": d, "expert": e, "kl": 0.1 if d == e else 0.12 if (d, e) in near else 1.0}
                         for p in neighbours.POLICIES for d in DOMAINS for e in DOMAINS])


def test_eq1():
    """epsilon belongs to the domain of the prompts; swapping the two indices would swap who is near whom."""
    near = {("math", "coding"), ("if", "agent"), ("agent", "if")}
    found = neighbours.neighbours(divergence(near), "merge-ties")
    by_pair = found.set_index(["domain", "expert"])
    assert {pair for pair in by_pair.index if by_pair.loc[pair, "near"]} == near
    assert by_pair.loc[("if", "agent"), "mutual"] and not by_pair.loc[("math", "coding"), "mutual"]
    assert by_pair.loc[("math", "coding"), "epsilon"] == pytest.approx(0.15)
    shown = neighbours.neighbours_shown(found).set_index("domain")["policy neighbours"]
    assert list(shown.items()) == [("Math", "Coding (one way)"), ("Coding", "none"), ("Science", "none"),
                                   ("IF", "Agent"), ("Agent", "IF")]
    line = neighbours.sensitivity(divergence(near)).iloc[0]
    assert (line["1 x own"], line["1.5 x own"]) == ("0 (0 one way)", "3 (1 one way)")


def test_pairs_stand_beside_the_papers_changes():
    pairs = [f"pair-{a}-{b}" for i, a in enumerate(DOMAINS) for b in DOMAINS[i + 1:]]
    evidence = Evidence(scores=rows({"pair-math-coding": 0.8}, models=[*EXPERT.values(), *pairs]), resamples=100)
    found = neighbours.pairs(evidence, divergence({("math", "coding")}))
    by = found.set_index(["domain", "partner"])
    assert len(found) == 20
    assert by.loc[("math", "coding"), "change"] == by.loc[("coding", "math"), "change"] == pytest.approx(30)
    assert by.loc[("math", "coding"), "paper"] == pytest.approx((2.63 + 2.02) / 2)
    assert by.loc[("coding", "math"), "paper"] == pytest.approx((-4.58 - 1.69) / 2)
    assert by.loc[("science", "math"), "paper"] != by.loc[("science", "math"), "paper"]  # not in Table 6
    assert "1 merges with neighbours: mean change +30.0" in neighbours.pairs_sentence(found).data
    none = neighbours.pairs(Evidence(scores=rows(models=EXPERT.values()), resamples=100), divergence())
    assert none.empty and list(none) == neighbours.PAIRS


def test_link_of_a_constant_is_undefined():
    flat = pd.DataFrame({"policy": "rl-multi", "kl": [1.0, 1.0, 1.0], "change": [0.0, 1.0, 2.0]})
    assert "undefined" in neighbours.link_sentence(flat, Evidence()).data


# -- section 3.5 -----------------------------------------------------------------------------------------------------

def test_no_gains_give_a_picture_that_says_so():
    evidence = Evidence(scores=rows())
    found = skills.consistency(evidence)
    assert found["cosine"].isna().all() and "undefined" in str(skills.figure5(found).to_dict())
    assert "undefined: no expert gains" in skills.shown(found)["cosine with the experts' union"][0]
    assert "no cosine is defined" in skills.sentence(found).data


def test_transcripts_open_and_show_the_right_side():
    """The merge alone solves items 10 to 15; a response that holds markup must stay text, or it ends the block."""
    frame = rows({"merge-ties": 0.8})
    mine = frame["model"].eq("merge-ties") & frame["item"].eq("aime24/10")
    frame.loc[mine, "response"] = "</pre></details><b>not bold</b>"
    apart = skills.apart(Evidence(scores=frame))
    assert set(apart["who"]) == {"model only"} and set(apart["model"]) == {"merge-ties"}
    text = skills.transcripts(apart, frame, "merge-ties", "model only").data
    assert "aime24 (miniature), aime24/10</b>: merge-ties right in 100 %" in text and "reward 1, right" in text
    assert text.count("<details>") == text.count("</details>") == text.count("<summary>") == 6
    assert text.count("<pre") == text.count("</pre>") == 6 * 3 and "&lt;/pre&gt;" in text and "<b>not" not in text
    assert "6 of 30 items" in text
    assert "No item" in skills.transcripts(apart, frame, "rl-multi", "model only").data


def test_items_apart_stand_beside_luck():
    """Sure items: six alone on each benchmark, and a copy of the own expert has none. Fault: luck of another model."""
    evidence = Evidence(scores=rows({"merge-ties": 0.8}))
    counts = skills.apart_counts(skills.apart(evidence), evidence)
    shown = skills.apart_shown(counts)
    assert shown.iloc[0, 1] == "6 / 0\nby halves 6.0 / 0.0\nown expert's copy 0.0 / 0.0"
    assert shown.iloc[-1, 0] == "all five" and shown.iloc[-1, 1].startswith("30 / 0\n")
    said = skills.apart_sentence(counts).data
    assert "`merge-ties` minus the copy: alone 30.0 [" in said and "items (more than luck), left to" in said
    assert "`rl-multi` minus the copy: alone 0.0 [0.0, 0.0] items (not told from luck)" in said
    single = Evidence(scores=rows({"merge-ties": 0.8}, k=1))
    some = Evidence(scores=pd.concat([rows(k=1), rows(k=2)[lambda f: (f["benchmark"] == "aime24") & (f["sample"] == 1)]]))
    assert "one sample does not tell" in skills.apart_sentence(skills.apart_counts(skills.apart(some), some)).data
    assert "one sample does not tell" in skills.apart_sentence(skills.apart_counts(skills.apart(single), single)).data


# -- section 3.6 -----------------------------------------------------------------------------------------------------

def judge(says, truths, model="sft"):
    return pd.DataFrame([
        {"model": model, "benchmark": b, "item": f"{b}/{i}", "sample": 0, "mode": mode, "truth": t,
         "said": says(t, mode), "correct": int(says(t, mode) == t)}
        for b in JUDGED for mode in judging.MODES for i, t in enumerate(truths)])


def judged_by(says, truths):
    """(quality, what is shown of it) of one judge."""
    rows = judge(says, truths)
    evidence = Evidence(judged=rows, resamples=400)
    found = judging.quality(rows, evidence)
    return found, judging.quality_shown(found, evidence)


def test_balanced_accuracy_sees_through_yes():
    """Always yes on 8 right and 2 wrong answers: accuracy 80, balanced 50. Without wrong answers there is none."""
    found, _ = judged_by(lambda t, mode: 1, [1] * 8 + [0] * 2)
    yes = found.iloc[0]
    assert (yes["accuracy"], yes["balanced"], yes["yes"], yes["right"]) == (80, 50, 100, 80)
    said = judging.quality_sentence(found).data
    assert "8 of 8 judges (model, benchmark, mode) give one and the same verdict" in said and "(yes, accuracy 80.0" in said
    assert "In 8 of 8 cells a judge that always said the more frequent truth" in said
    sided, shown = judged_by(lambda t, mode: 1, [1] * 5)
    assert sided["balanced"].isna().all() and set(shown.iloc[:, 3]) == {"undefined"}
    mute = judged_by(lambda t, mode: -1, [1, 0])[0].iloc[0]
    assert (mute["accuracy"], mute["unreadable"], mute["yes"]) == (0, 100, 0)


def test_balanced_accuracy_has_an_interval_over_items_of_each_kind():
    """Fault: the interval of plain accuracy, or one for a single wrong answer, which says nothing of its spread."""
    turn = iter(range(10**6))
    found, shown = judged_by(lambda t, mode: t if next(turn) // 2 % 3 else 1 - t, [1] * 30 + [0] * 9)
    cell = found.iloc[0]
    assert cell["low"] < cell["balanced"] < cell["high"] and cell["balanced"] - cell["low"] > 5
    assert shown.iloc[0, 3].endswith("(4 of 4 benchmarks)") and " [" in shown.iloc[0, 3]
    assert "No judge gives one and the same verdict" in judging.quality_sentence(found).data
    single, shown = judged_by(lambda t, mode: t, [1] * 5 + [0])
    assert single["balanced"].eq(100).all() and single["low"].isna().all() and set(shown.iloc[:, 3]) == {"undefined"}


def test_a_study_without_answers_says_so():
    """Fault: a traceback where nothing was judged, tested away from home, or measured in the layer that is asked for."""
    with pytest.raises(Missing, match="no answer was judged"):
        judging.quality(pd.DataFrame(), Evidence())
    home = pd.DataFrame([{"model": "rl-math", "domain": "math", "difference": 1.0, "low": 0.0, "high": 2.0}])
    assert scores.interference_sentence(home).data == "No expert was tested away from home."
    none = pd.DataFrame({name: pd.Series(dtype=bool if name == "bf16" else float) for name in (
        "layer", "bf16", "matrix", "a", "b", "cosine", "cosine_projected", "cosine_sd", "jaccard")})
    with pytest.raises(Missing, match="no layer 17 was measured: `analysis.layer`"):
        mechanisms.figure3(none, 17)
    with pytest.raises(Missing, match="no layer 17 was measured"):
        mechanisms.index_sentence(none, 17)


def test_what_avg_at_eight_would_cost():
    """Two samples in 10 s are four times as long for eight; fault: the cost of one model for that of all."""
    rows = pd.concat([judge(lambda t, mode: 1, [1, 0]).assign(sample=s, model=m) for s in (0, 1) for m in ("sft", "rl-if")])
    said = judging.budget(SimpleNamespace(manifest=lambda name: {"seconds": 5.0}, need=Path), rows).data
    assert "Avg@2, one answer to each of 2 items" in said and "Avg@8 would take about 0:40" in said
    whole = pd.concat([rows.assign(sample=s) for s in range(8)])
    assert "would take" not in judging.budget(SimpleNamespace(manifest=lambda name: {"seconds": 5.0}, need=Path), whole).data


def test_table7():
    judged = judge(lambda t, mode: t if mode == "process" else 1 - t, [1, 0, 1, 0])
    found = judging.scores(Evidence(scores=rows(models=["sft"]), judged=judged, resamples=100), ["sft", "rl-math"])
    wide = judging.table7(found).set_index("model")
    assert list(wide)[:4] == ["aime24_gen", "aime24_gen_low", "aime24_gen_high", "aime24_out"]
    assert (wide.loc["sft", "avg_gen"], wide.loc["sft", "avg_out"], wide.loc["sft", "avg_proc"]) == (50, 0, 100)
    assert np.isnan(wide.loc["rl-math", "avg_gen"])
    shown = judging.table7_shown(found).set_index("model")
    assert shown.loc["sft", "aime24 (miniature)"].startswith("50.0 / 0.0 / 100.0\ngen [")
    assert shown.loc["sft", "aime24 (miniature)"].endswith("paper 56.0 / 72.9 / 91.8")
    assert "undefined / undefined" in shown.loc["rl-math", "mean of four"]
    assert "aime24 (miniature) 1 of 1 (paper 8 of 9)" in judging.modality_sentence(found).data
    assert list(judging.figure6(found)["model"]) == ["sft", "sft"]


def test_correlations_stand_beside_the_papers():
    points = pd.DataFrame([{"mode": f"{mode} judging", "model": m, "x": i, "y": -i if mode == "process" else 1.0}
                           for mode in judging.MODES for i, m in enumerate(["sft", *EXPERT.values()])])
    outcome, process = judging.correlations(points, Evidence()).to_dict("records")
    assert outcome["r here"].startswith("undefined") and process["r here"].startswith("-1.00 [")
    assert process["r by the paper's Table 7"].startswith("-0.53 [")
    assert "without rl-multi" in process["its leave-one-out"]


# -- conclusion ------------------------------------------------------------------------------------------------------

def test_evidence_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="'score'"):
        verdicts.evidence(SimpleNamespace(stages={}), "score")


def test_verdict_tables_count_every_claim():
    lines = claims.decide("4", Evidence())
    counts = verdicts.counts(lines).set_index("section")
    for source in ("paper", "here"):
        columns = [c for c in counts if c.startswith(f"{source}: ")]
        assert (counts[columns].sum(axis=1) == counts["claims"]).all()
    assert counts.loc["all", "claims"] == len(lines) == counts.loc["all", "here: not run"]
    table = verdicts.table(lines)
    assert len(table) == len(lines) and set(table["by this run"]) == {"not run"}
    assert verdicts.agreement(lines, "not run").data.count("\n* ") == len(lines) - 1
    assert "No claim" in verdicts.agreement(lines, "supported").data


def test_cost_of_what_needs_the_experts():
    """A merge is not free and MT-OPD does not cost its own steps alone: both need five experts first."""
    found = verdicts.quality_and_cost(Evidence(scores=rows(), costs=spent(), resamples=100))
    cost = found.set_index(["source", "model"])["cost"]
    assert cost["this run", "merge-ties"] == 100 and cost["this run", "mt-opd"] == 110 and cost["this run", "sft"] == 0
    assert cost["this run", "rl-multi"] == 60 and cost["this run", "rl-math"] == 20
    assert cost["the paper, printed", "rl-multi"] == pytest.approx(63.7, abs=0.01)


def test_names_in_the_headline_do_not_collide():
    frame = pd.DataFrame({"source": "s", "of": "mean of nine", "model": [*MERGES, "sft", "mt-opd"],
                          "cost": [100.0] * 6 + [0, 110], "value": [50.0, 50.1, 50.2, 50, 50, 70, 20, 50.3],
                          "low": NAN, "high": NAN})
    placed = verdicts.placed(frame)
    right = placed[placed["cost"] > 80].sort_values("beside")
    line = verdicts.LINE * (placed["top"] - placed["floor"]).iloc[0]
    assert (right["beside"].diff().dropna() > line - 1e-9).all() and right["at"].nunique() == 1
    alone = placed.set_index("model")["beside"]
    assert alone["sft"] == 20 and alone["merge-ta-dare"] == 70  # who has room stays
    assert placed.loc[placed["model"].isin(MERGES), "x"].is_unique and verdicts.headline(frame).to_dict()


def test_a_name_in_the_headline_goes_past_the_points_at_its_side():
    frame = pd.DataFrame({"source": "s", "of": "mean of nine", "model": ["rl-math", "rl-coding", "rl-science", "sft"],
                          "cost": [12.0, 15, 17, 40], "value": [42.0, 42.02, 41.98, 42], "low": NAN, "high": NAN})
    placed = verdicts.placed(frame).set_index("model")
    for name, point in placed.iterrows():
        covered = placed["x"].between(point["at"], point["at"] + 6) & (
            (placed["value"] - point["beside"]).abs() < 0.5 * verdicts.LINE * (point["top"] - point["floor"]))
        assert not covered.any(), name


@pytest.mark.parametrize(("level", "multi", "answer"), [
    ({"rl-multi": 0.9}, 3, "**Mix**: it scores higher and costs less"),
    ({"rl-multi": 0.9}, 9, "**Mix**: it scores higher, at a higher cost"),
    ({"rl-multi": 0.1}, 3, "**Merge**: it scores higher, at a higher cost"),
    ({("rl-multi", "math"): 0.8, ("rl-multi", "if"): 0.2}, 3, "**Cannot tell** which scores higher; mixing costs less"),
])
def test_mix_or_merge(level, multi, answer):
    evidence = Evidence(scores=rows(level), costs=spent(multi), resamples=200)
    assert verdicts.mix_or_merge(evidence).data.startswith(answer)


def test_equal_means_the_cheaper():
    frame = rows(n=400, k=1)  # two models that differ on one item in four hundred, up and down by turns
    flip = frame["model"].eq("rl-multi") & frame["item"].str.endswith("/199")
    frame.loc[flip, "score"] = 0.0
    said = verdicts.mix_or_merge(Evidence(scores=frame, costs=spent(3), resamples=200)).data
    assert said.startswith("**The two are equal**") and "**mix**" in said


def test_every_domain_has_its_benchmarks_shown():
    assert [b for d in DOMAINS for b in OWN[d]] == list(BENCHMARKS)
