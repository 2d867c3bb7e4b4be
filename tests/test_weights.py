"""Weight shift (section 3.3): planted overlaps and cosines must come back, and nulls must explain what is chance."""
import json
import math
from contextlib import ExitStack
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from m2rl_core.domains import DOMAINS
from m2rl_core.merging.checkpoint import Checkpoint
from m2rl_core.merging.states import State
from m2rl_core.metrics import masks, weights
from m2rl_core.metrics.projection import Projection, hadamard

Q = "model.layers.0.self_attn.q_proj.weight"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_changed_is_the_papers_relative_test():
    # eta 1e-3: 1 -> 1.0005 is a relative 5e-4 (no), 1 -> 1.002 is 2e-3 (yes), 1e-8 -> 2e-8 is 0.5 (yes),
    # 0 -> 0 is not, 0 -> 1e-30 is. Catches an absolute test, and max() taken of one side only.
    a = torch.tensor([1.0, 1.0, 1e-8, 0.0, 0.0])
    b = torch.tensor([1.0005, 1.002, 2e-8, 0.0, 1e-30])
    assert masks.changed(a, b).tolist() == [False, True, True, False, True]
    assert torch.equal(masks.changed(a, b), masks.changed(b, a))


def test_on_bfloat16_the_test_is_bit_inequality():
    # every pair of neighbours among all positive finite bfloat16 numbers, and every number with itself
    numbers = torch.arange(0, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    assert masks.changed(numbers[1:], numbers[:-1]).all()
    assert masks.changed_bits(numbers[1:], numbers[:-1]).all()
    assert not masks.changed(numbers, numbers).any() and not masks.changed_bits(numbers, numbers).any()
    zeros = torch.tensor([0.0, -0.0], dtype=torch.bfloat16)
    assert not masks.changed(zeros, zeros.flip(0)).any() and not masks.changed_bits(zeros, zeros.flip(0)).any()
    with pytest.raises(ValueError, match="cast first"):
        masks.changed_bits(numbers.float(), numbers.float())


def test_jaccard_by_hand():
    a = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    b = torch.tensor([0, 1, 1, 1, 0, 0], dtype=torch.bool)
    assert masks.jaccard(a, b) == 2 / 4
    assert masks.jaccard_random(0.3, 0.3) == pytest.approx(0.09 / 0.51)  # 0.176: the paper prints 0.18
    # Two bins of three. Small |w|: pA = 2/3, pB = 3/3; large: pA = 1/3, pB = 0. both = 3 (2/3) + 0 = 2,
    # sum pA = 3, sum pB = 3 (in counts), so J0 = 2 / (6 - 2) = 0.5.
    w = torch.tensor([0.1, -0.2, 0.3, 10.0, -20.0, 30.0])
    a = torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.bool)
    b = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    assert masks.magnitude_bins(w, 2).tolist() == [0, 0, 0, 1, 1, 1]
    assert masks.jaccard_by_magnitude(a, b, w, 2) == pytest.approx(0.5)
    empty = torch.zeros(6, dtype=torch.bool)
    assert math.isnan(masks.jaccard(empty, empty)) and math.isnan(masks.jaccard_random(0, 0))
    assert math.isnan(masks.jaccard_by_magnitude(empty, empty, w))


def test_overlap_from_magnitude_alone_is_explained_by_the_conditioned_null():
    # World: a weight changes with a chance that falls with |w|, each model on its own. The overlap is far
    # above random masks and equal to J0. Catches a null that ignores |w|, or that sees the masks' overlap.
    w = normal(200_000)
    chance = torch.exp(-3 * w.abs())
    a, b = (torch.rand(w.shape, generator=torch.Generator().manual_seed(s)) < chance for s in (1, 2))
    found = masks.jaccard(a, b)
    random = masks.jaccard_random(float(a.float().mean()), float(b.float().mean()))
    assert found > random + 0.1
    assert found == pytest.approx(masks.jaccard_by_magnitude(a, b, w), abs=0.01)


def test_a_shared_footprint_stands_above_both_nulls():
    # World: half of either mask is common to both, whatever |w| is.
    n = 100_000
    common, own_a, own_b = (torch.rand(n, generator=torch.Generator().manual_seed(s)) < 0.15 for s in (1, 2, 3))
    a, b = common | own_a, common | own_b
    null = masks.jaccard_by_magnitude(a, b, normal(n))
    random = masks.jaccard_random(float(a.float().mean()), float(b.float().mean()))
    assert null == pytest.approx(random, abs=0.01) and masks.jaccard(a, b) > null + 0.2


def test_projection_rows_are_orthonormal():
    # P(I).T has the rows of the map; P P^T = I to float64 rounding. Catches a missing scale, a repeated row,
    # and Gaussian rows, which are orthogonal on average only.
    rows = Projection(512, 64, 7)(np.eye(512)).T  # (64, 512)
    assert np.allclose(rows @ rows.T, np.eye(64), atol=1e-12)
    assert np.allclose(abs(rows), 1 / math.sqrt(512)), "not rows of a Hadamard matrix"
    x = normal(512).double().numpy()
    whole = Projection(512, 512, 7)
    assert np.linalg.norm(whole(x)) == pytest.approx(np.linalg.norm(x), rel=1e-12) and whole.noise(0.3) == 0
    padded = Projection(300, 64, 7)
    assert padded.width == 320 and padded(x[:300]).shape == (64,)
    assert (padded.signs() == Projection(512, 64, 7).signs()[:300]).all(), "signs depend on the length"
    other, same, named = (Projection(512, 64, *key)(x) for key in ((8,), (7,), (7, "b")))
    assert np.array_equal(same, Projection(512, 64, 7)(x))
    assert not np.array_equal(other, same) and not np.array_equal(named, same), "the seed or the name does nothing"


def test_signs_are_fair_and_unrelated():
    # 2^18 signs: the mean, and the mean product with the next in the row, the next row and another tensor's, are
    # within 5 standard errors of 0. Catches bits used twice and a shift that goes wrong.
    signs = Projection(1 << 18, 256, 1, "x").signs()
    others = (np.ones(1), *(np.roll(signs, by) for by in (1, 256, 256 * 32)), Projection(1 << 18, 256, 1, "y").signs())
    assert set(signs) == {-1, 1} and all(abs((signs * other).mean()) < 5 / 512 for other in others)


@pytest.mark.parametrize("k", [0, 100, 1 << 15])
def test_a_projection_that_has_no_hadamard_matrix_is_refused(k):
    with pytest.raises(ValueError, match="analysis.random_projection is .* power of two"):
        Projection(512, k, 7)


def test_hadamard_by_hand():
    # H2 (a, b) = (a+b, a-b); H4 = H2 x H2: (1, 2, 3, 4) -> (10, -2, -4, 0)
    assert hadamard(np.array([1.0, 2.0, 3.0, 4.0])).tolist() == [10, -2, -4, 0]
    # a unit vector gives a row: sign (-1)^(bits that i and j share). Two rows at once.
    rows = hadamard(np.eye(256)[[3, 200]])
    assert rows.tolist() == [[(-1.0) ** (i & j).bit_count() for j in range(256)] for i in (3, 200)]


@pytest.mark.parametrize("n, k", [(4096, 128), (512, 128), (3000, 256)])
@pytest.mark.parametrize("rho", [0.0, 0.5, -0.8])
def test_planted_cosine_is_recovered_within_its_noise(rho, n, k):
    a = normal(n, seed=1).double().numpy()
    b = rho * a + math.sqrt(1 - rho**2) * normal(n, seed=2).double().numpy()
    exact = _cos(a, b)
    assert exact == pytest.approx(rho, abs=4 / math.sqrt(n))
    maps = [Projection(n, k, seed) for seed in range(400)]
    found = np.array([_cos(*p(np.stack((a, b)))) for p in maps])
    band = maps[0].noise(exact)
    # 400 draws: the mean is within 4 standard errors (and 1/k, the order that is left out), the spread within 15 %
    # (4 of its own standard errors). At n = 4 k a band of 1/sqrt(k) would be 15 % too wide.
    assert found.mean() == pytest.approx(exact, abs=4 * band / math.sqrt(400) + 1 / k)
    assert found.std() == pytest.approx(band, rel=0.15)
    assert maps[0].folded(a) @ maps[0].folded(b) == pytest.approx(maps[0](a) @ maps[0](b)), "H turns more than it may"


def _cos(a, b):
    return float(a @ b / math.sqrt(a @ a * (b @ b)))


def measured(base, models, **options):
    """(jaccard, cosine) as lists of rows of one matrix, weights as stored."""
    frames = weights.measure(State({Q: base}), {name: State({Q: x}) for name, x in models.items()}, **options)
    return tuple(frame[~frame["bf16"]].to_dict("records") for frame in frames)


def test_the_overlap_and_the_cosine_there():
    # Both change values 0..63 (a by +d, b by +d in 48 of them and -d in 16: cosine (48-16)/64 = 0.5); a alone
    # changes 64..127 and b alone 128..159. J = 64 / 160; outside the overlap nothing counts in the cosine.
    base = torch.ones(16, 32)
    a, b = torch.zeros(512), torch.zeros(512)
    a[:128], b[:48], b[48:64], b[128:160] = 0.5, 0.5, -0.5, 4.0
    (overlap,), (angle,) = measured(base, {"x": base + a.view(16, 32), "y": base + b.view(16, 32)}, k=512)
    assert (overlap["a"], overlap["b"]) == ("x", "y")
    assert overlap["jaccard"] == 64 / 160 and overlap["share_a"] == 128 / 512 and overlap["share_b"] == 96 / 512
    assert angle["n"] == 64 and angle["cosine"] == pytest.approx(0.5)
    assert angle["cosine_projected"] == pytest.approx(0.5) and angle["projection_sd"] == 0  # k = n: no loss


def edge_cases(dtype, n=50_000):
    """A base with zeros of both signs and tiny values, and five experts that leave about two thirds as they are."""
    base = 0.02 * normal(n)
    base[:40], base[20:30], base[40:60] = 0.0, -0.0, 1e-38
    models = {}
    for i, name in enumerate("abcde", 1):
        step = 0.001 * (normal(n, seed=i) + 0.5 * normal(n, seed=9))
        kept = torch.rand(n, generator=torch.Generator().manual_seed(i)) < 0.6
        models[name] = torch.where(kept, base, base + step).to(dtype)
        models[name][20 + i : 40] *= -1  # +0 for -0 and back
    return base.to(dtype), models


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("k", [16, 256, 512])
def test_the_stream_counts_what_the_definitions_say(dtype, k, monkeypatch):
    # The reference keeps whole tensors and float64. Stretches of 3072 weights cut the matrix everywhere; the last
    # row is not full. Catches a seam, a sign of zero that counts as a change, sums that lose digits.
    monkeypatch.setattr(weights, "LARGEST", 3072)
    base, models = edge_cases(dtype)
    frames = weights.measure(State({Q: base}), {m: State({Q: x}) for m, x in models.items()}, k=k, seed=3)
    for bf16, (overlap, angle) in zip((False, True), zip(*(f.groupby("bf16") for f in frames), strict=True), strict=True):
        w, experts = (base.float(), {m: x.float() for m, x in models.items()})
        if bf16:
            w, experts = w.bfloat16().float(), {m: x.bfloat16().float() for m, x in experts.items()}
        mask = {m: masks.changed(x, w) for m, x in experts.items()}
        projection = Projection(len(w), k, 3, Q)
        for (x, y), o, c in zip(combinations(models, 2), overlap[1].itertuples(), angle[1].itertuples(), strict=True):
            both = mask[x] & mask[y]
            a, b = (((experts[m] - w) * both).double().numpy() for m in (x, y))
            assert (o.a, o.b, o.bf16, c.n) == (x, y, bf16, int(both.sum()))
            assert o.jaccard == masks.jaccard(mask[x], mask[y]) and o.share_a == float(mask[x].double().mean())
            assert o.jaccard_null == pytest.approx(masks.jaccard_by_magnitude(mask[x], mask[y], w), rel=1e-12)
            assert o.jaccard_random == pytest.approx(masks.jaccard_random(o.share_a, o.share_b), rel=1e-12)
            assert c.cosine == pytest.approx(masks.cosine(torch.from_numpy(a), torch.from_numpy(b)), rel=1e-6)
            assert c.cosine_projected == pytest.approx(_cos(projection(a), projection(b)), abs=1e-6)
            assert c.projection_sd == projection.noise(c.cosine)


def test_threads_and_stretches_change_no_count_and_threads_no_bit(monkeypatch):
    base, models = edge_cases(torch.bfloat16, 200_000)
    state, experts = State({Q: base}), {m: State({Q: x}) for m, x in models.items()}
    one, two, again = (weights.measure(state, experts, threads=threads) for threads in (1, 2, 2))
    for a, b, c in zip(one, two, again, strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
        pd.testing.assert_frame_equal(b, c, check_exact=True)
    monkeypatch.setattr(weights, "LARGEST", 2048)
    cut = weights.measure(state, experts)
    pd.testing.assert_frame_equal(cut[0], one[0], check_exact=True)
    pd.testing.assert_frame_equal(cut[1], one[1], rtol=1e-6, atol=1e-6)


def test_stretches_cover_a_tensor_once_in_blocks_of_whole_rows():
    for size in (1, 1024, 5000, 33 * 1024, 3_000_001, 40 << 20):
        parts = weights.stretches("x", size, 256)
        assert sum(p.count for p in parts) == size and parts[-1].group == min(32, -(-size // 1024)) - 1
        assert all(p.first + p.count == q.first and p.group <= q.group for p, q in zip(parts, parts[1:], strict=False))
        assert all(p.first % 1024 == 0 and 0 < p.count <= weights.LARGEST + 1024 for p in parts)


def test_the_interval_of_a_cosine_is_that_of_blocks():
    # Two blocks, by hand: leaving one out leaves the other's cosine, 0.5 and 0.1; sd = sqrt(1/2 (0.2^2 + 0.2^2)) = 0.2.
    assert weights.jackknife(np.array([[1, 1, 0.5], [2, 2, 0.2]])) == pytest.approx(0.2)
    assert math.isnan(weights.jackknife(np.array([[1, 1, 0.5]])))
    # 32 blocks of independent weights: as the spread of the cosine over fresh draws, (1 - rho^2) / sqrt(n), within 4 of
    # its own relative standard errors 1/sqrt(62). Catches a factor of G.
    x = normal(3, 1 << 16).double()
    a, b = x[0] + x[2], x[1] + x[2]
    sums = torch.stack((a * a, b * b, a * b), -1).view(32, -1, 3).sum(1).numpy()
    assert weights.jackknife(sums) == pytest.approx((1 - 0.25) / 256, rel=0.5)


def test_bfloat16_rows_see_only_what_bfloat16_holds():
    # +0.002 passes the relative test in float32 and vanishes in bfloat16, whose step at 1 is 0.0078
    base = torch.ones(4, 4)
    models = {name: State({Q: base + 0.002}) for name in "xy"}
    overlap, angle = weights.measure(State({Q: base}), models)
    assert overlap["share_a"].tolist() == [1, 0] and overlap["jaccard"].fillna(-1).tolist() == [1, -1]
    assert angle["n"].tolist() == [16, 0] and angle["cosine"].fillna(-1).tolist() == [pytest.approx(1), -1]


def test_an_expert_that_changed_nothing_leaves_its_overlaps_undefined():
    base, models = edge_cases(torch.bfloat16)
    rows, cosines = measured(base, models | {"c": base.clone()})
    for overlap, angle in zip(rows, cosines, strict=True):
        numbers = [overlap["jaccard"], overlap["jaccard_random"], overlap["jaccard_null"], angle["cosine"],
                   angle["cosine_projected"], angle["cosine_sd"], angle["projection_sd"]]
        assert all(math.isnan(x) == ("c" in (overlap["a"], overlap["b"])) for x in numbers)


@pytest.mark.parametrize("change, said", [
    ({Q: torch.ones(8, 9)}, r"q_proj.weight: b has shape \[8, 9\] and sft has shape \[8, 8\]: compare experts"),
    ({Q.replace("q_proj", "k_proj"): torch.ones(8, 8)}, r"q_proj.weight: b has no such tensor and sft has shape|"
                                                       r"k_proj.weight: b has shape \[8, 8\] and sft has no such tensor"),
])
def test_models_that_do_not_fit_are_named_with_both_shapes(change, said):
    state = State({Q: torch.ones(8, 8)})
    with pytest.raises(ValueError, match=said):
        weights.measure(state, {"a": state, "b": State(change)})


def test_nan_is_named_with_its_model():
    base, models = edge_cases(torch.bfloat16)
    models["b"][777] = math.nan
    models["d"][777] = 1
    with pytest.raises(ValueError, match="b: .*q_proj.weight holds 1 NaN and 0 Inf of 50000 values: nothing to compare"):
        measured(base, models)


def test_files_are_mapped_by_stretches_and_one_cut_short_is_an_error(tmp_path):
    names = [f"model.layers.{i}.{path}.weight" for i in range(2) for path in weights.MATRICES.values()]
    states = [{name: (0.02 * normal(96, 64, seed=i) + 0.001 * normal(96, 64, seed=seed)).bfloat16()
               for i, name in enumerate(names)} for seed in range(3)]
    for i, state in enumerate(states):
        (tmp_path / str(i)).mkdir()
        save_file(state, tmp_path / str(i) / "model.safetensors")
    with ExitStack() as stack:
        base, *files = (stack.enter_context(Checkpoint(tmp_path / str(i))) for i in range(3))
        found = weights.measure(base, {"x": files[0], "y": files[1]})
        expected = weights.measure(*(lambda base, *others: (base, dict(zip("xy", others, strict=True))))(*map(State, states)))
        for one, other in zip(found, expected, strict=True):
            pd.testing.assert_frame_equal(one, other, check_exact=True)
        path = tmp_path / "1" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(ValueError, match="model.safetensors is cut short at model.layers"):
            weights.measure(base, {"x": files[0], "y": files[1]})


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
    stage = SimpleNamespace(settings={"eta": 1e-3, "etas": [1e-2, 0.5], "random_projection": 16, "layer": 1, "seed": 3})
    progress = SimpleNamespace(step=lambda done, total: steps.append((done, total)))
    weights.build(SimpleNamespace(stage=stage, inputs=inputs, out=tmp_path, progress=progress))
    overlaps, cosines = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("jaccard", "cosine"))
    assert len(overlaps) == len(cosines) == 2 * 7 * 10 * 2 and steps[-1] == (14, 14)
    assert list(overlaps.columns) == ["layer", "matrix", "a", "b", "bf16", "jaccard", "jaccard_random", "jaccard_null",
                                      "share_a", "share_b", "eta"]
    assert list(cosines.columns) == ["layer", "matrix", "a", "b", "bf16", "cosine", "cosine_sd", "cosine_projected",
                                     "projection_sd", "n"]
    for name, frame in (("jaccard", overlaps), ("cosine", cosines)):
        others = pd.read_parquet(tmp_path / f"{name}_etas.parquet")
        assert others["eta"].unique().tolist() == [1e-2, 0.5] and len(others) == 2 * len(frame)
        assert set(frame.columns) | {"eta"} == set(others.columns)
    shares = pd.read_parquet(tmp_path / "jaccard_etas.parquet").groupby("eta")["share_a"].mean()
    assert shares[0.5] < shares[1e-2] < overlaps["share_a"].mean()
    assert set(overlaps.a) | set(overlaps.b) == set(DOMAINS) and set(overlaps.matrix) == set(weights.MATRICES)
    assert json.loads(overlaps.layer.drop_duplicates().to_json(orient="values")) == [0, 1]
    with pytest.raises(ValueError, match="not a Qwen3 model"):
        weights.matrices({"transformer.h.0.weight": None})
