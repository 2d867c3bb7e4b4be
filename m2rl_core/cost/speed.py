"""Seconds of a step on N GPUs: sampling, scoring, the update, and the new weights' way to the sampler.

Each part takes the larger of two times: its operations at a share of the peak, its bytes at a share of the bandwidth.
Trainer and sampler share the GPUs and take turns (colocated). Weights are sharded over the least GPUs that hold them,
whole copies of that are replicated (HSDP); a sequence is never split over GPUs (no context parallelism), and experts of a
layer are gathered like any other weight (no expert parallelism).
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from m2rl_core.cost import memory
from m2rl_core.cost.machines import Machine
from m2rl_core.cost.shapes import Shape

MICRO_TOKENS = 16384  # of one forward and backward pass on one GPU
GROUPS = tuple(2**i for i in range(13))


@dataclass(frozen=True)
class Efficiency:
    """Reached shares of what a machine could do: operations in training, bandwidth in decoding, and the wire."""

    train: float
    decode: float
    wire: float = 0.6

    def times(self, factor: float) -> Efficiency:
        """Everything faster by `factor`."""
        return Efficiency(self.train * factor, self.decode * factor, min(1.0, self.wire * factor))


@dataclass(frozen=True)
class Work:
    """One step: `rollouts` answers, as long as `spread` says (equally likely tokens, sorted), to prompts of `prompt` tokens.

    `longest` is what an answer may have, `group` of them share a prompt's prefill, `passes` counts how often all is scored
    besides the update, `learns` is the share that has a gradient.
    """

    rollouts: int
    prompt: float
    spread: tuple[float, ...]
    longest: float
    group: int = 1
    passes: float = 0.0
    recompute: bool = True
    learns: float = 1.0

    @cached_property
    def mean(self) -> float:
        """Tokens of an answer on average."""
        return float(np.mean(self.spread))

    @cached_property
    def seen(self) -> float:
        """Tokens that a sampled token sees on average, its prompt among them: long answers have more, and see more."""
        lengths = np.array(self.spread)
        return self.prompt + float((lengths**2).mean() / lengths.mean() / 2)


@dataclass(frozen=True)
class Step:
    """Seconds of each part of a step, and what bounds the longest of them; `why` says why it does not fit (else "")."""

    sample: float
    train: float
    update: float
    bound: str
    shard: int
    ways: int
    why: str = ""

    @property
    def seconds(self) -> float:
        return self.sample + self.train + self.update


def rates(shape: Shape, machine: Machine, gpus: int, work: Work, efficiency: Efficiency) -> tuple[float, float]:
    """Tokens a second that each GPU samples and trains on in a step."""
    found = step(shape, machine, gpus, work, efficiency)
    sampled, trained = work.rollouts * work.mean, work.rollouts * (work.mean + work.prompt / work.group)
    return sampled / found.sample / gpus, trained / found.train / gpus


def reaching(shape: Shape, machine: Machine, gpus: int, work: Work, efficiency: Efficiency, sampling: float = 0.0,
             training: float = 0.0) -> Efficiency:
    """The efficiency at which a step has the given rates, tokens a second on each GPU (0: as it is)."""
    for _ in range(30):  # each rate also hangs a little on the other's share
        here = rates(shape, machine, gpus, work, efficiency)
        efficiency = Efficiency(efficiency.train * (training / here[1] if training else 1.0),
                                efficiency.decode * (sampling / here[0] if sampling else 1.0), efficiency.wire)
    return efficiency


def touched(shape: Shape, batch):
    """Weights that a decoding step of `batch` tokens reads: of experts those that at least one token is sent to."""
    if not shape.experts:
        return shape.active
    share = 1 - (1 - shape.used / shape.experts) ** batch
    return shape.active + shape.layers * (share * shape.experts - shape.used) * shape.expert


def decoding(shape: Shape, machine: Machine, ways: int, batch, context, efficiency: Efficiency):
    """Seconds of one token for each of `batch` rollouts on the `ways` GPUs of one copy: by bytes, by operations.

    `batch` and `context` (tokens that each sees) are numbers or arrays of one shape.
    """
    moved = memory.HALF * touched(shape, batch) + batch * context * shape.key_values()
    return (moved / (ways * machine.bandwidth * efficiency.decode),
            shape.forward(batch, context) / (ways * machine.flops * efficiency.train))


def sampling(shape: Shape, machine: Machine, gpus: int, ways: int, work: Work, efficiency: Efficiency) -> tuple[float, str]:
    """Seconds until the last of a step's rollouts ends, and what bounds them.

    While more rollouts wait than fit beside the weights, as many as fit are in flight; the last of them end one by one.
    """
    mine = max(1.0, work.rollouts / max(1, gpus // ways))
    most = max(1, memory.rollouts_at_once(shape, machine, ways, work.prompt + work.mean))
    flying, spread = min(mine, most), np.array(work.spread)
    left = np.maximum(1.0, flying * (1 - np.arange(len(spread)) / len(spread)))  # places empty, shortest first
    begin = np.concatenate(([0.0], spread[:-1]))
    batch, context = np.append(left, flying), work.prompt + np.append((begin + spread) / 2, work.mean / 2)
    rounds = np.append(spread - begin, (mine - flying) * work.mean / flying)  # before that, the queue keeps all places taken
    by_bytes, by_operations = decoding(shape, machine, ways, batch, context, efficiency)
    slower = np.maximum(by_bytes, by_operations) * rounds
    prompts = mine / work.group
    prefill = shape.forward(prompts * work.prompt, work.prompt / 2, prompts) / (ways * machine.flops * efficiency.train)
    seconds = float(slower.sum() + prefill)
    alone = max(decoding(shape, machine, ways, 1, work.prompt + spread[-1] / 2, efficiency)) * spread[-1]
    bound = "memory bandwidth" if slower[by_bytes >= by_operations].sum() > seconds / 2 else "operations"
    return seconds, "the longest answer" if alone > 0.7 * seconds else bound


def updating(shape: Shape, machine: Machine, gpus: int, shard: int, work: Work, efficiency: Efficiency) -> tuple[float, str]:
    """Seconds of scoring and of the gradient step, and what bounds them; at least one whole sequence is on a GPU."""
    tokens = work.rollouts * (work.mean + work.prompt / work.group)
    operations = work.learns * shape.training(tokens, work.seen, work.rollouts * work.mean, work.recompute) + (
        work.passes * shape.forward(tokens, work.seen, work.rollouts * work.mean))
    busiest = max(tokens / gpus, max(work.spread))
    by_operations = operations * (busiest / tokens) / (machine.flops * efficiency.train)
    rounds = max(1.0, busiest / max(MICRO_TOKENS, work.longest + work.prompt))
    gathers = 2 * work.learns + work.passes  # forward and backward; scoring once
    moved = (gathers * memory.HALF + memory.GRADIENT * work.learns) * shape.parameters * rounds if shard > 1 else 0.0
    by_wire = moved / (machine.wire(shard) * efficiency.wire)
    if gpus > shard and work.learns:  # once a step, the copies agree on the gradient
        by_wire += 2 * memory.GRADIENT * shape.parameters / shard / (machine.wire(gpus) * efficiency.wire)
    return max(by_operations, by_wire), "operations" if by_operations >= by_wire else "traffic"


def sharding(shape: Shape, machine: Machine, gpus: int, tokens: float, learns: bool = True) -> int | None:
    """The least number of GPUs over which training (where nothing learns: scoring) fits; None where it does not fit `gpus`."""
    return next((n for n in GROUPS if n <= gpus and memory.fits(shape, machine, n, tokens, learns=learns)), None)


def step(shape: Shape, machine: Machine, gpus: int, work: Work, efficiency: Efficiency) -> Step:
    """One step of GRPO on `gpus` of these machines; where it does not fit, seconds are NaN and `why` says why.

    Without a share that learns, answers are sampled and scored only, and no optimizer is held.
    """
    tokens = max(MICRO_TOKENS, work.longest + work.prompt)
    shard = sharding(shape, machine, gpus, tokens, bool(work.learns))
    ways = memory.sharded_engine(shape, machine, gpus)
    nan = float("nan")
    if shard is None:
        needed = memory.training(shape, gpus, tokens).total if work.learns else memory.scoring(shape, gpus, tokens)
        what, there = "training" if work.learns else "scoring", (1 - memory.SPARE) * machine.memory
        return Step(nan, nan, nan, "–", 0, 0, f"{what} needs {needed / 1e9:,.0f} GB a GPU, {there / 1e9:,.0f} of "
                                              f"{machine.memory / 1e9:,.0f} GB can be had")
    if ways is None or not memory.rollouts_at_once(shape, machine, ways, work.prompt + work.longest):
        return Step(nan, nan, nan, "–", shard, 0, "no room for the keys and values of one longest answer")
    sample, by = sampling(shape, machine, gpus, ways, work, efficiency)
    train, limit = updating(shape, machine, gpus, shard, work, efficiency)
    update = memory.HALF * shape.parameters / ways / (machine.wire(max(shard, ways)) * efficiency.wire) if gpus > 1 else (
        2 * memory.HALF * shape.parameters / machine.bandwidth)
    bound = max((sample, f"sampling: {by}"), (train, f"training: {limit}"), (update, "weights to the sampler"))[1]
    return Step(sample, train, update, bound, shard, ways)
