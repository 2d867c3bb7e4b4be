"""The cost model against torch's own counts, real allocations, the paper's Table 2, and arithmetic by hand."""
import math

import pytest
import torch
import toy_policy
from torch.utils.flop_counter import FlopCounterMode

from m2rl_core import paper
from m2rl_core.models.attention import Causal
from m2rl_core.cost import lengths, memory, modelled, plan, shapes, speed, table2
from m2rl_core.cost.machines import Machine, machine, machines
from m2rl_core.errors import StudyError
from m2rl_core.models.qwen3 import head, hidden_states, prepare
from m2rl_core.engines.rollout import BATCH, places
from m2rl_core.specs import ModelSpec

SPEC = ModelSpec(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=64, vocab=400, context=384)


@pytest.fixture(scope="module")
def policy():
    return toy_policy.make(toy_policy.tokenizer(), spec=SPEC)


def test_parameters_of_the_published_models():
    """Catches a weight left out: the totals of the hub's files, to the last parameter."""
    found = {name: shape.parameters for name, shape in shapes.published().items()}
    assert found == {"Qwen3-0.6B": 596_049_920, "Qwen3-4B": 4_022_468_096, "Qwen3-30B-A3B": 30_532_122_624,
                     "Qwen3-235B-A22B": 235_093_634_560}
    assert 3.0e9 < shapes.published()["Qwen3-30B-A3B"].active < 3.4e9  # "A3B"
    assert 21e9 < shapes.published()["Qwen3-235B-A22B"].active < 23e9


def test_parameters_are_those_of_a_real_model(policy):
    assert shapes.of_spec(SPEC).parameters == sum(w.numel() for w in policy.weights.values())
    assert shapes.of_config(policy.config.to_dict()) == shapes.of_spec(SPEC)


@pytest.mark.parametrize("experts", [0, 4])
def test_operations_are_those_that_torch_counts(experts):
    """Catches a factor of two, attention left out, a router or a head counted wrongly: exact, forward and backward.

    transformers' own model with plain attention, which computes what is masked, too: every token sees all others.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    given = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 16, "intermediate_size": 48, "tie_word_embeddings": not experts, "max_position_embeddings": 64}
    moe = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
           "decoder_sparse_step": 1, "mlp_only_layers": []}
    config = Qwen3MoeConfig(**given, **moe) if experts else Qwen3Config(**given)
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    model = (Qwen3MoeForCausalLM if experts else Qwen3ForCausalLM)(config)
    shape, n = shapes.of_config(config.to_dict()), 10
    with FlopCounterMode(display=False) as counted:
        loss = model(torch.arange(n)[None], use_cache=False).logits.sum()
    assert counted.get_total_flops() == shape.forward(n, seen=n)
    with FlopCounterMode(display=False) as counted:
        loss.backward()
    assert counted.get_total_flops() == 2 * shape.forward(n, seen=n)
    assert shape.training(n, n) == 3 * shape.forward(n, n) and shape.training(n, n, recompute=True) == 4 * shape.forward(n, n)


def test_operations_of_our_own_forward_pass(policy):
    """Catches products that our own forward pass adds or spares; logits of two tokens only."""
    shape, n = shapes.of_spec(SPEC), 12
    with FlopCounterMode(display=False) as counted, torch.no_grad(), torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH):
        hidden = hidden_states(prepare(policy.weights, policy.shape), torch.arange(n), places(torch.tensor([n])),
                               Causal([n], "cpu"))
        torch.nn.functional.linear(hidden[-2:], head(policy.weights))
    assert counted.get_total_flops() == shape.forward(n, seen=n, logits=2)


def test_bytes_of_weights_and_of_adam_are_those_allocated(policy):
    """Catches a copy forgotten: float32 weights, gradients and both moments of a model after one real step."""
    toy = toy_policy.clone(policy)
    optimizer = torch.optim.AdamW(toy.requires_grad())
    for weight in toy.weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = memory.training(shapes.of_spec(SPEC), 1, 1, plain=True)
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert held.master == sum(w.untyped_storage().nbytes() for w in toy.weights.values())
    assert held.moments == sum(value.untyped_storage().nbytes() for value in moments)
    assert held.gradient == sum(w.grad.untyped_storage().nbytes() for w in toy.weights.values())


def test_bytes_of_activations_are_near_those_saved(policy):
    """Catches activations off by a factor: what autograd really saves of a forward pass, within a third."""
    toy, n = toy_policy.clone(policy), 200
    toy.requires_grad()
    seen: dict[int, int] = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    kept = []  # storages live as long as the graph, so no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), pack(t))[1], lambda t: t):
        model = prepare(toy.weights, toy.shape)
        weights = {t.untyped_storage().data_ptr() for layer in model.layers for t in layer} | {
            w.untyped_storage().data_ptr() for w in toy.weights.values()}
        hidden = hidden_states(model, torch.arange(n) % 400, places(torch.tensor([n])), Causal([n], "cpu"))
    assert hidden.requires_grad
    real = sum(size for place, size in seen.items() if place not in weights)
    shape = shapes.of_spec(SPEC)
    assert shape.layers * memory.stored(shape, n, 4) == pytest.approx(real, rel=1 / 3)


def test_bytes_of_keys_and_values(policy):
    attend = Causal([7], "cpu", keep=True)
    with torch.no_grad():
        hidden_states(prepare(policy.weights, policy.shape), torch.arange(7), places(torch.tensor([7])), attend)
    assert sum(t.numel() * 4 for pair in attend.kept for t in pair) == 7 * shapes.of_spec(SPEC).key_values(4)


def test_sharding_divides_the_state_and_not_the_activations():
    shape = shapes.published()["Qwen3-4B"]
    one, eight = (memory.training(shape, n, 16384) for n in (1, 8))
    assert one.master == 8 * eight.master and one.moments == 8 * eight.moments and one.activations == eight.activations
    assert memory.activations(shape, 16384, checkpointed=True) < memory.activations(shape, 16384, checkpointed=False) / 5
    assert speed.sharding(shape, machine("h100"), 8, 16384) == 2  # 16 bytes a parameter are 64 GB
    assert speed.sharding(shapes.published()["Qwen3-235B-A22B"], machine("h100"), 8, 16384) is None


def test_lengths_have_their_mean_and_end_at_the_longest():
    for mean in (50.0, 7000.0, 20000.0):
        spread = lengths.quantiles(mean, 32768)
        assert sum(spread) / len(spread) == pytest.approx(mean, rel=1e-3) and max(spread) <= 32768
    assert set(lengths.quantiles(96, 96)) == {96.0} and lengths.truncated(lengths.quantiles(96, 96), 96) == 1
    mixed = lengths.mixture({100.0: 0.25, 1000.0: 0.75}, 32768)
    assert sum(mixed) / len(mixed) == pytest.approx(775, rel=0.02) and list(mixed) == sorted(mixed)


def test_decoding_by_hand():
    """One token for a batch of two that see 100: the weights once, keys and values of both; or the operations."""
    shape = shapes.published()["Qwen3-4B"]
    slow = Machine("toy", flops=1e30, bandwidth=1e9, memory=1e12, link=1e9, network=1e9, node=8)
    by_bytes, by_operations = speed.decoding(shape, slow, 1, 2, 100, speed.Efficiency(1.0, 0.5))
    assert by_bytes == pytest.approx((2 * shape.active + 2 * 100 * 2 * 36 * 8 * 128 * 2) / 0.5e9)
    assert by_operations == pytest.approx(shape.forward(2, 100) / 1e30)
    experts = shapes.published()["Qwen3-30B-A3B"]
    assert speed.touched(experts, 1) == pytest.approx(experts.active)  # one token: eight of each layer's experts
    everything = experts.parameters - experts.embedding  # the input embedding is looked up, not multiplied
    assert speed.touched(experts, 4096) == pytest.approx(everything, rel=1e-3)


def test_a_step_waits_for_its_longest_answer():
    """Catches a mean that stands for the lengths: the same tokens in answers of different lengths take longer."""
    shape, gpu, share = shapes.published()["Qwen3-4B"], machine("h100"), speed.Efficiency(0.3, 0.5)
    even, uneven = (speed.Work(512, 500, spread, 32768, 16) for spread in ((8000.0,) * 64, lengths.quantiles(8000, 32768)))
    assert uneven.mean == pytest.approx(even.mean, rel=1e-3)
    assert speed.step(shape, gpu, 64, uneven, share).sample > 1.5 * speed.step(shape, gpu, 64, even, share).sample
    few, many = (speed.step(shape, gpu, n, uneven, share) for n in (8, 1024))
    assert few.seconds > many.seconds and "longest answer" in many.bound
    assert many.seconds > few.seconds * 8 / 1024 * 10  # it does not scale, and the model must say so


def test_traffic_bounds_what_is_sharded_over_a_slow_network():
    """Catches traffic that never counts."""
    slow = Machine("toy", 9.89e14, 3.35e12, 8e10, 1e9, 1e8, 8)
    work = speed.Work(2048, 500, (7000.0,) * 8, 32768, 16)
    found = speed.updating(shapes.published()["Qwen3-30B-A3B"], slow, 64, 16, work, speed.Efficiency(0.3, 0.5))
    assert found[1] == "traffic" and found[0] > 100
    quick = speed.updating(shapes.published()["Qwen3-4B"], machine("h100"), 64, 2, work, speed.Efficiency(0.3, 0.5))
    assert quick[1] == "operations"


def test_what_does_not_fit_says_why():
    large, work = shapes.published()["Qwen3-235B-A22B"], speed.Work(64, 500, (7000.0,), 32768)
    found = speed.step(large, machine("h100"), 8, work, speed.Efficiency(0.3, 0.5))
    assert math.isnan(found.seconds) and "72 of 80 GB" in found.why


def test_table2_is_fitted_and_checked():
    """Five rows fix the lengths; the two others are within a quarter, and nearer than with one length for all."""
    found, checked = table2.fit(), table2.check().set_index("row")
    assert list(checked.index) == list(paper.table(2).index) and list(checked["printed"]) == list(paper.table(2)["gpu_hours"])
    assert checked.query("use == 'fit'")["residual"].abs().max() < 0.1 and found.mean == pytest.approx(table2.MEAN, rel=0.01)
    assert list(checked.query("use == 'check'").index) == ["rl-multi", "mt-opd"]
    predicted = checked.query("use == 'check'")
    assert predicted["residual"].abs().max() < 25 and (predicted["residual"].abs() < predicted["naive residual"].abs()).all()
    assert table2.error() == pytest.approx(1 / (1 - predicted["residual"].abs().max() / 100), rel=1e-6)
    assert 0.05 < found.efficiency.train < 0.6 and 0.1 < found.efficiency.decode < 0.9  # shares that such systems report
    assert all(500 < length < table2.LONGEST for length in found.lengths.values())
    assert found.lengths["coding"] > found.lengths["math"] > found.lengths["science"]


def test_a_mixed_step_costs_more_than_the_mix_of_its_steps():
    """The sign of what Table 2 shows: a mixed step waits for its slowest domain."""
    found = table2.fit()
    alone = sum(share * table2.hours("rl-math", {found.lengths[d]: 1.0}, found.efficiency)
                for d, share in table2.mix().items())
    mixed = table2.hours("rl-math", {found.lengths[d]: share for d, share in table2.mix().items()}, found.efficiency)
    assert mixed > alone and sum(table2.mix().values()) == pytest.approx(1)


def test_an_unknown_machine_names_the_nearest():
    with pytest.raises(StudyError, match="GPU=h10O: unknown machine; did you mean 'h100'"):
        machine("h10O")
    assert machine("H200").bandwidth == machines()["h200"].bandwidth > machine("h100").bandwidth
    for one in machines().values():
        assert one.source and min(one.flops, one.bandwidth, one.memory, one.link, one.network) > 0


def test_groups_with_an_advantage():
    """Two rollouts agree with probability 3/4 where rates are Beta(1/2, 1/2); and larger groups agree less."""
    assert plan.mixed_share(2, 0.5) == pytest.approx(1 / 4) and plan.mixed_share(8, 0.5) == pytest.approx(0.607, abs=1e-3)
    assert plan.mixed_share(2) < plan.mixed_share(8) < plan.mixed_share(16) < 0.5
    assert plan.BATCH == BATCH


def test_scoring_needs_no_optimizer():
    """Catches a study without training that is told to have more GPUs, for gradients and moments that nobody holds."""
    shape, gpu, share = shapes.published()["Qwen3-4B"], machine("h100"), speed.Efficiency(0.3, 0.5)
    assert speed.sharding(shape, gpu, 1, 33268) is None and speed.sharding(shape, gpu, 1, 33268, learns=False) == 1
    scored = speed.Work(64, 500, (7000.0,), 32768, passes=3.0, learns=0.0)
    assert speed.step(shape, gpu, 1, scored, share).seconds > 0
    assert "training needs" in speed.step(shape, gpu, 1, speed.Work(64, 500, (7000.0,), 32768), share).why
    assert memory.scoring(shape, 1, 16384) < memory.training(shape, 1, 16384).total / 3


def test_too_few_gpus_are_one_line():
    large, share = shapes.published()["Qwen3-235B-A22B"], speed.Efficiency(0.3, 0.5)
    cluster = modelled.Cluster(large, machine("h100"), 8, share, {"math": 7000.0}, 32768)
    with pytest.raises(StudyError, match="GPUS=8 of h100 are too few: .*; name more of them"):
        cluster.call(plan.Call({"math": 64}, learns=1.0))
