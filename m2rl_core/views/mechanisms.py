"""Section 3.3: which weights move, and whereto (Table 5, Fig. 3); frames come from `metrics.weights`."""
from __future__ import annotations

from math import isfinite

import pandas as pd
from IPython.display import Markdown

from m2rl_core import paper
from m2rl_core.claims.evidence import REASONING
from m2rl_core.plots import DOMAIN_NAMES

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
              **{c: f"{_two(r[c])}\npaper {printed.loc[r['pair'], c]:.2f}" for c in columns}}
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
    """Fig. 3, both halves of the square: part, expert, other expert, value (projected, mean over matrices), exact."""
    found = cosine[(cosine["layer"] == layer) & ~cosine["bf16"]]
    part = found["matrix"].isin(ATTENTION).map({True: "attention (Q, K, V, O)", False: "FFN (up, down, gate)"})
    mean = found.assign(part=part).groupby(["part", "a", "b"], sort=False)[["cosine_projected", "cosine"]].mean()
    mean = mean.reset_index()
    both = pd.concat([mean, mean.rename(columns={"a": "b", "b": "a"})], ignore_index=True)
    both = both.rename(columns={"a": "expert", "b": "other expert", "cosine_projected": "value"})
    return both.assign(exact=["exact " + _two(c) for c in both["cosine"]])


def directions(cosine: pd.DataFrame) -> pd.DataFrame:
    """Mean cosine by group of pairs and layer, over matrices: group, layer, projected, exact, sd of one projection."""
    found = cosine[~cosine["bf16"]]
    inside = found["a"].isin(REASONING).astype(int) + found["b"].isin(REASONING)
    group = inside.map({2: "reasoning with reasoning", 1: "reasoning with IF, agent", 0: "IF with agent"})
    by = found.assign(group=group).groupby(["group", "layer"])
    return by.agg(projected=("cosine_projected", "mean"), exact=("cosine", "mean"),
                  projection_sd=("projection_sd", "mean"), cells=("cosine", "size")).reset_index()


def directions_shown(found: pd.DataFrame) -> pd.DataFrame:
    """`directions` for the eye: a column a layer, projected (exact)."""
    cells = found.assign(cell=[f"{_two(r.projected)} ({_two(r.exact)})" for r in found.itertuples()])
    wide = cells.pivot(index="group", columns="layer", values="cell")
    wide.columns = [f"layer {layer}" for layer in wide.columns]
    return wide.iloc[::-1].reset_index().rename(columns={"group": "pairs"})


def directions_sentence(found: pd.DataFrame) -> Markdown:
    """Mean cosine of each group of pairs over all layers, and the noise of one projection."""
    mean = found.groupby("group", sort=False)[["projected", "exact"]].mean().iloc[::-1]
    told = "; ".join(f"{group} {_two(r['projected'])} (exact {_two(r['exact'])})" for group, r in mean.iterrows())
    return Markdown(f"Mean over layers and matrices: {told}. One projected cosine has a standard deviation of about "
                    f"{_two(found['projection_sd'].mean())} around its exact value.")
