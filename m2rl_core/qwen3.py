"""Qwen3's forward pass over a plain dict of Hugging Face weights, for sampling and for training alike.

One function computes both, so the sampler's and the trainer's log-probs are the same numbers. Equal to
`transformers`' Qwen3ForCausalLM to float32 rounding (tests/test_policy.py); dense models only.
Departure: keys and values of a prompt are computed once and shared by all responses of its group.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
KV = list[tuple[Tensor, Tensor]]  # per layer: keys, values, each (B, KVH, S, d)


@dataclass(frozen=True)
class Shape:
    """What the forward pass needs of a Qwen3 config."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope_theta: float

    @staticmethod
    def of(config) -> Shape:
        rope = getattr(config, "rope_parameters", None) or {}
        theta = rope.get("rope_theta") or getattr(config, "rope_theta")
        return Shape(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
                     config.head_dim, config.rms_norm_eps, float(theta))


def rope(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables for `positions` (B, T): each (B, 1, T, d)."""
    steps = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * shape.rope_theta ** (-steps / shape.head_dim)  # (B, T, d/2)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * w over the last dimension, with half the passes over memory that torch's composite form takes."""

    @staticmethod
    def forward(ctx, x, w, eps):
        wide = x.float()
        scale = (torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps).rsqrt_()[..., None]
        unit = wide * scale
        ctx.save_for_backward(unit, scale, w)
        return unit.to(x.dtype) * w

    @staticmethod
    def backward(ctx, grad):
        unit, scale, w = ctx.saved_tensors
        along = grad * unit
        mean = (along @ w.float() / w.numel())[..., None]
        inner = torch.addcmul((grad * w).float(), unit, mean, value=-1).mul_(scale)
        return inner.to(grad.dtype), along.flatten(0, -2).sum(0).to(w.dtype), None


class _Rotate(torch.autograd.Function):
    """Rotary embedding; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        return _rotated(grad, *ctx.saved_tensors, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    half = x.shape[-1] // 2
    y, sin = x * cos, sin[..., :half]
    y[..., :half].addcmul_(x[..., half:], sin, value=-way)
    y[..., half:].addcmul_(x[..., :half], sin, value=way)
    return y


rms_norm, rotate = _RMSNorm.apply, _Rotate.apply


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention: q (B, H, T, d), k and v (B, KVH, S, d), mask (B, 1, T, S) of bools or None for causal."""
    B, H, T, d = q.shape
    if T == 1 and mask is not None:  # the heads of a group as positions: each key is read once, not once a head
        return F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, d), k, v, attn_mask=mask).view(B, H, 1, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def hidden_states(w: Weights, shape: Shape, tokens: Tensor, positions: Tensor, past: KV | None = None,
                  mask: Tensor | None = None, write=None) -> tuple[Tensor, KV]:
    """Final hidden states (B, T, D) of `tokens` (B, T), and the keys and values that this call computed.

    `past` holds earlier keys and values to attend to (put before the new ones); `mask` (B, 1, T, S) says which
    of them each token sees, None means plain causal attention without a past. `write(layer, k, v)`, where
    given, stores the new keys and values and returns those to attend to (the sampler's cache).
    """
    cos, sin = rope(positions, shape)
    x = F.embedding(tokens, w["model.embed_tokens.weight"])  # (B, T, D)
    B, T, D = x.shape
    new: KV = []
    for i in range(shape.layers):
        at = f"model.layers.{i}."
        h = rms_norm(x, w[at + "input_layernorm.weight"], shape.eps)
        q, k, v = (F.linear(h, w[f"{at}self_attn.{n}_proj.weight"]).view(B, T, -1, shape.head_dim) for n in "qkv")
        q = rms_norm(q, w[at + "self_attn.q_norm.weight"], shape.eps).transpose(1, 2)
        k = rms_norm(k, w[at + "self_attn.k_norm.weight"], shape.eps).transpose(1, 2)
        q, k, v = rotate(q, cos, sin), rotate(k, cos, sin), v.transpose(1, 2)
        if write is not None:
            k, v = write(i, k, v)
        else:
            new.append((k, v))
            if past is not None:
                k, v = torch.cat((past[i][0], k), dim=2), torch.cat((past[i][1], v), dim=2)
        y = attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1)
        x = x + F.linear(y, w[at + "self_attn.o_proj.weight"])
        h = rms_norm(x, w[at + "post_attention_layernorm.weight"], shape.eps)
        h = F.silu(F.linear(h, w[at + "mlp.gate_proj.weight"])) * F.linear(h, w[at + "mlp.up_proj.weight"])
        x = x + F.linear(h, w[at + "mlp.down_proj.weight"])
    return rms_norm(x, w["model.norm.weight"], shape.eps), new


def head(w: Weights) -> Tensor:
    """The output embedding (V, D): the input embedding itself where the model ties them."""
    return w.get("lm_head.weight", w["model.embed_tokens.weight"])


def token_logprobs(w: Weights, hidden: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = 4096,
                   entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and the entropy of its distribution, both (N,), from hidden (N, D).

    Only with `entropy_grad` has the entropy a gradient, which costs memory. Works `chunk` rows at a time, so that no (B, T, V) logits exist at once in the forward pass.
    """
    logps, entropies = [], []
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logp = F.log_softmax(F.linear(h, head(w)).float() / temperature, dim=-1)  # (n, V)
        logps.append(logp.gather(1, t[:, None])[:, 0])
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(logps), torch.cat(entropies)
