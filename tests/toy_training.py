"""Training stages of a tiny random policy in processes that are killed: one import of torch, a fork for each attempt.

`python tests/toy_training.py ROOT` makes every stage of STAGES twice: ROOT/whole in one go, ROOT/broken in as many
attempts as there are moments, each ended by SIGKILL at its moment, and one more. ROOT/<folder>/<stage>/steps.txt says
which steps each attempt has finished.
"""
from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import toy_policy

from m2rl_core import evaluate
from m2rl_core.domains import DOMAINS, Verdict
from m2rl_core.models import policy as policies
from m2rl_core.profile import load_profile
from m2rl_core.run import BuilderContext
from m2rl_core.training import collect, grpo, opd, trainer

STEPS, EVERY, SEED = 6, 2, 7
# (where, which call of it in one attempt is the last): rewards stands between sampling and update, clip between
# backward and step, look inside the evaluation after a step that was not saved yet, save in the midst of a checkpoint
TRAINING = (("rewards", 2), ("save", 1), ("clip", 4), ("look", 2))
AHEAD = "-ahead"  # of stages with `overlap: 1`: the second rewards are a thread's, beside the first update
STAGES = {"rl-math": (grpo.build, TRAINING), "rl-multi": (grpo.build, TRAINING), "mt-opd": (opd.build, TRAINING),
          "rl-multi-ahead": (grpo.build, TRAINING), "mt-opd-ahead": (opd.build, TRAINING),
          "eval-sft": (evaluate.build, (("look", 4),))}
PLACES = {"rewards": (collect, "rewards"), "clip": (torch.nn.utils, "clip_grad_norm_"), "look": (evaluate, "rewards"),
          "save": (trainer.torch, "save")}


def profile(overlap: int = 0):
    smoke = load_profile("smoke")
    rl = dataclasses.replace(smoke.rl, prompts=5, group=4, max_new_tokens=10, lr=2e-4, checkpoint_every=EVERY,
                             eval_every=3, eval_items=1, interference_every=1, overlap=overlap)
    return dataclasses.replace(
        smoke, threads=1, rl=rl, opd=dataclasses.replace(smoke.opd, prompts=5, steps=STEPS, lr=2e-4, max_new_tokens=10,
                                                         overlap=overlap),
        eval=dataclasses.replace(smoke.eval, max_new_tokens=10))


def models(policy, root: Path) -> dict[str, Path]:
    """The folders of a start and of five experts, each a little beside it, by name."""
    for i, name in enumerate(("sft", *(f"rl-{domain}" for domain in DOMAINS))):
        policies.save(toy_policy.nudged(policy, 0.5, seed=i) if i else policy, root / name)
    return {path.name: path for path in root.iterdir()}


def by_text(rows, transcripts):
    """Rewards that a random policy gets as often as not: its digest decides."""
    return [Verdict(hashlib.sha256(turns[-1].encode()).digest()[0] % 2 / 1, "by text") for turns in transcripts]


def die_at(place: str, count: int) -> None:
    """Let the `count`-th call of a place kill this process."""
    home, name = PLACES[place]
    real, left = getattr(home, name), [count]

    def call(*args, **settings):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **settings)
    setattr(home, name, call)


def attempt(stage: str, folder: Path, inputs: dict[str, Path], moment=None) -> None:
    """Make a stage in `folder`, or die on the way there."""
    if moment:
        die_at(*moment)
    done = (folder / "steps.txt").open("a")
    done.write("attempt ")
    done.flush()
    progress = SimpleNamespace(step=lambda step, total, **numbers: (done.write(f"{step} "), done.flush()))
    out = folder / "out"
    out.mkdir(exist_ok=True)
    name = stage.removesuffix(AHEAD)
    STAGES[name][0](BuilderContext(
        profile(int(stage.endswith(AHEAD))), SimpleNamespace(name=name, settings={"steps": STEPS}),
        inputs, out, folder / "state", progress, print, SEED))


def in_a_fork(*args) -> int:
    """Exit status of an attempt in a process of its own, as os.waitpid gives it."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        attempt(*args)
        os._exit(0)
    finally:
        os._exit(1)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    collect.rewards = by_text
    sft = toy_policy.make(toy_policy.tokenizer())
    for i, name in enumerate(("sft", *(f"rl-{domain}" for domain in DOMAINS))):
        policies.save(toy_policy.nudged(sft, 0.5, seed=i) if i else sft, root / "models" / name)
    made = {path.name: path for path in (root / "models").iterdir()}
    for stage, (_, moments) in STAGES.items():
        inputs = made if stage.startswith("mt-opd") else {"sft": made["sft"]}
        for kind, ends in (("whole", ()), ("broken", moments)):
            home = root / kind / stage
            home.mkdir(parents=True)
            for moment in ends:
                assert in_a_fork(stage, home, inputs, moment) == signal.SIGKILL, (stage, moment)
            assert in_a_fork(stage, home, inputs) == 0, stage
