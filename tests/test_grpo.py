"""GRPO by hand: advantages, the clipped loss, the mismatch correction; and its gradient against plain autograd."""
from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import toy_policy

from m2rl_core.training import grpo
from m2rl_core.training.collect import collect, summary
from m2rl_core.domains import Verdict
from m2rl_core.training.grpo import backward
from m2rl_core.training.losses import (
    Loss, Totals, advantages, importance_weights, kl_estimate, policy_loss, reduced, sequence_mean)
from m2rl_core.profile import load_profile
from m2rl_core.engines.rollout import Rollout, micro_batches

NEAR = 1e-5  # on gradients whose largest entries are of size 0.1 to 1
LOSS = Loss.of(load_profile("smoke").rl)
LONGEST = 24  # tokens that a rollout of `played` might have had


@pytest.fixture
def learner(policy):
    """A copy with weights to train."""
    learner = toy_policy.clone(policy)
    learner.requires_grad()
    return learner


@pytest.fixture(scope="module")
def advantage(played):
    """A different number for each rollout of `played`, of both signs."""
    return [0.7 * math.sin(3 * i + 1) for i in range(len(played))]


def run(learner, rollouts, advantage, loss=LOSS, batch=None, reference=None):
    """Gradient and statistics of one backward pass with one advantage a rollout; `batch`: where `rollouts` are from."""
    of = {id(r): a for r, a in zip(rollouts, advantage, strict=True)}
    for w in learner.weights.values():
        w.grad = None
    def each(part, logp, owner, tokens):
        return torch.tensor([of[id(r)] for r in part])[owner]
    stats = backward(learner, rollouts, each, loss, Totals.of(batch or rollouts, LONGEST), reference)
    return toy_policy.gradients(learner), stats


# ---- advantages

def test_advantages_by_hand():
    """Faults: the std over n instead of n - 1; a mean over the batch instead of the group."""
    found = advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [5, 4, 3, 4]]))
    # [1,0,0,0]: mean 1/4, squared distances 9/16 + 3/16 = 3/4, over 3 is 1/4, std 1/2: (3/4, -1/4, ...) / (1/2)
    s = math.sqrt(1 / 3)
    third = math.sqrt(2 / 3)
    wanted = torch.tensor([[1.5, -0.5, -0.5, -0.5], [0.5 / s, 0.5 / s, -0.5 / s, -0.5 / s],
                           [1 / third, 0, -1 / third, 0]])
    assert torch.allclose(found, wanted, atol=1e-5)
    assert float(found.sum(dim=1).abs().max()) < 1e-5


@pytest.mark.parametrize("score", [0.0, 1.0, 1 / 3, 0.1, 2 / 3, 0.7])
@pytest.mark.parametrize("group", [2, 3, 7, 8, 16])
def test_equal_scores_give_exactly_nothing(score, group):
    """Fault: the rounding of a mean divided by a tiny std, which makes advantages of any size out of nothing."""
    scores = torch.full((2, group), score)
    scores[1, 0] += 0.25
    found = advantages(scores)
    assert torch.equal(found[0], torch.zeros(group))
    assert (found[1] != 0).all()


def test_a_group_of_one_is_refused():
    """Fault: the standard deviation of a single score, which is not a number."""
    with pytest.raises(ValueError, match="^advantages: groups of 1, but at least 2 scores are needed to compare$"):
        advantages(torch.tensor([[1.0], [0.5]]))


# ---- the loss of a token

@pytest.mark.parametrize(("rho", "a", "loss", "slope"), [
    (1.0, 2.0, -2.0, -2.0),  # on policy: plain policy gradient, -A
    (1.0, -2.0, 2.0, 2.0),
    (1.5, 2.0, -1.28 * 2, 0.0),  # good and already likelier: held at 1 + 0.28
    (1.5, -2.0, 3.0, 3.0),  # bad and likelier: pushed back in full
    (0.5, 2.0, -1.0, -1.0),  # good and less likely: pushed up in full
    (0.5, -2.0, 1.6, 0.0),  # bad and already less likely: held at 1 - 0.2
])
def test_clipping_by_hand(rho, a, loss, slope):
    """Faults: the bounds exchanged, the maximum taken for the minimum, half the gradient lost where both are equal."""
    logp = torch.tensor([math.log(rho)], requires_grad=True)
    found = policy_loss(logp, torch.zeros(1), torch.tensor([a]), 0.2, 0.28)
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(loss, abs=1e-6)
    assert float(logp.grad) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(("kind", "weights", "counted"), [
    ("none", [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]),
    ("tis", [0.1, 0.5, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1]),
    ("mis", [0.1, 0.5, 1, 2, 2.1, 9], [0, 1, 1, 1, 0, 0]),
])
def test_importance_weights_by_hand(kind, weights, counted):
    """Faults: masked and truncated exchanged, a bound that does not belong to its interval, the ratio upside down."""
    ratio = torch.tensor([0.1, 0.5, 1.0, 2.0, 2.1, 9.0])
    trainer = torch.tensor([-1.0, -2, -3, -1, -2, -3], requires_grad=True)
    # the ratio pi_trainer / pi_sampler; bounds a hair outside, as log and exp round
    loss = dataclasses.replace(LOSS, is_correction=kind, is_low=0.5 - 1e-6, is_high=2.0 + 1e-6)
    found, kept = importance_weights(trainer, trainer.detach() - ratio.log(), torch.arange(6), loss)
    assert torch.allclose(found, torch.tensor(weights, dtype=torch.float), atol=1e-5)
    assert kept.tolist() == [bool(c) for c in counted]
    assert not found.requires_grad


def test_an_unknown_correction_is_refused():
    """Fault: a misspelt correction that does nothing."""
    with pytest.raises(ValueError, match="is_correction 'mask': one of none, tis, mis"):
        importance_weights(torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long),
                           dataclasses.replace(LOSS, is_correction="mask"))


def test_mean_of_means_by_hand():
    """Faults: a mean over all tokens, by which long answers weigh more; a masked token that stays in the divisor."""
    values, owner = torch.tensor([6.0, 1, 2, 3, 5, 7]), torch.tensor([0, 1, 1, 1, 2, 2])
    counted = torch.tensor([True, True, False, True, False, False])
    found = sequence_mean(values, counted, owner, 4)
    assert found.tolist() == [6.0, 2.0, 0.0, 0.0]  # 6/1; (1 + 3)/2; nothing counted; no token at all
    assert sequence_mean(values, torch.ones(6, dtype=torch.bool), owner, 3).tolist() == [6.0, 2.0, 6.0]


def test_sequence_ratios_by_hand():
    """Faults: a product of ratios, which vanishes with the length; the mean of the ratios, which is above 1 for any
    spread; another rollout's tokens in the mean; a half-masked rollout."""
    ratio = torch.tensor([0.5, 4.0, 2.0, 2.0, 4.0, 4.0])
    owner = torch.tensor([0, 0, 0, 0, 1, 1])  # geometric means 8 ** (1 / 4) and 4
    loss = dataclasses.replace(LOSS, is_level="sequence", is_correction="mis", is_low=0.5, is_high=2.0)
    found, kept = importance_weights(torch.zeros(6), -ratio.log(), owner, loss)
    assert found.tolist() == pytest.approx([8 ** 0.25] * 4 + [4] * 2, rel=1e-5)
    assert kept.tolist() == [True] * 4 + [False] * 2
    found, kept = importance_weights(torch.zeros(6), -ratio.log(), owner, dataclasses.replace(loss, is_correction="tis"))
    assert found.tolist() == pytest.approx([8 ** 0.25] * 4 + [2] * 2, rel=1e-5) and kept.all()


@pytest.mark.parametrize(("loss", "wanted", "masked"), [
    ("grpo", (6 + 3 / 3 + 4 / 2) / 5, (6 + 3 / 2 + 4 / 2) / 5), ("dapo", 13 / 40, 13 / 40), ("dr_grpo", 13 / 80, 13 / 80)])
def test_reductions_by_hand(loss, wanted, masked):
    """Faults: this micro-batch's own tokens or rollouts as the divisor; the longest that there is for the longest
    that may be; a masked token (here of value 0) that stays in the mean of its rollout."""
    values, owner = torch.tensor([6.0, 1, 2, 0, 5, -1]), torch.tensor([0, 1, 1, 1, 2, 2])
    totals = Totals(sequences=5, tokens=40, longest=16)
    counted = torch.ones(6, dtype=torch.bool)
    assert float(reduced(values, counted, owner, loss, totals)) == pytest.approx(wanted)
    counted[3] = False
    assert float(reduced(values, counted, owner, loss, totals)) == pytest.approx(masked)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="loss 'bnpo': one of grpo, dapo, dr_grpo"):
        reduced(torch.zeros(1), torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.long), "bnpo", Totals(1, 1, 1))


def test_advantages_without_a_divisor():
    """Fault: Dr. GRPO with the standard deviation that it leaves out."""
    found = advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]]), "none")
    assert found.tolist() == [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]]


def test_kl_estimate_has_the_mean_of_the_kl_and_of_its_gradient():
    """Faults: policy and reference exchanged; the gradient of r - 1 - log r alone, whose mean is that of the forward
    KL (GRPO as first published)."""
    logits = torch.tensor([0.3, -0.2, 1.0], requires_grad=True)
    reference = torch.log_softmax(torch.tensor([1.0, 0.5, -0.3]), 0)

    def slope(value):
        return torch.autograd.grad(value(torch.log_softmax(logits, 0)), logits)[0]
    found = slope(lambda logp: (logp.detach().exp() * kl_estimate(logp, reference)).sum())
    assert torch.allclose(found, slope(lambda logp: (logp.exp() * (logp - reference)).sum()), atol=1e-6)
    naive = slope(lambda logp: (logp.detach().exp() * ((reference - logp).exp() - (reference - logp) - 1)).sum())
    assert torch.allclose(naive, slope(lambda logp: (reference.exp() * (reference - logp)).sum()), atol=1e-6)
    assert float((naive - found).abs().max()) > 0.01
    logp = torch.log_softmax(logits.detach(), 0)
    exact = float((logp.exp() * (logp - reference)).sum())
    assert float((logp.exp() * kl_estimate(logp, reference)).sum()) == pytest.approx(exact, rel=1e-5)
    assert (kl_estimate(logp, reference) > 0).all() and float(kl_estimate(logp, logp).abs().max()) == 0


def test_three_tokens_by_hand():
    """Loss and gradient of one sequence of three tokens, advantage 2, of which masked IS drops the last."""
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    sampler = torch.tensor([-1.0, -2.0 + math.log(1.25), -0.5 - math.log(4.0)])  # ratios 1, 0.8, 4
    owner = torch.zeros(3, dtype=torch.long)
    weight, counted = importance_weights(logp, sampler, owner, dataclasses.replace(LOSS, is_correction="mis"))
    loss = reduced(weight * policy_loss(logp, logp.detach(), torch.full((3,), 2.0), 0.2, 0.28), counted, owner, "grpo",
                   Totals(1, 3, 8))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-(1 * 2 + 0.8 * 2) / 2, abs=1e-6)
    assert logp.grad.tolist() == pytest.approx([-1.0, -0.8, 0.0], abs=1e-6)


# ---- the whole backward pass

def test_gradient_is_that_of_plain_autograd(policy, learner, played, advantage):
    """Faults: a shared prompt's gradient counted once for its whole group, tool tokens in the loss, positions off by
    one after a prompt's padding, a token mean instead of a mean of means. Each weight of the model is compared."""
    assert len({r.length for r in played}) > 8 and len({tuple(r.prompt) for r in played}) == 8
    assert sum(not all(r.sampled) for r in played) >= 3
    assert {r.tokens[-1] for r in played} >= set(policy.stop_ids)  # one of them is the padding's id, and is learnt
    found, stats = run(learner, played, advantage)
    wanted = toy_policy.plain_gradient(policy, played, advantage, len(played))
    assert max(float(g.abs().max()) for g in wanted.values()) > 0.02
    assert all(float(g.abs().max()) > 1e-3 for g in wanted.values())  # no weight is compared as zeros
    assert toy_policy.furthest(found, wanted) < NEAR
    assert stats["loss"] == pytest.approx(-sum(advantage) / len(played), abs=1e-5)  # ratio 1, so the mean advantage
    assert stats["kept"] == 1.0 and stats["mismatch"] < 1e-5


def test_gradient_at_another_temperature(policy, learner, toy_rows):
    """Fault: rollouts sampled at one temperature and trained at another."""
    from m2rl_core.engines.rollout import sample
    rollouts = sample(policy, toy_rows[:3], 2, generator=torch.Generator().manual_seed(8), temperature=0.6,
                      max_new_tokens=9)
    advantage = [1.0, -0.5, 0.3, 0.8, -1.0, 0.2]
    found, stats = run(learner, rollouts, advantage, dataclasses.replace(LOSS, temperature=0.6))
    assert stats["mismatch"] < 2e-5
    assert toy_policy.furthest(found, toy_policy.plain_gradient(policy, rollouts, advantage, 6, temperature=0.6)) < NEAR


def test_entropy_by_hand(policy, learner, played, advantage):
    """Fault: entropy of the padded positions, or a mean of means where the docstring says a mean over tokens."""
    _, stats = run(learner, played, advantage)
    model = toy_policy.transformers_model(policy)
    with torch.no_grad():
        logps = torch.cat([toy_policy.plain_logps(model, r) for r in played])
    assert stats["entropy"] == pytest.approx(float(-(logps.exp() * logps).sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("budget", [1, 60, 400])
def test_micro_batches_do_not_show(policy, learner, played, advantage, monkeypatch, budget, loss):
    """Fault: a mean inside each micro-batch, which makes the gradient depend on the memory that there is."""
    loss = dataclasses.replace(LOSS, loss=loss, kl=0.1, entropy=0.01)
    reference = toy_policy.nudged(policy, 0.3)
    whole, stats = run(learner, played, advantage, loss, reference=reference)
    monkeypatch.setattr(grpo, "micro_batches", lambda rollouts: micro_batches(rollouts, budget))
    assert len(micro_batches(played)) < len(micro_batches(played, budget))
    pieces, parts = run(learner, played, advantage, loss, reference=reference)
    assert toy_policy.furthest(pieces, whole) < NEAR
    assert parts == pytest.approx(stats, abs=1e-5)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("shares", [2, 3, 5])
def test_processes_do_not_show(learner, played, advantage, loss, shares):
    """Fault: each process divides by what it holds itself, and the mean over processes is taken for the batch's."""
    loss = dataclasses.replace(LOSS, loss=loss)
    whole, _ = run(learner, played, advantage, loss)
    parts = [run(learner, played[i::shares], advantage[i::shares], loss, batch=played)[0] for i in range(shares)]
    assert toy_policy.furthest({name: sum(part[name] for part in parts) for name in whole}, whole) < NEAR


def test_rows_of_one_prompt_are_groups_of_their_own(policy, toy_rows):
    """Fault: groups formed by the prompt's text or tokens: two rows that ask alike and accept different answers."""
    row = toy_rows[0]
    other = dataclasses.replace(row, id=row.id + "-again", truth={**row.truth, "answer": "-1"})
    spec = dataclasses.replace(load_profile("smoke").rl, group=3, max_new_tokens=6)
    rollouts, _, scores, _ = collect(policy, [row, other, row], spec, 4)
    assert scores.shape == (3, 3)
    assert [r.row.id for r in rollouts] == [row.id] * 3 + [other.id] * 3 + [row.id] * 3
    found = advantages(torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 0]]))
    assert torch.equal(found[1], torch.zeros(3)) and float(found[0, 0]) != float(found[2, 0])


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_skipped_groups_do_not_show(learner, played, advantage, loss):
    """Fault: groups without variance leave the divisor, so that the learning rate grows when they are many."""
    loss = dataclasses.replace(LOSS, loss=loss)
    some = [0.0 if i // 3 in (1, 4, 6) else a for i, a in enumerate(advantage)]
    whole, _ = run(learner, played, some, loss)
    used = [(r, a) for r, a in zip(played, some, strict=True) if a]
    skipped, _ = run(learner, [r for r, _ in used], [a for _, a in used], loss, batch=played)
    assert toy_policy.furthest(skipped, whole) < NEAR


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_a_batch_of_skipped_groups_only_has_no_gradient(learner, played, loss):
    """Fault: a mean over no rollouts, which is not a number."""
    nothing = torch.zeros(len(played) // 3, 3)
    used, update = grpo.learner(learner, played, nothing, dataclasses.replace(LOSS, loss=loss), LONGEST)
    assert used == [] and update(used) == {
        "loss": 0.0, "kept": 1.0, "entropy": 0.0, "mismatch": 0.0, "mismatch_mean": 0.0}
    assert all(w.grad is None for w in learner.weights.values())


@pytest.mark.parametrize("kind", ["none", "tis", "mis"])
def test_mismatch_between_sampler_and_trainer(policy, learner, played, advantage, kind):
    """Faults: masked tokens left in the divisor; the correction inside the clipped ratio; the mismatch not told."""
    def off(rollout):
        """Every fourth sampled token was likelier to the sampler by a factor 4, every fourth less likely by 1.6."""
        logps, t = [], 0
        for p, sampled in zip(rollout.logprobs, rollout.sampled, strict=True):
            shift = {1: math.log(4), 3: -math.log(1.6)}.get(t % 4, 0.0) if sampled else 0.0
            logps.append(p + shift)
            t += sampled
        return dataclasses.replace(rollout, logprobs=logps)

    rollouts = [off(r) for r in played]
    table = {"none": (1.0, 1.0), "tis": (0.25, 1.5), "mis": (0.0, 1.6)}[kind]  # bounds 0.5 and 1.5, but 2 for mis
    loss = dataclasses.replace(LOSS, is_correction=kind, is_low=0.5, is_high=1.5 if kind == "tis" else 2.0)
    weights = [torch.tensor([{1: table[0], 3: table[1]}.get(t % 4, 1.0) for t in range(r.length)]) for r in rollouts]
    found, stats = run(learner, rollouts, advantage, loss)
    wanted = toy_policy.plain_gradient(policy, rollouts, advantage, len(rollouts), weights)
    assert toy_policy.furthest(found, wanted) < NEAR
    assert stats["mismatch"] == pytest.approx(math.log(4), abs=1e-4)
    shifts = [abs({1: math.log(4), 3: math.log(1.6)}.get(t % 4, 0.0)) for r in rollouts for t in range(r.length)]
    assert stats["mismatch_mean"] == pytest.approx(sum(shifts) / len(shifts), abs=1e-5)
    dropped = sum(int((w == 0).sum()) for w in weights) / sum(len(w) for w in weights)
    assert stats["kept"] == pytest.approx(1 - dropped)


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
def test_kl_and_entropy_terms_are_those_of_plain_autograd(policy, learner, played, advantage, reduction):
    """Faults: a reference that learns; its log-probs at another temperature; an entropy that is pushed down; a term
    divided otherwise than the loss; groups without advantage that lose their terms."""
    loss = dataclasses.replace(LOSS, loss=reduction, kl=0.3, entropy=0.2, temperature=0.8, is_correction="none")
    reference = toy_policy.nudged(policy, 0.5)
    found, stats = run(learner, played, advantage, loss, reference=reference)
    model, other = toy_policy.transformers_model(policy), toy_policy.transformers_model(reference)
    tokens, kls = sum(r.length for r in played), []
    for rollout, a in zip(played, advantage, strict=True):
        every, ids = toy_policy.plain_logps(model, rollout, 0.8), toy_policy.said(rollout)[:, None]
        with torch.no_grad():
            ref = toy_policy.plain_logps(other, rollout, 0.8).gather(1, ids)[:, 0]
        logp = every.gather(1, ids)[:, 0]
        kl = (ref - logp).exp() - (ref - logp) - 1
        kls.append(kl.detach())
        ratio = (logp - logp.detach()).exp()
        values = -a * ratio + 0.3 * ratio * kl + 0.2 * (every.exp() * every).sum(-1)
        by = {"grpo": rollout.length * len(played), "dapo": tokens, "dr_grpo": len(played) * LONGEST}[reduction]
        (values.sum() / by).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if name != "lm_head.weight"}
    assert toy_policy.furthest(found, wanted) < NEAR
    assert stats["kl"] == pytest.approx(float(torch.cat(kls).mean()), rel=1e-4) and stats["kl"] > 1e-3
    assert all(w.grad is None for w in reference.weights.values())


def test_summary_by_hand(toy_rows):
    """Faults: a domain's reward divided by all prompts; tool tokens in the length; a solved group not counted."""
    rows = [toy_rows[0], toy_rows[3], toy_rows[1]]  # math, coding, math
    rollouts = [Rollout(rows[i // 2], [1] * 5, [7] * 4, [True, True, False, True], [0.0] * 4, truncated=i == 1)
                for i in range(6)]
    verdicts = [Verdict(0.0, failed=i == 1) for i in range(6)]
    found = summary(rollouts, verdicts, torch.tensor([[1.0, 0], [1, 1], [0, 0.5]]))
    assert found == pytest.approx({
        "reward": 3.5 / 6, "reward_math": 0.375, "reward_coding": 1.0, "skipped_groups": 1 / 3, "response_tokens": 18,
        "prompt_tokens": 15, "length": 3.0, "truncated": 1 / 6, "rollouts": 6,
        "verifier_failures": 1})
    assert "verifier_failures" not in summary(rollouts, [Verdict(0.0)] * 6, torch.zeros(3, 2))
