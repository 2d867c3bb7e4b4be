"""Noise of the two gradients of distillation: by hand, in a planted world, in a real batch and inside a real run."""
from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import toy_policy

from m2rl_core.domains import DOMAINS
from m2rl_core.engines.rollout import sample
from m2rl_core.metrics.every import Every
from m2rl_core.metrics.gradient_noise import GAP, by_prompt, measure
from m2rl_core.metrics.interference import WHOLE
from m2rl_core.models import policy as policies
from m2rl_core.profile import load_profile
from m2rl_core.progress import Progress
from m2rl_core.study import study
from m2rl_core.training import opd
from m2rl_core.training.losses import Loss, Totals
from m2rl_core.training.trainer import read_lines

LOSS = Loss.of(load_profile("smoke").opd, loss="grpo")
NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


def one(frame, estimator, group=WHOLE):
    return frame.set_index(["estimator", "group"]).loc[(estimator, group)]


def leaving(policy, gradients):
    """An estimator that leaves these gradients, {weight: tensor} for each part in turn."""
    waiting = iter(gradients)

    def backward(part):
        for name, gradient in next(waiting).items():
            policy.weights[name].grad = gradient.clone()
    return backward


def test_a_part_is_a_prompt():
    """Faults: a group torn apart, two prompts in one part, a part too many or too few."""
    assert by_prompt("aabbcc", 2) == [["a", "a"], ["b", "b"], ["c", "c"]]
    assert by_prompt("aabbcc", 2, most=2) == [["a", "a"], ["b", "b"]]
    assert by_prompt("aaabbb", 3, most=9) == [["a"] * 3, ["b"] * 3] and by_prompt("", 2) == []


def test_spread_by_hand(policy):
    """Faults: n for n - 1, a standard deviation for a variance, the spread of one part for that of their mean."""
    learner = toy_policy.clone(policy)
    sampled = [{NORM: torch.full((32,), x), UP: torch.zeros(64, 32)} for x in (1.0, 2.0, 6.0)]
    full = [{NORM: torch.full((32,), x), UP: torch.ones(64, 32)} for x in (2.0, 3.0, 4.0)]
    seconds = {"seconds_full": 100.0}
    found = measure(learner, [[], [], []], {"sampled": leaving(learner, sampled), "full": leaving(learner, full)}, seconds)
    at = one(found, "sampled", "last norm")
    assert at["parts"] == 3 and at["trace"] == pytest.approx(32 * 7) and at["norm"] == pytest.approx(3 * math.sqrt(32))
    assert at["noise"] == pytest.approx(7 / 3 / 9)
    assert one(found, "full", "last norm")["trace"] == pytest.approx(32)
    flat = one(found, "full", "MLP, first third")
    assert flat["trace"] == 0 and flat["norm"] == pytest.approx(math.sqrt(64 * 32)) and flat["noise"] == 0
    gap = one(found, GAP, "last norm")  # -1, -1, 2
    assert gap["trace"] == pytest.approx(32 * 3) and gap["norm"] == pytest.approx(0, abs=1e-6)
    whole = one(found, "full")
    assert whole["norm"] ** 2 == pytest.approx(32 * 9 + 64 * 32)
    assert whole["noise"] == pytest.approx(32 / 3 / (32 * 9 + 64 * 32))
    assert math.isnan(one(found, "sampled", "MLP, first third")["noise"])  # no gradient at all
    assert set(seconds) == {"seconds_sampled", "seconds_full"} and seconds["seconds_full"] > 100
    assert all(w.grad is None for w in learner.weights.values())


def test_a_single_part_says_nothing(policy):
    learner = toy_policy.clone(policy)
    made = [{NORM: torch.ones(32)}]
    found = measure(learner, [[]], {"sampled": leaving(learner, made), "full": leaving(learner, made)}, {})
    assert found["trace"].isna().all() and found["noise"].isna().all()


def test_a_planted_spread_is_found(policy):
    """Does the instrument work: a mean and two known variances, and a difference of mean zero, in 2,048 weights."""
    learner, g, parts = toy_policy.clone(policy), torch.Generator().manual_seed(1), 40
    mean = torch.randn(64, 32, generator=g)
    full = [{UP: mean + 0.5 * torch.randn(64, 32, generator=g)} for _ in range(parts)]
    sampled = [{UP: part[UP] + 2 * torch.randn(64, 32, generator=g)} for part in full]
    found = measure(learner, [[]] * parts, {"sampled": leaving(learner, sampled), "full": leaving(learner, full)}, {})
    ratio = one(found, "sampled")["trace"] / one(found, "full")["trace"]
    assert ratio == pytest.approx((4 + 0.25) / 0.25, rel=0.05)
    assert one(found, GAP)["noise"] == pytest.approx(1, abs=0.1)  # its mean is zero: what is left is noise


def test_in_a_real_batch_the_full_gradient_has_less_of_it(policy, other, toy_rows):
    """Faults: an estimator that sees another's gradient or part, a part divided by the whole batch, a wrong part."""
    student = toy_policy.clone(policy)
    student.requires_grad()
    played = sample(policy, toy_rows, 4, generator=torch.Generator().manual_seed(2), max_new_tokens=16)
    teachers, seen = dict.fromkeys(DOMAINS, other), {"sampled": [], "full": []}

    def estimator(form):
        def backward(part):
            opd.UPDATES[form](student, teachers, part, LOSS, Totals.of(part, 16))
            seen[form].append(torch.cat([g.flatten() for g in toy_policy.gradients(student).values()]))
        return backward
    parts = by_prompt(played, 4, most=15)
    assert [{r.row.id for r in part} for part in parts] == [{row.id} for row in toy_rows]
    found = measure(student, parts, {form: estimator(form) for form in seen}, {})
    for form, gradients in seen.items():
        assert one(found, form)["trace"] == pytest.approx(float(torch.stack(gradients).var(0).sum()), rel=1e-4)
        whole = toy_policy.clone(student)
        whole.requires_grad()
        opd.UPDATES[form](whole, teachers, played, LOSS, Totals.of(played, 16))
        norm = math.sqrt(sum(float(g.square().sum()) for g in toy_policy.gradients(whole).values()))
        assert one(found, form)["norm"] == pytest.approx(norm, rel=1e-4)  # the mean of the parts is the batch's gradient
    assert one(found, "sampled")["trace"] > 2 * one(found, "full")["trace"]
    assert 0.5 < one(found, GAP)["noise"] < 2


def test_looks_are_taken_when_due_and_gathered(tmp_path):
    """Faults: a look at every step, or at none; a step doubled after a crash; half a file taken for a whole one."""
    ctx = SimpleNamespace(state=tmp_path / "state", out=tmp_path)
    for name, every, steps in (("never", 0, []), ("some", 2, [1, 3, 5])):
        looks = Every(ctx, name, every)
        due = [set(looks.look(step, lambda: pd.DataFrame({"x": [1.0, 2.0]}))) for step in (0, 1, 2, 2, 3, 4)]
        (ctx.state / f"{name}-000006.partial").write_text("half")
        looks.finish()
        if steps:
            assert pd.read_parquet(tmp_path / f"{name}.parquet")["step"].tolist() == [s for s in steps for _ in "xy"]
            assert due == [{"seconds_some"}, set(), {"seconds_some"}, {"seconds_some"}, set(), {"seconds_some"}]
    assert not (tmp_path / "never.parquet").exists() and due[1] == set()


class Killed(BaseException):
    """Stands for the end of the process."""


def test_looking_changes_no_bit_and_survives_a_crash(policy, tmp_path):
    """Faults: a gradient or a random number left behind by the measurement; rows lost or doubled by a resumed run."""
    smoke = load_profile("smoke")
    for i, name in enumerate(("sft", *(f"rl-{domain}" for domain in DOMAINS))):
        policies.save(toy_policy.nudged(policy, 0.1 * i), tmp_path / name)

    def run(folder, every, die=None):
        class Dying(Progress):
            def step(self, step, total, **shown):
                if step == die:
                    raise Killed
        profile = replace(smoke, opd=replace(smoke.opd, steps=3, lr=1e-3, variance_every=every),
                          rl=replace(smoke.rl, eval_every=3, eval_items=1))
        out = tmp_path / folder
        out.mkdir(exist_ok=True)
        opd.build(SimpleNamespace(
            profile=profile, stage=SimpleNamespace(name="mt-opd", settings={"steps": 3}), out=out, state=out / "state", seed=5,
            inputs={p.name: p for p in tmp_path.iterdir()}, progress=Dying("mt-opd"), log=lambda text: None))
        return out
    plain, seen = run("plain", 0), run("seen", 2)
    with pytest.raises(Killed):
        run("broken", 2, die=3)
    broken = run("broken", 2)
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (plain / name).read_bytes() == (seen / name).read_bytes() == (broken / name).read_bytes()
    assert not (plain / "variance.parquet").exists()
    assert (seen / "variance.parquet").read_bytes() == (broken / "variance.parquet").read_bytes()
    found = pd.read_parquet(seen / "variance.parquet")
    assert sorted(set(found["step"])) == [1, 3] and set(found["parts"]) == {5}
    timed = [{key for key in line if "variance" in key or key in ("seconds_sampled", "seconds_full")}
             for line in read_lines(seen / "timing.jsonl")]
    assert timed == [{"seconds_variance", "seconds_sampled", "seconds_full"}, set(), timed[0]]


def test_the_option_is_in_no_key_until_it_is_used():
    """Fault: a new option that makes MT-OPD again for those who do not use it."""
    smoke = load_profile("smoke")
    off = study(replace(smoke, opd=replace(smoke.opd, variance_every=0)))
    on = study(replace(smoke, opd=replace(smoke.opd, variance_every=3)))
    assert "variance_every" not in off["mt-opd"].settings and on["mt-opd"].settings["variance_every"] == 3
    assert {n for n in on if on[n].key != off[n].key} >= {"mt-opd", "eval-mt-opd"} and on["rl-math"].key == off["rl-math"].key
