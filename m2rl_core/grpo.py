"""GRPO (section 3.1, appendix A): group-normalised advantages, one update for each batch of rollouts.

Lay it beside `opd.py`: only where the advantage of a token comes from differs. Departures from the released
code: importance sampling is masked (MIS) as the paper says, not truncated; the bounds are parameters.
"""
from __future__ import annotations

import time

import torch
from torch import Tensor

from m2rl_core import policy as policies
from m2rl_core.data import batch_of, rl_rows
from m2rl_core.domains import DOMAINS, Row, Verdict, rewards
from m2rl_core.evaluate import Watch
from m2rl_core.policy import Policy
from m2rl_core.qwen3 import token_logprobs
from m2rl_core.rollout import Rollout, micro_batches, response_hidden, sample
from m2rl_core.trainer import Optimization, fit


def advantages(scores: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) inside each group, std with n-1; scores (P, G) to advantages (P, G).

    A group whose scores are all equal gets exactly zero, not the residue of rounding.
    """
    centred = scores - scores.mean(dim=1, keepdim=True)
    found = centred / (scores.std(dim=1, keepdim=True) + 1e-6)
    return torch.where((scores == scores[:, :1]).all(dim=1, keepdim=True), torch.zeros_like(found), found)


def importance_weights(trainer: Tensor, sampler: Tensor, kind: str, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Token weights pi_trainer / pi_sampler and the tokens that count, both (N,).

    "none": weight 1; "tis": the ratio truncated at `high`; "mis": the ratio inside [low, high], other tokens
    leave the numerator and the denominator.
    """
    ratio = (trainer.detach() - sampler).clamp(-20, 20).exp()
    if kind == "none":
        return torch.ones_like(ratio), torch.ones_like(ratio, dtype=torch.bool)
    if kind == "tis":
        return ratio.clamp(max=high), torch.ones_like(ratio, dtype=torch.bool)
    if kind == "mis":
        return ratio, (ratio >= low) & (ratio <= high)
    raise ValueError(f"is_correction {kind!r}: one of none, tis, mis")


def policy_loss(logp: Tensor, old: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Clipped surrogate of each token, (N,): -min(rho A, clip(rho, 1 - low, 1 + high) A), rho = exp(logp - old)."""
    rho = (logp - old).exp()
    return -torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)


def sequence_mean(values: Tensor, counted: Tensor, owner: Tensor, sequences: int) -> Tensor:
    """Mean over the counted tokens of each sequence, (sequences,); 0 for a sequence without any."""
    zeros = torch.zeros(sequences, device=values.device)
    total = zeros.index_add(0, owner, values * counted)
    return total / zeros.index_add(0, owner, counted.float()).clamp(min=1)


def backward(policy: Policy, rollouts: list[Rollout], token_advantage, spec, total: int) -> dict:
    """Accumulate the gradient of the loss over `rollouts`, normalised by `total` sequences; returns statistics.

    `token_advantage(part, logp, owner, tokens)` gives the advantage of each sampled token of a micro-batch,
    (N,). Sequences that were skipped because their advantage is zero stay in `total`.
    """
    loss_sum, kept, entropy, count, off = 0.0, 0, 0.0, 0, 0.0
    for batch in micro_batches(rollouts):
        part = [rollouts[i] for i in batch]
        hidden, tokens, owner = response_hidden(policy, part)
        logp, entropies = token_logprobs(policy.weights, hidden, tokens, spec.temperature)
        sampler = torch.tensor([p for r in part for p, s in zip(r.logprobs, r.sampled, strict=True) if s], device=logp.device)
        weight, counted = importance_weights(logp, sampler, spec.is_correction, spec.is_low, spec.is_high)
        advantage = token_advantage(part, logp, owner, tokens)
        values = weight * policy_loss(logp, logp.detach(), advantage, spec.clip_low, spec.clip_high)
        loss = sequence_mean(values, counted, owner, len(part)).sum() / total
        loss.backward()
        loss_sum += float(loss.detach())
        kept += int(counted.sum())
        count += len(counted)
        entropy += float(entropies.sum())
        off = max(off, float((logp.detach() - sampler).abs().max()))
    return {"loss": loss_sum, "kept": kept / max(1, count), "entropy": entropy / max(1, count), "mismatch": off}


def build(ctx) -> None:
    """Train one policy by GRPO: an expert on its domain's rows, `rl-multi` on the natural mix of all."""
    spec, seed = ctx.profile.rl, ctx.profile.seed
    name = ctx.stage.name.removeprefix("rl-")
    domains = DOMAINS if name == "multi" else (name,)
    policy = policies.load(ctx.inputs["sft"])
    rows = rl_rows(spec, domains, seed)
    watch = Watch(ctx, spec)

    def objective(step: int) -> dict:
        prompts = batch_of(rows, spec.prompts, step, ctx.seed, "rl")
        rollouts, verdicts, scores, seconds = collect(policy, prompts, spec, ctx.seed * 100_003 + step)
        start = time.perf_counter()
        advantage = advantages(scores).flatten().tolist()
        of = {id(r): a for r, a in zip(rollouts, advantage, strict=True)}
        used = [r for r, a in zip(rollouts, advantage, strict=True) if a != 0]  # zero-advantage groups add nothing
        stats = backward(policy, used, lambda part, logp, owner, _: torch.tensor([of[id(r)] for r in part]).to(logp)[owner],
                         spec, len(rollouts)) if used else {"loss": 0.0, "kept": 1.0, "entropy": 0.0, "mismatch": 0.0}
        watch.keep_examples(step, rollouts, verdicts)
        return {**summary(rollouts, scores), **stats, **seconds, "seconds_update": time.perf_counter() - start}

    fit(policy, objective, Optimization(ctx.stage.settings["steps"], spec.lr, spec.weight_decay, spec.betas, spec.grad_clip,
        checkpoint_every=spec.checkpoint_every), ctx.out, ctx.state, ctx.progress, watch.observe)
    watch.finish()


def collect(policy: Policy, rows: list[Row], spec, seed: int) -> tuple[list[Rollout], list[Verdict], Tensor, dict]:
    """`spec.group` rollouts of each row with their verdicts, the scores (P, G), and the seconds that both took."""
    start = time.perf_counter()
    rollouts = sample(policy, rows, spec.group, generator=torch.Generator().manual_seed(seed),
                      temperature=spec.temperature, max_new_tokens=spec.max_new_tokens, max_turns=spec.max_turns)
    sampled = time.perf_counter()
    verdicts = rewards([r.row for r in rollouts], [r.turns for r in rollouts])
    scores = torch.tensor([v.score for v in verdicts]).view(-1, spec.group)
    return rollouts, verdicts, scores, {"seconds_sample": sampled - start, "seconds_verify": time.perf_counter() - sampled}


def summary(rollouts: list[Rollout], scores: Tensor) -> dict:
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
    }
