"""Synthetic models for the benches: true shapes of Qwen3-0.6B or -4B, weights drawn at random."""
from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch

from m2rl_core.merging.checkpoint import Writer
from m2rl_core.merging.states import flat

EXPERTS = 5
CHUNK = 1 << 22
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16", "tie_word_embeddings": True,
    "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000, "attention_bias": False,
    "max_position_embeddings": 40960, "bos_token_id": 151643, "eos_token_id": 151645,
}


def shapes(layers: int = 28, vocab: int = 151936) -> dict[str, tuple[int, ...]]:
    """Qwen3-0.6B's tensors by name; fewer layers or words for a try-out."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    found = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    layer = {
        "self_attn.q_proj": (2048, hidden), "self_attn.k_proj": (1024, hidden), "self_attn.v_proj": (1024, hidden),
        "self_attn.o_proj": (hidden, 2048), "self_attn.q_norm": (128,), "self_attn.k_norm": (128,),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }
    return found | {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}


def matrices(layers: int, hidden: int = 2560) -> dict[str, tuple[int, ...]]:
    """The seven matrices of some layers of Qwen3-4B by name; another hidden size for a try-out."""
    inner, wide, narrow = hidden * 19 // 5, hidden * 8 // 5, hidden * 2 // 5  # 9728, 4096, 1024
    layer = {
        "self_attn.q_proj": (wide, hidden), "self_attn.k_proj": (narrow, hidden), "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, wide), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}


def make_once(home: Path, layers: int, vocab: int, **options) -> None:
    """`make` where `home` is not there yet; whole or not at all."""
    if not home.is_dir():
        part = home.with_name(f"{home.name}.partial")
        shutil.rmtree(part, ignore_errors=True)
        make(part, layers, vocab, **options)
        part.rename(home)


def make(
    folder: Path, layers: int, vocab: int, seed: int = 0, changed: float = 0.3, sizes: dict | None = None,
) -> None:
    """Writes base, e0 .. e4 into `folder`: bf16, each expert one bf16 step off in a share `changed` of the weights.

    sizes: the tensors' shapes by name, where they are not those of `shapes(layers, vocab)`. Steps of one unit in the last
    place are what RLVR at a small learning rate does to bf16 weights.
    """
    sizes = sizes or shapes(layers, vocab)
    generator = torch.Generator().manual_seed(seed)
    writers = []
    for name in ("base", *(f"e{i}" for i in range(EXPERTS))):
        (folder / name).mkdir(parents=True)
        config = CONFIG | {"num_hidden_layers": layers, "vocab_size": vocab}
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        writers.append(Writer(folder / name, {tensor: ("BF16", shape) for tensor, shape in sizes.items()}))
    for name, shape in sizes.items():
        size = math.prod(shape)
        for first in range(0, size, CHUNK):
            n = min(CHUNK, size - first)
            base = (0.02 * torch.randn(n, generator=generator)).bfloat16()
            writers[0].put(name, first, flat(base))
            bits = base.view(torch.int16)
            free = (bits & 0x7FFF) > 0  # a step down from 0 would be NaN
            for writer in writers[1:]:
                sign = torch.randint(0, 2, (n,), generator=generator, dtype=torch.int16) * 2 - 1
                moved = (torch.rand(n, generator=generator) < changed) & free
                writer.put(name, first, flat((bits + sign * moved).view(torch.bfloat16)))
    for writer in writers:
        writer.__exit__(None, None, None)
