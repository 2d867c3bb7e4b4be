"""The graph: who needs whom, what a key depends on, and what it does not."""
from dataclasses import replace

import pytest

from m2rl_core import judge
from m2rl_core.domains import BENCHMARKS, DOMAINS
from m2rl_core.profile import load_profile
from m2rl_core.study import (
    EXPERTS, JUDGED, MERGES, MODELS, SHARED, Stage, UnknownStage, find, first, replica, seed_of, seeds_of, study, subsets,
    upstream, work,
)

PROFILE = load_profile("smoke")
STAGES = study(PROFILE)


def changed(profile) -> set[str]:
    """Names of stages whose key differs from the smoke profile's."""
    return {name for name, stage in study(profile).items() if stage.key != STAGES[name].key}


def downstream(*names) -> set[str]:
    return {stage for stage in STAGES if any(part.name in names for part in upstream(STAGES, stage))}


def test_names_and_needs_are_the_papers():
    assert len(MODELS) == 15 and len(JUDGED) == 9
    assert STAGES["rl-math"].needs == ("sft",) and STAGES["rl-multi"].needs == ("sft",)
    assert set(STAGES["merge-ties"].needs) == set(STAGES["mt-opd"].needs) == {"sft", *EXPERTS}
    assert set(STAGES["pair-math-coding"].needs) == {"sft", "rl-math", "rl-coding"}
    assert STAGES["eval-mt-opd"].needs == ("mt-opd",) and set(STAGES["judge-sft"].needs) == {"sft", "eval-sft"}
    assert sum(name.startswith("pair-") for name in STAGES) == 10
    assert STAGES["rl-multi"].settings["rows"].keys() == set(DOMAINS)


def test_every_stage_comes_after_what_it_needs():
    seen = set()
    for name, stage in STAGES.items():
        assert set(stage.needs) <= seen, name
        seen.add(name)


def test_a_setting_rebuilds_what_depends_on_it_and_no_more():
    """Catches keys that are too wide (a night lost) or too narrow (a stale result shown)."""
    assert changed(replace(PROFILE, rl=replace(PROFILE.rl, lr=9e-4))) == downstream(*EXPERTS, "rl-multi")
    assert changed(replace(PROFILE, rl=replace(PROFILE.rl, multi_steps=9))) == downstream("rl-multi")
    dare = changed(replace(PROFILE, merge=replace(PROFILE.merge, drop_rate=0.5)))
    assert dare == downstream("merge-ties-dare", "merge-ta-dare") | {"sweep"}
    assert changed(replace(PROFILE, analysis=replace(PROFILE.analysis, eta=0.5))) == {"weights"}
    assert changed(replace(PROFILE, threads=1, about="other")) == set()
    rows = {**PROFILE.rl.rows, "math": 99}
    more = changed(replace(PROFILE, rl=replace(PROFILE.rl, rows=rows)))
    assert more == downstream("rl-math", "rl-multi", "mt-opd", "neighborhoods")
    assert changed(replace(PROFILE, seed=2)) == set(STAGES)  # base has the seed; all others stand on base


def test_bootstrap_size_is_no_part_of_what_is_computed():
    """It belongs to the notebooks, which draw intervals from rows that are there."""
    assert changed(replace(PROFILE, analysis=replace(PROFILE.analysis, bootstrap=7))) == set()


def test_unknown_stage_names_the_nearest():
    with pytest.raises(UnknownStage) as caught:
        find(STAGES, "rl-mth")
    assert str(caught.value) == "unknown stage 'rl-mth'; did you mean 'rl-math'?"


def test_subsets_are_every_three_and_four_on_their_own_benchmarks():
    """Catches a subset that is left out or doubled, and one that is tested on a domain that it does not hold."""
    found = subsets(PROFILE.merge)
    assert len({tuple(v["parameters"]["experts"]) for v in found}) == len(found) == 10 + 5
    for v in found:
        assert v["benchmarks"] == [b for b, d in BENCHMARKS.items() if f"rl-{d}" in v["parameters"]["experts"]]
    assert STAGES["subsets"].settings["variants"] == found
    # a domain, and with it each of its benchmarks, is in six of the ten triples and in four of the five quadruples
    wanted = (6 + 4) * len(BENCHMARKS) * PROFILE.analysis.sweep_items * PROFILE.analysis.sweep_k
    assert work(STAGES["subsets"])["rollouts"] == wanted
    off = study(replace(PROFILE, analysis=replace(PROFILE.analysis, pairs=False)))
    assert "subsets" not in off and off["sweep"].key == STAGES["sweep"].key


def test_work_by_hand():
    """2 steps x 4 prompts x 2 rollouts, and 2 looks x 9 benchmarks x 2 items x 1 sample = 16 + 36; 24 tokens each."""
    rl = replace(PROFILE.rl, steps=2, prompts=4, group=2, eval_every=1, eval_items=2, eval_k=1, max_new_tokens=24)
    assert work(study(replace(PROFILE, rl=rl))["rl-math"]) == {"steps": 2, "rollouts": 52, "tokens": 1248}
    spec = replace(PROFILE.eval, items=dict.fromkeys(BENCHMARKS, 3), k=dict.fromkeys(BENCHMARKS, 2))
    stages = study(replace(PROFILE, eval=spec))
    assert work(stages["eval-sft"])["rollouts"] == 54
    assert work(stages["eval-pair-math-coding"])["rollouts"] == 24  # four benchmarks: Table 6 asks for no others
    # 5 steps with a look after the second, the fourth and the last: 3 x 9 x 2 + 5 x 4 x 2
    assert work(study(replace(PROFILE, rl=replace(rl, steps=5, eval_every=2)))["rl-math"])["rollouts"] == 94
    asked = replace(PROFILE.analysis, judge_items=3, judge_k=2)  # two ways of judging four benchmarks, not all nine
    judged = study(replace(PROFILE, analysis=asked))["judge-sft"]
    assert work(judged) == {"steps": 0, "rollouts": 2 * 4 * 3 * 2, "tokens": 2 * 4 * 3 * 2 * judge.JUDGE_TOKENS}
    assert work(replace(judged, settings=judged.settings | {"tokens": 100}))["tokens"] == 2 * 4 * 3 * 2 * 100


def test_a_merge_reads_exactly_what_its_method_takes():
    """Catches a setting that stands in the key but does nothing, and one that works without being in the key."""
    from m2rl_core.merging.recipe import PRESETS
    from m2rl_core.study import MERGES
    for name, (method, reads) in MERGES.items():
        taken = {key for key in ("density", "drop_rate", "scale") if key in PRESETS["paper"][method]}
        assert set(reads) == taken, name


def test_an_option_at_its_default_is_in_no_key():
    """Catches a new option that makes every trained model again for those who do not use it."""
    profile = load_profile("smoke")
    settings = study(profile)["rl-math"].settings
    assert not {"is_level", "entropy", "scale_rewards"} & settings.keys() and "kl" in settings
    for name, value in (("is_level", "sequence"), ("entropy", 0.01), ("scale_rewards", "none"), ("loss", "dapo")):
        changed = study(replace(profile, rl=replace(profile.rl, **{name: value})))
        assert changed["rl-math"].settings[name] == value and changed["rl-math"].key != study(profile)["rl-math"].key
        assert changed["sft"].key == study(profile)["sft"].key


# -- several training seeds

THREE = study(replace(PROFILE, seeds=3))


def test_a_key_is_what_it_was():
    """Catches a change of the hash itself, after which everything that anybody trained would be made again."""
    stage = Stage("rl-math", "rl", ("sft",), {"lr": 1e-4, "rows": {"math": 3}, "seed": 1}, 2, {"sft": "0" * 64})
    assert stage.key[:16] == "4822626f8209bf32"
    assert STAGES["merge-ta-dare"].settings == {"method": "ta-dare", "drop_rate": 0.8, "scale": 1.0, "seed": PROFILE.seed}
    assert not [name for name, stage in STAGES.items() if "@" in name or "seeds" in stage.settings]


def test_raising_seeds_keeps_what_is_made():
    """Catches a number of seeds that leaks into a key: adding seeds would train the first one again."""
    assert {name: THREE[name].key for name in STAGES} == {name: stage.key for name, stage in STAGES.items()}
    assert list(THREE)[:len(STAGES)] == list(STAGES)
    two = study(replace(PROFILE, seeds=2))
    assert all(THREE[name].key == stage.key for name, stage in two.items())


def test_a_seed_is_a_replicate_of_everything_after_sft():
    """Catches a merge or a distillation of one seed that is made of another seed's experts."""
    new = {name for name in THREE if name not in STAGES}
    after = [name for name in MODELS if name not in SHARED]
    assert new == {replica(head + name, seed) for head in ("", "eval-") for name in after for seed in (2, 3)}
    assert THREE["merge-ties@2"].needs == ("sft", *(f"{name}@2" for name in EXPERTS))
    assert THREE["mt-opd@3"].needs == ("sft", *(f"{name}@3" for name in EXPERTS))
    assert THREE["rl-multi@2"].needs == ("sft",) and THREE["eval-rl-if@2"].needs == ("rl-if@2",)
    seen = set()
    for name, stage in THREE.items():
        assert set(stage.needs) <= seen, name
        seen.add(name)
    keys = [stage.key for stage in THREE.values()]
    assert len(set(keys)) == len(keys)


def test_seeds_differ_in_training_and_share_their_data():
    """Catches replicas that are copies (the same orders, samples or dropped weights), or that learn from other rows."""
    for name in ("rl-math", "rl-multi", "mt-opd", "eval-rl-math"):
        assert THREE[f"{name}@2"].settings == THREE[name].settings
        assert len({seed_of(1, replica(name, seed)) for seed in (1, 2, 3)}) == 3
    for name, (_, reads) in MERGES.items():
        dropped = {THREE[replica(name, seed)].settings.get("seed") for seed in (1, 2, 3)}
        assert len(dropped) == (3 if "drop_rate" in reads else 1), name


def test_names_of_seeds():
    assert first("eval-rl-math@12") == "eval-rl-math" and first("rl-math") == "rl-math" and replica("rl-math", 1) == "rl-math"
    assert seeds_of("rl-math", 3) == {1: "rl-math", 2: "rl-math@2", 3: "rl-math@3"}
    assert seeds_of("rl-math", 1) == {1: "rl-math"}
    assert seeds_of("sft", 3) == {0: "sft"} and seeds_of("pair-math-if", 3) == {1: "pair-math-if"}
    with pytest.raises(UnknownStage, match="did you mean 'rl-math@3'"):
        find(THREE, "rl-math@4")
    assert work(THREE["rl-math@2"]) == work(THREE["rl-math"])
