"""Our trainer against real TRL: the same model, tokens and advantages, the same loss and the same gradients.

golden/trl.safetensors was made by TRL itself (golden/make_trl.py). Prompts of unlike length, rollouts of unlike
length, a group without advantage, tokens that a tool wrote, other temperatures, and a KL term.
"""
from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Qwen3Config

from m2rl_core.domains import Row
from m2rl_core.engines.rollout import Rollout
from m2rl_core.models.policy import Policy
from m2rl_core.training.grpo import backward
from m2rl_core.training.losses import Loss, Totals

SCRIPT = Path(__file__).parent / "golden" / "make_trl.py"
spec = importlib.util.spec_from_file_location("make_trl", SCRIPT)
trl = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trl)


@pytest.fixture(scope="module")
def golden():
    return load_file(trl.GOLDEN)


def policy(golden, name) -> Policy:
    weights = {key.removeprefix(f"{name}/"): w.clone() for key, w in golden.items() if key.startswith(f"{name}/")}
    return Policy(weights, Qwen3Config(**trl.CONFIG), None)


def rollouts() -> list[Rollout]:
    """The batch as our sampler would hand it over."""
    row, said = Row("", "math", "", "", (), {}), trl.tokens()
    return [Rollout(row, prompt, said[p][g], [t not in trl.TOOLS.get((p, g), ()) for t in range(len(said[p][g]))],
                    [0.0] * len(said[p][g])) for p, prompt in enumerate(trl.PROMPTS) for g in range(trl.GROUP)]


def test_the_golden_file_is_of_the_version_that_is_pinned():
    with safe_open(trl.GOLDEN, "pt") as file:
        found = file.metadata()["trl"]
    assert f"trl=={found}" in (SCRIPT.parents[2] / "requirements-peers.txt").read_text()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("case", trl.CASES)
def test_loss_and_gradients_are_trls(golden, case, skip):
    """With `skip` the groups without advantage are left out, as `grpo.build` does where there is no other term."""
    own = {"temperature": 1.0, "beta": 0.0} | trl.CASES[case]
    loss = Loss(own["loss_type"], own["temperature"], 0.2, 0.28, "none", 0.0, 0.0, kl=own["beta"])
    learner, played, advantage = policy(golden, "policy"), rollouts(), trl.advantages().tolist()
    learner.requires_grad()
    of = {id(r): a for r, a in zip(played, advantage, strict=True)}
    used = [r for r in played if of[id(r)] != 0 or own["beta"] or not skip]
    assert len(used) < len(played) or own["beta"] or not skip
    found = backward(learner, used, lambda part, logp, owner, tokens: torch.tensor([of[id(r)] for r in part])[owner],
                     loss, Totals.of(played, trl.LONGEST), policy(golden, "reference"))
    assert found["loss"] == pytest.approx(float(golden[f"{case}/loss"]), abs=1e-5)
    for name, weight in learner.weights.items():
        wanted = golden[f"{case}/{name}"]
        assert float((weight.grad - wanted).abs().max()) < 1e-5, name
        assert float(wanted.abs().max()) > 1e-4, f"{name} is compared as zeros"
