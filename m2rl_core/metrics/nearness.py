"""Section 3.4, beyond its four rows: how sure is it who is near whom, and do near partners help more than far ones?

Everything is drawn from `Measured` cells, so prompts and items are resampled as for every other interval. Partners
are compared within a domain only: domains differ in length of responses and in room for gains.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, permutations

import numpy as np


def near(kl: np.ndarray, factor: float) -> np.ndarray:
    """Eq. 1 on KL_A(E_B), (..., A, B): near[a, b] where b's is below `factor` x a's own; never for a itself."""
    own = np.diagonal(kl, axis1=-2, axis2=-1)
    return (kl < factor * own[..., None]) & ~np.eye(kl.shape[-1], dtype=bool)


def nearest(kl: np.ndarray) -> np.ndarray:
    """For each A the other expert with the lowest KL_A, (..., A)."""
    return np.where(np.eye(kl.shape[-1], dtype=bool), np.inf, kl).argmin(-1)


def agreement(kl: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Kendall's count within domains, (...,): over pairs of partners of one domain, +1 where the nearer helps more.

    `kl` and `change` (..., A, partners); -1 where the nearer helps less, 0 where a side is tied.
    """
    total = 0
    for i, j in combinations(range(kl.shape[-1]), 2):
        apart = [np.sign(np.round(side[..., i] - side[..., j], 9)) for side in (kl, change)]  # rounding breaks no tie
        total = total - apart[0] * apart[1]
    return np.sum(total, axis=-1)


def chance(kl: np.ndarray, change: np.ndarray) -> dict[int, float]:
    """The exact distribution of `agreement` where the partners of each domain change places at random, {count: share}.

    `kl` and `change` (A, partners). All orders of all domains together (24^5 for four partners of five) are counted,
    not sampled: domains are independent, so the distributions of each are folded.
    """
    found = {0: 1.0}
    for a in range(len(kl)):
        orders = np.array([change[a, list(order)] for order in permutations(range(kl.shape[1]))])
        counts = agreement(kl[a][None, None], orders[:, None])
        folded: dict[int, float] = {}
        for old, share in found.items():
            for count in counts:
                folded[old + int(count)] = folded.get(old + int(count), 0.0) + share / len(counts)
        found = folded
    return found


def p_value(count: float, by_chance: Mapping[int, float]) -> float:
    """Two-sided: the share of all orders whose count is at least as far from 0."""
    return min(1.0, sum(share for other, share in by_chance.items() if abs(other) >= abs(count)))


def comparisons(partners: int, domains: int) -> int:
    """Pairs of partners that `agreement` counts over."""
    return domains * partners * (partners - 1) // 2


def partner_effects(domain: str, domains: Sequence[str], name) -> dict[str, dict[str, float]]:
    """What each partner adds to `domain` over all merges that hold it: {partner: {model: weight}}, for a contrast.

    The mean over all orders in which the others can join the domain's expert of the change as the partner joins (its
    Shapley value), so that the partners' effects add up to the merge of all minus the expert alone. `name(domains)`
    gives the model merged from some domains, in the study's order.
    """
    others = [d for d in domains if d != domain]
    found: dict[str, dict[str, float]] = {}
    for partner in others:
        rest, weights = [d for d in others if d != partner], {}
        for size in range(len(rest) + 1):
            groups = list(combinations(rest, size))
            for group in groups:
                for held, sign in (((domain, *group, partner), 1), ((domain, *group), -1)):
                    model = name(sorted(held, key=list(domains).index))
                    weights[model] = weights.get(model, 0.0) + sign / len(groups) / len(others)
        found[partner] = weights
    return found
