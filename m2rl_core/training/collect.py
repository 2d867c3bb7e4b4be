"""A batch to learn from, for GRPO and for distillation alike: rollouts, their verdicts, and what they looked like."""
from __future__ import annotations

import time

import torch
from torch import Tensor

from m2rl_core import ranks
from m2rl_core.domains import Row, Verdict, environments, prepare, rewards
from m2rl_core.engines import TORCH, Engine, SharedEngine
from m2rl_core.engines.rollout import Rollout
from m2rl_core.models.policy import Policy

Share = tuple[list[Rollout], list[Verdict], dict[str, float]]  # of a batch: what one process made of it, in which seconds
Batch = tuple[list[Rollout], list[Verdict], Tensor, dict[str, float]]  # all of it, with the scores (P, G)


def collect(policy: Policy, rows: list[Row], spec, seed: int, engine: Engine = TORCH) -> Batch:
    """`spec.group` rollouts of each row with their verdicts, the scores (P, G), and the seconds that both took.

    Of several processes each samples and verifies its share, and all have the whole batch.
    """
    return joined(share(policy, rows, spec, seed, engine), spec.group)


def share(policy: Policy, rows: list[Row], spec, seed: int, engine: Engine) -> Share:
    """What this process samples and verifies of a batch, without a word to the others: it may run beside anything else.

    Of several processes' policies only a whole one (`Policy.whole`) is without their words.
    """
    start = time.perf_counter()
    prepare(rows)
    draw = engine.own if isinstance(engine, SharedEngine) else engine.sample
    rollouts = draw(policy, rows, spec.group, generator=torch.Generator().manual_seed(seed),
                    temperature=spec.temperature, max_new_tokens=spec.max_new_tokens, max_turns=spec.max_turns)
    sampled = time.perf_counter()
    verdicts = environments.verdicts(rollouts, rewards)
    return rollouts, verdicts, {"seconds_sample": sampled - start, "seconds_verify": time.perf_counter() - sampled}


def joined(own: Share, group: int) -> Batch:
    """The batch from every process's share, on all of them; the seconds are those of the slowest."""
    parts = ranks.gather(own)
    rollouts, verdicts = ([one for part in parts for one in part[i]] for i in (0, 1))
    return rollouts, verdicts, scores_of(verdicts, group), {name: max(part[2][name] for part in parts) for name in own[2]}


def scores_of(verdicts: list[Verdict], group: int) -> Tensor:
    """The scores of the rollouts of each prompt, (P, G)."""
    return torch.tensor([v.score for v in verdicts]).view(-1, group)


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
