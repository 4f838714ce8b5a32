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


def digest(matrix: np.ndarray) -> str:
    """The first 16 hex digits of the SHA-256 of a matrix's bytes, for the record of a conversion."""
    return hashlib.sha256(np.ascontiguousarray(matrix).tobytes()).hexdigest()[:16]
