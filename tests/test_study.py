"""The graph: who needs whom, what a key depends on, and what it does not."""
from dataclasses import replace

import pytest

from m2rl_core.domains import BENCHMARKS, DOMAINS
from m2rl_core.profile import load_profile
from m2rl_core.study import EXPERTS, JUDGED, MODELS, UnknownStage, find, study, subsets, upstream, work

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
