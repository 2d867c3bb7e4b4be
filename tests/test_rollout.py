"""The sampler: what it draws, what it records, when it stops, and how tools' answers come in.

`toy_policy.scripted` chooses the uniform numbers such that the policy itself says a known text; the sampler,
the cache and the agent's environment are the real ones.
"""
from __future__ import annotations

import copy

import pytest
import torch
import toy_policy
from scipy import stats

from m2rl_core.domains import Row, generator, module, rewards, training_rows
from m2rl_core.engines import rollout as rollouts
from m2rl_core.engines.rollout import Rollout, logprobs, micro_batches, sample
from m2rl_core.judge import judge_row
from m2rl_core.models.policy import Policy, encode_prompt

SAME = 1e-5  # two orders of summation of one log-prob in float32; 2e-6 to 7e-6 are seen at size 8, a fault makes 1e-3


def draw(policy, rows, n=2, seed=3, **settings):
    settings = {"max_new_tokens": 40, **settings}
    return sample(policy, rows, n, generator=torch.Generator().manual_seed(seed), **settings)


def recorded(rollout: Rollout) -> torch.Tensor:
    return torch.tensor([p for p, s in zip(rollout.logprobs, rollout.sampled, strict=True) if s])


def worst(found, wanted) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


# ---- what is recorded

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_the_trainers_and_transformers(policy, toy_rows, temperature):
    """Faults: log-probs of the untempered distribution, or of the token before; a cache row mixed up by compaction."""
    found = draw(policy, toy_rows, temperature=temperature)
    lengths = {r.length for r in found}
    assert len(lengths) > 5  # rows did finish at different times, so the batch was compacted
    assert worst(map(recorded, found), logprobs(policy, found, temperature)) < SAME
    model = toy_policy.transformers_model(policy)
    with torch.no_grad():
        for r in found:
            plain = toy_policy.plain_logps(model, r, temperature).gather(1, toy_policy.said(r)[:, None])[:, 0]
            assert float((recorded(r) - plain).abs().max()) < 2e-5
    assert worst(map(recorded, found), logprobs(policy, found, 1.7 - temperature)) > 0.05  # the other temperature's


def test_top_p_draws_from_the_likeliest_tokens_that_have_this_share():
    """Faults: the token that completes the share left out, or one more taken in; ties that depend on a sort; log-probs of
    the whole distribution, or that do not add up; no token at all where the first has more than the share."""
    mass = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])
    found = rollouts.nucleus(mass.clamp(min=1e-30).log(), 0.65).exp()
    wanted = torch.tensor([[0, 4 / 7, 3 / 7, 0], [1 / 3, 1 / 3, 1 / 3, 0], [0, 1, 0, 0]])
    assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.equal(rollouts.nucleus(mass[:1].log(), 0.3).exp(), torch.tensor([[0.0, 1, 0, 0]]))
    assert torch.allclose(rollouts.nucleus(mass[:1].log(), 0.95).exp(), mass[:1], atol=1e-6)


@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_a_nucleus_is_sampled_as_often_as_it_says(top_p):
    """Faults: `top_p` that reaches the sampler in one place only; tokens outside of the nucleus; recorded log-probs of
    another distribution than the one that was drawn from."""
    wave = rollouts._Wave.__new__(rollouts._Wave)
    n, logits = 20_000, 1.5 * torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    wave.logits, wave.temperature, wave.top_p = logits.expand(n, -1), 0.9, top_p
    wave.alive, wave.count, wave.live = torch.arange(n), torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.bool)
    wave.uniform = torch.rand(n, 1, generator=torch.Generator().manual_seed(3))
    wave.uniform[0] = 1 - 2**-24  # the largest that `rand` gives
    wave.drawn, wave.logps = torch.zeros(n, 1, dtype=torch.long), torch.zeros(n, 1)
    drawn = wave._draw()
    mass = torch.softmax(logits[0] / 0.9, -1)
    order = mass.argsort(descending=True)
    kept = order[:int((mass[order].cumsum(-1) < top_p).sum()) + 1]
    assert set(drawn.tolist()) == set(kept.tolist()) and len(kept) < 12
    wanted = mass[kept].double() / mass[kept].double().sum()
    assert torch.allclose(wave.logps[:, 0], (mass / mass[kept].sum()).log()[drawn], atol=1e-5)
    if len(kept) > 1:
        assert stats.chisquare([int((drawn == token).sum()) for token in kept], (n * wanted).numpy()).pvalue > 1e-3


def test_top_p_of_one_changes_no_token(policy, toy_rows):
    """Faults: another path, and with it other roundings, for everybody who asked for no nucleus; one that changes nothing."""
    plain = draw(policy, toy_rows)
    assert [r.tokens for r in draw(policy, toy_rows, top_p=1.0)] == [r.tokens for r in plain]
    assert [r.tokens for r in draw(policy, toy_rows, top_p=0.5)] != [r.tokens for r in plain]


def test_changed_weights_are_used_at_once(policy, toy_rows):
    """Fault: keys and values of the old weights kept for a prompt that was seen before."""
    moving = toy_policy.clone(policy)
    draw(moving, toy_rows)
    for w in moving.weights.values():
        w.mul_(1.1)
    assert worst(map(recorded, (found := draw(moving, toy_rows))), logprobs(moving, found)) < SAME
    assert [r.tokens for r in found] != [r.tokens for r in draw(policy, toy_rows)]


# ---- what is drawn

def test_batching_changes_no_draw(policy, toy_rows, episodes):
    """Fault: a draw that depends on the batch size, on who else is in the batch, or on who has finished."""
    rows = [*toy_rows, *episodes]
    wanted = draw(policy, rows)
    for batch in (1, 8, 256):
        found = draw(policy, rows, batch=batch)
        assert [r.tokens for r in found] == [r.tokens for r in wanted], batch
        assert worst(map(recorded, found), map(recorded, wanted)) < SAME
    alone = draw(policy, rows[:4])  # the same four prompts with fewer companions
    assert [r.tokens for r in alone] == [r.tokens for r in wanted[:8]]


def test_draws_follow_the_generator(policy, toy_rows):
    """Faults: a seed that does nothing; a generator that is ignored; one draw for the whole group."""
    first, again, other = draw(policy, toy_rows), draw(policy, toy_rows), draw(policy, toy_rows, seed=4)
    assert [r.tokens for r in first] == [r.tokens for r in again]
    assert [r.tokens for r in first] != [r.tokens for r in other]
    assert sum(a.tokens != b.tokens for a, b in zip(first[::2], first[1::2], strict=True)) > 10  # of 15 pairs


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_softmax(policy, toy_rows, temperature):
    """Faults: draws from the wrong temperature, an off-by-one in the cumulated sum, the last token never drawn."""
    n = 6000
    found = draw(policy, toy_rows[:1], n=n, max_new_tokens=1, temperature=temperature, batch=n)
    with torch.no_grad():
        share = toy_policy.plain_logps(toy_policy.transformers_model(policy), found[0], temperature)[0].exp().double()
    seen = torch.bincount(torch.tensor([r.tokens[0] for r in found]), minlength=len(share)).double()
    rare = share * n < 8
    expected = torch.cat((share[~rare] * n, (share[rare].sum() * n)[None]))
    counted = torch.cat((seen[~rare], seen[rare].sum()[None]))
    assert len(expected) > 8
    expected *= counted.sum() / expected.sum()  # rounding alone
    assert stats.chisquare(counted.numpy(), expected.numpy()).pvalue > 1e-3


def test_extreme_uniform_numbers_draw_possible_tokens(policy, toy_rows, monkeypatch):
    """Faults: u = 0 gives a token of no probability; u just under 1 runs off the vocabulary's end."""
    sure = toy_policy.clone(policy)
    sure.weights["model.embed_tokens.weight"][[0, 1, -2, -1]] = 0  # at either end nothing can be drawn
    for u in (0.0, 1 - 2**-24):
        with monkeypatch.context() as patch:
            patch.setattr(rollouts.torch, "rand", lambda *size, generator, u=u: torch.full(size, u))
            found = sample(sure, toy_rows, 1, generator=torch.Generator(), max_new_tokens=8, temperature=0.005)
        assert all(1 < t < policy.config.vocab_size - 2 for r in found for t in r.tokens)
        assert all(p > -104 for r in found for p in r.logprobs)  # exp(-104) is 0 in float32


# ---- when a turn ends

def test_both_end_markers_stop_and_the_budget_truncates(policy, toy_rows, monkeypatch):
    """Faults: only one of Qwen's two end ids honoured; the marker left in the text; truncation not told."""
    hello = policy.tokenizer.encode("hello", add_special_tokens=False)
    im_end, end_of_text = policy.stop_ids
    long = (hello * 10)[:10]
    scripts = [[*hello, im_end], [*hello, end_of_text], long, [*long[:9], im_end]]
    wanted = [(ids, [True] * len(ids)) for ids in scripts]
    found = toy_policy.scripted(policy, toy_rows[:4], wanted, monkeypatch, budget=10)
    assert [r.tokens for r in found] == scripts
    assert [r.truncated for r in found] == [False, False, True, False]
    assert [r.turns for r in found[:2]] == [["hello"], ["hello"]]
    assert [r.length for r in found] == [len(hello) + 1, len(hello) + 1, 10, 10]
    assert found[2].turns == [policy.tokenizer.decode(long)] and found[3].turns == [policy.tokenizer.decode(long[:9])]


def test_a_prompt_without_room_is_refused_in_one_line(policy, toy_rows):
    """Fault: a prompt cut silently, or positions beyond the context."""
    size = len(encode_prompt(policy, toy_rows[2].messages))
    small = Policy(policy.weights, copy.deepcopy(policy.config), policy.tokenizer)
    small.config.max_position_embeddings = size + 7
    assert len(draw(small, toy_rows[2:3], max_new_tokens=7)) == 2
    with pytest.raises(ValueError) as caught:
        draw(small, toy_rows[2:3], max_new_tokens=8)
    text = str(caught.value)
    assert text.startswith(f"{toy_rows[2].id}: prompt of {size} tokens") and "raise model.context" in text
    assert "\n" not in text


def test_empty_groups_are_refused_and_no_rows_give_no_rollouts(policy, toy_rows):
    """Fault: a division by zero somewhere inside, or a batch without rollouts that is trained on."""
    with pytest.raises(ValueError, match="^sample: n = 0, but each row needs at least one rollout$"):
        sample(policy, toy_rows[:2], 0, generator=torch.Generator())
    assert sample(policy, [], 2, generator=torch.Generator()) == []


# ---- several turns

def play(policy, rows, turns, monkeypatch, n=1, **settings):
    """Scripted rollouts of whole conversations, and what they must consist of."""
    wanted = [toy_policy.script_of(policy, rows[i // n], t) for i, t in enumerate(turns)]
    return toy_policy.scripted(policy, rows, wanted, monkeypatch, n=n, **settings), wanted


@pytest.mark.parametrize("batch", [1, 256])
def test_tools_answers_come_in_unsampled(policy, toy_rows, episodes, monkeypatch, batch):
    """Faults: a tool's tokens counted as sampled, or missing; a turn's text in the wrong rollout; a reply that
    differs from what SFT rows hold. One-turn rows run in the same batch and end at other times."""
    rows = [episodes[0], toy_rows[0], episodes[1], toy_rows[4], episodes[2]]
    turns = [module(r.domain).respond(r, worked=i % 2 == 0) for i, r in enumerate(rows)]
    found, wanted = play(policy, rows, turns, monkeypatch, batch=batch)
    for rollout, said, (tokens, sampled) in zip(found, turns, wanted, strict=True):
        assert rollout.tokens == tokens and rollout.sampled == sampled
        assert rollout.turns == [t["content"] for t in said if t["role"] == "assistant"]
        assert [p == 0 for p in rollout.logprobs] == [not s for s in sampled]
        assert rollout.length == sum(sampled) < len(tokens) or rollout.row.domain != "agent"
        assert not rollout.truncated
    assert [v.reason for v in rewards(rows, [r.turns for r in found])] == ["right"] * 5


def test_continuing_from_the_cache_is_scoring_from_scratch(policy, toy_rows, episodes, monkeypatch):
    """Faults: a tool's answer at wrong positions; its padding seen later; the end marker run twice or never."""
    rows = [episodes[0], toy_rows[0], episodes[1], toy_rows[4], episodes[2]]
    found, _ = play(policy, rows, [module(r.domain).respond(r) for r in rows], monkeypatch)
    assert worst(map(recorded, found), logprobs(policy, found)) < SAME
    model = toy_policy.transformers_model(policy)
    with torch.no_grad():
        for r in found:
            plain = toy_policy.plain_logps(model, r).gather(1, toy_policy.said(r)[:, None])[:, 0]
            assert float((recorded(r) - plain).abs().max()) < 2e-5


def test_answers_of_unlike_length_at_one_moment(policy, monkeypatch):
    """Fault: two tools answer at the same step, and the padding of the shorter answer stays in its row's context."""
    talks = []
    for row in (r for r in training_rows("agent", "rl", 400, 2) if r.truth["kind"] == "multi_turn"):
        turns = module("agent").respond(row, worked=False)
        _, sampled = toy_policy.script_of(policy, row, turns)
        first = sampled.index(False)  # the step at which the first call ends
        talks.append((first, sampled[first:].index(True), row, turns))
    short, long = next((a, b) for a in talks for b in talks if a[0] == b[0] and a[1] < b[1])
    rows, turns = [short[2], long[2]], [short[3], long[3]]
    found, wanted = play(policy, rows, turns, monkeypatch)
    assert [(r.tokens, r.sampled) for r in found] == wanted
    assert worst(map(recorded, found), logprobs(policy, found)) < SAME


def test_rollouts_of_one_prompt_share_no_workplace(policy, episodes, monkeypatch):
    """Fault: one environment for the group, so that a call of one rollout changes another's world."""
    row = episodes[0]
    right, wrong = module("agent").respond(row), module("agent").spoil(row, generator("spoil"))
    found, wanted = play(policy, [row], [right, wrong, right], monkeypatch, n=3)
    assert [r.tokens for r in found] == [tokens for tokens, _ in wanted]
    assert [v.score for v in rewards([row] * 3, [r.turns for r in found])] == [1, 0, 1]


def test_sampled_tokens_are_never_tokenised_again(policy, episodes, monkeypatch):
    """Fault: the turn's text is encoded anew for the next turn, so the tokens trained on are not those sampled."""
    row = episodes[0]
    tokens, sampled = toy_policy.script_of(policy, row, module("agent").respond(row))
    first = sampled.index(False)
    call = policy.tokenizer.decode(tokens[:first - 1])
    begin = call.index("find_")
    words = policy.tokenizer
    odd = [i for part in (call[:begin], *call[begin:begin + 8], call[begin + 8:])
           for i in words.encode(part, add_special_tokens=False)]
    assert words.decode(odd) == call and odd != words.encode(call, add_special_tokens=False)
    odd.append(policy.stop_ids[0])
    wanted = odd + tokens[first:], [True] * len(odd) + sampled[first:]
    found, = toy_policy.scripted(policy, [row], [wanted], monkeypatch)
    assert found.tokens == odd + tokens[first:]
    assert found.turns[0] == call
    assert worst([recorded(found)], logprobs(policy, [found])) < SAME


def test_turns_and_tokens_are_bounded_over_the_whole_rollout(policy, episodes, monkeypatch):
    """Faults: the budget granted anew each turn; one turn too many; a rollout that ends inside a turn not told."""
    row = episodes[0]
    turns = module("agent").respond(row)
    tokens, sampled = toy_policy.script_of(policy, row, turns)
    first = sampled.index(False)
    (one,), _ = play(policy, [row], [turns], monkeypatch, max_turns=1)
    assert one.tokens == tokens[:first] and one.turns == [turns[0]["content"]] and not one.truncated
    (cut,), _ = play(policy, [row], [turns], monkeypatch, budget=first + 5)
    assert cut.length == first + 5 and cut.truncated and len(cut.turns) == 2
    assert cut.tokens == tokens[:len(cut.tokens)]
    (spent,), _ = play(policy, [row], [turns], monkeypatch, budget=first)  # the tool answers, nothing is left to go on
    assert spent.tokens == tokens[:first] and spent.truncated and len(spent.turns) == 1


def test_an_answer_that_does_not_fit_ends_the_rollout(policy, episodes, monkeypatch):
    """Fault: a tool's long answer pushes the rollout out of the model's context."""
    row = episodes[0]
    turns = module("agent").respond(row)
    tokens, sampled = toy_policy.script_of(policy, row, turns)
    first = sampled.index(False)
    small = Policy(policy.weights, copy.deepcopy(policy.config), policy.tokenizer)
    small.config.max_position_embeddings = len(encode_prompt(policy, row.messages, row.tools)) + 80
    (found,), _ = play(small, [row], [turns], monkeypatch, budget=80)
    assert found.tokens == tokens[:first] and found.truncated and all(found.sampled)


def test_rows_of_no_domain_can_be_sampled(policy):
    """Fault: a judge's question, which has no verifier and no environment, stops the sampler."""
    row = judge_row("What is 1 + 1?", "<think>\n\n</think>\n\n2", "outcome", True, "judge/1")
    assert len(draw(policy, [row], max_new_tokens=4)) == 2


# ---- batches to train on

def test_micro_batches_hold_every_rollout_once_and_groups_whole():
    """Faults: a rollout left out or twice; a group torn, so that its prompt is run more than once; a budget broken."""
    row = Row("", "math", "", "", (), {})
    found = [Rollout(row, [g], list(range(length)), [True] * length)
             for g, lengths in enumerate([(3, 9), (2, 2), (30, 1), (4, 4)]) for length in lengths]
    batches = micro_batches(found, budget=40)
    assert sorted(i for b in batches for i in b) == list(range(8))
    for batch in batches:
        assert {i ^ 1 for i in batch} == set(batch)  # pairs share a prompt
        assert sum(len(found[i].tokens) for i in batch) <= 40
    assert len(batches) == 2  # 2, 2, 4, 4, 3, 9 fill 24; 30, 1 would break the budget
    assert len(micro_batches(found, budget=20)) == 3  # 30, 1 alone is over the budget


def test_scores_come_back_in_order(policy, played):
    """Fault: log-probs returned in the order of the micro-batches."""
    whole = logprobs(policy, played)
    assert [len(p) for p in whole] == [r.length for r in played]
    for i in range(0, len(played), 5):
        assert torch.allclose(whole[i], logprobs(policy, [played[i]])[0], atol=SAME)
