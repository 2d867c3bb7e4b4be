"""The paper's numbers as data, and what they say when recomputed. Catches a mistyped cell or a wrong formula."""
import numpy as np
import pytest

from m2rl_core import paper
from m2rl_core.paper import audit, printed


def test_every_table_is_whole():
    shapes = {number: paper.table(number).shape for number in paper.TABLES}
    assert shapes == {1: (7, 4), 2: (7, 4), 3: (9, 9), 4: (7, 10), 5: (11, 7), 6: (9, 8), 7: (9, 15), 8: (2, 10)}
    assert [n for n in paper.TABLES if n != 6 and paper.table(n).isna().any(axis=None)] == []
    assert set(paper.numbers()["version"]) == {"v3"}


def test_value_and_its_errors():
    assert paper.value(4, "merge-ties", "aime24") == 81.15
    assert paper.value(1, "Science", "sampling") == "repeat 10 times"
    assert paper.value(6, "merge-ties-math-coding", "lcb_v5_change") == -4.58
    with pytest.raises(KeyError, match="merge-sce"):
        paper.value(4, "sce", "aime24")
    with pytest.raises(KeyError, match="gpu_hours"):
        paper.value(2, "rl-math", "hours")
    with pytest.raises(ValueError, match="1 to 8"):
        paper.table(9)


def test_tables_that_repeat_a_number_agree():
    """Tables 3, 4, 6, 7 and 8 print some scores again: a typo in one of them would show."""
    main = paper.table(3)
    for number in (4, 8):
        assert (paper.table(number).loc["merge-ties", main.columns] == main.loc["merge-ties"]).all()
    judged = paper.table(7)
    for model in judged.index.intersection(main.index):
        for benchmark in audit.JUDGED:
            assert judged.loc[model, f"{benchmark}_gen"] == main.loc[model, benchmark]
    assert paper.value(6, "rl-math", "aime25") == main.loc["rl-math", "aime25"]
    assert paper.value(6, "rl-coding", "lcb_v6") == main.loc["rl-coding", "lcb_v6"]


def test_printed_averages():
    frame = audit.averages()
    assert len(frame) == 9 + 27 and frame["agrees"].all()
    means = audit.nine_benchmark_means().set_index("model")["avg"].round(2)
    assert means[["rl-multi", "merge-ties", "merge-ta-dare", "sft"]].tolist() == [61.18, 61.00, 60.99, 47.96]
    assert means.idxmax() == "rl-multi"


def test_blend_and_hours():
    blend = audit.blend().set_index("type")
    assert blend.loc["Total", "samples"] == 14_121_873
    assert blend.index[~blend["agrees"]].tolist() == ["Science"]
    assert round(blend.loc["Science", "computed"], 2) == 16.03 and blend.loc["Science", "printed"] == 16.04
    hours = audit.gpu_hours().set_index("model")
    assert hours.loc["five experts", "hours"] == pytest.approx(15778.5)
    assert round(hours.loc["rl-multi", "percent_of_experts"], 1) == 63.7
    assert hours.loc["five experts", "steps"] == 2 * hours.loc["rl-multi", "steps"]


def test_random_jaccard():
    assert audit.random_jaccard() == pytest.approx(0.3 / 1.7) and round(audit.random_jaccard(), 3) == 0.176
    assert audit.random_jaccard(1.0, 0.2) == pytest.approx(0.2)  # the smaller set lies inside


def test_judge_correlations_hang_on_one_model():
    frame = audit.judge_correlations(np.random.default_rng(0)).set_index(["mode", "dropped"])
    whole = frame.xs("", level="dropped")
    assert whole["r"].round(2).to_dict() == {"outcome": 0.63, "process": -0.53}
    # the plain percentile interval, too narrow at nine models, says [-0.88, 0.08] and [-0.18, 0.99]
    assert whole.loc["process", ["low", "high"]].tolist() == pytest.approx([-0.92, 0.25], abs=0.03)
    assert whole.loc["outcome", ["low", "high"]].tolist() == pytest.approx([-0.41, 0.99], abs=0.03)
    assert round(frame.loc[("process", "rl-multi"), "r"], 2) == -0.36
    assert round(frame.loc[("outcome", "rl-multi"), "r"], 2) == 0.89


def test_finding1_cells():
    frame = audit.finding1()
    reasoning = frame[frame["benchmark"] != "ifeval"]
    assert (len(reasoning), reasoning["process_better"].sum()) == (27, 24)
    against = reasoning[~reasoning["process_better"]]
    found = set(zip(against["model"], against["benchmark"], strict=True))
    assert found == {("rl-math", "gpqa_diamond"), ("rl-multi", "aime24"), ("rl-multi", "gpqa_diamond")}
    ifeval = frame[frame["benchmark"] == "ifeval"]
    assert (len(ifeval), ifeval["process_better"].sum()) == (9, 1)


def test_grid_of_avg_at_k():
    frame = audit.grid().set_index(["benchmark", "set"])
    fits = {key: (row["fit"], row["values"]) for key, row in frame.iterrows()}
    main = {name: fits[name, "tables 3-4"] for name in audit.GRID}
    assert main == {"aime24": (14, 15), "aime25": (14, 15), "lcb_v5": (11, 15), "lcb_v6": (14, 15), "hle": (14, 15),
                    "gpqa_diamond": (14, 15), "ifeval": (15, 15), "ifbench": (15, 15)}
    both = {name: fits[name, "tables 3-4"][0] + fits[name, "table 6"][0] for name in ("lcb_v5", "lcb_v6")}
    assert both == {"lcb_v5": 13, "lcb_v6": 17}  # of 19
    assert fits["aime24", "table 6"] == fits["aime25", "table 6"] == (0, 4)  # another K
    assert frame.loc[("lcb_v6", "tables 3-4"), "off"] == "rl-math 54.57"
    assert frame.loc[("lcb_v6", "table 6"), "off"] == "merge-ties-math-coding 57.17"
    assert frame.loc[("gpqa_diamond", "tables 3-4"), "off"] == "rl-multi 53.62"
    assert audit.on_grid(33.33, 3, 1) and not audit.on_grid(33.30, 3, 1)
    assert audit.on_grid(100.0, 7, 1) and audit.on_grid(0.0, 7, 1)


def test_standard_errors_bound_the_noise():
    frame = audit.standard_errors().set_index("benchmark")
    assert frame.loc[["lcb_v6", "ifbench", "ifeval"], "se_items"].round(1).tolist() == [3.7, 2.9, 1.1]
    assert frame.loc["avg", "se_draws"] < 1.1 < frame.loc["avg", "se_items"]
    gap = paper.value(4, "merge-ties", "avg") - paper.value(4, "merge-sce", "avg")
    assert gap < frame.loc["avg", "se_draws"]  # four merges cannot be told apart


def test_changes_of_table_6():
    frame = audit.two_expert_changes()
    assert len(frame) == 16 and (frame["printed"] == frame["computed"]).all()


def test_settings_name_their_place():
    frame = paper.settings()
    assert not frame["stated"].isna().any() and (frame["section"] != "").all()
    assert not frame.duplicated(["stage", "name"]).any()
    dare = frame[frame["name"] == "DARE mask ratio"].iloc[0]
    assert dare["stated"] == 0.8 and "0.2" in dare["released"]


def test_printed_contrast_by_hand():
    """IFEval: 541 draws; a contrast of two models has the root of the summed variances."""
    e = printed.generation().contrast({("ifeval", "rl-multi"): 1.0, ("ifeval", "sft"): -1.0})
    variance = (93.53 * 6.47 + 79.48 * 20.52) / 541
    assert e.estimate == pytest.approx(14.05) and e.se == pytest.approx(variance**0.5) and e.n == 541
    assert e.high - e.estimate == pytest.approx(1.96 * e.se, rel=1e-3)
    with pytest.raises(KeyError):
        printed.generation().contrast({("ifeval", "mt-opd-2"): 1.0})
