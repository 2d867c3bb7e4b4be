"""Section 3.2: does the ranking of the merges survive other readings of what the paper leaves open?

One row a variant of `study.SWEEP`, its mean over the benchmarks and its paired difference to the method's own reading, and the
place that it would take among the six methods if only this reading were changed.
"""
from __future__ import annotations

import json
from collections.abc import Mapping

import pandas as pd
from IPython.display import Markdown

from m2rl_core.claims.evidence import MERGES
from m2rl_core.domains import BENCHMARKS, mean_of
from m2rl_core.metrics import stats
from m2rl_core.metrics.stats import average, difference
from m2rl_core.views.opening import interval

READINGS = {"scale": "scale λ", "density": "density of TIES", "threshold": "threshold", "select": "share that SCE selects",
            "drop_rate": "drop rate of DARE", "out_dtype": "stored as"}


def readings(rows: pd.DataFrame, rng, resamples: int) -> pd.DataFrame:
    """One line a variant, the methods' own readings first.

    Columns: model (the method's row of Table 4), varied ("" for its own reading), value, of (what benchmarks), mean with low
    and high, shift (paired difference to the own reading) with shift_low and shift_high, place (1 is best), n items.
    """
    found = stats.measure(rows, rng, resamples=resamples)
    asked = set(rows["benchmark"])
    on = [b for b in (*BENCHMARKS, *sorted(asked - set(BENCHMARKS))) if b in asked]
    means = {name: found.contrast(average(name, on)) for name in dict.fromkeys(rows["model"])}
    lines = []
    for name, mean in means.items():
        model, _, change = name.partition(" ")
        varied, _, value = change.partition("=")
        shift = found.contrast(difference(name, model, on)) if change else stats.Estimate(0.0, 0.0, 0.0, mean.n, 0.0)
        better = sum(means[other].estimate > mean.estimate for other in MERGES if other != model)
        lines.append({"model": model, "varied": varied, "value": value, "of": mean_of(on), "mean": mean.estimate,
                      "low": mean.low, "high": mean.high, "shift": shift.estimate, "shift_low": shift.low,
                      "shift_high": shift.high, "place": 1 + better, "n": mean.n})
    return pd.DataFrame(lines)


def shown(found: pd.DataFrame) -> pd.DataFrame:
    """`readings` for the eye."""
    return pd.DataFrame({
        "merge": found["model"],
        "reading": [f"{READINGS[r.varied]}: {r.value}" if r.varied else "as in Table 4" for r in found.itertuples()],
        found["of"].iloc[0]: [interval(r.mean, r.low, r.high) for r in found.itertuples()],
        "minus Table 4's reading, paired": [interval(r.shift, r.shift_low, r.shift_high) if r.varied else ""
                                            for r in found.itertuples()],
        "place among the six": found["place"],
    })


def drawn(found: pd.DataFrame) -> pd.DataFrame:
    """`readings` for `plots.readings`: method by method, its own reading first."""
    found = found.sort_values(["model", "varied", "value"], key=lambda c: c.map(MERGES.index) if c.name == "model" else c)
    labels = [r.model + (f", {READINGS[r.varied]} {r.value}" if r.varied else "") for r in found.itertuples()]
    return found.assign(label=labels, own=found["varied"] == "").drop(columns="value").rename(columns={"mean": "value"})


def merges(run) -> dict[str, dict]:
    """merge.json of every variant of the sweep, by its name."""
    return json.loads((run.need("sweep") / "merges.json").read_text(encoding="utf-8"))


def rounding(merges: Mapping[str, dict]) -> pd.DataFrame:
    """What storing each merge in bfloat16 loses: of the weights that it moves, the share that rounding puts back, and
    the sum of absolute rounding errors over the sum of absolute changes; `merges` is the sweep's merges.json."""
    stored = {name.split(" ")[0]: entry["diagnosis"] for name, entry in merges.items() if name.endswith("=bfloat16")}
    return pd.DataFrame([{
        "merge": model, "moved by the merge (%)": f"{100 * d['moved']:.1f}",
        "undone by rounding (%)": f"{100 * d['lost']:.1f}",
        "rounding error / change (%)": f"{100 * d['rounding']:.1f}"} for model, d in stored.items()])


def sentence(found: pd.DataFrame) -> Markdown:
    """Who leads under which reading, and how many single changes matter beyond noise."""
    own, changed = found[found["varied"] == ""], found[found["varied"] != ""]
    leader, best = own.loc[own["mean"].idxmax(), "model"], own["mean"].max()
    tied = int((own["mean"] == best).sum()) - 1
    leads = changed[(changed["place"] == 1) & (changed["model"] != leader) & (changed["mean"] > best)]
    falls = changed[(changed["place"] > 1) & (changed["model"] == leader)]
    clear = changed[(changed["shift_low"] > 0) | (changed["shift_high"] < 0)]

    def named(part: pd.DataFrame) -> str:
        return ", ".join(f"`{r.model}` at {READINGS[r.varied]} {r.value}" for r in part.itertuples()) or "none"

    return Markdown(
        f"Under the readings of Table 4 `{leader}` leads on these items{f', level with {tied} more' if tied else ''}. Another "
        f"method takes the lead under {len(leads)} of {len(changed)} single changes ({named(leads)}); `{leader}` loses it by "
        f"changes of its own in {len(falls)} ({named(falls)}). The change moves a method's own score beyond its interval in "
        f"{len(clear)} of {len(changed)} ({named(clear)}).")
