"""What lies on a rank: the whole model (`Replica`), or of every weight a part (`Sharded`, torch's FSDP2).

Our forward pass is a function of weights, and FSDP2 gathers a module's weights when the module is called. So `Sharded`
holds each layer's weights in a module that does no more than `qwen3.through`. `fully_shard` is called directly, with
what accelerate read from its config file: `Accelerator.prepare` would wrap model and optimizer for a mean over ranks
and for micro-batches of its own, where here every rank divides by the whole batch's totals and gradients are summed.
"""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m2rl_core import ranks
from m2rl_core.models.attention import Causal
from m2rl_core.errors import StudyError
from m2rl_core.models.policy import Policy
from m2rl_core.models.qwen3 import LAYER, Shape, Weights, head, joined, normalize, rope, through

BUCKET = 2**24  # numbers that are summed over the ranks at once
ROOT = {"model.embed_tokens.weight": "embed", "model.norm.weight": "norm", "lm_head.weight": "lm_head"}


@dataclass(frozen=True)
class Plan:
    """How a model lies on its ranks; float32 is what is trained and saved, `dtype` what is computed with."""

    shard: bool = False
    dtype: torch.dtype = torch.float32
    offload: bool = False  # parts, gradients and Adam's moments lie in the CPU's memory
    recompute: bool = False  # a layer's activations are computed again in the backward pass
    reshard: bool = True  # a layer's weights are let go between forward and backward pass

    @staticmethod
    def launched() -> Plan:
        """As the accelerate config of this launch says; StudyError for what it says and this trainer has not."""
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        types = {"no": torch.float32, "bf16": torch.bfloat16}
        if precision not in types:
            raise StudyError(f"accelerate's mixed_precision is {precision}; this trainer computes with bf16, or no other type")
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
            if precision != "no":
                raise StudyError("accelerate's mixed_precision is bf16 without FSDP; whole models are trained in float32: "
                                 "take one of params/accelerate/fsdp-*.yaml, or mixed_precision: 'no'")
            return Plan()
        from accelerate import FullyShardedDataParallelPlugin
        from torch.distributed.fsdp import CPUOffloadPolicy
        if os.environ.get("FSDP_VERSION") != "2":
            raise StudyError("accelerate's fsdp_version is not 2; see params/accelerate/fsdp-1node-8.yaml")
        plugin = FullyShardedDataParallelPlugin()
        return Plan(True, types[precision], isinstance(plugin.cpu_offload, CPUOffloadPolicy),
                    bool(plugin.activation_checkpointing), bool(plugin.reshard_after_forward))


def place(policy: Policy, plan: Plan | None = None) -> Policy:
    """The policy, to be trained by all ranks of this launch; the policy itself where there is one process."""
    if not ranks.launched():
        return policy
    plan = plan or Plan.launched()
    return Sharded(policy, plan) if plan.shard else Replica(policy)


def beside(policy: Policy) -> Policy:
    """A policy that is not trained (a teacher, a reference), whole, where this rank computes."""
    if not ranks.launched() or ranks.device().type == "cpu":
        return policy
    return Policy({n: w.to(ranks.device()) for n, w in policy.weights.items()}, policy.config, policy.tokenizer)


class Replica(Policy):
    """The whole model on every rank, float32; gradients are summed after the backward pass."""

    def __init__(self, policy: Policy):
        super().__init__({n: w.to(ranks.device()) for n, w in policy.weights.items()}, policy.config, policy.tokenizer)
        for name in sorted(self.weights):  # the same bits to begin with, and the same sums from then on
            ranks.together(lambda dist, world, name=name: dist.broadcast(self.weights[name], 0))

    def add_up(self) -> None:
        names = sorted(self.weights)
        has = torch.tensor([self.weights[name].grad is not None for name in names], dtype=torch.int)
        ranks.together(lambda dist, world: dist.all_reduce(has, dist.ReduceOp.MAX, group=world.control))
        pending: list[Tensor] = []
        for name, wanted in zip(names, has.tolist(), strict=True):
            weight = self.weights[name]
            if wanted:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                pending.append(weight.grad)
            if pending and (name == names[-1] or sum(g.numel() for g in pending) >= BUCKET):
                _sum(pending)
                pending = []


def _sum(tensors: list[Tensor]) -> None:
    """Sum over the ranks, in place, in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    ranks.together(lambda dist, world: dist.all_reduce(flat))
    for tensor, found in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(found.view_as(tensor))


class Block(nn.Module):
    """The weights of a layer, gathered when it is called."""

    def __init__(self, own: Weights, shape: Shape, recompute: bool):
        super().__init__()
        self.shape, self.recompute = shape, recompute
        for name in LAYER:
            self.register_parameter(name.replace(".", "_"), nn.Parameter(own[name]))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        if self.recompute:  # inside the module, so that its weights are gathered once for the backward pass
            return checkpoint(self._run, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False)
        return self._run(x, cos, sin, attend)

    def _run(self, x, cos, sin, attend):
        own = {name: getattr(self, name.replace(".", "_")) for name in LAYER}
        return through(joined(own, self.shape), self.shape, x, cos, sin, attend)


class Stack(nn.Module):
    """All layers, and the weights beside them, which stay gathered from the forward to the end of the backward pass."""

    def __init__(self, weights: Weights, shape: Shape, recompute: bool):
        super().__init__()
        self.shape = shape
        for name, own in ROOT.items():
            if name in weights:
                self.register_parameter(own, nn.Parameter(weights[name]))
        self.blocks = nn.ModuleList(
            Block({name: weights[f"model.layers.{i}.{name}.weight"] for name in LAYER}, shape, recompute)
            for i in range(shape.layers))

    def forward(self, tokens: Tensor, positions: Tensor, attend) -> Tensor:
        """As `qwen3.hidden_states`."""
        x = nn.functional.embedding(tokens, self.embed)
        cos, sin = rope(positions, self.shape, x.dtype)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, partial(attend, i))
        return normalize(x, self.shape.eps) * self.norm


class Parts(Mapping):
    """{name: weight} of a `Stack` as it is at the moment: the whole weight where it is gathered, else this rank's part."""

    def __init__(self, stack: Stack):
        self.at = {name: (stack, own) for name, own in ROOT.items() if hasattr(stack, own)}
        self.at |= {f"model.layers.{i}.{name}.weight": (block, name.replace(".", "_"))
                    for i, block in enumerate(stack.blocks) for name in LAYER}

    def __getitem__(self, name: str) -> Tensor:
        return getattr(*self.at[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.at)

    def __len__(self) -> int:
        return len(self.at)


class Sharded(Policy):
    """A part of every weight on each rank; a layer is whole while it works. Every rank makes the same passes."""

    def __init__(self, policy: Policy, plan: Plan):
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
        self.plan, place = plan, ranks.device()
        mesh = ranks.together(lambda dist, world: DeviceMesh(place.type, list(range(ranks.size()))))
        settings = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=plan.dtype, reduce_dtype=torch.float32),
                    "offload_policy": CPUOffloadPolicy(pin_memory=place.type == "cuda") if plan.offload else OffloadPolicy()}
        # FSDP takes the weights over from where they are; each rank read the same file
        self.stack = Stack({n: w.float() for n, w in policy.weights.items()}, policy.shape, plan.recompute)
        for block in self.stack.blocks:
            fully_shard(block, reshard_after_forward=plan.reshard, **settings)
        fully_shard(self.stack, reshard_after_forward=False, **settings)
        for module in (self.stack, *self.stack.blocks):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the whole batch's totals already
            module.set_force_sum_reduction_for_comms(True)
        super().__init__(Parts(self.stack), policy.config, policy.tokenizer)

    @property
    def device(self) -> torch.device:
        return ranks.device()

    def hidden(self, tokens, positions, attend):
        return self.stack(tokens, positions, attend)

    def each(self, batches, work, lanes=1):
        """Also an empty pass for each micro-batch that another rank has more: gathering takes all ranks."""
        most, found = max(ranks.gather(len(batches))), []
        for batch in batches:
            ranks.beat()
            found.append(work(self, batch))
        for _ in range(most - len(batches)):
            ranks.beat()
            nothing = torch.zeros(1, dtype=torch.long, device=self.device)
            hidden = self.hidden(nothing, nothing, Causal([1], self.device))
            (0.0 * (hidden.sum() + head(self.weights)[0, 0])).backward()
        return found

    def gradients(self) -> Weights:
        return {name: weight.grad.full_tensor() for name, weight in self.weights.items() if weight.grad is not None}

    @torch.no_grad()
    def whole(self, exact: bool = False) -> Policy:
        """Gathered weight by weight, of the type that is computed with; with `exact` float32, on the CPU of rank 0 alone."""
        self.stack.reshard()
        found = {}
        for name, weight in self.weights.items():
            part = weight.detach()
            whole = ranks.together(lambda dist, world, part=part: (part if exact else part.to(self.plan.dtype)).full_tensor())
            if ranks.first() or not exact:
                found[name] = whole.cpu() if exact else whole.to(self.device)
        return Policy(found, self.config, self.tokenizer)


def full(tensor: Tensor) -> Tensor:
    """A tensor that may lie in parts, whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
