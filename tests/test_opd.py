"""On-policy distillation by enumeration: with three tokens and two positions, every response can be listed.

The wanted gradients are made by autograd from the definition of the reverse KL; nothing is sampled.
"""
from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
import toy_policy
from torch.utils._python_dispatch import TorchDispatchMode

from m2rl_core.domains import Row
from m2rl_core.engines.rollout import Rollout, logprobs
from m2rl_core.models.attention import Causal
from m2rl_core.models.policy import Policy
from m2rl_core.models.qwen3 import head, hidden_states, prepare
from m2rl_core.profile import load_profile
from m2rl_core.training import losses
from m2rl_core.training.grpo import backward
from m2rl_core.training.losses import Loss, Totals
from m2rl_core.training.opd import backward_full, backward_sampled
from m2rl_core.training.teachers import by_domain

WORDS, PROMPT, NEAR = 3, [0, 2, 1], 1e-6
LOSS = Loss.of(load_profile("smoke").opd, loss="grpo")
UPDATES = {"sampled": backward_sampled, "full": backward_full}


@pytest.fixture
def student():
    policy = toy_policy.few_words(WORDS, seed=1)
    policy.requires_grad()
    return policy


@pytest.fixture
def teacher():
    return toy_policy.few_words(WORDS, seed=2)


def row(domain="math"):
    return Row("", domain, "", "", (), {})


def distribution(policy: Policy, ids: list[int], temperature=1.0) -> torch.Tensor:
    """Log-probs over the vocabulary of the token after `ids`; (V,)."""
    model, attend = prepare(policy.weights, policy.shape), Causal([len(ids)], "cpu")
    hidden = hidden_states(model, torch.tensor(ids), torch.arange(len(ids)), attend)
    return F.log_softmax(F.linear(hidden[-1], head(policy.weights)) / temperature, dim=-1)


def batch(sequences: int) -> Totals:
    return Totals(sequences, tokens=0, longest=0)  # what "grpo" does not divide by


def reverse_kl(student, teacher, ids, temperature=1.0):
    p, q = distribution(student, ids, temperature), distribution(teacher, ids, temperature)
    return (p.exp() * (p - q)).sum()


def response(policy, tokens, domain="math", temperature=1.0) -> Rollout:
    """A rollout of these tokens with the policy's own log-probs."""
    rollout = Rollout(row(domain), PROMPT, list(tokens), [True] * len(tokens))
    return dataclasses.replace(rollout, logprobs=logprobs(policy, [rollout], temperature)[0].tolist())


def responses(policy, length, temperature=1.0):
    """Every response of that length, with its probability."""
    for tokens in itertools.product(range(WORDS), repeat=length):
        rollout = response(policy, tokens, temperature=temperature)
        yield rollout, float(torch.tensor(rollout.logprobs).sum().exp())


def gradient(student, run) -> dict[str, torch.Tensor]:
    for w in student.weights.values():
        w.grad = None
    run()
    return toy_policy.gradients(student)


def expected(student, length, run, temperature=1.0) -> dict[str, torch.Tensor]:
    """The mean over all responses of the gradient that `run(rollout)` leaves."""
    total = {n: torch.zeros_like(w) for n, w in student.weights.items()}
    for rollout, p in responses(student, length, temperature):
        for name, g in gradient(student, lambda r=rollout: run(r)).items():
            total[name] += p * g
    return total


def size(found) -> float:
    return max(float(g.abs().max()) for g in found.values())


def test_the_toy_is_not_trivial(student, teacher):
    """Guards the tests below: student and teacher differ, and their probabilities add up to 1."""
    assert sum(p for _, p in responses(student, 2)) == pytest.approx(1, abs=1e-5)
    assert float(reverse_kl(student, teacher, PROMPT).detach()) > 0.05


@pytest.mark.parametrize("form", ["sampled", "full"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_expected_gradient_is_that_of_the_reverse_kl(student, teacher, form, temperature):
    """Faults: teacher and student exchanged (forward KL), a wrong sign, a gradient through the advantage."""
    loss = dataclasses.replace(LOSS, temperature=temperature)
    wanted = gradient(student, lambda: reverse_kl(student, teacher, PROMPT, temperature).backward())
    found = expected(student, 1, lambda r: UPDATES[form](student, {"math": teacher}, [r], loss, batch(1)), temperature)
    assert size(wanted) > 0.01
    assert toy_policy.furthest(found, wanted) < NEAR


@pytest.mark.parametrize("form", ["sampled", "full"])
def test_over_two_tokens_each_position_has_its_own_kl(student, teacher, form):
    """Faults: a token's advantage given to another position; a sum where the mean over the response stands."""
    def wanted():
        total = reverse_kl(student, teacher, PROMPT)
        for token, p in enumerate(distribution(student, PROMPT).detach().exp()):  # who comes here is not trained
            total = total + p * reverse_kl(student, teacher, [*PROMPT, token])
        (total / 2).backward()
    found = expected(student, 2, lambda r: UPDATES[form](student, {"math": teacher}, [r], LOSS, batch(1)))
    assert toy_policy.furthest(found, gradient(student, wanted)) < NEAR


def test_full_form_has_the_value_and_gradient_of_the_enumerated_kl(student, teacher):
    """Faults: the KL of the sampled tokens only; a mean over all tokens where one response is longer."""
    rollouts = [response(student, tokens) for tokens in ((2,), (1, 0, 2))]

    def wanted():
        one = reverse_kl(student, teacher, PROMPT)
        three = (one + reverse_kl(student, teacher, [*PROMPT, 1]) + reverse_kl(student, teacher, [*PROMPT, 1, 0])) / 3
        ((one + three) / 2).backward()
        values.append(float((one + three).detach() / 2))
    values = []
    right = gradient(student, wanted)
    found = gradient(student, lambda: values.append(
        backward_full(student, {"math": teacher}, rollouts, LOSS, batch(2))["loss"]))
    assert values[1] == pytest.approx(values[0], abs=1e-6)
    assert toy_policy.furthest(found, right) < NEAR


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 100])
def test_chunks_do_not_show(student, teacher, chunk):
    """Faults: a last chunk lost, tokens in another order, a head without gradient, a chunk's gradient scaled by it."""
    rng = torch.Generator().manual_seed(1)
    hidden, theirs, upstream = (torch.randn(7, *size, generator=rng) for size in ((8,), (8,), ()))

    def run(kl):
        own = hidden.clone().requires_grad_(True)
        gradients = gradient(student, lambda: found.append(kl(own).detach()) or (kl(own) * upstream).sum().backward())
        return {**gradients, "hidden": own.grad}

    def plain(own):
        p, q = (F.log_softmax(F.linear(h, head(of.weights)) / 0.7, -1) for h, of in ((own, student), (theirs, teacher)))
        return (p.exp() * (p - q.detach())).sum(-1)
    found = []
    whole = run(plain)
    parts = run(lambda own: losses.reverse_kl(student, teacher, own, theirs, 0.7, chunk))
    assert torch.allclose(found[1], found[0], atol=1e-6) and size(whole) > 0.01
    assert toy_policy.furthest(parts, whole) < NEAR


def test_no_more_than_a_chunk_of_the_vocabulary_is_held():
    """Fault: the distributions of all tokens kept for the backward pass, gigabytes at a real vocabulary."""
    tokens, vocab, chunk = 512, 3000, 32
    student, teacher = (Policy({"model.embed_tokens.weight": torch.randn(vocab, 8) / 3}, None, None) for _ in range(2))
    student.weights["model.embed_tokens.weight"].requires_grad_(True)
    hidden, theirs = torch.randn(tokens, 8, requires_grad=True), torch.randn(tokens, 8)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        found = losses.reverse_kl(student, teacher, hidden, theirs, 1.0, chunk)
    assert sum(held) < tokens * vocab / 16

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **kwargs or {})
            sizes.extend(t.numel() for t in (made if isinstance(made, tuple | list) else (made,))
                         if isinstance(t, torch.Tensor))
            return made
    sizes = []
    with Largest():
        found.sum().backward()
        losses.reverse_kl(student, teacher, hidden, theirs, 1.0, chunk)
    assert max(sizes) == chunk * vocab


@pytest.mark.parametrize("form", ["sampled", "full"])
def test_a_teacher_like_the_student_teaches_nothing(student, form):
    """Fault: the gradient of something else (a reward, an entropy) rides along."""
    same = toy_policy.clone(student)
    rollouts = [response(student, tokens) for tokens in ((2, 0), (1, 1), (0,))]
    found = gradient(student, lambda: UPDATES[form](student, {"math": same}, rollouts, LOSS, batch(3)))
    assert size(found) < 1e-6


@pytest.mark.parametrize("form", ["sampled", "full"])
def test_each_row_learns_from_its_own_domains_teacher(student, teacher, form):
    """Faults: one teacher for all, teachers exchanged, a divisor by domain instead of by batch."""
    third = toy_policy.few_words(WORDS, seed=3)
    math, code = response(student, (2, 0)), response(student, (1, 1), "coding")
    update, teachers = UPDATES[form], {"math": teacher, "coding": third}
    both = gradient(student, lambda: update(student, teachers, [math, code, math], LOSS, batch(3)))
    parts = [gradient(student, lambda r=r, t=t: update(student, {r.row.domain: t}, [r], LOSS, batch(1)))
             for r, t in ((math, teacher), (code, third))]
    assert toy_policy.furthest(both, {n: (2 * parts[0][n] + parts[1][n]) / 3 for n in both}) < NEAR
    swapped = {"math": third, "coding": teacher}
    exchanged = gradient(student, lambda: update(student, swapped, [math, code, math], LOSS, batch(3)))
    assert toy_policy.furthest(both, exchanged) > 1e-3
    routed = by_domain([math, code, math])
    assert {d: len(r) for d, r in routed.items()} == {"math": 2, "coding": 1}


def test_a_kl_used_as_an_advantage_teaches_nothing(student, teacher):
    """Fault: the known one of several trainers: the KL over the (top-k) vocabulary is the same number whatever was
    sampled, and an advantage that does not depend on the action has an expected gradient of zero."""
    def mistaken(rollout):
        def kl(part, logp, owner, tokens):
            with torch.no_grad():
                found = -reverse_kl(student, teacher, PROMPT)
            return found.expand(len(tokens))
        backward(student, [rollout], kl, LOSS, batch(1))
    one = next(responses(student, 1))[0]
    assert size(gradient(student, lambda: mistaken(one))) > 1e-2  # a single sample looks like learning
    assert size(expected(student, 1, mistaken)) < 1e-6
    for form in UPDATES.values():
        assert size(expected(student, 1, lambda r, form=form: form(student, {"math": teacher}, [r], LOSS, batch(1)))) > 1e-2


def test_reported_kl_is_the_mean_log_ratio(student, teacher):
    """Fault: the sign or the divisor of the number that is plotted."""
    rollouts = [response(student, tokens) for tokens in ((2,), (1, 0, 2))]
    gaps = [a - b for r in rollouts for a, b in zip(r.logprobs, logprobs(teacher, [r])[0].tolist(), strict=True)]
    for w in student.weights.values():
        w.grad = None
    found = backward_sampled(student, {"math": teacher}, rollouts, LOSS, batch(2))
    assert found["reverse_kl"] == pytest.approx(sum(gaps) / 4, abs=1e-6)
    assert found["kept"] == 1.0 and found["mismatch"] < 1e-6


def test_teachers_gather_no_gradient(student, teacher):
    """Fault: the teacher is trained, or its graph is kept in memory."""
    teacher.requires_grad()
    for update in UPDATES.values():
        update(student, {"math": teacher}, [response(student, (2, 0))], LOSS, batch(1))
    assert all(w.grad is None for w in teacher.weights.values())
