"""Models that are brought: found by folder, hub cache or hand; keyed by content; refused in one line; linked, not copied."""
import json
import shutil
from pathlib import Path

import pytest
import toy_foreign
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from m2rl_core import dry, imports
from m2rl_core.adapters.reading import EMBED, HEAD
from m2rl_core.imports import ModelError
from m2rl_core.models import policy as policies
from m2rl_core.profile import load_profile
from m2rl_core.run import open_run
from m2rl_core.store import CorruptArtifact


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    """An SFT model and two experts in folders; nobody writes to them."""
    return toy_foreign.models(tmp_path_factory.mktemp("foreign"))


@pytest.fixture
def copied(brought, tmp_path):
    """A copy of one model that a test may spoil."""
    return Path(shutil.copytree(brought["sft"], tmp_path / "model"))


def edit(folder: Path, name: str, **changes) -> None:
    path = folder / name
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not None}))


def refusal(work, *args) -> str:
    with pytest.raises(ModelError) as caught:
        work(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is refused

@pytest.mark.parametrize(("changes", "expected"), [
    ({"model_type": "llama"}, "a llama model; dense qwen3 models are sampled and trained here"),
    ({"model_type": "qwen3_moe"}, "a qwen3_moe model; dense qwen3"),
    ({"attention_bias": True}, "attention_bias is set in config.json"),
    ({"use_sliding_window": True}, "use_sliding_window is set in config.json"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is set in config.json"),
])
def test_an_architecture_that_is_not_computed_here(copied, changes, expected):
    """Fault: a model whose weights load and whose numbers are then wrong."""
    edit(copied, "config.json", **changes)
    told = refusal(imports.check, copied, "rl-math (a/b)")
    assert told.startswith("rl-math (a/b): ") and expected in told


def test_a_tokenizer_without_a_chat_template(copied):
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    edit(copied, "tokenizer_config.json", chat_template=None)
    assert "its tokenizer has no chat template" in refusal(imports.check, copied, "sft")


def test_a_folder_without_tokenizer_marks_shards_or_config(copied):
    text = (copied / "tokenizer.json").read_text()
    (copied / "tokenizer.json").write_text(text.replace('"<|im_end|>"', '"<|end|>"'))
    assert "its tokenizer has no <|im_end|>" in refusal(imports.check, copied, "sft")
    (copied / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refusal(imports.check, copied, "sft")
    (copied / "model.safetensors").unlink()
    assert "sft: config.json without weights: convert or copy" in refusal(imports.check, copied, "sft")
    (copied / "config.json").write_text("{")
    assert "config.json is no readable JSON" in refusal(imports.check, copied, "sft")
    (copied / "config.json").unlink()
    assert "neither config.json nor weights: no model" in refusal(imports.check, copied, "sft")


def test_another_shape_than_the_anchors_names_both(brought, tmp_path):
    """Fault: a merge of models that merely have tensors of the same names."""
    other = toy_foreign.checkpoint(tmp_path / "other", 5, num_hidden_layers=3)
    found = {**brought, "rl-math": other}
    run = open_run(str(toy_foreign.profile(tmp_path, found)), tmp_path / "art")
    told = refusal(run.need, "rl-math")
    assert f"rl-math ({other}), held against sft ({brought['sft']}): config.json has num_hidden_layers 3, the anchor 2" in told


def test_a_model_that_is_not_there_says_what_to_put_where(brought, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.delenv(imports.FOLDER, raising=False)
    found = {**brought, "rl-math": "somebody/their-math@v1", "rl-units": str(tmp_path / "nowhere")}
    run = open_run(str(toy_foreign.profile(tmp_path, found)), tmp_path / "art")
    told = refusal(run.need, "rl-math")
    assert "somebody/their-math@v1 is not on this machine and cannot be fetched" in told
    assert "`hf download somebody/their-math --revision v1`" in told and "/folder/somebody__their-math/" in told
    assert f"put config.json, *.safetensors, tokenizer.json, tokenizer_config.json into {tmp_path / 'nowhere'}" in refusal(
        run.need, "rl-units")


# ---- where it is found, and its key

def test_the_same_content_is_the_same_model_wherever_it_lies(brought, tmp_path, monkeypatch):
    """Fault: a key of a path or of a name, so that moving a folder trains and evaluates everything again."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    by_path = imports.settings(str(brought["sft"]))
    assert by_path["found"] and imports.settings("a/b")["found"] is False
    repo = tmp_path / "hub" / "models--a--b"
    shutil.copytree(brought["sft"], repo / "snapshots" / ("c" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c" * 40)
    cached = imports.find("a/b")
    assert cached.commit == "c" * 40 and imports.settings("a/b") == by_path
    assert imports.settings(f"a/b@{'c' * 40}") == by_path and imports.find("a/b@v2") is None
    shutil.copytree(brought["rl-math"], tmp_path / "by hand" / "a__b")
    monkeypatch.setenv(imports.FOLDER, str(tmp_path / "by hand"))
    assert imports.settings("a/b") == imports.settings(str(brought["rl-math"])) != by_path


def test_an_interrupted_download_is_not_there(brought, tmp_path, monkeypatch):
    """Fault: a model with some of its shards, keyed and used."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "v1"
    shutil.copytree(brought["rl-math"], snapshot)
    assert imports.find("a/b@v1")
    next(snapshot.glob("model-00001*")).unlink()
    assert imports.find("a/b@v1") is None


@pytest.mark.parametrize("whole", [2**23, 0])
def test_any_tensor_that_differs_is_another_model(copied, monkeypatch, whole):
    """Faults: two checkpoints of one shape with one key; a large file whose header alone is read."""
    monkeypatch.setattr(imports, "WHOLE", whole)
    imports._file_digest.cache_clear()
    path, before = copied / "model.safetensors", imports.content_digest(copied)
    weights = load_file(path)
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    for name in names[:4] + names[-2:]:
        changed = dict(weights) | {name: weights[name] + 1}
        save_file(changed, path, metadata={"format": "pt"})
        assert imports.content_digest(copied) != before, name
    save_file(weights, path, metadata={"format": "pt"})
    assert imports.content_digest(copied) == before
    edit(copied, "tokenizer_config.json", chat_template="{{ messages }}")
    assert imports.content_digest(copied) != before
    imports._file_digest.cache_clear()


def test_a_file_that_is_no_safetensors_file(copied, monkeypatch):
    monkeypatch.setattr(imports, "WHOLE", 0)
    imports._file_digest.cache_clear()
    (copied / "model.safetensors").write_bytes(b"<html>not found</html>" * 10)
    assert "its header cannot be read; is the copy whole?" in refusal(imports.content_digest, copied)
    imports._file_digest.cache_clear()


# ---- in the store

def test_weights_are_linked_and_the_origin_is_told(brought, tmp_path):
    """Faults: eight gigabytes copied; a store folder that does not say where its model is from."""
    run = open_run(str(toy_foreign.profile(tmp_path, brought)), tmp_path / "art")
    folder = run.need("rl-math")
    stage, origin = run.stages["rl-math"], json.loads((folder / "origin.json").read_text())
    assert stage.kind == "import" and stage.key == imports.content_digest(brought["rl-math"])
    assert run.manifest("rl-math")["settings"]["origin"] == origin["origin"] == "imported"
    assert origin["source"] == str(brought["rl-math"]) and set(origin["digests"]) >= {"config.json", "tokenizer.json"}
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 1 and all(path.is_symlink() for path in shards) and not (folder / "config.json").is_symlink()
    policy = policies.load(folder)
    assert set(policy.weights) == set(policies.sizes(policy.config))


def as_others_save(folder: Path) -> Path:
    """The model in a trainer's form: its embedding padded and stored twice, in files without an index, without a tokenizer."""
    weights = {name: part for path in folder.glob("*.safetensors") for name, part in load_file(path).items()}
    for path in [*folder.glob("*.safetensors*"), *folder.glob("*token*"), *folder.glob("chat_template*")]:
        path.unlink()
    weights[HEAD] = weights[EMBED].clone()
    weights[EMBED] = torch.cat((weights[EMBED], torch.full((40, weights[EMBED].shape[1]), 9.0, dtype=torch.bfloat16)))
    for i in range(3):
        save_file(dict(list(sorted(weights.items()))[i::3]), folder / f"model-{i:05d}-of-00003.safetensors")
    return folder


def test_a_checkpoint_of_another_trainer_takes_the_place_of_a_model(brought, tmp_path):
    """Faults: a second command that has to be known of; a merge of padded with unpadded weights; another key for the
    same folder; what is left of an interrupted run that stops the next one."""
    theirs = as_others_save(Path(shutil.copytree(brought["rl-math"], tmp_path / "theirs")))
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    run = open_run(str(toy_foreign.profile(tmp_path, {**brought, "rl-math": theirs})), tmp_path / "art")
    stage = run.stages["rl-math"]
    assert stage.key == imports.content_digest(theirs)
    left = run.store.folder(stage)
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    (left / "model-00001-of-00003.safetensors").symlink_to(theirs / "gone.safetensors")
    folder = run.need("rl-math")
    told = json.loads((folder / "origin.json").read_text())["remarks"]
    assert any("padded as Megatron does" in line for line in told) and any("tokenizer is taken" in line for line in told)
    exact, mine = policies.load(brought["rl-math"]), policies.load(folder)
    assert mine.weights.keys() == exact.weights.keys()
    assert all(torch.equal(mine.weights[name], exact.weights[name]) for name in exact.weights)
    assert mine.tokenizer.get_vocab() == exact.tokenizer.get_vocab()
    assert sum(path.is_symlink() for path in folder.glob("*.safetensors")) == 1  # of three, two hold an embedding
    run.need("merge-average")
    again = open_run(str(tmp_path / "mine.yaml"), tmp_path / "art")
    other = open_run(str(toy_foreign.profile(tmp_path, {"sft": brought["rl-units"], "rl-math": theirs})), tmp_path / "art")
    with pytest.raises(CorruptArtifact, match="mended by another anchor's files; mend: .* rebuild rl-math"):
        other.path("rl-math")
    assert again.path("rl-math") == folder and {path.name: path.read_bytes() for path in theirs.iterdir()} == before


def test_experts_are_held_against_the_anchor_as_it_is_used(brought, tmp_path):
    """Faults: an anchor in a trainer's form, against whose padded rows every expert is found wanting; an SFT model of its own
    words or rope that is refused, or given those of its base."""
    sft = as_others_save(Path(shutil.copytree(brought["sft"], tmp_path / "sft")))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(brought["sft"] / name, sft / name)
    (sft / "chat_template.jinja").write_text("{{ messages }}")
    edit(sft, "config.json", rms_norm_eps=1e-5)
    expert = Path(shutil.copytree(brought["rl-math"], tmp_path / "math"))
    edit(expert, "config.json", rms_norm_eps=1e-5)
    path = toy_foreign.profile(tmp_path, {"sft": sft, "rl-math": expert, "rl-units": brought["rl-units"]},
                               model={"source": str(brought["sft"]), "context": 384})
    run = open_run(str(path), tmp_path / "art")
    assert (run.need("sft") / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (run.need("rl-math") / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "rms_norm_eps 1e-06, the anchor 1e-05" in refusal(run.need, "rl-units")
    assert {line.what: line.state for line in dry.models(run)} == {
        "model base": dry.HERE, "model sft": dry.HERE, "model rl-math": dry.HERE, "model rl-units": dry.MISSING}
    other = toy_foreign.checkpoint(tmp_path / "other", 5, num_hidden_layers=3)
    again = open_run(str(toy_foreign.profile(tmp_path, {"sft": sft}, model={"source": str(other), "context": 384})),
                     tmp_path / "art2")
    assert "num_hidden_layers 2, the anchor 3" in refusal(again.need, "sft")


def test_a_folder_of_shards_says_what_converts_it(brought, tmp_path):
    (tmp_path / "verl").mkdir()
    (tmp_path / "verl" / "model_world_size_8_rank_0.pt").touch()
    run = open_run(str(toy_foreign.profile(tmp_path, {**brought, "rl-math": tmp_path / "verl"})), tmp_path / "art")
    assert "verl.model_merger merge --backend fsdp" in refusal(run.need, "rl-math")


def test_a_link_whose_target_changed_or_went_is_found_out(brought, tmp_path):
    """Fault: results of one model that stand under another one's key."""
    own = Path(shutil.copytree(brought["sft"], tmp_path / "own"))
    run = open_run(str(toy_foreign.profile(tmp_path, {**brought, "sft": own})), tmp_path / "art")
    run.need("sft")
    shutil.copyfile(toy_foreign.checkpoint(tmp_path / "other", 9) / "model.safetensors", own / "model.safetensors")
    again = open_run(str(tmp_path / "mine.yaml"), tmp_path / "art")
    assert not again.has("sft")  # the key is the content's
    run.store._checked.clear()
    with pytest.raises(CorruptArtifact, match="model.safetensors is not what was brought from"):
        run.path("sft")
    (own / "model.safetensors").unlink()
    run.store._checked.clear()
    with pytest.raises(CorruptArtifact, match="is the link's target still there|is missing"):
        run.path("sft")


def test_a_pretrained_base_is_used_with_the_profiles_context(brought, tmp_path):
    """Faults: 32k tokens asked of a config that says fewer; the model's own file written to."""
    import yaml
    path = toy_foreign.profile(tmp_path, {"sft": brought["sft"]}, model={"source": str(brought["sft"]), "context": 512})
    run = open_run(str(path), tmp_path / "art")
    assert policies.load(run.need("base")).config.max_position_embeddings == 512
    assert json.loads((brought["sft"] / "config.json").read_text())["max_position_embeddings"] == 384
    content = yaml.safe_load(path.read_text())
    content["model"]["context"] = 500
    path.write_text(yaml.safe_dump(content))
    assert open_run(str(path), tmp_path / "art").stages["base"].key != run.stages["base"].key
    assert load_profile(str(path)).model.source == str(brought["sft"])
