"""Who sees whom: attention among tokens that lie one after the other, for training and for sampling.

Each class is an `attend` of `qwen3.hidden_states`. Everything else of the model runs on the tokens alone; only here,
and only for the products of queries and keys, do sequences stand as padded rows.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # the cache grows by this many columns
SPARE = 8  # columns that `decode` reads at once, so that so many stand after the last


class Padding:
    """Sequences of these lengths, one after the other (N, ...), as rows of equal length (B, T, ...), and back."""

    def __init__(self, lengths: Sequence[int], device):
        self.lengths = torch.tensor(lengths)
        self.B, self.T = len(lengths), max(lengths, default=0)
        inside = torch.arange(self.T) < self.lengths[:, None]  # (B, T)
        self.full = bool(inside.all())
        slots = torch.zeros(inside.shape, dtype=torch.long)
        slots[inside] = torch.arange(int(inside.sum()))
        self.inside, self.slots = inside.to(device), slots.flatten().to(device)  # token of each slot, 0 in the padding
        self.tokens = inside.flatten().nonzero()[:, 0].to(device)  # slot of each token

    def rows(self, x: Tensor) -> Tensor:
        """(N, ...) to (B, T, ...); what stands in the padding is arbitrary and has no gradient."""
        found = x if self.full else _Spread.apply(x, self.slots, self.tokens)
        return found.view(self.B, self.T, *x.shape[1:])

    def flat(self, x: Tensor) -> Tensor:
        """(B, T, ...) to (N, ...)."""
        found = x.reshape(self.B * self.T, *x.shape[2:])
        return found if self.full else _Gather.apply(found, self.tokens)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slots, tokens):
        ctx.save_for_backward(tokens)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tokens):
        ctx.save_for_backward(tokens)
        ctx.slots = len(x)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.slots, *grad.shape[1:]).index_copy_(0, *ctx.saved_tensors, grad), None


def heads_first(padding: Padding, *tensors: Tensor) -> list[Tensor]:
    """Each (N, H, d) as (B, H, T, d)."""
    return [padding.rows(x).transpose(1, 2) for x in tensors]


def joined(padding: Padding, y: Tensor) -> Tensor:
    """(B, H, T, d) as (N, H d)."""
    return padding.flat(y.transpose(1, 2)).flatten(1)


class Causal:
    """Each token sees itself and those before it in its sequence."""

    def __init__(self, lengths: Sequence[int], device, keep: bool = False):
        self.padding = Padding(lengths, device)
        self.kept: list[tuple[Tensor, Tensor]] | None = [] if keep else None  # keys and values of each layer

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = heads_first(self.padding, q, k, v)
        if self.kept is not None:
            self.kept.append((k, v))
        return joined(self.padding, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


class Grouped:
    """Prompts, then the responses to them: a response sees its prompt, which stands there once for all its responses.

    `prompts` (P) and `responses` (B) are lengths, `owner` (B) the prompt of each response.
    """

    def __init__(self, prompts: Sequence[int], responses: Sequence[int], owner: Sequence[int], device):
        self.split = sum(prompts), sum(responses)
        self.prompts, self.responses = Causal(prompts, device, keep=True), Padding(responses, device)
        self.owner = torch.tensor(owner, device=device)
        T = self.responses.T
        own = torch.ones(T, T, dtype=torch.bool, device=device).tril().expand(len(owner), -1, -1)
        seen = self.prompts.padding.inside[self.owner][:, None].expand(-1, T, -1)
        self.mask = torch.cat((seen, own), dim=2)[:, None]  # (B, 1, T, P + T)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (qp, q), (kp, k), (vp, v) = (x.split(self.split) for x in (q, k, v))
        first = self.prompts(layer, qp, kp, vp)
        if not self.split[1]:
            return first
        past = [x.index_select(0, self.owner) for x in self.prompts.kept.pop()]
        q, k, v = heads_first(self.responses, q, k, v)
        k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)
        return torch.cat((first, joined(self.responses, y)))


@dataclass
class Cache:
    """One new token for each row of a batch in flight: it sees its prompt, shared by the group, and its own past.

    The rows' own keys and values end at one column, so that every step writes one column for all.
    """

    lengths: Tensor  # (P,) of the prompts
    inside: Tensor  # (P, S): what is no padding of them
    prompts: list[tuple[Tensor, Tensor]]  # keys and values of each layer, (P, KVH, S, d)
    own: list[tuple[Tensor, Tensor]]  # likewise of each row, (b, KVH, C, d), with room for more
    group: Tensor  # (b,) the prompt of each row
    start: Tensor  # (b,) its first own column
    columns: int = 0  # filled

    @staticmethod
    def of(prompts: Causal, group: Tensor) -> Cache:
        """Of rows that have said nothing yet, after their prompts have run."""
        spare = -prompts.padding.T % SPARE
        kept = [tuple(F.pad(x, (0, 0, 0, spare)).contiguous() for x in pair) for pair in prompts.kept]
        own = [tuple(_with_room(x.new_empty(len(group), x.shape[1], 0, x.shape[3])) for x in pair) for pair in kept]
        return Cache(prompts.padding.lengths.to(group.device), F.pad(prompts.padding.inside, (0, spare)), kept, own, group,
                     torch.zeros_like(group))

    @cached_property
    def places(self) -> Places:
        return Places(self)

    @property
    def positions(self) -> Tensor:
        """Of the next token of each row, (b,)."""
        return self.lengths[self.group] + self.columns - self.start

    def take(self, rows: Tensor) -> Cache:
        """A cache of these rows alone."""
        own = [tuple(_with_room(x[:, :, :self.columns], rows) for x in pair) for pair in self.own]
        return replace(self, own=own, group=self.group[rows], start=self.start[rows])

    def advance(self) -> None:
        """Make room for the next column, after all layers have written theirs."""
        self.columns += 1
        if self.columns + SPARE > self.own[0][0].shape[2]:
            self.own = [tuple(_with_room(x[:, :, :self.columns]) for x in pair) for pair in self.own]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (b, H, d), k and v (b, KVH, d) of one new token a row."""
        places, (keys, values), end = self.places, self.own[layer], self.columns + 1
        pk, pv = places.prompts[layer]
        keys[:, :, self.columns], values[:, :, self.columns] = k, v
        b, heads, d = q.shape
        q = (q * d**-0.5).view(b, k.shape[1], -1, d)  # (b, KVH, h, d)
        of_prompt = torch.matmul(places.together(q), pk.mT).add_(places.mask)
        of_own = torch.matmul(q, keys[:, :, :end].mT)
        if places.late is not None:
            of_own[..., :places.late.shape[-1]] += places.late
        weights = torch.cat((places.apart(of_prompt), of_own), dim=-1).softmax(-1)
        to_prompt, to_own = weights.split((pk.shape[2], end), dim=-1)
        y = places.apart(torch.matmul(places.together(to_prompt), pv)) + torch.matmul(to_own, values[:, :, :end])
        return y.reshape(b, heads * d)


class Places:
    """Where the rows of a cache stand when those of a prompt stand side by side, so that its keys are read once for all."""

    def __init__(self, cache: Cache):
        near, at = torch.unique(cache.group, return_inverse=True)
        every = len(near) == len(cache.lengths)
        self.prompts = cache.prompts if every else [tuple(x[near] for x in pair) for pair in cache.prompts]
        self.mask = _masked(cache.inside[near], self.prompts)  # (P, 1, 1, S)
        counts = torch.bincount(at)
        self.P, self.n = len(near), int(counts.max())
        order = torch.argsort(at, stable=True)
        rank = torch.empty_like(at)
        rank[order] = torch.arange(len(at), device=at.device) - (counts.cumsum(0) - counts)[at[order]]
        slots = at * self.n + rank
        self.slots = None if torch.equal(slots, torch.arange(self.P * self.n, device=at.device)) else slots
        own = torch.arange(cache.columns, device=at.device) >= cache.start[:, None]
        self.late = None if own.all() else _masked(own, self.prompts)  # columns before a row's own

    def together(self, x: Tensor) -> Tensor:
        """(b, KVH, h, ·) to (P, KVH, n h, ·)."""
        if self.slots is not None:
            x = x.new_zeros(self.P * self.n, *x.shape[1:]).index_copy_(0, self.slots, x)
        return x.view(self.P, self.n, *x.shape[1:]).transpose(1, 2).flatten(2, 3)

    def apart(self, x: Tensor) -> Tensor:
        """(P, KVH, n h, ·) to (b, KVH, h, ·)."""
        x = x.unflatten(2, (self.n, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)


def _masked(seen: Tensor, like: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What to add to scores: 0 where seen (n, S), minus infinity elsewhere; (n, 1, 1, S)."""
    return torch.where(seen, 0.0, float("-inf")).to(like[0][0].dtype)[:, None, None]


class Replies:
    """Several new tokens for each row, as when tools have answered: the rows of several caches, joined, and the way on.

    `sizes` (b,) counts the new tokens of each row; `cache` is the joined one, with room for them.
    """

    def __init__(self, parts: Sequence[Cache], sizes: Tensor):
        held = torch.cat([part.columns - part.start for part in parts])
        end = int((held + sizes).max())
        start, columns = end - held - sizes, torch.arange(end, device=sizes.device)
        sources = [(columns - begin[:, None] + part.start[:, None]).clamp_(0, part.columns - 1) for part, begin in zip(
            parts, start.split([len(part.group) for part in parts]), strict=True)]  # where each column was
        own = [tuple(torch.cat([_columns(part.own[layer][i], at) for part, at in zip(parts, sources, strict=True)])
                     for i in range(2)) for layer in range(len(parts[0].prompts))]
        group = torch.cat([part.group for part in parts])
        cache = self.cache = replace(parts[0], own=own, group=group, start=start, columns=end)
        self.row = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)  # of each token
        ends = sizes.cumsum(0)
        back = ends[self.row] - torch.arange(len(self.row), device=sizes.device)  # 1 for the last token of a row
        self.column, self.width = cache.columns - back, int(sizes.max())
        self.positions = cache.lengths[cache.group][self.row] + self.column - cache.start[self.row]
        self.last = ends - 1
        query = columns[cache.columns - self.width:, None]
        own = (columns >= cache.start[:, None, None]) & (columns <= query)  # (b, R, C)
        seen = cache.inside[cache.group][:, None].expand(-1, self.width, -1)
        self.mask = torch.cat((seen, own), dim=2)[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, at = self.cache, self.column - (self.cache.columns - self.width)
        for held, new in zip(cache.own[layer], (k, v), strict=True):
            held[self.row, :, self.column] = new
        queries = q.new_zeros(len(cache.group), self.width, *q.shape[1:])
        queries[self.row, at] = q
        k, v = (torch.cat((past[cache.group], own[:, :, :cache.columns]), dim=2)
                for past, own in zip(cache.prompts[layer], cache.own[layer], strict=True))
        y = F.scaled_dot_product_attention(queries.transpose(1, 2), k, v, attn_mask=self.mask, enable_gqa=True)
        return y.transpose(1, 2)[self.row, at].flatten(1)


def _columns(x: Tensor, at: Tensor) -> Tensor:
    """Columns `at` (b, C) of each row of a cache (b, KVH, ·, d), and room for more: (b, KVH, C + BLOCK, d)."""
    found = x[torch.arange(len(x), device=x.device)[:, None], :, at].transpose(1, 2)
    return _with_room(found)


def _with_room(x: Tensor, rows: Tensor | None = None) -> Tensor:
    """The columns of a cache (b, KVH, C, d), of these rows alone where told, and room for more: (b, KVH, C + BLOCK, d).

    There are SPARE zeros, then anything.
    """
    b, columns = len(x if rows is None else rows), x.shape[2]
    found = x.new_empty(b, x.shape[1], columns + BLOCK, x.shape[3])
    held = found[:, :, :columns]
    held.copy_(x) if rows is None else torch.index_select(x, 0, rows, out=held)
    found[:, :, columns:columns + SPARE] = 0
    return found
