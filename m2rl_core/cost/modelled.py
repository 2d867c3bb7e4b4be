"""Seconds, bytes and GPU hours of a stage on named GPUs, by the cost model: the parts of `plan` at the speed of `speed`."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from m2rl_core.cost import lengths, memory, speed
from m2rl_core.cost.machines import Machine
from m2rl_core.cost.plan import Call, Cost, Parts
from m2rl_core.cost.shapes import Shape
from m2rl_core.errors import StudyError

DISK = 1e9  # bytes a second of reading and writing models
PROMPT = 500.0  # tokens of a prompt
BASE_TOKENS = 128  # of a block of plain text


@dataclass(frozen=True)
class Cluster:
    """A model on `gpus` of a machine: answers of `lengths` by domain, at most `longest`; `row` tokens of an SFT row."""

    shape: Shape
    machine: Machine
    gpus: int
    efficiency: speed.Efficiency
    lengths: Mapping[str, float]
    longest: float
    base_batch: int = 0
    sft_batch: int = 0
    row: float = 0.0
    prompt: float = PROMPT

    def seconds(self, work: Parts) -> float:
        """Seconds of a stage; raises StudyError where the model does not fit."""
        total = sum(self.call(call) * call.times for call in work.calls)
        total += work.base_steps * self.learning(self.base_batch / BASE_TOKENS, BASE_TOKENS) if work.base_steps else 0
        total += work.sft_steps * self.learning(self.sft_batch, self.row) if work.sft_steps else 0
        return total + (work.models + work.saved) * memory.HALF * self.shape.parameters / DISK

    def call(self, call: Call) -> float:
        """Seconds of one call of the sampler, and of the update where one follows."""
        count = sum(call.rollouts.values())
        parts = {call.judge_length(self.lengths): 1.0} if call.judge else self._mix(call.rollouts, count)
        longest = float(call.judge) if call.judge else self.longest
        work = speed.Work(max(1, round(count)), self.prompt, lengths.mixture(parts, longest), longest, 1,
                          call.scored, True, call.learns)
        if call.learns or call.scored:
            return self._step(work).seconds
        ways = self._fitting(work)
        return speed.sampling(self.shape, self.machine, self.gpus, ways, work, self.efficiency)[0]

    def learning(self, rows: float, tokens: float) -> float:
        """Seconds of a step of next-token training on `rows` of a mean of `tokens`."""
        longest = min(self.longest + self.prompt, 4 * tokens)
        work = speed.Work(max(1, round(rows)), 0.0, lengths.quantiles(tokens, longest), longest)
        shard = speed.sharding(self.shape, self.machine, self.gpus, max(speed.MICRO_TOKENS, longest))
        if shard is None:
            raise StudyError(self._too_small())
        return speed.updating(self.shape, self.machine, self.gpus, shard, work, self.efficiency)[0]

    def _mix(self, rollouts: Mapping[str, float], count: float) -> dict[float, float]:
        known = max(self.lengths.values())  # of a domain of one's own nothing is known
        found: dict[float, float] = {}
        for domain, n in rollouts.items():
            length = min(self.longest, self.lengths.get(domain, known))
            found[length] = found.get(length, 0.0) + n / count
        return found

    def _step(self, work: speed.Work) -> speed.Step:
        found = speed.step(self.shape, self.machine, self.gpus, work, self.efficiency)
        if found.why:
            raise StudyError(self._too_small(found.why))
        return found

    def _fitting(self, work: speed.Work) -> int:
        ways = memory.sharded_engine(self.shape, self.machine, self.gpus)
        if ways is None or not memory.rollouts_at_once(self.shape, self.machine, ways, work.prompt + work.longest):
            raise StudyError(self._too_small("no room for the keys and values of one longest answer"))
        return ways

    def _too_small(self, why: str = "training does not fit") -> str:
        return f"GPUS={self.gpus} of {self.machine.name} are too few: {why}; name more of them"


def modelled(cluster: Cluster, expected: Parts, fewest: Parts, most: Parts, error: float) -> Cost:
    """A stage's cost on a cluster; `error` is the factor by which the model missed the rows of Table 2 that it did not fit.

    The range also holds lengths from half to one and a half times those that are taken; at most, all are at full length.
    """
    def at(factor: float, work: Parts) -> float:
        longer = {d: min(cluster.longest, factor * length) for d, length in cluster.lengths.items()}
        return Cluster(**{**cluster.__dict__, "lengths": longer}).seconds(work)
    low, high = at(0.5, fewest) / error, at(1.5, most) * error
    full = dict.fromkeys(cluster.lengths, cluster.longest)
    longest = Cluster(**{**cluster.__dict__, "lengths": full}).seconds(most) * error
    return Cost(cluster.seconds(expected), low, high, max(high, longest))
