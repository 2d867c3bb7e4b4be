"""Whole trainings of a toy policy through batches that teach nothing, or whose loss is no number."""
from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import toy_training
import torch
from safetensors.torch import load_file

from m2rl_core.training import batches, collect, grpo, opd
from m2rl_core.data import batch_of, rl_rows
from m2rl_core.domains import DOMAINS, Verdict
from m2rl_core.training.trainer import TrainingDiverged, read_lines

STAGES = {"rl-math": grpo, "mt-opd": opd}


@pytest.fixture(scope="module")
def inputs(policy, tmp_path_factory):
    """The folders of a start and of five experts."""
    return toy_training.models(policy, tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def rewards_by_text(monkeypatch):
    monkeypatch.setattr(collect, "rewards", toy_training.by_text)


@pytest.mark.parametrize("stage", ["rl-math", "rl-multi"])
def test_steps_that_skip_every_group_change_nothing(inputs, tmp_path, monkeypatch, stage):
    """Faults: NaN from a mean over nothing; weights that decay or drift where nothing was learned."""
    monkeypatch.setattr(collect, "rewards", lambda rows, transcripts: [Verdict(1.0, "right")] * len(rows))
    toy_training.attempt(stage, tmp_path, inputs)
    start, end = (load_file(folder / "model.safetensors") for folder in (inputs["sft"], tmp_path / "out"))
    assert all(torch.equal(start[name], weight) for name, weight in end.items())
    lines = read_lines(tmp_path / "out" / "metrics.jsonl")
    assert len(lines) == toy_training.STEPS and all(math.isfinite(value) for line in lines for value in line.values())
    assert all(line["skipped_groups"] == 1 and line["loss"] == line["grad_norm"] == 0 for line in lines)
    if stage == "rl-multi":
        assert pd.read_parquet(tmp_path / "out" / "interference.parquet").empty  # no gradient has an angle


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_no_number_keeps_state_and_batch(inputs, tmp_path, monkeypatch, stage):
    """Faults: weights of NaN, saved over the good ones; another step's batch kept; a run that cannot go on from there."""
    step, real = [0], grpo.policy_loss

    def counted(*args):
        step[0] += 1
        return collect.collect(*args)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "collect", counted)
        patch.setattr(grpo, "policy_loss", lambda *args: real(*args) * (math.nan if step[0] == 4 else 1.0))
        with pytest.raises(TrainingDiverged, match="^step 4: loss nan, gradient norm nan; the state before it is kept"):
            toy_training.attempt(stage, tmp_path, inputs)
    assert not list((tmp_path / "out").iterdir())
    kept = load_file(tmp_path / "state" / "step-000002" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in kept.values())
    saved = [json.loads(line) for line in (tmp_path / "state" / "diverged.jsonl").read_text().splitlines()]
    profile = toy_training.profile()
    spec, name = (profile.opd, "opd") if stage == "mt-opd" else (profile.rl, "rl")
    rows = rl_rows(profile.rl, DOMAINS if stage == "mt-opd" else ("math",), profile.seed)
    wanted = batch_of(rows, spec.prompts, 3, toy_training.SEED, name)
    assert [line["item"] for line in saved[::spec.group]] == [row.id for row in wanted]
    assert all(len(line["tokens"]) == len(line["logprobs"]) > 0 for line in saved)
    toy_training.attempt(stage, tmp_path, inputs)
    assert len(read_lines(tmp_path / "out" / "metrics.jsonl")) == toy_training.STEPS
