"""Rules on scores and costs (Section 3.2, and Fig. 2 of Section 3.3); each decides from the evidence alone."""
from __future__ import annotations

from dataclasses import replace

from m2rl_core.claims.evidence import (
    EXPERT, FIGURE2, MARGIN, MERGES, OWN, REASONING, Missing, Verdict, above, differences, every, every_above, within,
)
from m2rl_core.domains import BENCHMARKS, DOMAINS
from m2rl_core.metrics.stats import difference


def no_harm(evidence, margin=MARGIN):
    """Every expert on every other domain: not more than `margin` below SFT."""
    cells = [(EXPERT[a], "sft", OWN[b]) for a in DOMAINS for b in DOMAINS if a != b]
    return every_above(differences(evidence, cells), -margin)


def lifts(evidence, experts, domains):
    """Every expert of `experts` above SFT on every other domain of `domains`."""
    cells = [(EXPERT[a], "sft", OWN[b]) for a in experts for b in domains if a != b]
    return every_above(differences(evidence, cells))


def unmoved(evidence, experts, domain, margin=MARGIN):
    """Every expert of `experts` within +-margin of SFT on `domain`."""
    parts = differences(evidence, [(EXPERT[a], "sft", OWN[domain]) for a in experts])
    return every({name: within(e, margin, len(parts)) for name, e in parts.items()})


def best_at_home(evidence, domains):
    """Each expert of `domains` above every other expert on its own domain."""
    cells = [(EXPERT[a], EXPERT[b], OWN[a]) for a in domains for b in DOMAINS if a != b]
    return every_above(differences(evidence, cells))


def higher(evidence, a, b, benchmarks=None, margin=0.0):
    """Model a above model b by more than `margin`, averaged over `benchmarks` (default: all nine)."""
    return above(evidence.contrast(difference(a, b, benchmarks or BENCHMARKS)), margin)


def as_good_as_merging(evidence, model, margin=MARGIN):
    """`model` within +-margin of the best weight merge on the mean of all nine; the merge is picked by that mean."""
    merge = evidence.best(MERGES)
    found = within(evidence.contrast(difference(model, merge, BENCHMARKS)), margin)
    return replace(found, note="; ".join(filter(None, [f"against {merge}", found.note])))


def shares(cost):
    """Each model's cost in percent of the five experts' together; `cost` and result: series by model."""
    return 100 * cost / cost[list(EXPERT.values())].sum()


def cheaper(evidence, model, limit):
    """Hours of `model` in percent of the five experts' together, below `limit`; one run, hence no interval.

    Where processor hours were recorded too they must agree, for other work on the machine stretches the clock's.
    """
    costs = evidence.frame("costs", "model", "hours").set_index("model")
    absent = [m for m in (model, *EXPERT.values()) if m not in costs.index]
    if absent:
        raise Missing(f"no cost of {', '.join(absent)}")
    found = {clock: float(shares(costs[clock])[model])
             for clock in ("hours", "cpu_hours") if clock in costs and costs[clock].notna().all()}
    below = {share < limit for share in found.values()}
    verdict = "undecided" if len(below) == 2 else "supported" if below == {True} else "contradicted"
    note = f"; processor time: {found['cpu_hours']:.1f} %" if "cpu_hours" in found else ""
    return Verdict(verdict, found["hours"], n=1, note="one run: no interval" + note)


def ranked(evidence, model, among=MERGES, last=False):
    """`model` above (or, with `last`, below) every other of `among` on the mean of all nine."""
    pairs = [(other, model) if last else (model, other) for other in among if other != model]
    return every_above(differences(evidence, [(a, b, list(BENCHMARKS)) for a, b in pairs]))


def seesaw(evidence, among=MERGES):
    """Every method is beaten on some benchmark by some other; contradicted where one leads on all nine."""
    n = (len(among) - 1) * len(BENCHMARKS)
    beaten, leads = 0, []
    for model in among:
        parts = [evidence.contrast(difference(o, model, [b]), n) for o in among if o != model for b in BENCHMARKS]
        beaten += any(e.low > 0 for e in parts)
        leads += [model] if all(e.estimate <= 0 for e in parts) else []
    verdict = "contradicted" if leads else "supported" if beaten == len(among) else "undecided"
    note = f"{leads[0]} leads everywhere" if leads else f"{beaten} of {len(among)} methods beaten by more than noise"
    return Verdict(verdict, float(beaten), n=len(among), note=note)


def beside_own_experts(evidence, model, benchmarks=None, margin=0.0):
    """`model` minus the expert of each benchmark's own domain, averaged over `benchmarks`, above `margin`."""
    weights: dict = {}
    for b in benchmarks or BENCHMARKS:
        weights[b, model], weights[b, EXPERT[BENCHMARKS[b]]] = 1.0, -1.0
    return above(evidence.contrast({cell: 2 * w / len(weights) for cell, w in weights.items()}), margin)


def steady(evidence, domains=REASONING):
    """Each expert on each other domain's Fig. 2 benchmark: mean of the later half of checkpoints above the first."""
    steps = evidence.frame("along", "step").groupby("model")["step"].unique()
    cells = [(EXPERT[a], FIGURE2[b]) for a in domains for b in domains if a != b]
    parts = {}
    for model, benchmark in cells:
        if model not in steps or len(steps[model]) < 3:
            raise Missing(f"no checkpoints of {model}")
        first, *rest = sorted(steps[model])
        late = rest[len(rest) // 2:]
        weights = {(benchmark, f"{model}@{step}"): 1 / len(late) for step in late}
        weights[benchmark, f"{model}@{first}"] = -1.0
        parts[f"{model} on {benchmark}"] = evidence.contrast(weights, len(cells), "along")
    return every_above(parts)
