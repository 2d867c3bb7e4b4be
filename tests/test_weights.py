"""Weight shift (section 3.3): planted overlaps and cosines must come back, and nulls must explain what is chance."""
import json
import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from m2rl_core.domains import DOMAINS
from m2rl_core.metrics import weights


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_changed_is_the_papers_relative_test():
    # eta 1e-3: 1 -> 1.0005 is a relative 5e-4 (no), 1 -> 1.002 is 2e-3 (yes), 1e-8 -> 2e-8 is 0.5 (yes),
    # 0 -> 0 is not, 0 -> 1e-30 is. Catches an absolute test, and max() taken of one side only.
    a = torch.tensor([1.0, 1.0, 1e-8, 0.0, 0.0])
    b = torch.tensor([1.0005, 1.002, 2e-8, 0.0, 1e-30])
    assert weights.changed(a, b).tolist() == [False, True, True, False, True]
    assert torch.equal(weights.changed(a, b), weights.changed(b, a))


def test_on_bfloat16_the_test_is_bit_inequality():
    # every pair of neighbours among all positive finite bfloat16 numbers, and every number with itself
    numbers = torch.arange(0, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    assert weights.changed(numbers[1:], numbers[:-1]).all()
    assert weights.changed_bits(numbers[1:], numbers[:-1]).all()
    assert not weights.changed(numbers, numbers).any() and not weights.changed_bits(numbers, numbers).any()
    zeros = torch.tensor([0.0, -0.0], dtype=torch.bfloat16)
    assert not weights.changed(zeros, zeros.flip(0)).any() and not weights.changed_bits(zeros, zeros.flip(0)).any()
    with pytest.raises(ValueError, match="cast first"):
        weights.changed_bits(numbers.float(), numbers.float())


def test_jaccard_by_hand():
    a = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    b = torch.tensor([0, 1, 1, 1, 0, 0], dtype=torch.bool)
    assert weights.jaccard(a, b) == 2 / 4
    assert weights.jaccard_random(0.3, 0.3) == pytest.approx(0.09 / 0.51)  # 0.176: the paper prints 0.18
    # Two bins of three. Small |w|: pA = 2/3, pB = 3/3; large: pA = 1/3, pB = 0. both = 3 (2/3) + 0 = 2,
    # sum pA = 3, sum pB = 3 (in counts), so J0 = 2 / (6 - 2) = 0.5.
    w = torch.tensor([0.1, -0.2, 0.3, 10.0, -20.0, 30.0])
    a = torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.bool)
    b = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    assert weights.magnitude_bins(w, 2).tolist() == [0, 0, 0, 1, 1, 1]
    assert weights.jaccard_by_magnitude(a, b, w, 2) == pytest.approx(0.5)
    empty = torch.zeros(6, dtype=torch.bool)
    assert math.isnan(weights.jaccard(empty, empty)) and math.isnan(weights.jaccard_random(0, 0))
    assert math.isnan(weights.jaccard_by_magnitude(empty, empty, w))


def test_overlap_from_magnitude_alone_is_explained_by_the_conditioned_null():
    # World: a weight changes with a chance that falls with |w|, each model on its own. The overlap is far
    # above random masks and equal to J0. Catches a null that ignores |w|, or that sees the masks' overlap.
    w = normal(200_000)
    chance = torch.exp(-3 * w.abs())
    a, b = (torch.rand(w.shape, generator=torch.Generator().manual_seed(s)) < chance for s in (1, 2))
    found = weights.jaccard(a, b)
    random = weights.jaccard_random(float(a.float().mean()), float(b.float().mean()))
    assert found > random + 0.1
    assert found == pytest.approx(weights.jaccard_by_magnitude(a, b, w), abs=0.01)


def test_a_shared_footprint_stands_above_both_nulls():
    # World: half of either mask is common to both, whatever |w| is.
    n = 100_000
    common, own_a, own_b = (torch.rand(n, generator=torch.Generator().manual_seed(s)) < 0.15 for s in (1, 2, 3))
    a, b = common | own_a, common | own_b
    null = weights.jaccard_by_magnitude(a, b, normal(n))
    random = weights.jaccard_random(float(a.float().mean()), float(b.float().mean()))
    assert null == pytest.approx(random, abs=0.01) and weights.jaccard(a, b) > null + 0.2


def test_projection_rows_are_orthonormal():
    # R = P(I).T has rows of the map; R R^T = I to float64 rounding. Catches a missing scale, a repeated row,
    # and Gaussian rows, which are orthogonal on average only.
    rows = weights.Projection(512, 64, 7)(torch.eye(512)).T  # (64, 512)
    assert torch.allclose(rows @ rows.T, torch.eye(64, dtype=torch.float64), atol=1e-12)
    x = normal(512)
    whole = weights.Projection(512, 512, 7)
    assert float(whole(x).norm()) == pytest.approx(float(x.double().norm()), rel=1e-12) and whole.noise(0.3) == 0
    padded = weights.Projection(300, 64, 7)
    assert padded.width == 512 and padded(x[:300]).shape == (64,)
    other, same = (weights.Projection(512, 64, seed)(x) for seed in (8, 7))
    assert not torch.equal(other, same), "the seed does nothing"


def test_hadamard_by_hand():
    # H2 (a, b) = (a+b, a-b); H4 = H2 x H2: (1, 2, 3, 4) -> (10, -2, -4, 0)
    assert weights.hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [10, -2, -4, 0]
    # a unit vector gives a row: sign (-1)^(bits that i and j share); 256 needs two blocks. Two rows at once.
    rows = weights.hadamard(torch.eye(256)[[3, 200]])
    assert rows.tolist() == [[(-1.0) ** (i & j).bit_count() for j in range(256)] for i in (3, 200)]


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_planted_cosine_is_recovered_within_its_noise(rho):
    n, k = 4096, 128
    a = normal(n, seed=1).double()
    b = rho * a + math.sqrt(1 - rho**2) * normal(n, seed=2).double()
    exact = weights.cosine(a, b)
    assert exact == pytest.approx(rho, abs=4 / math.sqrt(n))
    maps = [weights.Projection(n, k, seed) for seed in range(200)]
    found = torch.tensor([weights.cosine(*p(torch.stack((a, b)))) for p in maps])
    band = maps[0].noise(exact)
    # 200 draws: the mean is within 4 standard errors, the spread within 20 % (4 of its own standard errors)
    assert float(found.mean()) == pytest.approx(exact, abs=4 * band / math.sqrt(200) + 1 / k)
    assert float(found.std()) == pytest.approx(band, rel=0.2)


def test_compare_reports_the_overlap_and_the_cosine_there():
    # Both change values 0..63 (a by +d, b by +d in 48 of them and -d in 16: cosine (48-16)/64 = 0.5); a alone
    # changes 64..127 and b alone 128..159. J = 64 / 160; outside the overlap nothing counts in the cosine.
    base = torch.ones(16, 32)
    a, b = torch.zeros(512), torch.zeros(512)
    a[:128], b[:48], b[48:64], b[128:160] = 0.5, 0.5, -0.5, 4.0
    (overlap, angle), = weights.compare(base, {"x": base + a.view(16, 32), "y": base + b.view(16, 32)}, k=512)
    assert (overlap["a"], overlap["b"]) == ("x", "y")
    assert overlap["jaccard"] == 64 / 160 and overlap["share_a"] == 128 / 512 and overlap["share_b"] == 96 / 512
    assert angle["n"] == 64 and angle["cosine"] == pytest.approx(0.5)
    assert angle["cosine_projected"] == pytest.approx(0.5) and angle["projection_sd"] == 0  # k = n: no loss


def test_bfloat16_rows_see_only_what_bfloat16_holds():
    # +0.002 passes the relative test in float32 and vanishes in bfloat16, whose step at 1 is 0.0078
    base = torch.ones(4, 4)
    moved = {"x": base + 0.002, "y": base + 0.002}
    (plain, _), = weights.compare(base, moved)
    (rounded, angle), = weights.compare(base, moved, bf16=True)
    assert plain["share_a"] == 1 and rounded["share_a"] == 0 and angle["n"] == 0 and math.isnan(angle["cosine"])


def test_build_writes_every_layer_matrix_and_pair(tmp_path):
    names = [f"model.layers.{i}.{path}.weight" for i in range(2) for path in weights.MATRICES.values()]
    state = {name: normal(8, 8, seed=i) for i, name in enumerate(names)} | {"model.norm.weight": torch.ones(8)}
    inputs = {}
    for seed, model in enumerate(("sft", *(f"rl-{d}" for d in DOMAINS))):
        inputs[model] = tmp_path / model
        inputs[model].mkdir()
        save_file({name: x + 0.1 * seed * normal(*x.shape, seed=seed) for name, x in state.items()},
                  inputs[model] / "model.safetensors")
    steps = []
    stage = SimpleNamespace(settings={"eta": 1e-3, "random_projection": 16, "layer": 1, "seed": 3})
    progress = SimpleNamespace(step=lambda done, total: steps.append((done, total)))
    weights.build(SimpleNamespace(stage=stage, inputs=inputs, out=tmp_path, progress=progress))
    overlaps, cosines = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("jaccard", "cosine"))
    assert len(overlaps) == len(cosines) == 2 * 7 * 10 * 2 and steps[-1] == (14, 14)
    assert list(overlaps.columns) == ["layer", "matrix", "a", "b", "bf16", "jaccard", "jaccard_random", "jaccard_null",
                                      "share_a", "share_b", "eta"]
    assert list(cosines.columns) == ["layer", "matrix", "a", "b", "bf16", "cosine", "cosine_projected",
                                     "projection_sd", "n"]
    assert set(overlaps.a) | set(overlaps.b) == set(DOMAINS) and set(overlaps.matrix) == set(weights.MATRICES)
    assert json.loads(overlaps.layer.drop_duplicates().to_json(orient="values")) == [0, 1]
    with pytest.raises(ValueError, match="not a Qwen3 model"):
        weights.matrices({"transformer.h.0.weight": None})
