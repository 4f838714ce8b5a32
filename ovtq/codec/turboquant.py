"""TurboQuant in numpy, from its definition: what the rewritten graphs are held to.

Vectors are rows: shapes (…, d) with d = head_dim. Everything is computed in f64 and rounded to f32 at the end, so a
result does not depend on the order of a sum; a graph in f32 may differ by one code where a coordinate lies within f32
rounding of a boundary. Source: TurboQuant (arXiv 2504.19874); Algorithm, Theorem and Lemma numbers below are its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from ovtq.codec.codebook import MAX_BITS, Codebook, lloyd_max
from ovtq.codec.rotation import digest, randomized_hadamard


def quantize(x: np.ndarray, codebook: Codebook, norm_correction: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Codes of y = √d·x/‖x‖ and the scale of each vector: (…, d) → codes (…, d) u8, scale (…, 1) f32.

    A code is the number of boundaries < y: a coordinate on a boundary gets the lower code. With norm_correction the
    scale is ‖x‖/‖û‖, û = centroids/√d being the decoded unit vector, so that decoding restores the norm; without it
    the scale is ‖x‖, as in the paper. A zero vector has scale 0 and is decoded to zero. x is of any float type, rotated
    already. Raises ValueError if d is not the codebook's, or if a number or norm is not finite in f32.
    """
    x = _rows(x, codebook.head_dim)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    y = np.sqrt(codebook.head_dim) * np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    codes = np.searchsorted(codebook.boundaries, y, side="left").astype(np.uint8)
    scale = norm / np.linalg.norm(_unit(codes, codebook), axis=-1, keepdims=True) if norm_correction else norm
    return codes, _f32(scale)


def dequantize(codes: np.ndarray, scale: np.ndarray, codebook: Codebook) -> np.ndarray:
    """x̂ = scale·centroids[codes]/√d: codes (…, d) u8, scale (…, 1) f32 → (…, d) f32.

    Raises ValueError if the codes are not u8, not of the codebook's d, or not below 2^bits.
    """
    return (scale.astype(np.float64) * _unit(codes, codebook)).astype(np.float32)


# Of a vector's step: how much of its largest and of its root mean square coordinate. Found by tools/fit_steps.py.
STEPS: dict[int, tuple[float, float]] = {
    2: (0.1, 1.2),
    3: (0.3, 1.2),
    4: (0.8, 0.3),
    5: (0.9, 0.2),
    6: (1.0, 0.0),
    8: (1.0, 0.0),
}
FLOOR = 1e-4  # of mid·step, so that a vector of zeros has codes, too; an f16 holds it


@dataclass(frozen=True)
class AdaptiveUniform:
    """Equally spaced codes with a step for each vector: what the graphs use, for x̂ = scale·(code − mid).

    mid = (2^bits − 1)/2, step = (peak·max|x| + spread·‖x‖/√d + 1e-4)/mid, code = round(x/step + mid) clipped to
    the codes there are, scale = ‖x‖/‖code − mid‖ (norm correction). The step only decides which codes are chosen, so it
    is not stored.

    Decoding is linear in the codes: no table, and the whole of it merges into the matrices beside the attention. It
    costs next to nothing in distortion, E‖x − x̂‖² of a unit vector rotated at random, against Lloyd-Max codes with a
    fixed step and norm correction, whose table does not know the vector's own peak. At head_dim 64: 4 bits .0092 to
    .0088, 3 bits .0348 to .0328, 2 bits .118 to .117; 5 bits .0023 to .0023, 6 bits .00057 to .00059, 8 bits .000035 to
    .000038. At 128 it is 13% worse at 4 bits (.0104 to .0092), and 9% at 6 (tools/fit_steps.py).

    Raises ValueError for bits (bits per coordinate) other than 2, 3, 4, 5, 6 and 8.
    """

    bits: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.bits not in STEPS:
            raise ValueError(f"bits must be one of {', '.join(map(str, STEPS))}, got {self.bits}")

    @property
    def mid(self) -> float:
        """The code of zero, if there were one: halfway between the two innermost."""
        return (2**self.bits - 1) / 2

    @property
    def digest(self) -> str:
        """The first 16 hex digits of a SHA-256 that tells this quantiser from all others."""
        return digest(np.array([self.bits, self.head_dim, *STEPS[self.bits]], np.float64))

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x (…, d), rotated already → codes (…, d) u8 and scale (…, 1) f32; refuses what `quantize` refuses."""
        x = _rows(x, self.head_dim)
        codes = np.round(self._unrounded(x))
        norm = np.linalg.norm(x, axis=-1, keepdims=True)
        return codes.astype(np.uint8), _f32(norm / np.linalg.norm(codes - self.mid, axis=-1, keepdims=True))

    def near_tie(self, x: np.ndarray, tolerance: float) -> np.ndarray:
        """Where x (…, d) is so near to the middle between two codes, to `tolerance`·mid, that rounding may choose."""
        code = self._unrounded(np.asarray(x, np.float64))
        return np.abs(code - np.floor(code) - 0.5) < tolerance * self.mid

    def _unrounded(self, x: np.ndarray) -> np.ndarray:
        peak, spread = STEPS[self.bits]
        norm = np.linalg.norm(x, axis=-1, keepdims=True)
        top = peak * np.abs(x).max(-1, keepdims=True) + spread * norm / np.sqrt(self.head_dim) + FLOOR
        return np.clip(x / top, -1, 1) * self.mid + self.mid

    def decode(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """x̂ = scale·(codes − mid), still rotated: codes (…, d) u8, scale (…, 1) f32 → (…, d) f32."""
        return (scale.astype(np.float64) * (codes.astype(np.float64) - self.mid)).astype(np.float32)


@cache
def distortion(bits: int, head_dim: int) -> float:
    """E‖x − x̂‖²/‖x‖² of AdaptiveUniform codes of a vector rotated at random, to about 1%; raises what that raises."""
    codec = AdaptiveUniform(bits, head_dim)
    x = np.random.RandomState(0).standard_normal((4096, head_dim))
    error = codec.decode(*codec.encode(x)) - x
    return float(np.mean((error**2).sum(-1) / (x**2).sum(-1)))


@dataclass(frozen=True, eq=False)
class RotatedQuantizer:
    """Algorithm 1 with any codebook and rotation: x̂ = scale·centroids[codes of √d·x·R/‖x‖]/√d · Rᵀ.

    For any unit vector, in the mean over random rotations R, ‖x − x̂‖² without norm_correction is the codebook's
    `distortion`: with `lloyd_max` at most √3·π/2 · 4^−bits (Theorem 1). No quantiser of large d goes below 4^−bits
    (Theorem 3; at d = 2 this one does). The paper has no norm correction. For d = 64 it lessens ‖x − x̂‖² by .14 dB at
    4 bits and .18 dB at 6, costs .07 dB at 2 and .45 dB at 1, and at any width it about halves the bias of ⟨x, x̂⟩.

    Raises ValueError if the rotation is not (head_dim, head_dim) with the codebook's head_dim.
    """

    codebook: Codebook
    rotation: np.ndarray
    norm_correction: bool = True

    def __post_init__(self) -> None:
        _square(self.rotation, self.codebook.head_dim, "rotation")

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x (…, d) → codes (…, d) u8 and scale (…, 1) f32; refuses what `quantize` refuses."""
        x = _rows(x, self.codebook.head_dim)
        return quantize(x @ self.rotation.astype(np.float64), self.codebook, self.norm_correction)

    def decode(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The vectors again, (…, d) f32, rotated back."""
        y = dequantize(codes, scale, self.codebook)
        return (y @ self.rotation.T.astype(np.float64)).astype(np.float32)


class TurboQuantMSE(RotatedQuantizer):
    """Algorithm 1 for vectors of `dim` coordinates: a randomised Hadamard rotation, then Lloyd-Max codes of `bits`.

    Decoding restores each vector's norm unless `norm_correction` is off, as in the paper. `seed` is that of the
    rotation's random signs. Raises ValueError unless bits (bits per coordinate) is 1 … 8 and dim a power of two.
    """

    def __init__(self, *, dim: int, bits: int, seed: int = 0, norm_correction: bool = True) -> None:
        if dim < 2 or dim & (dim - 1):
            raise ValueError(f"dim must be a power of two, got {dim}")
        super().__init__(lloyd_max(bits, dim), randomized_hadamard(dim, seed), norm_correction)

    def quantize(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (…, dim) of any float type → codes (…, dim) u8 below 2^bits, and scale (…, 1) f32 of each vector.

        Raises ValueError for vectors of another length, and for numbers or norms that are not finite in f32.
        """
        return self.encode(x)

    def dequantize(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """What `quantize` returned, as vectors again, (…, dim) f32. Raises ValueError for other codes."""
        return self.decode(codes, scale)


def gaussian_projection(head_dim: int, seed: int) -> np.ndarray:
    """S, (head_dim, head_dim) f32 of independent N(0, 1) entries, for `qjl_encode` (Definition 1)."""
    return np.random.RandomState(seed).standard_normal((head_dim, head_dim)).astype(np.float32)


def qjl_encode(x: np.ndarray, projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signs of S·x and the norm: (…, d) → codes (…, d) u8, 1 where positive and else 0, and norm (…, 1) f32.

    The quantised Johnson-Lindenstrauss transform, 1 bit per coordinate (Definition 1). Refuses what `quantize` refuses.
    """
    x = _rows(x, len(projection))
    norm = _f32(np.linalg.norm(x, axis=-1, keepdims=True))
    return (x @ projection.T.astype(np.float64) > 0).astype(np.uint8), norm


def qjl_decode(codes: np.ndarray, norm: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """x̂ = √(π/2)/d·‖x‖·Sᵀ·(±1): codes (…, d), norm (…, 1) → (…, d) f32.

    Over random S, E⟨q, x̂⟩ = ⟨q, x⟩ and Var⟨q, x̂⟩ = (π/2·‖q‖²‖x‖² − ⟨q, x⟩²)/d ≤ π/(2d)·‖q‖²‖x‖² (Lemma 4).
    """
    signs = 2.0 * codes - 1
    factor = np.sqrt(np.pi / 2) / len(projection) * norm.astype(np.float64)
    return (factor * (signs @ projection.astype(np.float64))).astype(np.float32)


@dataclass(frozen=True, eq=False)
class TurboQuantProd:
    """Algorithm 2: Algorithm 1 with bits − 1, then QJL of the residual; ⟨q, x̂⟩ estimates ⟨q, x⟩ without bias.

    x̂ = x̂_mse + √(π/2)/d·‖r‖·Sᵀ·sign(S·r) with r = x − x̂_mse. Over random S, Var⟨q, x̂⟩ = (π/2·‖q‖²‖r‖² − ⟨q, r⟩²)/d,
    in the mean at most √3·π²/d·‖q‖²‖x‖² · 4^−bits (Theorem 2). That is several times the squared error of Algorithm 1
    with as many bits, for a q that has nothing to do with x: the graphs don't use it.

    Raises ValueError unless bits (bits per coordinate, both stages) is 2 … 9 and both matrices are (d, d). With
    1 bit there is no first stage: use `qjl_encode`.
    """

    bits: int
    rotation: np.ndarray
    projection: np.ndarray

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= MAX_BITS + 1:
            raise ValueError(f"bits must be 2 to {MAX_BITS + 1}, one of them for the residual, got {self.bits}")
        _square(self.rotation, len(self.rotation), "rotation")
        _square(self.projection, len(self.rotation), "projection")

    @cached_property
    def first(self) -> RotatedQuantizer:
        """The first stage; norm correction would lengthen the residual that it leaves to the second."""
        return RotatedQuantizer(lloyd_max(self.bits - 1, len(self.rotation)), self.rotation, norm_correction=False)

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """x (…, d) → codes (…, d) u8, scale (…, 1) f32, signs (…, d) u8 of 0 and 1, residual norm (…, 1) f32."""
        codes, scale = self.first.encode(x)
        residual = np.asarray(x, np.float64) - self.first.decode(codes, scale)
        return codes, scale, *qjl_encode(residual, self.projection)

    def decode(self, codes: np.ndarray, scale: np.ndarray, signs: np.ndarray, residual_norm: np.ndarray) -> np.ndarray:
        """x̂, (…, d) f32; the estimate of ⟨q, x⟩ is ⟨q, x̂⟩."""
        return self.first.decode(codes, scale) + qjl_decode(signs, residual_norm, self.projection)


def _unit(codes: np.ndarray, codebook: Codebook) -> np.ndarray:
    if codes.dtype != np.uint8 or codes.shape[-1:] != (codebook.head_dim,) or (codes >= 2**codebook.bits).any():
        raise ValueError(f"expected u8 codes (…, {codebook.head_dim}) below {2**codebook.bits}")
    return codebook.centroids.astype(np.float64)[codes] / np.sqrt(codebook.head_dim)


def _rows(x: np.ndarray, head_dim: int) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim < 1 or x.shape[-1] != head_dim:
        raise ValueError(f"expected vectors of {head_dim}, got shape {x.shape}")
    if not (np.abs(x) <= np.finfo(np.float32).max).all():  # NaN is not, either
        raise ValueError("vectors to encode must be finite in f32")
    return x


def _f32(norm: np.ndarray) -> np.ndarray:
    if (norm > np.finfo(np.float32).max).any():
        raise ValueError("a vector's norm is too large for f32")
    return norm.astype(np.float32)


def _square(matrix: np.ndarray, head_dim: int, what: str) -> None:
    if matrix.shape != (head_dim, head_dim):
        raise ValueError(f"{what} must be ({head_dim}, {head_dim}), got {matrix.shape}")
