"""Do the domains of one batch pull the weights the same way? Cosines between their gradients (section 3.3).

The paper says that domains interfere little and shows experts' weights; this looks at the mix while it trains. The
gradient of a batch is the sum over its domains, so each domain's part is one backward pass over its rollouts.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import pandas as pd
from torch import Tensor

from m2rl_core.metrics.every import Every
from m2rl_core.metrics.groups import WHOLE, group_of
from m2rl_core.models.policy import Policy
from m2rl_core.engines.rollout import Rollout

def cosines(gradients: dict[str, dict[str, Tensor]], layers: int) -> pd.DataFrame:
    """Every pair of domains in every group of weights: group, a, b, cosine, norm_a, norm_b; NaN without a gradient.

    gradients[domain]: {name: gradient}, the same names for each; missing entries of a domain are zeros.
    """
    dots: dict[tuple[str, str, str], float] = {}
    for name in sorted({name for of in gradients.values() for name in of}):
        flat = {domain: of[name].double().flatten() for domain, of in gradients.items() if name in of}
        for a, b in [*combinations(sorted(flat), 2), *((d, d) for d in flat)]:
            for group in (group_of(name, layers), WHOLE):
                dots[group, a, b] = dots.get((group, a, b), 0.0) + float(flat[a] @ flat[b])
    rows = []
    for group in dict.fromkeys(group for group, _, _ in dots):
        for a, b in combinations(sorted(gradients), 2):
            norms = [dots.get((group, d, d), 0.0) ** 0.5 for d in (a, b)]
            cosine = dots.get((group, a, b), 0.0) / (norms[0] * norms[1]) if all(norms) else float("nan")
            rows.append({"group": group, "a": a, "b": b, "cosine": cosine, "norm_a": norms[0], "norm_b": norms[1]})
    return pd.DataFrame(rows, columns=["group", "a", "b", "cosine", "norm_a", "norm_b"])


def measure(policy: Policy, rollouts: Sequence[Rollout], domains: Iterable[str],
            backward: Callable[[list[Rollout]], object]) -> pd.DataFrame:
    """`cosines` of the domains of a batch; `backward(part)` leaves the gradient of a part on the policy's weights.

    Leaves no gradient behind. Holds one copy of the gradient for each domain.
    """
    gradients = {}
    for domain in domains:
        clear(policy)
        part = [r for r in rollouts if r.row.domain == domain]
        if part:
            backward(part)
        gradients[domain] = policy.gradients()
    clear(policy)
    return cosines(gradients, policy.shape.layers)


def clear(policy: Policy) -> None:
    """Remove the gradient from every weight."""
    for weight in policy.weights.values():
        weight.grad = None


class Interference:
    """Measures every few steps of a run on several domains; what it writes is a function of the step."""

    def __init__(self, ctx, every: int, domains: Sequence[str]):
        self.every, self.domains = Every(ctx, "interference", every if len(domains) > 1 else 0), domains

    def look(self, step: int, policy: Policy, rollouts: Sequence[Rollout], backward: Callable) -> dict[str, float]:
        """Before the update of `step` (0-based), where it is due: the gradients of each domain's rollouts; seconds."""
        return self.every.look(step, lambda: measure(policy, rollouts, self.domains, backward))

    def finish(self) -> None:
        """Gather what was seen into `interference.parquet` beside the weights."""
        self.every.finish()
