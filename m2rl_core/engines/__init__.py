"""Who samples and scores: `engine` of a profile, torch in this process or vLLM in its own, behind the same calls.

An engine has `sample` and `logprobs` as `rollout` defines them, and is closed by `with`. The trainer's own log-probs
are torch's whatever the engine, so that their difference to the sampler's is what the importance weights correct.
"""
from __future__ import annotations

from typing import Protocol

import torch

from m2rl_core import ranks
from m2rl_core.engines import rollout
from m2rl_core.engines.vllm_engine import VllmEngine
from m2rl_core.errors import StudyError
from m2rl_core.specs import Profile


class Engine(Protocol):
    """What samples and scores for a stage."""

    def sample(self, policy, rows, n, *, generator, temperature, max_new_tokens, max_turns,
               top_p=1.0) -> list[rollout.Rollout]: ...

    def logprobs(self, policy, rollouts, temperature) -> list: ...

    def stop(self) -> None: ...  # a call that another thread makes: it may fail, and nothing is started again

    def __enter__(self) -> Engine: ...

    def __exit__(self, *_) -> None: ...


class TorchEngine:
    """The sampler of `rollout`, with the trainer's own forward pass; nothing to open or to close."""

    sample = staticmethod(rollout.sample)
    logprobs = staticmethod(rollout.logprobs)

    def stop(self) -> None:
        pass

    def __enter__(self) -> TorchEngine:
        return self

    def __exit__(self, *_) -> None:
        pass


class SharedEngine:
    """An engine on each of several processes: every one samples its share of the rows, and all have all rollouts."""

    def __init__(self, engine: Engine):
        self.engine, self.logprobs = engine, engine.logprobs

    def own(self, policy, rows, n, *, generator, max_new_tokens, **settings) -> list[rollout.Rollout]:
        """This process's share, with the draws of the whole: the numbers of the rows before it are passed over."""
        begin, end = ranks.bounds(len(rows))
        for _ in range(begin):
            torch.rand(n, max_new_tokens, generator=generator)
        return self.engine.sample(policy.whole(), rows[begin:end], n, generator=generator, max_new_tokens=max_new_tokens,
                                  **settings)

    def sample(self, policy, rows, n, **settings) -> list[rollout.Rollout]:
        """As `rollout.sample`, with the same draws."""
        return [found for part in ranks.gather(self.own(policy, rows, n, **settings)) for found in part]

    def stop(self) -> None:
        self.engine.stop()

    def __enter__(self) -> SharedEngine:
        self.engine.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.engine.__exit__(*error)


TORCH = TorchEngine()


def open_engine(profile: Profile) -> Engine:
    """The profile's engine; vLLM's processes start with the first call that needs it. StudyError for vLLM on several ranks."""
    if ranks.launched():
        if profile.engine != "torch":
            raise StudyError(f"engine: {profile.engine} is for one process; on {ranks.size()} each rank samples by "
                             "engine: torch")
        return SharedEngine(TORCH)
    if profile.engine == "torch":
        return TORCH
    return VllmEngine(profile.threads, profile.gpu_memory, replicas=profile.vllm.replicas,
                      tensor_parallel=profile.vllm.tensor_parallel)
