"""What every stage of a profile costs: from this machine's throughput, or on named GPUs by the cost model.

A stage's work is counted in the same units on both ways (`Parts`): steps, and calls of the sampler with so many rollouts
of a domain. Seconds of what is finished are those that it took. What is left is corrected by how the finished stages of
its kind compare with their own estimate, where there are any.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import sqrt
from statistics import median

from m2rl_core import study
from m2rl_core.domains import BENCHMARKS, DOMAINS

BATCH, JUDGED = 256, 4  # rollouts in flight (rollout.BATCH); benchmarks that are judged (judge.JUDGED_BENCHMARKS)
JEFFREYS = 0.5  # both parameters of the Beta that rates of success are taken from: many tasks always or never succeed
MODEL_ERROR = 1.5  # the factor that a calibrated estimate is held to, besides the spread of its measurements
START = 1.5  # seconds in which a stage's builder is imported and its inputs are loaded
COMPILED = 5.0  # seconds in which the weight analysis compiles its kernels
SCORED = 1 / 3  # of a forward and a backward pass


@dataclass(frozen=True)
class Call:
    """One call of the sampler, `times` over: rollouts of each domain, verified; `scored` other models score them."""

    rollouts: dict[str, float]
    times: float = 1.0
    learns: float = 0.0
    scored: float = 0.0
    judge: bool = False


@dataclass(frozen=True)
class Parts:
    """A stage's work: sampler calls, steps of next-token training, optimizer steps, models read and written, rows made."""

    calls: tuple[Call, ...] = ()
    base_steps: int = 0
    sft_steps: int = 0
    optimizer: int = 0
    models: int = 0
    saved: int = 0
    rows: int = 0
    documents: int = 0
    compiled: bool = False


@dataclass(frozen=True)
class Cost:
    """Seconds as expected, in a likely range, and at most (every answer at full length)."""

    seconds: float
    low: float
    high: float
    most: float
    why: str = field(default="", compare=False)


def mixed_share(group: int) -> float:
    """The expected share of groups in which some rollouts are right and some wrong: only these have an advantage.

    Rates of success of tasks are taken as Beta(1/2, 1/2), so all agree with probability 2 B(G + 1/2, 1/2) / B(1/2, 1/2).
    """
    same = 1.0
    for i in range(group):  # the Beta functions' ratio, factor by factor
        same *= (i + JEFFREYS) / (i + 2 * JEFFREYS)
    return 1 - 2 * same


def mix(rows: dict[str, int]) -> dict[str, float]:
    """Share of each domain among these rows."""
    return {domain: n / sum(rows.values()) for domain, n in rows.items()}


def parts(stage: study.Stage, learns: float | None = None) -> Parts:
    """What a stage does, from its settings; `learns`: the share of groups that have an advantage (as expected)."""
    s, kind = stage.settings, stage.kind
    if kind == "base":
        return Parts(base_steps=s["steps"], optimizer=s["steps"], rows=s["blend"]["rows"], documents=s["documents"], saved=1)
    if kind == "sft":
        return Parts(sft_steps=s["steps"], optimizer=s["steps"], rows=s["rows"], models=1, saved=1)
    if kind in ("rl", "opd"):
        shares, count, seen = mix(s["rows"]), s["prompts"] * s["group"], s["along"]
        opd = kind == "opd"
        has = 1.0 if opd or s.get("kl") or s.get("entropy") else mixed_share(s["group"]) if learns is None else learns
        step = Call({d: share * count for d, share in shares.items()}, s["steps"], has, 1.0 if opd or s.get("kl") else 0.0)
        looks = s["steps"] // seen["eval_every"] + bool(s["steps"] % seen["eval_every"])
        along = [Call({d: seen["eval_items"] * seen["eval_k"]}, looks) for d in BENCHMARKS.values()]
        return Parts((step, *along), optimizer=s["steps"], models=6 if opd else 1, saved=1)
    if kind == "eval":
        return Parts(tuple(Call({BENCHMARKS[b]: s["items"][b] * s["k"][b]}) for b in s.get("benchmarks", s["items"])), models=1)
    if kind == "sweep":
        calls = [Call({BENCHMARKS[b]: s["items"] * s["k"]}) for v in s["variants"] for b in v.get("benchmarks", BENCHMARKS)]
        return Parts(tuple(calls), models=len(stage.needs) + len(s["variants"]), saved=len(s["variants"]))
    if kind == "judge":
        asked = s["items"] * s["k"] * JUDGED
        return Parts((Call({"judge": asked}, 2, judge=True),), models=1)
    if kind == "kl":
        others = len(stage.needs) - len(DOMAINS) + 1
        return Parts(tuple(Call({d: s["prompts"] * s["samples"]}, len(DOMAINS), scored=1.5 * others) for d in DOMAINS),
                     models=len(stage.needs))
    merge = kind == "merge"
    return Parts(models=len(stage.needs), saved=int(merge), compiled=not merge)


class Measured:
    """Seconds by a calibration of this machine (`calibrate.measure`); `pick` chooses among repetitions."""

    def __init__(self, found: dict, lengths: dict[str, float] | None = None, stretch: float = 1.0,
                 pick: Callable[[list[float]], float] = median):
        self.found, self.lengths, self.stretch, self.pick = found, lengths or {}, stretch, pick

    def longer(self, domain: str) -> float:
        """How many times as long as in the calibration answers are."""
        return self.stretch * self.lengths.get(domain, self.found["domains"][domain]["length"]) / self.found["domains"][domain]["length"]

    def seconds(self, work: Parts) -> float:
        """Seconds of a stage's parts, one after the other."""
        f = self.found
        total = sum(self.call(call) * call.times for call in work.calls)
        total += work.base_steps * self.pick(f["base_step"]) + work.sft_steps * self.pick(f["sft_step"])
        if work.calls:
            total += work.optimizer * self.pick(f["optimizer"])
        total += work.rows * f["row"] + work.documents * (f["document"] + f["words"])
        total += work.rows * f["encode"] if work.sft_steps else 0
        return total + START * bool(work.calls or work.base_steps or work.sft_steps) + COMPILED * work.compiled + self.files(work)

    def files(self, work: Parts) -> float:
        """Seconds of reading and writing models, as fast as memory is copied at a tenth of its pace."""
        return (work.models + work.saved) * self.found.get("model_bytes", 0) / (0.1 * self.pick(self.found["bandwidth"]))

    def call(self, call: Call) -> float:
        """Seconds of one call: a part for its longest answer, whatever the batch, and a part for each rollout."""
        if call.judge:
            return sum(call.rollouts.values()) * self.pick(self.found["judge"])
        first, rest = [], 0.0
        for domain, n in call.rollouts.items():
            d, longer = self.found["domains"][domain], self.longer(domain)
            whole, few = self.pick(d["sample"]), self.pick(d["sample_few"])
            span = d["rollouts"] - d["few"]
            each = max(0.0, (whole - few) / span) if span > 0 else whole / d["rollouts"]
            waves = max(1.0, n / BATCH)
            first.append(max(0.0, few - each * d["few"]) * longer * waves)
            learning = (call.learns + SCORED * call.scored) * self.pick(d["update"]) * longer
            rest += n * (each * longer + (self.pick(d["verify"]) + learning) / d["rollouts"])
        return max(first) + rest


def likely(found: dict, stage: study.Stage, longest: int, lengths: dict[str, float] | None = None) -> Cost:
    """The cost of a stage by a calibration; `longest` is the most tokens of an answer, `lengths` what is known of the mean."""
    work = parts(stage)
    expected = Measured(found, lengths).seconds(work)
    low, high = (Measured(found, lengths, pick=pick).seconds(parts(stage, learns)) for pick, learns in ((min, 0.2), (max, 0.9)))
    mean = sum(d["length"] for d in found["domains"].values()) / len(DOMAINS)
    most = Measured(found, lengths, stretch=max(1.0, longest / mean), pick=max).seconds(parts(stage, 1.0))
    return Cost(expected, low / sqrt(MODEL_ERROR), high * sqrt(MODEL_ERROR), max(most, high * sqrt(MODEL_ERROR)))
