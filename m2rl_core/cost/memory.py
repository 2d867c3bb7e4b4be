"""Bytes on one GPU: what training and sampling hold there under full sharding (FSDP2), part by part.

Mixed precision as in params/accelerate: a float32 master copy, Adam's two moments and the gradient are sharded over all
GPUs; a layer's weights are gathered in bfloat16 when its turn comes, two layers at a time, and its gradient before it is
scattered again.
"""
from __future__ import annotations

from dataclasses import dataclass

from m2rl_core.cost.machines import Machine
from m2rl_core.cost.shapes import Shape

MASTER, MOMENTS, GRADIENT, HALF = 4, 8, 4, 2  # bytes a parameter
SPARE = 0.1  # of a GPU's memory: the allocator's holes, the libraries' own buffers
LOGITS = 2**24  # logits that are held at once (qwen3.CHUNK), with their gradient and their exponentials in float32


@dataclass(frozen=True)
class Training:
    """Bytes on each GPU while it trains."""

    master: float
    moments: float
    gradient: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        return self.master + self.moments + self.gradient + self.gathered + self.activations


def stored(shape: Shape, tokens: float, width: int = HALF) -> float:
    """Bytes of what one layer keeps of `tokens` for its backward pass.

    By token: the stream before and after both blocks and what is normed of it (4 D), queries, keys and values before
    and after the rotation, what attention gives, and of each feed-forward block that runs gate, up, silu and product.
    """
    heads = shape.head_dim * (3 * shape.heads + 4 * shape.kv_heads)
    return width * tokens * (4 * shape.hidden + heads + 4 * max(1, shape.used) * shape.intermediate)


def activations(shape: Shape, tokens: float, checkpointed: bool, width: int = HALF) -> float:
    """Bytes kept for the backward pass of `tokens` on one GPU, logits included; checkpointed, a layer's input alone."""
    one, logits = stored(shape, tokens, width), 3 * 4 * min(LOGITS, tokens * shape.vocab)
    kept = one + shape.layers * width * tokens * shape.hidden if checkpointed else shape.layers * one
    return kept + logits


def training(shape: Shape, gpus: int, tokens: float, checkpointed: bool = True, plain: bool = False) -> Training:
    """Each GPU's share with `tokens` in its micro-batch; `plain` is float32 on one machine, as `trainer` runs on a CPU."""
    n = shape.parameters
    if plain:
        return Training(4 * n, MOMENTS * n, GRADIENT * n, 4 * n, activations(shape, tokens, checkpointed, 4))
    largest = max(shape.layer, shape.embedding)
    return Training(MASTER * n / gpus, MOMENTS * n / gpus, GRADIENT * n / gpus, (2 * HALF + HALF) * largest,
                    activations(shape, tokens, checkpointed))


def sharded_engine(shape: Shape, machine: Machine, gpus: int, share: float = 0.85) -> int | None:
    """The least number of GPUs (a power of two) that hold one copy of the sampler's weights; None where not even `gpus` do."""
    ways = 1
    while ways <= gpus:
        if HALF * shape.parameters / ways <= 0.7 * share * machine.memory:
            return ways
        ways *= 2
    return None


def rollouts_at_once(shape: Shape, machine: Machine, ways: int, tokens: float, share: float = 0.85) -> int:
    """Rollouts of `tokens` whose keys and values fit beside the weights on `ways` GPUs that hold one copy."""
    room = ways * share * machine.memory - HALF * shape.parameters
    return max(0, int(room / (tokens * shape.key_values())))


def scoring(shape: Shape, gpus: int, tokens: float) -> float:
    """Bytes on each GPU while a model gives log-probs: its share of the weights, two layers gathered, activations of one."""
    gathered = 2 * HALF * max(shape.layer, shape.embedding) if gpus > 1 else 0
    return HALF * shape.parameters / gpus + gathered + stored(shape, tokens) + 4 * min(LOGITS, tokens * shape.vocab)


def fits(shape: Shape, machine: Machine, gpus: int, tokens: float, checkpointed: bool = True, learns: bool = True) -> bool:
    """Whether training (or, where nothing learns, scoring) fits each GPU, the sampler's weights put aside (asleep)."""
    needed = training(shape, gpus, tokens, checkpointed).total if learns else scoring(shape, gpus, tokens)
    return needed <= (1 - SPARE) * machine.memory
