"""Merging against others: real mergekit 0.1.5 bit for bit, and the papers' formulas written out in float64.

golden/mergekit.safetensors was made by mergekit itself (golden/make_mergekit.py; `make bench NB=merge` checks it
against the installed one). Left open by mergekit, and so not compared: which of equal magnitudes its unstable sort
keeps (ours: the lowest index); the last columns of tensors that are no multiple of 64 long, where torch adds five
rows up in another order; the stream of DARE.
"""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from m2rl_core.bench import measure
from m2rl_core.merging import cli, dare, merge_state
from m2rl_core.merging import recipe as recipes
from m2rl_core.merging.folders import merge_folders

SCRIPT = Path(__file__).parent / "golden" / "make_mergekit.py"
spec = importlib.util.spec_from_file_location("make_mergekit", SCRIPT)
mergekit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mergekit)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """merged(case): (base, experts, our merge), by the same recipe from the same files."""
    home = tmp_path_factory.mktemp("parity")
    made = {kind: mergekit.models(kind, home / kind) for kind in mergekit.SCALES}

    def merged(case):
        folders = made[mergekit.CASES[case][0]]
        # DARE draws by a model's name as it is written: not by where this run's files are
        base, experts, plan = cli.parse(mergekit.recipe(case, [Path(folder.name) for folder in folders]))
        at = folders[0].parent
        merge_folders(at / base, {name: at / folder for name, folder in experts.items()}, {home / case: plan},
                      allow_identical=True)
        states = [load_file(folder / "model.safetensors") for folder in folders]
        return states[0], states[1:], load_file(home / case / "model.safetensors")
    return merged


def golden(case):
    found = load_file(mergekit.GOLDEN)
    return {name: found[f"{case}/{name}"] for name in mergekit.KEPT}


def test_the_golden_file_is_of_the_version_that_is_pinned():
    with safe_open(mergekit.GOLDEN, "pt") as file:
        version = file.metadata()["mergekit"]
    assert f"mergekit=={version}" in (SCRIPT.parents[2] / "requirements-peers.txt").read_text()


@pytest.mark.parametrize("case", [case for case in mergekit.CASES if case != "sce" and not case.startswith("dare")])
def test_bit_for_bit_as_mergekit(ours, case):
    merged = ours(case)[2]
    for name, expected in golden(case).items():
        assert merged[name].dtype == expected.dtype
        assert torch.equal(merged[name].view(torch.uint8), expected.view(torch.uint8)), name


def test_sce_with_weights_that_are_no_whole_numbers(ours):
    # mergekit adds the squares in float32, in an order that depends on its threads; ours in float64
    merged = ours("sce")[2]
    for name, expected in golden("sce").items():
        assert torch.allclose(merged[name], expected, rtol=3e-7, atol=3e-8), name


def test_dare_has_the_statistics_of_mergekit(ours):
    # five experts, each dropped with chance 0.6: 0.6^5 of the weights stay; the mean shift is that without dropping
    base, experts, merged = ours("dare")
    n = sum(base[name].numel() for name in mergekit.KEPT)
    whole = {name: sum(w * (e[name] - base[name]) for w, e in zip(mergekit.WEIGHTS, experts, strict=True))
             for name in base}
    for found in (merged, golden("dare")):
        shift = {name: found[name] - base[name] for name in mergekit.KEPT}
        stay = sum(int((shift[name] == 0).sum()) for name in shift) / n
        assert stay == pytest.approx(0.6**5, abs=4 * (0.6**5 * (1 - 0.6**5) / n) ** 0.5)
        both = [(shift[name] * whole[name], whole[name] ** 2) for name in shift]
        slope = sum(float(a.sum()) for a, _ in both) / sum(float(b.sum()) for _, b in both)
        # standard error of the slope: the shares 1/p - 1 = 1.5 of the variance, over n weights of five experts
        assert slope == pytest.approx(1, abs=4 * (1.5 / n) ** 0.5)


def test_dare_ties_without_rescale_only_adds_what_survives(ours):
    # no shift can be beyond the sum of the shifts of one sign; whether one is 0 has the statistics of the masks
    base, experts, merged = ours("dare-ties")
    for found in (merged, golden("dare-ties")):
        for name in mergekit.KEPT:
            rows = torch.stack([w * (e[name] - base[name]) for w, e in zip(mergekit.WEIGHTS, experts, strict=True)])
            shift = found[name] - base[name]
            assert (shift <= rows.clamp_min(0).sum(0) + 1e-6).all() and (shift >= rows.clamp_max(0).sum(0) - 1e-6).all()
            assert 0 < int((shift == 0).sum()) < shift.numel() / 4


# The papers' formulas, in float64 ------------------------------------------------------------------------


def trimmed(delta, density):
    """TIES, step 1 as the authors of M2RL run it: the k-th smallest magnitude of the whole model and up; (E, N)."""
    k = int((1 - density) * delta.shape[1] + 1e-9)
    cut = delta.abs().kthvalue(k, dim=1, keepdim=True).values
    return torch.where(delta.abs() >= cut, delta, 0)


def ties(delta, density):
    kept = trimmed(delta, density)
    sign = torch.sign(kept.sum(0))
    sign[sign == 0] = torch.sign(sign.sum())
    agree = (torch.sign(kept) == sign) & (kept != 0)
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def sce(delta, sizes):
    """One tensor after the other, as their mean squares are the weights."""
    parts = []
    for d in delta.split(sizes, 1):
        weight = d.pow(2).mean(1, keepdim=True)
        weight = weight / weight.sum()
        agree = torch.sign(d) == torch.where(d.sum(0) >= 0, 1.0, -1.0)
        total = (weight * agree).sum(0)
        parts.append((weight * d * agree).sum(0) / torch.where(total > 0, total, 1.0))
    return torch.cat(parts)


@pytest.mark.parametrize("preset, rate", [("paper", 0.8), ("released-code", 0.2)])
@pytest.mark.parametrize("experts", [5, 11])  # eleven are more than a kernel takes at once
@pytest.mark.parametrize("method", recipes.METHODS)
def test_the_papers_formulas(method, experts, preset, rate):
    g = torch.Generator().manual_seed(3)
    shapes = {"a": (70, 50), "b": (1500,), "c": (3,)}
    names = [f"e{i}" for i in range(experts)]
    base = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    models = {e: {name: x + (torch.rand(x.shape, generator=g) < 0.6) * 0.1 * torch.randn(x.shape, generator=g)
                   for name, x in base.items()} for e in names}
    merged = merge_state(base, models, method, preset=preset, seed=4)
    sizes = [base[name].numel() for name in base]
    delta = torch.stack([torch.cat([(models[e][n] - base[n]).flatten() for n in base]) for e in names]).double()
    if method.endswith("dare"):
        keep = torch.stack([torch.cat([torch.from_numpy(dare.keep_mask(
            dare.start_of(4, e, n), 0, base[n].numel(), rate)) for n in base]) for e in names])
        delta = delta * keep / (1 - rate)
    formulas = {"average": lambda: delta.mean(0), "ta": lambda: delta.sum(0), "sce": lambda: sce(delta, sizes),
                "ties": lambda: ties(delta, 0.2)}
    expected = formulas[method.removesuffix("-dare")]()
    found = torch.cat([(merged[name] - base[name]).flatten() for name in base]).double()
    # 2e-7 of weights up to 4 is a rounding of base + shift; a value on the wrong side of a cut would be off by 1e-2
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


# Memory --------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_largest_tensor(tmp_path):
    """Six models with one tensor of 20 M weights: 480 MB in float32, 1.2 GB with the temporaries of a plain merge."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(4000, 5000, generator=g)
    for name in ("base", *(f"e{i}" for i in range(5))):
        (tmp_path / name).mkdir()
        moved = base if name == "base" else base + 0.02 * torch.randn(5000, generator=g)
        save_file({"w": moved.bfloat16()}, tmp_path / name / "model.safetensors")
    recipe = tmp_path / "ties.yaml"
    models = "".join(f"  - model: {tmp_path}/e{i}\n" for i in range(5))
    recipe.write_text(f"merge_method: ties-dare\npreset: paper\nbase_model: {tmp_path}/base\nmodels:\n{models}")
    command = [sys.executable, "-m", "m2rl_core", "merge", str(recipe), str(tmp_path / "out")]
    found = measure.run(command, tmp_path / "log.txt")
    assert found["anonymous_mb"] < 400, found
