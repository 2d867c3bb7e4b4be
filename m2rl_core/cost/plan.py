"""What a stage does, in units that can be timed or modelled, and its seconds by a calibration of this machine.

A stage is made of calls of the sampler (so many rollouts of each domain), steps of next-token training, updates of the
optimizer, models read and written. `modelled` gives the same parts their time on named GPUs.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import mean, median
from types import MappingProxyType

from m2rl_core.domains import BENCHMARKS
from m2rl_core.study import JUDGE_TOKENS, JUDGED_BENCHMARKS, Stage

BATCH = 256  # rollouts in flight (rollout.BATCH, which would import torch)
# Both parameters of the Beta that rates of success are taken from, over a whole training. A policy grows sure of itself, so
# most tasks are always or never solved: the five experts of the small study learned from 33 % of their groups of 8 (8 % in
# coding, 55 % in science), which is this value's share. Where a run's own share is known, it counts instead.
SURE = 0.175
LEARNS = (0.05, 0.9)  # the share of groups with an advantage, at least and at most
MODEL_ERROR = 1.5  # the factor that a calibrated estimate is held to, besides the spread of its measurements
START, COMPILED = 1.5, 5.0  # seconds: a builder is imported and its inputs loaded; the weight analysis compiles its kernels
SCORED = 1 / 3  # of a forward and a backward pass
NOTHING: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Call:
    """One call of the sampler, made `times` over: rollouts of each domain, sampled and verified.

    A share `learns` of them has a gradient, `scored` other models score them all; `judge`: a judge's words, so many at most.
    """

    rollouts: dict[str, float]
    times: float = 1.0
    learns: float = 0.0
    scored: float = 0.0
    judge: int = 0

    def judge_length(self, lengths: Mapping[str, float]) -> float:
        """Mean tokens of a judge's words: all of a verdict's; where it thinks first, as many as answers of `lengths` have."""
        if self.judge <= JUDGE_TOKENS:
            return float(self.judge)
        return min(0.9 * self.judge, mean(lengths.values()) if lengths else self.judge / 2)


@dataclass(frozen=True)
class Parts:
    """A stage's work: calls, steps of base and SFT, updates, models read and written, rows and documents made."""

    calls: tuple[Call, ...] = ()
    base_steps: int = 0
    sft_steps: int = 0
    updates: int = 0
    models: int = 0
    saved: int = 0
    rows: int = 0
    documents: int = 0
    compiled: bool = False


def mixed_share(group: int, sure: float = SURE) -> float:
    """The expected share of groups in which some rollouts are right and some wrong: only these have an advantage.

    Rates of success are taken as Beta(a, a) with a = `sure`, so all agree with probability 2 B(G + a, a) / B(a, a).
    """
    same = 2.0
    for i in range(group):  # the ratio of the Beta functions, factor by factor
        same *= (i + sure) / (i + 2 * sure)
    return 1 - same


def learning_share(rows: Mapping[str, float], group: int, learns: float | Mapping[str, float]) -> float:
    """The share of groups with an advantage in a mix, {domain: prompts}: as told, of all or by domain, else expected."""
    if not isinstance(learns, Mapping):
        return learns
    return sum(n * learns.get(domain, mixed_share(group)) for domain, n in rows.items()) / sum(rows.values())


def parts(stage: Stage, benchmarks: Mapping[str, str] = BENCHMARKS, learns: float | Mapping[str, float] = NOTHING) -> Parts:
    """What a stage does, from its settings; `benchmarks` maps each to its domain, `learns` is the share of groups that have
    an advantage, of all or by domain (as expected where nothing is said)."""
    s, kind = stage.settings, stage.kind
    if kind == "base":
        rows, documents = _made(s["blend"]["lines"]), s["documents"]
        return Parts(base_steps=s["steps"], updates=s["steps"], rows=rows, documents=documents, saved=1)
    if kind == "sft":
        return Parts(sft_steps=s["steps"], updates=s["steps"], rows=_made(s["blend"]), models=1, saved=1)
    if kind in ("rl", "opd"):
        opd, count, seen = kind == "opd", s["prompts"] * s["group"], s["along"]
        has = 1.0 if opd or s.get("kl") or s.get("entropy") else learning_share(s["rows"], s["group"], learns)
        step = Call({domain: count * n / sum(s["rows"].values()) for domain, n in s["rows"].items()}, s["steps"], has,
                    1.0 if opd or s.get("kl") else 0.0)
        looks = -(-s["steps"] // seen["eval_every"])
        along = [Call({domain: seen["eval_items"] * seen["eval_k"]}, looks) for domain in benchmarks.values()]
        return Parts((step, *along), updates=s["steps"], models=len(stage.needs), saved=1)
    if kind == "eval":
        on = s.get("benchmarks", s["items"])
        return Parts(tuple(Call({benchmarks[b]: s["items"][b] * s["k"].get(b, 1)}) for b in on), models=1)
    if kind == "sweep":
        calls = [Call({benchmarks[b]: s["items"] * s["k"]}) for v in s["variants"]
                 for b in v.get("benchmarks", s.get("on", benchmarks))]
        return Parts(tuple(calls), models=len(stage.needs) + len(s["variants"]), saved=len(s["variants"]))
    if kind == "judge":
        asked = s["items"] * s["k"] * len(s.get("benchmarks", JUDGED_BENCHMARKS))
        told = s.get("tokens", JUDGE_TOKENS)
        return Parts((Call({"judge": asked}, 2, judge=told),), models=1)  # by outcome and by process
    if kind == "kl":
        others = len(stage.needs) - len(s["rows"]) + 1
        return Parts(tuple(Call({d: s["prompts"] * s["samples"]}, len(s["rows"]), scored=1.5 * others) for d in s["rows"]),
                     models=len(stage.needs))
    return Parts(models=len(stage.needs), saved=int(kind in ("merge", "import")), compiled=kind == "weights")


def _made(blend: list[dict]) -> int:
    """Different rows that are made for a blend: those of its pools, some of which are repeated."""
    return sum(line["pool"] for line in blend)


class Measured:
    """Seconds by a calibration of this machine (`calibrate.measure`).

    `lengths` is what is known of the answers' mean tokens by domain, `stretch` makes all of them longer, `pick` chooses
    among repetitions.
    """

    def __init__(self, found: dict, lengths: Mapping[str, float] | None = None, stretch: float = 1.0,
                 pick: Callable[[list[float]], float] = median):
        self.found, self.lengths, self.stretch, self.pick = found, lengths or {}, stretch, pick

    def seconds(self, work: Parts) -> float:
        """Seconds of a stage's parts, one after the other."""
        f, learnt = self.found, work.base_steps + work.sft_steps
        total = sum(self.call(call) * call.times for call in work.calls)
        total += work.base_steps * self.pick(f["base_step"]) + work.sft_steps * self.pick(f["sft_step"])
        total += (work.updates - learnt) * self.pick(f["optimizer"])  # theirs are inside of their steps
        total += work.rows * (f["row"] + (f["encode"] if work.sft_steps else 0))
        total += work.documents * (f["document"] + f["words"])
        return total + START * bool(work.calls or learnt) + COMPILED * work.compiled

    def call(self, call: Call) -> float:
        """Seconds of one call: a part that the longest answers take, however many there are, and a part for each rollout."""
        if call.judge:
            known = {name: d["length"] for name, d in self.found["domains"].items()} | dict(self.lengths)
            return sum(call.rollouts.values()) * self.pick(self.found["judge"]) * call.judge_length(known) / JUDGE_TOKENS
        waves, first, rest = max(1.0, sum(call.rollouts.values()) / BATCH), [], 0.0
        for domain, n in call.rollouts.items():
            d, longer = self._domain(domain)
            whole, few, span = self.pick(d["sample"]), self.pick(d["sample_few"]), d["rollouts"] - d["few"]
            each = max(0.0, (whole - few) / span) if span > 0 else whole / d["rollouts"]
            first.append(max(0.0, few - each * d["few"]) * longer)
            learning = (call.learns + SCORED * call.scored) * self.pick(d["update"]) * longer
            rest += n * (each * longer + (self.pick(d["verify"]) + learning) / d["rollouts"])
        return max(first) * waves + rest

    def _domain(self, name: str) -> tuple[dict, float]:
        """The measurements of a domain, and how many times as long as there its answers are; one's own is like the longest."""
        measured = self.found["domains"]
        d = measured.get(name) or max(measured.values(), key=lambda d: d["length"])
        return d, self.stretch * self.lengths.get(name, d["length"]) / d["length"]


@dataclass(frozen=True)
class Cost:
    """Seconds as expected, in their likely range, and at most: every answer at full length."""

    seconds: float
    low: float
    high: float
    most: float

    def times(self, factor: float) -> Cost:
        return Cost(*(factor * value for value in (self.seconds, self.low, self.high, self.most)))


def calibrated(found: dict, stage: Stage, longest: int, benchmarks: Mapping[str, str] = BENCHMARKS,
               lengths: Mapping[str, float] | None = None, learnt: Mapping[str, float] = NOTHING) -> Cost:
    """A stage's cost on this machine; the range is that of the repetitions, of how many groups learn, and of `MODEL_ERROR`.

    `lengths` and `learnt`: mean tokens of an answer and the share of groups that learn, by domain, where a run has told.
    """
    low, high = (Measured(found, lengths, pick=pick).seconds(parts(stage, benchmarks, share))
                 for pick, share in zip((min, max), LEARNS, strict=True))
    stretch = max(1.0, longest / mean(d["length"] for d in found["domains"].values()))
    most = Measured(found, lengths, stretch, max).seconds(parts(stage, benchmarks, 1.0))
    high *= sqrt(MODEL_ERROR)
    expected = Measured(found, lengths).seconds(parts(stage, benchmarks, learnt))
    return Cost(expected, low / sqrt(MODEL_ERROR), high, max(most, high))
