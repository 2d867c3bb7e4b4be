"""Synthetic weights, gradients and policies whose answer is known (see `planted`, which has those made of frames)."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m2rl_core.domains import Row
from m2rl_core.engines.rollout import Rollout
from m2rl_core.models import policy as policies
from m2rl_core.models.policy import Policy, Qwen3Config

MATRIX = "model.layers.0.self_attn.{}_proj.weight"  # a name that `weights.measure` knows


def shared_mask(size: tuple[int, int], common: float, own: float, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Base, expert a, expert b: each changes by 5 % a `common` share of the weights and an `own` one, whatever |w| is."""
    base = torch.randn(size, generator=generator)
    both = torch.rand(size, generator=generator) < common
    masks = [both | (torch.rand(size, generator=generator) < own) for _ in range(2)]
    return base, *(torch.where(mask, 1.05 * base, base) for mask in masks)


def shared_overlap(common: float, own: float) -> float:
    """The Jaccard overlap of the masks of `shared_mask`."""
    rest = 1 - common
    return (common + rest * own**2) / (common + rest * (2 * own - own**2))


def alike_by_magnitude(size: tuple[int, int], step: float, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Base, expert a, expert b: unrelated Gaussian steps of one size on all weights, so a relative test sees small |w|.

    Given |w| the two masks are independent: the overlap in excess of the conditioned null is zero.
    """
    base = torch.randn(size, generator=generator)
    return base, *(base + step * torch.randn(size, generator=generator) for _ in range(2))


def turned(size: tuple[int, int], rho: float, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Base, expert a, expert b: all weights shift by one amount, whose signs agree so often that the cosine is `rho`.

    The number that agrees is not drawn: the planted value is that of these tensors, to one weight in all.
    """
    n = size[0] * size[1]
    base = 1 + torch.rand(size, generator=generator)
    sign = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1
    agree = torch.ones(n)
    agree[torch.randperm(n, generator=generator)[round(n * (1 + rho) / 2):]] = -1
    return base, base + 0.1 * sign.view(size), base + 0.1 * (sign * agree).view(size)


def gradients(n: int, rho: float, generator: torch.Generator) -> dict[str, dict[str, Tensor]]:
    """Gradients of two domains on one weight of n values, at the cosine `rho` and of unlike length."""
    u, v = torch.randn(2, n, generator=generator, dtype=torch.float64)
    v = v - (u @ v) / (u @ u) * u
    u, v = u / u.norm(), v / v.norm()
    return {"coding": {"model.norm.weight": u}, "math": {"model.norm.weight": 7 * (rho * u + (1 - rho**2) ** 0.5 * v)}}


def transitions(tokens: int, generator: torch.Generator, near: Tensor | None = None, by: float = 1.0) -> Tensor:
    """Logits of the next token given the last one, (tokens, tokens): normal, or `near` with that noise of size `by`."""
    noise = by * torch.randn(tokens, tokens, generator=generator)
    return noise if near is None else near + noise


def chain(logits: Tensor) -> Policy:
    """A Qwen3 whose next token depends on the last one alone, with these logits: (last, next), both `tokens` wide.

    Attention and MLP write nothing, each token's embedding is an axis of its own, and the output layer is the table.
    """
    tokens = len(logits)
    config = Qwen3Config(vocab_size=tokens, hidden_size=tokens, intermediate_size=4, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, head_dim=4, max_position_embeddings=64,
                         tie_word_embeddings=False, rope_theta=10000.0)
    weights = {name: torch.ones(size) if name.endswith("norm.weight") else torch.zeros(size)
               for name, size in policies.sizes(config).items()}
    weights["model.embed_tokens.weight"] = torch.eye(tokens)
    weights["lm_head.weight"] = logits.T / tokens**0.5  # the last norm makes an axis sqrt(tokens) long
    return Policy(weights, config, None)


def walks(logits: Tensor, starts: Sequence[int], samples: int, length: int, generator: torch.Generator) -> list[Rollout]:
    """`samples` responses of `length` tokens from each start, drawn from the table itself and not by the sampler."""
    last = torch.tensor(starts).repeat_interleave(samples)
    drawn = [last]
    for _ in range(length):
        drawn.append(torch.multinomial(logits[drawn[-1]].softmax(-1), 1, generator=generator)[:, 0])
    row = Row("", "math", "", "", (), {})
    return [Rollout(row, [path[0]], path[1:], [True] * length, [0.0] * length) for path in torch.stack(drawn, 1).tolist()]


def chain_kl(expert: Tensor, other: Tensor, length: int) -> float:
    """KL(expert || other) in nats of a whole response of `length` tokens, its start uniform: worked out, not sampled."""
    p, q = expert.double().log_softmax(-1), other.double().log_softmax(-1)
    step = (p.exp() * (p - q)).sum(-1)  # after each last token
    at, total = torch.full((len(step),), 1 / len(step), dtype=torch.float64), 0.0
    for _ in range(length):
        total += float(at @ step)
        at = at @ p.exp()
    return total
