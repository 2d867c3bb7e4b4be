"""The training loop: schedule, Adam, diverging losses, checkpoints; and the next-token loss of `base` and `sft`."""
from __future__ import annotations

import math

import pytest
import torch
import toy_policy
from safetensors.torch import load_file

from m2rl_core.training import sft, trainer
from m2rl_core.domains import module, training_rows
from m2rl_core.progress import Progress
from m2rl_core.training.sft import encode_sft, masked_loss
from m2rl_core.training.trainer import Optimization, TrainingDiverged, fit, read_lines, warmup_cosine


def optimization(steps=6, **settings) -> Optimization:
    usual = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.98), "checkpoint_every": 2}
    return Optimization(steps, **{**usual, **settings})


def lesson(policy):
    """An objective that depends on the step alone: next-token loss on one row of ten, another at each step."""
    rows = [encode_sft(policy, row) for row in training_rows("math", "sft", 10, 1)]

    def objective(step):
        loss, tokens = masked_loss(policy, [rows[step % 10], rows[(3 * step + 1) % 10]])
        return {"loss": loss, "tokens": tokens, "seconds_update": 0.5}
    return objective


def train(policy, folder, objective=None, settings=None, observe=None):
    """A run of `fit` into folder/out with its checkpoints in folder/state; returns the trained copy."""
    learner = toy_policy.clone(policy)
    fit(learner, (objective or lesson)(learner), settings or optimization(), folder / "out", folder / "state",
        Progress("toy"), observe)
    return learner


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


def dying(moment):
    """The lesson, but the process ends inside this step."""
    def make(policy):
        teach = lesson(policy)

        def objective(step):
            if step == moment:
                raise Killed
            return teach(step)
        return objective
    return make


# ---- schedule and optimizer

def test_schedule_values():
    """Faults: a first step of size 0, a peak that is missed, a floor of the wrong size."""
    factor = warmup_cosine(10, 2, 0.1)
    assert [factor(s) for s in range(2)] == [0.5, 1.0]
    assert factor(2) == 1.0
    assert factor(6) == pytest.approx(0.1 + 0.9 * 0.5)  # half of the way down: cos(pi / 2) = 0
    assert factor(4) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))
    assert factor(10) == pytest.approx(0.1)
    assert [warmup_cosine(4, 0)(s) for s in (0, 2)] == pytest.approx([1.0, 0.5])


def test_first_step_of_adam_by_hand(policy, tmp_path):
    """Faults: weight decay inside the gradient (it would vanish in Adam's division), the schedule left out."""
    def objective(learner):
        def run(step):
            (learner.weights["model.norm.weight"] * 3.0).sum().backward()
            return {"loss": 1.0}
        return run
    found = train(policy, tmp_path, objective, optimization(1, lr=0.01, schedule=lambda step: 0.5)).weights
    before = policy.weights["model.norm.weight"]
    # a first step of Adam is the learning rate times the gradient's sign; decay takes lr x 0.1 of the weight
    assert torch.allclose(found["model.norm.weight"], before * (1 - 0.005 * 0.1) - 0.005, atol=1e-7)
    assert torch.equal(found["model.embed_tokens.weight"], policy.weights["model.embed_tokens.weight"])
    assert read_lines(tmp_path / "out" / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0, "grad_norm": pytest.approx(3 * math.sqrt(32), rel=1e-5)}]  # before clipping


def test_a_step_without_gradient_changes_nothing(policy, tmp_path):
    """Faults: a batch in which all groups are solved crashes the run, or shrinks the weights."""
    found = train(policy, tmp_path, lambda learner: lambda step: {"loss": 0.0}, optimization(2))
    assert all(torch.equal(w, policy.weights[n]) for n, w in found.weights.items())
    assert [line["grad_norm"] for line in read_lines(tmp_path / "out" / "metrics.jsonl")] == [0.0, 0.0]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_before_the_step(policy, tmp_path, where):
    """Fault: one bad batch turns every weight into NaN, and the last checkpoint with it."""
    learner = toy_policy.clone(policy)
    teach, seen = lesson(learner), []

    def objective(step):
        seen.append({n: w.detach().clone() for n, w in learner.weights.items()})
        record = teach(step)
        if step == 3 and where == "gradient":
            learner.weights["model.norm.weight"].grad[5] = math.inf
        return {**record, "loss": math.nan} if step == 3 and where == "loss" else record

    with pytest.raises(TrainingDiverged, match="^step 4: loss .* lower the learning rate .*diverged.jsonl") as caught:
        fit(learner, objective, optimization(), tmp_path / "out", tmp_path / "state", Progress("toy"),
            keep_batch=lambda path: path.write_text("the batch"))
    assert (tmp_path / "state" / "diverged.jsonl").read_text() == "the batch"
    assert "\n" not in str(caught.value) and str(tmp_path / "state") in str(caught.value)
    assert all(torch.equal(w.detach(), seen[3][n]) for n, w in learner.weights.items())
    kept = load_file(tmp_path / "state" / "step-000002" / "model.safetensors")
    assert all(torch.equal(w, seen[2][n]) for n, w in kept.items())
    assert not (tmp_path / "out").exists()


# ---- what is written, and going on

def test_what_is_recorded(policy, tmp_path):
    """Faults: seconds among the numbers that must be the same on every run; a step counted from 0; a stray gradient."""
    watched = []
    found = train(policy, tmp_path, settings=optimization(5), observe=lambda step, p: watched.append(step))
    assert watched == [0, 1, 2, 3, 4, 5]
    metrics, timing = (read_lines(tmp_path / "out" / name) for name in ("metrics.jsonl", "timing.jsonl"))
    assert [line["step"] for line in metrics] == [line["step"] for line in timing] == [1, 2, 3, 4, 5]
    assert all(set(line) == {"step", "loss", "tokens", "grad_norm"} for line in metrics)
    assert all(line["seconds_update"] == 0.5 and line["seconds"] > 0 for line in timing)
    assert not any(w.requires_grad for w in found.weights.values())
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[n], w) for n, w in found.weights.items())


def finished(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "out").iterdir()) if p.name != "timing.jsonl"}


@pytest.mark.parametrize("moments", [(0,), (3,), (5,), (1, 2, 3, 4)])
def test_a_killed_run_ends_like_an_unbroken_one(policy, tmp_path, moments):
    """Faults: Adam's moments or the schedule lost, a step done twice, a line of the metrics lost or doubled."""
    train(policy, tmp_path / "whole")
    for moment in moments:
        with pytest.raises(Killed):
            train(policy, tmp_path / "broken", dying(moment))
    train(policy, tmp_path / "broken")
    assert finished(tmp_path / "broken") == finished(tmp_path / "whole")
    assert [p.name for p in (tmp_path / "broken" / "state").iterdir()] == ["step-000004"]


@pytest.mark.parametrize("moment", ["weights", "optimizer", "rename", "after"])
def test_killed_while_a_checkpoint_is_written(policy, tmp_path, monkeypatch, moment):
    """Faults: half a checkpoint taken for a whole one; one that is neither used nor ever cleared away."""
    def die(*args, **settings):
        raise Killed
    train(policy, tmp_path / "whole")
    with pytest.raises(Killed):
        train(policy, tmp_path / "broken", dying(3))  # there is a checkpoint of step 2 now
    place = {"weights": (trainer, "save"), "optimizer": (torch, "save"), "rename": (trainer.os, "replace"),
             "after": (trainer.shutil, "rmtree")}[moment]
    with monkeypatch.context() as patch:
        patch.setattr(*place, die) if moment != "after" else patch.setattr(*place, lambda path, *a, **k: (
            die() if path.suffix != ".partial" else None))
        with pytest.raises(Killed):
            train(policy, tmp_path / "broken")
    state = tmp_path / "broken" / "state"
    assert (state / "step-000002").is_dir()
    assert (state / "step-000004").is_dir() == (moment == "after")
    train(policy, tmp_path / "broken")
    assert finished(tmp_path / "broken") == finished(tmp_path / "whole")


# ---- next-token training

def test_only_the_assistants_words_are_learnt(policy, episodes):
    """Faults: a loss on the prompt or on a tool's answer; no loss on the end marker, so that it never stops."""
    row = episodes[0]
    turns = tuple(module("agent").respond(row))
    ids, learn = encode_sft(policy, type(row)(**{**row.__dict__, "turns": turns}))
    spans, last = [], False
    for token, flag in zip(ids, learn, strict=True):
        if flag and not last:
            spans.append([])
        if flag:
            spans[-1].append(token)
        last = flag
    said = [t["content"] + "<|im_end|>" for t in turns if t["role"] == "assistant"]
    assert [policy.tokenizer.decode(span) for span in spans] == said
    whole = policy.tokenizer.apply_chat_template([*row.messages, *turns], tools=list(row.tools), tokenize=False)
    assert policy.tokenizer.decode(ids) + "\n" == whole


def test_masked_loss_is_transformers_loss(policy, monkeypatch):
    """Faults: targets off by one, the mean of a micro-batch taken for the batch's, the mask on the wrong token."""
    rows = [encode_sft(policy, row) for d in ("math", "if", "agent") for row in training_rows(d, "sft", 3, 2)]
    model = toy_policy.transformers_model(policy)
    total = sum(sum(learn) for _, learn in rows)
    losses = []
    for ids, learn in rows:
        labels = torch.tensor([[i if flag else -100 for i, flag in zip(ids, learn, strict=True)]])
        loss = model(torch.tensor([ids]), labels=labels).loss * sum(learn) / total
        loss.backward()
        losses.append(float(loss.detach()))
    wanted = {n: p.grad for n, p in model.named_parameters() if n != "lm_head.weight"}
    for micro in (100_000, 300, 1):
        monkeypatch.setattr(sft, "MICRO_TOKENS", micro)
        learner = toy_policy.clone(policy)
        learner.requires_grad()
        found, tokens = masked_loss(learner, rows)
        assert found == pytest.approx(sum(losses), rel=1e-5) and tokens == total
        assert toy_policy.furthest(toy_policy.gradients(learner), wanted) < 1e-5
