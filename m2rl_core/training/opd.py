"""Multi-teacher on-policy distillation (section 3.2): the student's own rollouts, the teacher of the row's domain.

Lay it beside `grpo.py`: a token's advantage is log pi_teacher - log pi_student ("sampled", the released form,
an unbiased gradient of the reverse KL), or the exact reverse KL over the vocabulary is minimised ("full").
"""
from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from m2rl_core import ranks
from m2rl_core.data import training_prompts
from m2rl_core.engines import open_engine
from m2rl_core.engines.rollout import Rollout, micro_batches, response_hidden
from m2rl_core.evaluate import Watch
from m2rl_core.metrics import gradient_noise
from m2rl_core.metrics.every import Every
from m2rl_core.models import policy as policies
from m2rl_core.models.policy import Policy
from m2rl_core.models.qwen3 import token_logprobs
from m2rl_core.ranks.sharded import beside, place
from m2rl_core.training.batches import Batches
from m2rl_core.training.collect import summary
from m2rl_core.training.grpo import backward
from m2rl_core.training.losses import Loss, Totals, reduced, reverse_kl
from m2rl_core.training.teachers import Teachers, by_domain
from m2rl_core.training.trainer import Optimization, fit


def backward_full(student: Policy, teachers: Mapping[str, Policy], rollouts: list[Rollout], loss: Loss,
                  totals: Totals) -> dict:
    """Accumulate the gradient of the mean per-token reverse KL over the vocabulary."""
    loss_sum = 0.0
    for domain, routed in by_domain(rollouts).items():
        own, teacher = ranks.share(routed), teachers[domain]

        def learn(student: Policy, batch: list[int], own=own, teacher=teacher) -> float:
            part = [own[i] for i in batch]
            with torch.no_grad():
                teacher_hidden, _, _ = response_hidden(teacher, part)
            hidden, _, owner = response_hidden(student, part)
            kl = reverse_kl(student, teacher, hidden, teacher_hidden, loss.temperature)
            found = reduced(kl, torch.ones_like(owner, dtype=torch.bool), owner, loss.loss, totals)
            found.backward()
            return float(found.detach())
        loss_sum += sum(student.each(micro_batches(own), learn))
    loss_sum = ranks.total(loss_sum)
    return {"loss": loss_sum, "kept": 1.0, "reverse_kl": loss_sum}


def backward_sampled(student: Policy, teachers: Mapping[str, Policy], rollouts: list[Rollout], loss: Loss,
                     totals: Totals) -> dict:
    """Accumulate the policy gradient with advantage log pi_teacher - log pi_student of each sampled token."""
    sums: dict[str, float] = {}
    gaps: dict[int, Tensor] = {}  # of a micro-batch, by its first rollout: which is done first is up to the threads
    for domain, routed in by_domain(rollouts).items():
        def gap(part, logp, owner, tokens, teacher=teachers[domain]):
            with torch.no_grad():
                hidden, _, _ = response_hidden(teacher, part)
                found = token_logprobs(teacher.weights, hidden, tokens, loss.temperature)[0] - logp.detach()
            gaps[id(part[0])] = found
            return found
        own = ranks.share(routed)
        for key, value in ranks.joined(backward(student, own, gap, loss, totals), own).items():
            if key == "mismatch":
                sums[key] = max(sums.get(key, 0.0), value)
            else:  # the loss is a sum over sequences already; the others are means
                sums[key] = sums.get(key, 0.0) + value * (1 if key == "loss" else len(routed) / len(rollouts))
    return {**sums, "reverse_kl": -ranks.mean([gaps[id(r)] for r in rollouts if id(r) in gaps])}


UPDATES = {"sampled": backward_sampled, "full": backward_full}


def build(ctx) -> None:
    """Distil the experts into the SFT model on the mix of all domains' RL rows."""
    spec = ctx.profile.opd
    student = place(policies.load(ctx.inputs["sft"]))
    taught = tuple(domain for domain in ctx.profile.domain_names if f"rl-{domain}" in ctx.inputs)
    teachers = Teachers(beside(policies.load(ctx.inputs["sft"])),
                        ((d, beside(policies.load(ctx.inputs[f"rl-{d}"]))) for d in taught))
    whole, kept = teachers.size()
    ctx.log(f"{len(teachers)} teachers: {kept / 1e6:,.1f} MB beside the {whole / 1e6:,.1f} MB of one model")
    rows = training_prompts(ctx, taught, student.tokenizer)
    engine = open_engine(ctx.profile)
    watch, noise = Watch(ctx, ctx.profile.rl, engine), Every(ctx, "variance", spec.variance_every)
    loss = Loss.of(spec, loss="grpo")
    batches = Batches(ctx, spec, "opd", student, rows, engine, spec.steps)

    def update(form: str, part: list[Rollout]) -> dict:
        stats = UPDATES[form](student, teachers, part, loss, Totals.of(part, spec.max_new_tokens))
        student.add_up()
        return stats
    estimators = {form: partial(update, form) for form in UPDATES}

    def objective(step: int) -> dict:
        rollouts, verdicts, scores, seconds = batches(step)
        parts = gradient_noise.by_prompt(rollouts, spec.group)
        seconds |= noise.look(step, lambda: gradient_noise.measure(student, parts, estimators, seconds))
        start = time.perf_counter()  # scores are recorded, not trained on
        stats = update(spec.loss, rollouts)
        watch.keep_examples(step, rollouts, verdicts)
        return {**summary(rollouts, verdicts, scores), **batches.staleness(step), **stats, **seconds,
                "seconds_update": time.perf_counter() - start}

    with engine, batches:
        fit(student, objective, Optimization(spec.steps, spec.lr, spec.weight_decay, spec.betas, spec.grad_clip,
            checkpoint_every=ctx.profile.rl.checkpoint_every), ctx.out, ctx.state, ctx.progress, watch.observe,
            watch.keep_batch, batches)
    watch.finish()
    noise.finish()
