"""Parameters and operations of a Qwen3, dense or of experts, from its shape alone.

An operation is one addition or one multiplication, so a product of (n, a) and (a, b) takes 2 n a b. Norms, rotations and
activations are left out: they are bytes, not operations. `tests/test_cost.py` counts the same with torch's own counter.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from m2rl_core.specs import ModelSpec


@dataclass(frozen=True)
class Shape:
    """A decoder of this shape; `experts` 0 means one feed-forward block, else `used` of them run for a token."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = True
    experts: int = 0
    used: int = 0

    @property
    def attention(self) -> int:
        """Weights of a layer's four projections."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def expert(self) -> int:
        """Weights of one feed-forward block: gate, up, down."""
        return 3 * self.hidden * self.intermediate

    @property
    def layer(self) -> int:
        """All parameters of one layer: projections, feed-forward, router, four norms."""
        router = self.hidden * self.experts
        return self.attention + max(1, self.experts) * self.expert + router + 2 * self.hidden + 2 * self.head_dim

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All of them; a tied embedding counts once."""
        return self.layers * self.layer + self.hidden + self.embedding * (1 if self.tied else 2)

    @property
    def multiplied(self) -> int:
        """Weights that one token is multiplied with in the layers, without the output embedding."""
        return self.layers * (self.attention + max(1, self.used) * self.expert + self.hidden * self.experts)

    @property
    def active(self) -> int:
        """Parameters that work on one token, the output embedding among them."""
        return self.multiplied + self.embedding

    def key_values(self, width: int = 2) -> int:
        """Bytes of the keys and values of one token; `width` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width

    def forward(self, tokens: float, seen: float, logits: float | None = None) -> float:
        """Operations for `tokens`, each of which sees `seen` others, and for the logits of `logits` of them (all).

        A causal sequence of n tokens has `seen` = (n + 1) / 2 where the kernel skips what is masked, n where it does not.
        """
        attention = 4 * self.layers * self.heads * self.head_dim * seen
        return tokens * (2 * self.multiplied + attention) + 2 * self.embedding * (tokens if logits is None else logits)

    def training(self, tokens: float, seen: float, logits: float | None = None, recompute: bool = False,
                 passes: float = 0.0) -> float:
        """Operations of a forward and a backward pass (twice as many), with `recompute` one more forward pass.

        `passes`: how often the same tokens are only scored besides (log-probs of a reference, or of the policy before).
        """
        return self.forward(tokens, seen, logits) * (3 + bool(recompute) + passes)


def of_spec(spec: ModelSpec) -> Shape:
    """The shape of a profile's model; the small ones tie their embeddings."""
    names = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab")
    return Shape(**{name: getattr(spec, name) for name in names})


def of_config(config: dict) -> Shape:
    """The shape in a config.json of a qwen3 or qwen3_moe folder; raises KeyError for one that lacks a field."""
    experts = config.get("num_experts") or config.get("num_local_experts") or 0  # transformers 5 writes the second
    return Shape(
        hidden=config["hidden_size"], layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"], head_dim=config["head_dim"],
        intermediate=config["moe_intermediate_size" if experts else "intermediate_size"], vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")), experts=experts,
        used=config.get("num_experts_per_tok", 0) if experts else 0)


@cache
def published() -> dict[str, Shape]:
    """The models of the paper's family by name."""
    text = (files(__package__) / "shapes.yaml").read_text(encoding="utf-8")
    return {name: Shape(**fields) for name, fields in yaml.safe_load(text).items()}
