"""The sampler's inner step on a CPU: one new token for each row, with what lies between the matrix products compiled.

The same arithmetic as `qwen3.hidden_states` under `attention.Cache`, in float32. PyTorch takes some forty calls a layer
for it, which cost more than what they compute; here they are four, and four products. They leave Python's lock, so
that several threads, each with rows of its own, do not wait for one another (`rollout.sample`).
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m2rl_core.kernel import quick
from m2rl_core.models.attention import SPARE, Cache
from m2rl_core.models.qwen3 import Model, hidden_states, rope

inner = partial(quick, forceinline=True)  # inside of the loops of another

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
SUMMED = 64  # tokens whose probabilities are added at once
UNSEEN = np.float32(-1e30)  # a score of what is not seen
LEAST, LOG2E = np.float32(-87), np.float32(1.44269504)  # below, float32 knows no exponential
LN2 = np.float32(0.693359375), np.float32(-2.12194440e-4)
TERMS = tuple(map(np.float32, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
                               5.0000001201e-1)))  # Cephes' expf


@quick
def normalize(x, eps, y):
    """y := x / rms(x), row by row."""
    size = np.float32(x.shape[1])
    for r in range(len(x)):
        row, out, total = x[r], y[r], ZERO
        for c in range(len(row)):
            total += row[c] * row[c]
        scale = ONE / np.sqrt(total / size + eps)
        for c in range(len(row)):
            out[c] = row[c] * scale


@quick
def swiglu(gate_up, y):
    """y := silu(gate) * up of both in one row, (b, 2 F) to (b, F)."""
    size = y.shape[1]
    power, exponent = np.empty(size, np.float32), np.empty(size, np.int32)
    for r in range(len(y)):
        gate, up, out = gate_up[r, :size], gate_up[r, size:], y[r]
        for c in range(size):
            power[c] = -gate[c]
        exponential(power, ZERO, size, exponent)
        for c in range(size):
            out[c] = gate[c] * up[c] / (ONE + power[c])


@inner
def exponential(x, top, size, exponent):
    """x[:size] := exp(x - top), to two units in the last place, 0 for a difference below -87; their sum."""
    high, low = LN2
    c0, c1, c2, c3, c4, c5 = TERMS
    for i in range(size):
        u = x[i] - top
        v = min(max(u, LEAST), -LEAST)
        k = np.floor(v * LOG2E + HALF)
        r = v - k * high - k * low
        power = (((((c0 * r + c1) * r + c2) * r + c3) * r + c4) * r + c5) * r * r + r + ONE
        x[i] = power if u >= LEAST else ZERO
        exponent[i] = (np.int32(k) + np.int32(127)) << np.int32(23)
    scale, total = exponent.view(np.float32), ZERO
    for i in range(size):
        x[i] *= scale[i]
        total += x[i]
    return total


@inner
def dots(p, q, keys, size, of_p, of_q):
    """of_p[t] := p · keys[t], and of q: two queries, and four keys at once; size: a multiple of 4."""
    for t in range(0, size, 4):
        a = b = c = d = e = f = g = h = ZERO
        k0, k1, k2, k3 = keys[t], keys[t + 1], keys[t + 2], keys[t + 3]
        for i in range(len(p)):
            x, y = p[i], q[i]
            a += x * k0[i]
            b += x * k1[i]
            c += x * k2[i]
            d += x * k3[i]
            e += y * k0[i]
            f += y * k1[i]
            g += y * k2[i]
            h += y * k3[i]
        of_p[t], of_p[t + 1], of_p[t + 2], of_p[t + 3] = a, b, c, d
        of_q[t], of_q[t + 1], of_q[t + 2], of_q[t + 3] = e, f, g, h


@inner
def gather(p, q, values, size, of_p, of_q):
    """of_p += the sum of p[t] values[t], and of q; size: a multiple of 8."""
    for t in range(0, size, 8):
        p0, p1, p2, p3, p4, p5, p6, p7 = p[t], p[t + 1], p[t + 2], p[t + 3], p[t + 4], p[t + 5], p[t + 6], p[t + 7]
        q0, q1, q2, q3, q4, q5, q6, q7 = q[t], q[t + 1], q[t + 2], q[t + 3], q[t + 4], q[t + 5], q[t + 6], q[t + 7]
        v0, v1, v2, v3 = values[t], values[t + 1], values[t + 2], values[t + 3]
        v4, v5, v6, v7 = values[t + 4], values[t + 5], values[t + 6], values[t + 7]
        for i in range(len(of_p)):
            a, b, c, d, e, f, g, h = v0[i], v1[i], v2[i], v3[i], v4[i], v5[i], v6[i], v7[i]
            of_p[i] += p0 * a + p1 * b + p2 * c + p3 * d + p4 * e + p5 * f + p6 * g + p7 * h
            of_q[i] += q0 * a + q1 * b + q2 * c + q3 * d + q4 * e + q5 * f + q6 * g + q7 * h


@inner
def softmax(scores, prompt, own, exponent):
    """Scores of `prompt` columns and, after a multiple of SPARE, of `own` ones become weights; returns what divides them."""
    begin, size = whole(prompt), whole(prompt) + whole(own)
    for t in range(prompt, begin):
        scores[t] = UNSEEN
    for t in range(begin + own, size):
        scores[t] = UNSEEN
    return exponential(scores, highest(scores, size), size, exponent)


@inner
def highest(x, size):
    """The largest of x[:size], four at a time: the compiler has no vectors for one maximum."""
    a = b = c = d = x[0]
    for t in range(0, size - 3, 4):
        e, f, g, h = x[t], x[t + 1], x[t + 2], x[t + 3]
        a, b = e if e > a else a, f if f > b else b
        c, d = g if g > c else c, h if h > d else d
    for t in range(size // 4 * 4, size):
        a = x[t] if x[t] > a else a
    return max(max(a, b), max(c, d))


@inner
def whole(size):
    """The next multiple of SPARE."""
    return (size + SPARE - 1) // SPARE * SPARE


@inner
def turned(x, weight, eps, cos, sin, scale, y):
    """y := the rotary embedding of x / rms(x) * weight, times `scale`; cos and sin: (d/2,)."""
    half, total = len(cos), ZERO
    for c in range(2 * half):
        total += x[c] * x[c]
    scale = scale / np.sqrt(total / np.float32(2 * half) + eps)
    a, b, u, v, left, right = x[:half], x[half:], weight[:half], weight[half:], y[:half], y[half:]
    for c in range(half):
        one, two = a[c] * u[c] * scale, b[c] * v[c] * scale
        left[c] = one * cos[c] - two * sin[c]
        right[c] = two * cos[c] + one * sin[c]


@quick
def attend(qkv, weight, eps, cos, sin, prompt_keys, prompt_values, lengths, group, keys, values, start, column, y):
    """What the new token of each row gathers, y (b, H d); writes its key and value into `column`.

    qkv: (b, (H + 2 KVH) d); weight: of the norms, (H + KVH, d); cos, sin: (b, d/2); prompt_keys, prompt_values:
    (P, KVH, S, d); keys, values: (b, KVH, C, d), with zeros in the SPARE columns of values from `column` on.
    """
    kv_heads, d = keys.shape[1], keys.shape[3]
    heads = y.shape[1] // d
    share, room = heads // kv_heads, prompt_keys.shape[2] + keys.shape[2]
    p, q, spare = np.empty(d, np.float32), np.empty(d, np.float32), np.empty(d, np.float32)
    of_p, of_q, exponent = np.empty(room, np.float32), np.empty(room, np.float32), np.empty(room, np.int32)
    scale = ONE / np.sqrt(np.float32(d))
    for r in range(len(y)):
        row, of, prompt, own = qkv[r], group[r], lengths[group[r]], column + 1 - start[r]
        begin = whole(prompt)
        for kv in range(kv_heads):
            pk, pv, k, v = prompt_keys[of, kv], prompt_values[of, kv], keys[r, kv], values[r, kv]
            at = (heads + kv) * d
            turned(row[at : at + d], weight[heads + kv], eps, cos[r], sin[r], ONE, k[column])
            at += kv_heads * d
            v[column] = row[at : at + d]
            v[column + SPARE - 1] = ZERO
            k, v = k[start[r] :], v[start[r] :]
            for h in range(kv * share, (kv + 1) * share, 2):  # two heads at once, or the last one beside itself
                other = min(h + 1, (kv + 1) * share - 1)
                turned(row[h * d : (h + 1) * d], weight[h], eps, cos[r], sin[r], scale, p)
                turned(row[other * d : (other + 1) * d], weight[other], eps, cos[r], sin[r], scale, q)
                dots(p, q, pk, begin, of_p, of_q)
                dots(p, q, k, whole(own), of_p[begin:], of_q[begin:])
                total_p = softmax(of_p, prompt, own, exponent)
                total_q = softmax(of_q, prompt, own, exponent)
                y_p = y[r, h * d : (h + 1) * d]
                y_q = y[r, other * d : (other + 1) * d] if other > h else spare
                y_p[:], y_q[:] = ZERO, ZERO
                gather(of_p, of_q, pv, begin, y_p, y_q)
                gather(of_p[begin:], of_q[begin:], v, whole(own), y_p, y_q)
                for c in range(d):
                    y_p[c] /= total_p
                    y_q[c] /= total_q


@quick
def choose(logits, temperature, uniform, tokens, logps):
    """tokens (b,) := where the cumulative distribution of each row of logits (b, V) passes uniform (b,); their log-probs."""
    size = logits.shape[1]
    mass, exponent = np.empty(size, np.float32), np.empty(size, np.int32)
    for r in range(len(logits)):
        row = logits[r]
        for t in range(size):
            mass[t] = row[t] / temperature
        top = highest(mass, size)
        total = exponential(mass, top, size, exponent)
        goal, seen, t = uniform[r] * total, ZERO, 0
        while t + SUMMED < size:
            part = ZERO
            for i in range(t, t + SUMMED):
                part += mass[i]
            if seen + part > goal:
                break
            seen += part
            t += SUMMED
        seen += mass[t]
        while seen <= goal and t + 1 < size:
            t += 1
            seen += mass[t]
        while t > 0 and mass[t] == 0:  # the goal was rounded up to the whole: the last token that can be drawn
            t -= 1
        tokens[r] = t
        logps[r] = row[t] / temperature - top - np.log(total)


class Decoder:
    """`hidden_states` of one new token for each row of a cache, on a CPU in float32."""

    def __init__(self, model: Model):
        self.model, self.eps = model, np.float32(model.shape.eps)
        self.norms = [layer.qk_norm.numpy() for layer in model.layers]

    def __call__(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Final hidden states (b, D) of `tokens` (b,), whose keys and values are written into the cache's next column."""
        shape, x = self.model.shape, F.embedding(tokens, self.model.embed)
        cos, sin = rope(cache.positions, shape, x.dtype)
        cos, sin = cos[:, 0, : shape.head_dim // 2].contiguous().numpy(), sin[:, 0].numpy()
        rows = cache.lengths.numpy(), cache.group.numpy()
        start, width = cache.start.numpy(), self.model.layers[0].down.shape[1]
        h, y, opened = torch.empty_like(x), x.new_empty(len(x), shape.heads * shape.head_dim), x.new_empty(len(x), width)
        for layer, norm, prompt, own in zip(self.model.layers, self.norms, cache.prompts, cache.own, strict=True):
            normalize(x.numpy(), self.eps, h.numpy())
            qkv = torch.mm(h, layer.qkv.T)
            attend(qkv.numpy(), norm, self.eps, cos, sin, prompt[0].numpy(), prompt[1].numpy(), *rows, own[0].numpy(),
                   own[1].numpy(), start, cache.columns, y.numpy())
            x = torch.addmm(x, y, layer.out.T)
            normalize(x.numpy(), self.eps, h.numpy())
            swiglu(torch.mm(h, layer.gate_up.T).numpy(), opened.numpy())
            x = torch.addmm(x, opened, layer.down.T)
        normalize(x.numpy(), self.eps, h.numpy())
        return h.mul_(self.model.norm)


def decoder(model: Model) -> Callable[[Tensor, Cache], Tensor]:
    """What gives the final hidden states (b, D) of one new token (b,) for each row of a cache."""
    if model.embed.device.type == "cpu" and model.embed.dtype == torch.float32:
        return Decoder(model)
    return lambda tokens, cache: hidden_states(model, tokens, cache.positions, cache)


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row of logits (b, V), by its uniform number (b,), and its log-prob; on a CPU."""
    tokens, logps = torch.empty(len(logits), dtype=torch.long), torch.empty(len(logits))
    choose(logits.numpy(), np.float32(temperature), uniform.numpy(), tokens.numpy(), logps.numpy())
    return tokens, logps
