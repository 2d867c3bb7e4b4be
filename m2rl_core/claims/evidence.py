"""What a claim is decided on, and how an interval becomes a verdict.

Scores and differences are in points, intervals are over items and paired where models share items.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, inf, isfinite, isnan, log, log1p, nan
from statistics import NormalDist

import numpy as np
import pandas as pd

from m2rl_core.domains import BENCHMARKS, DOMAINS
from m2rl_core.metrics import stats
from m2rl_core.metrics.stats import Estimate, Measured, average, difference
from m2rl_core.progress import spoken

MARGIN = 2.0  # points: what the rules call "comparable" and "no harm"
MERGES = ("merge-average", "merge-ta", "merge-ties", "merge-sce", "merge-ties-dare", "merge-ta-dare")
EXPERT = {domain: f"rl-{domain}" for domain in DOMAINS}
OWN = {domain: [b for b, d in BENCHMARKS.items() if d == domain] for domain in DOMAINS}
FIGURE2 = {"math": "aime24", "coding": "lcb_v5", "science": "gpqa_diamond", "if": "ifeval", "agent": "bfcl_v3"}
JUDGED = ("aime24", "ifeval", "lcb_v5", "gpqa_diamond")
REASONING = ("math", "coding", "science")


class Missing(LookupError):
    """The evidence lacks what a rule needs."""


@dataclass(frozen=True)
class Verdict:
    """`verdict` is supported, contradicted or undecided; the estimate is that of the part that decided.

    `needs` says what would decide an undecided one, `items` how many items that takes (NaN: items are not what it lacks).
    """

    verdict: str
    estimate: float = nan
    low: float = nan
    high: float = nan
    n: int = 0
    note: str = ""
    needs: str = ""
    items: float = nan


@dataclass
class Evidence:
    """What claims are decided on; every frame may be missing.

    scores, along (with `step`): evaluation rows. judged: model, benchmark, item, sample, mode, correct (truth, said).
    kl: expert, policy, domain, prompt, tokens, kl_exact (nats a token). costs: model, hours (and cpu_hours). jaccard
    and cosine: as `metrics.weights` writes them; weights as stored are used. gradients: step, group, a, b, cosine, as
    RL-Multi records them. `cells` replaces frames by ready estimates. `prices`: seconds that one sample of one item took
    each model when it was evaluated. `benchmarks` (to their domains) and `experts` (by domain) are the study's; the paper's
    claims are about its own nine and five, whatever a study has.

    All but scores is of the first training seed; "first" names the scores of that seed alone, to be set beside it.
    """

    scores: pd.DataFrame | None = None
    judged: pd.DataFrame | None = None
    kl: pd.DataFrame | None = None
    jaccard: pd.DataFrame | None = None
    cosine: pd.DataFrame | None = None
    along: pd.DataFrame | None = None
    costs: pd.DataFrame | None = None
    gradients: pd.DataFrame | None = None
    neighbours: Mapping[str, str] | None = None
    benchmarks: Mapping[str, str] = field(default_factory=lambda: dict(BENCHMARKS))
    experts: Mapping[str, str] = field(default_factory=lambda: dict(EXPERT))
    cells: dict = field(default_factory=dict)
    prices: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    resamples: int = 4000

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that have an expert, in order."""
        return tuple(self.experts)

    @cached_property
    def own(self) -> dict[str, list[str]]:
        """The benchmarks of each domain that has an expert."""
        return {domain: [b for b, d in self.benchmarks.items() if d == domain] for domain in self.experts}

    @property
    def figure2(self) -> dict[str, str]:
        """The benchmark that stands for each domain, as in Fig. 2; of one's own domain, its own."""
        return {domain: FIGURE2.get(domain, domain) for domain in self.experts}

    def present(self, models: Iterable[str], of: str = "scores") -> list[str]:
        """Those of `models` that there are rows of; Missing where there are none of any."""
        rows = self.frame(of)
        found = set(rows["policy" if of == "kl" else "model"])
        there = [model for model in models if model in found]
        if not there:
            raise Missing(f"no {of} of {', '.join(models)}")
        return there

    def frame(self, name: str, *columns: str) -> pd.DataFrame:
        """The frame `name`, with `columns`; Missing where there is none."""
        found = getattr(self, "scores" if name == "first" else name)
        if found is None or found.empty or not set(columns) <= set(found.columns):
            raise Missing(f"no {name}")
        if name == "first":
            return first_seed(found)
        return found[~found["bf16"]] if "bf16" in found else found

    def measured(self, name: str) -> Measured:
        """Frame `name` as resampled cells (benchmark, column), made once."""
        if name == "first" and (self.scores is None or "seed" not in self.scores):
            name = "scores"
        if name not in self.cells:
            self.cells[name] = self._resampled(name)
        return self.cells[name]

    def _resampled(self, name: str) -> Measured:
        if name == "passed":  # wrong answers that a judge calls right
            rows = self.frame("judged", "truth", "said").query("truth == 0")
            return _judged(rows.assign(correct=rows["said"] == 1), self.rng(), self.resamples)
        rows, scale = self.frame(name), 100.0
        if name == "judged":
            return _judged(rows, self.rng(), self.resamples)
        if name == "along":
            rows = rows.assign(model=rows["model"] + "@" + rows["step"].astype(str))
        if name == "kl":
            scale = 1.0
            rows = rows.rename(columns={"domain": "benchmark", "prompt": "item"})
            rows = rows.assign(model=rows["expert"] + ">" + rows["policy"], score=rows["kl_exact"] * rows["tokens"])
        return stats.measure(rows, self.rng(), scale=scale, resamples=self.resamples)

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def contrast(self, weights: Mapping[tuple[str, str], float], parts: int = 1, of: str = "scores") -> Estimate:
        """A contrast at the level 1 - 0.05 / parts; Missing that names the first cell that was not measured."""
        found = self.measured(of)
        for benchmark, column in weights:
            if not found.has(benchmark, column):
                raise Missing(f"no {'scores' if of == 'first' else of} of {column} on {benchmark}")
        e = found.contrast(weights, 1 - 0.05 / parts)
        if of in ("scores", "first"):
            e = e._replace(seconds=self._seconds(weights, of))
        return e if of == "kl" else stats.widen(e, 1 - 0.05 / parts)

    def _seconds(self, weights: Mapping[tuple[str, str], float], of: str) -> float:
        """What evaluating the cells of a contrast took, over all samples and seeds; NaN where no price is known."""
        if not all(model in self.prices for _, model in weights):
            return nan
        return float(sum(self._rollouts[of].get(cell, 0) * self.prices[cell[1]] for cell, w in weights.items() if w))

    @cached_property
    def _rollouts(self) -> dict[str, dict]:
        """How many samples there are of each (benchmark, model)."""
        return {of: self.frame(of).groupby(["benchmark", "model"], observed=True).size().to_dict()
                for of in ("scores", "first")}

    def best(self, models: Iterable[str]) -> str:
        """The model with the best mean over the study's benchmarks among those measured on all of them."""
        found = self.measured("scores")
        whole = [m for m in models if all(found.has(b, m) for b in self.benchmarks)]
        if not whole:
            raise Missing(f"no scores of {', '.join(models)}")
        return max(whole, key=lambda m: found.contrast(average(m, self.benchmarks)).estimate)


def first_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """The evaluation rows of the first training seed, and of what all seeds share."""
    return rows[rows["seed"] <= 1].drop(columns="seed") if "seed" in rows else rows


def _judged(rows: pd.DataFrame, rng: np.random.Generator, resamples: int) -> Measured:
    """Judge rows as columns "<model>/<mode>"; paired within a model only, for each judges its own trajectories.

    Items that a model judged in one mode only (the other prompt did not fit) are left out.
    """
    modes = rows.groupby(["model", "benchmark"])["mode"].transform("nunique")
    rows = rows[rows.groupby(["model", "benchmark", "item"])["mode"].transform("nunique") == modes]
    rows = rows.assign(column=rows["model"] + "/" + rows["mode"], score=rows["correct"].astype(float))
    parts = [stats.measure(own, rng, column="column", resamples=resamples) for _, own in rows.groupby("model")]
    return Measured(tuple(stratum for part in parts for stratum in part.strata))


def above(e: Estimate, line: float = 0.0, parts: int = 1) -> Verdict:
    """Supported where the whole interval is above `line`, contradicted where it is below."""
    if not isfinite(e.low):
        return undecided(e, "a single item says nothing of its spread: more items")
    if e.low > line or e.high < line:
        return Verdict("supported" if e.low > line else "contradicted", e.estimate, e.low, e.high, e.n)
    items = items_that_tell(e, line, parts)
    return undecided(e, seeds_that_tell(e, line, parts) if items >= 1e6 else "", items)


def items_that_tell(e: Estimate, line: float, parts: int = 1) -> float:
    """How many items would tell `e` from `line`, were its size true; infinite where it lies on the line."""
    level, gap = 1 - 0.05 / parts, abs(e.estimate - line)
    if gap == 0 or not isfinite(e.estimate):
        return inf
    if e.se == 0:  # all items agree: as many as would show a rarer kind, see `stats.widen`
        return ceil(log(0.5 - level / 2) / log1p(-gap / 100)) if gap < 100 else 1.0
    reach = NormalDist().inv_cdf(0.5 + level / 2)
    e = e if isfinite(e.se) else e._replace(se=(e.high - e.low) / 2 / reach)
    return stats.needed(e, line, level=level) or inf


def seeds_that_tell(e: Estimate, line: float, parts: int = 1) -> str:
    """How many training runs would tell `e` from `line` where these differ too much for any number of items; or ""."""
    if e.spread is None or e.estimate == line:
        return ""
    runs = stats.levers(e.spread, e.estimate - line, level=1 - 0.05 / parts)["seeds"] * e.spread.runs
    return f"no number of items, but about {ceil(runs)} training seeds would tell" if runs < 1e3 else ""


def undecided(e: Estimate, needs: str = "", items: float = nan, note: str = "") -> Verdict:
    """An open verdict on `e`; where only `items` are lacking, it says how many, and what they cost where that is known."""
    if not needs:
        more = f", {spoken((items / e.n - 1) * e.seconds)} of evaluation more" if isfinite(e.seconds) and items > e.n else ""
        needs = f"about {items:.0f} items would tell{more}" if items < 1e6 else "no feasible n would tell"
    return Verdict("undecided", e.estimate, e.low, e.high, e.n, "; ".join(filter(None, [note, needs])), needs, items)


def below(e: Estimate, line: float = 0.0, parts: int = 1) -> Verdict:
    """Supported where the whole interval is below `line`, contradicted where it is above."""
    return opposite(above(e, line, parts))


def opposite(found: Verdict) -> Verdict:
    """The verdict on the contrary claim, the numbers as they are."""
    swapped = {"supported": "contradicted", "contradicted": "supported"}.get(found.verdict, found.verdict)
    return replace(found, verdict=swapped)


def within(e: Estimate, margin: float = MARGIN, parts: int = 1) -> Verdict:
    """Supported where the whole interval is inside +-margin, contradicted where it is wholly outside."""
    if -margin < e.low and e.high < margin:
        return Verdict("supported", *e[:4])
    if e.low > margin or e.high < -margin:
        return Verdict("contradicted", *e[:4])
    return above(e, margin if e.high >= margin else -margin, parts)  # the line that the interval crosses


def every(parts: Mapping[str, Verdict]) -> Verdict:
    """Contradicted where one part is, supported where all are; the estimate is that of the part that stands worst."""
    order = {"contradicted": 0, "undecided": 1, "supported": 2}
    name, worst = min(parts.items(), key=lambda part: (order[part[1].verdict], _distance(part[1])))
    held = sum(part.verdict == "supported" for part in parts.values())
    note = f"{held} of {len(parts)} parts supported; shown: {name}" if len(parts) > 1 else ""
    told, open_ = worst.note, {part: v for part, v in parts.items() if v.verdict == "undecided"}
    if worst.verdict == "undecided" and len(open_) > 1:  # the claim waits for the part that waits longest
        last = max(open_, key=lambda part: -1.0 if isnan(open_[part].items) else open_[part].items)
        needs = f"{open_[last].needs} ({last}, the slowest of {len(open_)} open parts)"
        told = told.replace(worst.needs, needs) if worst.needs else needs
        worst = replace(worst, needs=needs, items=open_[last].items)
    return replace(worst, note="; ".join(filter(None, [note, told])))


def _distance(v: Verdict) -> float:
    return v.low if isfinite(v.low) else -np.inf


def differences(evidence: Evidence, triples: Iterable, of: str = "scores") -> dict[str, Estimate]:
    """{label: a minus b over benchmarks} for (a, b, benchmarks), at the level that the number of parts asks for."""
    triples = list(triples)
    return {
        f"{a} - {b} on {' + '.join(on) if len(on) < 3 else f'{len(on)} benchmarks'}":
        evidence.contrast(difference(a, b, on), len(triples), of) for a, b, on in triples
    }


def every_above(parts: Mapping[str, Estimate], line: float = 0.0) -> Verdict:
    return every({name: above(e, line, len(parts)) for name, e in parts.items()})


def extremes(values: pd.Series, verdict: str, note: str, needs: str = "") -> Verdict:
    """Verdict on quantities without sampling error: mean, smallest and largest cell."""
    return Verdict(verdict, float(values.mean()), float(values.min()), float(values.max()), len(values),
                   f"{note}; low and high are the extreme cells, not an interval", needs)
