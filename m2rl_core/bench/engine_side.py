"""One side of the engine bench, a process of its own: `python -m m2rl_core.bench.engine_side SIDE FOLDER PYTHON`.

Prints one line of JSON: seconds and sampled tokens of each repetition, the first left out. `work.json` in FOLDER says
what is done; `sample`, `vllm` (in PYTHON), `generate` and `step` do the same work, `floor` its arithmetic alone.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from m2rl_core import cpu
from m2rl_core.bench.work import Work, parameters
from m2rl_core.domains import Row
from m2rl_core.engines import TORCH, Engine
from m2rl_core.engines.rollout import Rollout, logprobs
from m2rl_core.engines.vllm_engine import VllmEngine
from m2rl_core.models import decode
from m2rl_core.models import policy as policies
from m2rl_core.models.policy import Policy
from m2rl_core.profile import load_profile
from m2rl_core.training.grpo import learner
from m2rl_core.training.losses import Loss, advantages, importance_weights


def rows_of(work: Work) -> list[Row]:
    return [Row(str(i), "", "bench", "", ({"role": "user", "content": text},), {}) for i, text in enumerate(work.prompts)]


def reward(text: str) -> float:
    """0 or 1, by a hash: costs nothing and leaves hardly a group without an advantage."""
    return float(hashlib.sha256(text.encode()).digest()[0] % 2)


def drawn(policy: Policy, work: Work, seed: int, engine: Engine = TORCH) -> list[Rollout]:
    return engine.sample(policy, rows_of(work), work.group, generator=torch.Generator().manual_seed(seed),
                         temperature=work.temperature, max_new_tokens=work.new_tokens, max_turns=1)


def sampling(policy: Policy, work: Work, engine: Engine) -> Callable[[int], int]:
    """An engine's sampler: one call is one repetition and returns the tokens that were sampled."""
    return lambda i: sum(r.length for r in drawn(policy, work, i, engine))


def agreement(policy: Policy, rollouts: list[Rollout], temperature: float) -> dict:
    """How far the sampler's log-probs are from the trainer's, in nats, and the share of tokens that `tiny` keeps."""
    trainer = torch.cat(logprobs(policy, rollouts, temperature))
    sampler = torch.tensor([p for r in rollouts for p in r.logprobs])
    owner = torch.zeros(len(trainer), dtype=torch.long)
    gap, (_, kept) = (trainer - sampler).abs(), importance_weights(trainer, sampler, owner, Loss.of(load_profile("tiny").rl))
    return {"mismatch_max": float(gap.max()), "mismatch_mean": float(gap.mean()), "kept": float(kept.float().mean())}


def memory(*pids: int | str) -> dict:
    """Memory of these processes together in MB: their own now, and all that was resident at the peak."""
    fields = [dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()) for pid in pids]
    return {name: round(sum(int(status[field].split()[0]) for status in fields) / 1024)
            for name, field in (("anonymous_mb", "RssAnon"), ("resident_mb", "VmHWM"))}


def generating(folder: Path, work: Work) -> Callable[[int], int]:
    """Hugging Face's `generate` on the same prompts, left-padded, its key-value cache on."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    policy = policies.load(folder / "model")
    prompts = [policies.encode_prompt(policy, row.messages) for row in rows_of(work) for _ in range(work.group)]
    widest = max(map(len, prompts))
    ids = torch.tensor([[policy.stop_ids[1]] * (widest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (widest - len(p)) + [1] * len(p) for p in prompts])

    @torch.no_grad()
    def run(i: int) -> int:
        torch.manual_seed(i)
        found = model.generate(ids, attention_mask=mask, do_sample=True, temperature=work.temperature, top_k=0, top_p=1.0,
                               max_new_tokens=work.new_tokens, eos_token_id=list(policy.stop_ids),
                               pad_token_id=policy.stop_ids[1])[:, widest:]
        ended = torch.isin(found, torch.tensor(policy.stop_ids)).int().cumsum(1).cumsum(1) > 1
        return int((~ended).sum())
    return run


def stepping(policy: Policy, work: Work) -> Callable[[int], int]:
    """A whole step of GRPO: rollouts, rewards, gradient, clipping, AdamW."""
    optimizer = torch.optim.AdamW(policy.requires_grad(), lr=work.lr, betas=(0.9, 0.98), weight_decay=0.0)
    loss = Loss("grpo", work.temperature, 0.2, 0.28, "none", 0.0, 0.0)

    def run(i: int) -> int:
        rollouts = drawn(policy, work, i)
        scores = torch.tensor([reward(r.turns[0]) for r in rollouts]).view(-1, work.group)
        used, update = learner(policy, rollouts, advantages(scores), loss, work.new_tokens)
        optimizer.zero_grad(set_to_none=True)
        update(used)
        torch.nn.utils.clip_grad_norm_([w for w in policy.weights.values() if w.grad is not None], 1.0)
        optimizer.step()
        return sum(r.length for r in rollouts)
    return run


def multiplying(policy: Policy, work: Work) -> Callable[[int], int]:
    """The arithmetic of sampling alone, as matrix products of the model's shapes; counts operations in 1000s."""
    rows, width, inner = work.group * len(work.prompts), policy.config.hidden_size, policy.config.intermediate_size
    x, w, v = torch.randn(rows, width), torch.randn(inner, width), torch.randn(width, inner)

    def run(i: int) -> int:
        for _ in range(200):
            torch.nn.functional.linear(torch.nn.functional.linear(x, w), v)
        return 200 * 4 * rows * width * inner // 1000
    return run


PARTS = {"matrix products": ("aten::mm", "aten::addmm", "aten::addmm_"),
         "attention": ("compiled::attend", "aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu",
                       "aten::_scaled_dot_product_flash_attention_for_cpu_backward")}
COMPILED = ("attend", "normalize", "swiglu", "choose")  # of `models.decode`; the profiler knows PyTorch's own operations only


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Let the profiler see the compiled parts of a step."""
    from torch.profiler import record_function
    kept = {name: getattr(decode, name) for name in COMPILED}

    def seen(name: str):
        def call(*args):
            with record_function(f"compiled::{name}"):
                return kept[name](*args)
        return call
    for name in kept:
        setattr(decode, name, seen(name))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(decode, name, function)


def shares(run: Callable[[int], int]) -> dict[str, float]:
    """Where a repetition on one thread, all that the profiler follows, spends its time: shares of 1 by kind of operation."""
    from torch.profiler import ProfilerActivity, profile
    torch.set_num_threads(1)
    with named(), profile(activities=[ProfilerActivity.CPU]) as seen:
        start = time.perf_counter()
        run(1)
        whole = time.perf_counter() - start
    spent = {event.key: event.self_cpu_time_total / 1e6 for event in seen.key_averages()
             if event.key.startswith(("aten::", "compiled::"))}
    found = {part: sum(spent.get(name, 0.0) for name in names) / whole for part, names in PARTS.items()}
    found["other operations"] = sum(spent.values()) / whole - sum(found.values())
    return found | {"Python between them": 1 - sum(found.values())}


def main(argv: list[str]) -> int:
    side, folder = argv[0], Path(argv[1])
    work = Work.load(folder)
    cpu.settle(work.threads)
    policy = policies.load(folder / "model")
    facts = {"parameters": parameters(policy)}
    with VllmEngine(work.threads, python=Path(argv[2])) if side == "vllm" else TORCH as engine:
        run = {"sample": lambda: sampling(policy, work, engine), "vllm": lambda: sampling(policy, work, engine),
               "generate": lambda: generating(folder, work), "step": lambda: stepping(policy, work),
               "floor": lambda: multiplying(policy, work)}[side]()
        seconds, tokens = [], []
        for i in range(work.repetitions + 1):
            start = time.perf_counter()
            tokens.append(run(i))
            seconds.append(time.perf_counter() - start)
        if side in ("sample", "step"):
            facts["shares"] = shares(run)
        if side == "vllm":  # two processes did it
            facts |= memory("self", engine.links[0].process.pid)
            facts |= agreement(policy, drawn(policy, work, 0, engine), work.temperature)
    print(json.dumps({"seconds": seconds[1:], "tokens": tokens[1:], **facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
