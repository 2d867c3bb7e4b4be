"""One model on several processes: the same trajectory, the same gradient from parts, and what happens when one is lost."""
from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_policy
import toy_training
import yaml
from safetensors.torch import load_file

from m2rl_core import engines, ranks
from m2rl_core.engines.vllm_engine import VllmEngine
from m2rl_core.ranks import sharded
from m2rl_core.errors import StudyError
from m2rl_core.profile import load_profile
from m2rl_core.run import open_run
from m2rl_core.training.trainer import read_lines

HOME = Path(__file__).parent.parent
CONFIGS = HOME / "params" / "accelerate"
PARTS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
STAGES = ("rl-multi", "mt-opd", "mt-opd-full", "sft", "rl-multi-ahead")


def environment(**settings: str) -> dict[str, str]:
    paths = os.pathsep.join([str(HOME), str(HOME / "tests"), *sys.path])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **settings}


def launch(n: int, *arguments, **settings: str) -> subprocess.CompletedProcess:
    """`toy_ranks.py` in n processes; a single one is started as any other program."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(n)]
    return subprocess.run([sys.executable, *(torchrun if n > 1 else ()), "tests/toy_ranks.py", *map(str, arguments)],
                          cwd=HOME, env=environment(**settings), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def root(tmp_path_factory, words) -> Path:
    """The models that training starts from, and every stage made by one process in `whole`."""
    root = tmp_path_factory.mktemp("ranks")
    policy = toy_policy.make(words)
    toy_training.models(policy, root / "models")
    done = launch(1, root, ",".join(STAGES), root / "whole")
    assert done.returncode == 0, done.stderr
    return root


def assert_same_trajectory(root: Path, folder: Path, stage: str) -> None:
    """Equal text, rewards and accuracy; weights and numbers within float32's rounding of sums in another order."""
    wanted, found = root / "whole" / stage / "out", folder / stage / "out"
    assert {p.name for p in wanted.iterdir()} == {p.name for p in found.iterdir()}
    for name in ("rollouts.jsonl", "along.parquet", "blend.jsonl", "config.json", "tokenizer.json"):
        if (wanted / name).exists():
            assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    before = load_file(root / "models" / "sft" / "model.safetensors")
    a, b = (load_file(path / "model.safetensors") for path in (wanted, found))
    moved = max(float((a[n] - before[n]).abs().max()) for n in a)
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 0.02 * moved
    assert all(a[n].dtype == b[n].dtype for n in a)
    mine, its = (read_lines(path / "metrics.jsonl") for path in (wanted, found))
    assert len(mine) == len(its) > 1
    for x, y in zip(mine, its, strict=True):
        assert x.keys() == y.keys()
        for name in x:  # the sampler's log-probs against the trainer's differ by rounding alone, on either side
            near = 1e-5 if "mismatch" in name else 2e-6
            assert y[name] == pytest.approx(x[name], rel=1e-4, abs=near), (x["step"], name)


# ---- sharing out

def test_shares_are_balanced_whole_and_in_order():
    """Faults: a part of the work left out or done twice; one rank with all the long answers; an order that is lost."""
    assert ranks.balanced([5, 1, 4, 2, 3, 3], 2) == [[0, 1, 5], [2, 3, 4]]  # 5 | 4, 3 to the second, 3 to the first, ...
    for n in (1, 2, 3, 7):
        costs = [(13 * i) % 17 + 1 for i in range(20)]
        shares = ranks.balanced(costs, n)
        assert sorted(i for share in shares for i in share) == list(range(20))
        assert all(share == sorted(share) for share in shares) and len(shares) == n
        sums = [sum(costs[i] for i in share) for share in shares]
        assert max(sums) - min(sums) <= max(costs)
    assert ranks.balanced([1.0], 3) == [[0], [], []]


def test_one_process_gets_back_what_it_gave(played):
    """Fault: a launch of one that copies, reorders or joins anything."""
    stats = {"loss": 1.0, "kept": 0.5, "mismatch": 2.0}
    assert ranks.share(played) is played and ranks.joined(stats, played) is stats
    assert ranks.agree(played) is played and ranks.gather(3) == [3] and ranks.total(0.1) == 0.1
    assert ranks.spread(lambda a, b: [a, b], [1], [2]) == [[1], [2]]
    assert (ranks.size(), ranks.rank(), ranks.bounds(7)) == (1, 0, (0, 7)) and sharded.place(played) is played


def test_draws_of_a_share_are_those_of_the_whole():
    """Fault: a generator that does not stand where it would after the rows before, so that ranks sample other answers."""
    whole = torch.rand(5 * 3, 7, generator=torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(3)
    for _ in range(2):
        torch.rand(3, 7, generator=rng)
    assert torch.equal(torch.rand(3 * 3, 7, generator=rng), whole[6:])
    for engine in (engines.TORCH, VllmEngine):
        one, parts = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        engine.pass_over(5, 3, one, 7, 4)
        engine.pass_over(2, 3, parts, 7, 4)
        engine.pass_over(3, 3, parts, 7, 4)
        assert torch.equal(torch.rand(9, generator=one), torch.rand(9, generator=parts)), engine


# ---- the same trajectory

@pytest.mark.parametrize(("n", "settings", "stages"), [(2, {}, STAGES), (4, {}, STAGES[:1]), (2, PARTS, STAGES)],
                         ids=["2 whole", "4 whole", "2 in parts"])
def test_more_processes_give_the_same_trajectory(root, tmp_path, n, settings, stages):
    """Faults: a mean over ranks of means over unequal shares; another rank's draws; a KL term, a teacher or an importance
    weight of the wrong rollout; statistics of rank 0 alone; a rank without a prompt that the others wait for; a message
    of the thread that samples ahead taken for one of the update's."""
    done = launch(n, root, ",".join(stages), tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    for stage in stages:
        assert_same_trajectory(root, tmp_path, stage)


def test_parts_have_the_gradient_of_the_whole(root, tmp_path):
    """Faults: gradients averaged, or counted once for each rank; a micro-batch without its partner on the other rank;
    bf16 weights that are trained; a layer that stays gathered, so that sharding saves nothing."""
    done = launch(2, root, "parts", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "parts.json").read_text())
    sizes = found["sizes"]
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    beside = sum(size for name, size in sizes.items() if ".layers." not in name)
    for name in ("parts", "recomputed", "bf16"):
        exact, bits = name != "bf16", 2 if name == "bf16" else 1
        assert found[name]["loss"] == pytest.approx(found["loss"], rel=1e-6 if exact else 1e-2)
        assert found[name]["off"] < (1e-6 if exact else 0.05) * found["norm"]
        assert found[name]["types"] == ["torch.float32"]  # weights and gradients, whatever is computed with
        for peak in found[name]["peak"]:
            assert sum(sizes.values()) / 2 <= peak <= sum(sizes.values()) / 2 + (layer + beside) / bits + 1024
    assert found["bf16"]["off"] > 0  # it was another type


# ---- what is lost and taken up again

@pytest.mark.parametrize(("before", "after", "n", "stage"), [
    (PARTS, {}, 1, "rl-multi"), ({}, PARTS, 2, "rl-multi"), (PARTS, {}, 1, "rl-multi-ahead")],
    ids=["parts to one", "whole to parts", "ahead, parts to one"])
def test_a_killed_run_goes_on_with_other_processes(root, tmp_path, before, after, n, stage):
    """Faults: a checkpoint that only as many ranks can read, or that lacks Adam's moments, or the other ranks' share of a
    batch that was sampled ahead; no word on who was lost."""
    # its fourth sampling is in the evaluation after the third step, which has no checkpoint yet
    done = launch(2, root, stage, tmp_path, "die 4 1", M2RL_RANK_TIMEOUT="60", **before)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and lines[0].startswith("error: rank 1 of 2 (process ") and "goes on from the last" in lines[0]
    kept = [path.name for path in (tmp_path / stage / "state").glob("step-*")]
    assert kept == ["step-000002"] and not (tmp_path / stage / "out" / "model.safetensors").exists()
    again = launch(n, root, stage, tmp_path, **after)
    assert again.returncode == 0, again.stderr
    assert "step 3/3" in again.stdout and "step 2/3" not in again.stdout
    assert_same_trajectory(root, tmp_path, stage)


@pytest.mark.parametrize(("stage", "moment", "seconds", "wanted"), [
    ("rl-multi", "hang 2 1", "12",
     r"error: rank 1 of 2 \(process \d+ on .*\) did not answer within 12 s \(M2RL_RANK_TIMEOUT\); all"),
    ("rl-multi", "raise 2 1", "60", r"error: rank 1(:| of 2 .* has ended:) no room on this rank's disk"),
    ("rl-multi-ahead", "raise 2 1", "60", r"error: rank 1(:| of 2 .* has ended:) no room on this rank's disk"),
    ("rl-multi", "die 2 0", "60",
     r"error: rank 0 of 2 \(process \d+ on .*\) has ended; all ranks stop, what was made is kept")])
def test_all_stop_with_one_line_that_names_who_is_lost(root, tmp_path, stage, moment, seconds, wanted):
    """Faults: the others wait for ever; one line from each rank, or none; the wrong rank named, or not why."""
    done = launch(2, root, stage, tmp_path, moment, M2RL_RANK_TIMEOUT=seconds)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and re.match(wanted, lines[0]), done.stderr
    assert not (tmp_path / stage / "out" / "model.safetensors").exists()


def test_a_rank_that_dies_while_torch_gathers_weights_is_named_as_well(root, tmp_path):
    """Fault: a traceback of FSDP's own call to the other ranks, which is none of ours."""
    done = launch(2, root, "rl-multi", tmp_path, "drop 2 1", M2RL_RANK_TIMEOUT="60", **PARTS)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    wanted = r"error: rank 1 of 2 \(process \d+ on .*\) has ended; all ranks stop"
    assert len(lines) == 1 and re.match(wanted, lines[0]), done.stderr


# ---- accelerate's config files

def launcher(path: Path) -> dict[str, str]:
    """What accelerate's own launcher sets for the ranks that a config file asks for."""
    from accelerate.commands import launch as accelerate
    from accelerate.utils.launch import prepare_multi_gpu_env
    args = accelerate.launch_command_parser().parse_args(["--config_file", str(path), "-m", "m2rl_core"])
    args, *_ = accelerate._validate_launch_command(args)
    assert args.multi_gpu or args.use_fsdp  # else it starts one process
    return {name: value for name, value in prepare_multi_gpu_env(args).items()
            if name.startswith(("ACCELERATE_", "FSDP_"))} | {"WORLD_SIZE": str(args.num_processes)}


@pytest.mark.parametrize(("name", "size", "plan"), [
    ("ddp-1node-8", 8, sharded.Plan()),
    ("fsdp-1node-8", 8, sharded.Plan(True, torch.bfloat16)),
    ("fsdp-checkpointing", 8, sharded.Plan(True, torch.bfloat16, recompute=True)),
    ("fsdp-offload", 8, sharded.Plan(True, torch.bfloat16, offload=True, recompute=True)),
    ("fsdp-multi-node", 16, sharded.Plan(True, torch.bfloat16, recompute=True)),
    ("cpu-2", 2, sharded.Plan(True)),
])
def test_each_config_file_means_what_it_says(monkeypatch, name, size, plan):
    """Faults: a key that accelerate does not know or reads otherwise; a file that starts one process, or FSDP1."""
    for key, value in launcher(CONFIGS / f"{name}.yaml").items():
        monkeypatch.setenv(key, value)
    assert os.environ["WORLD_SIZE"] == str(size) and sharded.Plan.launched() == plan


def test_every_config_file_is_tested():
    """Fault: a file that nobody has read since accelerate changed."""
    (mark,) = test_each_config_file_means_what_it_says.pytestmark
    tested = {name for name, *_ in mark.args[1]}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == tested


@pytest.mark.parametrize(("settings", "message"), [
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "^accelerate's mixed_precision is fp8; this trainer computes with bf16"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16 without FSDP; .* take one of params/accelerate/fsdp"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version is not 2"),
])
def test_what_the_trainer_has_not_is_refused(monkeypatch, settings, message):
    """Fault: a setting that is read by nobody, so that a run is another one than its config says."""
    for key in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(key, raising=False)
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(StudyError, match=message):
        sharded.Plan.launched()


# ---- the command line

@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The smoke profile, shorter."""
    content = yaml.safe_load((HOME / "params" / "smoke.yaml").read_text())
    content |= {"threads": 2, "jobs": 1}
    content["base"] |= {"documents": 60, "steps": 2}
    content["sft"] |= {"rows": 60, "steps": 2, "warmup": 0, "blend": [
        {"type": "Math", "domain": "math", "share": 1.0, "pool": 60, "sampling": "random sampling"}]}
    content["rl"] |= {"steps": 2, "prompts": 3, "eval_every": 2, "eval_items": 1}
    content["eval"]["items"] = dict.fromkeys(content["eval"]["items"], 1)
    path = tmp_path_factory.mktemp("profile") / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_accelerate_launch_makes_a_stage_in_the_store(small, tmp_path):
    """Faults: every rank takes the lock, or makes a folder of its own; a stage sealed before all have done; two answers."""
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "cpu-2.yaml", "-m",
                           "m2rl_core", "run", "rl-math", "--profile", small], cwd=HOME, capture_output=True, text=True,
                          timeout=300, env=environment(M2RL_ARTIFACTS=str(tmp_path / "many")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rl-math: ") == 1 and done.stdout.count("rl-math · step 2/2") == 1
    one = subprocess.run([sys.executable, "-m", "m2rl_core", "run", "rl-math", "--profile", small], cwd=HOME, timeout=300,
                         env=environment(M2RL_ARTIFACTS=str(tmp_path / "one")), capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    mine, its = (sorted((tmp_path / kind).rglob("manifest.json")) for kind in ("one", "many"))
    assert [p.relative_to(tmp_path / "one") for p in mine] == [p.relative_to(tmp_path / "many") for p in its]
    assert len(mine) == 3
    for a, b in zip(mine, its, strict=True):
        assert json.loads(a.read_text())["digests"].keys() == json.loads(b.read_text())["digests"].keys()
        x, y = (load_file(p.parent / "model.safetensors") for p in (a, b))
        assert max(float((x[n] - y[n]).abs().max()) for n in x) < 1e-4


def test_a_command_for_one_process_is_refused_for_two(tmp_path):
    """Fault: two processes that each execute every notebook into the same report."""
    done = subprocess.run([sys.executable, "-m", "m2rl_core", "status", "--profile", "smoke"], cwd=HOME, capture_output=True,
                          text=True, timeout=60, env=environment(RANK="0", WORLD_SIZE="2", M2RL_ARTIFACTS=str(tmp_path)))
    assert done.returncode == 2
    assert done.stderr == "error: status is for one process, but 2 were launched; run and rebuild take several\n"


def test_a_folder_that_is_not_shared_is_named(tmp_path, monkeypatch):
    """Fault: the second machine is told to make what the first has made already."""
    run = open_run("smoke", tmp_path)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StudyError, match="^rank 1 on .* does not see sft in .*/smoke, which rank 0 does: let M2RL_ART"):
        run._inputs(run.stages["rl-math"])


def test_each_rank_has_a_vllm_on_its_own_gpu(monkeypatch):
    """Faults: as many vLLM processes as ranks, all on the first GPU, or each with all cores; replicas of every rank's that
    would be on its neighbour's GPU; servers that every rank wants for itself."""
    profile = dataclasses.replace(load_profile("smoke"), engine="vllm", threads=8)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    opened = engines.open_engine(profile)
    assert type(opened) is engines.SharedEngine and (opened.engine.threads, opened.engine.gpu) == (2, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7,5")
    assert engines.open_engine(profile).engine.gpu == "6"
    several = dataclasses.replace(profile, vllm=dataclasses.replace(profile.vllm, tensor_parallel=2))
    with pytest.raises(StudyError, match="^engine: vllm on 8 ranks: each has one vLLM on its own GPU, so .* must be 1; "):
        engines.open_engine(several)
    monkeypatch.setenv("M2RL_VLLM", "a:1, b:2")
    opened = engines.open_engine(several)
    assert type(opened) is engines.FirstEngine and opened.engine.servers == ["a:1", "b:2"]


def test_a_launch_of_one_is_no_launch(monkeypatch):
    """Fault: `torchrun --nproc-per-node 1` computes in another way than plain Python; FSDP on one GPU is left out."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert not ranks.launched()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert ranks.launched() and ranks.size() == 1
    with ranks.alone():
        assert not ranks.launched()


def test_all_ranks_know_the_store_of_the_first(tmp_path):
    """Catches ranks that keep blends and items beside their own scratch folders, or find none there."""
    done = launch(2, tmp_path, "store", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "store.json").read_text()) == [str(tmp_path)] * 2
