"""One rank of training stages of a tiny random policy, as torchrun or accelerate starts it.

`torchrun ... tests/toy_ranks.py ROOT STAGES FOLDER [MOMENT]` makes the stages (with commas) from ROOT/models in
FOLDER/<stage>/out and .../state. MOMENT, "die 3 1", "hang 3 1" or "raise 3 1": what rank 1 does in place of its 3rd
sampling. The stage `parts` measures a sharded model instead: see `measure`. TOY_ENGINE: who samples, if not torch.
"""
from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import toy_policy
import toy_training

from m2rl_core import engines, progress, ranks
from m2rl_core.domains import DOMAINS, training_rows
from m2rl_core.errors import StudyError
from m2rl_core.models import attention
from m2rl_core.models import policy as policies
from m2rl_core.ranks import sharded
from m2rl_core.run import BuilderContext
from m2rl_core.store import store_of
from m2rl_core.training import collect, grpo, opd, sft

BUILD = {"rl-multi": grpo.build, "rl-multi-ahead": grpo.build, "mt-opd": opd.build, "mt-opd-full": opd.build,
         "sft": sft.build_sft}
STEPS, PROMPTS = 3, 3  # 2 ranks have unequal shares, and one of 4 has nothing to sample


def fail_at(what: str, count: int, who: int) -> None:
    """Let a rank die, hang or raise at its `count`-th sampling, or die between two layers of its `count`-th update."""
    real, left = engines.TorchEngine.sample, [count]
    if what == "drop":
        gather = grpo.response_hidden

        def half(policy, part):
            left[0] -= 1
            if left[0] == 0 and ranks.rank() == who:
                block = policy.stack.blocks[1]
                block.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            return gather(policy, part)
        grpo.response_hidden = half
        return

    def call(*args, **settings):
        left[0] -= 1
        if left[0] == 0 and ranks.rank() == who:
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "raise":
                raise StudyError("no room on this rank's disk")
            time.sleep(600)
        return real(*args, **settings)
    engines.TorchEngine.sample = staticmethod(call)


def profile(stage: str):
    toy = toy_training.profile(int(stage.endswith(toy_training.AHEAD)))
    lesson = dataclasses.replace(toy.opd, prompts=PROMPTS, steps=STEPS, variance_every=2,
                                 loss="full" if stage.endswith("full") else "sampled")
    return dataclasses.replace(toy, engine=os.environ.get("TOY_ENGINE", "torch"), opd=lesson,
                               sft=dataclasses.replace(toy.sft, steps=STEPS),
                               rl=dataclasses.replace(toy.rl, prompts=PROMPTS, kl=0.1))


def make(root: Path, stage: str, folder: Path) -> None:
    """One stage, by all ranks."""
    made = {path.name: path for path in (root / "models").iterdir()}
    name = stage.removesuffix("-full").removesuffix(toy_training.AHEAD)
    home = folder / stage if ranks.first() else ranks.scratch()
    (home / "out").mkdir(parents=True, exist_ok=True)
    shown = (progress.Progress if ranks.first() else progress.Silent)(stage)
    BUILD[stage](BuilderContext(profile(stage), SimpleNamespace(name=name, settings={"steps": STEPS}), {
        **made, "base": made["sft"]}, home / "out", home / "state", shown, shown.log, toy_training.SEED))


def measure(root: Path, folder: Path) -> None:
    """Loss and gradient of a sharded model beside those of a whole one, and what of its weights lies on a rank at most."""
    words = policies.load_tokenizer(root / "models" / "sft")
    policy = toy_policy.make(words, spec=dataclasses.replace(toy_policy.SPEC, layers=6))
    rows = [sft.encode_sft(policy, row) for d in DOMAINS for row in training_rows(d, "sft", 3, 2)]
    sft.MICRO_TOKENS = 300  # many micro-batches, not equally many on each rank
    whole = toy_policy.clone(policy)
    whole.requires_grad()
    with ranks.alone():
        wanted, _ = sft.masked_loss(whole, rows)
    sizes = {name: w.numel() * 4 for name, w in policy.weights.items()}
    found = {"sizes": sizes, "loss": wanted, "norm": max(float(w.grad.abs().max()) for w in whole.weights.values())}
    for name, plan in {"parts": sharded.Plan(True), "recomputed": sharded.Plan(True, recompute=True),
                       "offloaded": sharded.Plan(True, offload=True),
                       "bf16": sharded.Plan(True, torch.bfloat16)}.items():
        learner = sharded.place(policy, plan)
        parameters, most = learner.requires_grad(), [0]
        count_in_attention(parameters, learner, most)
        loss, _ = sft.masked_loss(learner, rows)
        types = {str(p.dtype) for p in parameters} | {str(p.grad.dtype) for p in parameters}
        off = max(float((g - whole.weights[n].grad).abs().max()) for n, g in learner.gradients().items())
        found[name] = {"loss": loss, "off": off, "peak": ranks.gather(most[0]), "types": sorted(types)}
    if ranks.first():
        (folder / "parts.json").write_text(json.dumps(found))


def count_in_attention(parameters, learner, most: list[int]) -> None:
    """Note at every attention, inside a layer, how many bytes of weights there are on this rank."""
    real = getattr(attention.Causal.__call__, "__wrapped__", attention.Causal.__call__)

    def call(self, *args):
        parts = sum(p.to_local().nbytes for p in parameters)
        whole = sum(w.nbytes for w in learner.weights.values() if not hasattr(w, "to_local"))
        most[0] = max(most[0], parts + whole)
        return real(self, *args)
    call.__wrapped__ = real
    attention.Causal.__call__ = call


def store(folder: Path) -> None:
    """Where each rank takes the store of a stage to be."""
    home = folder / "models" / "x" if ranks.first() else ranks.scratch()
    found = ranks.gather(str(store_of(SimpleNamespace(out=home))))
    if ranks.first():
        (folder / "store.json").write_text(json.dumps(found))


def main(root: Path, stages: str, folder: Path, moment: str = "") -> int:
    torch.set_num_threads(1)
    collect.rewards = toy_training.by_text
    if moment:
        what, count, who = moment.split()
        fail_at(what, int(count), int(who))
    try:
        for stage in stages.split(","):
            if stage == "store":
                store(folder)
            else:
                measure(root, folder) if stage == "parts" else make(root, stage, folder)
    except StudyError as error:
        ranks.tell(error)
        return 2
    return 0


if __name__ == "__main__":
    root, stages, folder, *moment = sys.argv[1:]
    ranks.leave(main(Path(root), stages, Path(folder), *moment))
