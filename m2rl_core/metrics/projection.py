"""The random orthogonal map of Fig. 3, at one signed addition a weight and without a matrix."""
from __future__ import annotations

import math

import numpy as np

from m2rl_core.merging.dare import start_of, words

LEAST = 256  # columns of the sign stream, or k where that is more


class Projection:
    """A random map from n values to k, a power of two, that is exactly orthogonal: P = (1 x H_k) D / sqrt(n).

    n = m k after padding with zeros; D has random signs on its diagonal, H_k is the Hadamard matrix of order k, x is
    Kronecker's product with a row of m ones. So D flips signs, the ones fold the vector to k buckets (value i to i
    modulo k), and H_k mixes the buckets.

    Exactly orthogonal: P P' = (1 1') x (H_k H_k') / n = m k I / n = I, as D D = I. And it is a subsampled randomised
    Hadamard transform: where m is a power of two, H_n = H_m x H_k, whose first k rows are those of (first row of H_m) x
    H_k = 1 x H_k. Usually rows are drawn at random; all the randomness here is in D. An inner product of two projected
    vectors does not see H_k, which only turns the buckets: `folded` is enough for a cosine.
    """

    def __init__(self, n: int, k: int, seed: int, name: str = ""):
        """The signs depend on (seed, name) and a value's place alone. ValueError where k is not a power of two."""
        check(k)
        self.n, self.k, self.columns = n, k, columns(k)
        self.width = -(-n // k) * k
        self.start = start(seed, name)

    def signs(self) -> np.ndarray:
        """D's diagonal: +-1, (n,). Value i is in row i // columns: 32 rows share a 32-bit word for each column."""
        rows = -(-self.n // self.columns)
        drawn = words(self.start, 0, -(-rows // 32) * self.columns // 2).view(np.uint32).reshape(-1, 1, self.columns)
        bits = drawn >> np.arange(31, -1, -1, dtype=np.uint32)[:, None] & np.uint32(1)
        return 1 - 2.0 * bits.reshape(-1)[: self.n]

    def folded(self, x: np.ndarray) -> np.ndarray:
        """(..., n) -> (..., k): the buckets, over sqrt(n / k); float64."""
        padded = np.zeros((*x.shape[:-1], self.width))
        padded[..., : self.n] = x * self.signs()
        return padded.reshape(*x.shape[:-1], -1, self.k).sum(-2) / math.sqrt(self.width / self.k)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x: (..., n) -> (..., k), float64."""
        return hadamard(self.folded(x)) / math.sqrt(self.k)

    def noise(self, rho: float) -> float:
        """The standard deviation over draws of the signs of a projected cosine whose true value is `rho`.

        For unit vectors u, v with cosine rho, to first order in 1/k, the projected cosine is rho + sum Q_ij s_i s_j over
        i != j in one bucket, Q = (u v' + v u')/2 - rho (u u' + v v')/2 (the second part is what the norms do). Signs are
        independent, so its variance is 2 sum Q_ij^2 over those; |Q|^2 = (1 - rho^2)^2 / 2, and of all ordered pairs
        of places i != j the share (m - 1) / (n - 1) falls into one bucket. Few large values, which make Q's diagonal
        heavy, lower it further.
        """
        return (1 - rho**2) * math.sqrt((self.width / self.k - 1) / max(1, self.width - 1))


def start(seed: int, name: str) -> int:
    """Where the stream of signs of a tensor begins; see `merging.dare`."""
    return start_of(seed, "projection", name)


def columns(k: int) -> int:
    """How many values in a row share the bits of one draw of words."""
    return max(k, LEAST)


def check(k: int) -> None:
    """ValueError where there is no Hadamard matrix of order k here."""
    if k < 1 or k & (k - 1) or k > 1 << 14:
        raise ValueError(f"analysis.random_projection is {k}: a Hadamard transform needs a power of two up to 16384, "
                         f"such as {min(1 << 14, 1 << max(0, k).bit_length())}")


def hadamard(x: np.ndarray) -> np.ndarray:
    """The Walsh-Hadamard transform of the last axis, whose length is a power of two; not normalised."""
    shape, half = x.shape, 1
    while half < shape[-1]:
        a, b = np.moveaxis(x.reshape(*shape[:-1], -1, 2, half), -2, 0)
        x = np.stack((a + b, a - b), -2).reshape(shape)
        half *= 2
    return x
