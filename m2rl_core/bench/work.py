"""What both sides of the engine bench do: a model of the tiny study's shape with random weights, prompts and sizes."""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from m2rl_core.domains import DOMAINS, training_rows
from m2rl_core.models import policy as policies
from m2rl_core.models.policy import Policy
from m2rl_core.profile import load_profile


@dataclass(frozen=True)
class Work:
    """`group` rollouts of each prompt, of at most `new_tokens`; `repetitions` are measured after one that is not."""

    prompts: tuple[str, ...]
    group: int
    new_tokens: int
    temperature: float
    lr: float
    threads: int
    repetitions: int

    @staticmethod
    def load(folder: Path) -> Work:
        fields = json.loads((folder / "work.json").read_text())
        return Work(**fields | {"prompts": tuple(fields["prompts"])})


def make(folder: Path, prompts: int = 32, group: int = 8, new_tokens: int = 64, repetitions: int = 3) -> None:
    """Writes `model/` and `work.json`: prompts of the study's own domains, one user turn each."""
    tiny = load_profile("tiny")
    rows = [row for domain in DOMAINS if domain != "agent" for row in training_rows(domain, "rl", prompts, 1)]
    texts = [m["content"] for row in rows for m in row.messages]
    policy = policies.build(tiny.model, policies.train_tokenizer(texts, tiny.model.vocab), torch.Generator().manual_seed(0))
    policies.save(policy, folder / "model")
    chosen = [row.messages[-1]["content"] for row in rows[:: len(rows) // prompts]][:prompts]
    work = Work(tuple(chosen), group, new_tokens, 1.0, tiny.rl.lr, tiny.threads, repetitions)
    (folder / "work.json").write_text(json.dumps(asdict(work), indent=1) + "\n")


def parameters(policy: Policy) -> int:
    """Weights that take part in a matrix product for each token; the tied embedding once, as the output layer."""
    return sum(w.numel() for w in policy.weights.values() if w.dim() == 2)
