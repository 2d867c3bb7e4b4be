"""`overlap: 1`: what is sampled ahead, from which weights, what importance sampling makes of it, and how it ends."""
from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_policy
import toy_training
import torch
import yaml

from m2rl_core.engines import TORCH, TorchEngine, rollout
from m2rl_core.errors import StudyError
from m2rl_core.profile import ProfileError, load_profile
from m2rl_core.study import study
from m2rl_core import threads
from m2rl_core.training import batches, collect, grpo
from m2rl_core.training.batches import PENDING, Batches
from m2rl_core.training.losses import Loss
from m2rl_core.training.trainer import read_lines

SPEC = dataclasses.replace(load_profile("smoke").rl, prompts=4, group=3, max_new_tokens=8, overlap=1)


@pytest.fixture(scope="module")
def inputs(policy, tmp_path_factory):
    """The folders of a start and of five experts."""
    return toy_training.models(policy, tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def rewards_by_text(monkeypatch):
    monkeypatch.setattr(collect, "rewards", toy_training.by_text)


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """Fault: a thread that outlives its run."""
    yield
    assert ahead() == []


def ahead() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "m2rl-batch"]


class Held(TorchEngine):
    """Every sampling of a thread waits until it is let go, at first for the start of it."""

    def __init__(self):
        self.go = threading.Event()

    def sample(self, *args, **settings):
        if threading.current_thread() is not threading.main_thread():
            assert self.go.wait(30)
        return rollout.sample(*args, **settings)


def batches_of(policy, rows, engine=TORCH, spec=SPEC, steps=9) -> Batches:
    return Batches(SimpleNamespace(seed=5), spec, "rl", policy, rows, engine, steps)


def pull(policy) -> None:
    """What an update is to a sampler: all weights change, in place."""
    with torch.no_grad():
        for name in sorted(policy.weights):
            policy.weights[name] *= 1.2


def essence(rollouts) -> list[tuple]:
    return [(r.row.id, r.prompt, r.tokens, r.sampled, r.logprobs, r.turns, r.truncated) for r in rollouts]


# ---- which weights

def test_a_batch_is_of_the_weights_before_the_last_update(policy, toy_rows):
    """Faults: weights that change under the sampler; two updates of staleness, or none; a copy that is never made again."""
    learner, engine = toy_policy.clone(policy), Held()
    learner.requires_grad()
    before, found = [], []
    with batches_of(learner, toy_rows, engine, steps=4) as source:
        for step in range(4):
            before.append(toy_policy.clone(learner))
            engine.go.clear()
            found.append(source(step))
            assert len(ahead()) == (step < 3)  # nothing is sampled for a step that never comes
            pull(learner)  # before the first token of the next batch is drawn
            engine.go.set()
            source.settle()
    for step, (rollouts, _, scores, seconds) in enumerate(found):
        sampler = before[max(0, step - 1)]
        rows = batches.batch_of(toy_rows, SPEC.prompts, step, 5, "rl")
        wanted, _, its, _ = collect.collect(sampler, rows, SPEC, 5 * 100_003 + step)
        assert essence(rollouts) == essence(wanted) and torch.equal(scores, its)
        recorded = torch.tensor([p for r in rollouts for p in r.logprobs])
        near, far = (float((recorded - torch.cat(rollout.logprobs(p, rollouts))).abs().max())
                     for p in (sampler, before[step]))
        assert near < 1e-4 and (far > 0.05) == (step > 0)
        assert set(seconds) == {"seconds_sample", "seconds_verify"}


def test_without_overlap_nothing_runs_beside(policy, toy_rows, monkeypatch):
    """Faults: a thread, a copy of the weights or a new column for those who did not ask for it."""
    monkeypatch.setattr(batches, "Beside", None)
    monkeypatch.setattr(batches, "copied", None)
    source = batches_of(policy, toy_rows, spec=dataclasses.replace(SPEC, overlap=0))
    with source:
        found = source(3)
        assert source.settle() == source.staleness(3) == {}
    wanted = collect.collect(policy, batches.batch_of(toy_rows, 4, 3, 5, "rl"), SPEC, 5 * 100_003 + 3)
    assert essence(found[0]) == essence(wanted[0])


@pytest.mark.parametrize("kind", ["tis", "mis"])
def test_gradient_on_stale_tokens_is_the_formula(policy, toy_rows, kind):
    """Faults: the staleness in the clipped ratio, where it would cut other tokens; a ratio upside down; a masked token
    that counts. The reference scores the tokens by transformers under both policies."""
    present = toy_policy.nudged(policy, 0.08)
    rollouts = rollout.sample(policy, toy_rows[:5], 3, generator=torch.Generator().manual_seed(2), max_new_tokens=20)
    loss = Loss.of(SPEC, is_correction=kind, is_low=0.8, is_high=1.25)
    advantage = torch.tensor([[1.0, -0.6, 0.3]] * 5)
    present.requires_grad()
    used, update = grpo.learner(present, rollouts, advantage, loss, 20)
    stats = update(used)
    old, new = (toy_policy.transformers_model(p) for p in (policy, present))
    weights, gaps = [], []
    with torch.no_grad():
        for r in rollouts:
            logps = [toy_policy.plain_logps(m, r).gather(1, toy_policy.said(r)[:, None])[:, 0] for m in (old, new)]
            ratio = (logps[1] - logps[0]).exp()
            gaps.append((logps[1] - logps[0]).abs())
            weights.append(ratio.clamp(max=1.25) if kind == "tis" else ratio * ((ratio >= 0.8) & (ratio <= 1.25)))
    wanted = toy_policy.plain_gradient(present, rollouts, advantage.flatten().tolist(), len(rollouts), weights)
    assert toy_policy.furthest(toy_policy.gradients(present), wanted) < 1e-5
    kept = sum(int((w > 0).sum()) for w in weights) / sum(map(len, weights))
    assert stats["kept"] == pytest.approx(kept) and (0.3 < kept < 0.97) == (kind == "mis")
    assert stats["mismatch_mean"] == pytest.approx(float(torch.cat(gaps).mean()), rel=1e-3)


# ---- whole runs

def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "out").iterdir() if p.name != "timing.jsonl"}


def run(stage: str, folder: Path, inputs) -> dict[str, bytes]:
    folder.mkdir()
    toy_training.attempt(stage, folder, inputs)
    return files(folder)


def test_threads_have_no_influence_on_the_bytes(inputs, tmp_path, monkeypatch):
    """Faults: numbers from a generator that both threads draw from; weights that were half updated when they were copied;
    an evaluation amid a batch. And what is recorded: staleness, and a mismatch that it makes."""
    quick = run("rl-math-ahead", tmp_path / "quick", inputs)
    clip, result, asked = torch.nn.utils.clip_grad_norm_, threads.Beside.result, threading.Event()

    def late(*args):  # not before the weights have been updated
        assert asked.wait(60)
        asked.clear()
        time.sleep(0.15)
        return collect.share(*args)
    with monkeypatch.context() as patch:
        patch.setattr(batches, "share", late)
        patch.setattr(threads.Beside, "result", lambda self: (self.name == "m2rl-batch" and asked.set(), result(self))[1])
        assert run("rl-math-ahead", tmp_path / "sampler-late", inputs) == quick
    with monkeypatch.context() as patch:  # the weights are updated when all is sampled
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: ([t.join() for t in ahead()], clip(*args))[1])
        assert run("rl-math-ahead", tmp_path / "update-late", inputs) == quick

    plain = run("rl-math", tmp_path / "plain", inputs)
    assert plain["model.safetensors"] != quick["model.safetensors"] and plain.keys() == quick.keys()
    mine, its = (read_lines(tmp_path / name / "out" / "metrics.jsonl") for name in ("quick", "plain"))
    assert [line.pop("staleness") for line in mine] == [0, 1, 1, 1, 1, 1]
    assert mine[0] == its[0] and all(a.keys() == b.keys() for a, b in zip(mine, its, strict=True))
    assert all(line["mismatch"] < 1e-4 for line in its) and mine[0]["mismatch"] < 1e-4
    assert all(line["mismatch"] > 1e-3 for line in mine[1:])
    timing = read_lines(tmp_path / "quick" / "out" / "timing.jsonl")
    assert ["seconds_wait" in line for line in timing] == [True] * 5 + [False]
    waits = [line["seconds_wait"] for line in read_lines(tmp_path / "sampler-late" / "out" / "timing.jsonl")[:-1]]
    assert min(waits) > 0.15  # who waits for the sampler sees it in the seconds of the step
    assert all(line["seconds"] >= line.get("seconds_wait", 0) for line in timing)


def test_a_batch_that_was_kept_is_the_one_that_was_sampled(policy, toy_rows, tmp_path):
    """Faults: log-probs or scores that lose digits on the way; tools' tokens taken for the policy's; another step's batch."""
    learner = toy_policy.clone(policy)
    with batches_of(learner, toy_rows) as source:
        source(0)
        source.settle()
        source.write(tmp_path)
        again = batches_of(learner, toy_rows)
        again.read(tmp_path, 1)
        for mine, its in zip(source.ready[0], again.ready[0], strict=True):
            assert mine == its and mine.row == its.row
        assert source.ready[1] == again.ready[1] and torch.equal(source.ready[2], again.ready[2])
        assert source.ready[3] == again.ready[3]
        with pytest.raises(StudyError, match="pending.jsonl: not the batch of step 3 .*its items .*; remove .* to begin the"):
            again.read(tmp_path, 2)
        whole = (tmp_path / PENDING).read_text()
        (tmp_path / PENDING).write_text(whole[:len(whole) // 2])
        with pytest.raises(StudyError, match="not the batch of step 2 ") as caught:
            again.read(tmp_path, 1)
        assert "\n" not in str(caught.value)
        (tmp_path / PENDING).unlink()
        with pytest.raises(StudyError, match="not the batch of step 2 .*No such file"):
            again.read(tmp_path, 1)


# ---- how it ends

class Failing(TorchEngine):
    """The third sampling, a thread's, raises or never ends."""

    def __init__(self, hang: bool = False):
        self.hang, self.calls, self.hanging = hang, 0, threading.Event()

    def sample(self, *args, **settings):
        self.calls += 1
        if self.calls == 3:
            for _ in range(6000 * self.hang):  # a minute
                self.hanging.set()
                time.sleep(0.01)
            raise StudyError("agent/00003: prompt of 900 tokens, but 374 fit")
        return rollout.sample(*args, **settings)


def test_what_fails_in_the_thread_is_the_usual_line(inputs, tmp_path, monkeypatch):
    """Faults: an error that ends a thread and nobody hears of; the trainer that waits for a batch which never comes."""
    monkeypatch.setattr(grpo, "open_engine", lambda profile: Failing())
    with pytest.raises(StudyError, match="^agent/00003: prompt of 900 tokens, but 374 fit$"):
        run("rl-math-ahead", tmp_path / "run", inputs)
    assert not (tmp_path / "run" / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("where", ["waiting", "updating"])
def test_an_interrupt_stops_both(inputs, tmp_path, monkeypatch, where):
    """Faults: Ctrl-C that the trainer notices after the sampler has ended; a sampler that goes on in the notebook."""
    engine = Failing(hang=True)
    monkeypatch.setattr(grpo, "open_engine", lambda profile: engine)

    def interrupt():
        engine.hanging.wait(30)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
    if where == "updating":
        real = torch.nn.utils.clip_grad_norm_
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: (
            time.sleep(30 * engine.hanging.wait(0.2)), real(*args))[1])
    threading.Thread(target=interrupt).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run("rl-math-ahead", tmp_path / "run", inputs)
    assert time.monotonic() - start < 20 and ahead() == []


# ---- profiles and keys

@pytest.mark.parametrize(("group", "settings", "message"), [
    ("rl", {"overlap": 2}, r"rl.overlap: 2 is neither 0 nor 1"),
    ("rl", {"overlap": True}, r"rl.overlap: expected int, found True"),
    ("rl", {"overlap": 1, "is_correction": "none"}, r"rl.overlap: 1 samples with weights .*set it to mis or tis, or overl"),
    ("opd", {"overlap": 1, "is_correction": "none"}, r"opd.overlap: 1 samples .* opd.is_correction: none would"),
    ("opd", {"overlap": 1, "loss": "full"}, r"opd.overlap: 1 needs importance weights, which opd.loss: full has not"),
])
def test_what_would_be_biased_is_refused(tmp_path, group, settings, message):
    """Fault: an overlap whose gradient is another policy's, without a word."""
    content = yaml.safe_load((Path(__file__).parent.parent / "params" / "smoke.yaml").read_text())
    content[group] |= settings
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_keys_change_where_the_results_do_and_nowhere_else():
    """Faults: policies that were trained before are made again; an overlapping run taken for one that does not."""
    smoke = load_profile("smoke")
    plain = study(smoke)
    assert not [name for name, stage in plain.items() if "overlap" in json.dumps(stage.settings)]
    rl = study(dataclasses.replace(smoke, rl=dataclasses.replace(smoke.rl, overlap=1)))
    assert rl["rl-math"].settings["overlap"] == 1 and rl["rl-math"].key != plain["rl-math"].key
    assert rl["mt-opd"].settings == plain["mt-opd"].settings and rl["sft"].key == plain["sft"].key
    opd = study(dataclasses.replace(smoke, opd=dataclasses.replace(smoke.opd, overlap=1)))
    assert opd["mt-opd"].settings["overlap"] == 1 and opd["rl-multi"].key == plain["rl-multi"].key
