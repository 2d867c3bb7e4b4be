"""Who samples and scores: `engine` of a profile, torch in this process or vLLM in others, behind the same calls.

An engine has `sample` and `logprobs` as `rollout` defines them, and is closed by `with`. The trainer's own log-probs
are torch's whatever the engine, so that their difference to the sampler's is what the importance weights correct.
"""
from __future__ import annotations

import os
from typing import Protocol

import torch

from m2rl_core import ranks
from m2rl_core.engines import rollout
from m2rl_core.engines.vllm_engine import VllmEngine, servers_of
from m2rl_core.engines.vllm_link import visible_gpus
from m2rl_core.errors import StudyError
from m2rl_core.specs import Profile


class Engine(Protocol):
    """What samples and scores for a stage."""

    def sample(self, policy, rows, n, *, generator, temperature, max_new_tokens, max_turns,
               top_p=1.0) -> list[rollout.Rollout]: ...

    def logprobs(self, policy, rollouts, temperature) -> list: ...

    @staticmethod
    def pass_over(rows, n, generator, max_new_tokens, max_turns) -> None: ...

    def stop(self) -> None: ...  # a call that another thread makes: it may fail, and nothing is started again

    def __enter__(self) -> Engine: ...

    def __exit__(self, *_) -> None: ...


class TorchEngine:
    """The sampler of `rollout`, with the trainer's own forward pass; nothing to open or to close."""

    sample = staticmethod(rollout.sample)
    logprobs = staticmethod(rollout.logprobs)

    @staticmethod
    def pass_over(rows: int, n: int, generator: torch.Generator, max_new_tokens: int, max_turns: int) -> None:
        """Draw what `sample` draws for so many rows, as another process does."""
        torch.rand(rows * n, max_new_tokens, generator=generator)

    def stop(self) -> None:
        pass

    def __enter__(self) -> TorchEngine:
        return self

    def __exit__(self, *_) -> None:
        pass


class SharedEngine:
    """An engine on each of several processes: every one samples its share of the rows, and all have all rollouts."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def sample(self, policy, rows, n, **settings) -> list[rollout.Rollout]:
        """As `rollout.sample`, with the same draws."""
        return [found for part in ranks.gather(self.own(policy, rows, n, **settings)) for found in part]

    def own(self, policy, rows, n, *, generator, max_new_tokens, max_turns=4, **settings) -> list[rollout.Rollout]:
        """This process's share, with the draws of the whole: those for the rows before it are passed over."""
        begin, end = ranks.bounds(len(rows))
        self.engine.pass_over(begin, n, generator, max_new_tokens, max_turns)
        return self.engine.sample(policy.whole(), rows[begin:end], n, generator=generator, max_new_tokens=max_new_tokens,
                                  max_turns=max_turns, **settings)

    def logprobs(self, policy, rollouts, temperature=1.0) -> list:
        return self.engine.logprobs(policy, rollouts, temperature)

    def stop(self) -> None:
        self.engine.stop()

    def __enter__(self) -> SharedEngine:
        self.engine.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.engine.__exit__(*error)


class FirstEngine(SharedEngine):
    """An engine that rank 0 alone asks about all rows: it has servers of its own to share them out among."""

    def own(self, policy, rows, n, **settings) -> list[rollout.Rollout]:
        """All of them on rank 0, none on others, which wait for these."""
        whole = policy.whole()
        return self.engine.sample(whole, rows, n, **settings) if ranks.first() else []

    def logprobs(self, policy, rollouts, temperature=1.0) -> list:
        return ranks.gather(self.engine.logprobs(policy, rollouts, temperature) if ranks.first() else None)[0]


TORCH = TorchEngine()


def open_engine(profile: Profile) -> Engine:
    """The profile's engine; vLLM begins with the first call that needs it. StudyError for a vLLM that ranks cannot share."""
    if profile.engine == "torch":
        return SharedEngine(TORCH) if ranks.launched() else TORCH
    spec = profile.vllm
    if servers := servers_of(profile):
        engine = VllmEngine(profile.threads, servers=servers)
        return FirstEngine(engine) if ranks.launched() else engine
    if not ranks.launched():
        return VllmEngine(profile.threads, profile.gpu_memory, replicas=spec.replicas, tensor_parallel=spec.tensor_parallel)
    if (spec.replicas, spec.tensor_parallel) != (1, 1):
        raise StudyError(f"engine: vllm on {ranks.size()} ranks: each has one vLLM on its own GPU, so vllm.replicas and "
                         "vllm.tensor_parallel must be 1; for larger ones start servers and name them in vllm.servers")
    gpus, own = visible_gpus(), int(os.environ.get("LOCAL_RANK", 0))
    return SharedEngine(VllmEngine(max(1, profile.threads // ranks.here()), profile.gpu_memory,
                                   gpu=gpus[own] if gpus else ""))
