"""How noisy is the gradient of MT-OPD, from sampled tokens and from the full distribution? (section 3.2)

Both have the same expectation: at each token that a rollout has come to, the sampled token's gradient is a draw whose
mean is the full one. Each estimator's gradient of each prompt's rollouts tells how much prompts and draws differ.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from torch import Tensor

from m2rl_core.engines.rollout import Rollout
from m2rl_core.metrics.groups import WHOLE, group_of
from m2rl_core.metrics.interference import clear
from m2rl_core.models.policy import Policy

COLUMNS = ["group", "estimator", "parts", "trace", "norm", "noise"]
GAP = "sampled - full"


def by_prompt(rollouts: Sequence[Rollout], group: int, most: int = 8) -> list[list[Rollout]]:
    """The rollouts of each of the first `most` prompts of a batch, of whom `group` each follow one another."""
    return [list(rollouts[i:i + group]) for i in range(0, min(len(rollouts), most * group), group)]


def measure(policy: Policy, parts: Sequence[list[Rollout]],
            estimators: Mapping[str, Callable[[list[Rollout]], object]], seconds: dict[str, float]) -> pd.DataFrame:
    """Spread of each estimator's gradient over `parts`, by group of weights; a line for each, and for their difference.

    An estimator leaves the gradient of a part's own mean loss on the policy's weights; the two are "sampled" and
    "full". `trace`: of the covariance of one part's gradient; `norm`: of the mean over M parts; `noise`: trace / M by
    norm squared, what noise alone is expected to leave of that square. It is near 1 where the mean is truly zero, as
    it is for the difference. NaN for a single part. What each took is added to `seconds` as `seconds_<name>`. Leaves no
    gradient behind; holds two gradients and two sums.
    """
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in estimators}
    squares: dict[tuple[str, str], float] = {}
    for part in parts:
        found = {}
        for name, backward in estimators.items():
            clear(policy)
            start = time.perf_counter()
            backward(part)
            key = f"seconds_{name}"
            seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start
            found[name] = policy.gradients()
        for weight in sorted(found["sampled"]):
            for name, gradient in _both(found, weight):
                _add(squares, policy, name, weight, gradient)
        for name, gradients in found.items():
            for weight, gradient in gradients.items():
                sums[name][weight] = sums[name][weight] + gradient if weight in sums[name] else gradient
    clear(policy)
    means: dict[tuple[str, str], float] = {}
    for weight in sorted(sums["sampled"]):
        for name, total in _both(sums, weight):
            _add(means, policy, name, weight, total / len(parts))
    rows = []
    for (name, group), square in squares.items():
        m, mean = len(parts), means[name, group]
        trace = max(0.0, square - m * mean) / (m - 1) if m > 1 else float("nan")
        noise = trace / m / mean if mean else float("nan")
        rows.append({"group": group, "estimator": name, "parts": m, "trace": trace, "norm": mean ** 0.5, "noise": noise})
    return pd.DataFrame(rows, columns=COLUMNS)


def _both(gradients: Mapping[str, Mapping[str, Tensor]], weight: str) -> list[tuple[str, Tensor]]:
    sampled, full = gradients["sampled"][weight], gradients["full"][weight]
    return [("sampled", sampled), ("full", full), (GAP, sampled - full)]


def _add(squares: dict, policy: Policy, name: str, weight: str, gradient: Tensor) -> None:
    """Add a gradient's squared norm to its group's and to that of all weights."""
    square = float(gradient.double().square().sum())
    for group in (WHOLE, group_of(weight, policy.shape.layers)):
        squares[name, group] = squares.get((name, group), 0.0) + square
