"""What would decide an open difference: more items, more samples or more training seeds, and at which cost.

A difference's variance has three parts (`measured.Spread`); each lever shrinks its own only. Costs come from the
seconds that evaluation, and for a seed also training, took here.
"""
from __future__ import annotations

from collections.abc import Iterable
from math import ceil, copysign, inf, isfinite, isinf, isnan, nan

import pandas as pd
from IPython.display import Markdown

from m2rl_core.claims.evidence import MARGIN, MERGES, Evidence, within
from m2rl_core.metrics import stats
from m2rl_core.metrics.stats import Estimate, difference
from m2rl_core.progress import spoken
from m2rl_core.study import SHARED, upstream
from m2rl_core.views.opening import interval

NEVER, ENOUGH = "no number suffices", "what there is may do"


def headlines(evidence: Evidence) -> list[tuple[str, str]]:
    """The differences on which the answer hangs: the mix and the distillation against merges, each pair once."""
    best = evidence.best(MERGES)
    return list(dict.fromkeys([("rl-multi", best), ("rl-multi", "merge-ties"), ("mt-opd", best)]))


def levers(run, evidence: Evidence, pairs: Iterable[tuple[str, str]] | None = None) -> pd.DataFrame:
    """Two lines a pair (a, b): which has the higher mean, and whether they are within the margin of each other.

    difference, low, high, verdict ("" where it is open); line: what it must be told from, with a power of 80 %.
    items, seeds (as they are); items_share, samples_share, seeds_share of the variance in percent (NaN: not known);
    times_items, times_samples, times_seeds (infinite: no number suffices) and the further seconds of each.
    """
    lines = []
    for a, b in headlines(evidence) if pairs is None else pairs:
        e = evidence.contrast(difference(a, b, evidence.benchmarks))
        parts = evidence.measured("scores").spread(difference(a, b, evidence.benchmarks))
        whole = sum(part for part in parts[:3] if not isnan(part))
        seed = e.seconds / parts.runs + training_seconds(run, (a, b))
        known = {"a": a, "b": b, "difference": e.estimate, "low": e.low, "high": e.high, "items": e.n, "seeds": parts.runs,
                 **{f"{name}_share": 100 * part / whole if whole else nan
                    for name, part in zip(("items", "samples", "seeds"), parts, strict=False)}}
        for question, line, verdict in _questions(e):
            times = dict.fromkeys(("items", "samples", "seeds"), inf if whole else nan)  # no spread: nothing to go by
            if whole and e.estimate != line:
                times = stats.levers(parts, e.estimate - line)
            lines.append({
                **known, "question": question, "line": line, "verdict": verdict,
                **{f"times_{name}": value for name, value in times.items()},
                "items_seconds": (times["items"] - 1) * e.seconds, "samples_seconds": (times["samples"] - 1) * e.seconds,
                "seeds_seconds": (times["seeds"] - 1) * parts.runs * seed})
    return pd.DataFrame(lines)


def _questions(e: Estimate) -> list[tuple[str, float, str]]:
    """(question, the line that an open answer must be told from, the answer or "")."""
    higher = "higher" if e.low > 0 else "lower" if e.high < 0 else ""
    answer = {"supported": "equal", "contradicted": "not equal"}.get(within(e).verdict, "")
    return [("which is higher", 0.0, higher),
            (f"equal within {MARGIN:g} points", copysign(MARGIN, e.estimate), answer)]


def training_seconds(run, models: Iterable[str]) -> float:
    """What one more training seed of these models takes, with the experts that they are made of."""
    stages = {stage.name for model in models for stage in upstream(run.stages, model)} - set(SHARED)
    known = [run.expected_seconds(name) for name in sorted(stages)]
    return sum(known) if None not in known else nan


def shown(found: pd.DataFrame) -> pd.DataFrame:
    """`levers` for the eye."""
    return pd.DataFrame([{
        "difference": f"{r.a} minus {r.b}", "points": interval(r.difference, r.low, r.high), "question": r.question,
        "answer": r.verdict or "open", "items": r.items, "training seeds": r.seeds,
        "variance: items / samples / seeds": " / ".join(
            "?" if isnan(share) else f"{share:.0f} %" for share in (r.items_share, r.samples_share, r.seeds_share)),
        **dict(zip(("more items", "more samples an item", "more seeds"),
                   ["–"] * 3 if r.verdict else _levers(r), strict=True)),
    } for r in found.itertuples()])


def _levers(r) -> list[str]:
    items, seeds = (ceil(times * count) if isfinite(times) else 0
                    for times, count in ((r.times_items, r.items), (r.times_seeds, r.seeds)))
    return [_lever(r.times_items, f"{items:,} items", r.items_seconds, "not known: all items alike"),
            _lever(r.times_samples, f"{r.times_samples:.1f} times K", r.samples_seconds,
                   "not known" + ": one sample an item" * (not isnan(r.times_items))),
            _lever(r.times_seeds, f"{seeds:,} seeds", r.seeds_seconds, "not known" + ": one seed" * (r.seeds == 1))]


def _lever(times: float, what: str, seconds: float, unknown: str) -> str:
    if isnan(times):
        return unknown
    if times <= 1:  # it is the interval of few seeds or items that is too wide yet
        return ENOUGH
    if not isfinite(times):
        return NEVER
    return what + (f", {spoken(seconds)} more" if isfinite(seconds) and seconds > 0 else "")


def sentence(found: pd.DataFrame) -> Markdown:
    """What each open difference needs at least, in words."""
    still = found[found["verdict"] == ""]
    if still.empty:
        return Markdown("All of these questions are decided.")
    told = []
    for r, line in zip(still.itertuples(), shown(still).to_dict("records"), strict=True):
        ways = [(inf if isnan(seconds) else seconds, line[name]) for name, times, seconds in (
            ("more items", r.times_items, r.items_seconds), ("more samples an item", r.times_samples, r.samples_seconds),
            ("more seeds", r.times_seeds, r.seeds_seconds)) if 1 < times < inf]
        if isnan(r.times_items):
            told.append(f"* `{r.a}` minus `{r.b}`, {r.question}: all items scored alike, so nothing says what would tell.")
            continue
        best = min(ways)[1] if ways else ENOUGH if r.times_items <= 1 else "no single lever"
        more = "; no K suffices: what varies from item to item or run to run is too much already" * isinf(r.times_samples)
        told.append(f"* `{r.a}` minus `{r.b}`, {r.question}: the cheapest way is **{best}**{more}.")
    return Markdown("\n".join(told))
