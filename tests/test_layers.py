"""Some layers of a brought model: read by ranges from the hub or a folder, no byte more; never taken for the whole."""
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
import toy_foreign
import toy_notebooks
import torch
import yaml
from safetensors.torch import load_file

from m2rl_core import dry, imports, layers, post
from m2rl_core.adapters import checkpoints
from m2rl_core.adapters.foreign import PART
from m2rl_core.cost import bill
from m2rl_core.cost.told import sure
from m2rl_core.domains import DOMAINS
from m2rl_core.errors import StudyError
from m2rl_core.imports import ModelError
from m2rl_core.merging.checkpoint import Checkpoint
from m2rl_core.models import policy as policies
from m2rl_core.profile import ProfileError, load_profile, repo_root
from m2rl_core.run import open_run
from m2rl_core.study import NotInStudy, study

SHA = "c" * 40
ASKED = [0, 1]  # of three layers
NAMES = ("sft", "rl-math", "rl-units")


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    """An SFT model in one file and two experts in several, of three layers each."""
    root = tmp_path_factory.mktemp("parts")
    sft = toy_foreign.checkpoint(root / "sft", 1, num_hidden_layers=3)
    return {"sft": sft, **{name: toy_foreign.checkpoint(root / name, seed, sft, "40KB")
                           for seed, name in enumerate(NAMES[1:], 2)}}


class Hub(http.server.ThreadingHTTPServer):
    """The hub's API for repositories lab/<name>: `served` has (path, bytes) of every GET of a file; `faults` spoil answers."""

    def __init__(self, folders: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders, self.served, self.faults, self.logins = folders, [], {}, set()

    def of(self, suffix: str) -> int:
        return sum(size for path, size in self.served if path.endswith(suffix))


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.strip("/").split("/")
        if parts[0] == "api":
            return self.answer(200, json.dumps({"sha": SHA, "siblings": []}).encode())
        path = self.server.folders[parts[1]] / parts[-1]
        self.server.logins.add(self.headers.get("Authorization"))
        if path.suffix == ".safetensors" and self.server.of(".safetensors") > self.server.faults.get("dead after", 1e9):
            self.close_connection = True
            return None
        if not path.is_file():
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        data, told = path.read_bytes(), self.headers.get("Range")
        if told is None or self.server.faults.get("no ranges"):
            return self.answer(200, data, {"X-Linked-Size": len(data)})
        begin, end = map(int, told.removeprefix("bytes=").split("-"))
        self.answer(206, data[begin:end + 1], {"Content-Range": f"bytes {begin}-{end}/{len(data)}"})

    def answer(self, code, body, headers=()):
        self.send_response(code)
        for name, value in {**dict(headers), "Content-Length": len(body), "ETag": '"x"', "X-Repo-Commit": SHA}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if code == 206 and len(body) > 1000 and self.server.faults.get("breaks", 0):  # half of a tensor, then nothing
            self.server.faults["breaks"] -= 1
            body, self.close_connection = body[:len(body) // 2], True
        if code < 300:
            self.server.served.append((self.path, len(body)))
        self.wfile.write(body)


@pytest.fixture
def hub(brought, tmp_path, monkeypatch):
    with Hub(brought) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name, value in {"ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": False,
                            "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}"}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", address)
        monkeypatch.setattr(post, "PAUSE", 0.01)
        for name in ("HF_HUB_OFFLINE", imports.FOLDER, "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield server
        server.shutdown()


def profile(folder: Path, found: dict, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    return toy_foreign.profile(folder, found, **{"only": "weights", "analysis": {"layer": 1, "layers": ASKED}} | changes)


def on_hub(folder: Path, **changes) -> Path:
    return profile(folder, {name: f"lab/{name}" for name in NAMES}, **changes)


def wanted(folder: Path, layers=ASKED) -> dict:
    """The matrices of the layers that are asked for, and how many bytes they and their files' headers have."""
    tensors, heads = {}, 0
    for path in folder.glob("*.safetensors"):
        own = {name: part for name, part in load_file(path).items()
               if name.endswith("proj.weight") and int(name.split(".")[2]) in layers}
        tensors |= own
        heads += 8 + int.from_bytes(path.read_bytes()[:8], "little") if own else 0
    return {"tensors": tensors, "bytes": heads + sum(part.nbytes for part in tensors.values())}


# ---- what is read

def test_from_the_hub_those_tensors_and_headers_are_read_and_no_byte_more(brought, hub, tmp_path):
    """Faults: a model fetched whole; another tensor's bytes under a name; a header of 100 kB guessed; a commit not kept."""
    run = open_run(str(on_hub(tmp_path)), tmp_path / "art")
    told = {line.what: line for line in dry.models(run)}
    assert all(line.state == dry.FETCH and f"pin it: lab/{line.what[6:]}@{SHA}" in line.told for line in told.values())
    assert not (tmp_path / "hub").exists() and not any((tmp_path / "art").glob("*/*"))
    hub.served.clear()
    run.need("weights")
    for name in NAMES:
        folder, expected = run.path(name), wanted(brought[name])
        found = load_file(folder / PART)
        assert found.keys() == expected["tensors"].keys() and len(found) == 14
        assert all(torch.equal(found[key], part) for key, part in expected["tensors"].items())
        served = sum(size for path, size in hub.served if f"/{name}/" in path and path.endswith(".safetensors"))
        origin = json.loads((folder / "origin.json").read_text())
        whole = sum(p.stat().st_size for p in brought[name].glob("model*"))
        assert served == expected["bytes"] == origin["bytes_read"] < whole
        assert f"{expected['bytes']:,} bytes will be read" in told[f"model {name}"].told
        assert origin["commit"] == SHA and origin["part"] == "the matrices of layers 0, 1"
    assert all(SHA in path for path, _ in hub.served if path.endswith(".safetensors"))  # not what `main` is by then


def test_from_a_folder_the_same_part(brought, hub, tmp_path):
    """Faults: other numbers from a local copy; a key that does not tell two models or two choices of layers apart."""
    from_hub = open_run(str(on_hub(tmp_path / "a")), tmp_path / "art")
    here = open_run(str(profile(tmp_path / "b", brought)), tmp_path / "art2")
    for name in NAMES:
        assert (here.need(name) / PART).read_bytes() == (from_hub.need(name) / PART).read_bytes()
    assert here.table("weights", "jaccard.parquet").equals(from_hub.table("weights", "jaccard.parquet"))
    keys = {imports.content_digest(brought["sft"]), *(here.stages[name].key for name in NAMES),
            layers.settings(str(brought["sft"]), [1])["digest"]}
    assert len(keys) == 5
    assert layers.settings(f"lab/sft@{SHA}", ASKED) == layers.settings("lab/sft", [1, 0])  # a pin changes nothing


def test_a_model_that_is_whole_in_the_hubs_cache_is_read_there(brought, hub, tmp_path):
    """Fault: a second download of what is here; another key for it."""
    by_hub = open_run(str(on_hub(tmp_path)), tmp_path / "art")
    by_hub.need("sft")
    key, snapshot = by_hub.stages["sft"].key, tmp_path / "hub" / "models--lab--sft" / "snapshots" / SHA
    shutil.copytree(brought["sft"], snapshot, dirs_exist_ok=True)
    hub.served.clear()
    again = open_run(str(tmp_path / "mine.yaml"), tmp_path / "art2")
    assert again.stages["sft"].key == key and again.need("sft") and not hub.served


def test_whole_models_looked_at_in_some_layers(brought, tmp_path):
    """Faults: `layers` that changes the numbers of a layer, or keys where it is not set; a layer that is not there."""
    every = open_run(str(profile(tmp_path / "a", brought, only="", analysis={"layer": 1})), tmp_path / "art")
    some = open_run(str(profile(tmp_path / "b", brought, only="")), tmp_path / "art")
    part = open_run(str(profile(tmp_path / "c", brought)), tmp_path / "art2")
    assert "layers" not in every.stages["weights"].settings and some.stages["sft"].key == every.stages["sft"].key
    assert some.stages["weights"].key != every.stages["weights"].key and "eval-sft" in some.stages
    for file in ("jaccard", "cosine", "jaccard_etas"):
        whole = every.table("weights", f"{file}.parquet")
        few = whole[whole["layer"].isin(ASKED)].reset_index(drop=True)
        assert len(few) < len(whole) and some.table("weights", f"{file}.parquet").equals(few)
        assert part.table("weights", f"{file}.parquet").equals(few)
    with pytest.raises(StudyError, match="layer 7 is asked for, the models have 3, counted from 0"):
        open_run(str(profile(tmp_path / "d", brought, only="", analysis={"layer": 1, "layers": [1, 7]})),
                 tmp_path / "art").need("weights")


# ---- what goes wrong

def refusal(work, *args) -> str:
    with pytest.raises(ModelError) as caught:
        work(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_broken_connection_is_taken_up_where_it_broke(brought, hub, tmp_path, monkeypatch):
    """Faults: a whole range, or a whole model, read again; half a tensor taken for one; a file that is there half; a login
    that only the first request has."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.faults["breaks"] = 2
    run = open_run(str(on_hub(tmp_path)), tmp_path / "art")
    folder, expected = run.need("rl-math"), wanted(brought["rl-math"])
    assert hub.faults["breaks"] == 0 and hub.of(".safetensors") == expected["bytes"]
    assert load_file(folder / PART).keys() == expected["tensors"].keys()
    hub.faults["dead after"] = hub.of(".safetensors") + 20_000
    told = refusal(run.need, "rl-units")
    assert "cannot be fetched" in told and "what was read is kept" in told and "`hf download lab/rl-units --revision" in told
    kept = run.store.folder(run.stages["rl-units"])
    assert not (kept / PART).exists() and (kept / "state" / PART).stat().st_size > 1000
    del hub.faults["dead after"]
    assert hub.logins == {"Bearer hf_secret"}
    folder = run.need("rl-units")
    tensors, whole = load_file(folder / PART), wanted(brought["rl-units"])["tensors"]
    assert all(torch.equal(tensors[name], part) for name, part in whole.items()) and len(tensors) == len(whole)
    read = json.loads((folder / "origin.json").read_text())["bytes_read"]
    assert read < wanted(brought["rl-units"])["bytes"] - 1000  # the second run's: headers, and what the first had not


def test_a_server_without_ranges_is_refused_before_its_answer_is_read(brought, hub, tmp_path):
    """Fault: five gigabytes read for eight bytes."""
    hub.faults["no ranges"] = True
    told = refusal(open_run(str(on_hub(tmp_path)), tmp_path / "art").need, "sft")
    assert "gives no part of a file (status 200, for bytes 0 to 7)" in told and f"--revision {SHA}`" in told


def test_a_hub_that_cannot_be_reached_and_a_repository_that_is_not_there(brought, hub, tmp_path, monkeypatch):
    run = open_run(str(on_hub(tmp_path)), tmp_path / "art")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "lab/sft: config.json cannot be fetched" in refusal(run.need, "weights")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    run.need("sft")
    hub.shutdown()
    hub.server_close()
    told = refusal(open_run(str(tmp_path / "mine.yaml"), tmp_path / "art2").need, "sft")  # its commit is known
    assert f"lab/sft@{SHA}" in told and "cannot be fetched" in told
    assert {line.state for line in dry.models(run)} == {dry.MISSING}
    nowhere = {"sft": str(tmp_path / "nowhere"), "rl-math": "/x", "rl-units": "/y"}
    gone = open_run(str(profile(tmp_path, nowhere)), tmp_path / "art")
    assert f"{tmp_path / 'nowhere'} holds no model" in refusal(gone.need, "sft")


def test_what_another_run_began_is_not_gone_on_with(brought, tmp_path):
    """Faults: the start of one file under the header of another; one that is too long, taken for whole."""
    place = layers.Place(str(brought["sft"]), "", brought["sft"])
    found, _ = layers.slices(place, ASKED, "sft")
    outs = [tmp_path / name for name in "abc"]
    for out, left in zip(outs, (None, b"x" * 3000, b""), strict=True):
        if left is not None:
            (tmp_path / "begun").write_bytes(left or outs[0].read_bytes() + b"more")
        layers.write(place, found, out, tmp_path / "begun", lambda *_: None)
    assert outs[0].read_bytes() == outs[1].read_bytes() == outs[2].read_bytes()


@pytest.mark.parametrize(("spoil", "expected"), [
    (lambda f: (f / "model.safetensors").write_bytes(b"<html>not found</html>" * 10), "is no safetensors file"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:9000]), "is cut short"),
    (lambda f: (f / "model.safetensors").unlink(), "cannot be read (No such file"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json holds no JSON object"),
    (lambda f: (f / layers.INDEX).write_text('{"weight_map": {}}'), "is in no file (14 of 14 matrices are not)"),
    (lambda f: (f / "config.json").write_text('{"num_hidden_layers": 1}'), "layer 1 is asked for, the model has 1"),
])
def test_a_folder_that_is_damaged(brought, tmp_path, spoil, expected):
    own = Path(shutil.copytree(brought["sft"], tmp_path / "own"))
    spoil(own)
    place = layers.Place(str(own), "", own)

    def read():
        found, _ = layers.slices(place, ASKED, "sft")
        layers.write(place, found, tmp_path / "out", tmp_path / "begun", lambda *_: None)
    assert expected in refusal(read)


def test_a_part_is_never_taken_for_the_whole(brought, tmp_path):
    """Faults: a merge or an engine that runs on fourteen matrices; a traceback of a file that is missing."""
    run = open_run(str(profile(tmp_path, brought)), tmp_path / "art")
    part = run.need("sft")
    for work in (checkpoints.check, policies.load, Checkpoint):
        with pytest.raises(ValueError, match="only some layers of a model") as caught:
            work(part)
        assert "\n" not in str(caught.value) and str(part) in str(caught.value)
    again = open_run(str(profile(tmp_path, {**brought, "sft": part}, only="")), tmp_path / "art")
    assert "only some layers of a model" in refusal(again.need, "sft")
    for name in ("eval-sft", "merge-ties", "judge-rl-math", "pair-math-units"):
        with pytest.raises(NotInStudy, match="looks at the weights of SFT and the experts alone"):
            run.need(name)


# ---- profiles and the notebook

@pytest.mark.parametrize(("changes", "expected"), [
    ({"analysis": {"layer": 1, "layers": [0]}}, "analysis.layers: 1 is not among them, which 3.3 shows"),
    ({"analysis": {"layer": 1, "layers": [1, 1]}}, "analysis.layers: 1, 1: each layer once"),
    ({"only": "weight"}, "only: unknown value 'weight'; did you mean 'weights'?"),
])
def test_mistakes_in_a_profile(tmp_path, changes, expected):
    with pytest.raises(ProfileError) as caught:
        load_profile(str(profile(tmp_path, {"sft": "/x", "rl-math": "/m", "rl-units": "/u"}, **changes)))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_the_released_checkpoints_by_their_layer_alone(tmp_path):
    """Faults: a model of the paper's other sections asked for; an estimate of seven whole models."""
    found = load_profile("released-layer17")
    stages = study(found)
    assert found.parts == (16, 17) and found.analysis.layer == 17
    assert list(stages) == ["sft", "rl-math", "rl-coding", "rl-science", "rl-if", "rl-agent", "weights"]
    assert {stage.kind for stage in study(load_profile("released")).values()} > {"eval", "merge"}
    disk = bill.frame(open_run("released-layer17", tmp_path), bill.Given(gpu="h100")).set_index("stage")["disk"]
    matrices = 2560 * 128 * (32 + 32 + 8 + 8) + 3 * 2560 * 9728  # of a layer of Qwen3-4B: q, o, k, v; gate, up, down
    assert all(abs(disk[name] / (2 * 2 * matrices) - 1) < 1e-3 for name in stages if name != "weights")


def test_an_estimate_with_nothing_left_to_be_made(brought, tmp_path):
    """Fault: a traceback when all is made."""
    path = profile(tmp_path, brought)
    run = open_run(str(path), tmp_path / "art")
    run.need("weights")
    assert bill.frame(run)["done"].all() and "how sure" not in "".join(sure(run, bill.frame(run)))


def test_3_3_shows_the_layer_of_seven_published_models_and_says_what_is_not_run(hub, tmp_path, monkeypatch):
    """Faults: a notebook that dies of scores that nobody has; one that draws a layer that was not read; a dry run that asks
    for benchmarks, judges and GPUs, or promises other bytes."""
    monkeypatch.setenv("M2RL_ARTIFACTS", str(tmp_path / "art"))
    monkeypatch.delenv("M2RL_REPORT", raising=False)
    sft = toy_foreign.checkpoint(tmp_path / "sft", 1, num_hidden_layers=18)
    hub.folders = {"sft": sft} | {f"rl-{name}": toy_foreign.checkpoint(tmp_path / f"rl-{name}", seed, sft, "200KB")
                                  for seed, name in enumerate((*DOMAINS, "multi"), 2)}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"extends": str(repo_root() / "params" / "released-layer17.yaml"), "about": "Here.",
                                    "import": {name: f"lab/{name}" for name in hub.folders}}))
    asked = {name: wanted(hub.folders[name], (16, 17))["bytes"] for name in hub.folders if name != "rl-multi"}
    lines = {line.what: line for line in dry.check(open_run(str(path), tmp_path / "art"))}
    assert {line.state for line in lines.values()} <= {dry.HERE, dry.FETCH, dry.NOTE}
    assert all(f"{size:,} bytes will be read" in lines[f"model {name}"].told for name, size in asked.items())
    hub.served.clear()
    told = toy_notebooks.execute("3.3_weight_shift", profile=str(path))
    assert not told[-1][1].startswith("error"), told[-1]
    shown = "\n".join(out for _, out in told)
    assert hub.of(".safetensors") == sum(asked.values())
    assert "weights are looked at in 16, 17 alone" in shown and "looks at the weights of SFT and the experts alone" in shown
    assert "Layer 17 (from 0): of 70 cells" in shown and "Counted from 1, layer 17 is the one before" in shown
    assert "*Not run" not in shown and shown.count("*Not measured in this profile") == 1  # the gradients, of rl-multi
    lines = open_run(str(path), tmp_path / "art").claims()
    assert {line["note"] for line in lines if line["run_verdict"] == "not run"} == {"no along"}
    assert {line["run_verdict"] for line in lines} > {"not run"}
    for name in ("3.6_self_verification", "A_training_details"):  # whose cells ask for judgements, and for SFT whole
        assert not toy_notebooks.execute(name, profile=str(path))[-1][1].startswith("error"), name
