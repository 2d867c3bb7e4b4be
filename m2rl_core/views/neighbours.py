"""Section 3.4: whose policy is near whose (Fig. 4, Eq. 1), and what merging two experts does (Table 6).

Divergences and scores come through the `Evidence` that the claims are decided on. A divergence is that of a
whole response, in nats.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, nan

import numpy as np
import pandas as pd
from IPython.display import Markdown

from m2rl_core import paper
from m2rl_core.claims.evidence import Evidence
from m2rl_core.metrics import nearness, stats
from m2rl_core.metrics.stats import difference
from m2rl_core.pictures import drawing, plots
from m2rl_core.pictures.drawing import DOMAIN_NAMES
from m2rl_core.views.grid import bounds
from m2rl_core.views.opening import interval

POLICIES = ("rl-multi", "merge-ties", "mt-opd")
PAIRS = ["domain", "partner", "model", "kl", "near", "change", "low", "high", "n", "paper"]
FACTOR = 1.5  # epsilon of Eq. 1 in units of the own expert's divergence, as the claims' rules have it


def divergences(evidence: Evidence, policies: Sequence[str] = POLICIES) -> pd.DataFrame:
    """Fig. 4: policy, data (domain of the prompts), expert (domain of who answers), kl, low, high, n, interval."""
    lines = []
    for policy in evidence.present(policies, "kl"):
        for data in evidence.domains:
            for expert in evidence.domains:
                e = evidence.contrast({(data, f"{evidence.experts[expert]}>{policy}"): 1.0}, of="kl")
                lines.append({"policy": policy, "data": data, "expert": expert, "kl": e.estimate, "low": e.low,
                              "high": e.high, "n": e.n, "interval": bounds(e.low, e.high, 2)})
    return pd.DataFrame(lines)


def changes(evidence: Evidence, policies: Sequence[str] = POLICIES) -> pd.DataFrame:
    """KL to the own expert beside the change against it: policy, domain, kl, kl_low, kl_high, change, low, high."""
    lines = []
    for policy in evidence.present(policies, "kl"):
        for domain, expert in evidence.experts.items():
            kl = evidence.contrast({(domain, f"{expert}>{policy}"): 1.0}, of="kl")
            gap = evidence.contrast(difference(policy, expert, evidence.own[domain]), of="first")
            lines.append({"policy": policy, "domain": domain, "kl": kl.estimate, "kl_low": kl.low, "kl_high": kl.high,
                          "change": gap.estimate, "low": gap.low, "high": gap.high})
    return pd.DataFrame(lines)


def changes_shown(found: pd.DataFrame) -> pd.DataFrame:
    """`changes` for the eye: a row a policy and domain."""
    return pd.DataFrame({
        "policy": found["policy"], "domain": found["domain"].map(DOMAIN_NAMES),
        "KL(own expert || policy), nats": [interval(r.kl, r.kl_low, r.kl_high, 3) for r in found.itertuples()],
        "change against the expert, points": [interval(r.change, r.low, r.high) for r in found.itertuples()],
    })


def link_sentence(found: pd.DataFrame, evidence: Evidence) -> Markdown:
    """r of divergence and change over all points, with its bootstrap interval; points in the order of the rule."""
    found = found.sort_values("policy", kind="stable")
    e = stats.pearson(found["kl"], found["change"], evidence.rng())
    if not isfinite(e.estimate):
        return Markdown("r is undefined: divergence or change is the same everywhere.")
    return Markdown(f"Pearson's r of divergence and change over {e.n} (policy, domain) points: "
                    f"**{interval(*e[:3], 2)}** (bootstrap over points). The paper prints no number.")


def neighbours(found: pd.DataFrame, policy: str, factor: float = FACTOR) -> pd.DataFrame:
    """Eq. 1 for one policy: domain, expert (of another one), kl, epsilon, near, mutual; a row an ordered pair.

    epsilon is `factor` times the own expert's divergence in that domain.
    """
    kl = found[found["policy"] == policy].set_index(["data", "expert"])["kl"]
    domains = list(dict.fromkeys(found["data"]))
    near = {(a, b): bool(kl[a, b] < factor * kl[a, a]) for a in domains for b in domains if a != b}
    return pd.DataFrame([{
        "domain": a, "expert": b, "kl": kl[a, b], "epsilon": factor * kl[a, a], "near": near[a, b],
        "mutual": near[a, b] and near[b, a]} for a, b in near])


def neighbours_shown(found: pd.DataFrame) -> pd.DataFrame:
    """`neighbours` for the eye: a row a domain, experts from near to far, neighbours named with who is one way only."""
    lines = []
    for domain, part in found.sort_values("kl").groupby("domain", sort=False):
        near = [DOMAIN_NAMES[r.expert] + ("" if r.mutual else " (one way)") for r in part.itertuples() if r.near]
        lines.append({
            "domain": DOMAIN_NAMES[domain], "epsilon (nats)": f"{part['epsilon'].iloc[0]:.3f}",
            "other experts, near to far": ", ".join(f"{DOMAIN_NAMES[r.expert]} {r.kl:.3f}" for r in part.itertuples()),
            "policy neighbours": ", ".join(near) or "none",
        })
    order = [*DOMAIN_NAMES.values(), *(line["domain"] for line in lines)]
    return pd.DataFrame(sorted(lines, key=lambda line: order.index(line["domain"])))


def sensitivity(found: pd.DataFrame, policies: Sequence[str] = POLICIES, factors=(1, 1.25, 1.5, 2, 3)) -> pd.DataFrame:
    """How many of the ordered pairs (20 of five) are neighbours, and how many one way only, for other thresholds."""
    lines = []
    for policy in [name for name in policies if name in set(found["policy"])]:
        line: dict[str, object] = {"policy": policy}
        for factor in factors:
            pairs = neighbours(found, policy, factor)
            line[f"{factor:g} x own"] = f"{pairs['near'].sum()} ({(pairs['near'] & ~pairs['mutual']).sum()} one way)"
        lines.append(line)
    return pd.DataFrame(lines)


def steadiness(evidence: Evidence, policy: str = "merge-ties", factor: float = FACTOR) -> pd.DataFrame:
    """Eq. 1 under resampled prompts: domain, expert, near, kl, share, one_way, first; a row an ordered pair.

    `share`: of the resamples in which the expert is a neighbour; `one_way`: in which it is and the reverse is not;
    `first`: in which it is the nearest of the other experts. NaN where a domain has a single prompt.
    """
    domains = evidence.domains
    cells = [evidence.measured("kl").drawn({(a, f"{evidence.experts[b]}>{policy}"): 1.0}) for a in domains for b in domains]
    kl = np.stack(cells, 1).reshape(-1, len(domains), len(domains))  # (R, A, B)
    near, first = nearness.near(kl, factor), nearness.nearest(kl)
    known, named = np.isfinite(kl).all(), neighbours(divergences(evidence, [policy]), policy, factor)
    i, j = ([domains.index(d) for d in named[side]] for side in ("domain", "expert"))
    shares = {"share": near[:, i, j], "one_way": near[:, i, j] & ~near[:, j, i], "first": first[:, i] == np.array(j)}
    return named[["domain", "expert", "near", "kl"]].assign(
        **{name: found.mean(axis=0) if known else nan for name, found in shares.items()})


def steadiness_picture(found: pd.DataFrame, factor: float = FACTOR):
    """`steadiness` as a grid: the share, and below it that of being a neighbour one way only."""
    title = f"How sure is who is near whom? Share of resamples with KL below {factor:g} x the own expert's"
    if found["share"].isna().any():
        return drawing.nothing("a single prompt in a domain cannot be resampled", title)
    note = "one way " + found["one_way"].map("{:.2f}".format)
    return plots.heatmap(found.rename(columns={"domain": "domain of the prompts"}).assign(note=note), title,
                         "domain of the prompts", "expert", "share", note="note", size=56,
                         good="near zero or one is better: sure; near one half: a toss-up; prompts drawn with replacement")


def steadiness_sentence(found: pd.DataFrame) -> Markdown:
    """Which neighbours stand, which are a toss-up, and how often the nearest expert stays the nearest."""
    if found["share"].isna().any():
        return Markdown("A domain has a single prompt: who is near whom cannot be resampled.")
    sure = (found["share"] >= 0.95) | (found["share"] <= 0.05)
    told = [f"{sure.sum()} of {len(found)} ordered pairs are, or are not, neighbours in at least 95 % of the resamples"]
    loose = [f"{DOMAIN_NAMES[r.expert]} near {DOMAIN_NAMES[r.domain]} {r.share:.0%}" for r in found[~sure].itertuples()]
    told += [f"open: {', '.join(loose)}"] if loose else []
    best = found.loc[found.groupby("domain", sort=False)["kl"].idxmin()]
    told.append("the nearest other expert stays the nearest: " + ", ".join(
        f"{DOMAIN_NAMES[r.expert]} to {DOMAIN_NAMES[r.domain]} {r.first:.0%}" for r in best.itertuples()))
    ways = found[found["near"] & (found["one_way"] > 0)].sort_values("one_way", ascending=False, kind="stable")
    told.append("one way only: " + (", ".join(
        f"{DOMAIN_NAMES[r.expert]} near {DOMAIN_NAMES[r.domain]} {r.one_way:.0%}" for r in ways.itertuples()) or "none"))
    return Markdown("Over resamples of the prompts: " + "; ".join(told) + ".")


def pairs(evidence: Evidence, kl: pd.DataFrame, policy: str = "merge-ties") -> pd.DataFrame:
    """Table 6 over all ten pairs: domain, partner, model, kl, near, change, low, high, n, paper; a row a direction.

    `change`: TIES of the two minus the domain's own expert on its benchmarks; `near` by Eq. 1 as for `policy`.
    """
    printed, eq1 = paper.table(6), neighbours(kl, policy).set_index(["domain", "expert"])
    lines = []
    own = evidence.own
    for a in evidence.domains:
        for b in evidence.domains:
            if a == b:
                continue
            x, y = sorted((a, b), key=evidence.domains.index)
            if not evidence.measured("scores").has(own[a][0], f"pair-{x}-{y}"):  # the profile makes no pairs
                continue
            gap = evidence.contrast(difference(f"pair-{x}-{y}", evidence.experts[a], own[a]), of="first")
            row = f"merge-ties-{x}-{y}"
            row = row if row in printed.index else f"merge-ties-{y}-{x}"
            known = row in printed.index and f"{own[a][0]}_change" in printed
            theirs = printed.loc[row, [f"{n}_change" for n in own[a]]].mean(skipna=False) if known else nan
            lines.append({"domain": a, "partner": b, "model": f"pair-{x}-{y}", "kl": eq1.loc[(a, b), "kl"],
                          "near": bool(eq1.loc[(a, b), "near"]), "change": gap.estimate, "low": gap.low,
                          "high": gap.high, "n": gap.n, "paper": theirs})
    return pd.DataFrame(lines, columns=PAIRS)


def pairs_shown(found: pd.DataFrame) -> pd.DataFrame:
    """Table 6 for the eye."""
    return pd.DataFrame({
        "domain": found["domain"].map(DOMAIN_NAMES), "merged with": found["partner"].map(DOMAIN_NAMES),
        "partner's KL (nats)": found["kl"].map("{:.3f}".format), "neighbour": found["near"],
        "change against the expert alone": [interval(r.change, r.low, r.high) for r in found.itertuples()],
        "items": found["n"], "paper's change": ["" if pd.isna(p) else f"{p:+.2f}" for p in found["paper"]],
    })


def table6(evidence: Evidence) -> pd.DataFrame:
    """Scores of the single experts and of the ten pairs on their own benchmarks, as `stats.score_table` writes them."""
    rows = evidence.frame("first")
    names = [*evidence.experts.values(), *(m for m in dict.fromkeys(rows["model"]) if m.startswith("pair-"))]
    return stats.score_table(rows, names, list(evidence.benchmarks), evidence.rng(), evidence.resamples)


def pairs_sentence(found: pd.DataFrame) -> Markdown:
    """Neighbours beside non-neighbours, in words."""
    told = []
    for near, name in ((True, "neighbours"), (False, "other experts")):
        part = found[found["near"] == near]
        told.append(f"{len(part)} merges with {name}: mean change {part['change'].mean():+.1f} points, "
                    f"{(part['low'] > 0).sum()} clearly up, {(part['high'] < 0).sum()} clearly down"
                    if len(part) else f"no merge with {name}")
    return Markdown("; ".join(told) + ".")
