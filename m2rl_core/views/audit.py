"""Notebook 1: the claims under test, and the paper's own printed numbers put to the question."""
from __future__ import annotations

import math

import altair as alt
import numpy as np
import pandas as pd

from m2rl_core import paper
from m2rl_core.paper import audit
from m2rl_core.pictures import drawing
from m2rl_core.views.opening import VERDICT_COLOURS, interval

NOT_DRAWN = "cannot be decided from printed numbers"


def ledger(decided: list[dict]) -> pd.DataFrame:
    """`claims.decide(None, Evidence())` for a reader: section, claim, printed number, rule and test, the paper's verdict."""
    return pd.DataFrame([{
        "section": c["section"], "id": c["id"], "claim": c["text"], "printed": c["printed"], "rule": c["rule"],
        "test": c["test"], "where": c["where"]["notebook"], "by the paper's numbers":
        c["paper_verdict"], "estimate": interval(*(math.nan if v is None else float(v) for v in (
            c["paper_estimate"], c["paper_low"], c["paper_high"])), 2).replace(" [undefined]", "")} for c in decided])


def ledger_sentence(frame: pd.DataFrame) -> str:
    """How many claims the printed numbers support, contradict, leave open, or cannot decide."""
    count = frame["by the paper's numbers"].value_counts()
    parts = [f"{count.get(name, 0)} {name}" for name in VERDICT_COLOURS]
    return (f"Of {len(frame)} claims, the paper's own printed numbers, read with their sampling noise, leave "
            f"{', '.join(parts)}; {count.get(NOT_DRAWN, 0)} rest on figures or weights and cannot be decided from "
            f"print.")


def audit_summary(rng: np.random.Generator) -> pd.DataFrame:
    """Every number that the paper derives from its own tables, once more: what, printed, recomputed, agrees."""
    blend, means, changes, hours = audit.blend(), audit.averages(), audit.two_expert_changes(), audit.gpu_hours()
    share = hours.set_index("model").loc["rl-multi", "percent_of_experts"]
    overlap, links = audit.random_jaccard(), audit.judge_correlations(rng)
    whole = links[links["dropped"] == ""].set_index("mode")["r"]
    same = (changes["printed"] - changes["computed"]).abs() < 0.005 + 1e-9
    off = blend.loc[~blend["agrees"], "type"].tolist()
    rows = [
        ("Table 1", "proportions", *_count(blend["agrees"], off)),
        ("Tables 4, 7, 8", "averages", *_count(means["agrees"])),
        ("Table 6", "changes against the single expert", *_count(same)),
        ("Table 2, abstract", "GPU hours of RL-Multi, % of the five experts'", f"{_printed('mix-costs-less'):.1f}",
         f"{share:.2f}", round(share, 1) == _printed("mix-costs-less")),
        ("Table 5", "Jaccard overlap of random masks", f"{paper.table(5).loc['random'].iloc[0]:.2f}", f"{overlap:.3f}",
         round(overlap, 2) == paper.table(5).loc["random"].iloc[0]),
        ("Fig. 6", "r of generation and process judging", f"{_printed('process-opposes-generation'):.2f}",
         f"{whole['process']:.2f}", round(whole["process"], 2) == _printed("process-opposes-generation")),
    ]
    return pd.DataFrame(rows, columns=["where", "what", "printed", "recomputed", "agrees"])


def _printed(claim: str) -> float:
    """The number that a claim of `paper.claims()` prints."""
    return float(next(c["printed"] for c in paper.claims() if c["id"] == claim))


def _count(agrees: pd.Series, off: list[str] | None = None) -> tuple[str, str, bool]:
    """How many cells are printed, how many of them come out again, and whether all do."""
    names = f"; not {', '.join(off)}" if off else ""
    return f"{len(agrees)} cells", f"{int(agrees.sum())} the same{names}", bool(agrees.all())


def audit_sentence(summary: pd.DataFrame, blend: pd.DataFrame) -> str:
    """Which derived numbers hold, and by how much the others are off."""
    bad = summary.loc[~summary["agrees"], "where"].tolist()
    lines = blend[~blend["agrees"]]
    off = "; ".join(f"{line.type}: printed {line.printed:.2f} %, the samples give {line.computed:.2f} %"
                    for line in lines.itertuples())
    return (f"{int(summary['agrees'].sum())} of {len(summary)} kinds of derived number come out as printed."
            + (f" Not so: {', '.join(bad)} ({off})." if bad else ""))


def means_with_noise() -> pd.DataFrame:
    """The nine-benchmark mean of every printed model, +-1.96 standard errors: model, kind, value, low, high.

    kind "draws": items fixed, every sample an independent draw; "items": every item one draw.
    """
    means = audit.nine_benchmark_means()
    lines = []
    for line in means.itertuples():
        noise = audit.standard_errors(line.model).iloc[-1]
        for kind, se in (("draws", noise["se_draws"]), ("items", noise["se_items"])):
            lines.append({"model": line.model, "kind": kind, "value": line.avg, "low": line.avg - 1.96 * se,
                          "high": line.avg + 1.96 * se})
    return pd.DataFrame(lines)


def means_chart(frame: pd.DataFrame):
    """`means_with_noise` as dots; the thick line is the noise of the draws, the thin one that of the items."""
    order = list(dict.fromkeys(frame["model"]))
    chosen = drawing.picker()
    base = drawing.base_of(frame).encode(opacity=drawing.strong(chosen))
    x, y = alt.X("low:Q", title="mean of nine benchmarks (%)", scale=alt.Scale(zero=False)), alt.Y(
        "model:N", sort=order, title=None)
    thick, thin = (base.mark_rule(strokeWidth=width, color=colour).encode(x, y, x2="high:Q").transform_filter(
        f"datum.kind == '{kind}'") for kind, width, colour in (("draws", 4, "#7fb3d9"), ("items", 1, "#555555")))
    dots = base.mark_point(filled=True, size=40, color="#0072B2").encode(x="value:Q", y=y).add_params(chosen)
    chart = (thin + thick + dots).properties(width=430, height=15 * len(order))
    return drawing.finish(chart, "What the paper printed, with the noise it did not print",
                         "right is better; thick: samples are the noise, thin: items are (95 %)")


def means_sentence(frame: pd.DataFrame) -> str:
    """How far the best mixed and the best merged model are apart, in units of their noise."""
    draws = frame[frame["kind"] == "draws"].set_index("model")
    merge = next(m for m in draws.index if m.startswith("merge-"))
    gap = draws.loc["rl-multi", "value"] - draws.loc[merge, "value"]
    reach = math.hypot(*(draws.loc[m, "high"] - draws.loc[m, "value"] for m in ("rl-multi", merge)))
    within = draws[draws["value"] > draws["value"].max() - reach].index.tolist()
    return (f"rl-multi leads the best weight merge ({merge}) by {gap:.2f} points; sampling alone moves such a "
            f"difference by "
            f"about ±{reach:.2f} (95 %). Within that reach of the best are {len(within)} models: {', '.join(within)}.")


def correlation_chart(frame: pd.DataFrame):
    """`audit.judge_correlations` as dots: r over all nine models with its interval, and r with each model left out."""
    frame = frame.assign(kind=np.where(frame["dropped"] == "", "all nine models", "one left out"),
                         label="judging by " + frame["mode"])
    base = drawing.base_of(frame)
    y = alt.Y("label:N", title=None)
    x = alt.X("r:Q", title="Pearson's r with the generation average", scale=alt.Scale(domain=[-1, 1]))
    rule = base.mark_rule(strokeWidth=2, color="#0072B2").encode(alt.X("low:Q", title=""), y, x2="high:Q")
    left = base.mark_tick(thickness=1.5, size=18, color="#777777").encode(x, y).transform_filter("datum.dropped != ''")
    dots = base.mark_point(filled=True, size=70, color="#0072B2", opacity=1).encode(x, y).transform_filter(
        "datum.dropped == ''")
    zero = alt.Chart(pd.DataFrame({"r": [0]})).mark_rule(color="#bbbbbb").encode(x="r:Q")
    chart = (zero + rule.transform_filter("datum.dropped == ''") + left + dots).properties(width=430, height=90)
    return drawing.finish(chart, "Does a better generator judge better? (Table 7)",
                         "right of 0: a better generator is a better judge; "
                         "dot and line: nine models, 95 %; ticks: one left out")


def correlation_sentence(frame: pd.DataFrame) -> str:
    """r of both modes with its interval and the model whose omission changes it most."""
    parts = []
    for mode, part in frame.groupby("mode"):
        whole = part[part["dropped"] == ""].iloc[0]
        left = part[part["dropped"] != ""]
        most = left.loc[(left["r"] - whole["r"]).abs().idxmax()]
        parts.append(f"{mode}: r = {interval(whole['r'], whole['low'], whole['high'], 2)} over {int(whole['n'])} "
                     f"models; "
                     f"without {most['dropped']} it is {most['r']:.2f}")
    return "Judging by " + ". Judging by ".join(parts) + "."


def grid_table(grid: pd.DataFrame) -> pd.DataFrame:
    """`audit.grid` for a reader: which item counts and K the printed digits allow, and how telling that is."""
    return pd.DataFrame({
        "benchmark": grid["benchmark"], "values of": grid["set"], "items": grid["items"], "K": grid["k"],
        "fit": [f"{fit} of {n}" for fit, n in zip(grid["fit"], grid["values"], strict=True)],
        "a random value fits (%)": grid["percent_by_chance"].map("{:.1f}".format), "do not fit": grid["off"]})


def grid_sentence(grid: pd.DataFrame) -> str:
    """Where the inferred K explains the digits, and where it does not."""
    main, pairs = (grid[grid["set"] == name] for name in ("tables 3-4", "table 6"))
    none = pairs.loc[pairs["fit"] == 0, "benchmark"].tolist()
    return (f"With these K, {main['fit'].sum()} of {main['values'].sum()} scores of Tables 3 and 4 lie on their grid; "
            f"of "
            f"Table 6 only {pairs['fit'].sum()} of {pairs['values'].sum()} do"
            + (f" (none on {', '.join(none)}: those runs used another K, or averaged runs)." if none else "."))


def finding1_table() -> pd.DataFrame:
    """In how many of Table 7's models judging the process beats judging the outcome, by benchmark."""
    cells = audit.finding1()
    lines = [{"benchmark": b,
              "models in which process beats outcome": f"{int(part['process_better'].sum())} of {len(part)}",
              "mean difference (points)": (part["process"] - part["outcome"]).mean()}
             for b, part in cells.groupby("benchmark", sort=False)]
    return pd.DataFrame(lines)
