"""Measure this machine in seconds, on the profile's own model shape and domains: sampling, verifying, learning.

A model of the profile's shape with random weights is made to say the answers of SFT's rows, so that lengths, turns, tools
and verifiers are those of the study. Each part is timed `REPEATS` times; on a machine that
others use, the processor's time stands in for the wall clock's (`BUSY`). Cached beside the artifacts, by machine and by
everything of the profile that it depends on.
"""
from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from m2rl_core import cpu, judge
from m2rl_core.cost.kept import VERSION, cached, file
from m2rl_core.data import corpus
from m2rl_core.domains import DOMAINS, Row, rewards, training_rows
from m2rl_core.engines.rollout import BATCH, Rollout, _Wave, encode_prompts, logprobs, waves
from m2rl_core.models import policy as policies
from m2rl_core.models.policy import Policy
from m2rl_core.models.qwen3 import prepare
from m2rl_core.profile import Profile
from m2rl_core.provenance import machine
from m2rl_core.store import write_atomic
from m2rl_core.training.grpo import learner
from m2rl_core.training.losses import Loss, advantages
from m2rl_core.training.sft import encode_sft, masked_loss

REPEATS = 2
BUSY = 1.05  # wall time over processor time from which on somebody else is held to be at work
DOCUMENTS, ROWS = 1500, 240  # that the tokenizer sees; of the SFT blend
SIDE = 1024  # of the square matrices whose product is the machine's peak


class Scripted(_Wave):
    """Rollouts that do all of the sampler's work and then say what `script` holds, token by token."""

    script: torch.Tensor  # (rollouts, tokens)

    def _draw(self):
        super()._draw()
        at = (self.count - 1).clamp(min=0)
        tokens = self.script[self.alive, at.clamp(max=self.script.shape[1] - 1)]
        self.drawn[self.alive, at] = torch.where(self.live, tokens, self.drawn[self.alive, at])
        return tokens


@torch.no_grad()
def said(policy: Policy, rows: list[Row], n: int, longest: int, turns: int) -> list[Rollout]:
    """`n` rollouts of each row that give its own answer (or as much of it as `longest` tokens hold)."""
    rollouts = [Rollout(row, p) for row, p in zip(rows, encode_prompts(policy, rows, longest), strict=True) for _ in range(n)]
    stop, script = policy.stop_ids[0], []
    for row in rows:
        ids, learn = encode_sft(policy, row)
        answer = [token for token, own in zip(ids, learn, strict=True) if own][:longest]
        script += [answer + [stop] * (longest + 1 - len(answer))] * n
    script, model, lock = torch.tensor(script), prepare(policy.weights, policy.shape), threading.Lock()

    def wave(chosen: list[int]):
        found = Scripted(policy, model, [rollouts[i] for i in chosen], torch.rand(len(chosen), longest), n, 1.0, turns, lock)
        found.script = script[chosen]
        found.run()
    waves(rows, [rollout.prompt for rollout in rollouts[::n]], n, wave, BATCH)
    return rollouts


def timed(work: Callable[[], object], threads: int = 1, alone: bool = True, repeats: int = REPEATS) -> list[float]:
    """Seconds of each repetition on a machine of one's own.

    Where the wall clock ran more than `BUSY` times as long as `threads` threads computed, somebody else was at work and
    the threads' own time counts, `BUSY` times. Not so for work that waits for other processes (`alone` False).
    """
    found = []
    for _ in range(repeats):
        start, busy = time.perf_counter(), time.process_time()
        work()
        wall, own = time.perf_counter() - start, (time.process_time() - busy) / threads
        found.append(min(wall, BUSY * own) if alone else wall)
    return found


def peak(threads: int) -> tuple[list[float], list[float]]:
    """Operations a second of one large matrix product, and bytes a second of one copy in memory."""
    a, b, large = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE), torch.randn(2**24)
    flops = [2 * SIDE**3 / s for s in timed(lambda: a @ b, threads)[1:]]
    return flops, [2 * 4 * 2**24 / s for s in timed(large.clone, threads)[1:]]


def of_domain(policy: Policy, profile: Profile, domain: str) -> dict:
    """One domain: tokens of prompt and answer; seconds of sampling (a batch and a small one), verifying, learning, scoring."""
    spec, few = profile.rl, max(1, profile.rl.eval_items)
    rows = training_rows(domain, "sft", max(spec.prompts, few), profile.seed)
    threads = profile.threads_of("rl")
    cpu.settle(threads)

    def sampled(rows, n):
        return said(policy, rows, n, spec.max_new_tokens, spec.max_turns)
    rollouts = sampled(rows[:spec.prompts], spec.group)
    scores = (torch.arange(len(rollouts)) % 2).float().view(-1, spec.group)  # every group has an advantage
    used, update = learner(policy, rollouts, advantages(scores, spec.scale_rewards), Loss.of(spec), spec.max_new_tokens)
    policy.requires_grad()
    learning = timed(lambda: update(used), threads)
    for weight in policy.weights.values():
        weight.requires_grad_(False)
        weight.grad = None
    transcripts = [r.row for r in rollouts], [r.turns for r in rollouts]
    rewards(*transcripts)  # a verifier's process is started, and what it imports
    return {
        "rollouts": len(rollouts), "few": few * spec.eval_k, "group": spec.group,
        "prompt": sum(len(r.prompt) for r in rollouts) / len(rollouts),
        "length": sum(r.length for r in rollouts) / len(rollouts), "longest": max(r.length for r in rollouts),
        "sample": timed(lambda: sampled(rows[:spec.prompts], spec.group), threads),
        "sample_few": timed(lambda: sampled(rows[:few], spec.eval_k), threads),
        "verify": timed(lambda: rewards(*transcripts), alone=False), "update": learning,
        "score": timed(lambda: logprobs(policy, rollouts), threads, repeats=1),
    }


def next_token(policy: Policy, profile: Profile, texts: list[str], rows: list[Row]) -> dict:
    """Seconds of a step of `base` and of `sft`, and of an update of the optimizer; mean tokens of an SFT row."""
    threads = profile.threads_of("sft")
    cpu.settle(threads)
    stream = [i for text in texts for i in policy.tokenizer.encode(text, add_special_tokens=False)]
    blocks = [stream[i * 128 % (len(stream) - 129):][:129] for i in range(max(1, profile.base.batch_tokens // 128))]
    encoded = [encode_sft(policy, row) for row in rows]
    optimizer = torch.optim.AdamW(policy.requires_grad(), lr=0.0)

    def whole(batch):
        optimizer.zero_grad(set_to_none=True)
        masked_loss(policy, batch)
        torch.nn.utils.clip_grad_norm_([w for w in policy.weights.values() if w.grad is not None], 1.0)
        optimizer.step()
    size = profile.sft.batch_size
    batches = [[encoded[(i * size + j) % len(encoded)] for j in range(size)] for i in range(3)]
    found = {"base_step": timed(lambda: whole([(ids, [True] * len(ids)) for ids in blocks]), threads),
             "sft_step": [s / 3 for s in timed(lambda: [whole(batch) for batch in batches], threads)],
             "optimizer": timed(optimizer.step, threads), "sft_tokens": sum(len(ids) for ids, _ in encoded) / len(encoded)}
    for weight in policy.weights.values():
        weight.requires_grad_(False)
        weight.grad = None
    return found


def measure(profile: Profile) -> dict:
    """Everything that `plan` needs of this machine for this profile; takes seconds. Deterministic but for the times."""
    begun, threads = time.perf_counter(), torch.get_num_threads()
    blend_rows(profile, 8)  # imports what makes them
    corpus(16, profile.seed)
    start = time.process_time()
    texts = corpus(DOCUMENTS, profile.seed)
    text_seconds, start = (time.process_time() - start) / DOCUMENTS, time.process_time()
    rows = blend_rows(profile, ROWS)
    row_seconds, start = (time.process_time() - start) / len(rows), time.process_time()
    words = policies.train_tokenizer(texts + [m["content"] for row in rows for m in (*row.messages, *row.turns)],
                                     profile.model.vocab)
    words_seconds = (time.process_time() - start) / (DOCUMENTS + len(rows))
    policy = policies.build(profile.model, words, torch.Generator().manual_seed(profile.seed))
    start = time.process_time()
    for row in rows:
        encode_sft(policy, row)
    encode_seconds = (time.process_time() - start) / len(rows)
    flops, bandwidth = peak(threads)
    said(policy, training_rows("math", "sft", 2, profile.seed), 2, 4, 1)  # warm
    found = {"version": VERSION, "machine": machine(), "flops": flops, "bandwidth": bandwidth,
             "document": text_seconds, "row": row_seconds, "words": words_seconds, "encode": encode_seconds,
             **next_token(policy, profile, texts, rows), "domains": {d: of_domain(policy, profile, d) for d in DOMAINS}}
    questions = judge.training_rows(32, profile.seed)
    cpu.settle(profile.threads_of("judge"))
    found["judge"] = [s / 256 for s in timed(
        lambda: said(policy, questions, 8, judge.JUDGE_TOKENS, 1), profile.threads_of("judge"))]
    cpu.settle(threads)
    return found | {"seconds": round(time.perf_counter() - begun, 1)}


def blend_rows(profile: Profile, count: int) -> list[Row]:
    """About `count` rows in the proportions of the SFT blend."""
    rows: list[Row] = []
    for line in profile.sft.blend:
        n = max(1, round(line.share * count))
        rows += judge.training_rows(n, profile.seed) if line.domain == "judge" else training_rows(
            line.domain, "sft", n, profile.seed)
    return rows[::2] + rows[1::2]


def calibrate(profile: Profile, store: Path, again: bool = False) -> dict:
    """The calibration of this machine, measured where it was not (or `again`), and kept."""
    found = None if again else cached(profile, store)
    if found is None:
        found = measure(profile)
        store.mkdir(parents=True, exist_ok=True)
        write_atomic(file(profile, store), json.dumps(found, indent=1) + "\n")
    return found
