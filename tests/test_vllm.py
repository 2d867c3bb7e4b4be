"""The vLLM engine, for real: its own process in .venv-vllm, on a CPU. `make test` makes that environment first.

One process serves all tests of this file but those that need a dying, a missing or another one.
"""
from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import toy_policy
import yaml
from scipy import stats

from m2rl_core import engines
from m2rl_core.domains import BENCHMARKS, Verdict, module, rewards
from m2rl_core.engines import rollout, vllm_engine, vllm_link
from m2rl_core.engines.rollout import Rollout, response_hidden
from m2rl_core.engines.vllm_engine import VllmEngine
from m2rl_core.errors import StudyError
from m2rl_core.evaluate import evaluate, items_of
from m2rl_core.models import policy as policies
from m2rl_core.models.policy import Policy, encode_prompt
from m2rl_core.models.qwen3 import token_logprobs
from m2rl_core.profile import load_profile, repo_root
from m2rl_core.run import open_run
from m2rl_core import threads
from m2rl_core.training import batches, collect, grpo

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux")

NEAR = 1e-4  # vLLM's log-probs beside torch's, in nats: 3e-6 to 1e-5 are seen in float32, a fault makes 0.05 and more
SPEC = dataclasses.replace(toy_policy.SPEC, head_dim=32)  # the smallest that vLLM's attention has on a CPU
SMOKE = load_profile("smoke")


@pytest.fixture(scope="module")
def toy(words):
    """A tiny random policy that vLLM can run."""
    return toy_policy.make(words, spec=SPEC)


@pytest.fixture(scope="module")
def engine():
    with VllmEngine(threads=2) as opened:
        yield opened


@pytest.fixture
def loads(engine, monkeypatch):
    """How often weights were sent while a test ran; a list that grows."""
    seen, fill = [], vllm_link.Memory.fill
    monkeypatch.setattr(vllm_link.Memory, "fill", lambda self, policy: (seen.append(policy), fill(self, policy)))
    return seen


def draw(engine, policy, rows, n=2, seed=3, **settings):
    settings = {"max_new_tokens": 40, **settings}
    return engine.sample(policy, rows, n, generator=torch.Generator().manual_seed(seed), **settings)


def mismatch(policy, rollouts, temperature=1.0) -> float:
    """The largest difference of a recorded log-prob to the trainer's, in nats."""
    recorded = [torch.tensor([p for p, s in zip(r.logprobs, r.sampled, strict=True) if s]) for r in rollouts]
    return max(float((a - b).abs().max()) for a, b in zip(
        recorded, rollout.logprobs(policy, rollouts, temperature), strict=True))


# ---- what is drawn and recorded

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_the_trainers(engine, toy, toy_rows, temperature):
    """Faults: log-probs before the temperature, or after a truncation that nobody asked for; a packed copy of the tied
    head that keeps vLLM's random weights; an end marker left out, or only one of the two honoured."""
    found = draw(engine, toy, toy_rows, n=4, temperature=temperature)
    assert mismatch(toy, found, temperature) < NEAR
    assert mismatch(toy, found, 1.7 - temperature) > 0.05
    assert [r.row for r in found] == [row for row in toy_rows for _ in range(4)]
    assert {r.tokens[-1] for r in found if not r.truncated} == set(toy.stop_ids)
    assert not any(t in toy.stop_ids for r in found for t in r.tokens[:-1])
    assert any(r.truncated for r in found)
    for r in found:
        said = r.tokens if r.truncated else r.tokens[:-1]
        assert r.turns == [toy.tokenizer.decode(said)] and (r.length == 40 or not r.truncated)


def test_draws_follow_the_generator(engine, toy, toy_rows):
    """Faults: a seed that does nothing; one draw for the whole group; a draw that depends on companions."""
    first, again, other = (draw(engine, toy, toy_rows, seed=seed) for seed in (3, 3, 4))
    assert [r.tokens for r in first] == [r.tokens for r in again]
    assert [r.tokens for r in first] != [r.tokens for r in other]
    assert sum(a.tokens != b.tokens for a, b in zip(first[::2], first[1::2], strict=True)) > 10  # of 15 pairs


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_softmax(engine, toy, toy_rows, temperature):
    """Faults: seeds whose draws hang together; the wrong temperature; top-k or top-p of a model's folder."""
    n = 2000
    found = draw(engine, toy, toy_rows[:1], n=n, max_new_tokens=1, temperature=temperature)
    with torch.no_grad():
        model = toy_policy.transformers_model(toy)
        share = toy_policy.plain_logps(model, found[0], temperature)[0].exp().double()
    seen = torch.bincount(torch.tensor([r.tokens[0] for r in found]), minlength=len(share)).double()
    rare = share * n < 8
    expected = torch.cat((share[~rare] * n, (share[rare].sum() * n)[None]))
    counted = torch.cat((seen[~rare], seen[rare].sum()[None]))
    assert len(expected) > 8
    assert stats.chisquare(counted.numpy(), (expected * n / expected.sum()).numpy()).pvalue > 1e-3


def test_top_p_is_that_of_the_torch_sampler(engine, toy, toy_rows):
    """Faults: a truncation that is asked for and not made, or by another rule than the torch sampler's; log-probs of the
    distribution before it."""
    found = draw(engine, toy, toy_rows[:1], n=400, max_new_tokens=1, top_p=0.6)
    with torch.no_grad():
        model = toy_policy.transformers_model(toy)
        kept = rollout.nucleus(toy_policy.plain_logps(model, found[0])[:1], 0.6)[0]
    assert {r.tokens[0] for r in found} <= set((kept > -torch.inf).nonzero()[:, 0].tolist())
    assert max(abs(r.logprobs[0] - float(kept[r.tokens[0]])) for r in found) < 1e-3


def test_new_weights_are_used_at_once_and_sent_once(engine, toy, toy_rows, loads):
    """Faults: keys and values, or packed matrices, of the old weights kept; weights sent at every call; a policy that
    lies where a freed one lay taken for it."""
    moving = toy_policy.clone(toy)
    before = draw(engine, moving, toy_rows)
    draw(engine, moving, toy_rows, seed=9)
    assert len(loads) == 1
    for w in moving.weights.values():
        w.mul_(1.1)
    after = draw(engine, moving, toy_rows)  # the same prompts, so the prefix cache would have them
    assert len(loads) == 2 and mismatch(moving, after) < NEAR < 0.05 < mismatch(moving, before)
    for seed in range(3):
        other = toy_policy.nudged(toy, 0.3, seed)
        assert mismatch(other, draw(engine, other, toy_rows[:3])) < NEAR
        del other  # the next one may get its memory
    assert len(loads) == 5


def test_a_prompt_without_room_is_refused_as_torch_does(engine, toy, toy_rows):
    """Fault: another message, or a prompt that vLLM cuts."""
    size = len(encode_prompt(toy, toy_rows[2].messages))
    small = Policy(toy.weights, copy.deepcopy(toy.config), toy.tokenizer)
    small.config.max_position_embeddings = size + 7
    with pytest.raises(StudyError) as wanted:
        rollout.sample(small, toy_rows[2:3], 1, generator=torch.Generator(), max_new_tokens=8)
    with pytest.raises(StudyError) as found:
        draw(engine, small, toy_rows[2:3], max_new_tokens=8)
    assert str(found.value) == str(wanted.value)


# ---- scoring

def test_given_tokens_are_scored_as_the_trainer_does(engine, toy, played, toy_rows):
    """Faults: scores one token off; tools' tokens among them; no room left after a rollout that fills the context."""
    prompt = encode_prompt(toy, toy_rows[0].messages)
    left = toy.config.max_position_embeddings - len(prompt)
    full = Rollout(toy_rows[0], prompt, [5 + i % 90 for i in range(left)], [True] * left)
    rollouts = [*played, full]
    assert any(not all(r.sampled) for r in rollouts)
    found = engine.logprobs(toy, rollouts)
    assert [len(p) for p in found] == [r.length for r in rollouts]
    wanted = rollout.logprobs(toy, rollouts)
    assert max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) < NEAR
    with pytest.raises(StudyError, match="temperature 1 only"):
        engine.logprobs(toy, rollouts, 0.7)


# ---- several turns

@pytest.fixture(scope="module")
def caller(toy, episodes):
    """The policy after it has learnt by heart what to say in three agent episodes, call by call."""
    learnt = toy_policy.clone(toy)
    scripts = [toy_policy.script_of(learnt, row, module("agent").respond(row, worked=False)) for row in episodes]
    rollouts = [Rollout(row, encode_prompt(learnt, row.messages, row.tools), *script)
                for row, script in zip(episodes, scripts, strict=True)]
    optimizer = torch.optim.Adam(learnt.requires_grad(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        hidden, tokens, _ = response_hidden(learnt, rollouts)
        (-token_logprobs(learnt.weights, hidden, tokens)[0].mean()).backward()
        optimizer.step()
    for w in learnt.weights.values():
        w.requires_grad_(False)
    return learnt, rollouts


def test_tools_answer_between_turns(engine, caller, toy_rows):
    """Faults: a tool's tokens counted as sampled or missing, a turn that starts anew without what was said, the wrong
    rollout's environment, a cached turn of other tokens. One-turn rows run in the same batch."""
    policy, wanted = caller
    rows = [wanted[0].row, toy_rows[0], wanted[1].row, wanted[2].row]
    found = draw(engine, policy, rows, n=3, temperature=0.3, max_new_tokens=160)
    assert mismatch(policy, found, 0.3) < NEAR
    agents = [r for r in found if r.row.domain == "agent"]
    right = [r for r in agents if any(r.tokens == w.tokens and r.sampled == w.sampled for w in wanted if w.row is r.row)]
    assert len(right) >= 5 and {v.score for v in rewards([r.row for r in right], [r.turns for r in right])} == {1.0}
    for r in right:
        assert len(r.turns) == 3 and not r.truncated
        assert [p == 0 for p, s in zip(r.logprobs, r.sampled, strict=True) if not s] == [True] * r.sampled.count(False)


def test_turns_and_tokens_are_bounded_over_the_whole_rollout(engine, caller):
    """Faults: the budget granted anew each turn; one turn too many; a rollout that ends inside a turn not told."""
    policy, wanted = caller
    row, first = wanted[0].row, wanted[0].sampled.index(False)
    one = draw(engine, policy, [row], n=4, temperature=0.1, max_new_tokens=160, max_turns=1)
    assert all(r.tokens == wanted[0].tokens[:first] and not r.truncated for r in one)
    cut = draw(engine, policy, [row], n=4, temperature=0.1, max_new_tokens=first + 5)
    assert all(r.length == first + 5 and r.truncated and len(r.turns) == 2 for r in cut)
    spent = draw(engine, policy, [row], n=4, temperature=0.1, max_new_tokens=first)
    assert all(r.tokens == wanted[0].tokens[:first] and r.truncated and len(r.turns) == 1 for r in spent)


# ---- as an engine of the study

def test_profiles_choose_the_engine():
    """Fault: a key that does nothing."""
    assert engines.open_engine(SMOKE) is engines.TORCH
    opened = engines.open_engine(dataclasses.replace(SMOKE, engine="vllm", threads=3, gpu_memory=0.7))
    assert isinstance(opened, VllmEngine) and (opened.threads, opened.gpu_memory) == (3, 0.7)
    assert not opened.links  # nothing starts before something is asked


def few_steps(engine, toy, tmp_path, monkeypatch, **settings) -> SimpleNamespace:
    """What `grpo.build` is to make of the toy in three steps, by the module's process, which the stage does not end."""
    policies.save(toy, tmp_path / "sft")
    rl = dataclasses.replace(SMOKE.rl, **{"prompts": 4, "group": 4, "max_new_tokens": 16, "lr": 0.02, "eval_every": 2,
                                          "eval_items": 1, **settings})
    profile = dataclasses.replace(SMOKE, engine="vllm", rl=rl)

    class Kept:
        sample, logprobs, stop = engine.sample, engine.logprobs, lambda self: None
        __enter__, __exit__ = (lambda self: self), (lambda self, *_: None)

    monkeypatch.setattr(grpo, "open_engine", lambda asked: Kept() if asked.engine == "vllm" else None)
    monkeypatch.setattr(collect, "rewards", lambda rows, turns: [Verdict(float(len(t[0]) % 2), "") for t in turns])
    return SimpleNamespace(profile=profile, stage=SimpleNamespace(name="rl-math", settings={"steps": 3}), seed=1,
                           inputs={"sft": tmp_path / "sft"}, out=tmp_path / "out", state=tmp_path / "out" / "state",
                           progress=SimpleNamespace(step=lambda *a, **k: None))


def test_grpo_steps_with_new_weights_each(engine, toy, tmp_path, monkeypatch, loads):
    """Faults: a step that samples with the weights of the step before; an evaluation on the way by another engine; the
    correction fed with something else than vLLM's log-probs."""
    ctx = few_steps(engine, toy, tmp_path, monkeypatch)
    grpo.build(ctx)
    steps = [json.loads(line) for line in (ctx.out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3 and len(loads) == 4  # one a step, and the last for the evaluation after the third
    assert all(step["grad_norm"] > 0 and 0 < step["mismatch"] < NEAR and step["kept"] == 1 for step in steps)
    moved = policies.load(ctx.out)
    assert max(float((moved.weights[n] - w).abs().max()) for n, w in toy.weights.items()) > 0.01
    along = pd.read_parquet(ctx.out / "along.parquet")
    assert sorted(along["step"].unique()) == [2, 3] and set(along["benchmark"]) == set(BENCHMARKS)


def test_it_samples_ahead_while_the_trainer_computes(engine, toy, tmp_path, monkeypatch):
    """Faults: a sampling that begins when the update has ended, or ends it; weights that vLLM takes amid a batch, or two
    updates old. The trainer computes without a pause until the next batch is there."""
    ctx = few_steps(engine, toy, tmp_path, monkeypatch, overlap=1)
    copies, learnt, sampling, updating = [], [], [], []
    copied, learner, share = batches.copied, grpo.learner, batches.share

    def seen_copied(policy, into):
        copies.append(toy_policy.clone(policy))
        return copied(policy, into)

    def seen_share(*args):
        start = time.perf_counter()
        found = share(*args)
        sampling.append((start, time.perf_counter()))
        return found

    def seen_learner(policy, rollouts, *args):
        learnt.append(rollouts)
        used, update = learner(policy, rollouts, *args)

        def busy(part):
            start, stats = time.perf_counter(), update(part)
            matrix = torch.eye(64)
            while len(copies) > len(sampling) and time.perf_counter() < start + 120:
                matrix = matrix @ matrix
            updating.append((start, time.perf_counter()))
            return stats
        return used, busy
    monkeypatch.setattr(batches, "copied", seen_copied)
    monkeypatch.setattr(batches, "share", seen_share)
    monkeypatch.setattr(grpo, "learner", seen_learner)
    grpo.build(ctx)
    assert len(learnt) == len(updating) == 3 and len(sampling) == len(copies) == 2
    for (begin, end), (start, stop) in zip(sampling, updating, strict=False):
        assert min(end, stop) - max(begin, start) > 0.8 * (end - begin)
    assert mismatch(toy, learnt[0]) < NEAR
    for sampler, rollouts in zip(copies, learnt[1:], strict=True):
        assert mismatch(sampler, rollouts) < NEAR
    assert mismatch(copies[1], learnt[1]) > 0.01
    steps = [json.loads(line) for line in (ctx.out / "metrics.jsonl").read_text().splitlines()]
    assert [step["staleness"] for step in steps] == [0, 1, 1]
    assert steps[0]["mismatch"] < NEAR and all(step["mismatch"] > 0.01 for step in steps[1:])
    along = pd.read_parquet(ctx.out / "along.parquet")
    assert sorted(along["step"].unique()) == [2, 3]


def test_what_samples_ahead_is_stopped(toy, toy_rows):
    """Fault: after Ctrl-C the thread waits for vLLM, or starts it once more when its process is gone."""
    before, begun, real = workers(), threading.Event(), vllm_link.Local.ask
    with VllmEngine(threads=1) as own, pytest.MonkeyPatch.context() as patch:
        draw(own, toy, toy_rows[:1], 1)
        patch.setattr(vllm_link.Local, "ask", lambda self, **request: (begun.set(), real(self, **request))[1])
        thread = threads.Beside(lambda: draw(own, toy, toy_rows, 64, max_new_tokens=200), "m2rl-batch")
        thread.start()
        assert begun.wait(60)
        start = time.monotonic()
        thread.stop()
        own.stop()
        thread.join(30)
        assert not thread.is_alive() and time.monotonic() - start < 25 and thread.error is not None
        assert own.links == [] and workers() == before


def test_an_evaluation_is_asked_and_scored_as_ever(engine, toy):
    """Fault: rows, samples or verdicts that hang on the engine."""
    spec = dataclasses.replace(SMOKE.eval, items=dict.fromkeys(BENCHMARKS, 2), max_new_tokens=12)
    items, k = items_of(spec, 1), dict.fromkeys(BENCHMARKS, 2)
    ours, theirs = (evaluate(toy, "one", items, k, spec, 1, e) for e in (engines.TORCH, engine))
    same = ["model", "benchmark", "domain", "category", "item", "sample", "prompt"]
    pd.testing.assert_frame_equal(ours[same], theirs[same])
    assert theirs["tokens"].between(1, 12).all() and (theirs["response"] != ours["response"]).mean() > 0.7
    pd.testing.assert_frame_equal(theirs, evaluate(toy, "one", items, k, spec, 1, engine))


def workers() -> set[int]:
    """Process ids of vLLM workers that this process started."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in children if "vllm_worker" in Path(f"/proc/{pid}/cmdline").read_text()}


def test_a_stage_runs_by_its_profile_and_gives_everything_back(tmp_path):
    """Faults: a builder that samples by torch in spite of the key; a process that stays; a manifest that does not say
    which vLLM it was."""
    content = yaml.safe_load((repo_root() / "params" / "smoke.yaml").read_text()) | {"engine": "vllm"}
    content["model"]["head_dim"] = SPEC.head_dim
    content["base"] |= {"documents": 60, "steps": 2}
    content["eval"] |= {"items": dict.fromkeys(BENCHMARKS, 2), "k": dict.fromkeys(BENCHMARKS, 1)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    run, before = open_run(tmp_path / "mine.yaml", tmp_path), workers()
    assert len(run.scores(["base"])) == 2 * len(BENCHMARKS)
    assert run.manifest("eval-base")["packages"]["vllm"] == vllm_engine.version() != "not installed"
    assert run.manifest("eval-base")["settings"]["engine"] == "vllm" and "vllm" not in run.manifest("base")["packages"]
    assert workers() == before


# ---- when it is not there, and when it goes away

def test_a_missing_vllm_is_one_line_with_the_mend(toy, toy_rows, tmp_path):
    """Fault: a traceback of the worker's, or an answer that is waited for in vain."""
    for python in (tmp_path / "nowhere", Path(sys.executable)):
        if python.exists() and importlib.util.find_spec("vllm"):
            continue  # a machine with vLLM beside everything else
        with pytest.raises(StudyError) as caught:
            draw(VllmEngine(2, python=python), toy, toy_rows[:1])
        assert "make vllm" in str(caught.value) and str(python) in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_vllm_cannot_run_is_one_line(words, toy_rows):
    """Fault: a restart, or a dead end without vLLM's reason."""
    with VllmEngine(2) as opened, pytest.raises(StudyError) as caught:
        draw(opened, toy_policy.make(words), toy_rows[:1])
    assert "16" in str(caught.value) and "\n" not in str(caught.value)


def test_it_is_started_again_once(engine, toy, toy_rows, capsys):
    """Faults: a death that ends the run, or loses the weights; a second one that is hidden for ever."""
    wanted = draw(engine, toy, toy_rows, n=8, max_new_tokens=120)
    first = engine.links[0]
    killed = threading.Timer(0.2, os.kill, (first.process.pid, signal.SIGKILL))
    killed.start()
    found = draw(engine, toy, toy_rows, n=8, max_new_tokens=120)  # takes longer than that
    assert engine.links[0] is not first and engine.died
    assert [r.tokens for r in found] == [r.tokens for r in wanted] and mismatch(toy, found) < NEAR
    assert capsys.readouterr().out.count("started once more") == 1
    folder = engine.links[0].folder
    os.kill(engine.links[0].process.pid, signal.SIGKILL)
    with pytest.raises(StudyError, match="vLLM died twice") as caught:
        draw(engine, toy, toy_rows)
    assert "\n" not in str(caught.value) and not engine.links
    assert not folder.exists() and not first.folder.exists()


def test_replicas_share_the_rows_and_the_weights(engine, toy, toy_rows, capsys):
    """Catches answers in the order of processes, weights that only one has, and a death that the other does not survive."""
    with VllmEngine(threads=2, replicas=2) as pair:
        both = draw(pair, toy, toy_rows[:3], n=3)
        assert [r.row.id for r in both] == [row.id for row in toy_rows[:3] for _ in range(3)]
        assert [r.tokens for r in both] == [r.tokens for r in draw(engine, toy, toy_rows[:3], n=3)]
        assert mismatch(toy, both) < NEAR and len({process.process.pid for process in pair.links}) == 2
        moved = toy_policy.clone(toy)
        for w in moved.weights.values():
            w.mul_(1.1)
        assert mismatch(moved, draw(pair, moved, toy_rows[:3], n=3)) < NEAR
        os.kill(pair.links[1].process.pid, signal.SIGKILL)
        assert mismatch(moved, draw(pair, moved, toy_rows[:1], n=3)) < NEAR and pair.died
    assert capsys.readouterr().out.count("started once more") == 1 and not pair.links


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each part of the model needs a core")
def test_a_model_in_two_parts_takes_new_weights_in_both(toy, toy_rows):
    """Catches weights that only the first process of a parallel model gets, or whole ones where it holds a part."""
    moved = toy_policy.clone(toy)
    with VllmEngine(threads=2, tensor_parallel=2) as parts:
        assert mismatch(moved, draw(parts, moved, toy_rows[:2])) < NEAR
        for w in moved.weights.values():
            w.mul_(1.1)
        assert mismatch(moved, draw(parts, moved, toy_rows[:2])) < NEAR


def test_gpus_are_dealt_out_and_too_few_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    assert vllm_engine._gpus(4, 2) == ["3,5", "6,7"] and vllm_engine._gpus(1, 1) == []
    with pytest.raises(StudyError, match="is 8 GPUs, but 4 are here"):
        vllm_engine._gpus(8, 2)


def test_it_does_not_outlive_its_parent(words, tmp_path):
    """Fault: an orphan that holds a GPU's memory."""
    policies.save(toy_policy.make(words, spec=SPEC), tmp_path / "model")
    code = ("import sys, torch; from pathlib import Path; from m2rl_core.models import policy; from m2rl_core.domains import "
            "training_rows; from m2rl_core.engines.vllm_engine import VllmEngine\n"
            "VllmEngine(1).sample(policy.load(Path(sys.argv[1])), training_rows('math', 'rl', 1, 1), 1, "
            "generator=torch.Generator(), max_new_tokens=8)")
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "model")],
                              env=os.environ | {"TMPDIR": str(tmp_path)})
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    deadline = time.monotonic() + 60
    while not (found := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = Path(f"/proc/{found[0]}/cmdline")
    while "vllm_worker" not in worker.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)  # past the interpreter's start, in the middle of vLLM's
    parent.kill()
    parent.wait()
    while worker.exists() and worker.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists() or not worker.read_text()
    assert not list(tmp_path.glob("m2rl-vllm-*"))  # its folder goes with it
