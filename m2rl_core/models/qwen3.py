"""Qwen3's forward pass over a plain dict of Hugging Face weights, for sampling and for training alike.

Tokens lie one after the other, (N,), without padding; what each of them sees is the business of `attention.py`.
The trainer and the sampler run the same code, but for a CPU's step of one token (`decode.py`, held to it by
tests/test_decode.py). Equal to `transformers`' Qwen3ForCausalLM to rounding (tests/test_policy.py); dense models only.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m2rl_core.errors import StudyError

Weights = dict[str, Tensor]
CHUNK = 2**24  # logits that are held at once


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
        kind = rope.get("rope_type", "default")
        if kind != "default" or getattr(config, "use_sliding_window", False):
            what = "a sliding window" if kind == "default" else f"rope of type {kind}"
            raise StudyError(f"a model with {what}: the torch engine has full attention and plain rope only")
        theta = rope.get("rope_theta") or getattr(config, "rope_theta")
        return Shape(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
                     config.head_dim, config.rms_norm_eps, float(theta))


class Layer(NamedTuple):
    """A layer's weights as they are multiplied: what reads the same input is one matrix, with the norm before it inside."""

    qkv: Tensor  # ((H + 2 KVH) d, D)
    qk_norm: Tensor  # (H + KVH, d)
    out: Tensor  # (D, H d)
    gate_up: Tensor  # (2 F, D)
    down: Tensor  # (D, F)


class Model(NamedTuple):
    """The weights as the forward pass takes them; made from the present ones, with their gradients, by `prepare`."""

    shape: Shape
    embed: Tensor  # (V, D)
    layers: list[Layer]
    norm: Tensor  # (D,)


LAYER = ("input_layernorm", "post_attention_layernorm", *(f"self_attn.{n}_proj" for n in "qkvo"),
         "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # its weights' names


def joined(own: Weights, shape: Shape) -> Layer:
    """A layer from its weights, by the names of `LAYER`."""
    return Layer(
        torch.cat([own[f"self_attn.{n}_proj"] for n in "qkv"]) * own["input_layernorm"],
        torch.cat((own["self_attn.q_norm"].expand(shape.heads, -1), own["self_attn.k_norm"].expand(shape.kv_heads, -1))),
        own["self_attn.o_proj"],
        torch.cat((own["mlp.gate_proj"], own["mlp.up_proj"])) * own["post_attention_layernorm"],
        own["mlp.down_proj"])


def prepare(w: Weights, shape: Shape) -> Model:
    """Join the matrices of each layer: a copy of the weights, to be made again when they have changed."""
    layers = [joined({name: w[f"model.layers.{i}.{name}.weight"] for name in LAYER}, shape) for i in range(shape.layers)]
    return Model(shape, w["model.embed_tokens.weight"], layers, w["model.norm.weight"])


class _Normalize(torch.autograd.Function):
    """x / rms(x) over the last dimension, with half the passes over memory that torch's composite form takes."""

    @staticmethod
    def forward(ctx, x, eps):
        wide, n = x.float(), x.shape[-1]
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(n).add_(eps).rsqrt_()
        unit = wide * scale
        ctx.save_for_backward(unit, scale)
        return unit.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        unit, scale = ctx.saved_tensors
        wide = grad.float()
        mean = (torch.linalg.vecdot(wide, unit) / unit.shape[-1])[..., None]
        return torch.addcmul(wide, unit, mean, value=-1).mul_(scale).to(grad.dtype), None


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
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin, value=-way)
    y[..., half:].addcmul_(x[..., :half], sin, value=way)
    return y


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of both in one tensor (N, 2 F), (N, F); its gradient is written into one tensor, too."""

    @staticmethod
    def forward(ctx, gate_up):
        gate, up = gate_up.chunk(2, -1)
        opened = F.silu(gate)
        ctx.save_for_backward(gate_up, opened)
        return opened * up

    @staticmethod
    def backward(ctx, grad):
        gate_up, opened = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        found = torch.empty_like(gate_up)
        of_gate, of_up = found.chunk(2, -1)
        torch.mul(grad, opened, out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return found


normalize, rotate, swiglu = _Normalize.apply, _Rotate.apply, _SwiGLU.apply


def rope(positions: Tensor, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines (N, 1, d) and sines (N, 1, d/2) of `positions` (N,)."""
    steps = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = (positions[:, None].float() * shape.rope_theta ** (-steps / shape.head_dim))[:, None]  # (N, 1, d/2)
    cos = angles.cos()
    return torch.cat((cos, cos), dim=-1).to(dtype), angles.sin().to(dtype)


def hidden_states(model: Model, tokens: Tensor, positions: Tensor,
                  attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Final hidden states (N, D) of `tokens` (N,) at `positions` (N,).

    `attend(layer, q, k, v)` gives what each token gathers, (N, H d), from q (N, H, d) and k, v (N, KVH, d).
    """
    x = F.embedding(tokens, model.embed)  # (N, D)
    cos, sin = rope(positions, model.shape, x.dtype)
    for i, layer in enumerate(model.layers):
        x = through(layer, model.shape, x, cos, sin, partial(attend, i))
    return normalize(x, model.shape.eps) * model.norm


def through(layer: Layer, shape: Shape, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """What a layer makes of its input (N, D); `attend` is that of `hidden_states`, of this layer."""
    heads = shape.heads, shape.kv_heads
    qkv = F.linear(normalize(x, shape.eps), layer.qkv).view(len(x), -1, shape.head_dim)
    qk, v = qkv.split((sum(heads), shape.kv_heads), dim=1)
    q, k = rotate(normalize(qk, shape.eps) * layer.qk_norm, cos, sin).split(heads, dim=1)
    x = x + F.linear(attend(q, k, v), layer.out)
    return x + F.linear(swiglu(F.linear(normalize(x, shape.eps), layer.gate_up)), layer.down)


def head(w: Weights) -> Tensor:
    """The output embedding (V, D): the input embedding itself where the model ties them."""
    return w.get("lm_head.weight", w["model.embed_tokens.weight"])


class _TokenLogprobs(torch.autograd.Function):
    """Log-prob of each target and entropy, with no more logits than `CHUNK` at once, in the backward pass neither."""

    @staticmethod
    def forward(ctx, hidden, output, targets, temperature, rows, entropy_grad):
        ctx.rows, ctx.temperature = rows, temperature
        logps, entropies, masses = [], [], []
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            logp = _log_softmax(h, output, temperature)
            mass = logp.exp()
            logps.append(logp.gather(1, t[:, None])[:, 0])
            entropies.append(-torch.linalg.vecdot(mass, logp))
            masses.append(mass)
        # one chunk is kept for the backward pass, several are computed again there
        kept = masses if len(masses) == 1 and not entropy_grad else []
        ctx.save_for_backward(hidden, output, targets, *kept)
        found = torch.cat(logps), torch.cat(entropies)
        if not entropy_grad:
            ctx.mark_non_differentiable(found[1])
        ctx.entropy_grad = entropy_grad
        return found

    @staticmethod
    def backward(ctx, of_logp, of_entropy):
        hidden, output, targets, *kept = ctx.saved_tensors
        of_hidden, of_output = torch.empty_like(hidden), torch.zeros_like(output)
        for at in range(0, len(hidden), ctx.rows):
            part = slice(at, at + ctx.rows)
            h, g = hidden[part], of_logp[part, None]
            if kept:
                found = kept[0] * -g
            else:
                logp = _log_softmax(h, output, ctx.temperature)
                mass = logp.exp()
                found = mass * -g
                if ctx.entropy_grad:
                    entropy = -torch.linalg.vecdot(mass, logp)[:, None]
                    found -= mass * (logp + entropy) * of_entropy[part, None]
            found.scatter_add_(1, targets[part, None], g)
            found = found.div_(ctx.temperature).to(h.dtype)
            torch.mm(found, output, out=of_hidden[part])
            of_output.addmm_(found.T, h)
        return of_hidden, of_output, None, None, None, None


def _log_softmax(hidden: Tensor, output: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(F.linear(hidden, output).float() / temperature, dim=-1)


def token_logprobs(w: Weights, hidden: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int | None = None,
                   entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and the entropy of its distribution, both (N,), from hidden (N, D).

    Only with `entropy_grad` has the entropy a gradient. Works `chunk` rows at a time, as many as `CHUNK` logits
    allow, so that no (N, V) logits exist at once.
    """
    output = head(w)
    return _TokenLogprobs.apply(hidden, output, targets, temperature, chunk or max(1, CHUNK // len(output)), entropy_grad)
