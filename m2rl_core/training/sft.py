"""Next-token training: `base` on plain text, `sft` on the blend of Table 1 with a loss on assistant tokens only.

Departure: one epoch over a procedural blend, not 14 M samples; everything else is the paper's recipe (Adam,
weight decay 0.1, 10 % warm-up).
"""
from __future__ import annotations

import json

import torch
import torch.nn.functional as F

from m2rl_core import ranks
from m2rl_core.data import RealSft, batch_of, corpus, sft_blend
from m2rl_core.domains import Row
from m2rl_core.engines.rollout import flat, places, tool_reply
from m2rl_core.models import policy as policies
from m2rl_core.models.attention import Causal
from m2rl_core.models.policy import Policy, encode_prompt
from m2rl_core.models.qwen3 import head
from m2rl_core.ranks.sharded import place
from m2rl_core.training.trainer import Optimization, fit, warmup_cosine, write_lines

MICRO_TOKENS = 4096  # tokens of one forward and backward pass


def encode_sft(policy: Policy, row: Row) -> tuple[list[int], list[bool]]:
    """Token ids of an SFT row and which of them carry loss: the assistant's tokens with their end marker."""
    ids = encode_prompt(policy, row.messages, row.tools)
    learn = [False] * len(ids)
    pending: list[str] = []
    for turn in row.turns:
        if turn["role"] == "tool":
            pending.append(turn["content"])
            continue
        if pending:
            reply = tool_reply(policy, pending)
            ids, learn, pending = ids + reply, learn + [False] * len(reply), []
        said = [*policy.tokenizer.encode(turn["content"], add_special_tokens=False), policy.stop_ids[0]]
        ids, learn = ids + said, learn + [True] * len(said)
    return ids, learn


def masked_loss(policy: Policy, rows: list[tuple[list[int], list[bool]]]) -> tuple[float, int]:
    """Mean cross-entropy over all learnt tokens of the batch; runs backward in micro-batches of like length.

    The mean is over the whole batch whatever the micro-batches are. Returns the loss and the token count.
    """
    total = sum(sum(learn[1:]) for _, learn in rows)

    def learnt(policy: Policy, part: list[tuple[list[int], list[bool]]]) -> float:
        tokens, lengths = flat([ids[:-1] for ids, _ in part], policy.device)
        hidden = policy.hidden(tokens, places(lengths), Causal(lengths.tolist(), policy.device))
        learn = torch.tensor([flag for _, flags in part for flag in flags[1:]], device=policy.device)
        targets = flat([ids[1:] for ids, _ in part], policy.device)[0][learn]
        logits = F.linear(hidden[learn], head(policy.weights)).float()
        loss = F.cross_entropy(logits, targets, reduction="sum") / total
        loss.backward()
        return float(loss.detach())
    loss_sum = sum(policy.each(micro_batches(ranks.share_rows(rows)), learnt, lanes=1))  # large enough for all threads
    policy.add_up()
    return ranks.total(loss_sum), total


def micro_batches(rows: list[tuple[list[int], list[bool]]]) -> list[list[tuple[list[int], list[bool]]]]:
    """The rows in batches of at most `MICRO_TOKENS` tokens or one row, the longest first."""
    rows, batches = sorted(rows, key=lambda r: len(r[0])), []
    while rows:
        take = max(1, min(len(rows), MICRO_TOKENS // len(rows[-1][0])))
        batches.append(rows[-take:])
        rows = rows[:-take]
    return batches


def build_base(ctx) -> None:
    """Train the tokenizer and `base` by plain next-token prediction on the corpus."""
    spec = ctx.profile.base
    texts = corpus(spec.documents, ctx.profile.seed)
    chat = [text for _, row in sft_blend(ctx.profile.sft, ctx.profile.seed)[:4000] for text in _texts(row)]
    tokenizer = policies.train_tokenizer(texts + chat, ctx.profile.model.vocab)
    policy = place(policies.build(ctx.profile.model, tokenizer, torch.Generator().manual_seed(ctx.seed)))
    width = 128
    stream = [i for text in texts for i in [*tokenizer.encode(text, add_special_tokens=False), policy.stop_ids[1]]]
    blocks = [stream[i:i + width + 1] for i in range(0, len(stream) - width, width)]

    def objective(step: int) -> dict:
        batch = batch_of(blocks, spec.batch_tokens // width, step, ctx.seed, "base")
        loss, _ = masked_loss(policy, [(ids, [True] * len(ids)) for ids in batch])
        return {"loss": loss}

    fit(policy, objective, Optimization(spec.steps, spec.lr, spec.weight_decay, (0.9, 0.95),
        schedule=warmup_cosine(spec.steps, spec.warmup, 0.1), checkpoint_every=100), ctx.out, ctx.state, ctx.progress)


def build_sft(ctx) -> None:
    """Fine-tune `base` on the blend; `blend.jsonl` lists what was drawn, type by type."""
    spec = ctx.profile.sft
    policy = place(policies.load(ctx.inputs["base"]))
    if ctx.profile.rows == "real":
        rows = RealSft(ctx, policy.tokenizer, policy.config.max_position_embeddings)
        write_lines(ctx.out / "blend.jsonl", rows.told)
        (ctx.out / "examples.json").write_text(json.dumps(rows.examples()))
    else:
        rows = _miniature(ctx, policy)

    def objective(step: int) -> dict:
        loss, tokens = masked_loss(policy, batch_of(rows, spec.batch_size, step, ctx.seed, "sft"))
        return {"loss": loss, "tokens": tokens}

    fit(policy, objective, Optimization(spec.steps, spec.lr, spec.weight_decay, spec.betas,
        schedule=warmup_cosine(spec.steps, spec.warmup, spec.final_lr / spec.lr), checkpoint_every=100),
        ctx.out, ctx.state, ctx.progress)


def _miniature(ctx, policy: Policy) -> list[tuple[list[int], list[bool]]]:
    """The encoded rows of the miniature's blend; writes what was drawn."""
    spec = ctx.profile.sft
    blend = sft_blend(spec, ctx.profile.seed)
    rows = [encode_sft(policy, row) for _, row in blend]
    counts: dict[str, int] = {}
    for kind, _ in blend:
        counts[kind] = counts.get(kind, 0) + 1
    write_lines(ctx.out / "blend.jsonl", [
        {"type": k.type, "domain": k.domain, "pool": k.pool, "sampling": k.sampling, "rows": counts[k.type]}
        for k in spec.blend])
    (ctx.out / "examples.json").write_text(json.dumps({kind: json.loads(row.to_json()) for kind, row in reversed(blend)}))
    return rows


def _texts(row: Row) -> list[str]:
    return [m["content"] for m in (*row.messages, *row.turns)]
