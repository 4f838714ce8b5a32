"""The numpy codec held to the TurboQuant paper (arXiv 2504.19874), to integrals, and to bounds of chance."""

from __future__ import annotations

import numpy as np
import pytest

from ovtq.codec import (
    STEPS,
    AdaptiveUniform,
    RotatedQuantizer,
    TurboQuantMSE,
    TurboQuantProd,
    dequantize,
    gaussian_projection,
    qjl_decode,
    qjl_encode,
    quantize,
)
from ovtq.codec.codebook import Codebook, lloyd_max, uniform
from ovtq.codec.rotation import random_orthogonal, randomized_hadamard

BITS = range(1, 9)
EPS = float(np.finfo(np.float32).eps)
DIGESTS = {  # d = 64, 1 to 7 bits; at 8 a centroid is so near the middle of two f32 that another scipy may round it so
    lloyd_max: "b5a0fd21e29e7a16 8982b836930bf416 243b6c87786f5c2d aa5049085b4ca8f2 e542a03dede2c2fc "
    "04c07dfa4fe9d20d b8b5513716d22e74",
    uniform: "b5a0fd21e29e7a16 1cf7173215ecd2ea 4c6252038eeb617d d4d77c88670cf630 52391ee4d31e0fc7 "
    "f5078efc4412f5d4 ca41a71b8ece41fd",
}
both = pytest.mark.parametrize("make", [lloyd_max, uniform], ids=lambda make: make.__name__)


def unit_vectors(count: int, head_dim: int, seed: int) -> np.ndarray:
    x = np.random.RandomState(seed).standard_normal((count, head_dim))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def squared_error(x: np.ndarray, codebook: Codebook, norm_correction: bool) -> np.ndarray:
    decoded = dequantize(*quantize(x, codebook, norm_correction), codebook)
    return np.sum((decoded - x) ** 2, axis=-1)


def within(samples: np.ndarray, expected: float, sharpness: float) -> bool:
    """Whether the mean is within 4 standard errors of `expected`, and these errors are small enough to tell."""
    error = samples.std() / np.sqrt(len(samples))
    assert 4 * error < sharpness, f"too few samples: 4 standard errors are {4 * error}"
    return abs(samples.mean() - expected) < 4 * error


# ------------------------------------------------------------------------------------------ quantising


@both
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_those_of_the_nearest_centroid(make, bits: int) -> None:
    codebook = make(bits, 64)
    x = unit_vectors(50, 64, seed=bits)
    codes, scale = quantize(3 * x, codebook, norm_correction=False)
    assert codes.dtype == np.uint8
    assert scale.dtype == np.float32
    assert scale.shape == (50, 1)
    assert scale == pytest.approx(3, rel=EPS)
    assert np.array_equal(codes, np.abs(8 * x[..., None] - codebook.centroids).argmin(-1))
    assert np.array_equal(codes, (8 * x[..., None] > codebook.boundaries).sum(-1))


def test_a_tie_gets_the_lower_code() -> None:
    codebook = Codebook(2, 4, np.array([-1.5, -0.5, 0.5, 1.5], np.float32))
    assert quantize(np.array([7.0, -7.0, 7.0, 7.0]), codebook)[0].tolist() == [2, 0, 2, 2]  # y = ±1
    assert quantize(np.array([0.0, -0.0, 5.0, 0.0]), codebook)[0].tolist() == [1, 1, 3, 1]
    above, below = np.nextafter(1, 2), np.nextafter(1, 0)
    assert np.searchsorted(codebook.boundaries, [below, 1, above]).tolist() == [2, 2, 3]


@pytest.mark.parametrize("bits", BITS)
def test_norm_correction_restores_the_norm(bits: int) -> None:
    codebook = lloyd_max(bits, 64)
    x = unit_vectors(200, 64, seed=bits) * np.logspace(-6, 6, 200)[:, None]
    norm = np.linalg.norm(x, axis=-1)
    corrected, plain = (
        np.linalg.norm(dequantize(*quantize(x, codebook, on), codebook), axis=-1) for on in (True, False)
    )
    assert corrected == pytest.approx(norm, rel=4 * EPS)
    assert np.abs(plain / norm - 1).max() > 100 * EPS


@pytest.mark.parametrize(("bits", "gain"), [(1, -0.45), (2, -0.07), (4, 0.14), (6, 0.18)])
def test_norm_correction_by_error(bits: int, gain: float) -> None:
    """In decibels, of ‖x − x̂‖² and so of ⟨q, x̂⟩ for random q; it costs below 3 bits. The bias of ⟨x, x̂⟩ is halved."""
    codebook = lloyd_max(bits, 64)
    x, q = unit_vectors(20000, 64, seed=1), unit_vectors(20000, 64, seed=2)
    plain, corrected = (dequantize(*quantize(x, codebook, on), codebook) - x for on in (False, True))
    for measure, tolerance in ((lambda e: e**2, 0.02), (lambda e: np.sum(e * q, -1) ** 2, 0.05)):
        assert 10 * np.log10(measure(plain).mean() / measure(corrected).mean()) == pytest.approx(gain, abs=tolerance)
    bias = [np.sum(error * x, axis=-1).mean() for error in (plain, corrected)]
    assert bias[0] == pytest.approx(-codebook.distortion, rel=0.05)
    assert 0.4 < bias[1] / bias[0] < 0.6


@pytest.mark.parametrize("norm_correction", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_zero_vectors(bits: int, norm_correction: bool) -> None:
    codebook = lloyd_max(bits, 64)
    x = np.zeros((3, 64), np.float32)
    x[1] = unit_vectors(1, 64, seed=0)
    codes, scale = quantize(x, codebook, norm_correction)
    assert scale[[0, 2]].tolist() == [[0], [0]]
    assert (codes[0] == 2 ** (bits - 1) - 1).all()
    decoded = dequantize(codes, scale, codebook)
    assert not decoded[[0, 2]].any()
    assert decoded[1].any()


def test_float_types_and_shapes() -> None:
    codebook = lloyd_max(4, 64)
    x = np.random.RandomState(0).standard_normal((2, 3, 5, 64)).astype(np.float16)
    codes, scale = quantize(x, codebook)
    assert codes.shape == x.shape
    assert scale.shape == (2, 3, 5, 1)
    for kind in (np.float32, np.float64):
        for found, expected in zip(quantize(x.astype(kind), codebook), (codes, scale), strict=True):
            assert np.array_equal(found, expected)
    single = quantize(x[1, 2, 3], codebook)
    assert np.array_equal(single[0], codes[1, 2, 3])
    assert np.array_equal(single[1], scale[1, 2, 3])
    assert dequantize(codes, scale, codebook).dtype == np.float32
    assert quantize(x[:0], codebook)[0].shape == (0, 3, 5, 64)
    # a power of two moves the scale and no code: not with f16's largest numbers, nor with f32's smallest
    for power in (2.0**12, 2.0**-126):
        moved = quantize(x.astype(np.float64) * power, codebook)
        assert np.array_equal(moved[0], codes)
        assert moved[1] == pytest.approx(scale * power, rel=EPS, abs=2.0**-149)


def test_quantize_refusals() -> None:
    codebook = lloyd_max(4, 64)
    for bad in (np.nan, np.inf, -np.inf, 1e39):
        with pytest.raises(ValueError, match="must be finite in f32"):
            quantize(np.full((2, 64), bad), codebook)
    with pytest.raises(ValueError, match="norm is too large for f32"):
        quantize(np.full(64, 3e38), codebook)
    for shape in ((64, 63), (), (0,)):
        with pytest.raises(ValueError, match="expected vectors of 64, got shape"):
            quantize(np.zeros(shape), codebook)
    scale = np.ones((2, 1), np.float32)
    for codes in (np.zeros((2, 32), np.uint8), np.zeros((2, 64), np.int8), np.full((2, 64), 16, np.uint8)):
        with pytest.raises(ValueError, match=r"expected u8 codes \(…, 64\) below 16"):
            dequantize(codes, scale, codebook)


# ------------------------------------------------------------------------------------------ a step for each vector


@pytest.mark.parametrize(("bits", "worse"), [(2, 1.03), (3, 1.07), (4, 1.05), (5, 1.01), (6, 0.97), (8, 0.93)])
def test_an_adaptive_step_is_as_good_as_a_codebook(bits: int, worse: float) -> None:
    """Distortion in proportion to that of Lloyd-Max codes, both with norm correction, on the same random vectors."""
    x = unit_vectors(20_000, 64, 1)
    codec = AdaptiveUniform(bits, 64)
    ours = np.sum((codec.decode(*codec.encode(x)) - x) ** 2, axis=-1)
    ratio = ours.mean() / squared_error(x, lloyd_max(bits, 64), norm_correction=True).mean()
    assert worse - 0.02 < ratio < worse + 0.01


@pytest.mark.parametrize("bits", STEPS)
def test_adaptive_codes_by_their_definition(bits: int) -> None:
    x = np.random.RandomState(bits).standard_normal((300, 64)) * np.exp(np.linspace(-6, 9, 300))[:, None]
    codec = AdaptiveUniform(bits, 64)
    codes, scale = codec.encode(x)
    assert (codes.dtype, scale.dtype, codes.max() < 2**bits) == (np.uint8, np.float32, True)
    peak, spread = STEPS[bits]
    for row, code, factor in zip(x, codes, scale, strict=True):
        step = (peak * max(abs(row)) + spread * np.sqrt(np.mean(row**2)) + 1e-4) / codec.mid
        nearest = np.abs(row[:, None] / step - (np.arange(2**bits) - codec.mid)).argmin(1)
        assert np.array_equal(code, nearest)
        assert np.isclose(factor, np.linalg.norm(row) / np.linalg.norm(nearest - codec.mid), rtol=EPS)
    norms = np.linalg.norm(codec.decode(codes, scale).astype(np.float64), axis=-1)
    assert np.allclose(norms, np.linalg.norm(x, axis=-1), rtol=4 * EPS)  # norm correction


@pytest.mark.parametrize("bits", STEPS)
def test_adaptive_bears_zeros(bits: int) -> None:
    codec = AdaptiveUniform(bits, 64)
    codes, scale = codec.encode(np.zeros((2, 64)))
    assert np.array_equal(codec.decode(codes, scale), np.zeros((2, 64)))


def test_adaptive_refusals() -> None:
    for bits in (1, 7, 9):
        with pytest.raises(ValueError, match=f"bits must be one of 2, 3, 4, 5, 6, 8, got {bits}"):
            AdaptiveUniform(bits, 64)
    with pytest.raises(ValueError, match="expected vectors of 64"):
        AdaptiveUniform(4, 64).encode(np.zeros((2, 32)))
    assert len({AdaptiveUniform(bits, d).digest for bits in STEPS for d in (64, 128)}) == 2 * len(STEPS)
    assert AdaptiveUniform(6, 64).digest == "eeb1307a1a7c739f"  # the same on every platform


# ------------------------------------------------------------------------------------------ algorithm 1


@pytest.fixture(scope="module")
def rotations() -> list[np.ndarray]:
    return [random_orthogonal(64, seed) for seed in range(400)]


@both
@pytest.mark.parametrize("bits", range(1, 7))
def test_algorithm_1_for_the_worst_vectors(make, bits: int, rotations: list[np.ndarray]) -> None:
    """Theorem 1 is about any vector: here those with all their length in one coordinate."""
    codebook, x = make(bits, 64), np.eye(64)
    errors = []
    for rotation in rotations:
        algorithm = RotatedQuantizer(codebook, rotation, norm_correction=False)
        errors.append(np.sum((algorithm.decode(*algorithm.encode(x)) - x) ** 2, axis=-1).mean())
    assert within(np.array(errors), codebook.distortion, sharpness=0.03 * codebook.distortion)


@pytest.mark.parametrize("bits", range(1, 7))
def test_algorithm_1_for_random_vectors(bits: int) -> None:
    """For these any rotation will do."""
    x = unit_vectors(20000, 64, seed=bits)
    algorithm = RotatedQuantizer(lloyd_max(bits, 64), randomized_hadamard(64, 0), norm_correction=False)
    errors = np.sum((algorithm.decode(*algorithm.encode(x)) - x) ** 2, axis=-1)
    assert within(errors, algorithm.codebook.distortion, sharpness=0.02 * algorithm.codebook.distortion)


def test_theorem_1_needs_more_than_a_hadamard_rotation() -> None:
    """One coordinate becomes ±1/√d everywhere: every y is ±1, whatever the seed."""
    codebook = lloyd_max(1, 64)
    for seed in range(5):
        algorithm = RotatedQuantizer(codebook, randomized_hadamard(64, seed), norm_correction=False)
        errors = np.sum((algorithm.decode(*algorithm.encode(np.eye(64))) - np.eye(64)) ** 2, axis=-1)
        assert errors == pytest.approx((1 - codebook.centroids[1]) ** 2, rel=1e-5)
        assert errors.max() < codebook.distortion / 5


def test_algorithm_1_is_the_codec_between_two_rotations() -> None:
    codebook, rotation = lloyd_max(4, 64), random_orthogonal(64, 3)
    x = np.random.RandomState(3).standard_normal((2, 5, 64)).astype(np.float32)
    algorithm = RotatedQuantizer(codebook, rotation)
    codes, scale = quantize(x @ rotation.astype(np.float64), codebook)
    found = algorithm.encode(x)
    assert np.array_equal(found[0], codes)
    assert np.array_equal(found[1], scale)
    decoded = algorithm.decode(codes, scale)
    assert decoded.dtype == np.float32
    assert decoded == pytest.approx(dequantize(codes, scale, codebook) @ rotation.T.astype(np.float64), abs=1e-6)
    for bad in (rotation[:32], rotation[:32, :32], np.eye(65)):
        with pytest.raises(ValueError, match=r"rotation must be \(64, 64\), got"):
            RotatedQuantizer(codebook, bad)


@pytest.mark.parametrize(("bits", "dim"), [(1, 64), (4, 64), (6, 128), (8, 256)])
@pytest.mark.parametrize("norm_correction", [True, False])
def test_turboquant_by_its_public_name(bits: int, dim: int, norm_correction: bool) -> None:
    """Codes are the nearest centroids of √d·x·R/‖x‖; decoding is scale·centroids/√d, rotated back."""
    x = 3 * np.random.RandomState(bits).standard_normal((2, 7, dim)).astype(np.float32)
    codec = TurboQuantMSE(dim=dim, bits=bits, norm_correction=norm_correction)
    codes, scale = codec.quantize(x)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (np.uint8, x.shape, np.float32, (2, 7, 1))
    rotation, norm = randomized_hadamard(dim, 0).astype(np.float64), np.linalg.norm(x.astype(np.float64), axis=-1)
    centroids = lloyd_max(bits, dim).centroids.astype(np.float64)
    turned = np.sqrt(dim) * x @ rotation / norm[..., None]
    nearest = np.abs(turned[..., None] - centroids).argmin(-1)
    assert np.array_equal(codes, nearest)
    unit = centroids[nearest] / np.sqrt(dim) @ rotation.T
    expected = norm / np.linalg.norm(unit, axis=-1) if norm_correction else norm
    assert scale[..., 0] == pytest.approx(expected, rel=1e-6)
    assert codec.dequantize(codes, scale) == pytest.approx(expected[..., None] * unit, abs=1e-5)


def test_turboquant_refuses_what_it_can_not_do() -> None:
    for arguments, message in (
        ({"dim": 64, "bits": 9}, "bits must be 1 to 8, got 9"),
        ({"dim": 80, "bits": 4}, "dim must be a power of two, got 80"),
        ({"dim": 0, "bits": 4}, "dim must be a power of two, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            TurboQuantMSE(**arguments)
    codec = TurboQuantMSE(dim=64, bits=4)
    with pytest.raises(ValueError, match="expected vectors of 64"):
        codec.quantize(np.ones((3, 32)))
    with pytest.raises(ValueError, match="must be finite"):
        codec.quantize(np.full((1, 64), np.nan))
    with pytest.raises(ValueError, match="below 16"):
        codec.dequantize(np.full((1, 64), 16, np.uint8), np.ones((1, 1), np.float32))


# ------------------------------------------------------------------------------------------ algorithm 2


def estimates(bits: int, x: np.ndarray, q: np.ndarray, rotations: list[np.ndarray]) -> np.ndarray:
    """⟨q, x̂⟩ of Algorithm 2, or of QJL alone for 1 bit, with a projection of its own for each rotation: (seeds, n)."""
    found = []
    for seed, rotation in enumerate(rotations):
        projection = gaussian_projection(64, 1000 + seed)
        if bits == 1:
            decoded = qjl_decode(*qjl_encode(x, projection), projection)
        else:
            algorithm = TurboQuantProd(bits, rotation, projection)
            decoded = algorithm.decode(*algorithm.encode(x))
        found.append(np.sum(q * decoded, axis=-1))
    return np.array(found)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_algorithm_2_is_unbiased(bits: int, rotations: list[np.ndarray]) -> None:
    """Where Algorithm 1 is most biased, q = x, and a random q; over rotations and projections."""
    x = 2 * np.concatenate([unit_vectors(8, 64, seed=1)] * 2)
    q = np.concatenate([x[:8], 3 * unit_vectors(8, 64, seed=2)])
    errors = estimates(bits, x, q, rotations) - np.sum(q * x, axis=-1)
    sharpness = 0.1 if bits > 1 else 0.2  # ⟨x, x⟩ is 4
    assert within(errors[:, :8].mean(axis=-1), 0, sharpness)
    assert within(errors[:, 8:].mean(axis=-1), 0, sharpness)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_algorithm_1_is_biased(bits: int, rotations: list[np.ndarray]) -> None:
    """The same measure finds the bias −distortion·‖x‖²: it could find one in Algorithm 2."""
    x, codebook = 2 * unit_vectors(8, 64, seed=1), lloyd_max(bits, 64)
    errors = []
    for rotation in rotations:
        algorithm = RotatedQuantizer(codebook, rotation, norm_correction=False)
        errors.append((np.sum(x * algorithm.decode(*algorithm.encode(x)), axis=-1) - 4).mean())
    assert within(np.array(errors), -4 * codebook.distortion, 0.1)
    assert not within(np.array(errors), 0, 0.1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_variance_of_algorithm_2(bits: int, rotations: list[np.ndarray]) -> None:
    """Var⟨q, x̂⟩ over projections is (π/2·‖q‖²‖r‖² − ⟨q, r⟩²)/d; in the mean over rotations below Theorem 2's bound."""
    x, q, rotation = unit_vectors(64, 64, seed=3), unit_vectors(64, 64, seed=4), rotations[0]
    q[:16] = x[:16]
    residual = x
    if bits > 1:
        first = TurboQuantProd(bits, rotation, rotation).first
        residual = x - first.decode(*first.encode(x))
    expected = (np.pi / 2 * np.sum(residual**2, -1) - np.sum(q * residual, -1) ** 2) / 64
    fixed = estimates(bits, x, q, [rotation] * 400)
    ratios = np.mean((fixed - np.sum(q * x, -1)) ** 2 / expected, axis=-1)
    assert within(ratios, 1, sharpness=0.06)
    over_rotations = (estimates(bits, x, q, rotations) - np.sum(q * x, -1)) ** 2
    assert over_rotations.mean() < np.sqrt(3) * np.pi**2 / 64 * 4.0**-bits
    codebook = lloyd_max(bits, 64)
    if bits > 1:  # and several times the error of Algorithm 1 with as many bits, for q that doesn't depend on x
        assert over_rotations[:, 16:].mean() > 4 * codebook.distortion / 64


def test_algorithm_2_is_algorithm_1_and_qjl_of_what_is_left() -> None:
    rotation, projection = randomized_hadamard(64, 1), gaussian_projection(64, 2)
    x = np.random.RandomState(5).standard_normal((2, 3, 64)).astype(np.float16)
    x[0, 1] = 0
    algorithm = TurboQuantProd(4, rotation, projection)
    assert algorithm.first.codebook is lloyd_max(3, 64)
    codes, scale, signs, residual_norm = algorithm.encode(x)
    mse = algorithm.first.decode(codes, scale)
    residual = x - mse
    assert codes.shape == signs.shape == x.shape
    assert scale.shape == residual_norm.shape == (2, 3, 1)
    assert scale[..., 0] == pytest.approx(np.linalg.norm(x.astype(float), axis=-1), rel=EPS)  # no norm correction
    assert residual_norm[..., 0] == pytest.approx(np.linalg.norm(residual, axis=-1), rel=1e-5)
    assert np.array_equal(signs, residual.astype(float) @ projection.T.astype(float) > 0)
    expected = mse + np.sqrt(np.pi / 2) / 64 * residual_norm * ((2.0 * signs - 1) @ projection)
    assert algorithm.decode(codes, scale, signs, residual_norm) == pytest.approx(expected, abs=1e-5)
    assert not algorithm.decode(codes, scale, signs, residual_norm)[0, 1].any()


def test_algorithm_2_refusals() -> None:
    square = np.eye(64, dtype=np.float32)
    for bits in (1, 10):
        with pytest.raises(ValueError, match=f"bits must be 2 to 9, one of them for the residual, got {bits}"):
            TurboQuantProd(bits, square, square)
    with pytest.raises(ValueError, match=r"projection must be \(64, 64\), got \(32, 64\)"):
        TurboQuantProd(4, square, square[:32])
    with pytest.raises(ValueError, match=r"rotation must be \(64, 64\), got \(64, 32\)"):
        TurboQuantProd(4, square[:, :32], square)
    with pytest.raises(ValueError, match="expected vectors of 64"):
        qjl_encode(np.zeros(32), square)
    with pytest.raises(ValueError, match="must be finite in f32"):
        TurboQuantProd(4, square, square).encode(np.full(64, np.nan))
