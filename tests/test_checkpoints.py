"""Checkpoints as slime's converter, verl's merger and TRL leave them: taken as the same function, or refused in one line."""
from __future__ import annotations

import json
import shutil

import pytest
import torch
import toy_policy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from m2rl_core.adapters import checkpoints
from m2rl_core.adapters.checkpoints import check, take
from m2rl_core.adapters.reading import EMBED, HEAD
from m2rl_core.errors import StudyError
from m2rl_core.merging.checkpoint import Checkpoint
from m2rl_core.models import policy as policies
from m2rl_core.models.attention import Causal
from m2rl_core.models.qwen3 import head, hidden_states, prepare

BASE, CONFIG, WEIGHTS = "model", "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def anchor(policy, tmp_path):
    """The SFT model's folder."""
    policies.save(policy, tmp_path / "anchor")
    return tmp_path / "anchor"


@pytest.fixture
def expert(other, tmp_path):
    """A model trained from it, whole and in our own form; what a test makes of it is a trainer's form of the same."""
    policies.save(other, tmp_path / "expert")
    return tmp_path / "expert"


def edit(path, **fields):
    """Sets fields of a JSON file; None removes one."""
    told = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))


def weights(folder, change=lambda tensors: None):
    """The weights of a folder, changed in place and written again."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return tensors


def shard(folder, names, parts=3, index=True):
    """The weights in several files of these names, {i} of {n}, with an index or without, and without metadata, as slime's."""
    tensors = sorted(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    place = {}
    for i in range(parts):
        name, part = names.format(i=i, n=parts), dict(tensors[i::parts])
        save_file(part, folder / name)
        place |= dict.fromkeys(part, name)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": place}))


TOKENS = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def ours(folder):
    """Logits (B, T, V) of our engine over the policy in a folder."""
    policy = policies.load(folder)
    attend = Causal([TOKENS.shape[1]] * len(TOKENS), TOKENS.device)
    positions = torch.arange(TOKENS.shape[1]).repeat(len(TOKENS))
    hidden = hidden_states(prepare(policy.weights, policy.shape), TOKENS.flatten(), positions, attend)
    return torch.nn.functional.linear(hidden, head(policy.weights)).view(*TOKENS.shape, -1)


@torch.no_grad()
def theirs(folder):
    """The same by transformers, in float32."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return model.eval()(TOKENS).logits


def slimes(folder):
    """THUDM/slime, tools/convert_torch_dist_to_hf.py: bfloat16 shards counted from 0, an index, all of the origin's files."""
    weights(folder, lambda t: t.update({n: x.bfloat16() for n, x in t.items()}))
    shard(folder, "model-{i:05d}-of-{n:05d}.safetensors")
    edit(folder / CONFIG, dtype=None, torch_dtype="bfloat16", transformers_version="4.57.1", rope_parameters=None,
         rope_theta=10000.0, rope_scaling=None)  # a config of transformers 4


def verls(folder):
    """verl-project/verl, model_merger: transformers' save_pretrained of a bfloat16 model, which then has one end marker."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / WEIGHTS).unlink()
    assert (folder / INDEX).is_file()


def tied_twice(folder):
    """A tied output embedding stored as well, as FSDP's state dicts and Megatron's converters have it."""
    weights(folder, lambda t: t.__setitem__(HEAD, t[EMBED].clone()))


def untied_config(folder):
    tied_twice(folder)
    edit(folder / CONFIG, tie_word_embeddings=False)


def padded(folder):
    """Rows of Megatron's padding that the converter was not told to cut (--vocab-size)."""
    weights(folder, lambda t: t.__setitem__(EMBED, torch.cat((t[EMBED], torch.full((112, t[EMBED].shape[1]), 9.0)))))


def padded_config(folder):
    """The same, and a config that counts them; in shards, of which one changes."""
    padded(folder)
    edit(folder / CONFIG, vocab_size=load_file(folder / WEIGHTS)[EMBED].shape[0])
    shard(folder, "model-{i:05d}-of-{n:05d}.safetensors")


def padded_and_tied_twice(folder):
    tied_twice(folder)  # the head as Megatron has it before the padding is cut from one of both
    padded(folder)


def no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()


def other_template(folder):
    """TRL saves the template that it trained with; older tools save added tokens apart."""
    (folder / "added_tokens.json").write_text('{"<other>": 9}')
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


def with_optimizer(folder):
    """A checkpoint of the Trainer in the middle of a run."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin"):
        (folder / name).write_bytes(b"x" * 1000)
    (folder / "global_step7").mkdir()
    (folder / "global_step7" / "zero.pt").write_bytes(b"x" * 10**6)


def no_index(folder):
    shard(folder, "model-{i:05d}-of-00003.safetensors", index=False)
    save_file({"adapter": torch.zeros(1)}, folder / "adapter_model.safetensors")  # it is none of them


def buffers(folder):
    weights(folder, lambda t: t.__setitem__("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)))


def two_types(folder):
    """Norms in float32 beside bfloat16, as FSDP with some mixed policies saves."""
    weights(folder, lambda t: t.update({n: x.bfloat16() for n, x in t.items() if "norm" not in n}))


FORMS = {  # form: (what a folder of it is made by, whether it serves as it is, part of the remark)
    "ours": (lambda folder: None, True, ""), "slime": (slimes, True, ""),
    "verl": (verls, False, "generation ends at [2], the anchor's at [0, 2]: the anchor's is taken"),
    "tied twice": (tied_twice, False, "its tied output embedding is stored a second time"),
    "untied config": (untied_config, False, "tie_word_embeddings is false in its config"),
    "padded": (padded, False, "padded as Megatron does"), "padded config": (padded_config, False, "padded as Megatron does"),
    "padded, tied twice": (padded_and_tied_twice, False, "padded as Megatron does"),
    "no tokenizer": (no_tokenizer, False, "no tokenizer.json: the anchor's tokenizer is taken"),
    "other template": (other_template, False, "another chat template: the anchor's is taken"),
    "optimizer": (with_optimizer, True, "left out, for it is no weight: global_step7, optimizer.pt, rng_state_0.pth"),
    "no index": (no_index, False, "no index names its weight files"),
    "buffers": (buffers, False, "buffers of rotary embeddings"),
    "two types": (two_types, True, "weights of several types: bfloat16, float32"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_any_form_is_the_same_function(form, anchor, expert, tmp_path):
    """Faults: a head trained apart that nobody reads, rows of padding that get probability, half of the shards, another
    prompt; and a folder that our engine, transformers and merging take for three different models."""
    make, as_is, remark = FORMS[form]
    exact = theirs(expert)
    make(expert)
    before = {path: path.read_bytes() for path in expert.rglob("*") if path.is_file()}
    found = check(expert, anchor)
    assert found.as_is == as_is
    assert any(remark in line for line in found.remarks) if remark else not found.remarks
    taken = take(found, tmp_path / "taken")
    assert (taken == expert) == as_is
    logits = ours(taken)
    rounded = form in ("slime", "verl", "two types")
    assert float((logits - exact).abs().max()) < (0.2 if rounded else 1e-5) < float(exact.std())
    assert float((logits - theirs(taken)).abs().max()) < 1e-5  # whole and the same to transformers
    assert found.dtype == ("bfloat16" if rounded else "float32")
    assert found.parameters == sum(x.numel() for x in policies.load(taken).weights.values())
    assert {p: p.read_bytes() for p in expert.rglob("*") if p.is_file()} == before  # the user's own folder stays
    mine, base = Checkpoint(taken).meta, Checkpoint(anchor).meta  # what merging wants: the same names and shapes
    assert {n: shape for n, (_, shape) in mine.items()} == {n: shape for n, (_, shape) in base.items()}
    again = check(taken, anchor)
    assert again.as_is and again.parameters == found.parameters
    if form != "optimizer":
        assert again.remarks == tuple(line for line in found.remarks if "several types" in line)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_prompts_and_end_markers_as_the_anchor(form, anchor, expert, tmp_path):
    """Faults: a model asked in other words than the others; vLLM or `generate` going on after a turn's end."""
    FORMS[form][0](expert)
    taken = take(check(expert, anchor), tmp_path / "taken")
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    assert policies.encode_prompt(policies.load(taken), chat) == policies.encode_prompt(policies.load(anchor), chat)
    assert json.loads((taken / "generation_config.json").read_text())["eos_token_id"] in ([0, 2], [2, 0])
    assert not (taken / "added_tokens.json").exists()  # a tokenizer is never of two makes
    fields = json.loads((taken / CONFIG).read_text())
    assert fields["vocab_size"] == policies.load(anchor).config.vocab_size and fields["tie_word_embeddings"]


def test_an_untied_model_keeps_its_head_and_loses_the_padding_of_both(policy, other, tmp_path):
    """Faults: a large model's own output embedding thrown away, or cut at another row than the input's; a missing one."""
    for name, one in (("anchor", policy), ("expert", other)):
        policies.save(one, tmp_path / name)
        weights(tmp_path / name, lambda t: t.update({HEAD: t[EMBED].flip(1).clone()}))
        edit(tmp_path / name / CONFIG, tie_word_embeddings=False)
    anchor, expert = tmp_path / "anchor", tmp_path / "expert"
    exact = theirs(expert)
    weights(expert, lambda t: t.update({n: torch.cat((t[n], torch.ones(112, t[n].shape[1]))) for n in (EMBED, HEAD)}))
    found = check(expert, anchor)
    taken = take(found, tmp_path / "taken")
    assert found.cut == policy.config.vocab_size and len(found.remarks) == 2
    assert float((ours(taken) - exact).abs().max()) < 1e-5 and float((theirs(taken) - exact).abs().max()) < 1e-5
    assert found.parameters == sum(x.numel() for x in policies.load(taken).weights.values())
    weights(expert, lambda t: t.pop(HEAD))
    with pytest.raises(StudyError, match="lm_head.weight is missing, and the anchor does not tie it"):
        check(expert, anchor)


def test_the_command_says_what_a_folder_is_and_writes_what_serves(anchor, expert, tmp_path, capsys):
    """Faults: a folder said to serve that was not looked at; a traceback for a wrong one."""
    padded(expert)
    assert checkpoints.main([str(expert), "--anchor", str(anchor)]) == 0
    text = capsys.readouterr().out
    assert "padded as Megatron does" in text and "--out OUT writes a folder that serves" in text
    assert checkpoints.main([str(expert), "--anchor", str(anchor), "--out", str(tmp_path / "out")]) == 0
    assert f"{tmp_path / 'out'}: written" in capsys.readouterr().out and check(tmp_path / "out", anchor).as_is
    assert checkpoints.main([str(tmp_path / "out"), "--anchor", str(anchor)]) == 0
    assert "serves as it is" in capsys.readouterr().out
    assert checkpoints.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'}: no such folder: give a local one, downloaded before\n"


def test_large_files_are_linked_and_not_copied(anchor, expert, tmp_path):
    """Fault: eight gigabytes written again for the sake of a tokenizer; of three shards all rewritten for one."""
    padded_config(expert)
    taken = take(check(expert, anchor), tmp_path / "taken")
    links = sorted(path for path in taken.glob("*.safetensors") if path.is_symlink())
    assert len(links) == 2 and len(list(taken.glob("*.safetensors"))) == 3
    with pytest.raises(StudyError, match="holds a model already"):
        take(check(expert, anchor), tmp_path / "taken")


def test_the_digest_is_that_of_the_weights_alone(anchor, expert, other, tmp_path):
    """Faults: a key that changes with the layout in files, or that does not change with a weight."""
    first = check(expert, anchor).digest()
    assert first == Checkpoint(expert).digest() != check(anchor).digest()
    no_index(expert)
    assert check(expert, anchor).digest() == first  # the adapter beside it is none of its weights
    moved = toy_policy.clone(other)
    moved.weights["model.norm.weight"][0] += 1e-3
    policies.save(moved, tmp_path / "moved")
    assert check(tmp_path / "moved", anchor).digest() != first


def rename(folder, old, new):
    weights(folder, lambda t: [t.__setitem__(n.replace(old, new, 1), t.pop(n)) for n in list(t)])


def only(*names):
    """A folder of these empty files."""
    def make(folder):
        shutil.rmtree(folder)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    return make


def retokenized(folder):
    told = json.loads((folder / "tokenizer.json").read_text())
    told["added_tokens"].append({**told["added_tokens"][0], "content": "<answer>", "id": 5000})
    (folder / "tokenizer.json").write_text(json.dumps(told))


def cut_short(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def shard_lost(folder):
    shard(folder, "model-{i:05d}-of-{n:05d}.safetensors")
    (folder / "model-00001-of-00003.safetensors").unlink()


def shard_lost_without_index(folder):
    shard(folder, "model-{i:05d}-of-00003.safetensors", index=False)
    (folder / "model-00001-of-00003.safetensors").unlink()


def stale_shard(folder):
    shard(folder, "model-{i:05d}-of-{n:05d}.safetensors")
    save_file({"old": torch.ones(1), **load_file(folder / "model-00002-of-00003.safetensors")},
              folder / "model-00002-of-00003.safetensors")


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 384}
REFUSED = {
    "not there": (shutil.rmtree, "no such folder: give a local one"),
    "empty": (only("notes.txt"), "neither config.json nor weights: no model"),
    "no config": (lambda f: (f / CONFIG).unlink(), "weights without config.json: copy that of its first model"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "config.json without weights: convert or copy"),
    "megatron": (only("latest_checkpointed_iteration.txt", "iter_0000399/_0_0.distcp"), "torch_dist_to_hf.py --input-dir"),
    "megatron, one step": (only("common.pt", "_0_0.distcp"), "torch_dist_to_hf.py --input-dir"),
    "verl, fsdp": (only("model_world_size_8_rank_0.pt", "huggingface/config.json"), "merge --backend fsdp --local_dir"),
    "verl, megatron": (only("model/dist_ckpt/x", "model/huggingface/config.json"), "merge --backend megatron --local_dir"),
    "peft": (only("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"), "merge_and_unload"),
    "pickles": (only(CONFIG, "pytorch_model.bin"), "weights as pickles, which can run code"),
    "steps of TRL": (only("checkpoint-9/model.safetensors", "checkpoint-10/model.safetensors"), "itself; checkpoint-10 may"),
    "steps of verl": (only("global_step_5/actor/x.txt", "actor/model_world_size_2_rank_0.pt"), "no model itself; actor may"),
    "cut short": (cut_short, "is corrupt or cut short"), "shard lost": (shard_lost, "the index names model-00001-of-00003"),
    "shard lost, no index": (shard_lost_without_index, "2 weight files, but model-00000-of-00003.safetensors speaks of 3"),
    "stale shard": (stale_shard, "old stands in the index or in a file, not in both"),
    "another size": (lambda f: edit(f / CONFIG, num_hidden_layers=3, layer_types=None), "num_hidden_layers 3, the anchor 2"),
    "another epsilon": (lambda f: edit(f / CONFIG, rms_norm_eps=1e-5), "rms_norm_eps 1e-05, the anchor 1e-06"),
    "another rope": (lambda f: edit(f / CONFIG, rope_parameters=PLAIN | {"rope_theta": 1e6}), "rope_parameters"),
    "yarn": (lambda f: edit(f / CONFIG, rope_parameters=YARN), "rope_parameters"),
    "another family": (lambda f: edit(f / CONFIG, model_type="llama"), "a llama model, but the anchor"),
    "unknown family": (lambda f: edit(f / CONFIG, model_type="qwen99"), "qwen99"),
    "a value model": (lambda f: edit(f / CONFIG, architectures=["Qwen3ForTokenClassification"]), "a Qwen3ForTokenClass"),
    "quantised": (lambda f: edit(f / CONFIG, quantization_config={"quant_method": "awq"}), "quantised weights"),
    "eight bits": (lambda f: weights(f, lambda t: t.update({EMBED: t[EMBED].to(torch.float8_e4m3fn)})), "of type F8_E4M3"),
    "untied": (lambda f: weights(f, lambda t: t.update({HEAD: t[EMBED] + 1})), "it was trained untied"),
    "one part lost": (lambda f: weights(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), "up_proj.weight is missing"),
    "a head on top": (lambda f: weights(f, lambda t: t.update({"v_head.weight": torch.ones(1)})), "v_head.weight belongs to"),
    "another shape": (lambda f: weights(f, lambda t: t.update({"model.norm.weight": torch.ones(31)})), "is [31], [32] is"),
    "few rows": (lambda f: weights(f, lambda t: t.update({EMBED: t[EMBED][:-3].clone()})), "its vocabulary was cut"),
    "a wrapper": (lambda f: rename(f, "model.", "_orig_mod.model."), "begin with '_orig_mod.', a wrapper's"),
    "a bare transformer": (lambda f: rename(f, "model.", ""), "the bare transformer was saved"),
    "another tokenizer": (retokenized, "'<answer>' is 5000, there none"),
    "a broken config": (lambda f: (f / CONFIG).write_text("{"), "is no readable JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_another_function_or_no_checkpoint_is_refused_in_one_line(case, anchor, expert):
    """Faults: noise in place of a lost shard, a merge of what does not belong together, a traceback for a wrong folder."""
    make, line = REFUSED[case]
    make(expert)
    with pytest.raises(StudyError) as caught:
        check(expert, anchor)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert str(expert) in str(caught.value)


def test_without_an_anchor_the_folders_own_config_is_the_measure(expert):
    """Fault: the anchor itself imported incomplete, after which everything is compared with that."""
    assert check(expert).as_is
    weights(expert, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(StudyError, match="up_proj.weight is missing"):
        check(expert)


def test_the_engine_refuses_what_it_would_run_as_another_function(expert):
    """Fault: a model with yarn, or with a sliding window, sampled and trained as if it had none."""
    edit(expert / CONFIG, rope_parameters=YARN)
    with pytest.raises(StudyError, match="rope of type yarn: the torch engine has full attention and plain rope only"):
        _ = policies.load(expert).shape
    edit(expert / CONFIG, rope_parameters=PLAIN, use_sliding_window=True, layer_types=None)
    with pytest.raises(StudyError, match="a sliding window"):
        _ = policies.load(expert).shape
