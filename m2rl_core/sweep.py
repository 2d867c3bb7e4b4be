"""How much the ranking of merges hangs on what the paper leaves open: variants of every method, from one read.

Each variant differs from the paper's reading in one parameter, or merges some of the experts only (section 3.4). All
are merged in a single pass over the experts and evaluated on the first items of every benchmark (or of those that the
variant names) with the same draws, so that any two are paired.
"""
from __future__ import annotations

import json

import pandas as pd

from m2rl_core.engines import open_engine
from m2rl_core.evaluate import evaluate, items_of
from m2rl_core.merging import recipe as recipes
from m2rl_core.merging.folders import write_models
from m2rl_core.models import policy as policies
from m2rl_core.store import store_of


def build(ctx) -> None:
    """`rows.parquet` as an evaluation writes it, `model` being the variant's name; `merges.json` has each diagnosis."""
    settings, spec = ctx.stage.settings, ctx.profile.eval
    items = items_of(spec, ctx.profile.seed, settings["items"], store_of(ctx))
    k = dict.fromkeys(items, settings["k"])
    experts = {name: folder for name, folder in ctx.inputs.items() if name != "sft"}
    plans = {variant["name"]: recipes.make(variant["method"], seed=settings["seed"], **variant["parameters"])
             for variant in settings["variants"]}
    tested = {variant["name"]: variant.get("benchmarks", list(items)) for variant in settings["variants"]}
    folders = {name: ctx.state / "weights" / str(i) for i, name in enumerate(plans)}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    merges = write_models(ctx.inputs["sft"], experts, {folders[name]: plan for name, plan in plans.items()},
                          allow_identical=True)
    (ctx.out / "merges.json").write_text(json.dumps(dict(zip(plans, merges, strict=True)), indent=2) + "\n")
    parts = []
    with open_engine(ctx.profile) as engine:
        for done, (name, folder) in enumerate(folders.items(), 1):
            seen = ctx.state / f"rows-{folder.name}.parquet"
            if not seen.is_file():
                own = {benchmark: items[benchmark] for benchmark in tested[name] if benchmark in items}
                rows = evaluate(policies.load(folder), name, own, k, spec, ctx.profile.seed, engine)
                rows.drop(columns=["prompt", "response"]).to_parquet(seen.with_suffix(".new"), index=False)
                seen.with_suffix(".new").rename(seen)
            parts.append(pd.read_parquet(seen))
            ctx.progress.step(done, len(folders))
    pd.concat(parts, ignore_index=True).to_parquet(ctx.out / "rows.parquet", index=False)
