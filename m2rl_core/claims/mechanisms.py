"""Rules on weights, policies and skills (Sections 3.3 to 3.5)."""
from __future__ import annotations

from dataclasses import replace
from math import atanh, ceil, inf, isfinite, nan, sqrt

import pandas as pd
from scipy.special import stdtrit

from m2rl_core.claims.evidence import (
    DOMAINS, EXPERT, FIGURE2, OWN, REASONING, Missing, Verdict, above, differences, every, every_above, extremes,
    items_that_tell, undecided,
)
from m2rl_core.claims.scores import some_below
from m2rl_core.metrics import skills, stats
from m2rl_core.metrics.groups import WHOLE
from m2rl_core.metrics.stats import Estimate, difference


def _weights(evidence, name, *columns):
    """The rows of `name` on pairs of the paper's five experts; Missing where not all five are there."""
    found = evidence.frame(name, "a", "b", *columns)
    a, b = (found[side].str.removeprefix("rl-") for side in "ab")
    if absent := [EXPERT[domain] for domain in DOMAINS if domain not in {*a, *b}]:
        raise Missing(f"no weights of {', '.join(absent)}")
    return found[a.isin(DOMAINS) & b.isin(DOMAINS)]


def changed_share(evidence, low, high):
    """The mean share of changed weights, in percent, lies between `low` and `high`."""
    found = _weights(evidence, "jaccard", "share_a", "share_b")
    share = 100 * pd.concat([found["share_a"], found["share_b"]])
    verdict = "supported" if low <= share.mean() <= high else "contradicted"
    return extremes(share, verdict, "mean over matrices and experts")


def overlap_above_chance(evidence):
    """Every pair's Jaccard overlap above that of random masks; contradicted where the mean is not."""
    found = _weights(evidence, "jaccard", "jaccard", "jaccard_random").dropna(subset="jaccard")
    note = "overlap minus that of random masks"
    if "jaccard_null" in found and len(found):  # stricter than the paper: relative changes sit where |w| is small
        note += f"; given |w|: {(found['jaccard'] > found['jaccard_null']).mean():.0%} of cells above chance"
    return _sign(found["jaccard"] - found["jaccard_random"], note)


def directions_agree(evidence):
    """The projected cosine of every pair, averaged over matrices, is positive; contradicted where the mean is not."""
    found = _weights(evidence, "cosine", "cosine_projected")
    return _sign(found.groupby(["a", "b"])["cosine_projected"].mean().dropna(), "mean cosine of each pair")


def directions_modest(evidence, limit):
    """The projected cosine of every pair, averaged over matrices, below `limit`; contradicted where the mean is not."""
    found = _weights(evidence, "cosine", "cosine_projected")
    return _sign(limit - found.groupby(["a", "b"])["cosine_projected"].mean().dropna(), f"{limit} minus the mean of each pair")


def _sign(values: pd.Series, note: str) -> Verdict:
    if values.empty:
        return Verdict("undecided", note=f"{note}; undefined everywhere", needs="weights that two experts change")
    verdict = "supported" if (values > 0).all() else "contradicted" if values.mean() <= 0 else "undecided"
    left = int((values <= 0).sum())  # weights have no sampling error: more items of a benchmark cannot help
    needs = "" if verdict != "undecided" else (
        f"other training runs (seeds), not items: {left} of {len(values)} are not above 0")
    return extremes(values, verdict, f"{note}; {(values > 0).sum()} of {len(values)} above 0", needs)


def gradients_agree(evidence, line):
    """Cosine of every two domains' gradients (all weights, mean over measured steps, t interval) above `line`."""
    seen = evidence.frame("gradients", "step", "group", "a", "b", "cosine")
    seen = seen[seen["group"] == WHOLE].dropna(subset="cosine")
    if seen.empty:
        raise Missing("no step at which two domains had a gradient")
    pairs = list(seen.groupby(["a", "b"], sort=False)["cosine"])
    parts = {}
    for (a, b), values in pairs:
        n, mean = len(values), float(values.mean())
        se = float(values.std(ddof=1)) / sqrt(n) if n > 1 else nan
        half = se * float(stdtrit(n - 1, 1 - 0.025 / len(pairs))) if n > 1 else nan
        parts[f"{a} with {b}"] = _of_steps(above(Estimate(mean, mean - half, mean + half, n, se), line, len(pairs)))
    return every(parts)


def _of_steps(found: Verdict) -> Verdict:
    """What `above` says of items, said of measured steps."""
    return replace(found, note=found.note.replace("item", "step"), needs=found.needs.replace("item", "step"))


def reasoning_closer(evidence):
    """Mean cosine among the reasoning experts above that between them and the other two; bootstrap over matrices."""
    found = _weights(evidence, "cosine", "layer", "matrix", "cosine_projected")
    a, b = (found[side].str.removeprefix("rl-").isin(REASONING) for side in "ab")
    by = ["layer", "matrix"]
    inner = found[a & b].groupby(by)["cosine_projected"].mean()
    outer = found[a ^ b].groupby(by)["cosine_projected"].mean()
    gap = (inner - outer).dropna()
    if gap.empty:
        return Verdict("undecided", note="no cosine is defined: no weights that two of them changed",
                       needs="weights that two experts change")
    rows = pd.DataFrame({"item": range(len(gap)), "score": gap.to_numpy()})
    rows = rows.assign(model="gap", benchmark="cosine")
    measured = stats.measure(rows, evidence.rng(), scale=1.0, resamples=evidence.resamples)
    verdict = above(measured.contrast({("cosine", "gap"): 1.0}))
    return replace(verdict, note=verdict.note.replace("items", "matrices"), needs=verdict.needs.replace("items", "matrices"))


def no_link(evidence, limit=0.5):
    """r between KL(own expert || policy) and the policy's change against that expert: interval inside +-limit."""
    found = evidence.frame("kl")
    points = []
    for policy in sorted(set(found["policy"]) - {"sft"}):
        for domain in DOMAINS:
            kl = evidence.contrast({(domain, f"{EXPERT[domain]}>{policy}"): 1.0}, of="kl").estimate
            points.append((kl, evidence.contrast(difference(policy, EXPERT[domain], OWN[domain]), of="first").estimate))
    e = stats.pearson(*zip(*points, strict=True), evidence.rng())
    flat, linked = -limit < e.low and e.high < limit, e.low > 0 or e.high < 0
    verdict = "supported" if flat else "contradicted" if linked else "undecided"
    note = f"{len(points)} (policy, domain) points"
    if verdict == "undecided":  # to tell r from 0, or else from the limit
        gap = max(abs(e.estimate), limit - abs(e.estimate)) if isfinite(e.estimate) else 0.0
        needs = f"about {ceil((2.8 / atanh(gap)) ** 2 + 3)} points would tell" if 0 < gap < 1 else "divergences that differ"
        return Verdict(verdict, *e[:4], note=f"{note}; {needs}", needs=needs)
    return Verdict(verdict, *e[:4], note)


def nearest(evidence, domain, expert, policy, without=()):
    """On prompts of `domain`, `expert` has a lower KL to `policy` than every other expert (but those of `without`)."""
    parts = differences(evidence, [(f"{other}>{policy}", f"{expert}>{policy}", [domain])
                                    for other in EXPERT.values() if other not in (expert, *without)], "kl")
    return every_above(parts)


def asymmetric(evidence, policy, factor=1.5):
    """Some pair is a neighbourhood one way only; eps of Eq. 1 is `factor` x the own expert's KL."""
    kl = {(d, e): evidence.contrast({(d, f"{EXPERT[e]}>{policy}"): 1.0}, of="kl").estimate
          for d in DOMAINS for e in DOMAINS}
    near = {(d, e) for d in DOMAINS for e in DOMAINS if d != e and kl[d, e] < factor * kl[d, d]}
    one_way = sorted(pair for pair in near if pair[::-1] not in near)
    verdict = "supported" if one_way else "contradicted" if near else "undecided"
    found = ", ".join(f"{e} is near {d}, not the reverse" for d, e in one_way)
    note = found or ("all mutual" if near else "no neighbours at all")
    needs = "" if near else "a larger epsilon, or policies nearer to one another"
    return Verdict(verdict, float(len(one_way)), n=len(near), note=note, needs=needs)


def _neighbour(evidence, domain, policy="merge-ties"):
    """The other domain whose expert is closest to the merge on prompts of `domain` (Eq. 1), or the stated one."""
    if evidence.neighbours is not None:
        if domain not in evidence.neighbours:
            raise Missing(f"no stated neighbour of {domain}")
        return evidence.neighbours[domain]
    others = [d for d in DOMAINS if d != domain]
    return min(others, key=lambda d: evidence.contrast({(domain, f"{EXPERT[d]}>{policy}"): 1.0}, of="kl").estimate)


def _pair(evidence, a, b, domain):
    names = [f"{head}-{x}-{y}" for head in ("pair", "merge-ties") for x, y in ((a, b), (b, a))]
    for name in names:
        if all(evidence.measured("scores").has(benchmark, name) for benchmark in OWN[domain]):
            return name
    raise Missing(f"no scores of {names[0]}")


def neighbour_helps(evidence, domains):
    """Merging a domain's expert with its nearest other expert (TIES) lifts that domain."""
    pairs = {d: _pair(evidence, d, _neighbour(evidence, d), d) for d in domains}
    return every_above(differences(evidence, [(pairs[d], EXPERT[d], OWN[d]) for d in domains], "first"))


def neighbour_beats_others(evidence, domains):
    """The merge with the nearest expert above the mean of the merges with the other three, over `domains`."""
    weights: dict = {}
    for d in domains:
        near = _neighbour(evidence, d)
        others = [_pair(evidence, d, o, d) for o in DOMAINS if o not in (d, near)]
        for b in OWN[d]:
            share = 1 / len(OWN[d]) / len(domains)
            weights[b, _pair(evidence, d, near, d)] = share
            weights.update({(b, other): -share / len(others) for other in others})
    return above(evidence.contrast(weights, of="first"))


def strangers_need_not_help(evidence, domains):
    """Some merge of a domain's expert with one that is not its nearest loses to the expert; contradicted if all gain."""
    others = {d: [o for o in DOMAINS if o not in (d, _neighbour(evidence, d))] for d in domains}
    cells = [(_pair(evidence, d, o, d), EXPERT[d], OWN[d]) for d in domains for o in others[d]]
    return some_below(differences(evidence, cells, "first"))


def _consistency(evidence, models, benchmarks=tuple(FIGURE2.values())):
    rows = evidence.frame("first")
    try:
        return skills.consistency(rows, models, list(benchmarks), evidence.rng(), resamples=1000)
    except ValueError as error:
        raise Missing(str(error)) from error


def gains_overlap(evidence, models):
    """On every benchmark where it is defined, every model's gain cosine above that of shuffled items."""
    found = _consistency(evidence, models).dropna(subset="cosine")
    if found.empty:
        return Verdict("undecided", note="no model gains on any item", needs="training that gains")
    parts = {}
    for r in found.itertuples():
        excess = Estimate(r.cosine - r.chance, r.low - r.chance, r.high - r.chance, r.n, nan)
        parts[f"{r.model} on {r.benchmark}"] = above(excess)
    return every(parts)


def most_consistent(evidence, models, benchmark):
    """`benchmark` has the highest mean cosine of the five, its interval clear of the next one's estimate."""
    found = _consistency(evidence, models).groupby("benchmark")[["cosine", "low", "high", "n"]].mean().dropna()
    if benchmark not in found.index or len(found) < 2:
        return Verdict("undecided", note="undefined: too few gains", needs="training that gains")
    own, rest = found.loc[benchmark], found["cosine"].drop(benchmark)
    verdict = "supported" if own["low"] > rest.max() else "contradicted" if own["high"] < rest.max() else "undecided"
    e = Estimate(*map(float, own[["cosine", "low", "high"]]), int(own["n"]), nan)
    note = f"next: {rest.idxmax()} {rest.max():.2f}"
    if verdict == "undecided":
        return undecided(e, items=items_that_tell(e, float(rest.max())), note=note)
    return Verdict(verdict, *e[:4], note)


def gains_differ(evidence, models, benchmarks, limit):
    """Every model's gain cosine below `limit` on each of `benchmarks` where it is defined."""
    found = _consistency(evidence, models, benchmarks).dropna(subset="cosine")
    if found.empty:
        return Verdict("undecided", note="no model gains on any item", needs="training that gains")
    return every({f"{r.model} on {r.benchmark}": above(Estimate(limit - r.cosine, limit - r.high, limit - r.low, r.n, nan))
                  for r in found.itertuples()})


def more_consistent_on_most(evidence, model, others):
    """Gain cosine of `model` above the mean of `others` on most of the five benchmarks; contradicted if below on most."""
    rows, most, parts = evidence.frame("first"), len(FIGURE2) // 2 + 1, {}
    for benchmark in FIGURE2.values():
        try:
            gap = skills.consistency_gap(rows, model, others, [benchmark], evidence.rng(), resamples=1000)
        except ValueError as error:
            raise Missing(str(error)) from error
        if isfinite(gap[0]):
            parts[benchmark] = above(Estimate(*gap, nan))
    count = {side: [b for b, v in parts.items() if v.verdict == side] for side in ("supported", "contradicted", "undecided")}
    up, down = len(count["supported"]), len(count["contradicted"])
    note = f"above on {up}, below on {down} of {len(parts)} benchmarks where it is defined"
    verdict = "supported" if up >= most else "contradicted" if down >= most else "undecided"
    if verdict == "undecided":
        open_ = sorted(parts[b].items for b in count["undecided"])
        items = open_[most - up - 1] if len(open_) >= most - up else inf
        return undecided(Estimate(float(up), nan, nan, len(parts), nan), items=items, note=note)
    return Verdict(verdict, float(up), n=len(parts), note=note)


def more_consistent(evidence, model, others):
    """Mean over five benchmarks of the cosine of `model` minus the mean cosine of `others`, above 0."""
    rows = evidence.frame("first")
    try:
        gap = skills.consistency_gap(rows, model, others, list(FIGURE2.values()), evidence.rng(), resamples=1000)
    except ValueError as error:
        raise Missing(str(error)) from error
    return above(Estimate(*gap, nan))
