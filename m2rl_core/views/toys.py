"""Notebook 2: each method on a toy of two parameters, by the package's own functions."""
from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from m2rl_core.pictures import drawing
from m2rl_core.training.losses import Loss, advantages, importance_weights, policy_loss
from m2rl_core.training.losses import reverse_kl
from m2rl_core.merging import merge_state
from m2rl_core.models.policy import Policy

CLIP = (0.2, 0.28)
GROUPS = (("base", "#555555", "square"), ("expert", "#E69F00", "circle"), ("merged", "#0072B2", "diamond"))


def advantage_chart(group: int):
    """GRPO's advantage of a right and of a wrong answer by how many of the group's `group` answers are right."""
    rewards = torch.tensor([[1.0] * right + [0.0] * (group - right) for right in range(group + 1)])  # (G + 1, G)
    found = advantages(rewards)
    ends = [(k, "right", 0) for k in range(1, group + 1)] + [(k, "wrong", -1) for k in range(group)]
    frame = pd.DataFrame([{"right": k, "answer": name, "advantage": float(found[k, at])} for k, name, at in ends])
    kinds = ["right", "wrong"]
    title = "an answer that is"
    color = alt.Color("answer:N", title=title, scale=alt.Scale(domain=kinds, range=["#009E73", "#D55E00"]))
    shape = alt.Shape("answer:N", title=title, scale=alt.Scale(domain=kinds, range=["circle", "square"]))
    base = drawing.base_of(frame).encode(alt.X("right:O", title=f"right answers in the group of {group}",
                                         axis=alt.Axis(labelAngle=0)), alt.Y("advantage:Q"), color)
    chart = (base.mark_line() + base.mark_point(filled=True, size=50, opacity=1).encode(shape))
    return drawing.finish(chart.properties(width=330, height=190),
                         "A rare success counts most, a unanimous group nothing",
                         "above 0: the answer is made likelier; no direction is good in itself")


def importance_chart(low: float, high: float):
    """`importance_weights` of a token by its log-ratio, trainer - sampler, under none, tis and mis."""
    gap = torch.linspace(-1.2, 1.2, 241)
    lines = []
    for kind in ("none", "tis", "mis"):
        loss = Loss("grpo", 1.0, *CLIP, kind, low, high)
        weight, counted = importance_weights(gap, torch.zeros_like(gap), torch.arange(len(gap)), loss)
        lines.append(pd.DataFrame({"gap": gap.tolist(), "weight": (weight * counted).tolist(), "kind": kind}))
    chart = drawing.base_of(pd.concat(lines)).mark_line(clip=True).encode(
        alt.X("gap:Q", title="log of the ratio trainer / sampler"), alt.Y("weight:Q", title="weight of the token"),
        alt.Color("kind:N", title=None,
                  scale=alt.Scale(domain=["none", "tis", "mis"], range=["#999999", "#E69F00", "#0072B2"])),
        strokeDash=alt.StrokeDash("kind:N", title=None, scale=alt.Scale(
            domain=["none", "tis", "mis"], range=[[1, 0], [6, 3], [2, 2]])))
    return drawing.finish(chart.properties(width=330, height=170),
                         "Truncate (tis) or mask (mis) where sampler and trainer differ",
                         f"bounds {low:g} and {high:g}; no direction is good in itself")


def plane(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], points: Mapping[str, Tensor],
          title: str,
          shifts: Mapping[str, Tensor] | None = None):
    """The plane of the two weights: lines from the base to the experts (dashed: `shifts` as trimmed), and `points`."""
    origin = base["w"]
    arrows = [{"name": f"expert {n}", "kind": "full", "end": e["w"]} for n, e in experts.items()]
    arrows += [{"name": f"{n}, trimmed", "kind": "trimmed", "end": origin + s} for n, s in (shifts or {}).items()]
    lines = pd.DataFrame([{"line": i, "kind": a["kind"], "x": float(p[0]), "y": float(p[1])}
                          for i, a in enumerate(arrows) for p in (origin, a["end"])])
    marks = [{"name": "base", "x": float(origin[0]), "y": float(origin[1]), "group": "base"}]
    marks += [{"name": a["name"], "x": float(a["end"][0]), "y": float(a["end"][1]), "group": "expert"} for a in arrows]
    marks += [{"name": f"{n} ({p[0]:.4g}, {p[1]:.4g})", "x": float(p[0]), "y": float(p[1]), "group": "merged"}
              for n, p in points.items()]
    x, y = (alt.X("x:Q", title="weight 1", scale=alt.Scale(domain=[-3, 8])),
            alt.Y("y:Q", title="weight 2", scale=alt.Scale(domain=[0, 6])))
    path = alt.Chart(lines).mark_line(color="#999999").encode(x, y, detail="line:N", strokeDash=alt.StrokeDash(
        "kind:N", legend=None, scale=alt.Scale(domain=["full", "trimmed"], range=[[1, 0], [4, 3]])))
    groups, colours, shapes = zip(*GROUPS, strict=True)
    marks = pd.DataFrame(marks)
    dots = drawing.base_of(marks).mark_point(filled=True, size=80, opacity=1).encode(
        x, y, alt.Color("group:N", legend=None, scale=alt.Scale(domain=groups, range=colours)),
        alt.Shape("group:N", legend=None, scale=alt.Scale(domain=groups, range=shapes)))
    top = max(float(p[1]) for p in points.values())
    places = {"base": (-9, 0, "right"), "expert": (9, 0, "left"), "upper": (9, -7, "left"), "lower": (9, 8, "left")}
    height = marks["y"].ge(top).map({True: "upper", False: "lower"})
    marks["place"] = marks["group"].where(marks["group"] != "merged", height)
    names = [alt.Chart(marks[marks["place"] == place]).mark_text(dx=dx, dy=dy, align=align, fontSize=10).encode(
        x, y, text="name:N") for place, (dx, dy, align) in places.items()]
    return drawing.finish(alt.layer(path, dots, *names).properties(width=400, height=230), title,
                        "lines: what each expert changed; no direction is good in itself")


def dare_cloud(base, experts, drop_rates: tuple[float, ...], seeds: int) -> pd.DataFrame:
    """TA+DARE under many seeds: rate, seed, x, y of the merged point."""
    return pd.DataFrame([
        {"rate": rate, "seed": seed, "x": float(point[0]), "y": float(point[1])}
        for rate in drop_rates for seed in range(seeds)
        for point in [merge_state(base, experts, "ta-dare", drop_rate=rate, seed=seed)["w"]]])


def cloud_chart(cloud: pd.DataFrame, target: Tensor):
    """`dare_cloud` as bubbles (size: how often), their mean and the task-arithmetic point `target`; a facet a rate."""
    counts = cloud.groupby(["rate", "x", "y"], as_index=False).size()
    means = cloud.groupby("rate", as_index=False)[["x", "y"]].mean()
    frame = pd.concat([counts.assign(what="draws"), means.assign(what="their mean", size=counts["size"].max()),
                       means.assign(x=float(target[0]), y=float(target[1]), what="without dropping",
                                    size=counts["size"].max())])
    frame["facet"] = "drop rate " + frame["rate"].map("{:g}".format)
    kinds = ["draws", "their mean", "without dropping"]
    chart = drawing.base_of(frame).mark_point(strokeWidth=1.8).encode(
        alt.X("x:Q", title="weight 1"), alt.Y("y:Q", title="weight 2"),
        alt.Color("what:N", title=None, scale=alt.Scale(domain=kinds, range=["#56B4E9", "#D55E00", "#000000"])),
        alt.Shape("what:N", title=None, scale=alt.Scale(domain=kinds, range=["circle", "cross", "square"])),
        alt.Size("size:Q", legend=None, scale=alt.Scale(range=[15, 160]))).properties(width=190, height=190)
    chart = chart.facet(facet=alt.Facet("facet:N", title=None), columns=3)
    return drawing.finish(chart, "DARE keeps the mean and pays in variance",
                         "nearer the square is better; bubble: how many seeds end there")


def identity_policy(tokens: int) -> Policy:
    """A policy whose output layer is the identity: a hidden state is the logits of the next token, (N, tokens)."""
    return Policy({"model.embed_tokens.weight": torch.eye(tokens)}, None, None)


def logits_of(parameters: Tensor) -> Tensor:
    """Three logits from two parameters, the third fixed at 0; (2,) to (1, 3)."""
    return F.pad(parameters, (0, 1))[None]


def full_loss(parameters: Tensor, teacher: Tensor) -> Tensor:
    """Exact reverse KL of the toy student to the toy teacher, through `losses.reverse_kl`."""
    head = identity_policy(3)
    return reverse_kl(head, head, logits_of(parameters), teacher[None], 1.0).sum()


def sampled_loss(parameters: Tensor, teacher: Tensor, generator: torch.Generator, tokens: int) -> Tensor:
    """The policy loss of `tokens` tokens that the student drew, each with advantage log q - log p."""
    logp = F.log_softmax(logits_of(parameters)[0], -1)
    drawn = torch.multinomial(logp.detach().exp(), tokens, replacement=True, generator=generator)
    advantage = (F.log_softmax(teacher, -1) - logp.detach())[drawn]
    return policy_loss(logp[drawn], logp[drawn].detach(), advantage, *CLIP).mean()


def distil_paths(start: Tensor, teacher: Tensor, steps: int, tokens: int, lr: float, seed: int) -> pd.DataFrame:
    """Gradient descent on both losses from one start: path, step, x, y, kl (nats)."""
    generator, lines = torch.Generator().manual_seed(seed), []
    for name in ("full", f"sampled, {tokens} tokens a step"):
        at = start.clone()
        for step in range(steps + 1):
            at.requires_grad_(True)
            exact = full_loss(at, teacher)
            loss = exact if name == "full" else sampled_loss(at, teacher, generator, tokens)
            (slope,) = torch.autograd.grad(loss, at)
            lines.append({"path": name, "step": step, "x": at[0].item(), "y": at[1].item(), "kl": exact.item()})
            at = (at - lr * slope).detach()
    return pd.DataFrame(lines)


def paths_chart(paths: pd.DataFrame, teacher: Tensor):
    """`distil_paths` over the reverse KL as a map; left in the plane of the parameters, right the KL by step."""
    span = torch.linspace(-2.4, 2.4, 33)
    grid = pd.DataFrame([{"x": float(a), "y": float(b), "KL": float(full_loss(torch.stack([a, b]), teacher))}
                         for a in span for b in span])
    names = list(dict.fromkeys(paths["path"]))
    x, y = (alt.X("x:Q", title="parameter 1", scale=alt.Scale(domain=[-2.4, 2.4], nice=False)),
            alt.Y("y:Q", title="parameter 2", scale=alt.Scale(domain=[-2.4, 2.4], nice=False)))
    color = alt.Color("path:N", title=None, scale=alt.Scale(domain=names, range=["#000000", "#D55E00"]))
    back = drawing.base_of(grid).mark_square(size=75, opacity=1, clip=True).encode(x, y, color=alt.Color(
        "KL:Q", scale=alt.Scale(scheme="blues"), legend=None))
    dash = alt.StrokeDash("path:N", title=None, scale=alt.Scale(domain=names, range=[[1, 0], [5, 2]]))
    lines = alt.Chart(paths).mark_line(strokeWidth=1.8).encode(x, y, color, dash, order="step:Q")
    goal = alt.Chart(pd.DataFrame([{"x": float(teacher[0] - teacher[2]),
                                    "y": float(teacher[1] - teacher[2])}])).mark_point(
        shape="cross", size=120, color="#009E73", filled=True).encode(x, y)
    left = alt.layer(back, lines, goal).resolve_scale(color="independent").properties(width=240, height=240)
    right = alt.Chart(paths).mark_line(strokeWidth=1.8).encode(
        alt.X("step:Q"), alt.Y("kl:Q", title="reverse KL (nats)"), color.copy().legend(None),
        dash.copy().legend(None))
    right = right.properties(width=240, height=240)
    chart = alt.hconcat(left, right).resolve_scale(color="independent")
    return drawing.finish(chart, "Two ways down to the teacher",
                         "cross: the teacher; darker: farther from it; lower KL is better")
