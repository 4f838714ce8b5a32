"""Codebooks held to integrals, closed forms and the TurboQuant paper (arXiv 2504.19874)."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import beta

from ovtq.codec.codebook import Codebook, lloyd_max, uniform

BITS = range(1, 9)
EPS = float(np.finfo(np.float32).eps)
DIGESTS = {  # d = 64, 1 to 7 bits; at 8 a centroid is so near the middle of two f32 that another scipy may round it so
    lloyd_max: "b5a0fd21e29e7a16 8982b836930bf416 243b6c87786f5c2d aa5049085b4ca8f2 e542a03dede2c2fc "
    "04c07dfa4fe9d20d b8b5513716d22e74",
    uniform: "b5a0fd21e29e7a16 1cf7173215ecd2ea 4c6252038eeb617d d4d77c88670cf630 52391ee4d31e0fc7 "
    "f5078efc4412f5d4 ca41a71b8ece41fd",
}
both = pytest.mark.parametrize("make", [lloyd_max, uniform], ids=lambda make: make.__name__)


def density(y: np.ndarray, head_dim: int) -> np.ndarray:
    """Of √d times a coordinate of a random unit vector, by way of scipy's Beta distribution."""
    a, end = (head_dim - 1) / 2, np.sqrt(head_dim)
    return beta.pdf((1 + y / end) / 2, a, a) / (2 * end)


def integral_over_cells(codebook: Codebook, value) -> np.ndarray:
    d = codebook.head_dim
    end = min(np.sqrt(d), 12)
    edges = [-end, *codebook.boundaries.astype(float), end]
    return np.array(
        [
            quad(lambda y, c=c: value(y, c) * density(y, d), low, high, epsabs=1e-14)[0]
            for c, low, high in zip(codebook.centroids.astype(float), edges, edges[1:], strict=False)
        ]
    )


@both
@pytest.mark.parametrize("head_dim", [4, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_distortion_is_the_integral(make, bits: int, head_dim: int) -> None:
    codebook = make(bits, head_dim)
    error = integral_over_cells(codebook, lambda y, c: (y - c) ** 2).sum()
    assert codebook.distortion == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("head_dim", [4, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_each_centroid_is_the_mean_of_its_cell(bits: int, head_dim: int) -> None:
    codebook = lloyd_max(bits, head_dim)
    mass = integral_over_cells(codebook, lambda y, c: 1)
    mean = integral_over_cells(codebook, lambda y, c: y) / mass
    assert mass.sum() == pytest.approx(1, abs=1e-9)
    # the boundaries, rounded to f32, move the mean of a cell by up to an ulp of theirs
    assert np.abs(codebook.centroids - mean).max() < EPS * np.abs(codebook.centroids).max()


@pytest.mark.parametrize(
    ("bits", "expected"), [(1, 0.3584), (2, 0.1145), (3, 0.0334), (4, 0.00913), (5, 0.00240), (6, 0.000616)]
)
def test_distortion_at_head_dim_64(bits: int, expected: float) -> None:
    assert lloyd_max(bits, 64).distortion == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("bits", "digits"), [(1, "0.36"), (2, "0.117"), (3, "0.03"), (4, "0.009")])
def test_distortion_of_theorem_1(bits: int, digits: str) -> None:
    """At large d, to the digits that the paper prints."""
    assert f"{lloyd_max(bits, 4096).distortion:.{len(digits) - 2}f}" == digits


MAX_1960 = {  # the optimal quantisers of a normal distribution, tables I and II there
    lloyd_max: [0.3634, 0.1175, 0.03454, 0.009497, 0.002499],
    uniform: [0.3634, 0.1188, 0.03744, 0.01154, 0.003495],
}


@both
def test_large_head_dim_is_gaussian(make) -> None:
    found = [make(bits, 4096).distortion for bits in range(1, 6)]
    assert found == pytest.approx(MAX_1960[make], rel=0.005)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256, 4096])
def test_distortion_falls_as_four_to_the_bits(head_dim: int) -> None:
    found = np.array([lloyd_max(bits, head_dim).distortion for bits in BITS])
    bound = 4.0 ** -np.array(BITS)
    assert (found > bound).all()
    assert (found < np.sqrt(3) * np.pi / 2 * bound).all()
    ratios = found[:-1] / found[1:]
    assert (np.diff(ratios) > 0).all()
    assert ratios[0] > 3
    assert 3.9 < ratios[-1] < 4


def test_codebooks_known_in_closed_form() -> None:
    """d = 3: y is uniform on ±√3 (Archimedes). 1 bit: the centroid is E|y|, the error 1 − E|y|²."""
    for make in (lloyd_max, uniform):
        for bits in BITS:
            n = 2**bits
            assert make(bits, 3).centroids == pytest.approx(np.sqrt(3) * (2 * np.arange(n) + 1 - n) / n, rel=EPS)
            assert make(bits, 3).distortion == pytest.approx(4.0**-bits, rel=1e-6)
        assert make(1, 2).centroids[1] == pytest.approx(np.sqrt(8) / np.pi, rel=EPS)
        assert make(1, 2).distortion == pytest.approx(1 - 8 / np.pi**2, rel=1e-9)  # below 4^-1: see TurboQuantMSE
        assert make(1, 5).centroids[1] == pytest.approx(np.sqrt(5) * 3 / 8, rel=EPS)
        assert make(1, 5).distortion == pytest.approx(19 / 64, rel=1e-9)


@pytest.mark.parametrize("bits", BITS)
def test_no_codebook_near_is_better(bits: int) -> None:
    best, affine = lloyd_max(bits, 64), uniform(bits, 64)
    assert best.distortion <= affine.distortion
    for factor in (0.99, 1.01):
        scaled = Codebook(bits, 64, (affine.centroids * factor).astype(np.float32))
        assert scaled.distortion > affine.distortion
    half = best.centroids[2 ** (bits - 1) :]
    for seed in range(10):
        moved = half + 0.1 * half[0] * np.random.RandomState(seed).uniform(-1, 1, len(half))
        near = Codebook(bits, 64, np.concatenate([-moved[::-1], moved]).astype(np.float32))
        assert near.distortion > best.distortion


@both
@pytest.mark.parametrize("head_dim", [2, 3, 5, 64, 96, 128, 4096])
@pytest.mark.parametrize("bits", BITS)
def test_codebook_is_well_formed(make, bits: int, head_dim: int) -> None:
    codebook = make(bits, head_dim)
    centroids, boundaries = codebook.centroids, codebook.boundaries
    assert centroids.dtype == boundaries.dtype == np.float32
    assert len(centroids) == len(boundaries) + 1 == 2**bits
    assert np.array_equal(centroids, -centroids[::-1])
    assert np.array_equal(boundaries, -boundaries[::-1])
    assert (centroids[:-1] < boundaries).all()
    assert (boundaries < centroids[1:]).all()
    assert make(bits, head_dim) is codebook
    for array in (centroids, boundaries):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@both
def test_codebooks_do_not_drift(make) -> None:
    assert [make(bits, 64).digest for bits in range(1, 8)] == DIGESTS[make].split()


@both
def test_codebook_refusals(make) -> None:
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
            make(bits, 64)
    with pytest.raises(ValueError, match="head_dim must be at least 2, got 1"):
        make(4, 1)
