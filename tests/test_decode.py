"""The compiled step of the sampler against the model's own forward pass."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import toy_policy
from test_rollout import SAME, draw, recorded, worst

from m2rl_core.engines import rollout as rollouts
from m2rl_core.engines.rollout import logprobs
from m2rl_core.models import attention, decode, qwen3


def plain(model):
    """The step without compiled parts, as it runs on a GPU or in another precision."""
    return lambda tokens, cache: qwen3.hidden_states(model, tokens, cache.positions, cache)


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 16), (3, 1, 8), (2, 2, 32), (5, 1, 4)])
def test_each_step_is_the_models(words, toy_rows, heads, kv_heads, head_dim):
    """Faults: heads of another key; the last head of an odd number left out, or its result written over another's; columns
    beyond a prompt's or a row's end seen; keys written elsewhere; a cache that grows and loses columns."""
    policy = toy_policy.make(words, spec=replace(toy_policy.SPEC, heads=heads, kv_heads=kv_heads, head_dim=head_dim))
    policy.weights["model.embed_tokens.weight"][list(policy.stop_ids)] /= 3  # some rows go on beyond the cache's first block
    model, seen = qwen3.prepare(policy.weights, policy.shape), []
    steps = decode.decoder(model)

    def both(tokens, cache):
        other = replace(cache, own=[tuple(x.clone() for x in pair) for pair in cache.own])
        wanted, found = plain(model)(tokens, other), steps(tokens, cache)
        column = cache.columns
        seen.append((column, float((found - wanted).abs().max())))
        for mine, theirs in zip(cache.own, other.own, strict=True):
            assert all(torch.allclose(a[:, :, :column + 1], b[:, :, :column + 1], atol=1e-5)
                       for a, b in zip(mine, theirs, strict=True))
            assert (mine[1][:, :, column + 1:column + attention.SPARE] == 0).all()
        return found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "decoder", lambda model: both)
        found = draw(policy, toy_rows, n=3, max_new_tokens=90)
    assert max(column for column, _ in seen) > attention.BLOCK
    assert max(gap for _, gap in seen) < 2e-5
    assert worst(map(recorded, found), logprobs(policy, found)) < SAME


def test_the_plain_step_draws_the_same(policy, toy_rows, episodes, monkeypatch):
    """Fault: a GPU's path that no test runs on a CPU falls behind."""
    found = draw(policy, [*toy_rows, *episodes], max_new_tokens=70)
    monkeypatch.setattr(rollouts, "decoder", plain)
    again = draw(policy, [*toy_rows, *episodes], max_new_tokens=70)
    assert [r.tokens for r in again] == [r.tokens for r in found]
    assert worst(map(recorded, again), map(recorded, found)) < SAME


def test_other_precisions_take_the_plain_step(policy):
    """Fault: bfloat16 weights read as float32."""
    half = {name: w.bfloat16() for name, w in policy.weights.items()}
    assert not isinstance(decode.decoder(qwen3.prepare(half, policy.shape)), decode.Decoder)
    assert isinstance(decode.decoder(qwen3.prepare(policy.weights, policy.shape)), decode.Decoder)


def test_draws_and_their_logprobs_are_the_distributions():
    """Faults: a temperature that is missing in one of the two; a token left out where a block of the sums ends; the highest
    logit missed in the remainder; overflow for large logits; draws beyond either end."""
    rng = torch.Generator().manual_seed(2)
    for vocab in (3, 64, 65, 403):
        logits = 12 * torch.randn(500, vocab, generator=rng) + 300
        u = torch.rand(500, generator=rng)
        u[:2] = torch.tensor([0.0, 1 - 2**-24])
        tokens, logps = decode.draw(logits, 0.7, u)
        wanted = (logits.double() / 0.7).log_softmax(-1)
        assert torch.allclose(logps.double(), wanted.gather(1, tokens[:, None])[:, 0], atol=2e-4)  # logits of 400: 3e-5 apart
        above = wanted.exp().cumsum(-1).gather(1, tokens[:, None])[:, 0]
        below = above - wanted.gather(1, tokens[:, None])[:, 0].exp()
        assert ((below <= u + 1e-5) & (u <= above + 1e-5)).all()


def test_what_is_no_number_draws_some_token():
    """Fault: a policy that has diverged hangs the sampler, or reads beyond the logits, before the trainer can say so."""
    tokens, _ = decode.draw(torch.full((3, 70), torch.nan), 1.0, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert ((0 <= tokens) & (tokens < 70)).all()


def test_exponentials_are_numpys():
    """Faults: a polynomial of the wrong sign; powers of two beyond float32's; something left of what is not seen."""
    x = np.concatenate([np.linspace(-120, 0, 20_001), [-1e30, decode.UNSEEN]]).astype(np.float32)
    found = x.copy()
    total = decode.exponential(found, np.float32(0), len(x), np.empty(len(x), np.int32))
    wanted = np.where(x < -87, 0, np.exp(x.astype(np.float64)))
    assert np.abs(found / np.where(wanted == 0, 1, wanted) - (wanted > 0)).max() < 3e-7
    assert abs(total / wanted.sum() - 1) < 1e-6
