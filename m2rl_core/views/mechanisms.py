"""Section 3.3: which weights move, and whereto (Table 5, Fig. 3); frames come from `metrics.weights`."""
from __future__ import annotations

from math import isfinite, sqrt

import pandas as pd
import torch
from IPython.display import Markdown

from m2rl_core import paper
from m2rl_core.claims.evidence import REASONING, Missing
from m2rl_core.domains import DOMAINS
from m2rl_core.pictures.drawing import DOMAIN_NAMES
from m2rl_core.metrics import masks

PRINTED = {"down": "ffn_down", "up": "ffn_up", "gate": "ffn_gate"}  # ours: the paper's, where they differ
ATTENTION = ("q", "k", "v", "o")


def table5(jaccard: pd.DataFrame, layer: int) -> pd.DataFrame:
    """Jaccard overlap of one layer, weights as stored: pair, then for each matrix <m>, <m>_random, <m>_null."""
    found = jaccard[(jaccard["layer"] == layer) & ~jaccard["bf16"]]
    lines = []
    for (a, b), part in found.groupby(["a", "b"], sort=False):
        line: dict[str, object] = {"pair": f"{a}-{b}"}
        for r in part.itertuples():
            name = PRINTED.get(r.matrix, r.matrix)
            line |= {name: r.jaccard, f"{name}_random": r.jaccard_random, f"{name}_null": r.jaccard_null}
        lines.append(line)
    return pd.DataFrame(lines)


def table5_shown(found: pd.DataFrame) -> pd.DataFrame:
    """Table 5 for the eye: ours with the paper's below it, and the two nulls as means over pairs."""
    printed = paper.table(5)
    columns = [c for c in found if f"{c}_random" in found]
    lines = [{"pair": " - ".join(DOMAIN_NAMES[d] for d in r["pair"].split("-")),
              **{c: f"{_two(r[c])}" + (f"\npaper {printed.loc[r['pair'], c]:.2f}" if r["pair"] in printed.index else "")
                 for c in columns}}
             for _, r in found.iterrows()]
    lines.append({"pair": "random masks", **{
        c: f"{_two(found[f'{c}_random'].mean())}\npaper {printed.loc['random', c]:.2f}" for c in columns}})
    lines.append({"pair": "random masks given |w|", **{c: _two(found[f"{c}_null"].mean()) for c in columns}})
    return pd.DataFrame(lines)


def _two(value: float) -> str:
    return f"{value:.2f}" if isfinite(value) else "undefined"


def overlap_sentence(found: pd.DataFrame, layer: int) -> Markdown:
    """How many cells of Table 5 exceed each null; `layer` is the one shown, counted from 0."""
    columns = [c for c in found if f"{c}_random" in found]
    own = found[columns].stack()
    if own.isna().all():
        return Markdown("No weight changed by more than the threshold, so every overlap is undefined.")
    counts = [int((found[columns].to_numpy() > found[[f"{c}_{end}" for c in columns]].to_numpy()).sum())
              for end in ("random", "null")]
    return Markdown(f"Layer {layer} (from 0): of {len(own)} cells, {counts[0]} exceed random masks of the "
                    f"same density, and {counts[1]} exceed masks that are random given $|w|$. "
                    f"Mean overlap: {own.mean():.2f}; "
                    f"the paper's: {paper.table(5).drop('random').to_numpy().mean():.2f}.")


def index_bases(jaccard: pd.DataFrame, layer: int) -> pd.DataFrame:
    """Table 5 at `layer`, counted from 0, and below each cell at the layer of that number counted from 1; empty at 0."""
    here, there = table5(jaccard, layer), table5(jaccard, layer - 1)
    columns = [c for c in there if f"{c}_random" in there]
    return pd.DataFrame([{
        "pair": " - ".join(DOMAIN_NAMES[d] for d in r["pair"].split("-")),
        **{c: f"{_two(r[c])}\nfrom 1: {_two(there.loc[i, c])}" for c in columns},
    } for i, r in here.iterrows()]) if len(there) else pd.DataFrame()


def index_sentence(jaccard: pd.DataFrame, layer: int) -> Markdown:
    """Whether it matters from which number layers are counted."""
    here, there = table5(jaccard, layer), table5(jaccard, layer - 1)
    if here.empty:
        raise Missing(f"no layer {layer} was measured: `analysis.layer` of the profile, counted from 0")
    if there.empty:
        return Markdown(f"Layer {layer} is the first: counted from 1, there is no layer of that number.")
    columns = [c for c in here if f"{c}_random" in here]
    gap = (here[columns] - there[columns]).abs().stack()
    above = [int((t[columns].to_numpy() > t[[f"{c}_null" for c in columns]].to_numpy()).sum()) for t in (here, there)]
    means = [_two(t[columns].stack().mean()) for t in (here, there)]
    return Markdown(f"Counted from 1, layer {layer} is the one before. Mean overlap {means[0]} (from 0) and {means[1]} "
                    f"(from 1); cells differ by {_two(gap.mean())} on average and {_two(gap.max())} at most; {above[0]} and "
                    f"{above[1]} of {gap.size} exceed masks that are random given $|w|$.")


def unchanged_sentence(jaccard: pd.DataFrame) -> Markdown:
    """Which experts are identical to SFT, in how many matrices; nothing where none is."""
    found = jaccard[~jaccard["bf16"]]
    shares = pd.concat([found[["layer", "matrix", side, f"share_{side}"]].set_axis(
        ["layer", "matrix", "expert", "share"], axis=1) for side in "ab"]).drop_duplicates()
    still = shares[shares["share"] == 0].groupby("expert", sort=False).size()
    each = shares.groupby("expert").size()
    return Markdown(" ".join(
        f"{DOMAIN_NAMES[expert]}'s expert is identical to SFT in {n} of {each[expert]} matrices: overlaps and cosines with "
        "it are undefined there." for expert, n in still.items()))


def eta_sentence(eta: float) -> Markdown:
    """The test at `eta` beside bit inequality, on every pair of neighbours among positive finite bfloat16 numbers."""
    numbers = torch.arange(0, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    told = [int(masks.changed(numbers[1:], other, eta).sum()) for other in (numbers[:-1], numbers[1:])]
    bits = [int(masks.changed_bits(numbers[1:], other).sum()) for other in (numbers[:-1], numbers[1:])]
    return Markdown(f"Of all {len(numbers) - 1:,} pairs of neighbouring bfloat16 numbers, {told[0]:,} pass the test at "
                    f"η = {eta:g} and {bits[0]:,} differ in a bit; of as many numbers beside themselves, {told[1]} and "
                    f"{bits[1]}.")


def precision(jaccard: pd.DataFrame, cosine: pd.DataFrame) -> pd.DataFrame:
    """The same measurement on weights as stored and rounded to bfloat16, mean over layers, matrices and pairs."""
    lines = []
    for bf16, part in jaccard.groupby("bf16"):
        share = 100 * pd.concat([part["share_a"], part["share_b"]])
        angle = cosine.loc[cosine["bf16"] == bf16, "cosine"]
        lines.append({
            "weights": "rounded to bfloat16" if bf16 else "as stored", "changed (%)": f"{share.mean():.1f}",
            "smallest, largest matrix (%)": f"{share.min():.1f}, {share.max():.1f}",
            **{name: _two(part[column].mean()) for name, column in (
                ("overlap", "jaccard"), ("random masks", "jaccard_random"), ("random given |w|", "jaccard_null"))},
            "cosine": _two(angle.mean()),
        })
    return pd.DataFrame(lines)


def figure3(cosine: pd.DataFrame, layer: int) -> pd.DataFrame:
    """Fig. 3, both halves of the square: part, expert, other expert, value (projected, mean over matrices), exact.

    The exact value has 1.96 standard errors beside it (see `_error`).
    """
    found = cosine[(cosine["layer"] == layer) & ~cosine["bf16"]]
    if found.empty:
        raise Missing(f"no layer {layer} was measured: `analysis.layer` of the profile, counted from 0")
    part = found["matrix"].isin(ATTENTION).map({True: "attention (Q, K, V, O)", False: "FFN (up, down, gate)"})
    by = found.assign(part=part).groupby(["part", "a", "b"], sort=False)
    mean = by[["cosine_projected", "cosine"]].mean()
    mean = mean.assign(error=by[["matrix", "layer", "cosine_sd"]].apply(_error)).reset_index()
    both = pd.concat([mean, mean.rename(columns={"a": "b", "b": "a"})], ignore_index=True)
    both = both.rename(columns={"a": "expert", "b": "other expert", "cosine_projected": "value"})
    return both.assign(exact=["exact " + _interval(c, e) for c, e in zip(both["cosine"], both["error"], strict=True)])


def _error(cells: pd.DataFrame) -> float:
    """The standard error of a mean of cosines, from those of its cells (`cosine_sd`, or `projection_sd`).

    Matrices are taken as independent; pairs within one matrix share experts, so they are taken as one.
    """
    each = cells.groupby(["layer", "matrix"])[cells.columns[-1]].mean().dropna()
    return sqrt((each**2).sum()) / len(each) if len(each) else float("nan")


def _interval(value: float, error: float) -> str:
    return f"{_two(value)}±{1.96 * error:.2f}" if isfinite(value) and isfinite(error) else _two(value)


def directions(cosine: pd.DataFrame) -> pd.DataFrame:
    """Mean cosine by group of pairs and layer, over matrices: group, layer, projected, exact, error of the exact mean,
    noise that the projection adds to the projected mean, projection_sd of one projection."""
    found = cosine[~cosine["bf16"]]
    inside = found["a"].isin(REASONING).astype(int) + found["b"].isin(REASONING)
    group = inside.map({2: "reasoning with reasoning", 1: "reasoning with IF, agent", 0: "IF with agent"})
    own = sorted({*found["a"], *found["b"]} - {*DOMAINS})  # domains of one's own
    group = group.mask(found["a"].isin(own) | found["b"].isin(own), f"with {', '.join(own)}")
    by = found.assign(group=group, depth=found["layer"]).groupby(["group", "depth"])
    means = by.agg(projected=("cosine_projected", "mean"), exact=("cosine", "mean"),
                   projection_sd=("projection_sd", "mean"), cells=("cosine", "size"))
    errors = {name: by[["layer", "matrix", column]].apply(_error)
              for name, column in (("error", "cosine_sd"), ("noise", "projection_sd"))}
    return means.assign(**errors).rename_axis(["group", "layer"]).reset_index()


def directions_shown(found: pd.DataFrame) -> pd.DataFrame:
    """`directions` for the eye: a column a layer, projected (exact with its interval)."""
    cells = found.assign(cell=[f"{_two(r.projected)} ({_interval(r.exact, r.error)})" for r in found.itertuples()])
    wide = cells.pivot(index="group", columns="layer", values="cell")
    wide.columns = [f"layer {layer}" for layer in wide.columns]
    return wide.iloc[::-1].reset_index().rename(columns={"group": "pairs"})


def directions_sentence(found: pd.DataFrame) -> Markdown:
    """Mean cosine of each group of pairs over all layers, and the noise of one projection."""
    mean = found.groupby("group", sort=False)[["projected", "exact"]].mean().iloc[::-1]
    told = "; ".join(f"{group} {_two(r['projected'])} (exact {_two(r['exact'])})" for group, r in mean.iterrows())
    return Markdown(f"Mean over layers and matrices: {told}. One projected cosine has a standard deviation of about "
                    f"{_two(found['projection_sd'].mean())} around its exact value, a cell of this table of at most "
                    f"{found['noise'].max():.3f}.")
