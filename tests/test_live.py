"""Training that a notebook starts and watches: real kernels, killed and opened again, and real processes that go on."""
from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import yaml
from jupyter_client.manager import KernelManager
from toy_study import toy_run
from whole_study import ROOT

from m2rl_core import progress
from m2rl_core.errors import StudyError
from m2rl_core.jobs import live, locks
from m2rl_core.run import open_run

STEPS = 600  # a fast machine makes forty a second, and a kernel needs some to start


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A folder with a profile of many short steps, base and SFT model made."""
    folder = tmp_path_factory.mktemp("live")
    content = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    content["base"] |= {"documents": 60, "steps": 2}
    content["sft"] |= {"rows": 60, "steps": 2, "blend": [
        {"type": "Math", "domain": "math", "share": 1.0, "pool": 60, "sampling": "random sampling"}]}
    content["rl"] |= {"steps": STEPS, "eval_every": STEPS, "checkpoint_every": 5}
    (folder / "live.yaml").write_text(yaml.safe_dump(content))
    open_run(folder / "live.yaml", folder / "artifacts").need("sft")
    return folder


class Notebook:
    """A kernel and what one cell shows; `opened` once a cell runs in it."""

    def __init__(self, folder: Path):
        self.manager = KernelManager(kernel_name="python3")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("M2RL_")}
        self.manager.start_kernel(cwd=str(folder), env=environment | {
            "M2RL_ARTIFACTS": str(folder / "artifacts"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)
        self.errors: list[str] = []

    def run(self, code: str) -> None:
        self.cell = self.client.execute(code)

    def until(self, pattern: str, seconds: float = 120) -> re.Match:
        """The first match in what the cell displays; fails where the cell ends or the time is over before."""
        end, shown = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            message = self.client.get_iopub_msg(timeout=seconds)
            if message["parent_header"].get("msg_id") != self.cell:
                continue
            content = message["content"]
            if message["msg_type"] == "error":
                self.errors.append(f"{content['ename']}: {content['evalue']}")
            shown = str(content.get("data", {}).get("text/html", content.get("text", ""))) or shown
            if found := re.search(pattern, shown):
                return found
            assert content.get("execution_state") != "idle", (shown, self.errors)
        raise AssertionError(shown)

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


CELL = ("from m2rl_core.jobs import live\nfrom m2rl_core.run import open_run\n"
        "run = open_run('live.yaml')\nlive.train(run, 'rl-math')\nprint('next cell')")


def test_closed_and_opened_again_it_goes_on_and_is_shown(store):
    """Catches a job that dies with its kernel, a second one beside it, a curve that begins anew, a cell that never ends."""
    first = Notebook(store)
    first.run(CELL)
    shown = first.until(rf"rl-math · step (\d+)/{STEPS} · reward [\d.]+.* left · [\d.]+ steps a minute · "
                        r"[\d.]+ rollouts a second")
    first.close()
    run = open_run(store / "live.yaml", store / "artifacts")
    job = json.loads((run.store.root / live.JOBS / "rl-math.json").read_text())
    assert locks.born(job["pid"]) == job["born"] and live.working(run, "rl-math") and not run.has("rl-math")

    second = Notebook(store)
    second.run(CELL)
    again = second.until(r"step (\d+)/.*<polyline points=\"([^\"]+)\"")
    assert int(again[1]) > int(shown[1]) and len(again[2].split()) == int(again[1])  # the whole curve
    assert json.loads((run.store.root / live.JOBS / "rl-math.json").read_text()) == job  # nobody began another one
    second.until("rl-math · made", 300)
    second.until("next cell")
    second.close()
    assert run.has("rl-math") and len(run.steps("rl-math")) == STEPS
    assert not live.working(run, "rl-math") and (run.store.root / live.JOBS / "rl-math.log").read_text().count("step 1/") == 1


def test_interrupting_stops_the_watching_and_stop_the_work(store):
    notebook = Notebook(store)
    notebook.run(CELL.replace("rl-math", "rl-if"))
    notebook.until(r"rl-if · step (\d+)/")
    notebook.manager.interrupt_kernel()
    with pytest.raises(AssertionError):
        notebook.until("next cell")
    assert "KeyboardInterrupt: no longer watched" in notebook.errors[0]
    run = open_run(store / "live.yaml", store / "artifacts")
    assert live.working(run, "rl-if")
    notebook.run("live.stop(run, 'rl-if'); print('stopped')")
    notebook.until("stopped")
    assert not live.working(run, "rl-if") and not run.has("rl-if")
    assert run.store.why(run.stages["rl-if"])[0].startswith("begun and not finished")
    with pytest.raises(StudyError, match="rl-if: no process that a notebook began"):
        live.stop(run, "rl-if")
    notebook.close()


def test_a_job_that_dies_is_said_with_its_last_words(store, monkeypatch):
    """Catches a cell that waits for ever for a process that is no more."""
    notebook = Notebook(store)
    notebook.run(CELL.replace("rl-math", "rl-coding"))
    notebook.until(r"rl-coding · step (\d+)/")
    job = json.loads((store / "artifacts" / "live" / live.JOBS / "rl-coding.json").read_text())
    os.kill(job["pid"], signal.SIGKILL)
    with pytest.raises(AssertionError):
        notebook.until("never", 60)
    notebook.close()
    assert re.match(r"StudyError: rl-coding is not made and nothing works on it any more: rl-coding · step "
                    r".*rl-coding.log\); run this cell again to go on", notebook.errors[0])


def test_under_a_runner_the_kernel_makes_it(tmp_path, monkeypatch):
    run = toy_run(tmp_path)
    live.train(run, "rl-math")
    assert run.has("rl-math") and not (run.store.root / live.JOBS).exists()
    monkeypatch.setattr(run, "need_seeds", None)
    live.train(run, "rl-math")  # made: nothing is asked for again


def test_the_picture_by_hand(tmp_path, monkeypatch):
    """A step made again after a crash counts once; speed is that of the process that works now."""
    run = toy_run(tmp_path)
    state = run.store.begin(run.stages["rl-math"]) / "state"
    rows = [{"step": 1, "total": 4, "reward": 0.0, "seconds": 50.0, "left": 150.0},
            {"step": 2, "total": 4, "reward": 0.5, "seconds": 100.0, "left": 100.0},
            {"step": 2, "total": 4, "reward": 0.25, "seconds": 2.0, "left": 4.0},
            {"step": 3, "total": 4, "reward": 1.0, "seconds": 4.0, "left": 2.0}]
    (state / progress.TRACE).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "to')
    steps = live.steps_so_far(state / progress.TRACE)
    assert [(row["step"], row["reward"]) for row in steps] == [(1, 0.0), (2, 0.25), (3, 1.0)]
    assert live.speed(steps, 8) == "30 steps a minute · 4 rollouts a second"
    assert live.speed(steps[:1], 8) == ""
    text = live.picture(run, "rl-math", ["rl-math"])
    assert "rl-math · step 3/4 · reward 1 · 0:02 left · 30 steps a minute" in text and 'value="0.750"' in text
    assert "reward 0 to 1" in text and 'points="4.0,76.0 240.0,58.0 476.0,4.0"' in text
    assert "<script" not in text and "http" not in text
    assert "rl-if · waits · 2 to be made" in live.picture(run, "rl-if", ["rl-if", "x"])
