"""Rules on scores and costs (Section 3.2, and Fig. 2 of Section 3.3); each decides from the evidence alone."""
from __future__ import annotations

from dataclasses import replace
from math import inf, nan

from m2rl_core.claims.evidence import (
    EXPERT, FIGURE2, MARGIN, MERGES, OWN, REASONING, Missing, Verdict, above, differences, every, every_above,
    items_that_tell, undecided, within,
)
from m2rl_core.domains import BENCHMARKS, DOMAINS
from m2rl_core.metrics.stats import Estimate, difference


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
    costs = _costs(evidence, (model, *EXPERT.values()))
    found = {clock: float(shares(costs[clock])[model])
             for clock in ("hours", "cpu_hours") if clock in costs and costs[clock].notna().all()}
    below = {share < limit for share in found.values()}
    verdict = "undecided" if len(below) == 2 else "supported" if below == {True} else "contradicted"
    note = f"; processor time: {found['cpu_hours']:.1f} %" if "cpu_hours" in found else ""
    needs = "" if len(below) == 1 else "a run on a machine without other work: its two clocks disagree"
    return Verdict(verdict, found["hours"], n=1, note="one run: no interval" + note, needs=needs)


def costs_extra(evidence, model, floor):
    """Hours of `model`'s own training above `floor` percent of the five experts' together; one run, no interval."""
    share = float(shares(_costs(evidence, (model, *EXPERT.values()))["hours"])[model])
    return Verdict("supported" if share > floor else "contradicted", share, n=1, note="one run: no interval")


def costs_differ(evidence, factor):
    """Hours of the dearest expert at least `factor` times those of the cheapest; one run each, no interval."""
    hours = _costs(evidence, EXPERT.values())["hours"]
    ratio = float(hours.max() / hours.min())
    note = f"{hours.idxmax()} by {hours.idxmin()}; one run: no interval"
    return Verdict("supported" if ratio >= factor else "contradicted", ratio, n=1, note=note)


def dearest(evidence, model):
    """Hours of the expert `model` above those of every other; estimate: its hours by those of the next, in percent."""
    hours = _costs(evidence, EXPERT.values())["hours"]
    rest = hours.drop(model)
    share = float(100 * hours[model] / rest.max())
    note = f"in percent of {rest.idxmax()}; one run: no interval"
    return Verdict("supported" if share > 100 else "contradicted", share, n=1, note=note)


def _costs(evidence, models):
    costs = evidence.frame("costs", "model", "hours").set_index("model")
    absent = [m for m in models if m not in costs.index]
    if absent:
        raise Missing(f"no cost of {', '.join(absent)}")
    return costs.loc[list(models)]


def ranked(evidence, model, among=MERGES, last=False):
    """`model` above (or, with `last`, below) every other of `among` on the mean of all nine."""
    pairs = [(other, model) if last else (model, other) for other in among if other != model]
    return every_above(differences(evidence, [(a, b, list(BENCHMARKS)) for a, b in pairs]))


def leads(evidence, model, among, benchmarks=None, last=False):
    """On each of `benchmarks` (default: all nine), `model` above (or, with `last`, below) every other of `among`."""
    pairs = [(other, model) if last else (model, other) for other in among if other != model]
    return every_above(differences(evidence, [(a, b, [on]) for a, b in pairs for on in benchmarks or BENCHMARKS]))


def seesaw(evidence, among=MERGES):
    """Every method is beaten on some benchmark by some other; contradicted where one leads on all nine."""
    n = (len(among) - 1) * len(BENCHMARKS)
    beaten, first, items = 0, [], 0.0
    for model in among:
        parts = [evidence.contrast(difference(o, model, [b]), n) for o in among if o != model for b in BENCHMARKS]
        won = any(e.low > 0 for e in parts)
        beaten += won
        first += [model] if all(e.estimate <= 0 for e in parts) else []
        if not won:  # the difference that is shown soonest
            items = max(items, min((items_that_tell(e, 0.0, n) for e in parts if e.estimate > 0), default=inf))
    verdict = "contradicted" if first else "supported" if beaten == len(among) else "undecided"
    note = f"{first[0]} leads everywhere" if first else f"{beaten} of {len(among)} methods beaten by more than noise"
    if verdict == "undecided":
        return undecided(Estimate(float(beaten), nan, nan, len(among), nan), items=items, note=note)
    return Verdict(verdict, float(beaten), n=len(among), note=note)


def beside_own_experts(evidence, model, benchmarks=None, margin=0.0):
    """`model` minus the expert of each benchmark's own domain, averaged over `benchmarks`, above `margin`."""
    weights: dict = {}
    for b in benchmarks or BENCHMARKS:
        weights[b, model], weights[b, EXPERT[BENCHMARKS[b]]] = 1.0, -1.0
    return above(evidence.contrast({cell: 2 * w / len(weights) for cell, w in weights.items()}), margin)


def beside_each_expert(evidence, model, margin=0.0):
    """`model` minus the domain's own expert above `margin`, in every domain."""
    return every_above(_beside(evidence, model), margin)


def trends_inconsistent(evidence, model):
    """`model` clearly above the domain's own expert in one domain and below in another; contradicted if all lie on a side."""
    parts = _beside(evidence, model)
    up, down = _sided(parts)
    verdict = ("supported" if up and down else "contradicted" if len(parts) in (len(up), len(down)) else "undecided")
    note = f"above in {len(up)}, below in {len(down)} of {len(parts)} domains"
    lacking = [min((items_that_tell(e, 0.0, len(parts)) for e in parts.values() if sign * e.estimate > 0), default=inf)
               for sign, found in ((1, up), (-1, down)) if not found]
    if verdict == "undecided":
        return undecided(Estimate(float(min(len(up), len(down))), nan, nan, len(parts), nan), items=max(lacking), note=note)
    return Verdict(verdict, float(min(len(up), len(down))), n=len(parts), note=note)


def not_always_superior(evidence, model):
    """The domain's own expert above `model` in some domain; contradicted where `model` is above in all of them."""
    return some_below(_beside(evidence, model))


def some_below(parts):
    """Supported where one of `parts` (estimates) is clearly below 0, contradicted where all are above; shows the lowest."""
    up, down = _sided(parts)
    name = min(parts, key=lambda part: parts[part].high)
    shown, note = parts[name], f"{len(down)} of {len(parts)} parts below, {len(up)} above; shown: {name}"
    if not down and len(up) < len(parts):
        return undecided(shown, items=items_that_tell(shown, 0.0, len(parts)), note=note)
    return Verdict("supported" if down else "contradicted", *shown[:4], note)


def _beside(evidence, model):
    return differences(evidence, [(model, EXPERT[d], OWN[d]) for d in DOMAINS])


def _sided(parts):
    return [[name for name, e in parts.items() if side(e)] for side in (lambda e: e.low > 0, lambda e: e.high < 0)]


def steady(evidence, experts=REASONING, domains=REASONING):
    """Each expert on each other domain's Fig. 2 benchmark: mean of the later half of checkpoints above the first."""
    return every_above(_late(evidence, [(EXPERT[a], FIGURE2[b]) for a in experts for b in domains if a != b]))


def flat(evidence, experts, domain, margin=MARGIN):
    """Each expert on the Fig. 2 benchmark of `domain`: mean of the later half of checkpoints within +-margin of the first."""
    parts = _late(evidence, [(EXPERT[a], FIGURE2[domain]) for a in experts])
    return every({name: within(e, margin, len(parts)) for name, e in parts.items()})


def _late(evidence, cells):
    """{label: mean of the later half of checkpoints minus the first} of (expert, benchmark) cells."""
    steps = evidence.frame("along", "step").groupby("model")["step"].unique()
    parts = {}
    for model, benchmark in cells:
        if model not in steps or len(steps[model]) < 3:
            raise Missing(f"no checkpoints of {model}")
        first, *rest = sorted(steps[model])
        late = rest[len(rest) // 2:]
        weights = {(benchmark, f"{model}@{step}"): 1 / len(late) for step in late}
        weights[benchmark, f"{model}@{first}"] = -1.0
        parts[f"{model} on {benchmark}"] = evidence.contrast(weights, len(cells), "along")
    return parts
