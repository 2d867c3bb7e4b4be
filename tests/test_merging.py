"""Merging: every method by hand, the invariants, exact thresholds, reproducible DARE, and what is refused."""
import hashlib
import json
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from m2rl_core.merging import build, cli, dare, driver, merge_state, pieces, reader, sce, threshold
from m2rl_core.merging import recipe as recipes
from m2rl_core.merging.checkpoint import Checkpoint
from m2rl_core.merging.folders import merge_folders
from m2rl_core.kernel import kernel
from m2rl_core.merging.states import StateMerger

METHODS = list(recipes.METHODS)


def shifts(a, b, method, base=(0.0,), **parameters):
    """Merged minus base of one tensor `w`, as a list; `base` is repeated to the length of `a`."""
    base = torch.tensor(base).repeat(len(a) // len(base))
    experts = {"a": {"w": base + torch.tensor(a)}, "b": {"w": base + torch.tensor(b)}}
    return (merge_state({"w": base}, experts, method, **parameters)["w"] - base).tolist()


def toy(seed=0, experts=3, changed=0.3, dtype=torch.float32):
    """A base and experts of three tensors (two of one shape); each expert changes a share of the weights."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"model.a.weight": (40, 50), "model.b.weight": (40, 50), "model.norm.weight": (50,)}
    base = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}

    def expert():
        return {name: (x.float() + (torch.rand(x.shape, generator=g) < changed) * 0.1
                       * torch.randn(x.shape, generator=g)).to(dtype) for name, x in base.items()}
    return base, {f"e{i}": expert() for i in range(experts)}


def close(a, b, **tolerance):
    return all(torch.allclose(a[name].float(), b[name].float(), **tolerance) for name in b) and a.keys() == b.keys()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


# By hand ------------------------------------------------------------------------------------------------


def test_average_by_hand():
    a, b = [4.0, -2.0, 0.0, 1.0], [2.0, 2.0, 0.0, -3.0]
    assert shifts(a, b, "average") == [3, 0, 0, -1]
    assert shifts(a, b, "average", weight=[1, 3]) == [2.5, 1, 0, -2]  # (4+6)/4, (-2+6)/4, 0, (1-9)/4
    # not normalised the base counts 1+1 times: 2 (base 8) + shifts - 8
    assert shifts(a, b, "average", base=(8.0,), normalize=False) == [14, 8, 8, 6]


def test_task_arithmetic_by_hand():
    a, b = [4.0, -2.0, 0.0, 1.0], [2.0, 2.0, 0.0, -3.0]
    assert shifts(a, b, "ta") == [6, 0, 0, -2]  # the sum, as in the paper: an average would give half
    assert shifts(a, b, "ta", scale=0.5, weight=[1, 3]) == [5, 2, 0, -4]
    assert shifts(a, b, "ta", normalize=True, weight=[1, 3]) == [2.5, 1, 0, -2]


def test_ties_by_hand():
    # |a| = 5 4 1 0 2, |b| = 3 6 2 0 1; density 0.4 of 5.
    # kept: k = floor(0.6 * 5) = 3; third smallest is 2 in both, and >= 2 keeps three: a = 5 -4 . . 2, b = -3 6 2 . .
    # votes 2 2 2 0 2, all +: means of what agrees: 5, 6, 2, 0, 2.
    a, b = [5.0, -4.0, 1.0, 0.0, 2.0], [-3.0, 6.0, 2.0, 0.0, -1.0]
    assert shifts(a, b, "ties", density=0.4) == [5, 6, 2, 0, 2]
    # exact: two survive: a = 5 -4 . . ., b = -3 6 . . .
    assert shifts(a, b, "ties", density=0.4, ties="exact") == [5, 6, 0, 0, 0]
    # two that agree are averaged, or added without normalize: 5 and 3 -> 4, or 8
    assert shifts([5.0], [3.0], "ties", density=1) == [4]
    assert shifts([5.0], [3.0], "ties", density=1, normalize=False, scale=0.5) == [4]
    # an expert that did not move does not count in the mean
    assert shifts([5.0], [0.0], "ties", density=1) == [5]


def test_ties_vote_weighted_or_not():
    # 4 against -2 with weights 1 and 3: unweighted +2, so +4 stays (4*1/1); weighted 4-6 = -2, so -2 stays (-6/3)
    assert shifts([4.0], [-2.0], "ties", density=1, weight=[1, 3]) == [4]
    assert shifts([4.0], [-2.0], "ties", density=1, weight=[1, 3], vote="weighted") == [-2]


def test_ties_zero_vote_takes_the_majority_over_all_tensors():
    # votes: p = 3-3 = 0; q = -2, 0-1 = -1: two minus signs win, so p keeps -3. The threshold aside, an algorithm
    # that looks at one tensor only would find no majority in p.
    base = {"p": torch.zeros(1), "q": torch.zeros(2)}
    experts = {"a": {"p": torch.tensor([3.0]), "q": torch.tensor([-1.0, -1.0])},
               "b": {"p": torch.tensor([-3.0]), "q": torch.tensor([-1.0, 0.0])}}
    merged = merge_state(base, experts, "ties", density=1)
    assert merged["p"].tolist() == [-3] and merged["q"].tolist() == [-1, -1]
    assert merge_state(base, experts, "ties", density=1, zero_sign="positive")["p"].tolist() == [3]
    # no majority at all: sign 0, nothing survives
    assert shifts([3.0], [-3.0], "ties", density=1) == [0]


def test_ties_threshold_global_or_tensor_kept_or_exact():
    # p = 10 9 8 7, q = 1 2 3 4, density 0.5. Global: N = 8, k = 4, fourth smallest 4, >= 4 keeps five.
    # Tensor: k = 2: second smallest 8 and 2, three stay each. Exact: four of eight, or two of four each.
    base = {"p": torch.zeros(4), "q": torch.zeros(4)}
    expert = {"a": {"p": torch.tensor([10.0, 9, 8, 7]), "q": torch.tensor([1.0, 2, 3, 4])}}

    def kept(**parameters):
        merged = merge_state(base, expert, "ties", density=0.5, **parameters)
        return [merged[name].tolist() for name in "pq"]
    assert kept() == [[10, 9, 8, 7], [0, 0, 0, 4]]
    assert kept(threshold="tensor") == [[10, 9, 8, 0], [0, 2, 3, 4]]
    assert kept(ties="exact") == [[10, 9, 8, 7], [0, 0, 0, 0]]
    assert kept(threshold="tensor", ties="exact") == [[10, 9, 0, 0], [0, 0, 3, 4]]
    # L1 after the trim: 19/34 of p is left, so all is scaled by 34/19
    scaled = kept(threshold="tensor", ties="exact", trim_rescale="l1")
    assert scaled[0] == pytest.approx([340 / 19, 306 / 19, 0, 0])


def test_exact_global_ties_take_the_first_equals_in_the_order_of_names():
    # four equal magnitudes over two tensors, floor(0.75 * 4) = 3 survive: both of p, the first of q
    base = {"p": torch.zeros(2), "q": torch.zeros(2)}
    expert = {"a": {"p": torch.tensor([2.0, -2.0]), "q": torch.tensor([2.0, 2.0])}}
    merged = merge_state(base, expert, "ties", density=0.75, ties="exact")
    assert merged["p"].tolist() == [2, -2] and merged["q"].tolist() == [2, 0]


def test_sce_by_hand():
    # mean squares: a (9+1)/2 = 5, b (1+1)/2 = 1: weights 5/6 and 1/6. Signs of 4 and 0: + and +.
    # First: (5/6*3 + 1/6*1) / 1 = 8/3. Second: only b agrees: 1.
    a, b = [3.0, -1.0], [1.0, 1.0]
    assert shifts(a, b, "sce") == pytest.approx([8 / 3, 1])
    assert shifts(a, b, "sce", uniform_below=100.0) == [2, 1]  # mergekit's fall-back: equal weights
    # select half: variances 1 and 1, the tie goes to the lower index. Weights from (3, .) and (1, .): 0.9, 0.1.
    assert shifts(a, b, "sce", select=0.5) == pytest.approx([2.8, 0])
    assert shifts(a, b, "sce", select=0.5, select_masks="weights") == pytest.approx([2.8, 1])
    assert shifts([0.0, 0.0], [0.0, 0.0], "sce") == [0, 0]
    # shifts of RLVR's size (1e-4): mergekit's limit makes weights of 1 and 16 equal, the paper's does not
    tiny = [1e-8, 16e-8]
    assert sce.expert_weights(tiny, 0.0) == pytest.approx([1 / 17, 16 / 17])
    assert sce.expert_weights(tiny, recipes.PRESETS["mergekit"]["sce"]["uniform_below"]) == [0.5, 0.5]


# Invariants ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["average", "ta", "ties", "sce"])
def test_one_expert_comes_back(method):
    base, experts = toy(experts=1)
    merged = merge_state(base, experts, method, **({"density": 1} if method == "ties" else {}))
    assert close(merged, experts["e0"], atol=1e-6)


@pytest.mark.parametrize("method", ["average", "ties", "sce"])
def test_equal_experts_give_that_expert(method):
    base, experts = toy(experts=1)
    same = {name: experts["e0"] for name in ("x", "y", "z")}
    merged = merge_state(base, same, method, **({"density": 1} if method == "ties" else {}))
    assert close(merged, experts["e0"], atol=1e-6)


@pytest.mark.parametrize("method", ["ta", "ties", "ta-dare", "ties-dare"])
def test_lambda_zero_is_the_base_and_lambda_scales(method):
    base, experts = toy()
    assert close(merge_state(base, experts, method, scale=0), base, atol=0)
    one, two = (merge_state(base, experts, method, scale=s) for s in (1.0, 2.0))
    assert close({n: two[n] - base[n] for n in base}, {n: 2 * (one[n] - base[n]) for n in base}, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_order_of_experts_does_not_matter(method):
    base, experts = toy()
    turned = dict(reversed(experts.items()))
    assert close(merge_state(base, experts, method), merge_state(base, turned, method), atol=1e-6)


@pytest.mark.parametrize("method", ["average", "ta", "ties", "sce"])
def test_shifts_twice_as_large_give_twice_the_merge(method):
    # from a zero base, so that only powers of two scale and the result is exact
    _, experts = toy()
    base = {name: torch.zeros_like(x) for name, x in experts["e0"].items()}
    twice = {e: {name: 2 * x for name, x in state.items()} for e, state in experts.items()}
    one, two = merge_state(base, experts, method), merge_state(base, twice, method)
    assert equal({name: 2 * x for name, x in one.items()}, two)


def test_lower_density_keeps_less_and_about_what_it_says():
    base, experts = toy(changed=1.0)
    merger = StateMerger(base, experts, [recipes.make("ties", density=d) for d in (0.05, 0.2, 0.8, 1.0)])
    assert len(list(merger)) == 3
    found = [d["density"]["e0"] for d in merger.diagnoses]
    # kept: the k-th itself survives, so at least the density and here (no ties) at most two weights more
    assert found == pytest.approx([0.05, 0.2, 0.8, 1.0], abs=2 / 4050) and found == sorted(found)


@pytest.mark.parametrize("method", ["ties", "ties-dare"])
@pytest.mark.parametrize("threshold", ["global", "tensor"])
@pytest.mark.parametrize("ties", ["kept", "exact"])
def test_density_counts_what_moves(method, threshold, ties):
    # with one expert the merge moves just what survives; half of these densities reach into what did not change
    base, experts = toy(experts=1, dtype=torch.bfloat16)
    plans = [recipes.make(method, density=d, threshold=threshold, ties=ties) for d in (0.001, 0.05, 0.2, 0.6, 0.9999)]
    merger = StateMerger(base, experts, plans)
    list(merger)
    for diagnosis in merger.diagnoses:
        assert diagnosis["density"]["e0"] == diagnosis["moved"] > 0


@pytest.mark.parametrize("types", [
    ["bfloat16"] * 4, ["float16"] * 4, ["float32"] * 4, ["float32", "bfloat16", "float16", "float32"],
    ["bfloat16", "bfloat16", "float32", "bfloat16"]], ids="-".join)
@pytest.mark.parametrize("method", METHODS)
def test_inputs_of_any_type_merge_as_their_values_do(method, types):
    # kernels take bfloat16 as it is stored and other types as shifts in float32: the same bits either way
    base, experts = toy()
    states = [{name: x.to(getattr(torch, kind)) for name, x in state.items()}
              for kind, state in zip(types, (base, *experts.values()), strict=True)]
    wide = [{name: x.float() for name, x in state.items()} for state in states]
    extra = {"sce": {"select": 0.5}, "ties": {"threshold": "tensor", "ties": "exact", "trim_rescale": "l1"}}
    for parameters in ({}, extra.get(method, {})):
        found, expected = (merge_state(first, dict(zip(experts, others, strict=True)), method, out_dtype="float32",
                                       **parameters) for first, *others in (states, wide))
        assert equal(found, expected)


# Exact thresholds ---------------------------------------------------------------------------------------


def samples():
    g = torch.Generator().manual_seed(1)
    random = torch.randn(5000, generator=g) * 1e-3
    return {"random": random, "tied": random.bfloat16().float().div(1e-3).round().mul(1e-3),
            "zero-heavy": random * (torch.rand(5000, generator=g) < 0.1),
            "wide": torch.randn(5000, generator=g) * torch.pow(10.0, torch.randint(-40, 30, (5000,), generator=g))}


def find(parts, search):
    """Runs a search over parts of a tensor until it is settled; returns (its cut, how many passes that took)."""
    for passes in range(1, 10):
        for i, part in enumerate(parts):
            search.add(("w", i), search.count(part.numpy(), part.numpy()))
        if search.settled():
            return search.cut, passes
    raise AssertionError("more than nine passes")


def survivors(parts, cut):
    kept = [threshold.keep_large(part.numpy(), cut.bits, cut.left("w", i)) for i, part in enumerate(parts)]
    return torch.from_numpy(np.concatenate(kept)) != 0


@pytest.mark.parametrize("kind", ["random", "tied", "zero-heavy", "wide"])
@pytest.mark.parametrize("guess", ["all", "some", "wrong", "none"])
def test_threshold_equals_kthvalue(kind, guess):
    # with a sample of everything, of a part, of values 1000 times too large, and without one
    x = samples()[kind]
    parts = [x[:1], x[1:3000], x[3000:]]  # counted in parts, as tensors of a model
    seen = {"all": x, "some": x[::50], "wrong": x[::50] * 1000}.get(guess)
    for rank in (1, 2, 777, 2500, 4000, 4999, 5000):
        kept, exact = (threshold.Search(5000, rank, quota) for quota in (False, True))
        for search in (kept, exact) if seen is not None else ():
            search.guess(seen.abs().numpy().copy(), guess == "all")
        cut, passes = find(parts, kept)
        assert passes <= (1 if guess == "all" else 4)
        value = x.abs().kthvalue(rank).values
        assert torch.tensor(cut.bits, dtype=torch.int32).view(torch.float32) == value
        assert torch.equal(survivors(parts, cut), (x.abs() >= value) & (x != 0))
        cut, passes = find(parts, exact)
        assert passes <= 5
        order = torch.sort(x.abs(), descending=True, stable=True).indices[: 5000 - rank + 1]
        first = torch.zeros(5000, dtype=torch.bool).index_fill_(0, order, True)
        assert torch.equal(survivors(parts, cut), first & (x != 0))


def test_rank_is_exact_where_floats_are_not():
    # (1 - 0.9) * 10 is 0.99999 in floats and would give rank 0, that is, no trim at all
    assert threshold.rank_of(10, 0.9, "kept") == 1
    assert threshold.rank_of(10, 0.3, "exact") == 8
    # exact is mergekit's: the product in floats (0.29 * 100 is 28.99...), and never none
    assert threshold.rank_of(100, 0.29, "exact") == 73 and threshold.rank_of(3, 0.2, "exact") == 3


# DARE ---------------------------------------------------------------------------------------------------


def splitmix(start, index):
    """The published SplitMix64, in plain integers."""
    z = (start + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_generator_is_splitmix64():
    assert [splitmix(1234567, i) for i in range(2)] == [6457827717110365317, 3203168211198807973]  # published values
    for start in (0, 1234567, 2**64 - 1):
        halves = [splitmix(start, i // 2) >> 32 * (i % 2) & 0x7FFFFFFF for i in range(500)]
        assert dare.keep_mask(start, 0, 500, 0.3).tolist() == [half / 2**31 >= 0.3 for half in halves]


def test_the_stream_is_the_same_read_in_parts():
    whole = dare.keep_mask(77, 0, 5000, 0.8)
    for size in (7, 1024, 1500):  # shorter and longer than the blocks that kernels work in, odd and even
        parts = [dare.keep_mask(77, first, size, 0.8) for first in range(0, 5000 - size, size)]
        assert np.array_equal(np.concatenate(parts), whole[: size * len(parts)])


def test_what_is_dropped_is_0_and_the_rest_is_scaled():
    x = np.random.default_rng(0).standard_normal(3001, np.float32)
    x[5:900:7] = 0
    out = np.empty_like(x)
    nonzero = dare.drop(x, x, 0.8, 5.0, 77, 64, out)
    keep = dare.keep_mask(77, 64, 3001, 0.8)
    assert np.array_equal(out, np.where(keep, x * np.float32(5), 0)) and nonzero == np.count_nonzero(out)
    assert nonzero in range(450, 650)


@pytest.mark.parametrize("method", METHODS)
def test_same_bits_for_any_number_of_threads_and_any_size_of_piece(method, monkeypatch):
    # select, L1 and exact ties too, so that every statistic takes part
    base, experts = toy(dtype=torch.bfloat16)
    extra = {"sce": {"select": 0.5}, "ties": {"threshold": "tensor", "ties": "exact", "trim_rescale": "l1"},
             "ties-dare": {"drop_rescale": "l1", "ties": "exact", "drop_rate": 0.5}, "ta-dare": {"drop_rescale": "l1"}}
    plans = [recipes.make(method), recipes.make(method, **extra.get(method, {}))]
    found = []
    for size, threads in ((1 << 16, 1), (256, 1), (256, 3), (64, 2)):
        for module in (pieces, driver, reader):
            monkeypatch.setattr(module, "PIECE", size, raising=False)
        found.append({name: merged for name, merged in StateMerger(base, experts, plans, threads=threads)})
    for other in found[1:]:
        assert all(torch.equal(a, b) for name in base for a, b in zip(found[0][name], other[name], strict=True))


def test_no_two_tensors_models_or_seeds_share_a_mask():
    masks = [dare.keep_mask(dare.start_of(*key), 0, 4000, 0.5)
             for key in ((0, "a", "w"), (0, "a", "v"), (0, "b", "w"), (1, "a", "w"), (0, "aw", ""))]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.45 < float((a == b).mean()) < 0.55  # independent: half agree, 6 standard errors


def test_merges_use_a_mask_of_its_own_for_each_tensor_and_expert():
    # the same shift of 1 everywhere: where the masks were one, p and q, or a and b, would survive together
    base = {"p": torch.zeros(4000), "q": torch.zeros(4000)}
    moved = {name: torch.ones(4000) for name in base}
    one = merge_state(base, {"a": moved}, "ta-dare", drop_rate=0.5)
    assert 0.45 < float(((one["p"] > 0) == (one["q"] > 0)).float().mean()) < 0.55
    both = merge_state(base, {"a": moved, "b": moved}, "ta-dare", drop_rate=0.5)["p"]  # 0, 2 or 4: 1/4, 1/2, 1/4
    assert [round(4 * float((both == value).float().mean())) for value in (0, 2, 4)] == [1, 2, 1]
    assert not equal(one, merge_state(base, {"a": moved}, "ta-dare", drop_rate=0.5, seed=1)), "the seed does nothing"


@pytest.mark.parametrize("rate", [0.2, 0.8])
def test_drop_share_and_mean(rate):
    n = 200_000
    out = np.empty(n, np.float32)
    dare.drop(np.ones(n, np.float32), np.ones(n, np.float32), rate, dare.inverse(rate), dare.start_of(0, "m", "t"), 0, out)
    error = (rate * (1 - rate) / n) ** 0.5
    assert float((out == 0).mean()) == pytest.approx(rate, abs=4 * error)
    assert float(out.mean()) == pytest.approx(1, abs=4 * error / (1 - rate))
    assert float(out.max()) == pytest.approx(1 / (1 - rate))
    # L1 keeps the sum of magnitudes of every tensor exactly
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    merged = merge_state({"w": torch.zeros(1000)}, {"a": {"w": x}}, "ta-dare", drop_rate=rate, drop_rescale="l1")
    l1 = merged["w"]
    assert float(l1.abs().sum()) == pytest.approx(float(x.abs().sum()), rel=1e-5)


def test_after_dare_at_0_8_the_trim_of_ties_keeps_everything():
    # 30 % changed and 80 % of it dropped leaves 94 % zeros: the 80 %-smallest is 0 and ">= 0" keeps all.
    # At the released code's 0.2, 76 % are zeros and the trim drops some of the rest.
    base, experts = toy(changed=0.3)
    for preset, trimmed in (("paper", False), ("released-code", True)):
        plans = [recipes.make("ties-dare", preset), recipes.make("ties-dare", preset, density=1)]
        merger = StateMerger(base, experts, plans)
        pairs = [(a, b) for _, (a, b) in merger]
        assert all(torch.equal(a, b) for a, b in pairs) != trimmed
        assert (merger.diagnoses[0]["density"] != merger.diagnoses[1]["density"]) == trimmed


# Folders ------------------------------------------------------------------------------------------------


def save(folder, state, shards=1):
    """A model folder, in one file or in shards with an index."""
    folder.mkdir(parents=True)
    names = sorted(state)
    parts = [{name: state[name] for name in names[i::shards]} for i in range(shards)]
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    files = ["model.safetensors"] if shards == 1 else files
    for file, part in zip(files, parts, strict=True):
        save_file(part, folder / file)
    if shards > 1:
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "dtype": "float32"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def models(tmp_path):
    base, experts = toy()
    return save(tmp_path / "sft", base), {name: save(tmp_path / name, state) for name, state in experts.items()}


def test_many_recipes_in_one_read_equal_separate_merges(models, tmp_path):
    base, experts = models
    plans = {tmp_path / f"{preset}-{method}": recipes.make(method, preset)
             for method in METHODS for preset in ("paper", "mergekit")}
    plans |= {tmp_path / f"ties-{d}-{t}": recipes.make("ties", density=d, ties=t)
              for d in (0.1, 0.3) for t in ("kept", "exact")}
    together = merge_folders(base, experts, plans)
    state = load_file(base / "model.safetensors")
    others = {name: load_file(folder / "model.safetensors") for name, folder in experts.items()}
    for out, plan in plans.items():
        alone = merge_state(state, others, plan.method, preset=plan.preset, **plan.parameters)
        assert equal(load_file(out / "model.safetensors"), alone), out.name
        assert json.loads((out / "merge.json").read_text()) == json.loads(json.dumps(together[out]))
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*.partial"))


def test_shards_in_and_out_change_nothing(models, tmp_path):
    base, experts = toy()
    sharded = save(tmp_path / "s" / "sft", base, shards=3)
    others = {name: save(tmp_path / "s" / name, state, shards=2) for name, state in experts.items()}
    merge_folders(*models, {tmp_path / "one": recipes.make("ties")})
    merge_folders(sharded, others, {tmp_path / "many": recipes.make("ties")}, shard_bytes=9000)
    assert len(list((tmp_path / "many").glob("model-*-of-00002.safetensors"))) == 2
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert equal(dict(Checkpoint(tmp_path / "many")), one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys() and index["metadata"]["total_size"] == 4 * 4050


def test_merge_json_and_sidecars(models, tmp_path):
    base, experts = models
    result = merge_folders(base, experts, {tmp_path / "out": recipes.make("average", out_dtype="bfloat16")})
    found = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert found == json.loads(json.dumps(result[tmp_path / "out"]))
    assert found["inputs"]["base"] == Checkpoint(base).digest() != found["inputs"]["e0"]
    assert found["output"] == Checkpoint(tmp_path / "out").digest()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert found["diagnosis"]["changed"]["e0"] == pytest.approx(0.3, abs=0.03)


def test_diagnosis_by_hand():
    # Changed by a: 3 of 4, by b: 2 of 4; both moved in places 0 and 1, signs differ in 1: conflict 1/2.
    # Average: +0.002, 0, +0.001, 0 on base 1. bfloat16 steps by 1/128 above 1: both moves are lost; all of the
    # change (0.003) is rounding error.
    base = {"w": torch.ones(4)}
    experts = {"a": {"w": torch.tensor([1.002, 1.002, 1.002, 1.0])},
               "b": {"w": torch.tensor([1.002, 0.998, 1.0, 1.0])}}
    merger = StateMerger(base, experts, [recipes.make("average", out_dtype="bfloat16"), recipes.make("sce")])
    list(merger)
    found = merger.diagnoses[0]
    assert found["changed"] == {"a": 0.75, "b": 0.5} and found["sign_conflict"] == 0.5
    assert found["lost"] == 1 and found["rounding"] == pytest.approx(1) and "undoes the merge" in found["warnings"][0]
    assert merger.diagnoses[1]["lost"] == 0 and merger.diagnoses[1]["warnings"] == []
    faint = StateMerger({"w": torch.zeros(4)}, {"a": {"w": torch.full((4,), 1e-5)}}, [recipes.make("sce")])
    list(faint)
    assert "mergekit's SCE" in faint.diagnoses[0]["warnings"][0]


def test_tied_merge_loads_in_transformers_and_generates(tmp_path):
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
                         dtype="float32")
    for seed, name in enumerate(("sft", "a", "b")):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(tmp_path / name)
    merge_folders(tmp_path / "sft", {name: tmp_path / name for name in "ab"}, {tmp_path / "out": recipes.make("ta")})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (1, 4)


@pytest.mark.parametrize("method", METHODS)
def test_build_makes_a_merge_stage_of_the_study(models, tmp_path, method):
    # the study gives SCE a density too; the paper's authors leave its select step out, so it must not act
    base, experts = models
    settings = {"method": method, "density": 0.4, "drop_rate": 0.5, "scale": 0.9, "seed": 7}
    (tmp_path / "out").mkdir()
    build(SimpleNamespace(stage=SimpleNamespace(settings=settings), inputs={"sft": base, **experts},
                          out=tmp_path / "out"))
    used = {name: value for name, value in settings.items() if name in recipes.PRESETS["paper"][method]}
    others = {name: load_file(folder / "model.safetensors") for name, folder in experts.items()}
    expected = merge_state(load_file(base / "model.safetensors"), others, method, seed=7, **used)
    assert equal(load_file(tmp_path / "out" / "model.safetensors"), expected)


# Recipes and refusals -----------------------------------------------------------------------------------


def run(tmp_path, capsys, config, *flags, out="out"):
    """Runs the command line on a recipe; returns (status, standard error)."""
    (tmp_path / "recipe.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    status = cli.main([str(tmp_path / "recipe.yaml"), str(tmp_path / out), *flags])
    return status, capsys.readouterr().err


def mergekit(tmp_path, method, own=None, **top):
    return {"merge_method": method, "base_model": str(tmp_path / "sft"), "dtype": "float32",
            "models": [{"model": str(tmp_path / f"e{i}"), "parameters": {"weight": 1.0, **(own or {})}}
                       for i in range(3)], **top}


@pytest.mark.parametrize("method, own, shared, parameters", [
    ("linear", {}, {}, {}),
    ("task_arithmetic", {}, {"lambda": 0.5}, {"scale": 0.5}),
    ("ties", {"density": 0.3}, {"normalize": False, "int8_mask": True, "rescale": True},
     {"density": 0.3, "normalize": False, "trim_rescale": "l1"}),
    ("dare_ties", {"density": 0.2}, {}, {"drop_rate": 0.8}),
    ("dare_linear", {"density": 0.7}, {"rescale": False}, {"drop_rate": 0.3, "drop_rescale": "none"}),
    ("sce", None, {"select_topk": 0.4}, {"select": 0.4}),
])
def test_a_mergekit_recipe_means_what_mergekit_means(models, tmp_path, capsys, method, own, shared, parameters):
    config = mergekit(tmp_path, method, own, parameters=shared)
    if own is None:
        config["models"] = [{"model": entry["model"]} for entry in config["models"]]
    assert run(tmp_path, capsys, config) == (0, "")
    state = load_file(tmp_path / "sft" / "model.safetensors")
    # DARE's stream is keyed by the model as the recipe writes it
    others = {str(folder): load_file(folder / "model.safetensors") for folder in models[1].values()}
    expected = merge_state(state, others, method, preset="mergekit", **parameters)
    assert equal(load_file(tmp_path / "out" / "model.safetensors"), expected)


def test_mergekit_ties_by_hand():
    # Per tensor, exactly floor(0.5*4) = 2 survive: a 4 -3 . ., b . 3 . 5 (|b| = 1 3 2 5). Weights 1 and 2:
    # votes 4, -3+6 = 3, 0, 10: all +, and mergekit's 0 counts as +. Means: 4/1, (2*3)/2, 0, (2*5)/2.
    found = shifts([4.0, -3.0, 1.0, 2.0], [1.0, 3.0, 2.0, 5.0], "ties", preset="mergekit", density=0.5, weight=[1, 2])
    assert found == [4, 3, 0, 5]


def test_preset_paper_in_yaml(models, tmp_path, capsys):
    config = mergekit(tmp_path, "ties", {"density": 0.3}, preset="paper")
    assert run(tmp_path, capsys, config)[0] == 0
    plan = json.loads((tmp_path / "out" / "merge.json").read_text())["recipe"]
    assert plan["parameters"]["threshold"] == "global" and plan["parameters"]["density"] == [0.3] * 3


@pytest.mark.parametrize("change, words", [
    ({"merge_method": "tise"}, "did you mean 'ties'"),
    ({"densty": 1}, "unknown key 'densty'"),
    ({"base_modle": "x"}, "did you mean 'base_model'"),
    ({"parameters": {"lamda": 1}}, "did you mean 'lambda'"),
    ({"parameters": {"normalize": 3}}, "normalize must be one of True, False"),
    ({"preset": "papers"}, "did you mean 'paper'"),
    ({"parameters": 3}, "must be a mapping"),
    ({"preset": ["paper"]}, "unknown preset"),
    ({"base_model": 4}, "must be a folder's name"),
    ({"slices": []}, "'slices' is mergekit's but not supported"),
    ({"out_dtype": "int8"}, "unknown out_dtype 'int8'"),
    ({"models": []}, "names no expert"),
    ({"models": [{"model": "x", "parameters": {}}]}, "x has no weight"),
    ({"models": [{"model": "x", "parameters": {"weight": [0, 1]}}]}, "weight by layer"),
    ({"models": [{"model": "x", "parameters": {"weight": 1, "density": 2}}]}, "density must be above 0"),
    ({"models": [{"model": "nowhere", "parameters": {"weight": 1}}]}, "nowhere is not a folder"),
    ({"base_model": None}, "needs base_model"),
])
def test_bad_recipes_are_refused_in_one_line(models, tmp_path, capsys, change, words):
    status, error = run(tmp_path, capsys, mergekit(tmp_path, "ties") | change)
    assert status == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_yaml_that_is_none(tmp_path, capsys):
    for text, words in (("merge_method: [", "not valid YAML"), ("just words", "not a mapping")):
        status, error = run(tmp_path, capsys, text)
        assert status == 2 and words in error and error.count("\n") == 1
    assert cli.main([str(tmp_path / "none.yaml"), str(tmp_path / "out")]) == 2


def spoil(tmp_path, name, change):
    """Rewrites the weights of one model through `change`."""
    path = tmp_path / name / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("model.norm.weight"), "e1 lacks model.norm.weight"),
    (lambda s: s.update(extra=torch.ones(2)), "e1 has extra, which the base lacks"),
    (lambda s: s.update({"model.norm.weight": torch.ones(51)}),
     "e1: model.norm.weight has shape (51,) and the base (50,)"),
    (lambda s: s["model.b.weight"][0].fill_(float("nan")), "e1: model.b.weight holds 50 NaN and 0 Inf of 2000"),
    (lambda s: s["model.b.weight"][0, :2].fill_(float("inf")), "e1: model.b.weight holds 0 NaN and 2 Inf of 2000"),
])
@pytest.mark.parametrize("method", ["ties", "linear"])
def test_inputs_that_do_not_fit_are_refused(models, tmp_path, capsys, change, words, method):
    spoil(tmp_path, "e1", change)
    status, error = run(tmp_path, capsys, mergekit(tmp_path, method))
    assert status == 2 and words in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e0", "e1", "e2", "recipe.yaml", "sft"]


def test_an_expert_identical_to_the_base(models, tmp_path, capsys):
    base = load_file(tmp_path / "sft" / "model.safetensors")
    spoil(tmp_path, "e2", lambda state: state.update(base))
    status, error = run(tmp_path, capsys, mergekit(tmp_path, "ties"))
    assert status == 2 and "e2 is identical to the base" in error and not (tmp_path / "out").exists()
    assert run(tmp_path, capsys, mergekit(tmp_path, "ties"), "--allow-identical")[0] == 0
    warnings = json.loads((tmp_path / "out" / "merge.json").read_text())["diagnosis"]["warnings"]
    assert any("e2 is identical" in warning for warning in warnings)


def test_files_that_are_broken_or_in_the_way(models, tmp_path, capsys):
    config = mergekit(tmp_path, "ties")
    (tmp_path / "out").mkdir()
    assert "out exists" in run(tmp_path, capsys, config)[1]
    path = tmp_path / "e1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    status, error = run(tmp_path, capsys, config, out="other")
    assert status == 2 and "e1/model.safetensors is corrupt or cut short" in error and error.count("\n") == 1
    path.unlink()
    assert "has no *.safetensors file" in run(tmp_path, capsys, config, out="other")[1]
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "e1" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "the index names model-00001-of-00002.safetensors" in run(tmp_path, capsys, config, out="other")[1]
    assert not (tmp_path / "other").exists()


def test_a_write_that_fails_half_way_leaves_nothing(models, tmp_path):
    # files of at most 8 kB: the output of 16 kB fails in the middle, as on a full disk
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(mergekit(tmp_path, "linear")))
    code = "import sys; from m2rl_core.merging import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "recipe.yaml"), str(tmp_path / "out")],
        capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)))
    assert done.returncode == 2 and done.stderr.startswith("merge: ") and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e0", "e1", "e2", "recipe.yaml", "sft"]


@pytest.mark.parametrize("call, words", [
    (dict(method="tise"), "did you mean 'ties'"),
    (dict(method="ties", densty=1), "did you mean 'density'"),
    (dict(method="ties", density=0), "density must be above 0"),
    (dict(method="ta-dare", drop_rate=1.0), "below 1"),
    (dict(method="ta", scale=float("nan")), "finite"),
    (dict(method="ties", ties="keep"), "ties must be one of kept, exact"),
    (dict(method="average", density=0.2), "unknown parameter of average"),
    (dict(method="average", weight=[1.0]), "weight has 1 values for 3 experts"),
    (dict(method="average", weight=[1.0, -2.0, 1.0]), "add up to 0"),
])
def test_bad_parameters_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        merge_state(*toy(), **call)
    with pytest.raises(ValueError, match="at least one"):
        merge_state(toy()[0], {}, "average")


def test_values_beyond_the_output_type_are_refused():
    base, experts = {"w": torch.tensor([1.0])}, {"a": {"w": torch.tensor([1e6])}}
    with pytest.raises(ValueError, match="1 Inf"):
        merge_state(base, experts, "average", out_dtype="float16")


def test_several_recipes_are_merged_in_one_read(models, tmp_path, capsys):
    for name in ("ties", "linear"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(mergekit(tmp_path, name)))
    both = [str(tmp_path / "ties.yaml"), str(tmp_path / "linear.yaml"), str(tmp_path / "out")]
    assert cli.main(both) == 0
    assert cli.main([both[0], str(tmp_path / "alone")]) == 0
    assert equal(load_file(tmp_path / "out" / "ties" / "model.safetensors"),
                 load_file(tmp_path / "alone" / "model.safetensors"))
    assert (tmp_path / "out" / "linear" / "merge.json").exists()
    # other bases cannot share a read, two files of one name cannot share a folder; nothing is left behind
    (tmp_path / "linear.yaml").write_text(yaml.safe_dump(mergekit(tmp_path, "linear", base_model=str(tmp_path / "e0"))))
    capsys.readouterr()
    assert cli.main([*both[:2], str(tmp_path / "new")]) == 2 and "merge them one at a time" in capsys.readouterr().err
    assert cli.main([both[0], both[0], str(tmp_path / "new")]) == 2 and not (tmp_path / "new").exists()


def test_linear_without_a_base_takes_the_first_model_as_an_expert(models, tmp_path, capsys):
    config = mergekit(tmp_path, "linear")
    del config["base_model"]
    assert run(tmp_path, capsys, config) == (0, "")
    states = [load_file(folder / "model.safetensors") for folder in models[1].values()]
    mean = {name: sum(state[name] for state in states) / 3 for name in states[0]}
    assert close(load_file(tmp_path / "out" / "model.safetensors"), mean, atol=1e-6)


def test_the_command_needs_no_torch(models, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(mergekit(tmp_path, "dare_ties", {"density": 0.5})))
    code = "import sys; sys.modules['torch'] = None\nfrom m2rl_core.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")],
                          capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "merge.json").exists(), done.stderr


def test_kept_kernels_are_made_anew_when_any_source_changes(tmp_path):
    # `two` takes `one` from another file; numba by itself would go on with the old one
    package = tmp_path / "m2rl_core" / "merging"
    package.mkdir(parents=True)
    shutil.copy(sys.modules[kernel.__module__].__file__, package / "kernel.py")
    (package / "two.py").write_text("from one import one\nfrom kernel import kernel\n\n\n"
                                    "@kernel\ndef two(x):\n    return one(x)\n\n\nprint(two(0), end='')\n")

    def run():
        return subprocess.run([sys.executable, "two.py"], cwd=package, capture_output=True, text=True, check=True).stdout

    found = []
    for number in (1, 1, 2):
        (package / "one.py").write_text(f"from kernel import kernel\n\n\n@kernel\ndef one(x):\n    return {number}\n")
        found.append(run())
    assert found == ["1", "1", "2"]
    assert list(package.glob("__pycache__/*.nbi"))


def test_kernels_work_where_none_can_be_kept_on_disk(monkeypatch):
    # an install that is read-only, for a user without a home: numba has no place to look at
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    assert kernel(lambda x: x + 1)(2) == 3


def test_sha256_of_the_files_on_request(models, tmp_path, capsys):
    assert run(tmp_path, capsys, mergekit(tmp_path, "linear"), "--sha256")[0] == 0
    found = json.loads((tmp_path / "out" / "merge.json").read_text())["sha256"]
    for name, folder in (("base", models[0]), ("output", tmp_path / "out")):
        expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert found[name] == {"model.safetensors": expected}


def test_digest_sees_any_change_and_no_layout(models, tmp_path):
    base, _ = toy()
    digest = Checkpoint(models[0]).digest()
    assert Checkpoint(save(tmp_path / "parts", base, shards=3)).digest() == digest
    for name, place in (("model.norm.weight", 49), ("model.a.weight", 0)):
        other = {key: x.clone() for key, x in base.items()}
        other[name].view(-1)[place] += 1
        assert Checkpoint(save(tmp_path / name / str(place), other)).digest() != digest
    swapped = base | {"model.a.weight": base["model.b.weight"], "model.b.weight": base["model.a.weight"]}
    assert Checkpoint(save(tmp_path / "swapped", swapped)).digest() != digest


def test_what_is_empty_or_no_float_is_the_bases(tmp_path):
    state = {"w": torch.ones(3), "steps": torch.tensor([1, 2]), "none": torch.empty(0, 4)}
    other = {**state, "w": torch.tensor([1.0, 2.0, 3.0]), "steps": torch.tensor([8, 9])}
    base, expert = save(tmp_path / "sft", state), save(tmp_path / "e", other)
    plan = recipes.make("ties", density=1, out_dtype="bfloat16")
    merge_folders(base, {"e": expert}, {tmp_path / "out": plan})
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["w"].tolist() == [1, 2, 3] and merged["steps"].tolist() == [1, 2]
    assert merged["none"].shape == (0, 4) and merged["none"].dtype == torch.bfloat16
    assert equal(merge_state(state, {"e": other}, "ties", density=1, out_dtype="bfloat16"), merged)
