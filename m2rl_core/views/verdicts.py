"""Verdicts: the evidence of a run, claims as tables, what agrees with the paper, and quality beside cost."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import isnan

import altair as alt
import numpy as np
import pandas as pd
from IPython.display import Markdown
from scipy.optimize import isotonic_regression

from m2rl_core import claims, paper
from m2rl_core.claims import places
from m2rl_core.claims.evidence import EXPERT, MARGIN, MERGES, Evidence
from m2rl_core.domains import mean_of
from m2rl_core.metrics.stats import average, difference
from m2rl_core.pictures import drawing, plots
from m2rl_core.views import gradients, scores
from m2rl_core.views.grid import Link
from m2rl_core.views.opening import interval

FRAMES = ("scores", "pairs", "along", "costs", "jaccard", "cosine", "kl", "judged")  # costs: gradients too, if measured
COMBINED = {claim["id"] for claim in paper.claims() if claim["test"] == "combined"}
VERDICTS = ("supported", "contradicted", "undecided", "not run", "cannot be decided from printed numbers")
LINE = 0.05  # the height of a name in the headline as a share of the picture's
NAME = 18  # the width of a name in the headline, in points of its horizontal axis
COMPARED = ("sft", *EXPERT.values(), "rl-multi", *MERGES, "mt-opd")


def evidence(run, *frames: str) -> Evidence:
    """What claims are decided on, from a run: any of FRAMES (all where none is named); makes what is missing first.

    "pairs" adds the merges of two experts to the scores; "along" starts with SFT at step 0.
    """
    wanted, found = frames or FRAMES, {}
    unknown = [name for name in wanted if name not in FRAMES]
    if unknown:
        raise ValueError(f"unknown evidence {unknown[0]!r}; there is {', '.join(FRAMES)}")
    scored = not run.profile.only
    if "scores" in wanted and scored:
        two = [name.removeprefix("eval-") for name in run.stages if name.startswith("eval-pair-")]
        models = (*run.members.models, *two) if "pairs" in wanted else run.members.models
        found["scores"] = run.scores(models)
        found["prices"] = {model: run.seconds_a_rollout(model) for model in models}
    if "along" in wanted and run.members.trained and scored:
        found["along"] = scores.along_with_start(run.along(), run.scores(["sft"]))
    if "costs" in wanted and run.members.trained:
        found["costs"] = scores.costs(run)  # a claim of 3.2 rests on what rl-multi noted while it trained
        found["gradients"] = gradients.interference(run)
    for name in ("jaccard", "cosine"):
        if name in wanted and "weights" in run.stages:
            found[name] = run.table("weights", f"{name}.parquet")
    if "kl" in wanted and "neighborhoods" in run.stages:
        found["kl"] = run.table("neighborhoods", "kl.parquet")
    if "judged" in wanted and run.members.judged:
        found["judged"] = run.judged()
    missing = run.not_run()  # benchmarks that could not be had: views show the others, claims that rest on them are not run
    benchmarks = {name: domain for name, domain in run.profile.benchmarks.items() if name not in missing}
    experts = {domain: model for domain, model in run.members.experts.items() if domain in benchmarks.values()}
    return Evidence(**found, benchmarks=benchmarks, experts=experts, seed=run.profile.seed)


def table(lines: Sequence[dict]) -> pd.DataFrame:
    """Verdicts for the eye: the claim and its rule, by the paper's printed numbers and by this run, and where to look.

    The links are to pages of the report: the cell that shows the numbers, and below it the rows that these rest on.
    """
    return pd.DataFrame([{
        "section": line["section"], "claim": f"{line['text']}\nRule: {line['rule']}.",
        "by the paper's numbers": line["paper_verdict"], "paper's estimate": _estimate(line, "paper_"),
        "by this run": line["run_verdict"], "estimate [95 %]": _estimate(line, ""), "n": line["n"] or "",
        "note": line["note"] + _needs(line),
        "where": Link("\n".join([line["where"]["notebook"], *line["where"]["data"]]), places.link(line["where"])),
    } for line in lines])


def _needs(line: dict) -> str:
    """What an open verdict lacks, where the note does not say it already."""
    told = line["run_verdict"] != "undecided" or not line["needs"] or line["needs"] in line["note"]
    return "" if told else f"\nneeds: {line['needs']}"


def _estimate(line: dict, of: str) -> str:
    value, low, high = line[f"{of}estimate"], line[f"{of}low"], line[f"{of}high"]
    if value is None:
        return ""
    if line["id"] in COMBINED:
        return f"parts that hold: {value:.0f}"
    digits = 2 if abs(value) < 10 else 1
    return f"{value:.{digits}f}" if low is None else interval(value, low, high, digits)


def counts(lines: Sequence[dict]) -> pd.DataFrame:
    """How many claims got which verdict: a row a section, a column a source and verdict."""
    rows = []
    for section in [*dict.fromkeys(line["section"] for line in lines), "all"]:
        part = [line for line in lines if section in ("all", line["section"])]
        row = {"section": section, "claims": len(part)}
        for source, key in (("paper", "paper_verdict"), ("here", "run_verdict")):
            count = Counter(line[key] for line in part)
            row |= {f"{source}: {name}": count[name] for name in VERDICTS[:3]}
            last = "not decidable" if source == "paper" else "not run"
            row[f"{source}: {last}"] = sum(count[name] for name in VERDICTS[3:])
        rows.append(row)
    return pd.DataFrame(rows)


def summary(lines: Sequence[dict]) -> Markdown:
    """One sentence of counts."""
    count = Counter(line["run_verdict"] for line in lines)
    told = ", ".join(f"{count[name]} {name}" for name in VERDICTS if count[name])
    return Markdown(f"Of {len(lines)} claims, this run finds: **{told}**.")


def agreement(lines: Sequence[dict], run_verdict: str) -> Markdown:
    """The claims with this verdict of the run, each with what the paper's own numbers say of it."""
    part = [line for line in lines if line["run_verdict"] == run_verdict]
    if not part:
        return Markdown(f"*No claim is {run_verdict} here.*")
    told = []
    for line in part:
        here, theirs = _estimate(line, ""), _estimate(line, "paper_")
        note = line["note"] if run_verdict in ("undecided", "not run") or line["low"] is None else ""
        note += _needs(line).replace("\n", "; ")
        told.append(f"* **{line['text']}** (Section {line['section']}) Here: "
                    + "; ".join(filter(None, [here, note])) + f". By the paper's own numbers: {line['paper_verdict']}"
                    + (f", {theirs}." if theirs else "."))
    return Markdown("\n".join(told))


# Quality beside cost ---------------------------------------------------------------------------------------------

def quality_and_cost(found: Evidence, models: Iterable[str] = COMPARED) -> pd.DataFrame:
    """What each model scores and costs, here and in print: source, model, cost, of, value, low, high.

    `cost`: training beyond SFT in percent of the five experts' together; a merge needs all five and MT-OPD its own
    training on top; the merging itself takes no training. `value`: mean of the benchmarks that `of` names.
    """
    printed = claims.paper_evidence()
    lines = []
    for source, e in (("this run", found), ("the paper, printed", printed)):
        share = scores.shares(e.frame("costs", "model", "hours"))
        extra = {"sft": 0.0, **dict.fromkeys(MERGES, 100.0), "mt-opd": 100 + share["mt-opd"]}
        for model in models:
            mean = e.contrast(average(model, found.benchmarks))
            lines.append({"source": source, "model": model, "cost": extra.get(model, share.get(model)),
                          "of": mean_of(found.benchmarks), "value": mean.estimate, "low": mean.low, "high": mean.high})
    return pd.DataFrame(lines)


def placed(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with `x` (merges of one cost side by side), `at` and `beside` (where each name stands), `floor`, `top`.

    Names keep their points' order and at least a line's distance; what that moves is least in squares. None covers
    a point.
    """
    parts = []
    for _, part in frame.groupby("source", sort=False):
        merges = [m for m in MERGES if m in set(part["model"])]
        shift = {m: 1.8 * (i - (len(merges) - 1) / 2) for i, m in enumerate(merges)}
        part = part.assign(x=part["cost"] + part["model"].map(shift).fillna(0.0))
        floor, top = part[["low", "value"]].min(axis=None) - 1, part[["high", "value"]].max(axis=None) + 1
        far = part["x"] > 80
        part = part.assign(at=part["x"].where(~far, max(part["x"].max(), 100) + 6) + 3 * ~far, floor=floor, top=top)
        for group in (part[far], part[~far]):
            ordered = group["value"].sort_values()
            lines = (top - floor) * LINE * np.arange(len(ordered))
            part.loc[ordered.index, "beside"] = isotonic_regression(ordered.to_numpy() - lines).x + lines
        for i, point in part[~far].iterrows():  # a name goes past the points that it would cover
            hit = part["x"].between(point["x"], point["x"] + NAME) & (
                (part["value"] - part.loc[i, "beside"]).abs() < 0.8 * LINE * (top - floor))
            part.loc[i, "at"] = max(point["at"], part.loc[hit, "x"].max() + 3)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def headline(frame: pd.DataFrame, title: str = "Mix or merge: what each model scores and what it cost"):
    """The study in one picture: mean score against training cost, this run and the paper's printed numbers."""
    frame, mean = placed(frame), f"{frame['of'].iloc[0]} (%)"
    models, chosen = drawing.models_of(frame), drawing.picker()
    charts = []
    for source, part in frame.groupby("source", sort=False):
        reach = [min(part["floor"].iloc[0], part["beside"].min()), max(part["top"].iloc[0], part["beside"].max())]
        scale = alt.Scale(domain=reach, nice=False)
        base = drawing.base_of(part).encode(opacity=drawing.strong(chosen))
        x = alt.X("x:Q", title="training beyond SFT (% of the five experts together)",
                  scale=alt.Scale(domain=[-4, max(part["at"].max(), 100) + 34], nice=False),
                  axis=alt.Axis(values=[0, 25, 50, 75, 100, 125]))
        y = alt.Y("value:Q", title=mean, scale=scale)
        color, shape = drawing.color(models, None), drawing.shape(models, None)
        whiskers = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.3).encode(
            x, alt.Y("low:Q", scale=scale, title=mean), y2="high:Q", color=color)
        leads = base.mark_rule(strokeWidth=0.6, color="#bbbbbb").encode(x, y, x2="at:Q", y2="beside:Q")
        dots = base.mark_point(filled=True, size=65).encode(x, y, color, shape)
        names = base.mark_text(align="left", dx=2, fontSize=10).encode(
            alt.X("at:Q"), alt.Y("beside:Q", scale=scale), text="model:N")  # black: a pale model's name is read too
        charts.append((leads + whiskers + dots + names).properties(
            width=400, height=300, title=alt.TitleParams(source, fontSize=11, anchor="start")))
    how = ("up and left is better; lines: 95 % (paper: sampling noise only); "
           "each merge costs the five experts, they are drawn side by side")
    return drawing.finish(plots.together(charts, chosen), title, how)


def mix_or_merge(found: Evidence) -> Markdown:
    """The answer of this run in words, by the rule of the claims: equal means inside +-2 points."""
    best = found.best(MERGES)
    e = found.contrast(difference("rl-multi", best, found.benchmarks))
    if found.costs is None:
        return Markdown(f"`rl-multi` minus `{best}` (the merge with the best mean, picked on these same items, which favours "
                        f"it): {interval(*e[:3])} points in the {mean_of(found.benchmarks)}. Nothing was trained here, so "
                        "no cost stands beside it.")
    distilled, mean = found.contrast(difference("mt-opd", best, found.benchmarks)), mean_of(found.benchmarks)
    share = scores.shares(found.frame("costs", "model", "hours"))
    cost = share["rl-multi"]
    if isnan(e.low):
        answer = "**Cannot tell**: too few items for an interval."
    elif e.low > -MARGIN and e.high < MARGIN:
        answer = "**The two are equal** here, so the cheaper one is the better buy: " + (
            "**mix**." if cost < 100 else "**merge**.")
    elif e.low > 0:
        answer = "**Mix**: it scores higher" + (" and costs less." if cost < 100 else ", at a higher cost.")
    elif e.high < 0:
        answer = "**Merge**: it scores higher" + (", at a higher cost." if cost < 100 else " and costs less.")
    else:
        answer = "**Cannot tell** which scores higher; " + ("mixing" if cost < 100 else "merging") + " costs less."
    return Markdown(
        f"{answer} `rl-multi` minus `{best}` (the merge with the best mean, picked on these same items, which favours "
        f"it): {interval(*e[:3])} points in the {mean}, at {cost:.0f} % of the experts' training time. "
        f"`mt-opd` minus `{best}`: {interval(*distilled[:3])} points, at {100 + share['mt-opd']:.0f} %.")
