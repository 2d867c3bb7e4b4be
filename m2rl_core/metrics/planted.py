"""Synthetic worlds whose answer is known, as frames: does an instrument recover what was planted?

Scores, gains, judges and divergences, each in the form that the stages write it; the notebooks and the tests hold the
real measures against them. `planted_models` has those of weights and policies. Every answer is that of the population
that items are drawn from, so that an interval over items should hold it in 95 % of the worlds.
"""
from __future__ import annotations

from collections.abc import Collection, Sequence
from math import sqrt

import numpy as np
import pandas as pd

from m2rl_core.metrics.skills import EXPERTS

KINDS = ("both", "model only", "experts only", "neither")  # who gains on an item


def rows(chances: dict[str, np.ndarray], k: int, rng: np.random.Generator, benchmark: str = "b") -> pd.DataFrame:
    """Evaluation rows: model, benchmark, category, item, sample, score; `chances[model]`: (n,) of a right sample."""
    right = np.stack(list(chances.values()))  # (M, n)
    score = rng.random((*right.shape, k)) < right[:, :, None]  # (M, n, K)
    m, n, _ = score.shape
    return pd.DataFrame({
        "model": np.repeat(list(chances), n * k), "benchmark": benchmark, "category": "",
        "item": np.tile(np.repeat([f"{benchmark}/{i}" for i in range(n)], k), m), "sample": np.tile(np.arange(k), m * n),
        "score": score.ravel().astype(float)})


def difficulties(n: int, level: float, gap: float, rng: np.random.Generator, spread: float = 2.0) -> dict[str, np.ndarray]:
    """Chances of models `a` and `b` on n items: mean `level` for b, `a` better by `gap` on every one of them.

    A Beta distribution of items whose two parameters add up to `spread`; below 2 most are easy or hard.
    ValueError where the two levels do not fit into [0, 1].
    """
    mean = level / (1 - gap)
    if not 0 < mean < 1:
        raise ValueError(f"level {level:g} with a gap of {gap:g} leaves [0, 1]: level + gap must stay below 1")
    low = (1 - gap) * rng.beta(spread * mean, spread * (1 - mean), n)
    return {"a": low + gap, "b": low}


def gains(n: int, shares: Sequence[float], rng: np.random.Generator, before: float = 0.0, after: float = 1.0,
          experts: Sequence[str] = EXPERTS) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Chances of sft, the experts and `model`, and the kind (of `KINDS`) of each item, drawn with these four shares.

    Whoever gains on an item goes from `before` to `after`; each expert gains on its part of the experts' items.
    """
    kind = rng.choice(len(KINDS), size=n, p=shares)
    by_experts, by_model = np.isin(kind, (0, 2)), np.isin(kind, (0, 1))
    owner = rng.integers(len(experts), size=n)
    chances = {"sft": np.full(n, before), "model": np.where(by_model, after, before)}
    for j, expert in enumerate(experts):
        chances[expert] = np.where(by_experts & (owner == j), after, before)
    return chances, kind


def gain_cosine(shares: Sequence[float]) -> float:
    """The cosine of the true gains of `gains`: both / sqrt((both + model) (both + experts))."""
    both, model, experts, _ = shares
    return both / sqrt((both + model) * (both + experts))


def gain_chance(shares: Sequence[float]) -> float:
    """The cosine of the same gains on shuffled items: sqrt((both + model) (both + experts))."""
    both, model, experts, _ = shares
    return sqrt((both + model) * (both + experts))


def judged(n: int, k: int, right: float, sensitivity: float, specificity: float, rng: np.random.Generator,
           model: str = "sft", benchmark: str = "b", mode: str = "outcome") -> pd.DataFrame:
    """Verdicts on n answers, each right with chance `right`: columns as the judge stage writes them, less the texts.

    The judge says yes to a right answer with chance `sensitivity` and no to a wrong one with chance `specificity`:
    its balanced accuracy is their mean, its accuracy the mean weighted by `right`.
    """
    truth = (rng.random(n) < right).astype(int)
    yes = np.where(truth == 1, sensitivity, 1 - specificity)
    said = (rng.random((n, k)) < yes[:, None]).astype(int).ravel()  # (n K,)
    truth = np.repeat(truth, k)
    return pd.DataFrame({
        "model": model, "benchmark": benchmark, "item": np.repeat([f"{benchmark}/{i}" for i in range(n)], k),
        "sample": np.tile(np.arange(k), n), "mode": mode, "truth": truth, "said": said,
        "correct": (said == truth).astype(int)})


def correlated(n: int, rho: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """n pairs (models, say) of a bivariate normal whose correlation is `rho`: two (n,)."""
    x, y = rng.normal(size=(2, n))
    return x, rho * x + sqrt(1 - rho**2) * y


def divergences(near: Collection[tuple[str, str]], domains: Sequence[str], policy: str, prompts: int, samples: int,
                rng: np.random.Generator, own: float = 0.2, noise: float = 0.5) -> pd.DataFrame:
    """A table of divergences as the KL stage writes it: in domain a, expert b is near where (a, b) is in `near`.

    The own expert is at `own` nats a response, a near one at 1.1 times, the others at three times that; each response
    varies by a factor of mean one, whose logarithm has the standard deviation `noise`.
    """
    cells, each = [(a, b) for a in domains for b in domains], prompts * samples
    mean = np.repeat([own * (1.0 if a == b else 1.1 if (a, b) in near else 3.0) for a, b in cells], each)
    draws = mean * np.exp(noise * rng.normal(size=len(mean)) - noise**2 / 2)
    return pd.DataFrame({
        "policy": policy, "expert": np.repeat([f"rl-{b}" for _, b in cells], each),
        "domain": np.repeat([a for a, _ in cells], each),
        "prompt": np.tile(np.repeat(np.arange(prompts), samples), len(cells)),
        "sample": np.tile(np.arange(samples), prompts * len(cells)), "tokens": 10, "kl_exact": draws / 10})
