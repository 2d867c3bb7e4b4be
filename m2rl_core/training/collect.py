"""A batch to learn from, for GRPO and for distillation alike: rollouts, their verdicts, and what they looked like."""
from __future__ import annotations

import time

import torch
from torch import Tensor

from m2rl_core import ranks
from m2rl_core.domains import Row, Verdict, environments, prepare, rewards
from m2rl_core.engines import TORCH, Engine
from m2rl_core.engines.rollout import Rollout
from m2rl_core.models.policy import Policy


def collect(policy: Policy, rows: list[Row], spec, seed: int,
            engine: Engine = TORCH) -> tuple[list[Rollout], list[Verdict], Tensor, dict]:
    """`spec.group` rollouts of each row with their verdicts, the scores (P, G), and the seconds that both took.

    Of several processes each samples and verifies its share, and all have the whole batch.
    """
    start = time.perf_counter()
    prepare(rows)
    rollouts = engine.sample(policy, rows, spec.group, generator=torch.Generator().manual_seed(seed),
                             temperature=spec.temperature, max_new_tokens=spec.max_new_tokens, max_turns=spec.max_turns)
    sampled = time.perf_counter()
    verdicts = environments.verdicts(rollouts, lambda *lists: ranks.spread(rewards, *lists))
    scores = torch.tensor([v.score for v in verdicts]).view(-1, spec.group)
    return rollouts, verdicts, scores, {"seconds_sample": sampled - start, "seconds_verify": time.perf_counter() - sampled}


def summary(rollouts: list[Rollout], verdicts: list[Verdict], scores: Tensor) -> dict:
    """What a step's rollouts looked like: mean reward (all, and by domain), length, truncation, useless groups."""
    group = scores.shape[1]
    by_domain: dict[str, list[float]] = {}
    for rollout, score in zip(rollouts[::group], scores.mean(dim=1).tolist(), strict=True):
        by_domain.setdefault(rollout.row.domain, []).append(score)
    return {
        "reward": float(scores.mean()),
        **{f"reward_{d}": sum(v) / len(v) for d, v in sorted(by_domain.items())},
        "skipped_groups": float((scores == scores[:, :1]).all(dim=1).float().mean()),
        "response_tokens": sum(r.length for r in rollouts), "prompt_tokens": sum(len(r.prompt) for r in rollouts[::group]),
        "length": sum(r.length for r in rollouts) / len(rollouts),
        "truncated": sum(r.truncated for r in rollouts) / len(rollouts), "rollouts": len(rollouts),
        **({"verifier_failures": failed} if (failed := sum(v.failed for v in verdicts)) else {}),
    }
