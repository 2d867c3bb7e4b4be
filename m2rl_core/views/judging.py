"""Section 3.6: models as judges of their own answers: Table 7, Figs. 6 to 8, and what accuracy hides.

A judge that always says yes is right as often as its model is, so beside the paper's accuracy stand balanced
accuracy (mean of the shares judged rightly among right and among wrong answers) and the share of yes.
"""
from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import isfinite, isnan, nan

import pandas as pd
from IPython.display import Markdown

from m2rl_core import paper
from m2rl_core.claims.evidence import EXPERT, JUDGED, Evidence, Missing
from m2rl_core.metrics import stats
from m2rl_core.metrics.stats import average
from m2rl_core.paper import audit
from m2rl_core.progress import duration
from m2rl_core.study import JUDGED as JUDGES
from m2rl_core.views.grid import bounds
from m2rl_core.views.opening import interval, miniature

MODES = ("outcome", "process")
SHORT = {"generation": "gen", "outcome": "out", "process": "proc"}  # Table 7's columns
INTEGRATED = ("sft", "merge-ties", "rl-multi", "mt-opd")


def prompts(run) -> Markdown:
    """The judge prompts of this run, as its judge stage recorded them."""
    found = json.loads((run.need(f"judge-{JUDGES[0]}") / "prompts.json").read_text(encoding="utf-8"))
    return Markdown("\n\n".join(f"**{mode}**\n\n~~~~text\n{text}\n~~~~" for mode, text in found.items()))


def judged(evidence: Evidence) -> tuple[list[str], list[str]]:
    """The models and benchmarks of this study's Table 7: the paper's, less what the study leaves out, and what is its own."""
    rows, five = evidence.frame("judged"), {*EXPERT.values()} <= {*evidence.experts.values()}
    models, on = (list(dict.fromkeys(rows[name])) for name in ("model", "benchmark"))
    if five:  # what is missing of the paper's own is shown as undefined
        models, on = [*JUDGES, *(m for m in models if m not in JUDGES)], [*JUDGED, *(b for b in on if b not in JUDGED)]
    return models, on


def scores(evidence: Evidence, models: Sequence[str] = ()) -> pd.DataFrame:
    """Generation and judging, long: model, benchmark ("avg": mean of all, the paper's four), mode, value, low, high, n."""
    lines, (there, judges_on) = [], judged(evidence)
    for model in models or there:
        for mode in SHORT:
            of, column = ("first", model) if mode == "generation" else ("judged", f"{model}/{mode}")
            for benchmark in (*judges_on, "avg"):
                on = judges_on if benchmark == "avg" else [benchmark]
                if not all(evidence.measured(of).has(b, column) for b in on):
                    lines.append({"model": model, "benchmark": benchmark, "mode": mode, "value": nan, "low": nan,
                                  "high": nan, "n": 0})
                    continue
                e = evidence.contrast(average(column, on), of=of)
                lines.append({"model": model, "benchmark": benchmark, "mode": mode, "value": e.estimate,
                              "low": max(e.low, 0.0) if isfinite(e.low) else nan,
                              "high": min(e.high, 100.0) if isfinite(e.high) else nan, "n": e.n})
    return pd.DataFrame(lines)


def table7(found: pd.DataFrame) -> pd.DataFrame:
    """Table 7, wide: model, then <bench>_gen, <bench>_gen_low, <bench>_gen_high, <bench>_out, ..., avg_proc_high."""
    lines, places = [], list(dict.fromkeys(found["benchmark"]))
    for model, part in found.groupby("model", sort=False):
        line: dict[str, object] = {"model": model}
        ordered = part.assign(place=part["benchmark"].map(places.index)).sort_values("place", kind="stable")
        for r in ordered.itertuples():
            name = f"{r.benchmark}_{SHORT[r.mode]}"
            line |= {name: r.value, f"{name}_low": r.low, f"{name}_high": r.high}
        lines.append(line)
    return pd.DataFrame(lines)


def table7_shown(found: pd.DataFrame) -> pd.DataFrame:
    """Table 7 for the eye: in each cell "gen / out / proc", below it their intervals and the paper's three."""
    printed, cells = paper.table(7), found.set_index(["model", "benchmark", "mode"])
    lines, on = [], list(dict.fromkeys(found["benchmark"]))
    mean = f"mean of {'four' if on[:-1] == list(JUDGED) else len(on) - 1}"
    for model in dict.fromkeys(found["model"]):
        line = {"model": model}
        for benchmark in on:
            own = [cells.loc[(model, benchmark, mode)] for mode in SHORT]
            told = [" / ".join("undefined" if isnan(r.value) else f"{r.value:.1f}" for r in own)]
            told += [f"{short} {bounds(r.low, r.high)}" for short, r in zip(SHORT.values(), own, strict=True)]
            if model in printed.index and (mean.endswith("four") if benchmark == "avg" else benchmark in JUDGED):
                told.append("paper " + " / ".join(f"{printed.loc[model, f'{benchmark}_{s}']:.1f}" for s in SHORT.values()))
            line[mean if benchmark == "avg" else miniature(benchmark)] = "\n".join(told)
        lines.append(line)
    return pd.DataFrame(lines)


def quality(rows: pd.DataFrame | None, evidence: Evidence) -> pd.DataFrame:
    """For each model, benchmark and mode, in percent: accuracy, balanced with low and high, yes, right, unreadable, n.

    `balanced` is NaN where all judged answers were right, or all wrong; its interval is over items, and undefined
    where there is a single answer of a kind. `right` is the share of right answers among those that were judged; a
    reply that is neither yes nor no is unreadable and counts as wrong.
    """
    rows = evidence.frame("judged") if rows is None else rows  # Missing, where nobody judged
    if rows.empty:
        raise Missing("no answer was judged")
    lines, cells = [], _kinds(rows, evidence)
    for (model, benchmark, mode), part in rows.groupby(["model", "benchmark", "mode"], sort=False):
        both = part["truth"].nunique() == 2
        e = cells[model].contrast({(benchmark, mode): 1.0}) if both else stats.Estimate(nan, nan, nan, 0, nan)
        lines.append({
            "model": model, "benchmark": benchmark, "mode": mode, "accuracy": 100 * part["correct"].mean(),
            "balanced": e.estimate, "low": max(e.low, 0.0) if isfinite(e.low) else nan,
            "high": min(e.high, 100.0) if isfinite(e.high) else nan, "yes": 100 * (part["said"] == 1).mean(),
            "right": 100 * part["truth"].mean(), "unreadable": 100 * (part["said"] == -1).mean(),
            "n": part["item"].nunique(),
        })
    return pd.DataFrame(lines)


def _kinds(rows: pd.DataFrame, evidence: Evidence) -> dict[str, stats.Measured]:
    """Each model's judgements, a column a mode; right and wrong answers are strata of equal weight: balanced accuracy."""
    rows = rows.assign(category=rows["truth"].astype(str), score=rows["correct"].astype(float))
    found = {}
    for model, part in rows.groupby("model", sort=False):
        both = part.groupby(["benchmark", "item"])["mode"].transform("nunique") == part["mode"].nunique()
        found[model] = stats.measure(part[both], evidence.rng(), column="mode", resamples=evidence.resamples)
    return found


def quality_shown(found: pd.DataFrame, evidence: Evidence) -> pd.DataFrame:
    """`quality` averaged over benchmarks, the balanced accuracy with its interval: a row a model and mode.

    Balanced accuracy counts the benchmarks with at least two answers of each kind, so that it has an interval.
    """
    lines, cells = [], _kinds(evidence.frame("judged"), evidence)
    for (model, mode), part in found.groupby(["model", "mode"], sort=False):
        mean = part[["accuracy", "yes", "right", "unreadable"]].mean()
        on, told = list(part.loc[part["low"].notna(), "benchmark"]), "undefined"
        if on:
            e = stats.widen(cells[model].contrast({(benchmark, mode): 1 / len(on) for benchmark in on}))
            told = f"{interval(*e[:3])} ({len(on)} of {len(part)} benchmarks)"
        lines.append({
            "model": model, "mode": mode, "accuracy": f"{mean['accuracy']:.1f}",
            "balanced accuracy (50: no skill)": told, "says yes": f"{mean['yes']:.1f}",
            "answers that are right": f"{mean['right']:.1f}", "unreadable": f"{mean['unreadable']:.1f}",
        })
    return pd.DataFrame(lines)


def quality_sentence(found: pd.DataFrame, always: float = 95.0) -> Markdown:
    """Whether the judges can tell right from wrong at all, by mode, and which always say the same."""
    told = []
    for mode in MODES:
        known = found[found["mode"] == mode].dropna(subset="balanced")
        told.append(f"{mode}: {known['balanced'].mean():.1f} (from {known['balanced'].min():.1f} to "
                    f"{known['balanced'].max():.1f}, {len(known)} cells, of which {(known['low'] > 50).sum()} are clearly "
                    f"above 50 and {(known['high'] < 50).sum()} clearly below)" if len(known) else f"{mode}: undefined")
    no = 100 - found["yes"] - found["unreadable"]
    same = found[(found["yes"] >= always) | (no >= always)]
    said = f"No judge gives one and the same verdict in {always:.0f} % of its replies or more on any benchmark"
    if len(same):
        names = ", ".join(f"`{r.model}` on {miniature(r.benchmark)} by {r.mode} ({'yes' if r.yes >= always else 'no'}, "
                          f"accuracy {r.accuracy:.1f}, balanced {'undefined' if isnan(r.balanced) else f'{r.balanced:.1f}'})"
                          for r in same.itertuples())
        said = (f"{len(same)} of {len(found)} judges (model, benchmark, mode) give one and the same verdict in {always:.0f} % "
                f"of their replies or more: {names}")
    free = found.assign(constant=found[["right"]].assign(wrong=100 - found["right"]).max(axis=1))
    beaten = (free["constant"] >= free["accuracy"]).sum()
    return Markdown("Balanced accuracy, mean over models and benchmarks (50: no skill): " + "; ".join(told) + f". {said}. "
                    f"In {beaten} of {len(found)} cells a judge that always said the more frequent truth would be at least as "
                    "accurate.")


def budget(run, rows: pd.DataFrame, wanted: int = 8) -> Markdown:
    """K and items of this run's judging beside the paper's Avg@8, and what that would cost here."""
    k, items = rows["sample"].nunique(), rows.groupby(["model", "benchmark"])["item"].nunique()
    spent = sum(run.manifest(f"judge-{model}")["seconds"] for model in dict.fromkeys(rows["model"]))
    many = f"{items.min()}" if items.nunique() == 1 else f"{items.min()} to {items.max()}"
    told = (f"Here: Avg@{k}, one answer to each of {many} items a benchmark, where the paper has Avg@{wanted}. All judging "
            f"took {duration(spent)}")
    if k < wanted:
        told += (f"; Avg@{wanted} would take about {duration(spent * wanted / k)} (`analysis.judge_k` of the profile) and "
                 "narrow only the part of the intervals that comes from the judge's own sampling, not that from the items")
    return Markdown(f"{told}.{_unjudged(run, dict.fromkeys(rows['model']))}")


def _unjudged(run, models: Iterable[str]) -> str:
    """A sentence on the answers that no judge saw because they left no room for its words; "" where all were judged."""
    lost = []
    for model in models:
        path = run.need(f"judge-{model}") / "unjudged.json"  # missing where all of an older run was judged
        for mode, line in (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}).items():
            if line["no room"]:
                lost.append(f"`{model}` {line['no room']} of {line['answers']} by {mode}")
    return f" Not judged, because the question was too long for the model's context: {', '.join(lost)}." if lost else ""


def figure6(found: pd.DataFrame) -> pd.DataFrame:
    """Fig. 6: mode, model, x (mean generation), y (mean judging), over the four benchmarks."""
    mean = found[found["benchmark"] == "avg"].pivot(index="model", columns="mode", values="value").dropna()
    mean = mean.loc[[m for m in dict.fromkeys(found["model"]) if m in mean.index]]
    return pd.concat([pd.DataFrame({"mode": f"{mode} judging", "model": mean.index, "x": mean["generation"].to_numpy(),
                                    "y": mean[mode].to_numpy()}) for mode in MODES], ignore_index=True)


def correlations(points: pd.DataFrame, evidence: Evidence) -> pd.DataFrame:
    """r of generation and judging, here and by the paper's Table 7, with interval and leave-one-out range."""
    printed, lines = audit.judge_correlations(evidence.rng()), []
    for mode in MODES:
        own = points[points["mode"] == f"{mode} judging"]
        e = stats.Estimate(nan, nan, nan, len(own), nan)
        if len(own) > 2:
            e = stats.pearson(own["x"], own["y"], evidence.rng())  # as the claims' rule draws it
        left = stats.leave_one_out(own["model"], own["x"], own["y"]).set_index("dropped")["r"]
        theirs = printed[printed["mode"] == mode].set_index("dropped")
        whole, rest = theirs.loc[""], theirs.drop("")["r"]
        lines.append({
            "judging": mode, "r here": interval(*e[:3], 2) if isfinite(e.estimate) else "undefined: a side is constant",
            "leaving one model out": _range(left), "models": e.n,
            "r by the paper's Table 7": interval(whole["r"], whole["low"], whole["high"], 2),
            "its leave-one-out": _range(rest), "paper's text": "-0.53" if mode == "process" else "positive, no number",
        })
    return pd.DataFrame(lines)


def _range(values: pd.Series) -> str:
    """Smallest and largest r, each with the model whose absence makes it."""
    known = values.dropna()
    if known.empty:
        return "undefined"
    return f"{known.min():.2f} (without {known.idxmin()}) to {known.max():.2f} (without {known.idxmax()})"


def figure7(found: pd.DataFrame) -> pd.DataFrame:
    """Fig. 7: both ways of judging by benchmark and model."""
    part = found[(found["mode"] != "generation") & (found["benchmark"] != "avg")].dropna(subset="value")
    return part.assign(benchmark=part["benchmark"].map(miniature))


def figure8(found: pd.DataFrame, models: Sequence[str] = INTEGRATED) -> pd.DataFrame:
    """Fig. 8: generation, outcome and process of the models that serve all domains, mean of the four benchmarks."""
    part = found[(found["benchmark"] == "avg") & found["model"].isin(list(models))].dropna(subset="value")
    if part.empty:
        without = found[found["value"].isna() & (found["benchmark"] != "avg")]["benchmark"].unique()
        raise Missing(f"no model has scores and judgements on all benchmarks: {', '.join(without) or 'some'} is missing")
    return part


def modality_sentence(found: pd.DataFrame) -> Markdown:
    """In how many cells process judging is better, by benchmark, beside the paper's Table 7."""
    cells = found[found["benchmark"] != "avg"]
    wide = cells.pivot(index=["benchmark", "model"], columns="mode", values="value").dropna()
    theirs = audit.finding1().groupby("benchmark")["process_better"].agg(["sum", "size"])
    told = []
    for benchmark in dict.fromkeys(cells["benchmark"]):
        own = wide[wide.index.get_level_values("benchmark") == benchmark]
        beside = f" (paper {theirs.loc[benchmark, 'sum']} of {theirs.loc[benchmark, 'size']})" if benchmark in JUDGED else ""
        told.append(f"{miniature(benchmark)} {(own['process'] > own['outcome']).sum()} of {len(own)}{beside}")
    return Markdown("Models for which judging the process is better: " + "; ".join(told) + ".")
