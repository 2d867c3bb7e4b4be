"""TRL's own trainer on our exported rows with our reward, and its checkpoint back in our hands (TRL: see requirements.txt)."""
from __future__ import annotations

import pytest
import torch
import toy_policy
import trl

from m2rl_core.adapters import export, scoring
from m2rl_core.adapters import trl as ours
from m2rl_core.adapters.checkpoints import check, take
from m2rl_core.domains import DOMAINS, module, rewards, training_rows
from m2rl_core.engines.rollout import sample
from m2rl_core.models import policy as policies

GROUP, NEW = 4, 24
PROMPTS = dict.fromkeys(DOMAINS, 1) | {"agent": 4}  # all of them in one step


@pytest.fixture(scope="module")
def run(policy, tmp_path_factory):
    """One step of GRPOTrainer, and what it asked of our reward."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = tmp_path_factory.mktemp("trl")
    policies.save(policy, folder / "model")
    rows = [row for domain in DOMAINS for row in training_rows(domain, "rl", 8, 3)[-PROMPTS[domain]:]]
    export.export("trl", rows, folder / "data", policy.tokenizer, all_turns=True)
    asked, metrics = [], {}

    def reward(prompts, completions, **columns):
        """Ours; a right answer takes the place of each group's first, for a random model gives none."""
        held = [scoring.row_of({scoring.KEY: text}, "") for text in columns[scoring.KEY]]
        said = [[module(row.domain).respond(row)[0]] if i % GROUP == 0 else completion
                for i, (row, completion) in enumerate(zip(held, completions, strict=True))]
        found = ours.reward(prompts, said, **columns)
        asked.append((held, prompts, completions, said, found))
        return found

    config = trl.GRPOConfig(
        output_dir=str(folder / "out"), per_device_train_batch_size=8 * GROUP, num_generations=GROUP, max_steps=1,
        max_completion_length=NEW, learning_rate=1e-2, beta=0.0, bf16=False, gradient_checkpointing=False, use_cpu=True,
        report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True)
    trainer = trl.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), reward_funcs=reward, args=config,
        train_dataset=load_dataset(str(folder / "data"), split="train", cache_dir=str(folder / "cache")),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"))
    trainer.train()
    for entry in trainer.state.log_history:
        metrics |= entry
    trainer.save_model(str(folder / "saved"))
    return folder, rows, asked, metrics, trainer


def test_trl_trains_on_our_rewards(run):
    """Faults: a signature of another release, a column lost on the way, rewards that TRL gives to other answers."""
    _, rows, [(held, _, _, said, found)], metrics, _ = run
    assert len(found) == 8 * GROUP and sorted({row.id for row in held}) == sorted(row.id for row in rows)
    wanted = [v.score for v in rewards(held, [[message["content"] for message in talk] for talk in said])]
    firsts = zip(held[::GROUP], found[::GROUP], strict=True)
    assert found == wanted and all(score == 1 for row, score in firsts if not scoring.many_turns(row))
    assert all(len({row.id for row in held[i:i + GROUP]}) == 1 for i in range(0, len(held), GROUP))
    assert metrics["rewards/reward/mean"] == pytest.approx(sum(found) / len(found))
    assert metrics["verifier_failed"] == 0 and metrics["grad_norm"] > 0
    assert {name for name in metrics if name.startswith("reward/")} == {f"reward/{domain}" for domain in DOMAINS}


def test_trl_asks_with_our_prompts(run, policy):
    """Fault: other tokens than our own sampler gives the model, tools above all."""
    _, rows, [(held, prompts, completions, *_)], _, trainer = run
    ids, *_ = trainer._tokenize_prompts(prompts)
    asked = [next(row for row in rows if row.id == one.id) for one in held]
    assert ids == [policies.encode_prompt(policy, row.messages, row.tools) for row in asked]
    assert any(row.tools for row in held) and asked == held
    assert all(talk[0]["role"] == "assistant" and isinstance(talk[0]["content"], str) for talk in completions)


@torch.no_grad()
def test_the_checkpoint_that_trl_saves_takes_a_models_place(run, policy, tmp_path):
    """Faults: a folder that our engine reads as another model, or the anchor's weights in place of the trained ones."""
    folder, rows, _, _, trainer = run
    taken = policies.load(take(check(folder / "saved", folder / "model"), tmp_path / "taken"))
    moved = max(float((taken.weights[n] - w).abs().max()) for n, w in policy.weights.items())
    assert moved > 1e-3  # it has learned
    rollout = sample(taken, rows[:1], 1, generator=torch.Generator().manual_seed(1), max_new_tokens=NEW)[0]
    theirs = toy_policy.plain_logps(trainer.model.eval(), rollout).gather(1, toy_policy.said(rollout)[:, None])[:, 0]
    assert torch.allclose(theirs, torch.tensor(rollout.logprobs), atol=1e-4)
