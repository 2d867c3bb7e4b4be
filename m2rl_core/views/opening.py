"""Notebook 0: this machine, what is made and what the rest will cost; and `show`, `interval`, used by others."""
from __future__ import annotations

import html
import math
import re
import shutil
from collections.abc import Mapping

import altair as alt
import numpy as np
import pandas as pd
from IPython.display import HTML

from m2rl_core import paper
from m2rl_core.domains import called
from m2rl_core.paper import audit
from m2rl_core.pictures import drawing
from m2rl_core.progress import duration
from m2rl_core.provenance import machine, packages
from m2rl_core.study import NOT_IN, NotInStudy

VERDICT_COLOURS = {"supported": "#14692f", "contradicted": "#a3170f", "undecided": "#7a5d00"}


def show(frame: pd.DataFrame, formats: Mapping[str, str] | None = None) -> HTML:
    """The frame as an HTML table without its index; `formats` are format specs by column, NaN reads "–"."""
    formats = formats or {}
    body = "".join("<tr>" + "".join(_cell(value, formats.get(name, "")) for name, value in line.items()) + "</tr>\n"
                   for line in frame.to_dict("records"))
    head = "".join(f'<th style="text-align:left">{html.escape(str(name))}</th>' for name in frame.columns)
    return HTML(f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>")


def _cell(value, spec: str) -> str:
    if value is None or isinstance(value, float) and math.isnan(value):
        text = "–"
    elif isinstance(value, bool | np.bool_):
        text = "yes" if value else "no"
    else:
        text = format(value, spec) if spec and not isinstance(value, str) else str(value)
    lines = re.sub(r"\n+", "<br>", html.escape(text))
    colour = VERDICT_COLOURS.get(text)
    style = "text-align:left;vertical-align:top" + (f";color:{colour}" if colour else "")
    style += ";font-family:monospace" if "\n" in text else ";white-space:nowrap" if len(text) <= 28 else ""
    return f'<td style="{style}">{lines}</td>'


def interval(value: float, low: float, high: float, digits: int = 1) -> str:
    """`61.2 [58.1, 64.0]`; "–" where there is no value, "61.2 [undefined]" where a single item gives no interval."""
    if value is None or math.isnan(value):
        return "–"
    if low is None or math.isnan(low):
        return f"{value:.{digits}f} [undefined]"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def miniature(benchmark: str) -> str:
    """How a benchmark is called on every table; a real one, where the profile asks for these, is no "(miniature)"."""
    return called(benchmark)


def machine_table(run, sandbox: str) -> pd.DataFrame:
    """What this machine offers: cores, memory, free disk, packages, and which sandbox runs a model's programs."""
    here, home = machine(), run.root
    while not home.exists():
        home = home.parent
    versions = ", ".join(f"{name} {version}" for name, version in packages().items())
    facts = {"cores": f"{here['cores']}, of which {run.profile.threads} are used", "memory": f"{here['memory_gb']} GB",
             "disk free for the store": f"{shutil.disk_usage(home).free / 2**30:.0f} GB",
             "programs of the model run in": sandbox, "packages": versions}
    return pd.DataFrame({"what": facts.keys(), "here": facts.values()})


def by_kind(plan: pd.DataFrame) -> pd.DataFrame:
    """`run.estimate()` summed over kinds: stages, made, steps, rollouts, tokens, time taken and left ("?": untimed)."""
    lines = []
    for kind, part in plan.groupby("kind", sort=False):
        left = part[~part["done"]]
        lines.append({"kind": kind, "stages": len(part), "made": int(part["done"].sum()), "steps": part["steps"].sum(),
                      "rollouts": part["rollouts"].sum(), "tokens at most": part["tokens"].sum(),
                      "time taken": _clock(part.loc[part["done"], "seconds"]), "time left": _clock(left["seconds"])})
    return pd.DataFrame(lines)


def _clock(seconds: pd.Series) -> str:
    if seconds.empty:
        return "–"
    if seconds.isna().all():
        return "not measured yet"
    return duration(seconds.sum()) + (" + ?" if seconds.isna().any() else "")


def plan_sentence(plan: pd.DataFrame) -> str:
    """What is done and what the rest will cost, in words."""
    left = plan[~plan["done"]]
    if left.empty:
        return f"All {len(plan)} stages are made; they took {duration(plan['seconds'].sum())}. Nothing would run."
    timed = left["seconds"].notna()
    known = f"{duration(left['seconds'].sum())} for the {timed.sum()} that were timed before"
    cost = known if timed.any() else "not known"
    blank = "" if timed.all() else f"; {int((~timed).sum())} have never been timed on this machine"
    return (f"{int(plan['done'].sum())} of {len(plan)} stages are made. {len(left)} are left and will sample at most "
            f"{left['tokens'].sum():,} tokens. Expected time: {cost}{blank}.")


def plan_chart(plan: pd.DataFrame):
    """Where the work goes: seconds of each stage where all are timed, else its most tokens; unmade ones pale."""
    timed = plan["seconds"].notna().all()
    value, title = ("seconds", "seconds") if timed else ("tokens", "tokens at most (not all stages are timed yet)")
    frame = plan[plan[value] > 0].assign(pale=plan["done"].map({True: 1.0, False: 0.35}))
    frame = frame.nlargest(20, value, keep="all").head(20)
    chart = drawing.base_of(frame).mark_bar(color="#0072B2").encode(
        alt.X(f"{value}:Q", title=title), alt.Y("stage:N", sort=list(frame["stage"]), title=None),
        opacity=alt.Opacity("pale:Q", scale=None)).properties(width=430, height=13 * len(frame))
    return drawing.finish(chart, f"The {len(frame)} largest stages", "less is better; pale: not made yet")


def reasons(run) -> pd.DataFrame:
    """Every stage that is not made and why it would run: stage, why."""
    return pd.DataFrame([{"stage": name, "why": "; ".join(run.store.why(stage))}
                         for name, stage in run.stages.items() if not run.has(name)], columns=["stage", "why"])


def cost_beside_paper(run, plan: pd.DataFrame) -> pd.DataFrame:
    """Table 2 beside this profile: steps and rollouts a step of each run, and its share of the five experts' cost."""
    printed, ours = paper.table(2), plan.set_index("stage")
    experts = list(audit.EXPERTS)
    if missing := [model for model in printed.index if model not in run.members.trained]:
        raise NotInStudy(f"{', '.join(missing)}: {NOT_IN} them, so their cost has nothing to stand beside")
    lines = []
    for model in printed.index:
        settings = run.stages[model].settings
        spent, all_spent = ours.loc[model, "seconds"], ours.loc[experts, "seconds"].sum(skipna=False)
        lines.append({
            "model": model, "steps (paper)": printed.loc[model, "steps"], "steps (here)": settings["steps"],
            "prompts x group (paper)": f"{printed.loc[model, 'batch_size']} x {printed.loc[model, 'rollouts']}",
            "prompts x group (here)": f"{settings['prompts']} x {settings['group']}",
            "% of experts' GPU hours (paper)":
                100 * printed.loc[model, "gpu_hours"] / printed.loc[experts, "gpu_hours"].sum(),
            "% of experts' time (here)": 100 * spent / all_spent,
            "% of experts' tokens at most (here)": 100 * ours.loc[model, "tokens"] / ours.loc[experts, "tokens"].sum()})
    return pd.DataFrame(lines)
