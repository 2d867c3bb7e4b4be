"""A short smoke study whose expert several processes make, and who of them is still there; for tests of launches."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from whole_study import ROOT, environment_in

from m2rl_core.jobs import launch, locks
from m2rl_core.training.trainer import read_lines

TWO = {"processes": 2, "config": str(ROOT / "params" / "accelerate" / "cpu-2.yaml")}
STEPS = 12


def small(folder: Path, rl: dict | None = None) -> Path:
    """A short smoke study in which every step has a gradient; `rl` is what its policies take."""
    content = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    content["base"] |= {"documents": 60, "steps": 2}
    content["sft"] |= {"rows": 60, "steps": 2, "warmup": 0, "blend": [
        {"type": "Math", "domain": "math", "share": 1.0, "pool": 60, "sampling": "random sampling"}]}
    content["rl"] |= {"steps": STEPS, "eval_every": STEPS, "eval_items": 1, "entropy": 0.01}
    content["eval"]["items"] = dict.fromkeys(content["eval"]["items"], 1)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content | ({"resources": {"rl": rl}} if rl else {})))
    return path


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """The command line on the small study of a folder."""
    command = [sys.executable, "-m", "m2rl_core", *arguments, "--profile", str(folder / "small.yaml")]
    return subprocess.Popen(command, cwd=folder, env=environment_in(folder) | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def make_by_one(folder: Path) -> Path:
    """The small study in a folder, in which one process makes rl-math."""
    small(folder)
    process = start(folder, "run", "rl-math")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return folder


def beginning(one: Path, folder: Path, rl: dict | None) -> Path:
    """The small study in a folder, its SFT model made; the store."""
    small(folder, rl)
    store = folder / "artifacts" / "small"
    for made in (one / "artifacts" / "small" / "models").iterdir():
        if not made.name.startswith("rl-"):
            shutil.copytree(made, store / "models" / made.name)
    return store


def assert_same_expert(one: Path, store: Path) -> dict:
    """rl-math is that of one process: the same text and rewards, weights and numbers to float32's rounding; its manifest."""
    (wanted,), (found,) = (list(path.glob("models/rl-math-*")) for path in (one / "artifacts" / "small", store))
    assert wanted.name == found.name and not (found / "state").exists()
    for name in ("rollouts.jsonl", "along.parquet"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    for a, b in zip(read_lines(wanted / "metrics.jsonl"), read_lines(found / "metrics.jsonl"), strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
    (base,) = store.glob("models/sft-*")
    before, a, b = (load_file(path / "model.safetensors") for path in (base, wanted, found))
    moved = max(float((a[name] - before[name]).abs().max()) for name in a)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 0.02 * moved
    return json.loads((found / "manifest.json").read_text())


def alive(folder: Path) -> list[str]:
    """The commands of all processes whose environment names the folder, this test's own descendants or not."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{folder}/artifacts".encode() in (path / "environ").read_bytes() and locks.born(int(path.name)):
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has ended, or is somebody else's
    return found


def assert_nobody_left(folder: Path, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while left := alive(folder):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def at_step(process: subprocess.Popen, least: int) -> int:
    """The first step that is said from `least` on."""
    said = []
    for line in process.stdout:
        said.append(line)
        if (found := re.search(r"rl-math · step (\d+)/", line)) and int(found[1]) >= least:
            return int(found[1])
    raise AssertionError("".join(said))


def rank_file(store: Path, number: int) -> int:
    """The process that is this rank of the launch."""
    (path,) = store.glob(f"{launch.LAUNCHES}/rl-math-*/{launch.RANK}{number}")
    return int(path.read_text().split(",")[1])


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
