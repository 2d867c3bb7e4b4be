"""The store under crashes, corruption, a second process and a full disk; all processes and files are real."""
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_study
from toy_study import toy_run

from m2rl_core import store as stores
from m2rl_core.__main__ import main
from m2rl_core.run import MissingArtifact
from m2rl_core.store import CorruptArtifact, DiskFull, Store, differences, hold

HERE = Path(__file__).resolve().parent


def spawn(root, stage, moment="", **options):
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    return subprocess.Popen([sys.executable, str(HERE / "toy_study.py"), str(root), stage, moment], cwd=HERE.parent,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def content(folder: Path) -> dict[str, bytes]:
    """What must be equal between two runs: every file but times and the manifest."""
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.is_file() and path.name not in ("timing.jsonl", "manifest.json")}


def test_makes_what_is_missing_in_order_and_once(tmp_path):
    run = toy_run(tmp_path)
    assert run.missing("eval-rl-math") == ["base", "sft", "rl-math", "eval-rl-math"]
    folder = run.need("eval-rl-math")
    assert (folder / "from-rl-math.txt").is_file() and not (folder / "state").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert toy_run(tmp_path).need("eval-rl-math") == folder
    assert before == {path: path.stat().st_mtime_ns for path in before}
    manifest = run.manifest("eval-rl-math")
    assert manifest["inputs"] == {"rl-math": run.stages["rl-math"].key}
    assert set(manifest["digests"]) == {"numbers.txt", "from-rl-math.txt"}
    assert {"commit", "packages", "machine", "seconds", "created", "settings", "seed"} <= manifest.keys()


@pytest.mark.parametrize("moment", ["step 1", "step 4", "before manifest", "after manifest"])
def test_killed_and_started_again_gives_the_same_bytes(tmp_path, moment):
    """Catches a stage that starts anew, or that is taken for finished, after kill -9."""
    killed = spawn(tmp_path / "a", "base", moment)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    run = toy_run(tmp_path / "a")
    finished = moment == "after manifest"
    assert run.has("base") == finished
    if moment == "step 4":
        assert run.store.why(run.stages["base"]) == ["begun and not finished; it goes on where it stopped"]
    again = spawn(tmp_path / "a", "base")
    text, _ = again.communicate()
    steps = [line for line in text.splitlines() if "· step" in line]
    assert len(steps) == {"step 1": 6, "step 4": 3, "before manifest": 0, "after manifest": 0}[moment], text
    unbroken = toy_run(tmp_path / "b").need("base")
    assert content(toy_run(tmp_path / "a").need("base")) == content(unbroken)
    toy_run(tmp_path / "a").need("sft")
    run.store.sweep(run.stages["base"])
    assert not (run.path("base") / "state").exists()


def test_a_changed_byte_is_found_named_and_mended_on_request(tmp_path):
    folder = toy_run(tmp_path).need("sft")
    good = content(folder)
    (folder / "numbers.txt").write_text("1 0.5\n")
    with pytest.raises(CorruptArtifact) as caught:
        toy_run(tmp_path).need("sft")
    text = str(caught.value)
    assert text.startswith("sft: ") and "numbers.txt" in text and "-m m2rl_core rebuild sft --profile smoke" in text
    with pytest.raises(CorruptArtifact):  # what stands on it is not made from it
        toy_run(tmp_path).need("rl-math")
    assert content(toy_run(tmp_path).rebuild("sft")) == good
    assert len(list((tmp_path / "smoke" / "set-aside").iterdir())) == 1  # the old folder is kept


@pytest.mark.parametrize(("damage", "expected"), [
    (lambda folder: (folder / "numbers.txt").unlink(), "numbers.txt is missing"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is not readable"),
    (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json lacks"),
])
def test_half_written_artifacts_are_found(tmp_path, damage, expected):
    damage(toy_run(tmp_path).need("base"))
    with pytest.raises(CorruptArtifact, match=expected):
        toy_run(tmp_path).need("base")


def test_seconds_are_no_part_of_an_artifact(tmp_path):
    folder = toy_run(tmp_path).need("base")
    (folder / "timing.jsonl").write_text("other\n")
    assert toy_run(tmp_path).need("base") == folder


def test_a_finished_artifact_is_never_begun_again(tmp_path):
    run = toy_run(tmp_path)
    run.need("base")
    with pytest.raises(FileExistsError, match="never overwritten"):
        run.store.begin(run.stages["base"])


def test_missing_artifact_says_what_makes_it_and_how_long(tmp_path):
    run = toy_run(tmp_path)
    said = r"m2rl_core run sft --profile smoke` makes it \(2 stages, a time not measured yet\)"
    with pytest.raises(MissingArtifact, match=said):
        run.path("sft")
    run.need("sft")
    run.store.set_aside(run.stages["sft"])
    assert run.expected_seconds("base") is not None and run.expected_seconds("sft") is None


def test_why_names_the_changed_setting(tmp_path):
    toy_run(tmp_path).need("weights")
    path = tmp_path / "smoke.yaml"
    text = (HERE.parent / "params" / "smoke.yaml").read_text()
    path.write_text(text.replace("eta: 1.0e-3", "eta: 0.5").replace("\n  lr: 1.0e-4", "\n  lr: 2.0e-4"))
    run = toy_run(tmp_path, path)
    assert run.store.why(run.stages["rl-math"]) == ["setting lr: 0.0001 -> 0.0002"]
    reasons = run.store.why(run.stages["weights"])
    assert "setting eta: 0.001 -> 0.5" in reasons and "input rl-math changed" in reasons
    assert run.store.why(run.stages["sft"]) == []
    assert run.store.why(run.stages["rl-multi"]) == ["never made"]


def test_differences_by_hand():
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}) == [
        "a.c: 2 -> 4", 'd: 3 -> "absent"', 'e: "absent" -> 5']


def test_a_second_process_waits_and_says_for_whom(tmp_path):
    """Catches two trainers that write into one folder."""
    first = spawn(tmp_path, "base", "pause 0.5")
    while "step 1/" not in first.stdout.readline():
        assert first.poll() is None
    second = spawn(tmp_path, "base")
    waited, _ = second.communicate(timeout=60)
    assert first.wait(timeout=60) == 0 and second.returncode == 0
    assert f"waiting: process {first.pid} (" in waited and "works on base since" in waited
    assert "step" not in waited.replace("works on", "")  # it found the stage made, and made nothing itself


def test_as_many_stages_at_once_as_there_are_places(tmp_path):
    """Catches a third trainer beside two, two trainers of one stage, and a store that is cleaned while one works."""
    told: list[str] = []

    def waits(hold_it) -> bool:
        def say(text):
            told.append(text)
            raise InterruptedError
        try:
            with hold_it(say):
                return False
        except InterruptedError:
            return True

    store = Store(tmp_path, jobs=2)
    with store.lock("rl-math"):
        assert waits(lambda say: store.lock("rl-math", say)) and "works on rl-math since" in told[-1]
        with store.lock("rl-if"):
            assert waits(lambda say: store.lock("rl-agent", say))
            assert waits(lambda say: store.lock_all("clean", say))
        assert waits(lambda say: store.lock_all("clean", say))
        assert not waits(lambda say: store.lock("rl-agent", say))
    with store.lock_all("clean"):
        assert waits(lambda say: store.lock("rl-math", say)) and "works on clean since" in told[-1]


def test_the_lock_ends_with_a_killed_process(tmp_path):
    first = spawn(tmp_path, "base", "pause 5")
    while not (tmp_path / "smoke" / "models").exists():
        time.sleep(0.05)
    first.kill()
    first.communicate()
    told = []
    with hold(tmp_path / "smoke" / ".lock", "test", told.append):
        assert json.loads((tmp_path / "smoke" / ".lock").read_text())["pid"] == os.getpid()
    assert told == []


def test_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """A real limit: no file may grow past 40 bytes, as on a disk without room."""
    limited = spawn(tmp_path, "base", preexec_fn=lambda: (
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))))
    text, _ = limited.communicate()
    assert limited.returncode != 0 and "DiskFull: base: no space left in" in text
    run = toy_run(tmp_path)
    assert not run.has("base")
    assert content(run.need("base")) == content(toy_run(tmp_path / "other").need("base"))


def test_no_space_while_sealing_leaves_the_stage_unfinished(tmp_path, monkeypatch):
    """Catches a manifest that appears although its files never reached the disk."""
    run, real = toy_run(tmp_path), os.fsync

    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stores.os, "fsync", fsync)
    with pytest.raises(DiskFull, match="it goes on from its last checkpoint"):
        run.need("base")
    assert not run.has("base") and (run.store.folder(run.stages["base"]) / "state" / "done.txt").is_file()
    monkeypatch.setattr(stores.os, "fsync", real)
    assert run.need("base").is_dir()


def test_too_little_space_is_said_before_the_work(tmp_path, monkeypatch):
    run = toy_run(tmp_path)
    monkeypatch.setattr(stores, "SPARE", 2**60)
    with pytest.raises(DiskFull, match="base: .* MB free in .* needed"):
        run.need("base")


def test_a_failing_builder_keeps_its_own_error_and_its_state(tmp_path, monkeypatch):
    """Catches an error that is swallowed or renamed on its way up."""
    run = toy_run(tmp_path)
    monkeypatch.setattr(toy_study, "STEPS", "six")
    with pytest.raises(TypeError):
        run.need("base")
    assert run.store.folder(run.stages["base"]).is_dir() and not run.has("base")


def test_command_line(tmp_path, monkeypatch, capsys):
    """One line and exit code 2 for every mistake; the rest says what it did."""
    monkeypatch.setenv("M2RL_ARTIFACTS", str(tmp_path))
    toy_run(tmp_path)
    assert main(["run", "rl-mth", "--profile", "smoke"]) == 2
    assert capsys.readouterr().err == "error: unknown stage 'rl-mth'; did you mean 'rl-math'?\n"
    assert main(["status", "--profile", "smokey"]) == 2
    assert "did you mean 'smoke'?" in capsys.readouterr().err
    assert main(["run", "sft", "--profile", "smoke"]) == 0
    assert main(["why", "sft", "--profile", "smoke"]) == 0
    assert "nothing would run" in capsys.readouterr().out
    assert main(["why", "3.3", "--profile", "smoke"]) == 0
    assert "weights: never made" in capsys.readouterr().out
    assert main(["estimate", "--profile", "smoke"]) == 0
    told = {line.split()[0]: line for line in reversed(capsys.readouterr().out.splitlines()) if line}
    assert told["sft"].endswith("measured here") and told["rl-math"].endswith("calibrated on this machine")
    assert main(["clean", "--profile", "smoke"]) == 0
    assert {path.name for path in (tmp_path / "smoke").iterdir()} == {".lock", ".lock-1", ".lock-claim"}
