"""Scalar codebooks for the coordinates of a randomly rotated vector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from scipy.linalg import solve_banded
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv, betaln

from ovtq.codec.rotation import digest

MAX_BITS = 8  # a code is a byte
ITERATIONS = 50  # Newton needs about five
TOLERANCE = 1e-10  # of the last Newton step; it converges quadratically, so what is left is f64 rounding


@dataclass(frozen=True, eq=False)
class Codebook:
    """The centroids y_c that stand for the codes c = 0 … 2^bits − 1 of one coordinate, for head_dim = d ≥ 2.

    A coordinate is y = √d·u, u a coordinate of a unit vector: mean 0, mean square 1, density
    f(y) ∝ (1 − y²/d)^((d−3)/2) on ±√d if the vector was rotated at random. Shapes: centroids (2^bits,) f32, ascending,
    y_c = −y_(2^bits − 1 − c) exactly; boundaries (2^bits − 1,) f32, the midpoints of neighbours, the middle one 0.
    Both arrays are read-only. Make one with `lloyd_max` or `uniform`. Source: TurboQuant (arXiv 2504.19874), Lemma 1.
    """

    bits: int
    head_dim: int
    centroids: np.ndarray

    @cached_property
    def boundaries(self) -> np.ndarray:
        """Where one code ends and the next begins; a coordinate on a boundary belongs to the lower code."""
        return _frozen((self.centroids[1:] + self.centroids[:-1]) / 2)

    @cached_property
    def distortion(self) -> float:
        """E(y − ŷ)²: the squared error of a whole unit vector, d·E(u − û)² (d times equation 4 of the paper)."""
        half = self.centroids[len(self.centroids) // 2 :].astype(np.float64)
        _, mass, moment = _cells(half, self.head_dim)
        return float(1 + 2 * np.sum(half * (half * mass - 2 * moment)))

    @cached_property
    def digest(self) -> str:
        """The first 16 hex digits of the SHA-256 of the centroids, for the record of a conversion."""
        return digest(self.centroids)


@cache
def lloyd_max(bits: int, head_dim: int) -> Codebook:
    """The codebook of least squared error: each centroid is the mean of its cell, y_c = E[y | y in cell c].

    Solved with Newton's method on closed-form integrals; for d = 3, where y is uniform, it is the uniform codebook.
    Raises ValueError unless bits (bits per coordinate) is 1 … 8 and head_dim ≥ 2.
    Source: TurboQuant (arXiv 2504.19874), section 3.1, equation 4; Lloyd (1982) and Max (1960).
    """
    _check(bits, head_dim)
    size, end = 2 ** (bits - 1), np.sqrt(head_dim)  # only y > 0 is solved for, the rest is its mirror image
    # Start from Bennett's point density, ∝ f^(1/3): the same family, with another exponent.
    shape = (head_dim - 3) / 6 + 1
    half = end * (1 - 2 * betaincinv(shape, shape, (1 - (np.arange(size) + 0.5) / size) / 2))
    for _ in range(ITERATIONS):
        edges, mass, moment = _cells(half, head_dim)
        mean, inner = moment / mass, edges[1:-1]
        # How a cell's mean moves with its inner boundaries, each of which moves by half of a neighbour's step.
        slope = _density(inner, head_dim) / 2
        upper = slope * (inner - mean[:-1]) / mass[:-1]
        lower = slope * (mean[1:] - inner) / mass[1:]
        jacobian = np.zeros((3, size))  # of centroid − mean, in bands
        jacobian[0, 1:], jacobian[1], jacobian[2, :-1] = -upper, 1, -lower
        jacobian[1, :-1] -= upper
        jacobian[1, 1:] -= lower
        step = solve_banded((1, 1), jacobian, mean - half)
        half = half + step
        if np.abs(step).max() < TOLERANCE:
            return _mirrored(bits, head_dim, half)
    raise ArithmeticError(f"no Lloyd-Max codebook found for {bits} bits, head_dim {head_dim}")


@cache
def uniform(bits: int, head_dim: int) -> Codebook:
    """Equally spaced centroids, y_c = step·(c − (2^bits − 1)/2), with the step of least squared error.

    Decoding is one multiplication and one addition, no table. At 1 bit it is the Lloyd-Max codebook.
    Raises ValueError unless bits (bits per coordinate) is 1 … 8 and head_dim ≥ 2. Source: Max (1960).
    """
    _check(bits, head_dim)
    grid = np.arange(2 ** (bits - 1)) + 0.5

    def slope(step: float) -> float:
        """dD/d(step)/4; boundaries lie midway between centroids, so their own movement costs nothing."""
        _, mass, moment = _cells(step * grid, head_dim)
        return float(np.sum(grid * (step * grid * mass - moment)))

    widest = np.sqrt(head_dim) / grid[-1]  # the outermost centroid stands at the end of the support
    return _mirrored(bits, head_dim, brentq(slope, widest * 1e-6, widest, xtol=1e-14, rtol=1e-14) * grid)


def _check(bits: int, head_dim: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be 1 to {MAX_BITS}, got {bits}")
    if head_dim < 2:
        raise ValueError(f"head_dim must be at least 2, got {head_dim}")


def _mirrored(bits: int, head_dim: int, half: np.ndarray) -> Codebook:
    half = half.astype(np.float32)
    return Codebook(bits, head_dim, _frozen(np.concatenate([-half[::-1], half])))


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def _cells(half: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges (n + 1,) of the cells of the positive centroids (n,); their probability ∫f and moment ∫y·f, (n,) each.

    As differences of tails, which keep their relative precision far out: P(Y > y) is an incomplete beta function,
    E[Y; Y > y] = √d·(1 − y²/d)^((d−1)/2) / ((d − 1)·B(½, (d−1)/2)).
    """
    a, end = (head_dim - 1) / 2, np.sqrt(head_dim)
    edges = np.concatenate([[0], np.minimum((half[1:] + half[:-1]) / 2, end), [end]])
    tail = betainc(a, a, (1 - edges / end) / 2)
    moment = np.zeros(len(edges))
    moment[:-1] = end / (2 * a) * np.exp(a * np.log1p(-(edges[:-1] ** 2) / head_dim) - betaln(0.5, a))
    return edges, -np.diff(tail), -np.diff(moment)


def _density(y: np.ndarray, head_dim: int) -> np.ndarray:
    log = (head_dim - 3) / 2 * np.log1p(-(y**2) / head_dim) - betaln(0.5, (head_dim - 1) / 2)
    return np.exp(log) / np.sqrt(head_dim)
