"""Checkpoints of a model in parts, by torch's distributed checkpoint, which any number of ranks can read.

Each rank writes the parts that it has. A checkpoint of one whole model, as the trainer writes it, is read into parts
likewise, so a run may go on in another way than it began.
"""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from m2rl_core import ranks
from m2rl_core.models.policy import Policy, load_weights
from m2rl_core.ranks.sharded import Sharded

MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of a weight, beside its `step`


def write(policy: Policy, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Weights and Adam's moments, by torch's distributed checkpoint: each rank writes its own parts."""
    import torch.distributed.checkpoint as dcp
    ranks.together(lambda dist, world: dcp.save(_state(policy, optimizer), checkpoint_id=folder, process_group=world.control))


def is_parts(folder: Path) -> bool:
    """Whether a checkpoint was written by `write`."""
    return (folder / ".metadata").is_file()


def restore(policy: Policy, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Either kind of checkpoint, into a policy that lies on any number of ranks in whatever way."""
    if is_parts(folder):
        import torch.distributed.checkpoint as dcp
        there = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        _begin(policy, optimizer, [name for name in policy.weights if f"step/{name}" in there])
        dcp.load(_state(policy, optimizer), checkpoint_id=folder, process_group=ranks.control(), no_dist=not ranks.launched())
        return
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    if not isinstance(policy, Sharded):
        with torch.no_grad():
            for name, tensor in load_weights(folder).items():
                policy.weights[name].copy_(tensor)
        optimizer.load_state_dict(saved)
        return
    found = {f"weights/{name}": tensor for name, tensor in load_weights(folder).items()}
    names = sorted(policy.weights)
    found |= {f"{key}/{names[i]}": value for i, kept in saved["state"].items() for key, value in kept.items()}
    _begin(policy, optimizer, [names[i] for i in saved["state"]])
    for name, tensor in _state(policy, optimizer).items():
        tensor.copy_(_part(found[name], tensor))


def _state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by a name that does not depend on how it lies; they share the memory of the live ones."""
    state = {f"weights/{name}": weight.detach() for name, weight in policy.weights.items()}
    for name, weight in policy.weights.items():
        state |= {f"{key}/{name}": value for key, value in optimizer.state.get(weight, {}).items()}
    return state


def _begin(policy: Policy, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Give Adam moments of these weights, as its first step would, to be read into."""
    for name in names:
        weight = policy.weights[name]
        optimizer.state[weight] = {"step": torch.tensor(0.0), **{key: torch.zeros_like(weight.detach()) for key in MOMENTS}}


def _part(found: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that lies where `like` does."""
    if not hasattr(like, "placements"):
        return found
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(found.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
