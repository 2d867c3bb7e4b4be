"""DARE (Yu et al. 2024): drop shifts at random, scale the rest up. A sparsifier that runs before a merge.

Whether an element survives is a hash of (seed, model, tensor, index) and nothing else: SplitMix64, started
at a point of its own for each (seed, model, tensor). Word i // 2 of the stream decides on element i: the low
31 bits of its low half for an even i, of its high half for an odd one. So the bits do not depend on pieces,
threads, device or the order of work, and no two tensors share a mask.
"""
from __future__ import annotations

import hashlib
import threading
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
HALVES = 0x7FFFFFFF7FFFFFFF  # the 31 bits of either half that are used
MASK_BYTES = 400_000_000  # 3.2 billion elements; leaves room below 1 GB for everything else


@lru_cache(maxsize=4096)
def start_of(seed: int, model: str, tensor: str) -> int:
    """Where the stream of one tensor of one model begins (64 bits of SHA-256)."""
    return int.from_bytes(hashlib.sha256(repr((seed, model, tensor)).encode()).digest()[:8], "little")


def words(start: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Words first .. first+count-1 of a stream: int64 (count,), the bits of SplitMix64's output.

    On the CPU by numpy, which has unsigned integers and takes half the time.
    """
    begin = (start + (first + 1) * GAMMA) % 2**64
    if torch.device(device).type == "cpu":
        z = _steps(count) + np.uint64(begin)
        return torch.from_numpy(_mixed(z, np.uint64, lambda x, by: x >> np.uint64(by)).view(np.int64))
    z = torch.arange(count, dtype=torch.int64, device=device).mul_(_signed(GAMMA)).add_(_signed(begin))
    return _mixed(z, _signed, _logical)


def _logical(z: Tensor, by: int) -> Tensor:
    """Shift to the right without the sign; torch's own shifts the sign in."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


@lru_cache(maxsize=8)
def _steps(count: int) -> np.ndarray:
    """The states of a stream that begins at 0; nearly all pieces are of one length, so this is made once."""
    return np.arange(count, dtype=np.uint64) * np.uint64(GAMMA)


def _mixed(z, constant, right):
    """SplitMix64's output function, in place; `right` shifts to the right without the sign."""
    z ^= right(z, 30)
    z *= constant(MIX_1)
    z ^= right(z, 27)
    z *= constant(MIX_2)
    z ^= right(z, 31)
    return z


def keep_bits(start: int, first: int, count: int, drop_rate: float, device: torch.device | str = "cpu") -> Tensor:
    """Which of the elements first .. first+count-1 survive: int32 (count,), all bits set or none."""
    begin = first // 2
    halves = words(start, begin, (first + count + 1) // 2 - begin, device).bitwise_and_(HALVES).view(torch.int32)
    limit = _limit(drop_rate)
    halves = halves[first - 2 * begin :][:count]
    return torch.sub(limit - 1, halves, out=halves).bitwise_right_shift_(31)


@lru_cache(maxsize=64)
def _limit(drop_rate: float) -> int:
    """An element survives where its 31 bits are at least this."""
    return int(Fraction(str(drop_rate)) * 2**31)


def keep_mask(start: int, first: int, count: int, drop_rate: float) -> Tensor:
    """The same as bool (count,): each with chance 1 - drop_rate."""
    return keep_bits(start, first, count, drop_rate) != 0


class Masks:
    """Drops, and holds what it drew as bits while a later pass may ask again: a mask costs more than all else.

    At most MASK_BYTES are held; what is beyond is drawn again, which gives the same.
    """

    def __init__(self, hold: bool):
        self.hold, self._held, self._lock = hold, {}, threading.Lock()
        self._left = MASK_BYTES

    def drop(self, delta: Tensor, drop_rate: float, seed: int, model: str, tensor: str, first: int) -> Tensor:
        """A piece of a tensor, flat float32, with each element dropped with chance `drop_rate`; begins at `first`."""
        key = drop_rate, seed, model, first, delta.numel()
        bits = self._held.get(tensor, {}).get(key)
        if bits is not None:
            return torch.from_numpy(delta.numpy() * np.unpackbits(bits, count=delta.numel()))
        keep = keep_bits(start_of(seed, model, tensor), first, delta.numel(), drop_rate, delta.device)
        if self.hold and delta.device.type == "cpu" and self._left > 0:
            bits = np.packbits(keep.numpy() != 0)
            with self._lock:
                self._held.setdefault(tensor, {})[key] = bits
                self._left -= bits.nbytes
        return keep.bitwise_and_(delta.view(torch.int32)).view(torch.float32)

    def forget(self, tensor: str) -> None:
        """Lets go of the masks of one tensor."""
        self._left += sum(bits.nbytes for bits in self._held.pop(tensor, {}).values())


@lru_cache(maxsize=64)
def inverse(drop_rate: float) -> float:
    """1 / (1 - drop_rate), which keeps the mean."""
    return float(1 / (1 - Fraction(str(drop_rate))))


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
