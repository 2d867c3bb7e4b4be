"""A Qwen3 of a few thousand random weights, and slow plain references to hold the engine against.

The references go through transformers' own Qwen3ForCausalLM, one whole sequence at a time and without
padding, caches or sharing, so that they have nothing in common with what they check.
"""
from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from m2rl_core.domains import DOMAINS, Row, training_rows
from m2rl_core.engines import rollout as rollouts
from m2rl_core.engines.rollout import Rollout, sample
from m2rl_core.models import policy as policies
from m2rl_core.models.policy import Policy
from m2rl_core.specs import ModelSpec
from m2rl_core.training.sft import encode_sft

SPEC = ModelSpec(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=64, vocab=400, context=384)


def tokenizer():
    """A small tokenizer that has seen a few rows of every domain."""
    rows = [row for domain in DOMAINS for row in training_rows(domain, "sft", 20, 1)]
    return policies.train_tokenizer([m["content"] for row in rows for m in (*row.messages, *row.turns)], SPEC.vocab)


def make(words, seed: int = 0, spec: ModelSpec = SPEC) -> Policy:
    """Random weights, made uneven enough that every one of them shows in the log-probs."""
    policy = policies.build(spec, words, torch.Generator().manual_seed(seed))
    roughened(policy, seed)
    policy.weights["model.embed_tokens.weight"][list(policy.stop_ids)] *= 4  # now and then it ends a turn
    return policy


def roughened(policy: Policy, seed: int) -> None:
    """Norm weights that are not 1, so that leaving one out shows; embeddings large enough, and not too large."""
    rng = torch.Generator().manual_seed(1000 + seed)
    for name in sorted(policy.weights):
        if name.endswith("norm.weight"):
            policy.weights[name] += 0.3 * torch.randn(policy.weights[name].shape, generator=rng)
        elif "embed" in name:
            policy.weights[name] *= 0.6


def few_words(vocab: int = 3, seed: int = 0) -> Policy:
    """A policy over `vocab` tokens and without a tokenizer: small enough to enumerate everything that it can say."""
    config = Qwen3Config(vocab_size=vocab, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=32,
                         tie_word_embeddings=True, rope_theta=10000.0)
    rng = torch.Generator().manual_seed(seed)
    weights = {name: torch.ones(size) if name.endswith("norm.weight") else 0.5 * torch.randn(size, generator=rng)
               for name, size in policies.sizes(config).items()}
    return Policy(weights, config, None)


def clone(policy: Policy) -> Policy:
    """The same policy with weights of its own."""
    return Policy({n: t.detach().clone() for n, t in policy.weights.items()}, policy.config, policy.tokenizer)


def nudged(policy: Policy, size: float, seed: int = 5) -> Policy:
    """The policy with noise of this relative size on every weight."""
    rng = torch.Generator().manual_seed(seed)
    other = clone(policy)
    for name in sorted(other.weights):
        w = other.weights[name]
        w += size * w.std(unbiased=False).clamp(min=0.01) * torch.randn(w.shape, generator=rng)
    return other


def transformers_model(policy: Policy) -> Qwen3ForCausalLM:
    """transformers' model with these weights."""
    config = copy.deepcopy(policy.config)
    config._attn_implementation = "eager"
    model = Qwen3ForCausalLM(config).float().eval()
    copied = {n: t.detach().clone() for n, t in policy.weights.items()}
    missing, unexpected = model.load_state_dict(copied, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def plain_logps(model: Qwen3ForCausalLM, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs over the vocabulary at every sampled token of a rollout: (length, V)."""
    ids = torch.tensor([rollout.prompt + rollout.tokens])
    logits = model(ids).logits[0].float() / temperature  # position t predicts token t + 1
    at = [len(rollout.prompt) + t - 1 for t, sampled in enumerate(rollout.sampled) if sampled]
    return torch.log_softmax(logits[at], dim=-1)


def said(rollout: Rollout) -> torch.Tensor:
    """The sampled token ids."""
    return torch.tensor([token for token, sampled in zip(rollout.tokens, rollout.sampled, strict=True) if sampled])


def plain_gradient(policy: Policy, played: Sequence[Rollout], advantage: Sequence[float], total: int,
                   weights: Sequence[torch.Tensor] | None = None, temperature: float = 1.0) -> dict[str, torch.Tensor]:
    """Gradient of -1/total sum_i A_i mean_t w_it log pi(token it), by autograd over each rollout on its own.

    `weights[i]` are the weights of the rollout's tokens; a token of weight 0 leaves the mean altogether.
    """
    model = transformers_model(policy)
    for i, (rollout, a) in enumerate(zip(played, advantage, strict=True)):
        logp = plain_logps(model, rollout, temperature).gather(1, said(rollout)[:, None])[:, 0]
        w = torch.ones_like(logp) if weights is None else weights[i]
        (-a * (w * logp).sum() / max(1, int((w != 0).sum())) / total).backward()
    return {name: p.grad for name, p in model.named_parameters() if name != "lm_head.weight"}


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """What a backward pass left on a policy's weights; zeros where it left nothing."""
    return {n: torch.zeros_like(w) if w.grad is None else w.grad.clone() for n, w in policy.weights.items()}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of gradients, over every weight."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def scripted(policy: Policy, rows: Sequence[Row], wanted: Sequence[tuple[list[int], list[bool]]], monkeypatch, *,
             n: int = 1, temperature: float = 1.0, budget: int = 160, **settings) -> list[Rollout]:
    """Sample with uniform numbers chosen such that the policy itself says what `wanted` holds.

    `wanted[i]` is (token ids after the prompt, which of them are sampled) for rollout i. The uniform number of
    a token is the middle of its interval in the cumulated distribution that transformers computes. Everything
    else, the environment's turns among it, is the sampler's own doing.
    """
    model = transformers_model(policy)
    uniform = torch.full((len(wanted), budget), 0.5)
    for i, (tokens, sampled) in enumerate(wanted):
        row = rows[i // n]
        rollout = Rollout(row, policies.encode_prompt(policy, row.messages, row.tools), tokens, sampled)
        with torch.no_grad():
            mass = plain_logps(model, rollout, temperature).double().exp()
        ids = said(rollout)[:, None]
        middle = mass.cumsum(-1).gather(1, ids) - mass.gather(1, ids) / 2
        uniform[i, :len(ids)] = middle[:budget, 0].float()
    with monkeypatch.context() as patch:
        patch.setattr(rollouts.torch, "rand", lambda *size, generator: uniform.reshape(size))
        return sample(policy, rows, n, generator=torch.Generator(), temperature=temperature, max_new_tokens=budget,
                      **settings)


def script_of(policy: Policy, row: Row, turns: Sequence[dict]) -> tuple[list[int], list[bool]]:
    """Token ids and sampled flags of a continuation, as `scripted` wants them."""
    ids, learn = encode_sft(policy, Row(**{**row.__dict__, "turns": tuple(turns)}))
    start = len(policies.encode_prompt(policy, row.messages, row.tools))
    return ids[start:], learn[start:]
