"""GRPO (section 3.1, appendix A): group-normalised advantages, one update for each batch of rollouts.

Lay it beside `opd.py`: only where the advantage of a token comes from differs. Departures from the released
code: importance sampling is masked (MIS) as the paper says, not truncated; the bounds are parameters.
With `overlap: 1` a batch was sampled before the last update. The clipped ratio still refers to the policy that the update
starts from, and the importance weight, that policy by the sampler's, holds all of the staleness: decoupled PPO
(arXiv 2110.00641, AReaL's 2505.24298), and what slime's `--use-tis` computes with log-probs scored anew.
"""
from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from m2rl_core.models import policy as policies
from m2rl_core import ranks
from m2rl_core.training.batches import Batches
from m2rl_core.training.collect import summary
from m2rl_core.data import training_prompts
from m2rl_core.engines import open_engine
from m2rl_core.evaluate import Watch
from m2rl_core.training.losses import Loss, Totals, advantages, importance_weights, kl_estimate, policy_loss, reduced
from m2rl_core.metrics.interference import Interference
from m2rl_core.models.policy import Policy
from m2rl_core.models.qwen3 import token_logprobs
from m2rl_core.engines.rollout import Rollout, logprobs, micro_batches, response_hidden
from m2rl_core.ranks.sharded import beside, place
from m2rl_core.study import first
from m2rl_core.training.trainer import Optimization, fit


def backward(policy: Policy, rollouts: list[Rollout], token_advantage, loss: Loss, totals: Totals,
             reference: Policy | None = None) -> dict:
    """Accumulate the gradient of the loss over `rollouts`, a part of the batch that `totals` describes; statistics.

    `token_advantage(part, logp, owner, tokens)` gives the advantage of each sampled token of a micro-batch,
    (N,). Rollouts that were left out because their advantage is zero stay in `totals`. `reference` is needed for a
    KL term; its log-probs are of the loss's temperature, like the policy's.
    """

    def learn(policy: Policy, batch: list[int]) -> dict[str, float]:
        part = [rollouts[i] for i in batch]
        hidden, tokens, owner = response_hidden(policy, part)
        logp, entropy = token_logprobs(policy.weights, hidden, tokens, loss.temperature, entropy_grad=loss.entropy > 0)
        sampler = torch.tensor([p for r in part for p, s in zip(r.logprobs, r.sampled, strict=True) if s], device=logp.device)
        weight, counted = importance_weights(logp, sampler, owner, loss)
        advantage = token_advantage(part, logp, owner, tokens)
        values, sums = weight * policy_loss(logp, logp.detach(), advantage, loss.clip_low, loss.clip_high), {}
        if loss.kl:
            kl = kl_estimate(logp, torch.cat(logprobs(reference, part, loss.temperature)))
            values = values + loss.kl * kl
            sums["kl"] = float(kl.detach().sum())
        if loss.entropy:
            values = values - loss.entropy * entropy
        found = reduced(values, counted, owner, loss.loss, totals)
        found.backward()
        gap = (logp.detach() - sampler).abs()
        return {"loss": float(found.detach()), "kept": int(counted.sum()), "entropy": float(entropy.detach().sum()),
                "mismatch_mean": float(gap.sum()), **sums, "mismatch": float(gap.max())}

    names = ("loss", "kept", "entropy", "mismatch_mean", *(("kl",) if loss.kl else ()))
    found = policy.each(micro_batches(rollouts), learn)
    sums = {name: sum((of[name] for of in found), 0.0) for name in names}
    off = max((of["mismatch"] for of in found), default=0.0)
    if not rollouts:
        return sums | {"kept": 1.0, "mismatch": off}
    count = sum(r.length for r in rollouts)
    return {name: value if name == "loss" else value / count for name, value in sums.items()} | {"mismatch": off}


def learner(policy: Policy, rollouts: list[Rollout], advantage: Tensor, loss: Loss, longest: int,
            reference: Policy | None = None) -> tuple[list[Rollout], Callable[[list[Rollout]], dict]]:
    """(the rollouts of a batch that have a gradient, `backward` for any part of them, on all ranks); advantage (P, G)."""
    of = dict(zip(map(id, rollouts), advantage.flatten().tolist(), strict=True))
    totals = Totals.of(rollouts, longest)

    def each(part, logp, owner, tokens):
        return torch.tensor([of[id(r)] for r in part]).to(logp)[owner]

    def update(part: list[Rollout]) -> dict:
        own = ranks.share(part)  # all of it, unless several processes work on this model
        stats = ranks.joined(backward(policy, own, each, loss, totals, reference), own)
        policy.add_up()
        return stats

    # groups without an advantage add nothing to the gradient, unless there is another term
    return [r for r in rollouts if of[id(r)] != 0 or loss.kl or loss.entropy], update


def build(ctx) -> None:
    """Train one policy by GRPO: an expert on its domain's rows, `rl-multi` on the natural mix of all."""
    spec = ctx.profile.rl
    name = first(ctx.stage.name).removeprefix("rl-")
    domains = ctx.profile.domain_names if name == "multi" else (name,)
    policy = place(policies.load(ctx.inputs["sft"]))
    rows = training_prompts(ctx, domains, policy.tokenizer)
    loss = Loss.of(spec)
    reference = beside(policies.load(ctx.inputs["sft"])) if spec.kl else None
    engine = open_engine(ctx.profile)
    watch, interference = Watch(ctx, spec, engine), Interference(ctx, spec.interference_every, domains)
    steps = ctx.stage.settings["steps"]
    batches = Batches(ctx, spec, "rl", policy, rows, engine, steps)

    def objective(step: int) -> dict:
        rollouts, verdicts, scores, seconds = batches(step)
        used, update = learner(policy, rollouts, advantages(scores, spec.scale_rewards), loss, spec.max_new_tokens, reference)
        seconds |= interference.look(step, policy, used, update)
        start = time.perf_counter()
        stats = update(used)
        watch.keep_examples(step, rollouts, verdicts)
        return {**summary(rollouts, verdicts, scores), **batches.staleness(step), **stats, **seconds,
                "seconds_update": time.perf_counter() - start}

    with engine, batches:
        fit(policy, objective, Optimization(steps, spec.lr, spec.weight_decay, spec.betas, spec.grad_clip,
            checkpoint_every=spec.checkpoint_every), ctx.out, ctx.state, ctx.progress, watch.observe,
            watch.keep_batch, batches)
    watch.finish()
    interference.finish()
