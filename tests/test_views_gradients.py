"""What 3.3 and A show of gradients, on small frames that can be worked out by hand."""
from __future__ import annotations

import math
from types import SimpleNamespace

import pandas as pd
import pytest

from m2rl_core.metrics import gradient_noise, interference
from m2rl_core.pictures import drawing, plots
from m2rl_core.views import gradients, training

NAN = float("nan")


def looks(cosines, group="all weights", a="coding", b="math"):
    return pd.DataFrame({"step": range(1, 1 + len(cosines)), "group": group, "a": a, "b": b, "cosine": cosines})


def noises(sampled, full, group="all weights"):
    """Traces of both by step; the full gradient's mean has norm 2, four parts."""
    return pd.concat([pd.DataFrame({"step": range(1, 1 + len(traces)), "group": group, "estimator": name, "parts": 4,
                                    "trace": traces, "norm": 2.0, "noise": [t / 16 for t in traces]})
                      for name, traces in (("sampled", sampled), ("full", full), ("sampled - full", sampled))])


def test_names_are_those_of_the_measurements():
    """Catches a group or an estimator that is called another thing where it is measured: it would be lost here."""
    names = ["model.embed_tokens.weight", "model.norm.weight", *(
        f"model.layers.{i}.{part}.weight" for i in range(3)
        for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"))]
    assert {interference.WHOLE, *(interference.group_of(name, 3) for name in names)} == set(gradients.ORDER)
    assert gradients.GAP == gradient_noise.GAP


def test_mean_over_steps_by_hand():
    """Faults: a normal for a t interval, an undefined step counted, an interval from a single step."""
    e = gradients.over_steps(pd.Series([0.1, NAN, 0.3]))
    assert (e.estimate, e.n) == (pytest.approx(0.2), 2) and e.high == pytest.approx(0.2 + 12.7062 * 0.1, abs=1e-4)
    alone = gradients.over_steps(pd.Series([0.1]))
    assert alone.estimate == 0.1 and alone.n == 1 and math.isnan(alone.low)
    assert math.isnan(gradients.over_steps(pd.Series([NAN])).estimate)


def test_pairs_that_agree_and_conflict():
    seen = pd.concat([looks([0.5, 0.52, 0.48]), looks([-0.3, -0.31, -0.29], a="agent"), looks([0.4, -0.4, 0.1], b="science"),
                      looks([NAN] * 3, a="if"), looks([0.9] * 3, "MLP, last third"), looks([0.7] * 3, "embedding"),
                      looks([0.6] * 3, "last norm")])
    found = gradients.cosines(seen)
    said = gradients.interference_sentence(found, 25).data
    assert "of 3 pairs of domains 1 pull together" in said and "1 against one another" in said
    assert "lowest Agent with Math (-0.300), highest Coding with Math (0.500); at most 3 steps measured, every 25" in said
    both = gradients.square(found)
    assert list(dict.fromkeys(both["group"])) == ["all weights", "embedding", "MLP, last third"]
    assert len(both) == 2 * (3 + 2) and set(both["domain"]) == set(both["other domain"])
    shown = gradients.cosines_shown(found)
    assert list(shown["pair"]) == ["Coding - Math", "Coding - Science", "Agent - Math", "IF - Math"]
    assert shown.loc[0, "lowest in"] == "0.600 (last norm)" and shown.loc[0, "highest in"] == "0.900 (MLP, last third)"
    assert list(shown["steps"]) == [3, 3, 3, 0] and shown.loc[3, "cosine, all weights [95 %]"] == "–"
    drawing.png(plots.heatmap(both, "t", "other domain", "domain", facet="group", columns=4))


def test_variances_by_hand():
    """Faults: a mean of ratios for that of their logarithms, the ratio upside down, variance of a part for the mean's."""
    seen = pd.concat([noises([8.0, 32.0], [4.0, 4.0]), noises([0.0, 0.0], [0.0, 0.0], "last norm")])
    ratio = gradients.ratios(seen)
    assert list(ratio["group"]) == ["all weights"]  # where there was no gradient there is no ratio
    assert ratio.loc[0, "value"] == pytest.approx(4) and ratio.loc[0, "n"] == 2
    assert ratio.loc[0, "high"] == pytest.approx(math.exp(math.log(4) + 12.7062 * math.log(2)), rel=1e-4)
    pairs = gradients.noise_pairs(seen).set_index("side")["value"]
    assert pairs["ours"] == pytest.approx(4 / 4 / 4) and pairs["other"] == pytest.approx(20 / 4 / 4)
    timing = pd.DataFrame({"seconds_full": [2.0, NAN, 4.0], "seconds_sampled": [2.0, NAN, 2.0]})
    said = gradients.noise_sentence(seen, timing, 15).data
    assert said.startswith("At 2 measured steps (every 15), the sampled tokens' gradient had 4.0 [")
    assert "took 1.50 times as long" in said and "leave 125 % of" in said
    shown = gradients.noise_shown(seen)
    assert shown.loc[0, "noise by squared mean, full (%)"] == 25 and len(shown) == 1
    drawing.png(plots.against(gradients.noise_pairs(seen), "t"))


def test_profiles_that_do_not_look_say_so():
    """Fault: a notebook that fails, or shows an empty picture, where the option is at its default."""
    never = {"rl": SimpleNamespace(interference_every=0), "opd": SimpleNamespace(variance_every=0)}
    run = SimpleNamespace(profile=SimpleNamespace(**never))
    seen, found = gradients.noise(run), gradients.cosines(gradients.interference(run))
    assert "`interference_every` is zero" in gradients.interference_sentence(found, 0).data
    assert "`variance_every` is zero" in gradients.noise_sentence(seen, pd.DataFrame(), 0).data
    assert gradients.square(found).empty and gradients.noise_pairs(seen).empty


def test_looked_but_saw_nothing():
    """Fault: a crash where no group had two different rewards, or the teachers are the student."""
    assert "no cosine is defined" in gradients.interference_sentence(gradients.cosines(looks([])), 1).data
    assert "no variance is defined" in gradients.noise_sentence(noises([0.0], [0.0]), pd.DataFrame(), 1).data
    assert gradients.noise_pairs(noises([0.0], [0.0])).empty


def test_looks_have_a_line_of_their_own_in_the_cost():
    """Fault: seconds of a measurement counted as the update's, or twice (a look's parts are in its sum)."""
    timing = pd.DataFrame({"seconds_sample": [2.0, 2.0], "seconds_verify": [1.0, 1.0], "seconds_update": [3.0, 3.0]})
    steps = pd.DataFrame({"step": [1, 2]})
    assert "comparing gradients" not in set(training.cost_table(timing, steps, 20)["part"])
    looked = timing.assign(seconds_variance=[4.0, NAN], seconds_sampled=[1.5, NAN], seconds_full=[2.0, NAN])
    found = training.cost_table(looked, steps, 20).set_index("part")["seconds"]
    assert found["comparing gradients"] == 4 and found["updating"] == 6 and found["all"] == 20
