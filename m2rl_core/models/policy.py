"""Policies as Hugging Face folders: build, load and save models and tokenizers.

A policy is Qwen3 weights in a dict, its config and its tokenizer. The embedded studies train a Qwen3 of a few
million parameters from scratch; the folder is a real one, so transformers, vLLM and mergekit read it unchanged.
"""
from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from m2rl_core.adapters.foreign import line_for
from m2rl_core.errors import StudyError
from m2rl_core.models.qwen3 import Layer, Model, Shape, Weights, hidden_states, prepare
from m2rl_core.slim import without
from m2rl_core.threads import side_by_side

with without("transformers.models.auto.modeling_auto"):  # all model classes: two seconds, for the config's docstring
    from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen3Config

B, T = TypeVar("B"), TypeVar("T")
LANES = 2  # micro-batches that a CPU learns from at once
EOS, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL = (PAD, "<|im_start|>", EOS)
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Qwen's own split of text, digits one by one.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SIDECARS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
            "vocab.json", "merges.txt", "added_tokens.json", "generation_config.json")

# Qwen's chat markup in a compact form: tools in the system turn, tool results in a user turn.
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }})
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
{{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}
{%- else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass
class Policy:
    """Weights (float32 on the CPU unless moved), config and tokenizer of one model."""

    weights: Weights
    config: Qwen3Config
    tokenizer: PreTrainedTokenizerFast

    @cached_property
    def shape(self) -> Shape:
        return Shape.of(self.config)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a turn (Qwen has two)."""
        return tuple(self.tokenizer.convert_tokens_to_ids(t) for t in (EOS, PAD))

    @property
    def device(self) -> torch.device:
        return self.weights["model.norm.weight"].device

    def requires_grad(self) -> list[torch.Tensor]:
        """The weights as leaves to train, in the order of their names."""
        return [self.weights[name].requires_grad_(True) for name in sorted(self.weights)]

    # What one model on several processes does otherwise (see `sharded`)

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
        """`hidden_states` with the present weights, to learn from."""
        return hidden_states(prepare(self.weights, self.shape), tokens, positions, attend)

    def each(self, batches: Sequence[B], work: Callable[[Policy, B], T], lanes: int = LANES) -> list[T]:
        """What `work(policy, batch)` gives for each micro-batch, in order; the gradients that it leaves add up on the weights.

        On a CPU some `lanes`, side by side where there are threads for it, see the weights and have a gradient of their own.
        Which lane a batch is in, and the order of all sums, does not depend on the threads.
        """
        if self.device.type != "cpu" or min(len(batches), lanes) < 2:
            return [work(self, batch) for batch in batches]
        own = [Lane({n: w.detach().requires_grad_(w.requires_grad) for n, w in self.weights.items()}, self.config,
                    self.tokenizer) for _ in range(lanes)]
        found: list[T] = [None] * len(batches)

        def run(lane: int):
            for i in range(lane, len(batches), lanes):
                found[i] = work(own[lane], batches[i])
            own[lane].finish()
        side_by_side([partial(run, lane) for lane in range(lanes)], lanes)
        for name, weight in self.weights.items():
            for gradient in (lane.weights[name].grad for lane in own):
                if gradient is not None:
                    weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        return found

    def add_up(self) -> None:
        """Make the gradient of this process's share the sum over all; there is but one."""

    def gradients(self) -> Weights:
        """The gradient that a backward pass left, whole: {name: gradient} of the weights that have one."""
        return {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}

    def whole(self, exact: bool = False) -> Policy:
        """The policy in this process alone, to sample from; `exact` for the weights as they are trained and saved."""
        return self


class Lane(Policy):
    """The weights of a policy with a gradient of their own, of several micro-batches; they are prepared once for all."""

    @cached_property
    def made(self) -> Model:
        return prepare(self.weights, self.shape)

    @cached_property
    def model(self) -> Model:
        layers = [Layer(*(part.detach().requires_grad_(part.requires_grad) for part in layer)) for layer in self.made.layers]
        return self.made._replace(layers=layers)

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
        return hidden_states(self.model, tokens, positions, attend)

    def finish(self) -> None:
        """Take the gradient from the joined matrices to the weights."""
        found = [(part, leaf.grad) for layer, leaves in zip(self.made.layers, self.model.layers, strict=True)
                 for part, leaf in zip(layer, leaves, strict=True) if leaf.grad is not None]
        if found:
            torch.autograd.backward(*zip(*found, strict=True))


def train_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` tokens with single digits and Qwen's chat markers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[*SPECIAL, *MARKERS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    # As in Qwen's own files: text that other tools decode without special tokens keeps these.
    tokenizer.add_tokens([AddedToken(marker, normalized=False, special=False) for marker in MARKERS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD,
                                   clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build(spec, tokenizer: PreTrainedTokenizerFast, generator: torch.Generator) -> Policy:
    """A freshly initialised Qwen3 of the profile's size: normal at unit gain, residual outputs scaled by depth."""
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=spec.hidden, intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers, num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim, max_position_embeddings=spec.context, tie_word_embeddings=True,
        rope_theta=10000.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, architectures=["Qwen3ForCausalLM"], dtype="float32")
    weights: Weights = {}
    for name, size in sizes(config).items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(size)
        else:
            gain = 1 / math.sqrt(2 * spec.layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            weights[name] = torch.randn(size, generator=generator) * gain * size[1] ** -0.5
    return Policy(weights, config, tokenizer)


def sizes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a tied Qwen3."""
    d, q, kv = config.hidden_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d), "model.norm.weight": (d,)}
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        found |= {
            at + "input_layernorm.weight": (d,), at + "post_attention_layernorm.weight": (d,),
            at + "self_attn.q_proj.weight": (q, d), at + "self_attn.k_proj.weight": (kv, d),
            at + "self_attn.v_proj.weight": (kv, d), at + "self_attn.o_proj.weight": (d, q),
            at + "self_attn.q_norm.weight": (config.head_dim,), at + "self_attn.k_norm.weight": (config.head_dim,),
            at + "mlp.gate_proj.weight": (config.intermediate_size, d),
            at + "mlp.up_proj.weight": (config.intermediate_size, d),
            at + "mlp.down_proj.weight": (d, config.intermediate_size),
        }
    return found


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> Policy:
    """The policy in a Hugging Face folder; weights are cast to `dtype` (on a CPU float32 is the fast one)."""
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "qwen3":
        raise StudyError(f"{folder}: a {config.model_type} model; the torch engine runs dense qwen3 models")
    weights = {name: tensor.to(dtype) for name, tensor in load_weights(folder).items()}
    return Policy(weights, config, load_tokenizer(folder))


def load_tokenizer(folder: Path):
    """A folder's tokenizer; those that are trained here are read without the classes of all other models."""
    config = folder / "tokenizer_config.json"
    named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") if config.is_file() else None
    if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return PreTrainedTokenizerFast.from_pretrained(folder)
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder)


def load_weights(folder: Path) -> Weights:
    """All tensors of a folder, sharded or not, as they are stored."""
    index = folder / "model.safetensors.index.json"
    if not index.exists() and not (folder / "model.safetensors").exists():
        raise StudyError(f"{folder}: {line_for(folder) or 'no model.safetensors: copy the model again'}")
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weights: Weights = {}
    for name, shard in json.loads(index.read_text())["weight_map"].items():
        with safe_open(folder / shard, "pt") as file:
            weights[name] = file.get_tensor(name)
    return weights


def save(policy: Policy, folder: Path) -> None:
    """Write a complete Hugging Face folder: weights, config, tokenizer, chat template, generation config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().contiguous() for n, t in sorted(policy.weights.items())},
              folder / "model.safetensors", metadata={"format": "pt"})
    policy.config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(
        {"do_sample": True, "eos_token_id": list(policy.stop_ids), "pad_token_id": policy.stop_ids[1]}, indent=2) + "\n")


def copy_sidecars(source: Path, folder: Path) -> None:
    """Copy config, tokenizer and chat template of `source` beside weights that something else wrote."""
    for name in ("config.json", *SIDECARS):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def encode_prompt(policy: Policy, messages: Sequence[dict], tools: Sequence[dict] = ()) -> list[int]:
    """Token ids of a conversation up to the point where the assistant speaks."""
    text = policy.tokenizer.apply_chat_template(list(messages), tools=list(tools) or None, tokenize=False,
                                                add_generation_prompt=True)
    return policy.tokenizer.encode(text, add_special_tokens=False)
