"""The paper's Table 2 under the cost model: five rows fit it, two check it.

The paper names neither the GPU nor its number, and no length of an answer but SFT's (appendix A: 7000 tokens on average).
So the five experts' GPU hours fix the length of each domain's answers, and one efficiency is chosen such that the mix of
all five is as long as SFT's answers. RL-Multi and MT-OPD have no parameter of their own: they are predictions. What the
reward costs is inside of the lengths (a domain with a slow verifier looks longer).
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import pandas as pd

from m2rl_core import paper
from m2rl_core.cost import lengths, speed
from m2rl_core.cost.machines import machine
from m2rl_core.cost.shapes import published
from m2rl_core.domains import DOMAINS

GPU, GPUS = "h800", 32  # the release says "verified on 32 H800"; the paper names none
MEAN = 7000.0  # tokens of SFT's answers, appendix A
LONGEST, LONGEST_OPD = 32768.0, 16384.0  # appendix A; the released script of MT-OPD
PROMPT = 500.0
TRAIN_TO_DECODE = 0.6  # share of the peak in training, over the share of the bandwidth in decoding
RL_PASSES, OPD_PASSES = 2.0, 2.0  # reference and old log-probs; old log-probs and the teacher's
PROMPTS = {"math": "math prompts", "coding": "coding prompts", "science": "science prompts", "if": "instruction prompts",
           "agent": "agent prompts"}


@dataclass(frozen=True)
class Fit:
    """Fitted efficiency, and the mean tokens of an answer in each domain (their mix has the mean `MEAN`)."""

    efficiency: speed.Efficiency
    lengths: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean tokens of an answer of the mix."""
        return sum(share * self.lengths[domain] for domain, share in mix().items())


@cache
def _printed() -> pd.DataFrame:
    return paper.table(2)


@cache
def mix() -> dict[str, float]:
    """Share of each domain in the natural mix of prompts (section 3.2)."""
    stated = paper.settings().set_index("name")["stated"]
    rows = {domain: float(stated[name]) for domain, name in PROMPTS.items()}
    return {domain: rows[domain] / sum(rows.values()) for domain in DOMAINS}


def efficiency(level: float) -> speed.Efficiency:
    """Shares that belong to one level: decoding at `level` of the bandwidth."""
    return speed.Efficiency(level * TRAIN_TO_DECODE, level)


def hours(row: str, parts: dict[float, float], found: speed.Efficiency) -> float:
    """GPU hours of a row of Table 2 whose answers are a mix of these mean lengths, {tokens: share}.

    A mixed step waits for the longest answers of all its domains.
    """
    printed, opd = _printed().loc[row], row == "mt-opd"
    longest, group = LONGEST_OPD if opd else LONGEST, int(printed["rollouts"])
    work = speed.Work(int(printed["batch_size"]) * group, PROMPT, lengths.mixture(parts, longest), longest, group,
                      OPD_PASSES if opd else RL_PASSES)
    return speed.step(published()["Qwen3-4B"], machine(GPU), GPUS, work, found).seconds * GPUS / 3600 * int(printed["steps"])


def length_for(row: str, target: float, found: speed.Efficiency) -> float:
    """The mean length at which a row costs `target` GPU hours (bisection); the longest possible where none is enough."""
    low, high = 10.0, LONGEST
    for _ in range(18):
        middle = math.sqrt(low * high)
        if hours(row, {middle: 1.0}, found) < target:
            low = middle
        else:
            high = middle
    return low


@cache
def fit() -> Fit:
    """Lengths from the experts' rows, the efficiency from the mean length of the mix."""
    printed = _printed()["gpu_hours"]
    low, high = 0.02, 1.0
    for _ in range(14):
        level = math.sqrt(low * high)
        found = efficiency(level)
        each = {d: length_for(f"rl-{d}", printed[f"rl-{d}"], found) for d in DOMAINS}
        if sum(mix()[d] * each[d] for d in DOMAINS) < MEAN:
            low = level
        else:
            high = level
    return Fit(found, each)


def check() -> pd.DataFrame:
    """One row for each of Table 2's: printed and modelled GPU hours, whether it was fitted, and the residual in percent.

    `naive` is the model with one length, `MEAN`, for all domains: what one would have said before any training.
    """
    found, printed = fit(), _printed()["gpu_hours"]
    lines = []
    for row in printed.index:
        domain = row.removeprefix("rl-")
        parts = {found.lengths[domain]: 1.0} if domain in DOMAINS else {found.lengths[d]: mix()[d] for d in DOMAINS}
        modelled, naive = hours(row, parts, found.efficiency), hours(row, {MEAN: 1.0}, found.efficiency)
        lines.append({"row": row, "use": "fit" if domain in DOMAINS else "check", "printed": printed[row],
                      "modelled": modelled, "residual": 100 * (modelled / printed[row] - 1), "naive": naive,
                      "naive residual": 100 * (naive / printed[row] - 1),
                      "tokens an answer": sum(share * length for length, share in parts.items())})
    return pd.DataFrame(lines)


def error() -> float:
    """The largest factor by which a checked row is missed."""
    checked = check().query("use == 'check'")
    return float(max(max(p / m, m / p) for p, m in zip(checked["printed"], checked["modelled"], strict=True)))
