"""Balanced heads: the invertible transform of a head's vectors that a quantiser loses least in.

Vectors are rows. Keys are stored as y = (k − c)·A and queries become q·A⁻ᵀ, so that every score is what it was, less
q·cᵀ, which is the same for all keys. A quantiser with a step for each vector adds a white error e to y, whose variance
is a constant times ‖y‖²/d (after a random rotation). What a score then loses is (q·A⁻ᵀ)·e, and, q and k independent,

    E[(q·δ)²] ∝ tr(AᵀΣA) · tr(A⁻¹ΓA⁻ᵀ) = tr(PΣ) · tr(P⁻¹Γ),    P = AAᵀ, Σ = E[(k − c)ᵀ(k − c)], Γ = E[qᵀq].

By Cauchy and Schwarz that is at least (tr (Σ^½ΓΣ^½)^½)², and is as small for PΣP ∝ Γ, hence

    P = Σ^−½ (Σ^½ΓΣ^½)^½ Σ^−½.

For values, Γ is the Gram matrix of what the output projection makes of them. A is free but for a rotation from the
right: P^½, then the principal axes of AᵀΣA, then a Hadamard matrix, so that all coordinates have the same variance,
which is the least peak that a step has to reach. Derivation and measurements: docs/balanced-heads.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ovtq.codec.rotation import digest

LIMIT = 32.0  # of a transform's condition number, largest over smallest singular value
RIDGE = 1e-4  # of the mean eigenvalue, added to a covariance: some directions a short text never shows


@dataclass(frozen=True, eq=False)
class HeadBasis:
    """y = (x − centre)·matrix and x = y·inverse + centre, for the vectors x of each KV head, rows of d = head_dim.

    matrix (heads, d, width) and inverse (heads, width, d), f32, matrix·inverse = 1; heads is kv_heads, or 1 where all
    heads share one. width is d, or more: then y lies in a subspace. centre (kv_heads, d) f32. Raises ValueError for
    shapes that do not fit, numbers that are not finite, and an inverse that is none.
    """

    matrix: np.ndarray
    inverse: np.ndarray
    centre: np.ndarray

    def __post_init__(self) -> None:
        heads, d, width = self.matrix.shape
        if self.inverse.shape != (heads, width, d) or self.centre.ndim != 2 or self.centre.shape[1] != d:
            shapes = self.matrix.shape, self.inverse.shape, self.centre.shape
            raise ValueError(f"matrix, inverse and centre of shapes {shapes} do not belong together")
        if heads not in (1, len(self.centre)):
            raise ValueError(f"a basis of {heads} heads for centres of {len(self.centre)}")
        if not all(np.isfinite(x).all() for x in (self.matrix, self.inverse, self.centre)):
            raise ValueError("a basis must be finite")
        product = self.matrix.astype(np.float64) @ self.inverse.astype(np.float64)
        if np.abs(product - np.eye(d)).max() > 1e-4:
            raise ValueError("the inverse of a basis is not its inverse")

    @cached_property
    def shared(self) -> bool:
        """Whether it is one rotation of all heads, not a matrix of each, which a single KV head has, too."""
        return len(self.matrix) == 1 and np.array_equal(self.inverse[0], self.matrix[0].T)

    @cached_property
    def dual(self) -> np.ndarray:
        """(heads, d, width): what a query is multiplied with, q·inverseᵀ."""
        return np.ascontiguousarray(self.inverse.swapaxes(1, 2))

    @property
    def condition(self) -> np.ndarray:
        """(heads,): the largest singular value of each matrix over its smallest."""
        singular = np.linalg.svd(self.matrix.astype(np.float64), compute_uv=False)
        return singular[:, 0] / singular[:, -1]

    @property
    def digest(self) -> str:
        """The first 16 hex digits of a SHA-256 that tells this basis from all others, for the record."""
        return digest(np.concatenate([x.astype(np.float32).ravel() for x in (self.matrix, self.inverse, self.centre)]))

    def scaled(self, scale: float) -> HeadBasis:
        """The basis of scale·x: the same matrix, the centre times scale."""
        return replace(self, centre=(self.centre * np.float32(scale)).astype(np.float32))

    def by_query(self, tensor: np.ndarray, group: int) -> np.ndarray:
        """One of the matrices for each query head, `group` of which share a KV head."""
        return tensor if len(tensor) == 1 else np.repeat(tensor, group, 0)

    def into(self, x: np.ndarray) -> np.ndarray:
        """x·matrix in f64; x (…, kv_heads, tokens, d), centred already."""
        return x.astype(np.float64) @ self.matrix.astype(np.float64)

    def back(self, y: np.ndarray) -> np.ndarray:
        """y·inverse in f64; the centre is not added."""
        return y.astype(np.float64) @ self.inverse.astype(np.float64)


def rotated(rotation: np.ndarray, centre: np.ndarray) -> HeadBasis:
    """The basis of orthonormal rows, (d, width), which all heads share; centre (kv_heads, d)."""
    return HeadBasis(rotation[None], np.ascontiguousarray(rotation.T)[None], centre.astype(np.float32))


def balanced(
    covariance: np.ndarray,
    weight: np.ndarray,
    spread: np.ndarray,
    centre: np.ndarray,
    limit: float = LIMIT,
    share: float = 1.0,
) -> HeadBasis:
    """The basis that loses least, a matrix for each head; or one a `share` of the way there from the rotation, P^share.

    covariance Σ (kv_heads, d, d): E[(x − c)ᵀ(x − c)]; weight Γ, likewise: E[qᵀq] of the queries that keys are
    multiplied with, or the Gram matrix of what values are; spread (d, width): orthonormal rows; centre (kv_heads, d).
    Vectors keep their mean square, tr(PΣ) = trΣ. The condition number stays below `limit`.
    """
    matrices, inverses = [], []
    for sigma, gamma in zip(covariance, weight, strict=True):
        root, inverse_root = balance(sigma, gamma, limit, share)
        _, axes = np.linalg.eigh(root @ sigma @ root)
        turn = axes @ spread.astype(np.float64)
        matrices.append(root @ turn)
        inverses.append(turn.T @ inverse_root)
    matrix, inverse = (np.ascontiguousarray(np.stack(some), np.float32) for some in (matrices, inverses))
    return HeadBasis(matrix, inverse, centre.astype(np.float32))


def balance(
    sigma: np.ndarray, gamma: np.ndarray, limit: float = LIMIT, share: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """P^½ and P^−½ of one head, (d, d) f64 and symmetric, for P ∝ (Σ^−½ (Σ^½ΓΣ^½)^½ Σ^−½)^share with tr(PΣ) = trΣ.

    Eigenvalues of P below limit⁻² of the largest are raised to that. A Σ or Γ of zeros gives the identity.
    """
    sigma, gamma = (_ridged(np.asarray(x, np.float64)) for x in (sigma, gamma))
    half = power(sigma, 0.5)
    inverse_half = power(sigma, -0.5)
    middle = power(_symmetric(half @ gamma @ half), 0.5)
    values, vectors = np.linalg.eigh(_symmetric(inverse_half @ middle @ inverse_half))
    values = np.maximum(values, values.max() / limit**2) ** share
    values *= np.trace(sigma) / np.einsum("ij,ji,i->", vectors.T @ sigma, vectors, values)
    return (vectors * values**0.5) @ vectors.T, (vectors * values**-0.5) @ vectors.T


def loss(basis: np.ndarray, sigma: np.ndarray, gamma: np.ndarray) -> float:
    """tr(AᵀΣA)·tr(A⁻¹ΓA⁻ᵀ)/d of a matrix A (d, d): what E[(q·δ)²] is proportional to."""
    inverse = np.linalg.inv(basis.astype(np.float64))
    return float(np.trace(basis.T @ sigma @ basis) * np.trace(inverse @ gamma @ inverse.T) / len(basis))


def gain(sigma: np.ndarray, gamma: np.ndarray) -> float:
    """How many times what the balanced bases of some heads lose a rotation of all loses; (kv_heads, d, d) each."""
    d = sigma.shape[-1]
    bases = [balance(*pair)[0] for pair in zip(sigma, gamma, strict=True)]
    rotation, least = (
        sum(loss(basis, *pair) for basis, *pair in zip(some, sigma, gamma, strict=True))
        for some in ([np.eye(d)] * len(sigma), bases)
    )
    return rotation / least if least else 1.0


def power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """A symmetric matrix without negative eigenvalues to a power; what rounding made of zeros counts as tiny."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.maximum(values, values.max() * np.finfo(np.float64).eps)
    return (vectors * values**exponent) @ vectors.T


def _ridged(matrix: np.ndarray) -> np.ndarray:
    mean = np.trace(matrix) / len(matrix)
    return _symmetric(matrix) + (RIDGE * mean if mean > 0 else 1.0) * np.eye(len(matrix))


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    return (matrix + matrix.T) / 2
