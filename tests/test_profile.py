"""Profiles: every file of params/ reads; each mistake gives one line with file, place and nearest name."""
import subprocess
import sys

import pytest
import yaml

from m2rl_core.domains import BENCHMARKS
from m2rl_core.profile import ProfileError, load_profile, profile_names, repo_root
from m2rl_core.study import study


@pytest.fixture
def edited(tmp_path):
    """A function that writes smoke.yaml with one value changed (dotted path) and returns the file."""
    def write(place, value, remove=False):
        content = yaml.safe_load((repo_root() / "params" / "smoke.yaml").read_text())
        group = content
        *parents, last = place.split(".")
        for key in parents:
            group = group[key]
        if remove:
            del group[last]
        else:
            group[last] = value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(content))
        return path
    return write


def message(path) -> str:
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    text = str(caught.value)
    assert "\n" not in text and path.name in text
    return text


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_reads(name):
    profile = load_profile(name)
    assert profile.name == name and set(profile.eval.items) == set(profile.benchmarks)


@pytest.mark.parametrize("name", ["tiny", "smoke"])
def test_steps_keep_the_papers_ratio(name):
    """Catches a budget changed on one side only: 400 against 1000 steps is what Table 2 compares."""
    rl = load_profile(name).rl
    assert rl.multi_steps * 2 == rl.steps * 5


def test_sft_pools_can_give_their_share():
    """Catches a blend that cannot be drawn: a pool times its repeats below share x rows."""
    for name in ("tiny", "smoke"):
        sft = load_profile(name).sft
        for line in sft.blend:
            repeats = int(line.sampling.split()[1]) if line.sampling.startswith("repeat") else 1
            assert line.pool * repeats >= round(line.share * sft.rows), (name, line)


def test_unknown_profile_names_the_nearest():
    with pytest.raises(ProfileError, match="unknown profile 'tinny'.*did you mean 'tiny'"):
        load_profile("tinny")


@pytest.mark.parametrize(("place", "value", "expected"), [
    ("rl.learning_rate", 1, "rl.learning_rate: unknown key"),
    ("rl.stepz", 4, "rl.stepz: unknown key; did you mean 'steps'?"),
    ("modle", {}, "modle: unknown key; did you mean 'model'?"),
    ("rl.steps", "many", "rl.steps: expected int, found 'many'"),
    ("rl.steps", 2.5, "rl.steps: expected int, found 2.5"),
    ("rl.steps", True, "rl.steps: expected int, found True"),
    ("rl.steps", 0, "rl.steps: must be at least 1"),
    ("rl.prompts", 0, "rl.prompts: must be at least 1, not 0"),
    ("rl.group", 0, "rl.group: GRPO compares the rollouts of a group: at least 2"),
    ("rl.group", 1, "rl.group: GRPO compares the rollouts of a group: at least 2"),
    ("rl.rows.math", 0, "rl.rows.math: must be at least 1, not 0"),
    ("opd.prompts", 0, "opd.prompts: must be at least 1, not 0"),
    ("opd.group", 0, "opd.group: must be at least 1, not 0"),
    ("eval.k.aime24", 0, "eval.k.aime24: must be at least 1, not 0"),
    ("eval.temperature", 0.0, "eval.temperature: 0.0: logits are divided by it"),
    ("model.context", 24, "rl.max_new_tokens: 24 leave no room for a prompt in model.context = 24"),
    ("eval.max_new_tokens", 400, "eval.max_new_tokens: 400 leave no room for a prompt in model.context = 384"),
    ("rl.lr", "fast", "rl.lr: expected float, found 'fast'"),
    ("rl.betas", [0.9], "rl.betas: expected"),
    ("rl.is_correction", "miss", "rl.is_correction: unknown value 'miss'; did you mean 'mis'?"),
    ("rl.rows.maths", 3, "rl.rows.maths: unknown name; did you mean 'math'?"),
    ("rl.kl", -0.1, "rl.kl: -0.1: a weight below 0"),
    ("rl.entropy", -1.0, "rl.entropy: -1.0: a weight below 0"),
    ("rl.loss", "dappo", "rl.loss: unknown value 'dappo'; did you mean 'dapo'?"),
    ("eval.k.aime26", 2, "eval.k.aime26: unknown name; did you mean 'aime2"),
    ("analysis.pairs", "yes please", "analysis.pairs: expected bool"),
    ("model.kv_heads", 3, "model.kv_heads: 3 does not divide heads"),
    ("merge.drop_rate", 1.0, "merge.drop_rate: 1.0 is not in [0, 1)"),
    ("seeds", 0, "seeds: 0: every policy needs at least one training run"),
    ("seeds", -2, "seeds: -2: every policy needs at least one training run"),
    ("seeds", "three", "seeds: expected int, found 'three'"),
    ("engine", "vlm", "engine: unknown value 'vlm'; did you mean 'vllm'?"),
    ("gpu_memory", 1.0, "gpu_memory: 1.0 is not in (0, 1)"),
    ("name", "other", "name: not a key here"),
])
def test_mistakes_name_file_place_and_mend(edited, place, value, expected):
    assert expected in message(edited(place, value))


def test_blend_mistakes_carry_their_line(edited):
    blend = yaml.safe_load((repo_root() / "params" / "smoke.yaml").read_text())["sft"]["blend"]
    thrice = edited("sft.blend", [blend[0], {**blend[1], "sampling": "thrice"}])
    assert "sft.blend[1].sampling: 'thrice'" in message(thrice)
    pol = edited("sft.blend", [{**blend[0], "pol": 1}])
    assert "sft.blend[0].pol: unknown key; did you mean 'pool'?" in message(pol)
    assert "the shares add up to 0.022" in message(edited("sft.blend", blend[:1]))


def test_missing_benchmark_and_missing_key(edited):
    assert "eval.items: 'hle' is missing" in message(edited("eval.items.hle", None, remove=True))
    assert "rl.group: missing" in message(edited("rl.group", None, remove=True))


def test_yaml_typo_names_line_and_column(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\nmodel: {hidden: 3\n")
    assert "line" in message(path) and "not valid YAML" in message(path)


def test_the_engine_stands_in_the_keys_of_what_it_samples(edited):
    """Catches results of vLLM taken for torch's; memory, which changes no result, makes nothing again."""
    mine = edited("engine", "vllm")
    torch, vllm = study(load_profile("smoke")), study(load_profile(mine))
    sampled = {name for name, stage in torch.items() if "engine" in stage.settings}
    assert {"rl-math", "mt-opd", "eval-base", "sweep", "neighborhoods", "judge-sft"} <= sampled
    assert {vllm[name].settings["engine"] for name in sampled} == {"vllm"}
    assert torch["sft"].key == vllm["sft"].key and torch["rl-math"].key != vllm["rl-math"].key
    assert study(load_profile(edited("gpu_memory", 0.7)))["rl-math"].key == torch["rl-math"].key


def test_exponents_without_a_dot_are_numbers(edited):
    """Catches YAML 1.1's trap: 1e-4 is text to it."""
    assert load_profile(edited("rl.lr", "1e-4")).rl.lr == 1e-4


def test_no_torch_until_something_is_built():
    """Catches an import that makes `make status` and every analysis wait for torch."""
    code = ("import sys, m2rl_core.profile, m2rl_core.study, m2rl_core.store, m2rl_core.run, m2rl_core.report, "
            "m2rl_core.site, m2rl_core.publish, m2rl_core.progress, m2rl_core.notebook, m2rl_core.__main__; "
            "sys.exit('torch' in sys.modules or 'vllm' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=repo_root()).returncode == 0
