"""One side of the analysis bench, a process of its own: `analysis_side SIDE FOLDER` prints a line of JSON."""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from m2rl_core.bench import measure
from m2rl_core.merging.checkpoint import Checkpoint
from m2rl_core.merging.pool import cores
from m2rl_core.merging.states import State
from m2rl_core.merging.stored import count_of
from m2rl_core.metrics import masks, weights

TRY = "model.layers.0.self_attn.q_proj.weight"


def read(folder: Path) -> dict:
    """Reads every file once, one after the other, a megabyte at a time: larger buffers do not fit the cache."""
    files = sorted(folder.glob("*/*.safetensors"))
    return {"seconds": seconds(lambda: measure.warm(files))}


def ours(folder: Path) -> dict:
    """`weights.measure` as the notebook's stage calls it; what its parts cost alone comes after."""
    small = State({TRY: torch.ones(8, 256, dtype=torch.bfloat16)})
    weights.measure(small, {name: small for name in "abcde"})  # loads or compiles the kernel
    with ExitStack() as stack:
        base, *experts = (stack.enter_context(Checkpoint(path)) for path in sorted(folder.iterdir()))
        named = dict(zip("abcde", experts, strict=True))
        busy = time.process_time()
        whole = seconds(lambda: weights.measure(base, named))
        return {"seconds": whole, "profile": profile(base, named, time.process_time() - busy)}


def profile(base: Checkpoint, models: dict, busy: float) -> dict:
    """Shares of the processor time `busy`: of a part of one matrix, what reading it costs and what the kernel adds."""
    size = {name: count_of(base.meta[name]) for _, _, name in weights.matrices(base.meta)}
    parts = weights.stretches(TRY, size[TRY], 256)[:16]
    stream = weights.Stream(base, models)
    touched, looked = (min(seconds(lambda work=work: [work(part) for part in parts], time.process_time) for _ in range(3))
                       for work in (lambda part: touch(stream, part), stream._look))
    scale = sum(size.values()) / sum(part.count for part in parts) / busy
    return {"mapping and reading": round(touched * scale, 3), "counting and sums": round((looked - touched) * scale, 3),
            "the rest": round(1 - looked * scale, 3)}


def touch(stream: weights.Stream, part: weights.Stretch) -> int:
    """Adds up every word of a stretch: what reading it costs where it lies."""
    return sum(int(model.view(part.name, part.first, part.count).view(np.uint64).sum())
               for model in (stream.base, *stream.models.values()))


def torch_side(folder: Path) -> dict:
    """What one would write with PyTorch: all six tensors of a matrix in memory, the definitions of `masks`."""
    torch.set_num_threads(cores())

    def work() -> list:
        base, *experts = (Checkpoint(path) for path in sorted(folder.iterdir()))
        return [plain(base[name], [expert[name] for expert in experts]) for _, _, name in weights.matrices(base.meta)]
    return {"seconds": seconds(work)}


def plain(base: torch.Tensor, experts: list[torch.Tensor]) -> list[tuple]:
    """(overlap, random null, null given |w|, cosine on the overlap) of every pair of one matrix."""
    changed = [masks.changed(expert, base) for expert in experts]
    shifts = [(expert.float() - base.float()) for expert in experts]
    bins = torch.from_numpy(masks.magnitude_bins(base, masks.BINS))
    size = torch.bincount(bins, minlength=masks.BINS)
    inside = [torch.bincount(bins[mask.reshape(-1)], minlength=masks.BINS) for mask in changed]
    found = []
    for a, b in combinations(range(len(experts)), 2):
        both = changed[a] & changed[b]
        expected = (inside[a] * inside[b] / size.clamp(min=1)).sum()
        found.append((
            masks.jaccard(changed[a], changed[b]),
            masks.jaccard_random(float(changed[a].float().mean()), float(changed[b].float().mean())),
            float(expected / (inside[a].sum() + inside[b].sum() - expected)),
            float(torch.cosine_similarity((shifts[a] * both).reshape(-1), (shifts[b] * both).reshape(-1), dim=0))))
    return found


def seconds(work: Callable, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of wall time, or by another clock."""
    start = clock()
    work()
    return clock() - start


SIDES = {"read": read, "ours": ours, "torch": torch_side}

if __name__ == "__main__":
    print(json.dumps(SIDES[sys.argv[1]](Path(sys.argv[2]))))
