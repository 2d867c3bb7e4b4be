"""Killed at any moment and started again, a run ends with the bytes of an unbroken one: real processes, real kills."""
from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

STAGE, STEPS = "eval-rl-math", 14


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Path:
    """The smoke profile on math alone, with enough SFT that some answers are right, so that RLVR moves the weights."""
    content = yaml.safe_load((Path(__file__).parent.parent / "params" / "smoke.yaml").read_text())
    content["threads"] = 1
    content["base"] |= {"documents": 60, "steps": 2}
    content["sft"] |= {"rows": 300, "steps": 130, "lr": 8e-3, "blend": [
        {"type": "Math", "domain": "math", "share": 1.0, "pool": 300, "sampling": "random sampling"}]}
    content["rl"] |= {"steps": STEPS, "prompts": 6, "group": 4, "max_new_tokens": 40, "lr": 1e-3, "checkpoint_every": 1,
                      "eval_every": 4, "eval_items": 1}
    content["eval"]["items"] = dict.fromkeys(content["eval"]["items"], 2)
    path = tmp_path_factory.mktemp("profile") / "resume.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(profile: Path, root: Path) -> subprocess.Popen:
    """The command line, in a process group of its own."""
    settings = {"M2RL_ARTIFACTS": str(root), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-m", "m2rl_core", "run", STAGE, "--profile", str(profile)],
                            cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True, start_new_session=True,
                            env={**os.environ, **settings})


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still at work
    process.stdout.close()


def kill_after(process: subprocess.Popen, begin: str, seconds: float) -> str:
    """Read lines until one begins with `begin`, and kill that long after it; returns the line."""
    for line in process.stdout:
        if line.startswith(begin):
            time.sleep(seconds)
            kill(process)
            return line.strip()
    raise AssertionError(f"no line {begin!r}")


def kill_in_checkpoint(process: subprocess.Popen, root: Path, after: str) -> list[str]:
    """Kill as soon as a checkpoint is half written; returns what lay there then."""
    for line in process.stdout:
        if line.startswith(after):
            break
    while True:
        half = [path for state in root.glob("*/models/rl-math-*/state") for path in state.glob("*.partial")]
        if half:
            kill(process)
            return [path.name for path in half if path.is_dir()]
        assert process.poll() is None, "the run ended before a checkpoint was seen"
        time.sleep(0.0002)


def files(root: Path) -> dict[str, bytes]:
    """Every file of the finished stages but for seconds and the manifests, which tell when and how long."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and path.name not in ("manifest.json", "timing.jsonl", ".lock")}


def test_killed_again_and_again_it_ends_with_the_same_bytes(profile, tmp_path):
    """Faults: rollouts drawn from a generator that the crash lost, half a checkpoint taken for a whole one, Adam's
    moments lost, a line of the metrics twice, accuracy on the way missing for steps before the crash."""
    rng = random.Random()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    unbroken = start(profile, whole)  # beside the other, so that the test is short
    moments = [
        kill_after(start(profile, broken), f"sft · step {rng.randrange(101, 125)}/", rng.random() * 0.02),
        kill_after(start(profile, broken), f"rl-math · step {rng.randrange(2, 5)}/{STEPS}", rng.random() * 0.1),
        kill_in_checkpoint(start(profile, broken), broken, "rl-math · step"),
        kill_after(start(profile, broken), "rl-math · step", rng.random() * 0.1),
    ]
    print("killed at:", *moments, sep="\n  ")
    assert moments[2], "no half-written checkpoint was left, so nothing is shown about one"
    last = start(profile, broken)
    said, _ = last.communicate(timeout=600)
    assert last.returncode == 0, said
    first = next(line for line in said.splitlines() if line.startswith("rl-math · step"))
    assert not first.startswith("rl-math · step 1/"), "the last start began from nothing"
    told, _ = unbroken.communicate(timeout=600)
    assert unbroken.returncode == 0, told

    wanted, found = files(whole), files(broken)
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if found[name] != wanted[name]]
    names = {name.split("/")[-1] for name in wanted}
    assert names >= {"model.safetensors", "metrics.jsonl", "along.parquet", "rollouts.jsonl", "rows.parquet"}
    assert not any("state/" in name for name in wanted)
    weights = {name.split("/")[2].rsplit("-", 1)[0]: data
               for name, data in wanted.items() if name.endswith("model.safetensors")}
    steps = next(data for name, data in wanted.items() if "rl-math" in name and name.endswith("metrics.jsonl"))
    assert weights["rl-math"] != weights["sft"] and len(steps.splitlines()) == STEPS
    assert any(json.loads(line)["grad_norm"] > 0 for line in steps.splitlines()[-4:])  # it learned after the kills too
    for path in whole.rglob("manifest.json"):
        here = json.loads((broken / path.relative_to(whole)).read_text())
        assert here["digests"] == json.loads(path.read_text())["digests"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Every kind of training of a toy policy, unbroken and killed four times each."""
    root = tmp_path_factory.mktemp("trained")
    subprocess.run([sys.executable, "tests/toy_training.py", root], cwd=Path(__file__).parent.parent, check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    return root


@pytest.mark.parametrize("stage", ["rl-math", "rl-multi", "mt-opd", "rl-multi-ahead", "mt-opd-ahead", "eval-sft"])
def test_every_kind_of_training_resumes_to_the_same_bytes(trained, stage):
    """Faults: as above, for the mix, distillation and evaluation: a domain's order or a teacher's part lost, a cosine
    or an accuracy on the way that is missing, doubled, or measured on other weights than an unbroken run's; a batch that
    was sampled ahead and is drawn again from newer weights."""
    whole, broken = files(trained / "whole" / stage / "out"), files(trained / "broken" / stage / "out")
    assert {name for name in whole if whole[name] != broken.get(name)} == set() and whole.keys() == broken.keys()
    attempts = [[int(step) for step in part.split()]
                for part in (trained / "broken" / stage / "steps.txt").read_text().split("attempt ")[1:]]
    if stage == "eval-sft":
        assert set(whole) == {"rows.parquet"} and len(attempts) == 2
        return
    assert set(whole) >= {"model.safetensors", "metrics.jsonl", "along.parquet", "rollouts.jsonl"}
    assert ("interference.parquet" in whole) == stage.startswith("rl-multi")
    assert attempts == [[] if stage.endswith("-ahead") else [1], [1, 2], [1, 2, 3], [3], [3, 4, 5, 6]]
    stale = [json.loads(line).get("staleness") for line in whole["metrics.jsonl"].splitlines()]
    assert stale == ([0, 1, 1, 1, 1, 1] if stage.endswith("-ahead") else [None] * 6)
    start = (trained / "models" / "sft" / "model.safetensors").read_bytes()
    assert whole["model.safetensors"] != start
    assert all(json.loads(line)["grad_norm"] > 0 for line in whole["metrics.jsonl"].splitlines())
