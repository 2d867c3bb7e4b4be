"""Rows to train on: the SFT blend in the shape of Table 1, the RL rows of each domain, and their mix.

The miniature's are made on the spot. With `rows: real` they are the paper's own data sets, made by `real` when they are
first needed and kept in the store's folder data/; what is dropped stands in the report.json there.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from m2rl_core import judge
from m2rl_core.domains import OWN, Row, generator, module, training_rows
from m2rl_core.errors import StudyError
from m2rl_core.store import store_of

CORPUS = ("math", "agent", "science", "agent", "math", "agent", "coding", "agent", "science", "if")


def corpus(documents: int, seed: int) -> list[str]:
    """Plain texts for next-token training of `base`: the domains in turn, those that live on arithmetic more often."""
    rng = generator(seed, "corpus")
    return [module(CORPUS[i % len(CORPUS)]).corpus(rng) for i in range(documents)]


def sft_blend(spec, seed: int) -> list[tuple[str, Row]]:
    """The SFT rows as (Table 1 type, row), shuffled; each type drawn from its pool as its sampling says.

    "random sampling" draws without replacement, "use all" takes the whole pool, "repeat N times" takes it N
    times; every type ends with its share of `spec.rows`. A StudyError names a pool that cannot give it, or one
    that is drawn whole and gives more.
    """
    rng = generator(seed, "blend")
    rows: list[tuple[str, Row]] = []
    for kind in spec.blend:
        pool = judge.training_rows(kind.pool, seed) if kind.domain == "judge" else training_rows(
            kind.domain, "sft", kind.pool, generator(seed, kind.type).randrange(2**31))
        target = round(kind.share * spec.rows)
        repeats = int(kind.sampling.split()[1]) if kind.sampling.startswith("repeat") else 1
        available = pool * repeats
        if len(available) < target:
            raise StudyError(f"sft.blend: {kind.type} has {len(pool)} rows x {repeats}, but its share needs {target}; "
                             f"raise its pool or lower its share")
        if kind.sampling != "random sampling" and len(available) > 1.02 * target + repeats:
            raise StudyError(f"sft.blend: {kind.type} draws all of its {len(pool)} rows x {repeats}, but its share is "
                             f"{target}; lower its pool or raise its share")
        chosen = rng.sample(available, target) if kind.sampling == "random sampling" else available[:target]
        rows += [(kind.type, row) for row in chosen]
    rng.shuffle(rows)
    return rows


def rl_rows(spec, domains: tuple[str, ...], seed: int) -> list[Row]:
    """RLVR prompts of the given domains, in their natural proportions."""
    return [row for domain in domains for row in training_rows(domain, "rl", spec.rows[domain], seed)]


def training_prompts(ctx, domains: Sequence[str], tokenizer) -> list[Row]:
    """RLVR prompts of the given domains for a stage, of the miniature or of the real blend as the profile says.

    Of the real blend each domain has as many as the profile's `rl.rows` asks for, drawn by its seed where there are
    more, in the blend's order; prompts of more than `data.prompt_tokens` tokens are left out first (not the agent's, as
    in the released code). StudyError where fewer are left than asked for, but for a trial (`data.first`).
    """
    profile = ctx.profile
    if profile.rows == "miniature":
        return rl_rows(profile.rl, tuple(domains), profile.seed)
    from m2rl_core.real import rl_blend
    folder, rows = blends(store_of(ctx))["rl"] / _trial(profile, profile.data.template), []
    if any(domain not in OWN for domain in domains):
        rl_blend.build(folder, rl_blend.Settings(profile.data.template, profile.data.first), ctx.log)
    for domain in domains:
        wanted = profile.rl.rows[domain]
        if domain in OWN:
            rows += training_rows(domain, "rl", wanted, profile.seed)
            continue
        found, most = rl_blend.rows(folder, domain), profile.data.prompt_tokens
        fits = found if not most or domain == "agent" else [row for row in found if prompt_length(tokenizer, row) <= most]
        if len(fits) < wanted and not profile.data.first:
            raise StudyError(f"rl.rows.{domain}: {wanted} prompts, but the blend has {len(fits)} of at most {most} tokens and "
                             f"{len(found)} in all: lower it, or raise data.prompt_tokens")
        chosen = sorted(generator(profile.seed, domain, "rl").sample(range(len(fits)), min(wanted, len(fits))))
        ctx.log(f"{domain}: {len(chosen)} prompts of {len(fits)}; {len(found) - len(fits)} were longer than {most} tokens")
        rule = {"rule": profile.data.rules[domain]} if domain in profile.data.rules else {}
        rows += [replace(fits[i], truth=fits[i].truth | rule) for i in chosen]
    return rows


def prompt_length(tokenizer, row: Row) -> int:
    """Tokens of a row's prompt in the chat template."""
    text = tokenizer.apply_chat_template(list(row.messages), tools=list(row.tools) or None, tokenize=False,
                                         add_generation_prompt=True)
    return len(tokenizer.encode(text, add_special_tokens=False))


def blends(store: Path) -> dict[str, Path]:
    """Where a store keeps the real SFT and RL blends."""
    return {name: store / "data" / name for name in ("sft", "rl")}


def _trial(profile, name: str) -> str:
    """A folder's name; one for each way of making a blend, which is never made in the place of another."""
    return name + (f"-first-{profile.data.first}" if profile.data.first else "")


class RealSft(Sequence):
    """The real SFT blend of a profile as rows to learn from, (ids, learn); tokenised when they are asked for.

    Rows longer than `context` are cut there. `told` has a line for each type, as blend.jsonl holds it.
    """

    def __init__(self, ctx, tokenizer, context: int):
        from m2rl_core.real import chat, sft_blend
        profile = ctx.profile
        types = tuple(line.type for line in profile.sft.blend)
        name = f"seed-{profile.seed}-share-{profile.data.share:g}"
        folder = blends(store_of(ctx))["sft"] / _trial(profile, name)
        report = sft_blend.build(folder, sft_blend.Settings(profile.seed, profile.data.share, types, profile.data.first),
                                 ctx.log)
        chat.check_tokenizer(tokenizer)
        self.rows, self.tokenizer, self.context, self.thinking = (
            sft_blend.Blend(folder), tokenizer, context, profile.data.thinking)
        self.told = sft_blend.blend_frame(report).to_dict("records")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[int], list[bool]]:
        from m2rl_core.real import chat
        row = self.rows[index]
        ids, learn = chat.encode(self.tokenizer, row["messages"], row["tools"], self.thinking)
        return ids[:self.context], learn[:self.context]

    def examples(self) -> dict[str, dict]:
        """The first row of each type."""
        found: dict[str, dict] = {}
        for at in (0, *(end for end in self.rows.ends if end < len(self))):
            row = self.rows[at]
            found.setdefault(row["type"], {"messages": row["messages"], "tools": row["tools"]})
        return found


def batch_of(rows: Sequence, size: int, step: int, *names: object) -> list:
    """The `step`-th batch of an endless stream of epochs, each a new permutation; a function of its arguments alone."""
    batch, position = [], step * size
    while len(batch) < size:
        epoch, offset = divmod(position, len(rows))
        order = _permutation(len(rows), *names, epoch)
        take = order[offset:offset + size - len(batch)]
        batch += [rows[i] for i in take]
        position += len(take)
    return batch


@lru_cache(maxsize=4)
def _permutation(n: int, *names: object) -> list[int]:
    order = list(range(n))
    generator(*names).shuffle(order)
    return order
