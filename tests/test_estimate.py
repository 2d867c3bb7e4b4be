"""What a study will cost: calibrations on this machine, bills of profiles, and what the command says."""
import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import toy_foreign
import torch
from toy_study import toy_run

from m2rl_core import judge
from m2rl_core.__main__ import main
from m2rl_core.cost import bill, calibrate, lengths, plan, speed, told
from m2rl_core.domains import DOMAINS, rewards, training_rows
from m2rl_core.jobs.tasks import notebook_stages
from m2rl_core.models import policy as policies
from m2rl_core.profile import load_profile
from m2rl_core.run import open_run
from m2rl_core.study import EXPERTS, study

GOLDEN = Path(__file__).parent / "golden" / "estimate_tiny.json"  # a calibration and, of a quiet run, what each stage took


@pytest.fixture(scope="module")
def small():
    """Smoke's calibration of this machine."""
    return calibrate.measure(load_profile("smoke"))


def test_a_calibration_says_right_answers(small):
    """Catches a script that is not followed: answers would be as long as random tokens are, and tools would never reply."""
    profile = load_profile("smoke")
    assert set(small["domains"]) == set(DOMAINS)
    for found in small["domains"].values():
        assert found["rollouts"] == profile.rl.prompts * profile.rl.group
        assert found["few"] == profile.rl.eval_items * profile.rl.eval_k
        assert 1 < found["length"] <= found["longest"] <= profile.rl.max_new_tokens < found["prompt"] + found["length"]
        assert all(s > 0 for name in ("sample", "sample_few", "verify", "update", "score") for s in found[name])
    assert small["flops"][0] > 1e9 and small["bandwidth"][0] > 1e8


def test_a_scripted_answer_is_the_row_s_own():
    """The rollouts that are timed say what SFT's rows say, turn by turn, tools answering between; all are right."""
    rows = [row for domain in ("math", "agent") for row in training_rows(domain, "sft", 24, 1)]
    words = policies.train_tokenizer([m["content"] for row in rows for m in (*row.messages, *row.turns)], 400)
    spec = dataclasses.replace(load_profile("tiny").model, vocab=400, layers=1)
    made = calibrate.said(policies.build(spec, words, torch.Generator().manual_seed(1)), rows, 2, 200, 4)
    assert len(made) == 96
    for i, rollout in enumerate(made):
        assert rollout.turns == [turn["content"] for turn in rows[i // 2].turns if turn["role"] == "assistant"]
    assert any(len(rollout.turns) > 1 for rollout in made)
    assert all(v.score == 1 for v in rewards([r.row for r in made], [r.turns for r in made]))


def test_a_calibration_is_kept_by_machine_and_shape(small, tmp_path, monkeypatch):
    profile = load_profile("smoke")
    monkeypatch.setattr(calibrate, "measure", lambda profile: small)
    assert calibrate.cached(profile, tmp_path) is None
    assert calibrate.calibrate(profile, tmp_path) == small
    monkeypatch.setattr(calibrate, "measure", lambda profile: pytest.fail("measured again"))
    assert calibrate.calibrate(profile, tmp_path) == json.loads(json.dumps(small))
    wider = dataclasses.replace(profile, model=dataclasses.replace(profile.model, hidden=64))
    assert calibrate.cached(wider, tmp_path) is None


def test_busy_machines_are_seen_through():
    """Catches the wall clock of a shared machine taken for the work's own: sleeping is not working."""
    assert max(calibrate.timed(lambda: time.sleep(0.05))) < 0.02
    assert min(calibrate.timed(lambda: time.sleep(0.05), alone=False)) >= 0.05


def test_tiny_costs_what_it_cost():
    """A calibration of seconds against a whole run: the sum within a factor of 1.5, no kind of weight off by more than two,
    and what was taken inside of the likely range for nearly all of it."""
    golden, profile = json.loads(GOLDEN.read_text()), load_profile("tiny")
    taken = golden["seconds"]
    stages = {name: stage for name, stage in study(profile).items() if name in taken}
    costs = {name: plan.calibrated(golden["found"], stage, profile.rl.max_new_tokens) for name, stage in stages.items()}
    assert set(taken) == set(costs) and len(taken) > 50
    assert 1 / 1.5 < sum(cost.seconds for cost in costs.values()) / sum(taken.values()) < 1.5
    frame = pd.DataFrame([{"kind": stage.kind, "told": costs[name].seconds, "taken": taken[name],
                           "inside": costs[name].low <= taken[name] <= costs[name].high} for name, stage in stages.items()])
    kinds = frame.groupby("kind")[["told", "taken"]].sum().query("taken > 10")
    assert (kinds["told"] / kinds["taken"]).between(0.5, 2).all()
    assert frame.loc[frame["inside"], "taken"].sum() > 0.7 * frame["taken"].sum()
    assert all(cost.low <= cost.seconds <= cost.high <= cost.most for cost in costs.values())


def test_what_few_groups_learn_makes_a_run_cheap():
    """The fault of old: coding, whose groups nearly always agree, was told to cost 1.86 times what it cost, for half of its
    groups were held to learn. Without any run the experts are told within a factor of 1.6 and without a bias; with their own
    shares each within 1.35."""
    golden, profile = json.loads(GOLDEN.read_text()), load_profile("tiny")
    stages, learnt, longest = study(profile), golden["learnt"], profile.rl.max_new_tokens
    assert set(learnt) == set(DOMAINS) and plan.mixed_share(8) == pytest.approx(sum(learnt.values()) / 5, abs=0.01)
    assert all(plan.LEARNS[0] < share < plan.LEARNS[1] for share in learnt.values())

    def ratios(**known):
        return [plan.calibrated(golden["found"], stages[e], longest, **known).seconds / golden["seconds"][e] for e in EXPERTS]
    before, after = ratios(), ratios(learnt=learnt)
    assert all(1 / 1.6 < ratio < 1.6 for ratio in before) and 0.9 < math.prod(before) ** (1 / 5) < 1.1
    assert all(1 / 1.35 < ratio < 1.35 for ratio in after)
    mixed = plan.parts(stages["rl-multi"], learns=learnt).calls[0].learns  # by the mix of its prompts
    rows = profile.rl.rows
    assert mixed == pytest.approx(sum(n * learnt[d] for d, n in rows.items()) / sum(rows.values()))


def test_a_finished_expert_tells_its_share(tmp_path, small, monkeypatch):
    """Catches a run that skipped all of its groups and is still told to have learned from a third of them."""
    run = toy_run(tmp_path, "smoke")
    run.need("rl-math")
    kept = run.store.folder(run.stages["rl-math"]) / "metrics.jsonl"
    kept.write_text("".join(json.dumps({"step": i, "length": 9.0, "skipped_groups": 1.0}) + "\n" for i in (1, 2)))
    assert bill.learnt_of(run) == {"math": 0.0} and bill.lengths_of(run) == {"math": 9.0}
    monkeypatch.setattr(bill, "source", lambda *_: bill.Source("calibrated on this machine", small))
    monkeypatch.setattr(bill, "corrections", lambda *_: {})
    told_now = bill.frame(run).set_index("stage").loc["rl-multi", "seconds"]
    monkeypatch.setattr(bill, "learnt_of", lambda run: {})
    assert told_now < bill.frame(run).set_index("stage").loc["rl-multi", "seconds"]


def test_smoke_says_nothing_of_tiny(tmp_path):
    """The fault of old: a finished smoke study scaled to tiny said 26 hours."""
    toy_run(tmp_path, "smoke").need("eval-sft")
    frame = open_run("tiny", tmp_path).estimate()
    assert frame["seconds"].isna().all() and set(frame["from"]) == {"not measured yet"}


def test_finished_stages_correct_those_to_come(tmp_path, small, monkeypatch):
    """What a finished evaluation took over what it was told to take holds for the others, and for no other kind."""
    run = toy_run(tmp_path, "smoke")
    run.need("eval-base")
    bare = bill.Source("calibrated on this machine", small)
    monkeypatch.setattr(bill, "source", lambda *_: bare)
    manifest = run.store.folder(run.stages["eval-base"]) / "manifest.json"
    facts = json.loads(manifest.read_text())
    told_before = plan.calibrated(small, run.stages["eval-base"], run.profile.rl.max_new_tokens).seconds
    manifest.write_text(json.dumps(facts | {"seconds": 3 * told_before}))
    found = bill.frame(run).set_index("stage")
    assert found.loc["eval-base", "from"] == "measured here"
    assert found.loc["eval-base", "seconds"] == pytest.approx(3 * told_before)
    other = plan.calibrated(small, run.stages["eval-rl-math"], run.profile.rl.max_new_tokens).seconds
    assert found.loc["eval-rl-math", "seconds"] == pytest.approx(3 * other) and "x 3.00" in found.loc["eval-rl-math", "from"]
    assert found.loc["judge-sft", "from"] == "calibrated on this machine"


def test_what_a_stage_does_by_hand():
    stages = study(load_profile("tiny"))
    expert = plan.parts(stages["rl-math"])
    assert expert.updates == 100 and expert.calls[0].rollouts == {"math": 256} and expert.calls[0].times == 100
    assert [call.times for call in expert.calls[1:]] == [4] * 9 and expert.calls[1].rollouts == {"math": 48}
    mixed = plan.parts(stages["rl-multi"]).calls[0]
    assert sum(mixed.rollouts.values()) == pytest.approx(256) and mixed.rollouts["math"] == pytest.approx(256 * 2206 / 8771)
    assert mixed.learns == pytest.approx(plan.mixed_share(8)) and plan.parts(stages["mt-opd"]).calls[0].learns == 1
    evaluation = plan.parts(stages["eval-sft"])
    assert sum(sum(call.rollouts.values()) for call in evaluation.calls) == 2 * 60 * 8 + 2 * 60 * 4 + 5 * 80 * 4
    judged = plan.parts(stages["judge-sft"]).calls[0]
    assert judged.judge == judge.JUDGE_TOKENS == judged.judge_length({"math": 7000.0})
    thinks = dataclasses.replace(judged, judge=4096)  # then it is as long as answers are, and cut where these are
    assert thinks.judge_length({"math": 1000.0, "if": 2000.0}) == 1500 and thinks.judge_length({"math": 9e3}) == 0.9 * 4096
    assert judged.rollouts == {"judge": 60 * 8 * len(judge.JUDGED_BENCHMARKS)} and judged.times == len(judge.MODES)
    assert sum(sum(c.rollouts.values()) * c.times for c in plan.parts(stages["neighborhoods"]).calls) == 25 * 24 * 4


def test_longer_answers_cost_more(small):
    stage = study(load_profile("smoke"))["rl-math"]
    short, long = (plan.Measured(small, {"math": n}).call(plan.parts(stage).calls[0]) for n in (10, 20))
    assert short < long < 2.01 * short


def test_what_could_be_left_out(small, tmp_path, monkeypatch):
    """Catches a saving that forgets what needs the model, or one that counts what does not."""
    run = open_run("smoke", tmp_path)
    gone = bill.downstream(run.stages, ["rl-math"])
    assert {"rl-math", "eval-rl-math", "judge-rl-math", "merge-ties", "eval-merge-ties", "mt-opd", "weights",
            "pair-math-if"} <= gone
    assert gone.isdisjoint({"sft", "rl-if", "eval-rl-if", "rl-multi", "judge-rl-if", "pair-science-if"})
    monkeypatch.setattr(bill, "source", lambda *_: bill.Source("calibrated on this machine", small))
    found = bill.frame(run)
    table = bill.skippable(run, found).set_index("without")
    costs = found.set_index("stage")["seconds"]
    assert table.loc["sweep", "saves"] == pytest.approx(costs["sweep"]) and table.loc["sweep", "lost or poorer"] == "3.2"
    assert table.loc["self-verification", "stages"] == 9 and table.loc["self-verification", "lost or poorer"] == "3.6"
    assert table.loc["rl-multi", "saves"] == pytest.approx(
        sum(costs[n] for n in ("rl-multi", "eval-rl-multi", "judge-rl-multi", "neighborhoods")))
    assert (table["share"] <= 1).all() and set(EXPERTS) <= set(table.index) and "3.3" in table.loc["rl-math", "lost or poorer"]
    assert notebook_stages(run, "C") == []


def test_wall_time_is_that_of_a_schedule(tmp_path):
    """Two at a time: base and sft one after the other, then two experts beside each other."""
    run = open_run("smoke", tmp_path)
    left = pd.DataFrame({"stage": ["base", "sft", "rl-math", "rl-if"], "seconds": [10.0, 20.0, 30.0, 40.0]})
    assert run.profile.jobs == 2 and told.wall(run, left) == 70.0


def test_the_command_measures_once_and_says_all(tmp_path, monkeypatch, capsys, small):
    monkeypatch.setenv("M2RL_ARTIFACTS", str(tmp_path))
    monkeypatch.setattr(calibrate, "measure", lambda profile: small)
    assert main(["estimate", "--profile", "smoke"]) == 0
    first = capsys.readouterr()
    assert "measured once" in first.err and "calibrated on this machine" in first.out
    for said in ("left: ", "sampled tokens as expected", "Table 2", "4,782.3", "without", "how sure", "at most"):
        assert said in first.out, said
    assert main(["estimate", "--profile", "smoke"]) == 0
    assert capsys.readouterr() == (first.out, "")  # nothing is measured twice
    frame = open_run("smoke", tmp_path).estimate()  # and the notebooks know it, too
    assert frame["seconds"].notna().all() and (frame["disk"] >= 0).all() and (frame["memory"] > 0).all()


def test_the_paper_s_own_profile_comes_near_table_2(tmp_path, monkeypatch, capsys):
    """On 32 H800, as the release says: every row within a factor of 1.5 of the printed one."""
    monkeypatch.setenv("M2RL_ARTIFACTS", str(tmp_path))
    found = bill.frame(open_run("paper", tmp_path), bill.Given("h800", 32))
    table = bill.beside_paper(found)
    assert len(table) == 7 and (table["hours"] / table["GPU hours (paper)"]).between(1 / 1.5, 1.5).all()
    for less, more in (("low", "seconds"), ("seconds", "high"), ("high", "most")):
        assert (found[less] <= found[more]).all()
    assert main(["estimate", "--profile", "paper", "--gpu", "h800", "--gpus", "32"]) == 0
    out = capsys.readouterr().out
    assert "GPU hours on 32 GPUs" in out and "modelled for 32 x h800" in out and "on each GPU" in out
    assert not (tmp_path / "paper").exists()  # nothing was made


@pytest.mark.parametrize(("profile", "hours", "skipped", "needs"), [
    ("paper", "GPU hours on 2 GPUs", {"rl-math", "rl-multi", "mt-opd", "pairs"}, "merge-ties"),
    ("gpu", "GPU hours on 1 GPU ", {"rl-math", "rl-multi", "mt-opd", "pairs"}, "merge-ties"),
    ("released", "GPU hours on 1 GPU ", {"base", "rl-math", "rl-multi", "merges", "sweep"}, "neighborhoods"),
    ("byo", "GPU hours on 1 GPU ", {"rl-math", "rl-units", "merges", "sweep"}, "eval-rl-units")])
def test_each_large_profile_has_a_bill(profile, hours, skipped, needs, tmp_path, monkeypatch, capsys):
    """Faults: a study that trains nothing and is refused for want of memory to train; one of whose models none is said to be
    skippable; a model without disk or memory; no word on how sure it is."""
    monkeypatch.setenv("M2RL_ARTIFACTS", str(tmp_path / "art"))
    if profile == "byo":
        brought = toy_foreign.models(tmp_path / "models")
        profile = str(toy_foreign.profile(tmp_path, brought, over="gpu"))
    run = open_run(profile)
    found = bill.frame(run, bill.Given("h100"))
    ours = found.set_index("stage")
    assert found[["seconds", "low", "high", "most", "disk"]].notna().all(axis=None) and (found["gpus"] > 0).all()
    models = ours.loc[list(run.members.models)]
    assert (models["disk"] > 0).all() and ours.loc[needs, "seconds"] > 0
    samples = ours[ours["rollouts"] > 0]
    assert (samples["memory"] > 1e9).all()
    assert skipped <= set(bill.skippable(run, found).query("saves > 0")["without"])
    assert main(["estimate", "--profile", profile, "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    for said in (hours, "disk when all is made", "memory at the peak on each GPU", "without", "each alone", "how sure",
                 "factor of", "likely range"):
        assert said in out, said
    assert ("to go on from" in out) == (found["kind"] == "rl").any()


def test_a_model_that_is_brought_takes_the_disk_of_its_files(tmp_path):
    """Catches a brought model that is billed at four bytes a weight, though it is linked as it is, or comes in bfloat16."""
    brought = toy_foreign.models(tmp_path / "models")
    run = open_run(str(toy_foreign.profile(tmp_path, brought, over="gpu")), tmp_path / "art")
    files = sum(path.stat().st_size for path in brought["rl-math"].iterdir())
    assert bill.frame(run, bill.Given("h100")).set_index("stage").loc["rl-math", "disk"] == files
    whole = bill.frame(open_run("released", tmp_path / "art"), bill.Given("h100")).set_index("stage")
    assert whole.loc["sft", "disk"] == whole.loc["merge-ties", "disk"] / 2 == 2 * 4_022_468_096
    paper = bill.frame(open_run("paper", tmp_path / "art"), bill.Given("h100", 8)).set_index("stage")
    assert paper.loc["sft", "disk"] > 1e11 + paper.loc["rl-math", "disk"]  # fourteen million rows beside the weights


def test_more_gpus_are_sooner_and_dearer(tmp_path):
    run = open_run("paper", tmp_path)
    few, many = (bill.frame(run, bill.Given("h100", n)).set_index("stage").loc["rl-math"] for n in (8, 128))
    assert many["seconds"] < few["seconds"] and many["seconds"] * 128 > few["seconds"] * 8
    assert math.isclose(few["tokens"], many["tokens"])


def test_as_many_gpus_as_the_profile_gives_a_stage(tmp_path):
    """Catches a bill for another number than the one that the run will take."""
    config = Path(__file__).parent.parent / "params" / "accelerate" / "fsdp-1node-8.yaml"
    path = tmp_path / "nodes.yaml"
    path.write_text("extends: paper\nresources:\n  eval: {gpus: 1}\n"
                    f"  rl: {{gpus: 8, processes: 16, nodes: 2, config: {config}}}\n")
    run = open_run(path, tmp_path)
    assert bill.source(run, bill.Given("h100")).cluster.gpus == 16
    assert bill.source(run, bill.Given("h100", 32)).cluster.gpus == 32


def test_given_rates_are_reached(tmp_path):
    """A user's own tokens a second: shares of a GPU are set so that a step has them; half the rate, twice the time."""
    run = open_run("paper", tmp_path)
    quick, slow = (bill.source(run, bill.Given("h100", 32, *rates)).cluster for rates in ((2000, 8000), (1000, 4000)))
    work = speed.Work(2048, quick.prompt, lengths.quantiles(sum(quick.lengths.values()) / 5, 32768), 32768, 16)
    assert speed.rates(quick.shape, quick.machine, 32, work, quick.efficiency) == pytest.approx((2000, 8000), rel=1e-3)
    ratio = slow.call(plan.Call({"math": 2048}, learns=1.0)) / quick.call(plan.Call({"math": 2048}, learns=1.0))
    assert ratio == pytest.approx(2, rel=0.02)
    assert "given rates" in bill.source(run, bill.Given(sampling=1000)).label


@pytest.mark.parametrize(("arguments", "said"), [
    (["--gpu", "h10O"], "GPU=h10O: unknown machine; did you mean 'h100'?"),
    (["--gpu", "toaster"], "there are h100"),
    (["--gpu", "h100", "--gpus", "1", "--profile", "paper"], "GPUS=1 of h100 are too few"),
    (["--gpu", "h100", "--gpus", "-3"], "GPUS=-3: must be above 0")])
def test_what_cannot_be_told_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("M2RL_ARTIFACTS", str(tmp_path))
    assert main(["estimate", *([] if "--profile" in arguments else ["--profile", "smoke"]), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1] and error[-1].startswith("error: ")


def test_a_bill_is_read_without_torch(tmp_path):
    """Catches two seconds of imports in every plan: only a calibration needs torch."""
    code = ("import sys; from m2rl_core.run import open_run; from m2rl_core.views import scaling; scaling.scaled(); "
            f"open_run('smoke', {str(tmp_path)!r}).estimate(); print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
