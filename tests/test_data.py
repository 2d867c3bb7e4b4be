"""What is trained on: Table 1's shape and ways of drawing, held-out problems, and batches by step number."""
from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from m2rl_core import judge
from m2rl_core.data import batch_of, corpus, rl_rows, sft_blend
from m2rl_core.domains import BENCHMARKS, DOMAINS, benchmark_rows, is_held_out
from m2rl_core.profile import load_profile
from m2rl_core.specs import Blend

SMOKE = load_profile("smoke")


def spec(rows, *lines):
    return dataclasses.replace(SMOKE.sft, rows=rows, blend=tuple(Blend(*line) for line in lines))


def content(row):
    return row.messages, row.turns


# ---- the blend

def test_blend_has_the_shares_that_are_asked_for():
    """Faults: shares by pool size instead of the profile's, a type without rows, rows in blocks of one type."""
    blend = sft_blend(SMOKE.sft, SMOKE.seed)
    counts = Counter(kind for kind, _ in blend)
    assert set(counts) == {line.type for line in SMOKE.sft.blend}
    for line in SMOKE.sft.blend:
        assert counts[line.type] == round(line.share * SMOKE.sft.rows), line.type
        assert {row.domain for kind, row in blend if kind == line.type} == {line.domain}
    assert abs(len(blend) - SMOKE.sft.rows) <= len(SMOKE.sft.blend)
    assert all(row.turns for _, row in blend)
    assert len({kind for kind, _ in blend[:25]}) >= 4


@pytest.mark.parametrize(("pool", "sampling", "target", "times"), [
    (6, "repeat 10 times", 60, {10}),  # each row of the pool ten times
    (30, "use all", 30, {1}),
    (50, "random sampling", 30, {0, 1}),  # never twice
])
def test_each_way_of_drawing(pool, sampling, target, times):
    """Faults: "repeat" that draws at random, sampling with replacement, a part of the pool that is never used."""
    from m2rl_core.domains import generator, training_rows
    drawn = sft_blend(spec(target, ("Science", "science", 1.0, pool, sampling)), 1)
    seen = Counter(row.id for _, row in drawn)
    whole = training_rows("science", "sft", pool, generator(1, "Science").randrange(2**31))
    assert len(drawn) == target
    assert {seen[row.id] for row in whole} == times
    assert set(seen) <= {row.id for row in whole}


def test_random_sampling_is_not_the_head_of_the_pool():
    """Fault: the first rows of the pool called a random sample."""
    drawn = {row.id for _, row in sft_blend(spec(30, ("Math", "math", 1.0, 200, "random sampling")), 1)}
    assert max(int(name.rsplit("/")[-1]) for name in drawn) > 120


@pytest.mark.parametrize(("pool", "sampling", "factor"), [(5, "repeat 10 times", 10), (20, "use all", 1),
                                                         (20, "random sampling", 1)])
def test_a_pool_that_is_too_small_is_named(pool, sampling, factor):
    """Fault: a type that silently ends with fewer rows than its share."""
    with pytest.raises(ValueError) as caught:
        sft_blend(spec(60, ("Science", "science", 1.0, pool, sampling)), 1)
    assert str(caught.value) == (f"sft.blend: Science has {pool} rows x {factor}, but its share needs 60; "
                                 "raise its pool or lower its share")


def test_a_pool_that_would_be_cut_in_silence_is_named():
    """Fault: "use all" that leaves half of the pool out."""
    with pytest.raises(ValueError) as caught:
        sft_blend(spec(60, ("Science", "science", 1.0, 12, "repeat 10 times")), 1)
    assert str(caught.value) == ("sft.blend: Science draws all of its 12 rows x 10, but its share is 60; "
                                 "lower its pool or raise its share")


def test_types_of_one_domain_have_rows_of_their_own():
    """Fault: two types of one domain drawn from the same pool."""
    lines = [("Math Formal Proofs", "math", 0.5, 40, "use all"), ("Math", "math", 0.5, 40, "use all")]
    blend = sft_blend(spec(80, *lines), 1)
    proofs, rest = ([content(row) for kind, row in blend if kind == line[0]] for line in lines)
    assert sum(row in rest for row in proofs) < 10


def test_rows_are_a_function_of_the_seed():
    """Faults: a seed that does nothing; a draw that depends on what was drawn before."""
    first, again, other = (sft_blend(SMOKE.sft, seed) for seed in (1, 1, 2))
    assert first == again
    assert sum(a == b for a, b in zip(first, other, strict=True)) < len(first) / 10
    assert corpus(10, 1) == corpus(10, 1) == corpus(20, 1)[:10] != corpus(10, 2)
    every = rl_rows(SMOKE.rl, DOMAINS, 1)
    assert rl_rows(SMOKE.rl, ("science",), 1) == [row for row in every if row.domain == "science"]


# ---- training and test

def test_no_problem_of_a_benchmark_is_trained_on():
    """Fault: a test problem, in whatever wording, among the rows of SFT, of RLVR or of the judge."""
    held = {row.fingerprint for name in BENCHMARKS for row in benchmark_rows(name, 20, 1)}
    many = dataclasses.replace(SMOKE.rl, rows=dict.fromkeys(DOMAINS, 150))
    trained = {row.fingerprint for row in rl_rows(many, DOMAINS, 1)}
    trained |= {row.fingerprint for _, row in sft_blend(SMOKE.sft, 1) if row.domain != "judge"}
    assert len(held) > 100 and len(trained) > 300
    assert not held & trained
    assert all(map(is_held_out, held)) and not any(map(is_held_out, trained))


def test_no_benchmark_item_stands_in_other_training_text():
    """Fault: a test item's very text in the documents of `base` or inside a judge's question."""
    text = "\n".join(corpus(1000, 1)) + "\n".join(row.messages[0]["content"] for row in judge.training_rows(160, 1))
    asked = [row.messages[-1]["content"] for name in BENCHMARKS for row in benchmark_rows(name, 20, 1)]
    assert not [prompt for prompt in asked if prompt in text]


def test_rl_rows_have_the_mix_of_the_profile():
    """Fault: domains in equal parts where the profile has the paper's natural proportions."""
    mix = {"math": 9, "coding": 5, "science": 3, "if": 2, "agent": 1}
    rows = rl_rows(dataclasses.replace(SMOKE.rl, rows=mix), DOMAINS, 1)
    assert Counter(row.domain for row in rows) == mix
    assert not any(row.turns for row in rows)
    assert len({row.id for row in rows}) == len(rows)


# ---- batches

@pytest.mark.parametrize(("rows", "size"), [(12, 4), (10, 4), (7, 3), (5, 5), (3, 8)])
def test_every_epoch_visits_each_row_once(rows, size):
    """Faults: rows drawn with replacement, rows lost at the end of an epoch, the same order in every epoch."""
    epochs = 12
    steps = rows * epochs // size
    seen = [i for step in range(steps) for i in batch_of(list(range(rows)), size, step, 1, "x")]
    whole = [seen[start:start + rows] for start in range(0, len(seen) - rows + 1, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in whole)
    assert len({tuple(epoch) for epoch in whole}) > 4


def test_a_batch_depends_on_its_step_alone():
    """Fault: a batch that depends on the batches before it, so that a resumed run sees other rows."""
    rows = list(range(50))
    forwards = [batch_of(rows, 7, step, 1, "rl") for step in range(30)]
    backwards = [batch_of(rows, 7, step, 1, "rl") for step in reversed(range(30))][::-1]
    assert forwards == backwards
    assert batch_of(rows, 7, 3, 2, "rl") != forwards[3] != batch_of(rows, 7, 3, 1, "opd")
    forwards[3].append("changed by the caller")
    assert batch_of(rows, 7, 3, 1, "rl") == forwards[3][:-1]
