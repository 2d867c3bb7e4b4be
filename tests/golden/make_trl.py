"""Makes trl.safetensors: losses and gradients of real TRL on the small batch that is made here. With the peers' Python:

    .venv-peers/bin/python tests/golden/make_trl.py            writes the file
    .venv-peers/bin/python tests/golden/make_trl.py --check    compares TRL with the file instead

tests/test_grpo_parity.py gives the same model and tokens to our trainer; it needs no TRL.
"""
from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

GOLDEN = Path(__file__).with_name("trl.safetensors")
CONFIG = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True, rope_theta=10000.0)
GROUP, LONGEST = 4, 12
PROMPTS = [[5, 9, 31], [7, 7, 8, 40, 2, 19], [11]]  # left-padded by TRL, right-padded by us
LENGTHS = [[12, 3, 7, 1], [5, 5, 9, 2], [4, 11, 6, 8]]  # of each rollout
TOOLS = {(0, 2): range(2, 5), (1, 2): range(4, 6)}  # (prompt, rollout): tokens that a tool wrote
REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [0.0, 0.25, 1.0, 0.0]]  # one group is all alike
CASES = {  # name: what differs from TRL's defaults
    "grpo": {"loss_type": "grpo"}, "dapo": {"loss_type": "dapo"}, "dr_grpo": {"loss_type": "dr_grpo"},
    "grpo-cool": {"loss_type": "grpo", "temperature": 0.7}, "grpo-kl": {"loss_type": "grpo", "beta": 0.2},
    "dapo-kl": {"loss_type": "dapo", "beta": 0.2, "temperature": 1.3},
}


def model(seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of a few thousand weights, uneven enough that each of them shows."""
    config = Qwen3Config(**CONFIG, attn_implementation="eager")
    made = Qwen3ForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(made.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else 0.35 * noise)
    return made


def tokens() -> list[list[list[int]]]:
    """The token ids of every rollout, by prompt."""
    generator = torch.Generator().manual_seed(7)
    return [[torch.randint(0, CONFIG["vocab_size"], (n,), generator=generator).tolist() for n in row] for row in LENGTHS]


def advantages() -> torch.Tensor:
    """(r - mean) / (std + 1e-4) inside each group, as TRL has it; (prompts * GROUP,)."""
    rewards = torch.tensor(REWARDS)
    return ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()


def batch() -> dict[str, torch.Tensor]:
    """The padded tensors that TRL's loss takes."""
    said, size = tokens(), len(PROMPTS) * GROUP
    widest = max(map(len, PROMPTS))
    found = {name: torch.zeros(size, width, dtype=torch.long) for name, width in (
        ("prompt_ids", widest), ("prompt_mask", widest), ("completion_ids", LONGEST), ("completion_mask", LONGEST))}
    found["tool_mask"] = torch.ones(size, LONGEST, dtype=torch.long)
    for p, prompt in enumerate(PROMPTS):
        for g in range(GROUP):
            row = p * GROUP + g
            found["prompt_ids"][row, widest - len(prompt):] = torch.tensor(prompt)
            found["prompt_mask"][row, widest - len(prompt):] = 1
            found["completion_ids"][row, : LENGTHS[p][g]] = torch.tensor(said[p][g])
            found["completion_mask"][row, : LENGTHS[p][g]] = 1
            found["tool_mask"][row, list(TOOLS.get((p, g), []))] = 0
    return found | {"advantages": advantages(),
                    "num_items_in_batch": (found["completion_mask"] * found["tool_mask"]).sum()}


def trained(case: str, folder: Path) -> dict[str, torch.Tensor]:
    """TRL's loss and gradients of one case."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer
    words = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(CONFIG["vocab_size"])}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0")
    own = {"temperature": 1.0} | CASES[case]
    beta = own.pop("beta", 0.0)
    config = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=len(PROMPTS) * GROUP, num_generations=GROUP,
        max_completion_length=LONGEST, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[],
        epsilon=0.2, epsilon_high=0.28, steps_per_generation=1, **own)
    learner, inputs = model(1), batch()
    trainer = GRPOTrainer(learner, reward_funcs=[lambda completions, **_: [0.0] * len(completions)], args=config,
                          train_dataset=Dataset.from_list([{"prompt": "w3"}] * 12), processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps, trainer.beta = 1, beta  # set late, or TRL looks for a model to load
    learner.train()
    if beta:
        ids, mask = (torch.cat([inputs[f"prompt_{k}"], inputs[f"completion_{k}"]], 1) for k in ("ids", "mask"))
        learner.load_state_dict(model(2).state_dict())  # TRL has changed how this very object answers
        with torch.no_grad():
            inputs["ref_per_token_logps"] = trainer._get_per_token_logps_and_entropies(learner, ids, mask, LONGEST)[0]
        learner.load_state_dict(model(1).state_dict())
    loss = trainer._compute_loss(learner, inputs)
    loss.backward()
    return {"loss": loss.detach(), **{name: weight.grad for name, weight in learner.named_parameters()}}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = {f"{case}/{name}": tensor.contiguous() for case in CASES
                 for name, tensor in trained(case, Path(folder)).items()}
    for seed, name in ((1, "policy"), (2, "reference")):
        found |= {f"{name}/{n}": w.detach().clone() for n, w in model(seed).named_parameters()}
    if "--check" in sys.argv:
        golden = load_file(GOLDEN)
        worst = max(float((golden[name] - tensor).abs().max()) for name, tensor in found.items())
        print(f"trl {version('trl')}: {len(found)} tensors, largest difference from {GOLDEN.name} {worst:.1e}")
        return int(worst > 1e-6 or golden.keys() != found.keys())
    save_file(found, GOLDEN, metadata={"trl": version("trl")})
    print(f"{GOLDEN}: {len(found)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
