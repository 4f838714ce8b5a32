"""Orthogonal rotations of a head's vectors."""

from __future__ import annotations

import hashlib

import numpy as np
from scipy.linalg import hadamard


def randomized_hadamard(head_dim: int, seed: int) -> np.ndarray:
    """R = diag(s)·H/√d, (head_dim, head_dim) f32, s random signs: `x @ R` spreads any x over all coordinates.

    H is Sylvester's Hadamard matrix, so head_dim must be a power of two (ValueError otherwise). Its entries are
    ±1/√d: with d = 64 or 256 they are exact in any float type, and R·Rᵀ is exactly the identity.
    Source: TurboQuant (arXiv 2504.19874), as the random rotation; QuIP# (arXiv 2402.04396) for this form of it.
    """
    # RandomState's stream is frozen for good (NEP 19), that of default_rng is not.
    signs = np.random.RandomState(seed).randint(0, 2, head_dim) * 2 - 1
    return (signs[:, None] * hadamard(head_dim) / np.sqrt(head_dim)).astype(np.float32)


def random_orthogonal(head_dim: int, seed: int) -> np.ndarray:
    """R = Q·sign(diag U) of a Gaussian G = Q·U, (head_dim, head_dim) f32: uniform (Haar) over orthogonal matrices.

    `x @ R` points any x in a uniformly random direction. That of `randomized_hadamard` does not: a basis vector becomes
    ±1/√d in every coordinate. R·Rᵀ is the identity to f32 rounding; the last digits may differ between LAPACK builds.
    Source: TurboQuant (arXiv 2504.19874), Algorithm 1; Mezzadri (arXiv math-ph/0609050) for the signs.
    """
    q, u = np.linalg.qr(np.random.RandomState(seed).standard_normal((head_dim, head_dim)))
    return (q * np.sign(np.diag(u))).astype(np.float32)


def hadamard_matrix(order: int) -> np.ndarray:
    """H with entries ±1, H·Hᵀ = order·I and a first row of ones, (order, order) i64, also where order is no power of 2.

    Sylvester's doubling down to an order q + 1 with q a prime of the form 4n + 3, or 2q + 2 with one of the form
    4n + 1, which Paley's two constructions give (J. Math. Phys. 12, 1933): 80 = 4·20, 48, 76 = 2·37 + 2, 144 = 2·72.
    Raises ValueError where these don't reach.
    """
    if order in (1, 2) or order & (order - 1) == 0:
        return hadamard(order, dtype=np.int64)
    if order % 4 == 0 and _is_prime(q := order - 1):
        core = _jacobsthal(q)  # skew for such q
        skew = np.block([[np.zeros((1, 1), np.int64), np.ones((1, q), np.int64)], [-np.ones((q, 1), np.int64), core]])
        paley = skew + np.eye(order, dtype=np.int64)
        return paley * paley[0]
    if order % 4 == 0 and (q := order // 2 - 1) % 4 == 1 and _is_prime(q):
        ones = np.ones((1, q), np.int64)
        conference = np.block([[np.zeros((1, 1), np.int64), ones], [ones.T, _jacobsthal(q)]])  # symmetric for such q
        one = np.eye(q + 1, dtype=np.int64)
        paley = np.block([[conference + one, conference - one], [conference - one, -conference - one]])
        return paley * paley[0]
    if order % 2:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    return np.kron(hadamard(2, dtype=np.int64), hadamard_matrix(order // 2))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % n for n in range(2, int(number**0.5) + 1))


def _jacobsthal(q: int) -> np.ndarray:
    """(q, q): whether the difference of column and row is a square modulo the prime q, 1 or −1; 0 on the diagonal."""
    squares = np.unique(np.arange(1, q) ** 2 % q)
    residue = np.where(np.isin(np.arange(q), squares), 1, -1)
    residue[0] = 0
    return residue[(np.arange(q) - np.arange(q)[:, None]) % q]


def orthogonal(head_dim: int, seed: int) -> np.ndarray:
    """R, (head_dim, head_dim) f32, orthogonal, for any head_dim: `x @ R` spreads an outlier over all coordinates.

    Where a Hadamard matrix is known (powers of two, 80, 96, 120, 160, 192, …) its entries are ±1/√d, rows signed and
    columns too at random where d is no power of two; else `random_orthogonal`.
    """
    if head_dim & (head_dim - 1) == 0:
        return randomized_hadamard(head_dim, seed)
    try:
        matrix = hadamard_matrix(head_dim)
    except ValueError:
        return random_orthogonal(head_dim, seed)
    signs = np.random.RandomState(seed).randint(0, 2, (2, head_dim)) * 2 - 1
    return (signs[0][:, None] * matrix * signs[1] / np.sqrt(head_dim)).astype(np.float32)


def randomized_frame(head_dim: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """R (head_dim, width) and a row u (width,), f32, all rows orthonormal and orthogonal to (1, …, 1).

    Rows of Hadamard's matrix of order `width`, chosen and signed at random: `x @ R` spreads x over more coordinates
    than it had, R·Rᵀ = 1. What adds one constant to all coordinates of a stored vector, as a rounded zero point does,
    is invisible to products with `x @ R`, and `y @ R.T` takes it out.
    Raises ValueError unless head_dim + 2 ≤ width, and where there is no such matrix.
    """
    if head_dim + 2 > width:
        raise ValueError(f"{head_dim} rows, one more and the ones do not fit in {width} coordinates")
    random = np.random.RandomState(seed)
    rows = hadamard_matrix(width)[1 + random.permutation(width - 1)[: head_dim + 1]]
    signs = random.randint(0, 2, head_dim + 1) * 2 - 1
    frame = (signs[:, None] * rows / np.sqrt(width)).astype(np.float32)
    return frame[:-1], frame[-1]


def spread_width(head_dim: int, most: int) -> int:
    """The largest width up to `most` that `randomized_frame` spreads vectors of `head_dim` over. ValueError: none."""
    for width in range(most, head_dim + 1, -1):
        try:
            hadamard_matrix(width)
        except ValueError:
            continue
        return width
    raise ValueError(f"no Hadamard matrix is known of an order from {head_dim + 2} to {most}")


def digest(matrix: np.ndarray) -> str:
    """The first 16 hex digits of the SHA-256 of a matrix's bytes, for the record of a conversion."""
    return hashlib.sha256(np.ascontiguousarray(matrix).tobytes()).hexdigest()[:16]
