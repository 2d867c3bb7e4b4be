"""Five teachers in little more than the room of one: what differs from the SFT weights, exact to the bit (section 3.2).

The bytes of a weight are looked at one by one (of a bfloat16 weight that RLVR moved, mostly the last differs). A byte
that differs is kept as its flipped bits (XOR), so the same operation turns SFT into a teacher and the teacher back.
Where most bytes differ, as in the small float32 study, a teacher takes the room of a whole model: nothing is saved.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from m2rl_core.engines.rollout import Rollout
from m2rl_core.errors import StudyError
from m2rl_core.models.policy import Policy
from m2rl_core.models.qwen3 import Shape, Weights

PIECE = 1 << 22  # weights that are compared or flipped at a time
WORDS = {2: torch.int16, 4: torch.int32}  # by the bytes of a weight


@dataclass(frozen=True)
class Flips:
    """What differs among n bytes, or among n whole weights: the `bits` to flip (k,), and where.

    `where`: None for everywhere (k = n), a packed mask (n / 8,) of uint8, or places (k,) of int32.
    """

    bits: Tensor
    where: Tensor | None

    @staticmethod
    def of(found: Tensor) -> Flips | None:
        """From the flipped bits of all bytes, (n,) uint8, in whichever form is smallest; None if there are none."""
        differs = found != 0
        n, k = len(found), int(differs.sum())
        if not k:
            return None
        if n <= min(n // 8 + 1, 4 * k) + k:
            return Flips(found.contiguous(), None)
        return Flips(found[differs], _packed(differs) if n // 8 + 1 < 4 * k else differs.nonzero()[:, 0].int())

    def flip(self, at: Tensor) -> None:
        """Flip the bits in place; `at` (n,) of integers, which may be strided. Twice is not at all."""
        if self.where is None:
            at ^= self.bits
        elif self.where.dtype == torch.uint8:
            at ^= torch.zeros_like(at).masked_scatter_(_unpacked(self.where, len(at)), self.bits)
        else:
            at[self.where] ^= self.bits

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return self.bits.nbytes + (0 if self.where is None else self.where.nbytes)


def _packed(mask: Tensor) -> Tensor:
    """Bools (n,) to (n / 8, rounded up) uint8."""
    eights = torch.nn.functional.pad(mask.byte(), (0, -len(mask) % 8)).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, n: int) -> Tensor:
    return (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1).flatten()[:n].bool()


def _words(tensor: Tensor) -> Iterator[Tensor]:
    """The pieces of a tensor, (n,), seen as integers."""
    yield from tensor.detach().view(-1).view(WORDS[tensor.element_size()]).split(PIECE)


def _bytes(words: Tensor) -> tuple[Tensor, ...]:
    """Views of the bytes that stand first in each word, those that stand second, ...: each (n,) uint8."""
    return words.view(-1, 1).view(torch.uint8).unbind(1)


def _flips(words: Tensor) -> tuple[Flips | None, ...]:
    """Flipped bits of a piece by bytes; as whole words, which are faster to flip, where bytes save less than half."""
    found = tuple(map(Flips.of, _bytes(words)))
    return found if sum(f.size for f in found if f) <= words.nbytes / 2 else (Flips(words, None),)


def difference(sft: Weights, teacher: Weights) -> dict[str, list[tuple[Flips | None, ...]]]:
    """What turns the SFT weights into the teacher's, by piece; tensors that are equal to the bit are left out."""
    found = {name: [_flips(a ^ b) for a, b in zip(_words(sft[name]), _words(teacher[name]), strict=True)] for name in sft}
    return {name: pieces for name, pieces in found.items() if any(map(any, pieces))}


def flip(weights: Weights, found: Mapping[str, list[tuple[Flips | None, ...]]]) -> None:
    """Turn SFT weights into a teacher's or back, in place, by their `difference`."""
    for name, pieces in found.items():
        for words, flips in zip(_words(weights[name]), pieces, strict=True):
            for at, one in zip(_bytes(words) if len(flips) > 1 else (words,), flips, strict=True):
                if one is not None:
                    one.flip(at)


def room(found: Mapping[str, list[tuple[Flips | None, ...]]]) -> int:
    """Bytes of memory that a `difference` takes."""
    return sum(one.size for pieces in found.values() for flips in pieces for one in flips if one)


def mismatch(sft: Policy, expert: Policy) -> str | None:
    """Why an expert cannot teach what began as `sft`, in one line; None if it can."""
    for name in sorted(sft.weights.keys() | expert.weights.keys()):
        mine, its = ("missing" if w is None else f"{str(w.dtype).removeprefix('torch.')} {tuple(w.shape)}"
                     for w in (sft.weights.get(name), expert.weights.get(name)))
        if mine != its:
            return f"{name} is {its}, not {mine}"
    if Shape.of(sft.config) != Shape.of(expert.config):
        return f"it is computed as {Shape.of(expert.config)}, not {Shape.of(sft.config)}"
    if (a := sft.tokenizer.get_vocab()) != (b := expert.tokenizer.get_vocab()):
        words = sorted(word for word in a.keys() | b.keys() if a.get(word) != b.get(word))
        return f"its tokenizer gives {words[0]!r} the id {b.get(words[0])}, not {a.get(words[0])}"
    return None


class Teachers(Mapping):
    """{domain: policy}, one at a time: asking for a domain turns the policy that was given before into its teacher."""

    def __init__(self, sft: Policy, experts: Iterable[tuple[str, Policy]]):
        """Takes over the weights of `sft`; an expert is needed only until the next is drawn from `experts`.

        Raises StudyError for an expert of another shape, number type or vocabulary than the SFT model.
        """
        self.policy, self._now, self.found = sft, None, {}
        for domain, expert in experts:
            if found := mismatch(sft, expert):
                raise StudyError(f"the teacher of {domain} does not fit the SFT model: {found}; it must be trained from it")
            self.found[domain] = difference(sft.weights, expert.weights)

    def __getitem__(self, domain: str) -> Policy:
        """The teacher of a domain, until another is asked for; KeyError for an unknown domain."""
        wanted = self.found[domain]
        if domain != self._now:
            flip(self.policy.weights, self.found.get(self._now, {}))
            flip(self.policy.weights, wanted)
            self._now = domain
        return self.policy

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def size(self) -> tuple[int, int]:
        """Bytes of memory: of the one whole copy, and of what all teachers keep beside it."""
        return sum(w.nbytes for w in self.policy.weights.values()), sum(map(room, self.found.values()))


def by_domain(rollouts: list[Rollout]) -> dict[str, list[Rollout]]:
    """Hard routing: the rollouts of each domain, for its one teacher."""
    routed: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        routed.setdefault(rollout.row.domain, []).append(rollout)
    return routed
