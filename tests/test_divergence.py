"""The two estimates of the forward KL along an expert's trajectories, against enumeration."""
from __future__ import annotations

import itertools

import pytest
import torch
import toy_policy

from m2rl_core.domains import Row
from m2rl_core.engines.rollout import Rollout, sample
from m2rl_core.errors import StudyError
from m2rl_core.metrics.divergence import comparable, trajectory_kl
from m2rl_core.models import policy as policies

WORDS, PROMPT = 3, [1, 0, 2]


@pytest.fixture(scope="module")
def expert():
    return toy_policy.few_words(WORDS, seed=1)


@pytest.fixture(scope="module")
def others():
    near = toy_policy.nudged(toy_policy.few_words(WORDS, seed=1), 0.3)
    return {"near": near, "far": toy_policy.few_words(WORDS, seed=2)}


def every(length):
    row = Row("", "math", "", "", (), {})
    return [Rollout(row, PROMPT, list(tokens), [True] * length, [0.0] * length)
            for tokens in itertools.product(range(WORDS), repeat=length)]


@torch.no_grad()
def sequence_logp(policy, rollout, temperature) -> torch.Tensor:
    logps = toy_policy.plain_logps(toy_policy.transformers_model(policy), rollout, temperature)
    return logps.gather(1, toy_policy.said(rollout)[:, None]).sum()


def test_a_policy_is_at_no_distance_from_itself(expert):
    """Fault: expert and policy scored in different ways."""
    for row in trajectory_kl(expert, {"self": toy_policy.clone(expert)}, every(2), 1.0):
        assert row["kl_seq"] == row["kl_token"] == row["kl_exact"] == 0


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_both_estimates_have_the_enumerated_kl_as_their_mean(expert, others, temperature):
    """Faults: the KL the other way round (policy to expert), a temperature left out, a mean where a sum belongs."""
    rollouts = every(2)
    p = torch.stack([sequence_logp(expert, r, temperature) for r in rollouts])
    assert float(p.exp().sum()) == pytest.approx(1, abs=1e-5)
    found = trajectory_kl(expert, others, rollouts, temperature)
    for name, policy in others.items():
        q = torch.stack([sequence_logp(policy, r, temperature) for r in rollouts])
        wanted = float((p.exp() * (p - q)).sum())  # KL(expert || policy) over whole responses
        mine = {row["rollout"]: row for row in found if row["policy"] == name}
        mean = {key: sum(float(p[i].exp()) * mine[i][key] for i in range(9))
                for key in ("kl_seq", "kl_token", "kl_exact")}
        assert mean["kl_seq"] == pytest.approx(wanted, abs=1e-5)
        assert mean["kl_token"] == pytest.approx(wanted / 2, abs=1e-5)
        assert mean["kl_exact"] == pytest.approx(wanted / 2, abs=1e-5)
        assert all(row["kl_exact"] >= 0 for row in mine.values()) and wanted > 1e-3
        assert abs(wanted - float((q.exp() * (q - p)).sum())) > 1e-4  # the other direction is another number


def test_sampled_estimate_agrees_with_the_exact_one_and_is_noisier(policy, toy_rows):
    """Faults: one of the two on other tokens than the other; log-ratios of tokens that tools wrote."""
    near = toy_policy.nudged(policy, 0.2)
    rollouts = sample(policy, toy_rows[:4], 150, generator=torch.Generator().manual_seed(2), max_new_tokens=6)
    found = trajectory_kl(policy, {"near": near}, rollouts, 1.0)
    sampled = torch.tensor([row["kl_seq"] for row in found])
    exact = torch.tensor([row["kl_exact"] * row["tokens"] for row in found])
    gap = sampled - exact
    assert abs(float(gap.mean())) < 3 * float(gap.std()) / len(gap) ** 0.5
    assert float(exact.mean()) > 5 * float(gap.std()) / len(gap) ** 0.5  # so that agreeing means something
    assert float(exact.std()) < float(sampled.std()) / 2
    assert [row["tokens"] for row in sorted(found, key=lambda r: r["rollout"])] == [r.length for r in rollouts]


def test_policies_of_other_tokens_are_refused_with_both_names(policy, other, expert, tmp_path):
    """Fault: a KL between the probabilities of different words, or an error deep inside a gather."""
    comparable({"rl-math": policy, "rl-if": other, "sft": policy})
    with pytest.raises(StudyError, match=r"no KL between rl-math and merge-ties: they have \d+ and 3 logits"):
        comparable({"rl-math": policy, "merge-ties": expert})
    swapped = policies.load(policies.save(policy, tmp_path / "swapped") or tmp_path / "swapped")
    swapped.tokenizer.add_tokens(["zzz"])
    with pytest.raises(StudyError, match=r"sft and mt-opd: their tokenizers give 'zzz' the ids None and \d+; use"):
        comparable({"sft": policy, "mt-opd": swapped})


def test_only_sampled_tokens_count(policy, other, played):
    """Fault: tool results or padding in a trajectory's sum."""
    found = {row["rollout"]: row for row in trajectory_kl(policy, {"other": other}, played, 1.0)}
    models = [toy_policy.transformers_model(p) for p in (policy, other)]
    for i, rollout in enumerate(played):
        with torch.no_grad():
            mine, theirs = (toy_policy.plain_logps(m, rollout) for m in models)
        gap = (mine - theirs).gather(1, toy_policy.said(rollout)[:, None]).sum()
        assert found[i]["kl_seq"] == pytest.approx(float(gap), abs=2e-4)
        assert found[i]["kl_exact"] == pytest.approx(float((mine.exp() * (mine - theirs)).sum(-1).mean()), abs=1e-4)
        assert found[i]["tokens"] == rollout.length
