"""How RLVR moves the weights (section 3.3, Table 5, Fig. 3): which ones change, and in which direction.

Beside the paper's figures stand two things that it lacks. A null for the overlap: a relative test fires
mostly where |w| is small, so two unrelated runs overlap more than random masks do; `jaccard_by_magnitude`
says how much. And the exact cosine, next to that of the 256 projected values with its noise.
"""
from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from m2rl_core.domains import DOMAINS
from m2rl_core.merging.checkpoint import Checkpoint

MATRICES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
            "down": "mlp.down_proj", "up": "mlp.up_proj", "gate": "mlp.gate_proj"}
ETA = 1e-3  # the paper's; section 3.3
BINS = 64  # quantile bins of |w| for the conditioned null


def changed(a: Tensor, b: Tensor, eta: float = ETA) -> Tensor:
    """|a - b| > eta max(|a|, |b|), the paper's test; bool, the inputs' shape. Computed in float32."""
    a, b = a.float(), b.float()
    return (a - b).abs() > eta * torch.maximum(a.abs(), b.abs())


def changed_bits(a: Tensor, b: Tensor) -> Tensor:
    """Whether two bfloat16 tensors differ at all: the same mask as `changed` for every eta below 2^-8.

    Neighbouring bfloat16 numbers differ by at least 2^-8 of the larger, so eta never decides; +0 and -0 are
    equal to both. ValueError for other types, where that is not so.
    """
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        raise ValueError(f"changed_bits compares bfloat16 tensors, not {a.dtype} and {b.dtype}: cast first")
    return a != b


def jaccard(a: Tensor, b: Tensor) -> float:
    """|a and b| / |a or b| of two bool masks; NaN where both are empty."""
    return _ratio(int((a & b).sum()), int((a | b).sum()))


def jaccard_random(share_a: float, share_b: float) -> float:
    """The overlap expected of independent masks with these shares: pA pB / (pA + pB - pA pB)."""
    return _ratio(share_a * share_b, share_a + share_b - share_a * share_b)


def jaccard_by_magnitude(a: Tensor, b: Tensor, weights: Tensor, bins: int = BINS) -> float:
    """The overlap expected of masks that are independent given |w|: sum pA pB / sum (pA + pB - pA pB).

    pA, pB are the masks' shares in about `bins` equally filled bins of |weights|; values that are equal to
    16 bits share a bin. All three tensors have one shape.
    """
    bins_of = magnitude_bins(weights, bins)
    size, in_a, in_b = (np.bincount(bins_of, weights=x, minlength=bins) for x in (None, _flat(a), _flat(b)))
    filled = size > 0
    both = in_a[filled] * in_b[filled] / size[filled]
    return _ratio(both.sum(), (in_a[filled] + in_b[filled] - both).sum())


def magnitude_bins(weights: Tensor, bins: int) -> np.ndarray:
    """The quantile bin of each |weight|: int (n,), 0 .. bins-1, by the upper 16 bits of its float32 pattern."""
    codes = weights.float().abs().reshape(-1).view(torch.int32) >> 16  # grows with the magnitude
    counts = torch.bincount(codes, minlength=1 << 15)
    middle = torch.cumsum(counts, 0) - counts / 2
    return (middle / codes.numel() * bins).long().clamp(max=bins - 1)[codes].numpy()


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of two tensors taken as vectors, in float64; NaN where one is zero."""
    a, b = a.double().reshape(-1), b.double().reshape(-1)
    return _ratio(float(a @ b), math.sqrt(float(a @ a) * float(b @ b)))


class Projection:
    """A random orthogonal map from n to k values: sign flips, a Hadamard transform, k of its rows.

    n is padded with zeros to a power of two; on the padded space the k rows are exactly orthonormal (a
    subsampled randomised Hadamard transform), at O(n log n) and without a k x n matrix.
    """

    def __init__(self, n: int, k: int, *seed: int):
        self.n, self.width = n, 1 << max(0, n - 1).bit_length()
        self.k = min(k, self.width)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
        self.signs = torch.from_numpy(rng.integers(0, 2, n) * 2.0 - 1.0)
        self.rows = torch.from_numpy(rng.permutation(self.width)[: self.k])

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., n) -> (..., k), float64."""
        padded = torch.zeros(*x.shape[:-1], self.width, dtype=torch.float64)
        padded[..., : self.n] = x.double() * self.signs
        return hadamard(padded)[..., self.rows] / math.sqrt(self.width)

    def noise(self, rho: float) -> float:
        """The standard deviation of a projected cosine whose true value is `rho`, over draws of the projection."""
        return (1 - rho**2) * math.sqrt((1 - self.k / self.width) / self.k)


def hadamard(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of the last axis, whose length is a power of two; not normalised."""
    shape, inner = x.shape, 1
    while inner < shape[-1]:  # H of the whole is a Kronecker product: up to six of its levels in one product
        size = min(64, shape[-1] // inner)
        block = torch.ones(1, 1, dtype=x.dtype)
        while len(block) < size:
            block = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=x.dtype), block)
        x = x.reshape(-1, size) @ block if inner == 1 else block @ x.reshape(-1, size, inner)
        inner *= size
    return x.reshape(shape)


def compare(
    base: Tensor, models: Mapping[str, Tensor], *, eta: float = ETA, bf16: bool = False, k: int = 256,
    seed: tuple[int, ...] = (0,),
) -> Iterator[tuple[dict, dict]]:
    """For every pair of models: a row of jaccard.parquet and one of cosine.parquet; one matrix each.

    A model's mask is what it changed of `base`; the cosine is that of the two shifts where both changed.
    With `bf16` all tensors are rounded to bfloat16 first.
    """
    base = (base.bfloat16() if bf16 else base).float()
    models = {name: (tensor.bfloat16() if bf16 else tensor).float() for name, tensor in models.items()}
    masks = {name: changed(tensor, base, eta) for name, tensor in models.items()}
    shifts = {name: (tensor - base).reshape(-1) for name, tensor in models.items()}
    shares = {name: float(mask.float().mean()) for name, mask in masks.items()}
    projection = Projection(base.numel(), k, *seed)
    for a, b in combinations(models, 2):
        both = (masks[a] & masks[b]).reshape(-1)
        exact = cosine(shifts[a] * both, shifts[b] * both)
        projected = projection(torch.stack((shifts[a] * both, shifts[b] * both)))
        pair = {"a": a, "b": b, "bf16": bf16}
        yield (
            pair | {"jaccard": jaccard(masks[a], masks[b]), "jaccard_random": jaccard_random(shares[a], shares[b]),
                    "jaccard_null": jaccard_by_magnitude(masks[a], masks[b], base),
                    "share_a": shares[a], "share_b": shares[b], "eta": eta},
            pair | {"cosine": exact, "cosine_projected": cosine(projected[0], projected[1]),
                    "projection_sd": projection.noise(exact), "n": int(both.sum())},
        )


def matrices(names: Mapping) -> list[tuple[int, str, str]]:
    """(layer, matrix, tensor name) of the seven matrices of every layer, in order; ValueError for none."""
    kinds = {f"{path}.weight": matrix for matrix, path in MATRICES.items()}
    found = []
    for name in names:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match and match[2] in kinds:
            found.append((int(match[1]), kinds[match[2]], name))
    if not found:
        raise ValueError("no tensor is named like model.layers.0.self_attn.q_proj.weight: not a Qwen3 model")
    return sorted(found, key=lambda entry: (entry[0], list(MATRICES).index(entry[1])))


def measure(
    base: Mapping[str, Tensor], models: Mapping[str, Mapping[str, Tensor]], *, eta: float = ETA, k: int = 256,
    seed: int = 0, report=None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(jaccard, cosine) over all layers, matrices and pairs, as stored and in bfloat16; streams matrices."""
    overlaps, cosines = [], []
    work = matrices(base)
    for done, (layer, matrix, name) in enumerate(work, 1):
        key = (seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))
        tensors = {model: state[name] for model, state in models.items()}
        for bf16 in (False, True):
            for overlap, angle in compare(base[name], tensors, eta=eta, bf16=bf16, k=k, seed=key):
                overlaps.append({"layer": layer, "matrix": matrix, **overlap})
                cosines.append({"layer": layer, "matrix": matrix, **angle})
        if report:
            report(done, len(work))
    return pd.DataFrame(overlaps), pd.DataFrame(cosines)


def build(ctx) -> None:
    """jaccard.parquet and cosine.parquet of the five experts against `sft`; `a` and `b` are domains."""
    settings = ctx.stage.settings
    models = {domain: Checkpoint(Path(ctx.inputs[f"rl-{domain}"])) for domain in DOMAINS}
    overlaps, cosines = measure(
        Checkpoint(Path(ctx.inputs["sft"])), models, eta=settings["eta"], k=settings["random_projection"],
        seed=settings["seed"], report=ctx.progress.step)
    overlaps.to_parquet(ctx.out / "jaccard.parquet", index=False)
    cosines.to_parquet(ctx.out / "cosine.parquet", index=False)


def _flat(mask: Tensor) -> np.ndarray:
    return mask.reshape(-1).numpy()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
