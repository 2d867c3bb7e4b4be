"""Appendix C's tables, sentences and pictures, on the cost model and on a run made by hand."""
import math
from types import SimpleNamespace

import pandas as pd
import pytest

from m2rl_core import paper
from m2rl_core.cost import table2
from m2rl_core.profile import load_profile
from m2rl_core.run import open_run
from m2rl_core.study import Members, study
from m2rl_core.views import scaling


class Made:
    """A finished run whose experts take 1 to 5 seconds a step, and rl-multi `mixed`."""

    def __init__(self, mixed: float, left_out: tuple[str, ...] = ()):
        self.profile = load_profile("smoke")
        self.stages, self.members, self.mixed, self.left_out = study(self.profile), Members.of(self.profile), mixed, left_out

    def has(self, name: str) -> bool:
        return name not in self.left_out

    def steps(self, name: str) -> pd.DataFrame:
        return pd.DataFrame({"step": [1, 2, 3], "response_tokens": 800, "prompt_tokens": 200, "length": 10.0, "rollouts": 80,
                             "skipped_groups": 0.5})

    def timing(self, name: str) -> pd.DataFrame:
        seconds = self.mixed if name == "rl-multi" else 1.0 + list(self.members.experts.values()).index(name)
        return pd.DataFrame({"step": [1, 2, 3], "seconds": [99.0, seconds, seconds], "seconds_sample": seconds / 2,
                             "seconds_update": seconds / 4})


def test_own_check_by_hand():
    """Smoke's domains have as many prompts each, so a mixed step should take the mean of 1 to 5; the first is left out."""
    found = scaling.own_check(Made(4.0)).set_index("model")
    assert found.loc["rl-multi", "predicted"] == pytest.approx(3.0)
    assert found.loc["rl-multi", "residual (%)"] == pytest.approx(-25)
    assert found.loc["rl-math", "seconds a step"] == 1.0 and math.isnan(found.loc["rl-math", "predicted"])
    assert found.loc["rl-math", "tokens a second (sampling)"] == pytest.approx(1600)
    shape = scaling.shape_of(load_profile("smoke"))
    seen = 200 / (80 / 2) + 5
    assert found.loc["rl-math", "operations a second (training)"] == pytest.approx(shape.training(500, seen, 400) / 0.25)
    said = scaling.own_sentence(scaling.own_check(Made(4.0))).data
    assert "predicted at 3.00 s" in said and "took 4.00 s (-25 %;" in said


def test_own_check_says_what_is_missing(tmp_path):
    for left_out in (("rl-if",), ("rl-multi",)):
        assert "nothing to check" in scaling.own_sentence(scaling.own_check(Made(4.0, left_out))).data
    assert scaling.own_check(open_run("smoke", tmp_path)).empty  # asks for nothing to be made
    assert not list(tmp_path.iterdir())
    assert scaling.own_check(open_run("released", tmp_path)).empty


def test_fitted_rows_show_no_residual():
    """Catches a fit that is shown as if it had been predicted."""
    shown = scaling.table2_shown().set_index("run")
    assert shown.loc["rl-math":"rl-agent", "residual (%)"].isna().all()
    assert shown.loc[["rl-multi", "mt-opd"], "residual (%)"].notna().all()
    assert list(shown["GPU hours (paper)"]) == list(paper.table(2)["gpu_hours"])
    said = scaling.fit_sentence().data
    assert f"rl-multi by {shown.loc['rl-multi', 'residual (%)']:+.0f} %" in said and "Coding" in said


def test_scaling_says_what_fits_and_what_bounds_it():
    found = scaling.scaled()
    assert len(found) == 4 * len(scaling.GPUS) and ((found["why"] == "") == found["seconds"].notna()).all()
    large = found[found["model"] == "Qwen3-235B-A22B"].set_index("GPUs")
    assert large.loc[8, "why"] and large.loc[8, "over all"] > large.loc[8, "there"] and not large.loc[1024, "why"]
    for _, rows in found[found["why"] == ""].groupby("model"):
        assert rows["seconds"].is_monotonic_decreasing and rows["GPU hours a step"].is_monotonic_increasing
    assert (found["GB a GPU"][found["why"] == ""] <= found["there"][found["why"] == ""]).all()
    shown = scaling.scaled_shown(found)
    assert shown["a step"].str.startswith("does not fit").sum() == (found["why"] != "").sum()
    said = scaling.scaling_sentence(found).data
    assert said.count("\n") == 3 and "`Qwen3-235B-A22B` needs 256 GPUs or more" in said


def test_pictures_hold_every_row():
    found = scaling.scaled()
    for chart, rows in ((scaling.table2_chart(), 7), (scaling.scaled_chart(found), (found["why"] == "").sum()),
                        (scaling.memory_chart(found), len(found))):
        data = chart.to_dict()["datasets"]
        assert max(len(part) for part in data.values()) == rows


def test_the_work_is_table_2_s():
    work = scaling.work_of("Qwen3-4B")
    assert work.rollouts == 2048 and work.mean == pytest.approx(table2.fit().mean, rel=0.01) and work.longest == 32768
    assert "918,912 parameters" in scaling.own_shape(SimpleNamespace(profile=load_profile("tiny")))
    assert "the shape of" in scaling.own_shape(SimpleNamespace(profile=load_profile("byo")))  # its models are not here
