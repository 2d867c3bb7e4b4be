"""Self-verification (section 3.6): models judge their own answers, from the outcome or from the whole process.

The paper prints no judge prompts; ours are data, in `PROMPTS`. The blend holds rows of the same form, half of
them right, so that the question can be asked of a small model at all.
"""
from __future__ import annotations

import json
import random
import re

import pandas as pd
import torch

from m2rl_core import domains
from m2rl_core.domains import Row, answer_of, generator, module
from m2rl_core.engines import open_engine
from m2rl_core.models import policy as policies
from m2rl_core.study import JUDGED_BENCHMARKS

MODES = ("outcome", "process")
JUDGE_TOKENS = 16  # enough for an empty think block and one word; a profile whose models think gives them more
PROMPTS = {
    "outcome": "Judge the answer.\nTask: {task}\nAnswer: {shown}\nIs it right?",
    "process": "Judge the work.\nTask: {task}\nWork: {shown}\nIs it right?",
}
COLUMNS = ["model", "benchmark", "item", "sample", "mode", "truth", "said", "correct", "tokens", "response"]
REPLY = "<think>\n\n</think>\n\n{}"


def judge_row(task: str, response: str, mode: str, right: bool, name: str) -> Row:
    """Ask whether `response` to `task` is right; in "outcome" mode only what stands after `</think>` is shown."""
    thought = response.replace("<think>\n", "").replace("</think>", "")
    shown = (answer_of(response) or "") if mode == "outcome" else thought  # no answer is shown as none
    prompt = PROMPTS[mode].format(task=task, shown=shown.strip())
    return Row(id=name, domain="judge", source=mode, fingerprint=f"judge/{name}",
               messages=({"role": "user", "content": prompt},), truth={"right": right})


def training_rows(n: int, seed: int) -> list[Row]:
    """`n` SFT rows in judge form: four domains, both modes, right and wrong answers in equal parts."""
    rows = []
    for i in range(n):
        rng = generator(seed, "judge", i)
        domain = ("math", "coding", "science", "if")[i % 4]
        right, mode = bool(i // 4 % 2), MODES[i // 8 % 2]
        task = _training_task(domain, rng)
        turns = module(domain).respond(task, worked=rng.random() < 0.5) if right else module(domain).spoil(task, rng)
        row = judge_row(task.messages[-1]["content"], turns[-1]["content"], mode, right, f"judge/sft/{i:05d}")
        said = REPLY.format("Yes" if right else "No")
        rows.append(Row(**{**row.__dict__, "turns": ({"role": "assistant", "content": said},)}))
    return rows


def _training_task(domain: str, rng: random.Random) -> Row:
    """A task of the domain's RL kind that is not held out."""
    while domains.is_held_out((task := module(domain).rl(rng)).fingerprint):
        pass
    return task


def verdict_of(turn: str) -> int:
    """1 for yes, 0 for no, -1 where the judge says neither."""
    found = re.match(r"\W*(yes|no)\b", answer_of(turn) or "", re.IGNORECASE)
    return -1 if found is None else int(found[1].lower() == "yes")


def build(ctx) -> None:
    """One model judges its own sampled answers on Table 7's benchmarks (or the stage's), K times each, in both modes.

    An answer that leaves no room for the judge's words is not judged in that mode; `unjudged.json` counts these.
    """
    settings = ctx.stage.settings
    model = ctx.stage.name.removeprefix("judge-")
    answers = pd.read_parquet(ctx.inputs[f"eval-{model}"] / "rows.parquet")
    policy = policies.load(ctx.inputs[model])
    answers = answers[answers["benchmark"].isin(settings.get("benchmarks", JUDGED_BENCHMARKS)) & (answers["sample"] == 0)]
    answers = answers.groupby("benchmark").head(settings["items"]).reset_index(drop=True)
    found, unjudged = [], {}
    spoken = settings.get("tokens", JUDGE_TOKENS)
    room = policy.config.max_position_embeddings - settings.get("tokens", settings["max_new_tokens"])
    with open_engine(ctx.profile) as engine:
        for mode in MODES:
            rows = [judge_row(a.prompt, a.response, mode, a.score == 1, a.item) for a in answers.itertuples()]
            fits = [i for i, row in enumerate(rows) if len(policies.encode_prompt(policy, row.messages)) <= room]
            unjudged[mode] = {"answers": len(rows), "no room": len(rows) - len(fits), "room": room}
            rng = torch.Generator().manual_seed(generator(ctx.profile.seed, "judge", mode).randrange(2**62))
            rollouts = engine.sample(policy, [rows[i] for i in fits], settings["k"], generator=rng,
                                     temperature=settings["temperature"], max_new_tokens=spoken)
            for j, rollout in enumerate(rollouts):
                answer, truth = answers.iloc[fits[j // settings["k"]]], int(rollout.row.truth["right"])
                said = verdict_of(rollout.turns[-1])
                found.append({"model": model, "benchmark": answer.benchmark, "item": answer["item"],
                              "sample": j % settings["k"], "mode": mode, "truth": truth, "said": said,
                              "correct": int(said == truth), "tokens": rollout.length, "response": rollout.turns[-1]})
    pd.DataFrame(found, columns=COLUMNS).to_parquet(ctx.out / "rows.parquet", index=False)
    (ctx.out / "unjudged.json").write_text(json.dumps(unjudged, indent=2))
    (ctx.out / "prompts.json").write_text(json.dumps(PROMPTS, indent=2))
