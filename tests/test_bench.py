"""The merge bench: true shapes, resumable, and honest about what it measured; the peer is a stand-in here."""
import json
import math
import sys
from pathlib import Path

import pandas as pd
import pytest

from m2rl_core.bench import analysis, engine, measure, merge, models
from m2rl_core.merging.checkpoint import Checkpoint
from m2rl_core.views import bench as views


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


@pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux")
def test_the_engine_bench_gives_all_sides_the_same_work(tmp_path, capsys):
    peer = tmp_path / "python"
    peer.write_text(f"#!{sys.executable}\nimport json, time\ntime.sleep(0.3)\n"
                    "print(json.dumps({'seconds': [2.0, 4.0, 3.0], 'tokens': [10, 10, 10]}))\n")
    peer.chmod(0o755)
    arguments = ["--scratch", str(tmp_path / "s"), "--out", str(tmp_path / "engine.json"), "--peer", str(peer),
                 "--prompts", "2", "--new-tokens", "4"]
    assert engine.main([*arguments, "--pairs", "1"]) == 0
    assert engine.main([*arguments, "--pairs", "1"]) == 0
    assert capsys.readouterr().out.count("run 1") == 6, "measured again"
    rows = json.loads((tmp_path / "engine.json").read_text())
    _, vllm, step = rows
    assert [row["peer_name"] for row in rows] == ["generate", "vllm", "trl"]
    assert [row["bar"] for row in rows] == [4, None, 5] and vllm["peer_tokens_per_second"] > 0
    assert 0 < vllm["mismatch_mean"] <= vllm["mismatch_max"] < 1e-4 and vllm["kept"] == 1.0
    assert vllm["peer_anonymous_mb"] > 500  # both processes, not ours alone
    assert step["peer"] == 3.0 and step["peer_tokens_per_second"] == 3 and step["floor"] > 0
    runs = json.loads((tmp_path / "s" / "2-4" / "runs.json").read_text())
    sampled = {side: runs[side][0]["tokens"] for side in ("sample", "generate", "vllm", "step")}
    assert all(16 <= n <= 64 for tokens in sampled.values() for n in tokens)  # two prompts, eight rollouts, four tokens
    for option in ("--peer", "--vllm"):
        assert engine.main([*arguments, option, str(tmp_path / "none")]) == 2
        assert "make bench NB=engine" in capsys.readouterr().err
    said, shown = views.sentence(pd.DataFrame(rows), "engine").data, views.shown(pd.DataFrame(rows))
    assert "of 2 comparisons with a bar" in said and "masking keeps 100.00 %" in said
    assert shown["bar"].tolist() == ["4", "–", "5"]
    assert abs(sum(step["profile"].values()) - 1) < 0.01 and 0 < step["profile"]["matrix products"] < 0.9
    assert views.parts(pd.DataFrame(rows))["what"].tolist() == ["sampling 256 rollouts", "a step of GRPO"]


@pytest.mark.skipif(sys.platform != "linux", reason="drops files from Linux's page cache")
def test_the_analysis_bench_reads_what_it_counts(tmp_path, capsys):
    sizes = models.matrices(1)
    assert sum(math.prod(shape) for shape in sizes.values()) == 100_925_440  # a layer of Qwen3-4B without its norms
    assert sizes["model.layers.0.mlp.down_proj.weight"] == (2560, 9728)
    arguments = ["--scratch", str(tmp_path / "s"), "--out", str(tmp_path / "analysis.json"), "--layers", "1",
                 "--hidden", "160", "--pairs", "1"]
    assert analysis.main(arguments) == 0 and analysis.main(arguments) == 0
    assert capsys.readouterr().out.count("run 1") == 5, "measured again"
    rows = json.loads((tmp_path / "analysis.json").read_text())
    assert [(row["peer_name"], row["bar"]) for row in rows] == [("read", 0.8), ("read", None), ("torch", None)]
    read = rows[0]
    assert read["floor"] == read["peer"] and read["floor_multiple"] == pytest.approx(read["ours"] / read["peer"], rel=0.01)
    assert 0 < read["ours_anonymous_mb"] < 1000 and read["gigabytes"] == pytest.approx(
        6 * 2 * sum(math.prod(shape) for shape in models.matrices(1, 160).values()) / 1e9, abs=0.01)
    assert sum(read["profile"].values()) == pytest.approx(1, abs=0.01)
    assert "of 1 comparisons with a bar" in views.sentence(pd.DataFrame(rows), "analysis").data
    assert views.parts(pd.DataFrame(rows), "reading alone").loc[0, "what"] == "one read of the files"
    assert views.sentence(pd.DataFrame(), "analysis").data.count("make bench NB=analysis") == 1
