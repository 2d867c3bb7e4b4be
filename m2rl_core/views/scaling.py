"""Appendix C: the cost model beside Table 2 and this run, and what it says of larger models and clusters."""
from __future__ import annotations

import math

import altair as alt
import pandas as pd
from IPython.display import Markdown

from m2rl_core.cost import lengths, memory, speed, table2
from m2rl_core.cost.bill import shape_of
from m2rl_core.cost.machines import machine
from m2rl_core.cost.shapes import Shape, published
from m2rl_core.cost.told import clock
from m2rl_core.errors import StudyError
from m2rl_core.pictures import drawing
from m2rl_core.pictures.drawing import DOMAIN_NAMES
from m2rl_core.specs import ModelSpec

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
COLOURS = {"Qwen3-0.6B": "#56B4E9", "Qwen3-4B": "#0072B2", "Qwen3-30B-A3B": "#E69F00", "Qwen3-235B-A22B": "#D55E00"}


def fit_sentence() -> Markdown:
    """What was fitted, what it came to, and how far the two checks are off."""
    fit, checked = table2.fit(), table2.check().query("use == 'check'")
    told = ", ".join(f"{DOMAIN_NAMES[d]} {length:,.0f}" for d, length in fit.lengths.items())
    missed = " and ".join(f"{row['row']} by {row['residual']:+.0f} %" for row in checked.to_dict("records"))
    train, decode = 100 * fit.efficiency.train, 100 * fit.efficiency.decode
    return Markdown(f"Fitted, for {table2.GPUS} {table2.GPU.upper()}: {train:.0f} % of the operations a second that the GPU "
                    f"could do in training and {decode:.0f} % of its memory bandwidth in sampling; mean tokens of an answer: "
                    f"{told}. The model misses {missed}: neither row was fitted.")


def table2_shown() -> pd.DataFrame:
    """Table 2 and the model's hours with their residuals; beside them the model with one length for all domains."""
    return pd.DataFrame([{
        "run": r["row"], "GPU hours (paper)": r["printed"], "model": r["modelled"],
        "residual (%)": r["residual"] if r["use"] == "check" else math.nan, "use": r["use"],
        "tokens an answer": r["tokens an answer"], "one length for all": r["naive"], "its residual (%)": r["naive residual"],
    } for r in table2.check().to_dict("records")])


def table2_chart():
    """Printed against modelled hours of each row; filled: a check, hollow: fitted; grey: one length for all."""
    frame = table2.check()
    order = list(frame["row"])
    base = drawing.base_of(frame.assign(checked=frame["use"] == "check"))
    y = alt.Y("row:N", sort=order, title=None)
    scale = alt.Scale(type="log", nice=False, padding=14)
    layers = [
        base.mark_rule(color="#bbbbbb", strokeWidth=2).encode(alt.X("printed:Q", scale=scale), y, x2="modelled:Q"),
        base.mark_tick(color="#888888", thickness=3, size=14).encode(alt.X("naive:Q", scale=scale), y),
        base.mark_point(color="#0072B2", size=70, strokeWidth=1.5).encode(
            alt.X("modelled:Q", scale=scale, title="GPU hours (log)"), y,
            fill=alt.condition("datum.checked", alt.value("#0072B2"), alt.value("white"))),
        base.mark_point(shape="cross", color="black", size=60, filled=True).encode(alt.X("printed:Q", scale=scale), y)]
    return drawing.finish(alt.layer(*layers).properties(width=430, height=24 * len(order)), "Table 2 and the cost model",
                        "closer to the cross (printed) is better; filled: predicted, hollow: fitted; grey tick: one length")


def own_check(run) -> pd.DataFrame:
    """The same check on this run: a mixed step predicted from the experts' steps, and what is reached at each.

    Columns: model, seconds a step, predicted, residual (%), sampled tokens a second, operations a second in training. Only of
    finished policies; empty where not all experts are.
    """
    experts, rows = run.members.experts, run.profile.rl.rows
    names = [name for name in (*experts.values(), "rl-multi") if name in run.members.trained and run.has(name)]
    if not set(experts.values()) <= set(names):
        return pd.DataFrame()
    found = {name: _rates(run, name) for name in names}
    total = sum(rows[d] for d in experts)
    mixed = sum(rows[d] / total * found[name]["seconds a step"] for d, name in experts.items())
    lines = []
    for name, line in found.items():
        predicted = mixed if name == "rl-multi" else math.nan
        lines.append({"model": name, **line, "predicted": predicted,
                      "residual (%)": 100 * (predicted / line["seconds a step"] - 1)})
    return pd.DataFrame(lines)


def _rates(run, name: str) -> dict[str, float]:
    """Seconds a step, tokens a second and operations a second of one finished policy; the first step is left out."""
    steps = run.steps(name).merge(run.timing(name), on="step")
    steps = steps.iloc[1:] if len(steps) > 1 else steps
    shape, learnt = shape_of(run.profile), 1 - steps["skipped_groups"]
    group = run.stages[name].settings["group"]
    seen = steps["prompt_tokens"].sum() / (steps["rollouts"].sum() / group) + steps["length"].mean() / 2
    tokens = (learnt * (steps["response_tokens"] + steps["prompt_tokens"])).sum()
    work = shape.training(tokens, seen, (learnt * steps["response_tokens"]).sum())
    return {"seconds a step": steps["seconds"].mean(),
            "tokens a second (sampling)": steps["response_tokens"].sum() / steps["seconds_sample"].sum(),
            "operations a second (training)": work / steps["seconds_update"].sum()}


def own_sentence(found: pd.DataFrame) -> Markdown:
    """How far the mixed run of this report is from the mix of its experts, beside the paper's."""
    checked = found.dropna(subset="predicted") if len(found) else found
    if checked.empty:
        return Markdown("Not all experts and the mixed run are made here, so there is nothing to check.")
    paper = table2.check().set_index("row")["residual"]["rl-multi"]
    line = checked.iloc[0]
    return Markdown(f"A step of rl-multi is predicted at {line['predicted']:.2f} s from the experts' steps and took "
                    f"{line['seconds a step']:.2f} s ({line['residual (%)']:+.0f} %; {paper:+.0f} % on Table 2).")


def work_of(model: str) -> speed.Work:
    """One step as in Table 2: the paper's batch, group, longest answer and its mix of domains' lengths."""
    fit = table2.fit()
    spread = lengths.mixture({fit.lengths[d]: share for d, share in table2.mix().items()}, table2.LONGEST)
    return speed.Work(128 * 16, table2.PROMPT, spread, table2.LONGEST, 16)


def scaled(gpu: str = "h100") -> pd.DataFrame:
    """A row for each model and number of GPUs: bytes a GPU, seconds of a step and its parts, what bounds it, or why not."""
    named, lines = machine(gpu), []
    for model, shape in published().items():
        for gpus in GPUS:
            lines.append({"model": model, "GPUs": gpus, **_scaled(shape, named, gpus, work_of(model))})
    return pd.DataFrame(lines)


def _scaled(shape: Shape, named, gpus: int, work: speed.Work) -> dict:
    tokens = max(speed.MICRO_TOKENS, work.longest + work.prompt)
    found = speed.step(shape, named, gpus, work, table2.fit().efficiency)
    held, least = (memory.training(shape, n, tokens) for n in (found.shard or gpus, gpus))
    return {"over all": least.total / 1e9, "there": (1 - memory.SPARE) * named.memory / 1e9,
            "sharded over": found.shard or gpus, "GB a GPU": held.total / 1e9,
            "optimizer": (held.master + held.moments + held.gradient) / 1e9, "activations": held.activations / 1e9,
            "seconds": found.seconds, "sample": found.sample, "train": found.train,
            "update": found.update, "bound": found.bound, "why": found.why,
            "GPU hours a step": found.seconds * gpus / 3600}


def scaled_shown(found: pd.DataFrame) -> pd.DataFrame:
    """The rows for the eye."""
    error = table2.error()
    return pd.DataFrame([{
        "model": r["model"], "GPUs": r["GPUs"],
        "memory a GPU": f"{r['GB a GPU']:,.0f} GB\n{r['optimizer']:,.0f} state, {r['activations']:,.0f} activations",
        "a step": f"does not fit\n{r['why']}" if r["why"] else
                  f"{clock(r['seconds'])}\n{clock(r['seconds'] / error)} to {clock(r['seconds'] * error)}",
        "sampling": "–" if r["why"] else clock(r["sample"]), "training": "–" if r["why"] else clock(r["train"]),
        "weights to the sampler": "–" if r["why"] else f"{r['update']:.2g} s", "bound by": r["bound"],
        "GPU hours a step": "–" if r["why"] else f"{r['GPU hours a step']:,.1f}"} for r in found.to_dict("records")])


def scaled_chart(found: pd.DataFrame, gpu: str = "H100"):
    """Seconds of a step over the number of GPUs, one line a model; the band is the model's error on Table 2."""
    error = table2.error()
    frame = found[found["why"] == ""].assign(low=lambda f: f["seconds"] / error, high=lambda f: f["seconds"] * error,
                                             bound=lambda f: f["bound"].str.replace(": ", ", by "))
    base, models = drawing.base_of(frame), list(COLOURS)
    x = alt.X("GPUs:Q", scale=alt.Scale(type="log", base=2), axis=alt.Axis(values=list(GPUS)), title=f"number of {gpu}")
    colour = alt.Color("model:N", scale=alt.Scale(domain=models, range=list(COLOURS.values())), title=None)
    scale = alt.Scale(type="log", zero=False, domain=[frame["low"].min() * 0.8, frame["high"].max() * 1.2], nice=False)
    y = alt.Y("seconds:Q", scale=scale, title="seconds of a step (log)")
    layers = [base.mark_area(opacity=0.2).encode(x, alt.Y("low:Q", scale=scale), alt.Y2("high:Q"), colour),
              base.mark_line().encode(x, y, colour), base.mark_point(size=50, filled=True).encode(
                  x, y, colour, shape=alt.Shape("bound:N", title="longest part", legend=alt.Legend(labelLimit=260)))]
    return drawing.finish(alt.layer(*layers).properties(width=430, height=280), "A step of GRPO on larger models and clusters",
                        "lower is better; band: the error on Table 2; no mark: it does not fit")


def memory_chart(found: pd.DataFrame, gpu: str = "H100"):
    """Bytes on each GPU in training where all of them share the state; above the rule it does not fit."""
    base = drawing.base_of(found)
    x = alt.X("GPUs:Q", scale=alt.Scale(type="log", base=2), axis=alt.Axis(values=list(GPUS)), title=f"number of {gpu}")
    y = alt.Y("over all:Q", scale=alt.Scale(type="log", nice=False, padding=10), title="GB on each GPU (log)")
    colour = alt.Color("model:N", scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values())), title=None)
    layers = [base.mark_line(point=True).encode(x, y, colour),
              base.mark_rule(color="#a3170f", strokeDash=[4, 3]).encode(alt.Y("there:Q"))]
    return drawing.finish(alt.layer(*layers).properties(width=430, height=240),
                        "Memory in training, state sharded over all GPUs",
                        "lower is better; dashed: what can be had; what is left at the right are activations and one layer")


def scaling_sentence(found: pd.DataFrame) -> Markdown:
    """For each model the fewest GPUs, and where more of them stop paying."""
    told = []
    for model, rows in found.groupby("model", sort=False):
        there = rows[rows["why"] == ""]
        if there.empty:
            told.append(f"* `{model}` fits none of these clusters.")
            continue
        fewest, best = there.iloc[0], there.loc[there["GPU hours a step"].idxmin()]
        last = there.iloc[-1]
        times = last["GPU hours a step"] / best["GPU hours a step"]
        told.append(f"* `{model}` needs {fewest['sharded over']} GPUs or more to train; a step is cheapest on {best['GPUs']} "
                    f"of the numbers below ({best['GPU hours a step']:,.1f} GPU hours). On {last['GPUs']} it takes "
                    f"{clock(last['seconds'])} and "
                    f"{times:.1f} times as many GPU hours; {last['bound']} bounds it.")
    return Markdown("\n".join(told))


def own_shape(run) -> str:
    """The profile's model in the words of the cost model: parameters and operations a token."""
    try:
        shape = shape_of(run.profile)
    except StudyError as error:  # brought, and not here yet
        return str(error)
    kind = "trained from scratch" if isinstance(run.profile.model, ModelSpec) else "brought"
    return (f"This profile's model ({kind}) has {shape.parameters:,} parameters, takes "
            f"{shape.forward(1, 1) / 1e6:,.1f} million operations for a token and "
            f"{shape.key_values(4):,} bytes for its keys and values.")
