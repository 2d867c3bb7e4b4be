"""Rules on self-verification (Section 3.6)."""
from __future__ import annotations

from dataclasses import replace
from math import atanh, ceil

from m2rl_core.claims.evidence import (
    EXPERT, JUDGED, MERGES, Missing, Verdict, above, below, differences, every, every_above, opposite,
)
from m2rl_core.metrics import stats
from m2rl_core.metrics.stats import average, difference


def judge_correlation(evidence, mode, sign):
    """r over models between mean generation and mean judging in `mode`: its bootstrap interval is on one side of 0."""
    generation, judges = evidence.measured("first"), evidence.measured("judged")
    names = [m for m in ("sft", *EXPERT.values(), "merge-ties", "rl-multi", "mt-opd")
             if all(generation.has(b, m) and judges.has(b, f"{m}/{mode}") for b in JUDGED)]
    if len(names) < 5:
        raise Missing(f"judged by {len(names)} models only")
    x = [generation.contrast(average(m, JUDGED)).estimate for m in names]
    y = [judges.contrast(average(f"{m}/{mode}", JUDGED)).estimate for m in names]
    e = stats.pearson(x, y, evidence.rng())
    left = stats.leave_one_out(names, x, y)["r"]
    found = above(e) if sign > 0 else below(e)
    note = f"leaving one model out: {left.min():.2f} to {left.max():.2f}"
    if found.verdict != "undecided":
        return Verdict(found.verdict, *e[:4], note)
    known = 0 < abs(e.estimate) < 1
    needs = f"about {ceil((2.8 / atanh(e.estimate)) ** 2 + 3)} models would tell" if known else "models that differ"
    return Verdict(found.verdict, *e[:4], f"{note}; {needs}", needs)


def process_better(evidence, benchmarks, consistently, line=0.0):
    """Process minus outcome above `line`: in every (model, benchmark) cell, or in the mean over all cells."""
    models = _judges(evidence, ("outcome", "process"), benchmarks)
    if consistently:
        triples = [(f"{m}/process", f"{m}/outcome", [b]) for m in models for b in benchmarks]
        return every_above(differences(evidence, triples, "judged"), line)
    return above(_mean_gap(evidence, models, benchmarks, "judged"), line)


def _mean_gap(evidence, models, benchmarks, of):
    """Process minus outcome in the mean over models and benchmarks."""
    weights: dict = {}
    for m in models:
        for b in benchmarks:
            weights.update(difference(f"{m}/process", f"{m}/outcome", [b]))
    cells = len(models) * len(benchmarks)
    return evidence.contrast({cell: w / cells for cell, w in weights.items()}, of=of)


def outcome_better(evidence, benchmarks, margin=0.0):
    """Outcome minus process above `margin` in the mean over models and `benchmarks`."""
    found = process_better(evidence, benchmarks, consistently=False, line=-margin)
    return replace(opposite(found), estimate=-found.estimate, low=-found.high, high=-found.low)


def waves_through(evidence, benchmark):
    """Share of wrong answers called right by process minus that by outcome, mean over models, above 0."""
    models = _judges(evidence, ("outcome", "process"), [benchmark], "passed", f"no wrong answers on {benchmark}")
    return above(_mean_gap(evidence, models, [benchmark], "passed"))


def judges_better(evidence, cells):
    """Model a above model b in judging, averaged over benchmarks, for every (a, b, mode, *benchmarks) of `cells`."""
    triples = [(f"{a}/{mode}", f"{b}/{mode}", list(on)) for a, b, mode, *on in cells]
    return every_above(differences(evidence, triples, "judged"))


def _judges(evidence, modes, benchmarks, of="judged", missing="no judged rows"):
    judges = evidence.measured(of)
    models = [m for m in ("sft", *EXPERT.values(), *MERGES, "rl-multi", "mt-opd")
              if all(judges.has(b, f"{m}/{mode}") for b in benchmarks for mode in modes)]
    if not models:
        raise Missing(missing)
    return models


def best_judge(evidence, model, among, mode, benchmarks=JUDGED, each=False):
    """`model` above every other of `among` in judging by `mode`, averaged over `benchmarks` (or, with `each`, on each)."""
    groups = [[b] for b in benchmarks] if each else [list(benchmarks)]
    cells = [(f"{model}/{mode}", f"{other}/{mode}", on) for other in among if other != model for on in groups]
    return every_above(differences(evidence, cells, "judged"))


def judge_falls(evidence, model, by, mode="process", benchmarks=JUDGED, each=False):
    """`model` more than `by` points below SFT in judging by `mode`, averaged over `benchmarks` (or, with `each`, on each)."""
    groups = [[b] for b in benchmarks] if each else [list(benchmarks)]
    parts = differences(evidence, [(f"{model}/{mode}", f"sft/{mode}", on) for on in groups], "judged")
    if each:  # turned round, so that the part that stands worst is shown
        turned = {f"{name}, turned": e._replace(estimate=-e.estimate, low=-e.high, high=-e.low) for name, e in parts.items()}
        return every_above(turned, by)
    return below(next(iter(parts.values())), -by)


def judge_keeps(evidence, models, by, mode="process"):
    """Each of `models` not more than `by` points below SFT in judging by `mode`."""
    cells = [(f"{m}/{mode}", f"sft/{mode}", list(JUDGED)) for m in models]
    return every_above(differences(evidence, cells, "judged"), -by)


def best_generation_and_judge(evidence, model, mode):
    """`model` above all other judged models, both in mean generation and in mean judging, on the four benchmarks."""
    others = [m for m in _judges(evidence, (mode,), JUDGED) if m != model]
    if not others:
        raise Missing("no other judged models")
    n, found = 2 * len(others), {}
    for other in others:
        for of, tail in (("first", ""), ("judged", f"/{mode}")):
            gap = evidence.contrast(difference(model + tail, other + tail, JUDGED), n, of)
            found[f"{model} - {other} ({'scores' if of == 'first' else of})"] = above(gap, parts=n)
    return every(found)
