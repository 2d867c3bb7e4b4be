"""Teachers kept as what differs from the SFT weights: every bit, whatever the number type, and the room they take."""
from __future__ import annotations

import dataclasses

import pytest
import torch
import toy_policy

from m2rl_core.errors import StudyError
from m2rl_core.models.policy import Policy
from m2rl_core.profile import load_profile
from m2rl_core.training import opd, teachers
from m2rl_core.training.losses import Loss, Totals
from m2rl_core.training.teachers import Flips, Teachers, difference

DOMAINS = ("math", "coding", "science", "if", "agent")


def bits(weights) -> dict[str, bytes]:
    return {name: w.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, w in weights.items()}


def moved(policy: Policy, seed: int, share: float, dtype=torch.bfloat16, size: float = 4e-3) -> Policy:
    """An expert: this share of its weights multiplied by 1 + size x noise, rounded to `dtype`."""
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, w in policy.weights.items():
        noise, chosen = torch.randn(w.shape, generator=rng), torch.rand(w.shape, generator=rng) < share
        weights[name] = torch.where(chosen, (w.float() * (1 + size * noise)).to(dtype), w)
    return Policy(weights, policy.config, policy.tokenizer)


def as_type(policy: Policy, dtype) -> Policy:
    return Policy({n: w.to(dtype) for n, w in policy.weights.items()}, policy.config, policy.tokenizer)


@pytest.mark.parametrize("form", ["nothing", "places", "mask", "everywhere"])
def test_each_form_is_its_own_inverse(form):
    """Faults: a packed mask read in another order, a last byte lost where eight does not divide, a wrong form chosen."""
    rng = torch.Generator().manual_seed(2)
    share = {"nothing": 0.0, "places": 0.01, "mask": 0.4, "everywhere": 0.99}[form]
    before = torch.randint(0, 256, (1003, 2), generator=rng, dtype=torch.uint8)[:, 1]  # strided, as bytes of weights are
    flipped = torch.randint(1, 256, (1003,), generator=rng, dtype=torch.uint8)
    found = flipped * (torch.rand(1003, generator=rng) < share)
    flips, after = Flips.of(found), before.clone()
    if form == "nothing":
        assert flips is None
        return
    assert {None: "everywhere", torch.uint8: "mask", torch.int32: "places"}[
        None if flips.where is None else flips.where.dtype] == form
    changed = int((found != 0).sum())
    assert flips.size == min(1003, changed + 4 * changed, changed + 126)
    room = torch.zeros(1003, 3, dtype=torch.uint8)
    room[:, 1] = before
    flips.flip(room[:, 1])
    assert torch.equal(room[:, 1], before ^ found) and not torch.equal(room[:, 1], after)
    flips.flip(room[:, 1])
    assert torch.equal(room[:, 1], before) and not room[:, ::2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("piece", [100, 1 << 22])
def test_every_teacher_is_the_expert_to_the_bit(policy, dtype, piece, monkeypatch):
    """Faults: a difference of values where bits are meant (rounding; -0 and 0, NaN), a teacher made from the one before
    and not from SFT, the last piece of a tensor left out."""
    monkeypatch.setattr(teachers, "PIECE", piece)
    sft = as_type(policy, dtype)
    experts = {domain: moved(sft, i, share, dtype) for i, (domain, share) in enumerate(
        zip(DOMAINS, (0.3, 1.0, 0.001, 0.0, 0.05), strict=True))}
    experts["math"].weights["model.norm.weight"][:3] = torch.tensor([-0.0, float("nan"), float("inf")], dtype=dtype)
    sft.weights["model.norm.weight"][0] = 0.0
    wanted, start = {d: bits(e.weights) for d, e in experts.items()}, bits(sft.weights)
    kept = Teachers(sft, experts.items())
    for domain in ("agent", "math", "math", "if", "coding", "science", "agent", "coding"):
        assert bits(kept[domain].weights) == wanted[domain], domain
    assert start == wanted["if"] | {"model.norm.weight": start["model.norm.weight"]}  # the one that is as SFT
    assert list(kept) == list(DOMAINS) and len(kept) == 5
    with pytest.raises(KeyError):
        kept["history"]
    assert bits(kept["coding"].weights) == wanted["coding"]  # a wrong name has changed nothing


def test_shared_tensors_are_left_alone_and_take_no_room(policy):
    """Faults: an unchanged tensor kept or written again; a tensor replaced by another, which others still hold."""
    sft = as_type(policy, torch.bfloat16)
    expert = Policy(dict(sft.weights), sft.config, sft.tokenizer)
    name = "model.layers.0.mlp.up_proj.weight"
    expert.weights[name] = sft.weights[name] * 1.01
    assert list(difference(sft.weights, expert.weights)) == [name]
    tensors = dict(sft.weights)
    versions = {n: w._version for n, w in tensors.items()}
    kept = Teachers(sft, [("math", expert), ("if", Policy(dict(sft.weights), sft.config, sft.tokenizer))])
    teacher = kept["math"]
    assert all(teacher.weights[n] is w for n, w in tensors.items())
    assert [n for n, w in tensors.items() if w._version != versions[n]] == [name]
    whole, room = kept.size()
    assert whole == sum(w.nbytes for w in tensors.values()) and 0 < room <= tensors[name].nbytes


def test_five_sparse_bfloat16_teachers_take_little_more_than_one():
    """Fault: five whole models. 30 % of the weights moved by about one step of bfloat16, as RLVR does (section 3.3)."""
    rng = torch.Generator().manual_seed(0)
    sft = Policy({"w": (torch.randn(1 << 20, generator=rng) / 30).bfloat16()}, None, None)
    experts = [moved(sft, seed, 0.6).weights for seed in range(5)]
    flips = [difference(sft.weights, expert) for expert in experts]
    assert all(0.25 < float((expert["w"] != sft.weights["w"]).float().mean()) < 0.45 for expert in experts)
    assert sum(map(teachers.room, flips)) < 1.3 * sft.weights["w"].nbytes
    wide = Policy({"w": sft.weights["w"].float()}, None, None)  # the same checkpoints, loaded as float32
    assert teachers.room(difference(wide.weights, {"w": moved(sft, 0, 0.6).weights["w"].float()})) == teachers.room(flips[0])


def test_where_every_float32_weight_moved_it_is_no_more_than_whole_copies(policy):
    """Fault: places or masks on top of bytes that nearly all differ."""
    experts = [(d, moved(policy, i, 1.0, torch.float32, 0.05)) for i, d in enumerate(DOMAINS)]
    whole, kept = Teachers(toy_policy.clone(policy), experts).size()
    assert kept <= 5 * whole


@pytest.mark.parametrize("form", ["sampled", "full"])
def test_the_update_is_that_of_whole_teachers(policy, played, form):
    """Fault: a teacher that is still another domain's when its rollouts are scored."""
    loss = Loss.of(load_profile("smoke").opd, loss="grpo")
    domains = sorted({r.row.domain for r in played})
    experts = {d: moved(policy, i, 1.0, torch.float32, 0.05) for i, d in enumerate(domains)}
    update = {"sampled": opd.backward_sampled, "full": opd.backward_full}[form]
    found = []
    for kept in (experts, Teachers(toy_policy.clone(policy), experts.items())):
        student = toy_policy.clone(policy)
        student.requires_grad()
        for _ in range(2):  # the second time begins with the last domain's teacher in place
            update(student, kept, played, loss, Totals.of(played, 24))
        found.append(bits(toy_policy.gradients(student)))
    assert len(domains) > 2 and found[0] == found[1]


def test_a_teacher_that_does_not_fit_is_named(policy, words):
    """Faults: another shape, tokenizer or rotary base found only as nonsense in the loss."""
    def refused(expert) -> str:
        with pytest.raises(StudyError) as caught:
            Teachers(toy_policy.clone(policy), [("math", policy), ("if", expert)])
        said = str(caught.value)
        assert said.startswith("the teacher of if does not fit the SFT model: ") and "\n" not in said
        return said
    wide = toy_policy.clone(policy)
    wide.weights["model.norm.weight"] = torch.ones(48)
    assert "model.norm.weight is float32 (48,), not float32 (32,)" in refused(wide)
    assert "bfloat16" in refused(as_type(policy, torch.bfloat16))
    short = toy_policy.clone(policy)
    del short.weights["model.norm.weight"]
    assert "model.norm.weight is missing" in refused(short)
    other = toy_policy.clone(policy)
    other.config = type(policy.config)(**{**policy.config.to_dict(), "rms_norm_eps": 1e-3})
    assert "eps=0.001" in refused(other)

    class Words:
        def get_vocab(self):
            return words.get_vocab() | {"<think>": 9}
    assert "its tokenizer gives '<think>' the id 9, not" in refused(dataclasses.replace(policy, tokenizer=Words()))
