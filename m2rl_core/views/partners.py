"""Section 3.4, all pairs and beyond: the test of "a near partner helps more", and merges of three and four experts."""
from __future__ import annotations

from itertools import combinations
from math import isfinite

import numpy as np
import pandas as pd
from IPython.display import Markdown

from m2rl_core.claims.evidence import EXPERT, OWN, Evidence
from m2rl_core.domains import DOMAINS
from m2rl_core.metrics import nearness, stats
from m2rl_core.metrics.stats import difference
from m2rl_core.pictures import drawing, plots
from m2rl_core.pictures.drawing import DOMAIN_NAMES
from m2rl_core.views.grid import bounds
from m2rl_core.views.opening import interval

GROWTH = ["model", "step", "value", "low", "high", "n", "change", "change_low", "change_high"]
OFF = "This profile merges no subsets of the experts: `analysis.pairs` is off, or its experts are not the five."


def all_pairs(found: pd.DataFrame):
    """The twenty ordered pairs as a picture, a domain each; `found` as `neighbours.pairs` makes it."""
    title = "Does a nearer partner help more? Every pair merge against its expert"
    if found.empty:
        return drawing.nothing(OFF, title)
    points = found.assign(model="rl-" + found["partner"], x=found["kl"], y=found["change"],
                          domain=found["domain"].map(DOMAIN_NAMES))
    return plots.scatter(points, title, "KL(partner || TIES of all), nats a response", "change against the expert (points)",
                         facet="domain", columns=3, own_x=True, width=200,
                         good="up is better; a line that falls: nearer partners help more; whiskers: 95 % over items")


def test(found: pd.DataFrame, evidence: Evidence, policy: str = "merge-ties") -> dict:
    """Kendall's tau within domains of nearness and help over all ordered pairs, its exact p, and its interval.

    Keys: tau, low, high, p, n (ordered pairs), comparisons; gap, gap_low, gap_high: mean change with neighbours minus
    with strangers, a mean over the `domains` that have both (NaN and an empty list where none has). The interval is
    over prompts and items at once; the neighbours of `gap` are those of the estimate.
    """
    domains = evidence.domains
    order = found.assign(place=found["domain"].map(domains.index)).sort_values("place", kind="stable")
    partners = len(domains) - 1
    kl, change = (order[c].to_numpy().reshape(len(domains), partners) for c in ("kl", "change"))
    of_kl, of_scores = evidence.measured("kl"), evidence.measured("first")
    kl_drawn = [of_kl.drawn({(r.domain, f"{evidence.experts[r.partner]}>{policy}"): 1.0}) for r in order.itertuples()]
    drawn = [of_scores.drawn(difference(r.model, evidence.experts[r.domain], evidence.own[r.domain]))
             for r in order.itertuples()]
    shape, most = (-1, len(domains), partners), nearness.comparisons(partners, len(domains))
    counts = nearness.agreement(np.stack(kl_drawn, 1).reshape(shape), np.stack(drawn, 1).reshape(shape)) / most
    low, high = np.quantile(counts, [0.025, 0.975]) if np.isfinite(counts).all() else (np.nan, np.nan)
    count = float(nearness.agreement(kl, change))
    sides = order.groupby("domain", sort=False)["near"].agg(["any", "all"])
    mixed = list(sides.index[sides["any"] & ~sides["all"]])
    weights: dict = {}
    for domain in mixed:
        part = order[order["domain"] == domain]
        for side, sign in ((part[part["near"]], 1), (part[~part["near"]], -1)):
            for model in side["model"]:
                own = evidence.own[domain]
                weights |= {(b, model): weights.get((b, model), 0.0) + sign / len(side) / len(mixed) / len(own) for b in own}
    gap = evidence.contrast(weights, of="first") if mixed else stats.Estimate(np.nan, np.nan, np.nan, 0, np.nan)
    return {"tau": count / most, "low": float(low), "high": float(high), "n": len(order), "comparisons": most,
            "p": nearness.p_value(count, nearness.chance(kl, change)), "gap": gap.estimate, "gap_low": gap.low,
            "gap_high": gap.high, "domains": mixed}


def sentence(found: pd.DataFrame, evidence: Evidence, level: float = 0.05) -> Markdown:
    """The test in words; `found` as `neighbours.pairs` makes it."""
    if found.empty:
        return Markdown(OFF)
    if len(evidence.domains) < 3:
        return Markdown("Two experts have one partner each: there is nothing to rank.")
    t = test(found, evidence)
    told = "**undecided**: no such link is told from chance, in either direction"
    if t["p"] <= level:
        told = f"**decided**: nearer partners help **{'more' if t['tau'] > 0 else 'less'}**"
    p = "< 0.001" if t["p"] < 0.001 else f"= {t['p']:.3f}"
    gap = "No domain has both neighbours and strangers, so their difference is undefined."
    if t["domains"]:
        names = ", ".join(DOMAIN_NAMES[d] for d in t["domains"])
        clear = "clear of zero" if t["gap_low"] > 0 or t["gap_high"] < 0 else "not clear of zero"
        gap = (f"Neighbours minus strangers, within the domains that have both ({names}): "
               f"**{interval(t['gap'], t['gap_low'], t['gap_high'])}** points, {clear}.")
    return Markdown(
        f"Nearness and help agree with Kendall's tau of **{interval(t['tau'], t['low'], t['high'], 2)}** over {t['n']} "
        f"ordered pairs ({t['comparisons']} comparisons of two partners of one domain; exact permutation p **{p}**): {told}. "
        + gap)


# Three and four experts ----------------------------------------------------------------------------------------------

def merged(domains) -> str:
    """The model that is made of these domains' experts: the expert, a pair, a subset, or the merge of all."""
    names = {1: f"rl-{domains[0]}", 2: f"pair-{'-'.join(domains)}", len(DOMAINS): "merge-ties"}
    return names.get(len(domains), f"ties-{'-'.join(domains)}")


def together(subsets: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Rows of all TIES merges of one to five experts, on the same items and with as many samples each.

    `subsets` are the rows of the stage of that name; of `scores` the items and the first samples that it has are
    taken. ValueError where a model of `scores` lacks one of them; it names both.
    """
    whole = [merged([d]) for d in DOMAINS] + ["merge-ties"]
    rows = scores[scores["model"].isin(whole) | scores["model"].str.startswith("pair-")]
    wanted = subsets.drop_duplicates(["benchmark", "item", "sample"])[["benchmark", "item", "sample"]]
    found = rows.merge(wanted, on=["benchmark", "item", "sample"])
    size = wanted.groupby("benchmark").size()
    for (model, benchmark), n in rows.groupby(["model", "benchmark"]).size().items():
        have = int(((found["model"] == model) & (found["benchmark"] == benchmark)).sum())
        if benchmark in size and have < size[benchmark]:
            raise ValueError(f"{benchmark}: {model} has {have} of the {size[benchmark]} (item, sample) rows that "
                             f"{subsets['model'].iloc[0]} has; evaluate both on the same items with no fewer samples")
    return pd.concat([found[subsets.columns], subsets], ignore_index=True)


def measured(run, evidence: Evidence) -> stats.Measured | None:
    """The TIES merges of one to five experts, resampled together; None where the profile makes none of some."""
    if "subsets" not in run.stages:
        return None
    return stats.measure(together(run.table("subsets", "rows.parquet"), evidence.frame("first")), evidence.rng(),
                         resamples=evidence.resamples)


def growth(found: stats.Measured | None) -> pd.DataFrame:
    """Score on the domains that a merge holds, by how many it holds.

    Columns: model, step (number of experts), value, low, high, n; change, change_low, change_high against the expert
    alone, paired. `model` is a domain's expert for the mean over all merges that hold that domain, "all five" for the
    mean over the domains. Every domain is in equally many merges of a size.
    """
    lines, alone = [], {}
    for size in range(1, len(DOMAINS) + 1) if found else ():
        means: dict[str, dict] = {}
        for domain in DOMAINS:
            names = [merged(group) for group in combinations(DOMAINS, size) if domain in group]
            means[EXPERT[domain]] = {(b, m): 1 / len(names) / len(OWN[domain]) for m in names for b in OWN[domain]}
        cells = [cell for weights in means.values() for cell in weights.items()]
        means["all five"] = {cell: w / len(DOMAINS) for cell, w in cells}
        for model, weights in means.items():
            e, start = stats.widen(found.contrast(weights)), alone.setdefault(model, weights)
            e = e._replace(low=np.maximum(e.low, 0.0), high=np.minimum(e.high, 100.0))
            gap = found.contrast({cell: weights.get(cell, 0.0) - start.get(cell, 0.0) for cell in {**weights, **start}})
            lines.append(dict(zip(GROWTH, (model, size, *e[:4], *gap[:3]), strict=True)))
    return pd.DataFrame(lines, columns=GROWTH)


def growth_picture(found: pd.DataFrame):
    """The changes of `growth` as lines, a panel a domain and one for their mean."""
    title = "What more experts in a TIES merge do to the domains that it holds"
    if found.empty:
        return drawing.nothing(OFF, title)
    panel = found["model"].str.removeprefix("rl-").map(lambda name: DOMAIN_NAMES.get(name, "Mean of the five"))
    drawn = found.assign(panel=panel, value=found["change"], low=found["change_low"], high=found["change_high"])
    return plots.trajectories(drawn, title, "change (points)", facet="panel", legend=False, x_title="experts merged",
                              good="higher is better; against the expert alone, paired, 95 % over items", zero=True)


def effects(found: stats.Measured | None) -> pd.DataFrame:
    """What each partner adds to each domain over all merges that hold the domain: domain, partner, change, low, high."""
    lines = []
    for domain in DOMAINS if found else ():
        for partner, weights in nearness.partner_effects(domain, DOMAINS, merged).items():
            share = len(OWN[domain])
            e = found.contrast({(b, model): w / share for model, w in weights.items() for b in OWN[domain]})
            lines.append({"domain": domain, "partner": partner, "change": e.estimate, "low": e.low, "high": e.high,
                          "interval": bounds(e.low, e.high)})
    return pd.DataFrame(lines, columns=["domain", "partner", "change", "low", "high", "interval"])


def effects_picture(found: pd.DataFrame):
    """`effects` as a grid."""
    title = "Who helps whom: what a partner adds, averaged over all merges that it can join"
    if found.empty:
        return drawing.nothing(OFF, title)
    named = found.rename(columns={"domain": "tested on", "partner": "joins"})
    return plots.heatmap(named, title, "tested on", "joins", "change", text="+.1f", note="interval", size=62,
                         good="points, 95 % over items; above zero is better: it helps")


def growth_sentence(found: pd.DataFrame, added: pd.DataFrame, two: pd.DataFrame) -> Markdown:
    """What the last expert costs or gives, and whether pairs tell who helps; `two` as `neighbours.pairs` makes it."""
    if found.empty:
        return Markdown(OFF)
    mean = found[found["model"] == "all five"].set_index("step")
    against = [f" (paired with the expert alone {interval(r.change, r.change_low, r.change_high)})" for r in mean.itertuples()]
    told = "; ".join(f"{step} {'experts' if step > 1 else 'expert'} {interval(r.value, r.low, r.high)}"
                     + (against[step - 1] if step > 1 else "")
                     for step, r in zip(mean.index, mean.itertuples(), strict=True))
    both = added.merge(two, on=["domain", "partner"], suffixes=("", "_pair"))
    known = both[(both["low"] > 0) | (both["high"] < 0)]
    names = ", ".join(f"{DOMAIN_NAMES[r.partner]} {'lifts' if r.change > 0 else 'lowers'} {DOMAIN_NAMES[r.domain]}"
                      for r in known.itertuples()) or "none"
    same = (np.sign(both["change"]) == np.sign(both["change_pair"])).sum()
    few = "" if isfinite(mean["low"].iloc[0]) else " Too few items for an interval."
    return Markdown(
        f"Mean over the domains that a merge holds, by its number of experts: {told}.{few} Of {len(added)} effects of a "
        f"partner, {len(known)} are clear of zero, {(known['change'] > 0).sum()} up and {(known['change'] < 0).sum()} down "
        f"({names}). The pair alone has the same sign as the mean over all merges in {same} of {len(both)}.")
