"""Section 3.2: what training cost, every score beside the paper's, who helps or harms whom, and the merges.

Scores and differences are in points with 95 % intervals over items; differences are paired by item. Functions
take the `Evidence` that the section's claims are decided on, so that tables and verdicts cannot disagree.
"""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import nan

import pandas as pd
from IPython.display import Markdown

from m2rl_core import paper
from m2rl_core.claims import scores as rules
from m2rl_core.claims.evidence import EXPERT, FIGURE2, MERGES, OWN, Evidence
from m2rl_core.domains import BENCHMARKS, mean_of
from m2rl_core.pictures.drawing import DOMAIN_NAMES
from m2rl_core.metrics import stats
from m2rl_core.metrics.stats import average, difference
from m2rl_core.paper import audit
from m2rl_core.study import TRAINED
from m2rl_core.views.grid import bounds
from m2rl_core.views.opening import interval, miniature

PARTS = ("seconds", "seconds_sample", "seconds_verify", "seconds_update")
TABLE3 = ("base", "sft", *EXPERT.values(), "merge-ties", "rl-multi")  # the columns of Table 3
TABLE4 = (*MERGES, "mt-opd")
INTEGRATED = ("rl-multi", *MERGES, "mt-opd")


# Costs (Table 2) -------------------------------------------------------------------------------------------------

def costs(run, models: Iterable[str] = TRAINED) -> pd.DataFrame:
    """What each run did and took: model, prompts, group, steps, rollouts, tokens, seconds (and parts), hours, cpu_hours.

    Seconds are those of the training steps (sampling, verification, update) on this machine; looking at the
    policy on the way is not counted. Processor hours are the trainer's own, without the sandbox's.
    """
    lines = []
    for model in models:
        did, took, settings = run.steps(model), run.timing(model), run.stages[model].settings
        lines.append({
            "model": model, **{name: settings[name] for name in ("prompts", "group", "steps")},
            "rollouts": int(did["rollouts"].sum()), "tokens": int(did["response_tokens"].sum()),
            **{part: float(took[part].sum()) for part in PARTS}, "hours": float(took["seconds"].sum()) / 3600,
            "cpu_hours": float(took["cpu_seconds"].sum()) / 3600,
        })
    return pd.DataFrame(lines)


def shares(spent: pd.DataFrame, column: str = "hours") -> pd.Series:
    """Each model's cost in percent of the five experts' together; index model."""
    return rules.shares(spent.set_index("model")[column])


def table2(spent: pd.DataFrame) -> pd.DataFrame:
    """Table 2 for the eye: ours with the printed GPU hours and both shares of the five experts' cost."""
    printed, ours = paper.table(2), shares(spent)
    theirs = shares(printed["gpu_hours"].rename("hours").rename_axis("model").reset_index())
    total, busy = spent["seconds"].where(spent["seconds"] > 0), 3600 * spent["cpu_hours"]
    return pd.DataFrame({
        "model": spent["model"],
        "prompts x group x steps": [f"{r.prompts} x {r.group} x {r.steps}" for r in spent.itertuples()],
        "paper's": [f"{p.batch_size} x {p.rollouts} x {p.steps}" for p in printed.loc[spent["model"]].itertuples()],
        "rollouts": [f"{n:,}" for n in spent["rollouts"]], "tokens sampled": [f"{n:,}" for n in spent["tokens"]],
        "seconds": [f"{s:,.1f}" for s in spent["seconds"]],
        "sample / verify / update": [" / ".join(f"{100 * r[part] / t:.0f} %" for part in PARTS[1:])
                                     for (_, r), t in zip(spent.iterrows(), total, strict=True)],
        "cores busy": [f"{c / t:.1f}" for c, t in zip(busy, total, strict=True)],
        "% of experts": [f"{ours[m]:.1f}" for m in spent["model"]],
        "paper: GPU hours": [f"{printed.loc[m, 'gpu_hours']:,.1f}" for m in spent["model"]],
        "paper: % of experts": [f"{theirs[m]:.1f}" for m in spent["model"]],
    })


def cost_sentence(spent: pd.DataFrame) -> Markdown:
    """The mix against the five experts, in seconds and in tokens, beside the paper's ratio."""
    printed = audit.gpu_hours().set_index("model")["percent_of_experts"]
    time, processor, tokens = shares(spent), shares(spent, "cpu_hours"), shares(spent, "tokens")
    return Markdown(
        f"`rl-multi` took **{time['rl-multi']:.1f} %** of the five experts' training seconds "
        f"({processor['rl-multi']:.1f} % of their processor time, {tokens['rl-multi']:.1f} % of their sampled tokens); by the "
        f"paper's GPU hours {printed['rl-multi']:.1f} %. "
        f"`mt-opd` adds {time['mt-opd']:.1f} % on top of the experts that it needs, the paper's "
        f"{printed['mt-opd']:.1f} %.")


# Scores (Tables 3 and 4, Fig. 2) -------------------------------------------------------------------------------------

def table(evidence: Evidence, models: Sequence[str]) -> pd.DataFrame:
    """Avg@K of `models` on the nine benchmarks and their mean, in percent, as `stats.score_table` writes it."""
    rows, five = evidence.frame("scores"), {*EXPERT.values()}
    own = [name for name in evidence.experts.values() if name not in five]  # on domains of one's own
    if own and five <= {*models}:
        at = 1 + max(models.index(name) for name in five)
        models = (*models[:at], *own, *models[at:])
    return stats.score_table(rows, evidence.present(models), list(evidence.benchmarks), evidence.rng(), evidence.resamples)


def beside(scores: pd.DataFrame, printed: pd.DataFrame | None = None) -> pd.DataFrame:
    """A score table for the eye: score, interval below it, and below that the paper's number where there is one."""
    columns = [c for c in scores if f"{c}_low" in scores]
    shown = {"model": scores["model"]}
    for column in columns:
        cells = [interval(*values).replace(" [", "\n[") for values in
                 scores[[column, f"{column}_low", f"{column}_high"]].itertuples(index=False)]
        if printed is not None and column in printed:
            theirs = printed[column].reindex(scores["model"])
            cells = [cell + ("" if pd.isna(value) else f"\npaper {value:.1f}")
                     for cell, value in zip(cells, theirs, strict=True)]
        shown[mean_of(c for c in columns if c != "avg") if column == "avg" else miniature(column)] = cells
    return pd.DataFrame(shown)


def printed_scores(benchmarks: Iterable[str] = BENCHMARKS) -> pd.DataFrame:
    """The paper's score of every model of Tables 3 and 4 on those of `benchmarks` that it has: index model.

    `avg`, their mean, is there where it has all: a mean over others would stand beside one that it cannot be compared with.
    """
    benchmarks = list(benchmarks)
    whole = pd.concat([paper.table(3), paper.table(4).drop("merge-ties")])[[b for b in BENCHMARKS if b in benchmarks]]
    return whole.assign(avg=whole.mean(axis=1)) if set(benchmarks) <= set(BENCHMARKS) else whole


def titled(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with benchmark columns named as miniatures and their mean by how many they are, for the titles of charts."""
    ends = ("", "_low", "_high")
    over = [name for name in frame if not name.endswith(ends[1:]) and name not in ("model", "avg")]
    return frame.rename(columns={b + end: miniature(b) + end for b in BENCHMARKS for end in ends}
                        | {"avg" + end: mean_of(over) + end for end in ends})


def at_home(evidence: Evidence) -> pd.DataFrame:
    """Each expert against SFT in its own domain: domain, benchmarks, model, sft, expert, difference, low, high, n, paper.

    The paper's difference is that on the same benchmarks; NaN where it has them not.
    """
    printed, lines = printed_scores(), []
    for domain, model in evidence.experts.items():
        own = evidence.own[domain]
        gap = evidence.contrast(difference(model, "sft", own))
        before, after = (evidence.contrast(average(m, own)).estimate for m in ("sft", model))
        lines.append({"domain": domain, "benchmarks": ", ".join(own), "model": model, "sft": before, "expert": after,
                      "difference": gap.estimate, "low": gap.low, "high": gap.high, "n": gap.n,
                      "paper": (printed.loc[model] - printed.loc["sft"])[own].mean() if domain in OWN else nan})
    return pd.DataFrame(lines)


def at_home_shown(home: pd.DataFrame) -> pd.DataFrame:
    """`at_home` for the eye."""
    return pd.DataFrame({
        "domain": home["domain"].map(DOMAIN_NAMES), "expert": home["model"],
        "benchmarks": [", ".join(map(miniature, names.split(", "))) for names in home["benchmarks"]],
        "SFT": home["sft"].map("{:.1f}".format), "expert's score": home["expert"].map("{:.1f}".format),
        "difference, paired": [interval(r.difference, r.low, r.high) for r in home.itertuples()],
        "items": home["n"], "paper's difference": home["paper"].map(lambda value: "" if pd.isna(value) else f"{value:+.1f}"),
    })


def at_home_sentence(home: pd.DataFrame, points: float = 10) -> Markdown:
    """How many experts learned their own domain, in words."""
    clear = home["low"] > 0
    large = clear & (home["difference"] >= points)
    others = ", ".join(home.loc[~clear, "model"])
    return Markdown(
        f"{clear.sum()} of {len(home)} experts are above SFT at home with the whole interval, {large.sum()} of them by "
        f"{points:g} points or more." + (f" Not shown to have learned: {others}." if others else ""))


def interference(evidence: Evidence, models: Iterable[str] | None = None) -> pd.DataFrame:
    """Every model (by default all experts) against SFT in every domain.

    Columns: model, domain, difference, low, high, n, interval (text).
    """
    lines = []
    for model in evidence.present(models if models is not None else evidence.experts.values()):
        for domain in evidence.domains:
            e = evidence.contrast(difference(model, "sft", evidence.own[domain]))
            lines.append({"model": model, "domain": domain, "difference": e.estimate, "low": e.low, "high": e.high,
                          "n": e.n, "interval": bounds(e.low, e.high)})
    return pd.DataFrame(lines)


def interference_sentence(found: pd.DataFrame) -> Markdown:
    """How many cells away from home are clearly up, clearly down, or open."""
    away = found[found["model"] != "rl-" + found["domain"]]
    if away["difference"].isna().all():
        return Markdown("No expert was tested away from home.")
    up, down = (away["low"] > 0).sum(), (away["high"] < 0).sum()
    worst = away.loc[away["difference"].idxmin()]
    return Markdown(
        f"Away from home, {up} of {len(away)} cells are above SFT with the whole interval, {down} below, "
        f"{len(away) - up - down} can be either. The lowest is `{worst['model']}` on {DOMAIN_NAMES[worst['domain']]}: "
        f"{interval(worst['difference'], worst['low'], worst['high'])} points.")


def along_with_start(along: pd.DataFrame, sft: pd.DataFrame) -> pd.DataFrame:
    """Rows on the way with step 0 in front: SFT's own rows on the same items, as many samples, for every model."""
    columns = [c for c in along if c in sft or c == "step"]
    seen = along[["benchmark", "item"]].drop_duplicates()
    same = sft[sft["sample"] <= along["sample"].max()].merge(seen, on=["benchmark", "item"])
    starts = [same.assign(model=model, step=0) for model in dict.fromkeys(along["model"])]
    return pd.concat([part[columns] for part in (*starts, along)], ignore_index=True)


def trajectories(evidence: Evidence, models: Iterable[str]) -> pd.DataFrame:
    """Fig. 2: model, benchmark, step, value, low, high; the interval is kept for the benchmark's own expert only."""
    steps, lines = evidence.frame("along", "step").groupby("model")["step"].unique(), []
    for domain, benchmark in FIGURE2.items():
        for model in models:
            for step in sorted(steps.get(model, [])):
                e = evidence.contrast({(benchmark, f"{model}@{step}"): 1.0}, of="along")
                home = model == EXPERT[domain]
                lines.append({"benchmark": miniature(benchmark), "model": model, "step": int(step), "value": e.estimate,
                              "low": max(e.low, 0.0) if home else None, "high": min(e.high, 100.0) if home else None})
    return pd.DataFrame(lines).astype({"low": float, "high": float})


# Merges (Table 4) ----------------------------------------------------------------------------------------------------

def diagnoses(run, models: Iterable[str] = MERGES) -> dict[str, dict]:
    """The merge.json of every weight merge."""
    return {model: json.loads((run.need(model) / "merge.json").read_text(encoding="utf-8")) for model in models}


def diagnosis_table(found: Mapping[str, dict]) -> pd.DataFrame:
    """What each merge did, in percent; where experts differ, the range over them."""
    lines = []
    for model, entry in found.items():
        d, p = entry["diagnosis"], entry["recipe"]["parameters"]
        told = [f"{name.replace('_', ' ')} {p[name]:g}" for name in ("density", "drop_rate", "scale") if name in p]
        lines.append({
            "model": model, "recipe": ", ".join([entry["recipe"]["method"], *told]),
            "changed by the experts (%)": _range(d["changed"]), "sign conflict (%)": f"{100 * d['sign_conflict']:.1f}",
            "density that reaches the merge (%)": _range(d["density"]),
            "moved by the merge (%)": f"{100 * d['moved']:.1f}",
            "undone by rounding (%)": f"{100 * d['lost']:.1f}",
        })
    return pd.DataFrame(lines)


def warning_text(found: Mapping[str, dict]) -> Markdown:
    """What the merges warn of, each warning once with the merges that gave it."""
    told: dict[str, list[str]] = {}
    for model, entry in found.items():
        for warning in entry["diagnosis"]["warnings"]:
            told.setdefault(warning, []).append(f"`{model}`")
    lines = [f"* {what} ({'all merges' if len(by) == len(found) else ', '.join(by)})" for what, by in told.items()]
    return Markdown("\n".join(["**Warnings of the merges:**", "", *lines]) if lines else "No merge warns of anything.")


def _range(by_expert: Mapping[str, float]) -> str:
    low, high = 100 * min(by_expert.values()), 100 * max(by_expert.values())
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"


def against_best(evidence: Evidence, models: Sequence[str] = INTEGRATED) -> pd.DataFrame:
    """Mean over the benchmarks and its paired difference to the merge with the best one: model, mean, to the best, paper.

    The paper's mean is over the same benchmarks.
    """
    best, printed, lines = evidence.best(MERGES), printed_scores(evidence.benchmarks).get("avg"), []
    for model in evidence.present(models):
        own = evidence.contrast(average(model, evidence.benchmarks))
        gap = evidence.contrast(difference(model, best, evidence.benchmarks))
        lines.append({
            "model": model, mean_of(evidence.benchmarks): interval(*own[:3]),
            f"minus {best}, paired": "the best here" if model == best else interval(*gap[:3]),
            **({} if printed is None else {
                "paper: mean": f"{printed[model]:.2f}",
                "paper: minus its best": f"{printed[model] - printed[list(MERGES)].max():+.2f}"}),
        })
    return pd.DataFrame(lines)
