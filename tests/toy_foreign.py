"""Checkpoints as somebody else's trainer leaves them: transformers' own save_pretrained, bfloat16, a tokenizer beside them."""
from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import toy_policy
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from m2rl_core.profile import repo_root

HIDDEN = 32


@cache
def words():
    return toy_policy.tokenizer()


def checkpoint(folder: Path, seed: int = 0, near: Path | None = None, shard: str = "5GB", **changes) -> Path:
    """A Qwen3 of random weights in `folder`; with `near`, that one's weights, a third of them moved a little."""
    config = Qwen3Config(**{
        "vocab_size": len(words()), "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 384,
        "tie_word_embeddings": True, "rope_theta": 10000.0, "eos_token_id": words().eos_token_id,
        "pad_token_id": words().pad_token_id, "bos_token_id": None} | changes)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    if near is not None:
        model = Qwen3ForCausalLM.from_pretrained(near, dtype=torch.bfloat16)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn(weight.shape) * (torch.rand(weight.shape) < 0.3))
    model.save_pretrained(folder, max_shard_size=shard)
    words().save_pretrained(folder)
    return folder


def models(root: Path) -> dict[str, Path]:
    """An SFT model and two experts that began as it."""
    sft = checkpoint(root / "sft", 1)
    return {"sft": sft, **{f"rl-{name}": checkpoint(root / f"rl-{name}", seed, sft, "30KB")
                           for name, seed in (("math", 2), ("units", 3))}}


def profile(folder: Path, found: dict[str, Path], over: str = "smoke", **changes) -> Path:
    """A profile of one's own over smoke (or `over`): math and the README's domain, every model brought."""
    trained = {"base": None} if over == "smoke" else {}
    content = {
        "extends": str(repo_root() / "params" / f"{over}.yaml"), "about": "Two experts of one's own.",
        "model": None, **trained, "train": [], "import": {name: str(path) for name, path in found.items()},
        "domains": ["math", str(repo_root() / "params" / "domains" / "units.py")],
        "rl": {"rows": {"units": 24}}, "eval": {"items": {"units": 4}, "k": {"units": 2}}, **changes}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
