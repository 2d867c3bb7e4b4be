"""Sampling and scoring with the torch engine: `sample` and `logprobs`.

A prompt is prefilled once for its whole group, which shares its keys and values; finished rows are retired and the
batch is compacted. In multi-turn rollouts the keys and values of earlier turns stay, and tool results are appended as
tokens: what was sampled is never tokenised again. Draw t of rollout r uses its own uniform number: batching changes nothing,
and neither do the threads of a CPU, on which two waves of rollouts run side by side.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from m2rl_core.domains import Row, UserSays, graded
from m2rl_core.domains.environments import open_environment, step_all
from m2rl_core.errors import StudyError
from m2rl_core.models.attention import Cache, Causal, Grouped, Replies
from m2rl_core.models.decode import decoder, draw
from m2rl_core.models.policy import LANES, Policy, encode_prompt
from m2rl_core.models.qwen3 import head, hidden_states, prepare, token_logprobs
from m2rl_core.threads import side_by_side

BATCH = 256  # rollouts in flight
WAVES = 1 if torch.cuda.is_available() else 2  # that they are, side by side where there are threads for it
BUDGET = 16384 if torch.cuda.is_available() else 1024  # response tokens at once in training: on a CPU what its cache holds
COMPACT = 0.75  # retire finished rows when fewer than this share are live


@dataclass
class Rollout:
    """One sampled continuation: token ids after the prompt, which of them were sampled, and their log-probs."""

    row: Row
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # False: written by the environment
    logprobs: list[float] = field(default_factory=list)  # at the sampling temperature; 0 where not sampled
    turns: list[str] = field(default_factory=list)  # the assistant's turns as text, without end markers
    truncated: bool = False
    failed: str = ""  # why the environment broke down, which ends the rollout and makes it worth 0

    @property
    def length(self) -> int:
        """Number of sampled tokens."""
        return sum(self.sampled)


@torch.no_grad()
def sample(policy: Policy, rows: Sequence[Row], n: int, *, generator: torch.Generator, temperature: float = 1.0,
           max_new_tokens: int = 64, max_turns: int = 4, top_p: float = 1.0, batch: int = BATCH) -> list[Rollout]:
    """`n` rollouts for each row, grouped by row in the order of `rows`: len(rows) * n of them.

    With `top_p` below 1 each token is one of the likeliest that have this share together (the nucleus), and log-probs are
    of the distribution without the others, from which it was drawn: what an importance weight would need, and vLLM's too.
    `max_new_tokens` bounds the sampled tokens of a rollout over all its turns. Raises StudyError for a prompt
    that leaves no room in the model's context, ValueError for `n` below 1.
    """
    if n < 1:
        raise ValueError(f"sample: n = {n}, but each row needs at least one rollout")
    prompts = encode_prompts(policy, rows, max_new_tokens)
    uniform = torch.rand(len(rows) * n, max_new_tokens, generator=generator)
    rollouts = [Rollout(row, prompt) for row, prompt in zip(rows, prompts, strict=True) for _ in range(n)]
    model, turns = prepare(policy.weights, policy.shape), threading.Lock()

    def wave(chosen: list[int]):
        _Wave(policy, model, [rollouts[i] for i in chosen], uniform[chosen].to(policy.device), n, temperature, max_turns,
              turns, top_p).run()
    waves(rows, prompts, n, wave, batch)
    return rollouts


def waves(rows: Sequence[Row], prompts: Sequence[list[int]], n: int, wave: Callable[[list[int]], None], batch: int) -> None:
    """`wave(indices)` of all of `n` rollouts for each row, `batch` of them at once.

    Rows of like length run together; which do has no influence on what is drawn.
    """
    order = sorted(range(len(rows)), key=lambda i: (rows[i].domain, len(prompts[i]), i))
    step = max(1, batch // WAVES // n)
    parts = [[i * n + j for i in order[start:start + step] for j in range(n)] for start in range(0, len(order), step)]
    side_by_side([partial(torch.no_grad()(wave), part) for part in parts], WAVES)


class _Wave:
    """Rollouts in flight: a cache row each, compacted as they finish.

    All waves share `model`, the prepared weights, and `turns`, which is held where tools and tokenizer are used.
    """

    def __init__(self, policy, model, rollouts, uniform, n, temperature, max_turns, turns, top_p=1.0):
        self.policy, self.rollouts, self.model, self.decode = policy, rollouts, model, decoder(model)
        self.temperature, self.max_turns, self.budget, self.top_p = temperature, max_turns, uniform.shape[1], top_p
        device = policy.device
        self.stops = torch.tensor(policy.stop_ids, device=device)
        self.uniform = F.pad(uniform, (0, 1))  # a spare column for rows that are finished but not yet retired
        self.drawn = torch.zeros(self.uniform.shape, dtype=torch.long, device=device)
        self.logps = torch.zeros(self.uniform.shape, device=device)
        self.alive = torch.arange(len(rollouts), device=device)  # rollout of each cache row
        self.live = torch.ones(len(rollouts), dtype=torch.bool, device=device)
        self.count = torch.zeros(len(rollouts), dtype=torch.long, device=device)  # tokens sampled, per cache row
        self.flushed = [0] * len(rollouts)  # tokens already moved into the rollout
        self.parked: list[tuple] = []  # rows that wait for their next turn
        self.turns = turns
        with turns:
            self.environments = [open_environment(rollout.row) for rollout in rollouts]
        self._prefill(n)

    def _prefill(self, n):
        """Run every different prompt once; its keys and values are those of all its `n` rollouts."""
        prompts = [r.prompt for r in self.rollouts[::n]]
        tokens, lengths = flat(prompts, self.policy.device)
        attend = Causal([len(p) for p in prompts], tokens.device, keep=True)
        hidden = hidden_states(self.model, tokens, places(lengths), attend)
        self.cache = Cache.of(attend, torch.arange(len(prompts), device=tokens.device).repeat_interleave(n))
        self.logits = self._logits(hidden[lengths.cumsum(0) - 1]).repeat_interleave(n, 0)

    def run(self):
        """All turns: rows whose tools have answered wait until every row has ended its turn, then go on together."""
        while True:
            while self.live.any():
                tokens = self._draw()
                over = self.live & (torch.isin(tokens, self.stops) | (self.count >= self.budget))
                if over.any():
                    self._end_turns(over, tokens)
                if self.live.any():
                    if self.live.sum() < COMPACT * len(self.live):
                        keep = self.live.nonzero()[:, 0]
                        tokens = tokens[keep]
                        self._keep(keep)
                    hidden = self.decode(tokens, self.cache)
                    self.cache.advance()
                    self.logits = self._logits(hidden)
            if not self.parked:
                break
            self._go_on()

    def _draw(self) -> Tensor:
        """Sample one token for each live row from its own uniform number; (b,)."""
        u = self.uniform[self.alive, self.count]
        if self.top_p == 1 and u.device.type == "cpu":
            tokens, logps = draw(self.logits, self.temperature, u)
        else:
            logp = F.log_softmax(self.logits / self.temperature, dim=-1)  # (b, V)
            if self.top_p < 1:
                logp = nucleus(logp, self.top_p)
            mass = logp.exp().cumsum(-1)
            tokens = torch.searchsorted(mass, (u * mass[:, -1])[:, None], right=True)[:, 0].clamp_(max=logp.shape[1] - 1)
            if self.top_p < 1:  # where the product was rounded up to the whole mass: the last token that has any
                tokens = torch.minimum(tokens, (mass < mass[:, -1:]).sum(-1))
            logps = logp.gather(1, tokens[:, None])[:, 0]
        self.drawn[self.alive, self.count] = tokens
        self.logps[self.alive, self.count] = logps
        self.count += self.live
        return tokens

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, head(self.policy.weights)).float()

    def _park(self, rows: list[int], replies: list[list[int]]):
        """Set rows aside with their keys and values, and the tokens that they go on with."""
        at = torch.tensor(rows, device=self.policy.device)
        self.parked.append((self.alive[at], self.count[at], self.cache.take(at), replies))

    def _go_on(self):
        """Take the parked rows as the batch and run the tools' replies of all of them in one forward pass."""
        alive, count, caches, replies = zip(*self.parked, strict=True)
        self.parked = []
        self.alive, self.count = torch.cat(alive), torch.cat(count)
        self.live = torch.ones(len(self.alive), dtype=torch.bool, device=self.alive.device)
        tokens, sizes = flat([ids for part in replies for ids in part], self.alive.device)
        attend = Replies(caches, sizes)
        hidden = hidden_states(self.model, tokens, attend.positions, attend)
        self.cache = attend.cache
        self.logits = self._logits(hidden[attend.last])

    def _end_turns(self, over: Tensor, tokens: Tensor):
        """Close the turns that ended; rows to which the environment replies are parked."""
        rows, which, said, logps = over.nonzero()[:, 0].tolist(), [], [], []
        for row in rows:
            i, count = int(self.alive[row]), int(self.count[row])
            which.append(i)
            said.append(self.drawn[i, self.flushed[i]:count].tolist())
            logps.append(self.logps[i, self.flushed[i]:count].tolist())
            self.flushed[i] = count
            self.live[row] = False
        with self.turns:
            replies = end_turns(self.policy, [self.rollouts[i] for i in which], [self.environments[i] for i in which], said,
                                logps, self.budget, self.max_turns)
        # The end marker was sampled but not run yet: it goes in with the reply.
        going = [(row, [ids[-1], *reply]) for row, ids, reply in zip(rows, said, replies, strict=True) if reply is not None]
        if going:
            self._park(*map(list, zip(*going, strict=True)))

    def _keep(self, rows: Tensor):
        """Compact the batch to these cache rows."""
        self.alive, self.count, self.logits, self.live = (x[rows] for x in (self.alive, self.count, self.logits, self.live))
        self.cache = self.cache.take(rows)


def nucleus(logp: Tensor, top_p: float) -> Tensor:
    """Log-probs (b, V) of the fewest likeliest tokens that have `top_p` together, renormalised; -inf for all others."""
    ranked, order = logp.sort(dim=-1, descending=True, stable=True)
    before = ranked.exp().cumsum(-1) - ranked.exp()  # of the likelier ones; the first token always stays
    ranked[before >= top_p] = -torch.inf
    return F.log_softmax(torch.empty_like(logp).scatter_(1, order, ranked), dim=-1)


def encode_prompts(policy: Policy, rows: Sequence[Row], max_new_tokens: int) -> list[list[int]]:
    """Token ids of each row's prompt; StudyError for one that leaves no room for `max_new_tokens` in the context."""
    prompts = [encode_prompt(policy, row.messages, row.tools) for row in rows]
    room = policy.config.max_position_embeddings - max_new_tokens
    for row, prompt in zip(rows, prompts, strict=True):
        if len(prompt) > room:
            raise StudyError(f"{row.id}: prompt of {len(prompt)} tokens, but {room} fit beside {max_new_tokens} new "
                             f"ones in a context of {policy.config.max_position_embeddings}; raise model.context")
    return prompts


def end_turns(policy: Policy, rollouts: Sequence[Rollout], environments: Sequence, said: Sequence[Sequence[int]],
              logprobs: Sequence[Sequence[float]], budget: int, max_turns: int) -> list[list[int] | None]:
    """Add to each rollout the turn that was sampled, and its environment's reply; the replies' ids, None where it is over.

    A turn ends with a stop id, or because `budget`, the sampled tokens of all turns together, is spent.
    """
    answers = [_add_turn(policy, *turn, max_turns) for turn in zip(rollouts, said, logprobs, strict=True)]
    asked = [i for i, answer in enumerate(answers) if answer is not None and environments[i] is not None]
    replies: list[list[int] | None] = [None] * len(rollouts)
    outputs = step_all([environments[i] for i in asked], [answers[i] for i in asked])
    for i, given in zip(asked, outputs, strict=True):
        if given is None:
            rollouts[i].failed = environments[i].failed
        else:
            replies[i] = _add_reply(policy, rollouts[i], given, budget)
    return replies


def _add_turn(policy: Policy, rollout: Rollout, said: Sequence[int], logprobs: Sequence[float], max_turns: int) -> str | None:
    """What an environment may reply to; None where the turn is the last in any case."""
    stopped = said[-1] in policy.stop_ids
    rollout.tokens += said
    rollout.sampled += [True] * len(said)
    rollout.logprobs += logprobs
    rollout.turns.append(policy.tokenizer.decode(said[:-1] if stopped else said))
    rollout.truncated = not stopped
    return graded(rollout.row, rollout.turns[-1]) if stopped and len(rollout.turns) < max_turns else None


def _add_reply(policy: Policy, rollout: Rollout, outputs: Sequence[str], budget: int) -> list[int] | None:
    """The reply's ids; None where nothing is left to go on with."""
    reply, left = tool_reply(policy, outputs), budget - rollout.length
    if not left or len(rollout.prompt) + len(rollout.tokens) + len(reply) > policy.config.max_position_embeddings - left:
        rollout.truncated = True  # the tools answered, but nothing is left to go on with
        return None
    rollout.tokens += reply
    rollout.sampled += [False] * len(reply)
    rollout.logprobs += [0.0] * len(reply)
    return reply


def tool_reply(policy: Policy, outputs: Sequence[str]) -> list[int]:
    """What follows the assistant's end marker when tools answer, or when the user goes on (one `UserSays`): exactly the
    chat template's text, as ids; but the thinking of earlier turns, which it drops at a user's words, stays."""
    body = "".join(f"\n{text}" if isinstance(text, UserSays) else f"\n<tool_response>\n{text}\n</tool_response>"
                   for text in outputs)
    text = f"\n<|im_start|>user{body}<|im_end|>\n<|im_start|>assistant\n"
    return policy.tokenizer.encode(text, add_special_tokens=False)


def flat(sequences: Sequence[Sequence[int]], device) -> tuple[Tensor, Tensor]:
    """One after the other: tokens (N,) and lengths (B,)."""
    return (torch.tensor([i for ids in sequences for i in ids], dtype=torch.long, device=device),
            torch.tensor([len(ids) for ids in sequences], device=device))


def places(lengths: Tensor) -> Tensor:
    """The place of each token in its sequence, (N,), from the lengths (B,)."""
    begins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return torch.arange(len(begins), device=lengths.device) - begins


def response_hidden(policy: Policy, rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that predict each sampled token, the tokens, and the rollout each belongs to: (N, D), (N,), (N,).

    Neighbouring rollouts with one prompt share its forward pass (and, in training, its backward pass).
    """
    device = policy.device
    groups = [list(g) for _, g in groupby(rollouts, key=lambda r: r.prompt)]
    prompts, plens = flat([g[0].prompt for g in groups], device)
    inputs, ilens = flat([r.tokens[:-1] for r in rollouts], device)
    owner = torch.arange(len(groups), device=device).repeat_interleave(torch.tensor([len(g) for g in groups], device=device))
    attend = Grouped(plens.tolist(), ilens.tolist(), owner.tolist(), device)
    positions = torch.cat((places(plens), places(ilens) + plens[owner].repeat_interleave(ilens)))
    hidden = policy.hidden(torch.cat((prompts, inputs)), positions, attend)
    tokens, lens = flat([r.tokens for r in rollouts], device)
    sampled = torch.tensor([s for r in rollouts for s in r.sampled], dtype=torch.bool, device=device)
    of, place = torch.arange(len(rollouts), device=device).repeat_interleave(lens), places(lens)
    begins = len(prompts) + ilens.cumsum(0) - ilens
    last = (plens.cumsum(0) - 1)[owner[of]]  # a prompt's end predicts the first
    before = torch.where(place == 0, last, begins[of] + place - 1)
    # `embedding` and not an index: its backward pass adds the rows in parallel
    return F.embedding(before[sampled], hidden), tokens[sampled], of[sampled]


def micro_batches(rollouts: Sequence[Rollout], budget: int = BUDGET) -> list[list[int]]:
    """Indices of rollouts in batches of at most `budget` response tokens, of like length and nearly equal size.

    Groups stay together, for the sake of their prompt; one that is larger than the budget is a batch of its own.
    There are as many batches as `Policy.each` has lanes, or a multiple, where groups allow.
    """
    groups = [list(g) for _, g in groupby(range(len(rollouts)), key=lambda i: rollouts[i].prompt)]
    groups.sort(key=lambda g: (max(len(rollouts[i].tokens) for i in g), g[0]))
    total = sum(len(rollout.tokens) for rollout in rollouts)
    count = LANES * max(1, ceil(total / (budget * LANES)))
    batches, filled, before = [[]], 0, 0
    for group in groups:
        size = sum(len(rollouts[i].tokens) for i in group)
        full = before + size / 2 > len(batches) * total / count
        if batches[-1] and (filled + size > budget or full):
            batches.append([])
            filled = 0
        batches[-1] += group
        filled, before = filled + size, before + size
    return [b for b in batches if b]


@torch.no_grad()
def logprobs(policy: Policy, rollouts: Sequence[Rollout], temperature: float = 1.0) -> list[Tensor]:
    """Log-probs of the sampled tokens of each rollout under `policy`, in order; a (length,) tensor each."""
    found: list[Tensor] = [None] * len(rollouts)
    for batch in micro_batches(rollouts):
        part = [rollouts[i] for i in batch]
        hidden, tokens, owner = response_hidden(policy, part)
        logp, _ = token_logprobs(policy.weights, hidden, tokens, temperature)
        for i, piece in zip(batch, logp.split(torch.bincount(owner, minlength=len(part)).tolist()), strict=True):
            found[i] = piece
    return found
