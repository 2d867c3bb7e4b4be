"""Profiles: every file of params/ reads; each mistake gives one line with file, place and nearest name."""
import re
import subprocess
import sys

import pytest
import yaml

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
    ("analysis.judge_tokens", 384, "analysis.judge_tokens: 384 is not from 0 (one word) to below model.context = 384"),
    ("data", {"row_tokens": -1}, "data: first, prompt_tokens and row_tokens: at least 0"),
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
    ("vllm", {"servers": ["node2"]}, "vllm.servers[0]: 'node2' is no server: write host:port, as in node2:8123"),
    ("vllm", {"servers": ["a:1", "a:1"]}, "vllm.servers: a:1 stands there twice"),
    ("vllm", {"servers": ["a:1"]}, "jobs: 2 stages at a time, but a vLLM server serves one of them: jobs: 1"),
    ("vllm", {"servers": ["a:1"], "replicas": 2}, "vllm.replicas: 2, beside vllm.servers, which have what they were"),
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
    code = ("import sys, m2rl_core.profile, m2rl_core.study, m2rl_core.store, m2rl_core.run, m2rl_core.publishing.report, "
            "m2rl_core.publishing.site, m2rl_core.publishing.publish, m2rl_core.progress, m2rl_core.notebook, "
            "m2rl_core.__main__; "
            "sys.exit('torch' in sys.modules or 'vllm' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=repo_root()).returncode == 0


# -- overlays

@pytest.fixture
def overlay(tmp_path):
    """A function that writes a profile `mine` over smoke (or over what `extends` says) and returns the file."""
    def write(name="mine", **content):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"extends": str(repo_root() / "params" / "smoke.yaml")} | content))
        return path
    return write


def test_an_overlay_changes_what_it_says_and_nothing_else(overlay):
    """Faults: a group that replaces the other's whole; a change that is lost; a stage made again for nothing."""
    smoke, mine = load_profile("smoke"), load_profile(overlay(rl={"lr": 3e-4}, about="mine", analysis={"etas": [0.1]}))
    assert (mine.rl.lr, mine.rl.group, mine.about, mine.analysis.etas) == (3e-4, smoke.rl.group, "mine", (0.1,))
    changed = {name for name, stage in study(mine).items() if stage.key != study(smoke)[name].key}
    assert "rl-math" in changed and not {"base", "sft"} & changed


def test_an_overlay_of_an_overlay_in_its_own_folder(overlay):
    overlay("first", rl={"lr": 1.0, "kl": 0.5})
    assert (found := load_profile(overlay("second", extends="first", rl={"lr": 2.0})).rl).lr == 2.0 and found.kl == 0.5


def test_a_key_is_removed_and_a_model_said_the_other_way(overlay):
    mine = load_profile(overlay(model={"source": "a/b", "context": 400}, base=None))
    assert mine.model.source == "a/b" and mine.base is None
    assert "rl.nothing: ~ removes a key, but there is none" in message(overlay(rl={"nothing": None}))
    assert "rl.lr: missing" in message(overlay(rl={"lr": None}))


def test_mistakes_name_the_file_that_holds_them(overlay):
    """Fault: an error in the profile underneath that is put down to the overlay."""
    under = overlay("under", rl={"stepz": 3})
    with pytest.raises(ProfileError, match="under.yaml: rl.stepz: unknown key; did you mean 'steps'"):
        load_profile(overlay("over", extends="under", rl={"lr": 1.0}))
    under.unlink()
    assert "rl.lr: expected float, found 'fast'" in message(overlay(rl={"lr": "fast"}))


def test_what_cannot_be_extended(overlay, tmp_path):
    assert "extends: unknown profile 'smok'" in message(overlay(extends="smok"))
    assert "extends: expected a profile's name or file, found 3" in message(overlay(extends=3))
    overlay("other", extends="mine")
    mine = overlay(extends="other")
    with pytest.raises(ProfileError, match="extends: mine -> other -> mine is a circle"):
        load_profile(mine)


# -- the paper's profiles

def test_the_papers_profile_says_what_the_paper_says():
    """Catches a slip of the pen in params/paper.yaml: it is held against the paper's own tables and settings."""
    from m2rl_core import paper
    from m2rl_core.real.rl_blend import PAPER
    p, table2 = load_profile("paper"), paper.table(2)
    for domain in p.domains:
        assert tuple(table2.loc[f"rl-{domain}", ["batch_size", "rollouts", "steps"]]) == (p.rl.prompts, p.rl.group, p.rl.steps)
    assert table2.loc["rl-multi", "steps"] == p.rl.multi_steps and p.rl.rows == PAPER
    assert tuple(table2.loc["mt-opd", ["batch_size", "rollouts", "steps"]]) == (p.opd.prompts, p.opd.group, p.opd.steps)
    table1 = paper.table(1)
    assert p.sft.rows == table1.loc["Total", "samples"] and p.sft.steps == p.sft.rows // p.sft.batch_size
    for line in p.sft.blend:
        times = int(line.sampling.split()[1]) if line.sampling.startswith("repeat") else 1
        printed = table1.loc[line.type]
        assert line.sampling == printed["sampling"] and abs(line.pool * times - printed["samples"]) < times
        assert abs(100 * line.share - printed["proportion"]) < 0.011
    stated = {(one["stage"], one["name"]): one["stated"] for one in paper.settings().to_dict("records")}
    for (stage, name), value in {
            ("sft", "learning rate"): p.sft.lr, ("sft", "batch size"): p.sft.batch_size,
            ("rl", "temperature"): p.rl.temperature,
            ("sft", "weight decay"): p.sft.weight_decay, ("rl", "weight decay"): p.rl.weight_decay,
            ("opd", "learning rate"): p.opd.lr, ("merge", "DARE mask ratio"): p.merge.drop_rate,
            ("analysis", "changed-weight threshold eta"): p.analysis.eta}.items():
        assert float(stated[stage, name]) == value, name
    assert round(p.sft.warmup / p.sft.steps, 3) == float(stated["sft", "warm-up share"]) == 0.1


def test_every_value_of_the_papers_profile_has_its_source():
    """Catches a value that nobody can check."""
    lines = (repo_root() / "params" / "paper.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\s+\w+: \S", line) and "- {" not in line]
    assert len(values) > 50 and not [line for line in values if "#" not in line and "items:" not in line]


def test_the_released_code_departs_where_the_facts_say():
    paper, code = load_profile("paper"), load_profile("paper-released-code")
    assert (code.merge.drop_rate, code.rl.multi_steps, code.opd.steps, code.rl.is_correction) == (0.2, 2000, 400, "tis")
    assert code.sft.steps == 2 * paper.sft.steps and code.data.rules["math"] == "deepscaler"
    assert (code.rl.lr, code.sft.blend, code.eval) == (paper.rl.lr, paper.sft.blend, paper.eval)
