"""The merge bench: true shapes, resumable, and honest about what it measured; the peer is a stand-in here."""
import json
import math
import sys
from pathlib import Path

import pytest

from m2rl_core.bench import measure, merge, models
from m2rl_core.merging.checkpoint import Checkpoint


@pytest.fixture
def peer(tmp_path):
    """A program that is called like mergekit-yaml and leaves a folder."""
    path = tmp_path / "peer"
    path.write_text(f"#!{sys.executable}\nimport os, sys, time\nx = bytearray(50_000_000)\n"
                    "time.sleep(0.5)  # long enough to be seen\nos.mkdir(sys.argv[2])\n")
    path.chmod(0o755)
    return path


def arguments(tmp_path, peer, *more):
    return ["--scratch", str(tmp_path / "s"), "--out", str(tmp_path / "merge.json"), "--peer", str(peer),
            "--layers", "1", "--vocab", "64", *more]


def test_shapes_are_those_of_qwen3_0_6b():
    assert sum(math.prod(shape) for shape in models.shapes().values()) == 596_049_920  # the model card's, tied


def test_rows_say_what_was_measured_and_a_second_run_goes_on(tmp_path, peer, capsys):
    assert merge.main(arguments(tmp_path, peer, "--pairs", "1", "--only", "ties")) == 0
    assert merge.main(arguments(tmp_path, peer, "--pairs", "2", "--only", "ties")) == 0
    lines = capsys.readouterr().out
    assert lines.count("ties ours") == 2 and lines.count("ties peer") == 2, "the first pair was measured again"
    row, = json.loads((tmp_path / "merge.json").read_text())
    assert {"name", "ours", "peer", "peer_name", "unit", "ratio", "floor_multiple", "machine"} <= row.keys()
    assert row["pairs"] == 2 and row["ratio"] == pytest.approx(row["peer"] / row["ours"], abs=0.01)
    assert row["peer_anonymous_mb"] >= 40 and len(row["ours_runs"]) == 2
    base, expert = (Checkpoint(tmp_path / "s" / "models-1-64" / name) for name in ("base", "e0"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((base[name] != expert[name]).float().mean()) == pytest.approx(0.3, abs=0.01)


def test_a_missing_peer_and_a_failing_command_end_in_one_line(tmp_path, capsys):
    assert merge.main(arguments(tmp_path, tmp_path / "none", "--only", "ties")) == 2
    assert "make bench NB=merge" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="failed, see"):
        measure.run([sys.executable, "-c", "raise SystemExit('no')"], tmp_path / "log")


def test_the_peer_is_pinned_with_the_torch_of_both_sides():
    root = Path(__file__).resolve().parent.parent
    ours, peers = ((root / name).read_text() for name in ("requirements.txt", "requirements-peers.txt"))
    pins = [line.split("  #")[0] for line in peers.splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    assert pins[0].startswith("torch==") and pins[0] in ours and f"mergekit=={merge.PEER.split()[1]}" in pins
    makefile = (root / "Makefile").read_text()
    assert makefile.index("requirements-peers.txt)") < makefile.index("-r requirements-peers.txt")
