"""Forward KL between experts and multi-domain policies on the experts' own trajectories (section 3.4, Fig. 4, Eq. 1).

For each domain, every expert samples responses to the domain's prompts; each is scored under the expert and under
every other policy. Two estimates: the sampled log-ratio (the paper's), and the exact KL of each token's full
distribution along the same trajectory, which has the same mean and less noise.
"""
from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from m2rl_core.data import training_prompts
from m2rl_core.domains import generator
from m2rl_core.engines import open_engine
from m2rl_core.engines.rollout import Rollout, micro_batches, response_hidden
from m2rl_core.errors import StudyError
from m2rl_core.models import policy as policies
from m2rl_core.models.policy import Policy
from m2rl_core.models.qwen3 import head


@torch.no_grad()
def trajectory_kl(expert: Policy, others: dict[str, Policy], rollouts: list[Rollout], temperature: float) -> list[dict]:
    """One row for each (other policy, rollout): `kl_seq` and `kl_token` sampled, `kl_exact` per token, in nats."""
    found = []
    for batch in micro_batches(rollouts):
        part = [rollouts[i] for i in batch]
        mine, tokens, owner = _distributions(expert, part, temperature)
        counts = torch.bincount(owner, minlength=len(part)).clamp(min=1)
        for name, other in others.items():
            theirs, _, _ = _distributions(other, part, temperature)
            gap = (mine - theirs).gather(1, tokens[:, None])[:, 0]
            exact = (mine.exp() * (mine - theirs)).sum(-1)
            sequence = gap.new_zeros(len(part)).index_add(0, owner, gap)
            exact = gap.new_zeros(len(part)).index_add(0, owner, exact) / counts
            for j, i in enumerate(batch):
                found.append({"policy": name, "rollout": i, "kl_seq": float(sequence[j]),
                              "kl_token": float(sequence[j] / counts[j]), "kl_exact": float(exact[j]),
                              "tokens": int(counts[j])})
    return found


def _distributions(policy: Policy, part: list[Rollout], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    hidden, tokens, owner = response_hidden(policy, part)
    return F.log_softmax(F.linear(hidden, head(policy.weights)).float() / temperature, dim=-1), tokens, owner


def comparable(loaded: Mapping[str, Policy]) -> None:
    """StudyError, naming two policies, unless all speak of the same tokens: one vocabulary, one number of logits.

    Architectures may differ: a divergence looks at distributions only.
    """
    (first, one), *rest = loaded.items()
    mine = len(head(one.weights))
    for name, other in rest:
        theirs = len(head(other.weights))
        why = f"they have {mine} and {theirs} logits a token"
        if mine == theirs:
            words, its = one.tokenizer.get_vocab(), other.tokenizer.get_vocab()
            word = next((w for w in sorted(words.keys() | its.keys()) if words.get(w) != its.get(w)), None)
            if word is None:
                continue
            why = f"their tokenizers give {word!r} the ids {words.get(word)} and {its.get(word)}"
        raise StudyError(f"neighborhoods: no KL between {first} and {name}: {why}; use policies of one tokenizer")


def build(ctx) -> None:
    """Sample every expert on every domain and score the trajectories; writes `kl.parquet`, a row a trajectory."""
    settings, spec, seed = ctx.stage.settings, ctx.profile.rl, ctx.profile.seed
    loaded = {name: policies.load(folder) for name, folder in ctx.inputs.items()}
    comparable(loaded)
    domains = tuple(settings["rows"])
    experts = {domain: loaded.pop(f"rl-{domain}") for domain in domains}
    frames = []
    with open_engine(ctx.profile) as engine:
        for done, (domain, expert_of) in enumerate((d, e) for d in domains for e in domains):
            rows = training_prompts(ctx, (domain,), experts[domain].tokenizer)[:settings["prompts"]]
            rng = torch.Generator().manual_seed(generator(seed, "kl", domain, expert_of).randrange(2**62))
            rollouts = engine.sample(experts[expert_of], rows, settings["samples"], generator=rng,
                                     temperature=spec.temperature, max_new_tokens=spec.max_new_tokens,
                                     max_turns=spec.max_turns)
            found = pd.DataFrame(trajectory_kl(experts[expert_of], loaded, rollouts, spec.temperature))
            found["prompt"], found["sample"] = found["rollout"] // settings["samples"], found["rollout"] % settings["samples"]
            frames.append(found.drop(columns="rollout").assign(expert=f"rl-{expert_of}", domain=domain))
            ctx.progress.step(done + 1, len(domains) ** 2)
    pd.concat(frames, ignore_index=True).to_parquet(ctx.out / "kl.parquet", index=False)
