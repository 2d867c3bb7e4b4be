"""Avg@K: one row for each (model, benchmark, item, sample), the single source of every score in the study.

Miniatures and real benchmarks take one way. What was sampled and verified is kept a chunk at a time, so that a killed
evaluation goes on where it was; a real benchmark that cannot be had here is left out, and `not_run.json` says why.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch

from m2rl_core import ranks
from m2rl_core.domains import BENCHMARKS, OWN, Row, Verdict, benchmark_rows, environments, generator, prepare, rewards
from m2rl_core.engines import TORCH, Engine, open_engine
from m2rl_core.engines.rollout import Rollout
from m2rl_core.errors import StudyError
from m2rl_core.models import policy as policies
from m2rl_core.models.policy import Policy
from m2rl_core.progress import say
from m2rl_core.store import NOT_RUN, store_of
from m2rl_core.study import first
from m2rl_core.training.trainer import write_lines

END_OF_TURN = "<|im_end|>"
CHUNK = 1024  # rollouts of a real benchmark that are sampled, verified and kept together
ITEMS = "benchmarks"  # the folder of a store that keeps the real benchmarks' items


def items_of(spec, seed: int, limit: int | None = None, store: Path | None = None,
             names: Sequence[str] | None = None, missing: dict[str, str] | None = None) -> dict[str, list[Row]]:
    """The held-out items of every benchmark of the profile (or of `names`); `limit` takes the first few of each.

    Real ones are kept in the folder `store`. Those that cannot be had are left out and said, also in `missing`.
    """
    names = list(spec.items) if names is None else names
    own = {name: benchmark_rows(name, n, seed)[:limit] for name, n in spec.items.items() if name in OWN and name in names}
    if spec.rows == "miniature":
        return {name: benchmark_rows(name, spec.items[name], seed)[:limit]
                for name in BENCHMARKS if name in spec.items and name in names} | own
    from m2rl_core.real import benchmarks
    items, left_out = ranks.agree(benchmarks.load_all(
        spec, limit, store and store / ITEMS, [name for name in names if name not in own]) if ranks.first() else None)
    items |= own
    for line in left_out.values():
        say(line)
    if missing is not None:
        missing.update(left_out)
    return items


def evaluate(policy: Policy, model: str, items: dict[str, list[Row]], k: dict[str, int], spec, seed: int,
             engine: Engine = TORCH, keep: Path | None = None, told: Callable[[int, int], None] | None = None) -> pd.DataFrame:
    """Sample `k[benchmark]` responses to each item and verify them; columns as in `frame`.

    The draws depend on (seed, benchmark) only, and on the chunk of a real one, so every model faces the same uniform
    numbers (or vLLM's seeds). In the folder `keep` finished chunks are kept, and found by an evaluation that goes on.
    `told` hears how many chunks of how many are there.
    """
    prepare(row for rows in items.values() for row in rows)
    parts, chunks = [], [chunk for name, rows in items.items() for chunk in _chunks(name, rows, k[name], spec.rows)]
    for name, rows in chunks:
        kept = keep and keep / f"rows-{'-'.join(map(str, name))}.parquet"
        found = ranks.agree(pd.read_parquet(kept) if kept and kept.is_file() else None)
        if found is None:
            rng = torch.Generator().manual_seed(generator(seed, "evaluate", *name).randrange(2**62))
            found = _measure(policy, model, name[0], rows, k[name[0]], spec, rng, engine)
            if kept:
                found.to_parquet(kept.with_suffix(".new"), index=False)
                kept.with_suffix(".new").rename(kept)
                found = pd.read_parquet(kept)
        parts.append(found)
        if told:
            told(len(parts), len(chunks))
    return pd.concat(parts, ignore_index=True)


def _chunks(benchmark: str, rows: list[Row], k: int, kind: str) -> Iterator[tuple[tuple, list[Row]]]:
    """(what names its draws, rows) of each chunk: a miniature is one, real items come a few hundred at a time."""
    if kind == "miniature":
        yield (benchmark,), rows
        return
    size = max(1, CHUNK // k)
    for start in range(0, len(rows), size):
        yield (benchmark, start), rows[start:start + size]


def _measure(policy, model, benchmark, rows, k, spec, rng, engine) -> pd.DataFrame:
    """The rows of one chunk. A real item whose prompt leaves no room in the context scores 0 and says so."""
    asked = spec.sampled_by(benchmark)
    if asked["top_p"] == 1:
        del asked["top_p"]
    fits, long = rows, {}
    if spec.rows == "real":
        room = policy.config.max_position_embeddings - asked["max_new_tokens"]
        lengths = [len(policies.encode_prompt(policy, row.messages, row.tools)) for row in rows]
        long = {row.id: length for row, length in zip(rows, lengths, strict=True) if length > room}
        fits = [row for row in rows if row.id not in long]
    rollouts = engine.sample(policy, fits, k, generator=rng, **asked) if fits else []
    verdicts = environments.verdicts(rollouts, lambda *lists: ranks.spread(rewards, *lists))
    if long:
        done = iter(zip(rollouts, verdicts, strict=True))
        pairs = [(Rollout(row, [], truncated=True), Verdict(0.0, f"a prompt of {long[row.id]} tokens, but {room} fit"))
                 if row.id in long else next(done) for row in rows for _ in range(k)]
        rollouts, verdicts = zip(*pairs, strict=True)
    return frame(model, benchmark, rollouts, verdicts, k)


def frame(model: str, benchmark: str, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], k: int) -> pd.DataFrame:
    """One row a sample: who, on what, what it said, its score, and why."""
    return pd.DataFrame([{
        "model": model, "benchmark": benchmark, "domain": r.row.domain, "category": r.row.truth.get("category", ""),
        "item": r.row.id, "sample": i % k, "prompt": r.row.messages[-1]["content"], "response": END_OF_TURN.join(r.turns),
        "score": v.score, "reason": v.reason, "tokens": r.length, "truncated": r.truncated,
    } for i, (r, v) in enumerate(zip(rollouts, verdicts, strict=True))])


def build(ctx) -> None:
    """Evaluate one model on every benchmark of the profile (or on those that the stage names).

    StudyError where none of them can be had.
    """
    spec, missing = ctx.profile.eval, {}
    (model, folder), = ((n, p) for n, p in ctx.inputs.items())
    wanted = ctx.stage.settings.get("benchmarks") or list(spec.items)
    items = items_of(spec, ctx.profile.seed, None, store_of(ctx), wanted, missing)
    if not items:
        raise StudyError(f"{ctx.stage.name}: no benchmark can be had; " + "; ".join(missing.values()))
    ctx.state.mkdir(parents=True, exist_ok=True)
    earlier = ranks.agree(_earlier(ctx))
    left = {name: rows for name, rows in items.items() if name not in earlier}
    if left:
        with open_engine(ctx.profile) as engine:
            rows = evaluate(policies.load(folder), model, left, spec.k, spec, ctx.profile.seed, engine, ctx.state,
                            ctx.progress.step)
        earlier |= dict(iter(rows.groupby("benchmark")))
    pd.concat([earlier[name] for name in items], ignore_index=True).to_parquet(ctx.out / "rows.parquet", index=False)
    if missing:
        (ctx.out / NOT_RUN).write_text(json.dumps(missing, indent=1) + "\n")


def _earlier(ctx) -> dict[str, pd.DataFrame]:
    """Benchmark -> rows, of the same evaluation that was set aside (`rebuild`) because others could not be had then."""
    home = store_of(ctx) / "set-aside"
    made = sorted(home.glob(f"{ctx.out.name}.*/{NOT_RUN}"), key=lambda path: int(path.parent.suffix[1:]))
    return dict(iter(pd.read_parquet(made[-1].with_name("rows.parquet")).groupby("benchmark"))) if made else {}


class Watch:
    """Looks at a policy while it trains: accuracy on all benchmarks every few steps, and some rollouts to read."""

    def __init__(self, ctx, spec, engine: Engine = TORCH):
        self.ctx, self.spec, self.engine = ctx, spec, engine
        self.items = items_of(ctx.profile.eval, ctx.profile.seed, spec.eval_items, store_of(ctx))
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
