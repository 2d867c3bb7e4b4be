"""Avg@K: one row for each (model, benchmark, item, sample), the single source of every score in the study."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from m2rl_core import policy as policies
from m2rl_core import ranks
from m2rl_core.domains import BENCHMARKS, Row, Verdict, benchmark_rows, generator, prepare, rewards
from m2rl_core.engines import TORCH, Engine, open_engine
from m2rl_core.policy import Policy
from m2rl_core.rollout import Rollout
from m2rl_core.study import first
from m2rl_core.trainer import write_lines

END_OF_TURN = "<|im_end|>"


def items_of(spec, seed: int, limit: int | None = None) -> dict[str, list[Row]]:
    """The held-out items of every benchmark of the profile; `limit` takes the first few of each."""
    return {name: benchmark_rows(name, spec.items[name], seed)[:limit] for name in BENCHMARKS if name in spec.items}


def evaluate(policy: Policy, model: str, items: dict[str, list[Row]], k: dict[str, int], spec, seed: int,
             engine: Engine = TORCH) -> pd.DataFrame:
    """Sample `k[benchmark]` responses to each item and verify them; columns as in `frame`.

    The draws depend on (seed, benchmark) only, so every model faces the same uniform numbers (or vLLM's seeds).
    """
    prepare(row for rows in items.values() for row in rows)
    parts = []
    for benchmark, rows in items.items():
        rng = torch.Generator().manual_seed(generator(seed, "evaluate", benchmark).randrange(2**62))
        rollouts = engine.sample(policy, rows, k[benchmark], generator=rng, temperature=spec.temperature,
                                 max_new_tokens=spec.max_new_tokens, max_turns=spec.max_turns)
        verdicts = ranks.spread(rewards, [r.row for r in rollouts], [r.turns for r in rollouts])
        parts.append(frame(model, benchmark, rollouts, verdicts, k[benchmark]))
    return pd.concat(parts, ignore_index=True)


def frame(model: str, benchmark: str, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], k: int) -> pd.DataFrame:
    """One row a sample: who, on what, what it said, its score, and why."""
    return pd.DataFrame([{
        "model": model, "benchmark": benchmark, "domain": r.row.domain, "category": r.row.truth.get("category", ""),
        "item": r.row.id, "sample": i % k, "prompt": r.row.messages[-1]["content"], "response": END_OF_TURN.join(r.turns),
        "score": v.score, "reason": v.reason, "tokens": r.length, "truncated": r.truncated,
    } for i, (r, v) in enumerate(zip(rollouts, verdicts, strict=True))])


def build(ctx) -> None:
    """Evaluate one model on every benchmark of the profile (or on those that the stage names)."""
    spec = ctx.profile.eval
    (model, folder), = ((n, p) for n, p in ctx.inputs.items())
    wanted = ctx.stage.settings.get("benchmarks") or list(spec.items)
    items = {name: rows for name, rows in items_of(spec, ctx.profile.seed).items() if name in wanted}
    with open_engine(ctx.profile) as engine:
        rows = evaluate(policies.load(folder), model, items, spec.k, spec, ctx.profile.seed, engine)
    rows.to_parquet(ctx.out / "rows.parquet", index=False)


class Watch:
    """Looks at a policy while it trains: accuracy on all benchmarks every few steps, and some rollouts to read."""

    def __init__(self, ctx, spec, engine: Engine = TORCH):
        self.ctx, self.spec, self.engine = ctx, spec, engine
        self.items = items_of(ctx.profile.eval, ctx.profile.seed, spec.eval_items)
        self.batch: tuple[list[Rollout], list[Verdict]] = [], []
        ctx.state.mkdir(parents=True, exist_ok=True)

    def observe(self, step: int, policy: Policy) -> None:
        """Evaluate after `step` updates where it is due, and after the last. Step 0 is the SFT model's own evaluation."""
        if step == 0 or step % self.spec.eval_every and step != self.ctx.stage.settings["steps"]:
            return
        k = dict.fromkeys(self.items, self.spec.eval_k)
        rows = evaluate(policy, first(self.ctx.stage.name), self.items, k, self.ctx.profile.eval,
                        self.ctx.profile.seed, self.engine)
        rows.drop(columns=["prompt", "response", "reason"]).assign(step=step).to_parquet(
            self.ctx.state / f"along-{step:06d}.parquet", index=False)

    def keep_examples(self, step: int, rollouts: list[Rollout], verdicts: list[Verdict]) -> None:
        """Keep as text four rollouts of every tenth step, and of each step four on which the verifier broke down.

        The last batch is kept in memory.
        """
        self.batch = rollouts, verdicts
        failed = [i for i, v in enumerate(verdicts) if v.failed][:4]
        wanted = dict.fromkeys([*(range(min(4, len(verdicts))) if step % 10 == 0 else ()), *failed])
        if wanted:
            kept = [{"step": step + 1, "item": r.row.id, "domain": r.row.domain, "prompt": r.row.messages[-1]["content"],
                     "response": END_OF_TURN.join(r.turns), "score": v.score, "reason": v.reason}
                    for r, v in ((rollouts[i], verdicts[i]) for i in wanted)]
            (self.ctx.state / f"rollouts-{step:06d}.json").write_text(json.dumps(kept))

    def keep_batch(self, path: Path) -> None:
        """Write the last batch, a rollout a line, with what its loss is made of."""
        write_lines(path, [{"item": r.row.id, "response": END_OF_TURN.join(r.turns), "score": v.score, "reason": v.reason,
                            "prompt": r.prompt, "tokens": r.tokens, "sampled": r.sampled, "logprobs": r.logprobs}
                           for r, v in zip(*self.batch, strict=True)])

    def finish(self) -> None:
        """Gather what was seen into `along.parquet` and `rollouts.jsonl` beside the weights."""
        along = sorted(self.ctx.state.glob("along-*.parquet"))
        if along:
            pd.concat([pd.read_parquet(p) for p in along]).to_parquet(self.ctx.out / "along.parquet", index=False)
        kept = [row for p in sorted(self.ctx.state.glob("rollouts-*.json")) for row in json.loads(p.read_text())]
        write_lines(self.ctx.out / "rollouts.jsonl", kept)
