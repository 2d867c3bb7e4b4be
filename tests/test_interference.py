"""Gradients of the domains of one batch: cosines by hand, in a planted world, and from a real batch."""
from __future__ import annotations

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import toy_policy

from m2rl_core.training.grpo import backward
from m2rl_core.training.losses import Loss, Totals
from m2rl_core.metrics.interference import WHOLE, Interference, cosines, group_of, measure
from m2rl_core.profile import load_profile

LOSS = Loss.of(load_profile("smoke").rl)


def one(frame, group, a, b):
    return frame.set_index(["group", "a", "b"]).loc[(group, a, b)]


def test_groups_by_hand():
    """Faults: layers counted into the wrong third; a norm of attention among the attention's matrices."""
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(4)]
    assert [group_of(name, 4).split(", ")[1] for name in names] == ["first third", "first third", "middle third", "last third"]
    assert group_of("model.layers.2.mlp.up_proj.weight", 3) == "MLP, last third"
    assert group_of("model.layers.0.self_attn.q_norm.weight", 3) == "norms, first third"
    assert group_of("model.layers.0.input_layernorm.weight", 3) == "norms, first third"
    assert group_of("model.embed_tokens.weight", 3) == "embedding" and group_of("model.norm.weight", 3) == "last norm"


def test_cosines_by_hand():
    """Faults: a mean of the tensors' cosines for the cosine of them all; a domain without gradient taken for agreement."""
    q, up = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
    found = cosines({
        "math": {q: torch.tensor([[3.0, 0.0]]), up: torch.tensor([0.0, 4.0])},
        "if": {q: torch.tensor([[1.0, 0.0]]), up: torch.tensor([0.0, -1.0])},
        "agent": {},
    }, layers=1)
    assert one(found, "attention, first third", "if", "math").cosine == pytest.approx(1)
    assert one(found, "MLP, first third", "if", "math").cosine == pytest.approx(-1)
    whole = one(found, WHOLE, "if", "math")
    assert whole.cosine == pytest.approx((3 - 4) / (5 * math.sqrt(2))) and whole.norm_b == pytest.approx(5)
    assert math.isnan(one(found, WHOLE, "agent", "math").cosine) and one(found, WHOLE, "agent", "math").norm_a == 0


def test_a_planted_angle_is_found():
    """Does the instrument work: two gradients of ten thousand weights at a known angle."""
    g = torch.Generator().manual_seed(3)
    u, v = torch.randn(10_000, generator=g), torch.randn(10_000, generator=g)
    v -= (u @ v) / (u @ u) * u
    u, v = u / u.norm(), v / v.norm()
    for angle in (0.0, 0.4, 1.2, math.pi / 2, 2.5):
        found = cosines({"a": {"model.norm.weight": u}, "b": {"model.norm.weight": 7 * (
            math.cos(angle) * u + math.sin(angle) * v)}}, layers=1)
        assert one(found, WHOLE, "a", "b").cosine == pytest.approx(math.cos(angle), abs=1e-5)


def test_parts_of_a_real_batch_add_up(policy, played):
    """Faults: a domain that sees another's gradient; a trace left for the update; a part divided by itself."""
    learner = toy_policy.clone(policy)
    learner.requires_grad()
    totals, seen = Totals.of(played, 24), {}

    def run(part):
        backward(learner, part, lambda part, logp, owner, tokens: torch.ones(len(tokens)), LOSS, totals)
        seen["+".join(sorted({r.row.domain for r in part}))] = toy_policy.gradients(learner)
    domains = sorted({r.row.domain for r in played})
    assert len(domains) > 2
    found = measure(learner, played, [*domains, "nobody"], run)
    assert all(w.grad is None for w in learner.weights.values())
    assert set(seen) == set(domains)
    run(played)
    whole = seen["+".join(domains)]
    assert toy_policy.furthest({n: sum(seen[d][n] for d in domains) for n in whole}, whole) < 1e-5
    a, b = domains[:2]
    flat = {d: torch.cat([seen[d][n].flatten() for n in sorted(whole)]).double() for d in domains}
    assert one(found, WHOLE, a, b).cosine == pytest.approx(float(torch.cosine_similarity(flat[a], flat[b], 0)), abs=1e-6)
    assert found[found["a"].eq("nobody") | found["b"].eq("nobody")]["cosine"].isna().all()


def test_it_looks_when_due_and_gathers(policy, played, tmp_path):
    """Faults: a look at every step, or at none; rows of a step lost or doubled; one domain compared with itself."""
    ctx = SimpleNamespace(state=tmp_path / "state", out=tmp_path / "out")
    ctx.out.mkdir()
    learner, calls = toy_policy.clone(policy), []
    domains = sorted({r.row.domain for r in played})

    def run(part):
        calls.append(step)
        learner.weights["model.norm.weight"].grad = torch.full((32,), float(len(calls)))
    looker, alone = Interference(ctx, 2, domains), Interference(ctx, 2, domains[:1])
    for step in range(5):
        looker.look(step, learner, played, run)
        alone.look(step, learner, played, run)
    looker.finish()
    assert calls == [step for step in (0, 2, 4) for _ in domains]
    found = pd.read_parquet(ctx.out / "interference.parquet")
    pairs = len(domains) * (len(domains) - 1) // 2
    assert found.groupby("step").size().to_dict() == dict.fromkeys((1, 3, 5), 2 * pairs)
    assert set(found["group"]) == {"last norm", WHOLE} and found["cosine"].tolist() == pytest.approx([1.0] * len(found))
