"""The dry run: what is there, what is missing, and how to mend it; nothing is made and nothing raised."""
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from dataclasses import replace
from pathlib import Path

import pytest
import toy_foreign

from m2rl_core import __main__ as cli
from m2rl_core import dry, errors, imports
from m2rl_core.real import hub
from m2rl_core.run import open_run


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Nothing of this machine's environment, and a hub that cannot be reached."""
    for name in ("M2RL_DATA", "M2RL_MODELS", "M2RL_JUDGE", "M2RL_SANDBOX", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))  # read once, at import
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def lines(profile, root: Path) -> dict[str, dry.Line]:
    found = dry.check(open_run(profile, root))
    assert all("\n" not in line.told and line.told for line in found)
    return {line.what: line for line in found}


def test_a_study_that_needs_nothing_can_begin(tmp_path):
    found = lines("smoke", tmp_path)
    assert {line.state for line in found.values()} == {dry.HERE} and not any(tmp_path.glob("smoke/*"))
    assert "0 missing" in dry.table(list(found.values()), "smoke")


@pytest.mark.parametrize("name", ["gpu", "paper", "paper-released-code", "released", "released-layer17", "byo"])
def test_every_profile_gives_a_whole_list_within_a_minute(name, tmp_path, capsys, monkeypatch):
    """Faults: a dry run that raises at the first thing that is missing, waits for ever, or ends with an error."""
    monkeypatch.setenv("M2RL_ARTIFACTS", str(tmp_path))
    start = time.monotonic()
    assert cli.main(["reproduce", "--profile", name, "--dry"]) == 0
    assert time.monotonic() - start < 60
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"what {name} needs: ") and told[0].endswith("MISSING: do what its line says")
    assert {line.split()[0] for line in told[1:-1]} <= {dry.HERE, dry.FETCH, dry.NOTE, dry.MISSING}
    assert any(line.startswith("note     hub ") and "HF_HUB_OFFLINE is set" in line for line in told)
    stages = len(open_run(name, tmp_path).stages)
    made = f" {stages}, of which 0 are made in {tmp_path}"
    assert any(line.startswith("here     stages ") and made in line for line in told)
    missing = [line for line in told if line.startswith("MISSING")]
    assert f"{name}: {len(missing)} missing of " in told[-1] and not any(tmp_path.iterdir())
    assert all(any(word in line for word in ("put ", "pip", "make ", "set ", "run on", "names ")) for line in missing), missing


def test_the_paper_lacks_every_source_by_name(tmp_path):
    """Fault: a data set, model or benchmark that is first missed after days."""
    found = lines("paper", tmp_path)
    wanted = {f"data {source.repo}" for source in hub.sources().values() if not source.repo.startswith("gorilla")}
    assert wanted <= {what for what, line in found.items() if line.state == dry.MISSING}
    model = found["model base"]
    assert model.state == dry.MISSING and "hf download Qwen/Qwen3-4B-Base --revision 906bfd4b" in model.told
    assert found["judge of hle"].state == dry.MISSING and "M2RL_JUDGE=" in found["judge of hle"].told
    assert "accept its terms on https://huggingface.co/datasets/Idavidrein/gpqa, then" in found["data Idavidrein/gpqa"].told
    assert float(found["disk"].told.partition("about ")[2].split()[0].replace(",", "")) > 600  # 24 models, Adam, 14 M rows


def test_the_released_checkpoints_and_the_name_that_is_not_known(tmp_path):
    found = lines("released", tmp_path)
    assert sum(what.startswith("model ") for what in found) == 9  # base, seven checkpoints, and the one to be named
    assert "import.mt-opd names nothing yet" in found["model mt-opd"].told
    assert found["not run"].state == dry.NOTE and "mt-opd" in found["not run"].told
    assert not any("Nemotron-Math-v2" in what for what in found)  # nothing of SFT's data: nothing is trained


def test_models_that_are_here_are_checked(tmp_path):
    """Fault: a model of another shape or without a template that the dry run calls fine."""
    brought = toy_foreign.models(tmp_path / "models")
    path = toy_foreign.profile(tmp_path, brought)
    found = lines(str(path), tmp_path / "art")
    assert found["model rl-math"].state == dry.HERE
    assert imports.content_digest(brought["rl-math"])[:8] in found["model rl-math"].told
    assert found["domain units"].state == dry.HERE and "of 0.0 M" in found["disk"].told
    assert found["notebooks"].state == dry.HERE and str(path) in found["stages"].told  # a file, which is no name of params/
    shutil.rmtree(brought["rl-math"])
    toy_foreign.checkpoint(brought["rl-math"], 4, num_hidden_layers=1)
    (brought["rl-units"] / "chat_template.jinja").unlink()
    found = lines(str(path), tmp_path / "art")
    assert "num_hidden_layers" in found["model rl-math"].told and found["model rl-math"].state == dry.MISSING
    assert "no chat template" in found["model rl-units"].told


@pytest.mark.parametrize(("changes", "said"), [
    ({"eval": {"items": {"units": 4}, "k": {"units": 2}, "max_new_tokens": 4096}},
     "has a context of 384 tokens, which holds no prompt beside an answer of 4,096: set a smaller `max_new_tokens`"),
    ({"analysis": {"layer": 17}}, "has 2 layers, and `analysis.layer` asks for number 17, counted from 0: set one below 2")])
def test_a_model_that_cannot_give_what_is_asked(changes, said, tmp_path):
    """Fault: every answer empty and scored zero, or an empty table, after all models were fetched and merged."""
    path = toy_foreign.profile(tmp_path, toy_foreign.models(tmp_path / "models"), **changes)
    found = lines(str(path), tmp_path / "art")["model rl-math"]
    assert found.state == dry.MISSING and said in found.told


def test_what_the_hub_offers_is_to_be_downloaded(tmp_path, monkeypatch):
    """Fault: a model that the hub has, called missing; one without a commit that is not said to be pinned."""
    monkeypatch.setattr(dry, "_hub", lambda path: {"sha": "d" * 40, "siblings": [{"rfilename": "x", "size": 2**30}]})
    path = toy_foreign.profile(tmp_path, {"sft": "a/b", "rl-math": "a/c@v1"})
    found = lines(str(path), tmp_path)
    assert (found["model sft"].state, found["model rl-math"].state) == (dry.FETCH, dry.FETCH)
    assert "pin it: a/b@" + "d" * 40 in found["model sft"].told and "pin" not in found["model rl-math"].told
    assert "1.0 GB" in found["model sft"].told


@pytest.mark.parametrize(("code", "said"), [
    (401, "not for everybody (`hf auth login`"), (403, "wants its terms accepted"), (404, "none by that name and commit"),
    (500, "the hub answered 500")])
def test_what_the_hub_answers_is_said_in_words(code, said, tmp_path, monkeypatch):
    """Fault: `<urlopen error ...>` for somebody who has to accept terms, log in, or mend a name."""
    def refused(path):
        raise urllib.error.HTTPError(path, code, "x", {}, None)
    monkeypatch.setattr(dry, "_hub", refused)
    told = lines(str(toy_foreign.profile(tmp_path, {"sft": "a/b", "rl-math": "/nowhere"})), tmp_path)
    assert said in told["model sft"].told and "M2RL_MODELS" in told["model sft"].told
    assert "as `rl-math` under `import` of the profile" in told["model rl-math"].told


def test_a_hub_that_is_away_is_said_once(tmp_path, monkeypatch):
    """Fault: twenty lines with the same number of an error, none of which says what it means."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:1")
    found = lines("paper", tmp_path)
    assert found["hub"].state == dry.NOTE and "http://127.0.0.1:1 cannot be reached (Connection refused)" in found["hub"].told
    away = [line for line in found.values() if line.told.count("not here, and the hub cannot be reached: ")]
    assert len(away) > 15 and not any("Errno" in line.told for line in found.values())


def test_domains_of_ones_own_are_tried(tmp_path):
    """Faults: test rows that are trained on; a verifier that cannot read an answer."""
    own = tmp_path / "units.py"
    changes = {"domains": ["math", str(own)]}
    own.write_text("def rows(split, n, seed):\n    return [{'prompt': str(i)} for i in range(n)]\n"
                   "def verify(rows, answers):\n    return [int(a) for a in answers]\n")
    path = toy_foreign.profile(tmp_path, {"sft": "/x"}, **changes)
    assert "verify cannot judge 'It is so.'" in lines(str(path), tmp_path)["domain units"].told
    own.write_text(own.read_text().replace("int(a) for", "0 for"))
    assert "4 test rows are training rows, too" in lines(str(path), tmp_path)["domain units"].told
    own.write_text("nothing here")
    assert "line 1: SyntaxError" in lines(str(path), tmp_path)["domain units"].told


def test_addresses_are_knocked_at(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert dry._reach("judge", f"http://127.0.0.1:{port}/v1", "start it").state == dry.HERE
    gone = dry._reach("judge", f"http://127.0.0.1:{port}/v1", "start it")
    assert gone.state == dry.MISSING and gone.told.endswith("start it")
    monkeypatch.setenv("M2RL_JUDGE", "http://127.0.0.1:1/v1")
    told = lines("released", tmp_path)
    assert any("M2RL_JUDGE_MODEL" in line.told for line in told.values())  # half of a judge is told, not raised


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    run = open_run("smoke", tmp_path)
    usage = dry.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(dry.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    (line,) = dry.disk(run)
    assert line.state == dry.MISSING and "set M2RL_ARTIFACTS" in line.told
    assert dry.parameters(replace(run.profile, model=None, imports={"sft": "a/Some-1.7B-Base"})) == 1_700_000_000
    assert json.dumps(dry.parameters(run.profile))


def test_the_hub_is_asked_as_whoever_is_logged_in(tmp_path):
    """Catches a login by `hf auth login` (a file, no HF_TOKEN) that the dry run does not know of."""
    told = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/api/x":  # the hub's client has questions of its own
                told.append(self.headers["authorization"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"sha": "x"}')

        def log_message(self, *args):
            pass
    (tmp_path / "token").write_text("hf_secret")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and name != "HF_HUB_OFFLINE"}
        code = "from m2rl_core import dry; from huggingface_hub import get_token; print(dry._hub('/api/x'), get_token())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean | {
            "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"})
        server.shutdown()
    assert done.stdout == "{'sha': 'x'} hf_secret\n", done.stderr
    assert told == ["Bearer hf_secret"]


def test_what_is_told_is_one_line():
    """Faults: an error of many lines in a table of one line each; one without words that says nothing at all."""
    assert errors.one_line("a\n  b\tc", 4) == "a b " and errors.one_line("") == ""
    assert errors.one_line(KeyError()) == "KeyError"
