"""What a token of a rollout weighs in the gradient: advantages, the clipped loss, corrections, and what divides them.

Everything works on the sampled tokens of a micro-batch, (N,), with `owner` (N,), the rollout of each. Sums are
divided by `Totals` of the whole batch, so that micro-batches, skipped groups and processes do not show.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from m2rl_core.engines.rollout import Rollout
from m2rl_core.models.policy import Policy
from m2rl_core.models.qwen3 import head


@dataclass(frozen=True)
class Loss:
    """Settings of a policy-gradient loss, as a profile's `rl` states them; `specs.RlSpec` says what each is."""

    loss: str
    temperature: float
    clip_low: float
    clip_high: float
    is_correction: str
    is_low: float
    is_high: float
    is_level: str = "token"
    kl: float = 0.0
    entropy: float = 0.0

    @staticmethod
    def of(spec, **changes) -> Loss:
        """The fields of a spec that are a loss's, some of them replaced."""
        found = {field.name: getattr(spec, field.name) for field in fields(Loss) if hasattr(spec, field.name)}
        return Loss(**found | changes)


@dataclass(frozen=True)
class Totals:
    """The whole batch of a step, on all processes: rollouts, their sampled tokens, and the most that one may have."""

    sequences: int
    tokens: int
    longest: int

    @staticmethod
    def of(rollouts: Sequence[Rollout], longest: int) -> Totals:
        return Totals(len(rollouts), sum(r.length for r in rollouts), longest)


def advantages(scores: Tensor, scale: str = "group") -> Tensor:
    """(r - mean) / (std + 1e-6) inside each group, std with n-1; scores (P, G) to advantages (P, G).

    With `scale` "none" nothing divides (Dr. GRPO). A group whose scores are all equal gets exactly zero, not the
    residue of rounding. ValueError for groups of one, which have nothing to be compared with.
    """
    if scores.shape[1] < 2:
        raise ValueError(f"advantages: groups of {scores.shape[1]}, but at least 2 scores are needed to compare")
    found = scores - scores.mean(dim=1, keepdim=True)
    if scale == "group":
        found = found / (scores.std(dim=1, keepdim=True) + 1e-6)
    return torch.where((scores == scores[:, :1]).all(dim=1, keepdim=True), torch.zeros_like(found), found)


def importance_weights(trainer: Tensor, sampler: Tensor, owner: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Weights pi_trainer / pi_sampler of the tokens and the tokens that count, both (N,), from their log-probs (N,).

    "none": weight 1; "tis": the ratio truncated at `is_high`; "mis": the ratio inside [is_low, is_high], other
    tokens do not count. At level "sequence" all tokens of a rollout have the geometric mean of their ratios: a
    product would fall with the length whatever the mismatch.
    """
    gap = trainer.detach() - sampler
    if loss.is_level == "sequence":
        gap = sequence_mean(gap, torch.ones_like(gap, dtype=torch.bool), owner, int(owner.max()) + 1)[owner]
    ratio = gap.clamp(-20, 20).exp()
    if loss.is_correction == "none":
        return torch.ones_like(ratio), torch.ones_like(ratio, dtype=torch.bool)
    if loss.is_correction == "tis":
        return ratio.clamp(max=loss.is_high), torch.ones_like(ratio, dtype=torch.bool)
    if loss.is_correction == "mis":
        return ratio, (ratio >= loss.is_low) & (ratio <= loss.is_high)
    raise ValueError(f"is_correction {loss.is_correction!r}: one of none, tis, mis")


def policy_loss(logp: Tensor, old: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Clipped surrogate of each token, (N,): -min(rho A, clip(rho, 1 - low, 1 + high) A), rho = exp(logp - old)."""
    rho = (logp - old).exp()
    return -torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)


def kl_estimate(logp: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) that is never below 0, (N,): r - 1 - log r, with r = pi_ref / pi.

    Over tokens that the policy drew, its mean is the KL and the mean of its gradient is the KL's. The second needs
    the factor pi / pi, which is 1: without it the gradient is that of the KL the other way round.
    """
    gap = reference - logp
    return (gap.exp() - gap - 1) * (logp - logp.detach()).exp()


def sequence_mean(values: Tensor, counted: Tensor, owner: Tensor, sequences: int) -> Tensor:
    """Mean over the counted tokens of each sequence, (sequences,); 0 for a sequence without any."""
    zeros = torch.zeros(sequences, device=values.device)
    total = zeros.index_add(0, owner, values * counted)
    return total / zeros.index_add(0, owner, counted.float()).clamp(min=1)


def reduced(values: Tensor, counted: Tensor, owner: Tensor, loss: str, totals: Totals) -> Tensor:
    """A micro-batch's share of the batch's loss, a scalar.

    "grpo" (the paper's): the mean over rollouts of each one's mean over counted tokens. "dapo": the sum over tokens
    by all tokens of the batch. "dr_grpo": by the tokens that the rollouts might have had. Tokens that do not count
    leave the divisor of "grpo" alone: the other two know theirs before any token is scored.
    """
    if loss == "grpo":
        return sequence_mean(values, counted, owner, int(owner.max()) + 1).sum() / totals.sequences
    if loss == "dapo":
        return (values * counted).sum() / totals.tokens
    if loss == "dr_grpo":
        return (values * counted).sum() / (totals.sequences * totals.longest)
    raise ValueError(f"loss {loss!r}: one of grpo, dapo, dr_grpo")


def reverse_kl(student: Policy, teacher: Policy, hidden: Tensor, teacher_hidden: Tensor, temperature: float,
               chunk: int = 512) -> Tensor:
    """KL(student || teacher) of each token's full distribution, (N,), from both hidden states (N, D).

    Works `chunk` tokens at a time and computes a chunk's distributions again in the backward pass, so that no more
    than (chunk, V) numbers of a kind exist at once in either. The teacher gets no gradient.
    """
    def exact(h: Tensor, th: Tensor) -> Tensor:
        logp = F.log_softmax(F.linear(h, head(student.weights)).float() / temperature, dim=-1)  # (n, V)
        with torch.no_grad():
            logq = F.log_softmax(F.linear(th, head(teacher.weights)).float() / temperature, dim=-1)
        return (logp.exp() * (logp - logq)).sum(-1)
    return torch.cat([checkpoint(exact, h, th, use_reentrant=False, preserve_rng_state=False)
                      for h, th in zip(hidden.split(chunk), teacher_hidden.split(chunk), strict=True)])
