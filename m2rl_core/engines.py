"""Who samples and scores: `engine` of a profile, torch in this process or vLLM in its own, behind the same calls.

An engine has `sample` and `logprobs` as `rollout` defines them, and is closed by `with`. The trainer's own log-probs
are torch's whatever the engine, so that their difference to the sampler's is what the importance weights correct.
"""
from __future__ import annotations

from typing import Protocol

from m2rl_core import rollout
from m2rl_core.specs import Profile
from m2rl_core.vllm_engine import VllmEngine


class Engine(Protocol):
    """What samples and scores for a stage."""

    def sample(self, policy, rows, n, *, generator, temperature, max_new_tokens, max_turns,
               top_p=1.0) -> list[rollout.Rollout]: ...

    def logprobs(self, policy, rollouts, temperature) -> list: ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *_) -> None: ...


class TorchEngine:
    """The sampler of `rollout`, with the trainer's own forward pass; nothing to open or to close."""

    sample = staticmethod(rollout.sample)
    logprobs = staticmethod(rollout.logprobs)

    def __enter__(self) -> TorchEngine:
        return self

    def __exit__(self, *_) -> None:
        pass


TORCH = TorchEngine()


def open_engine(profile: Profile) -> Engine:
    """The profile's engine; vLLM's process starts with the first call that needs it."""
    if profile.engine == "torch":
        return TORCH
    return VllmEngine(
        profile.threads, profile.gpu_memory, replicas=profile.vllm.replicas, tensor_parallel=profile.vllm.tensor_parallel)
