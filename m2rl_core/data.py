"""Rows to train on: the SFT blend in the shape of Table 1, the RL rows of each domain, and their mix."""
from __future__ import annotations

from functools import lru_cache

from m2rl_core import judge
from m2rl_core.domains import Row, generator, module, training_rows
from m2rl_core.errors import StudyError

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


def batch_of(rows: list, size: int, step: int, *names: object) -> list:
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
