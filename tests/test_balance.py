"""Balanced heads: the algebra of a basis against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from ovtq.codec import AdaptiveUniform
from ovtq.codec.basis import HeadBasis, balance, balanced, gain, loss, power
from ovtq.codec.rotation import orthogonal, randomized_hadamard

EPS = float(np.finfo(np.float32).eps)


D = 64


def spectrum(seed: int, decay: float, d: int = D) -> np.ndarray:
    """A covariance whose eigenvalues fall by exp(decay) in all, in random directions."""
    random = np.random.RandomState(seed)
    axes = np.linalg.qr(random.standard_normal((d, d)))[0]
    return (axes * np.exp(-decay * np.arange(d) / d)) @ axes.T


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 100, 112, 120, 160, 192, 256])
def test_a_rotation_of_any_head_dim_is_orthogonal_and_seeded(head_dim: int) -> None:
    rotation = orthogonal(head_dim, 0)
    product = rotation.astype(np.float64) @ rotation.T
    assert np.abs(product - np.eye(head_dim)).max() < 8 * EPS
    assert not np.array_equal(rotation, orthogonal(head_dim, 1))
    spread = np.abs(rotation).max()
    assert spread <= (1 + EPS) / np.sqrt(head_dim) or head_dim == 100  # no Hadamard matrix is known for it
    assert spread < 0.6
    if head_dim & (head_dim - 1) == 0:
        np.testing.assert_array_equal(rotation, randomized_hadamard(head_dim, 0))


def test_the_balanced_basis_loses_least() -> None:
    """The bound of Cauchy and Schwarz is reached, and nothing near it, or anything random, is below."""
    sigma, gamma = spectrum(0, 6), spectrum(1, 4)
    root, inverse = balance(sigma, gamma, limit=1e6)
    assert np.abs(root @ inverse - np.eye(D)).max() < 1e-10
    half = power(sigma, 0.5)
    bound = np.trace(power(half @ gamma @ half, 0.5)) ** 2 / D
    least = loss(root, sigma, gamma)
    assert least == pytest.approx(bound, rel=0.02)  # the ridge costs a little
    assert loss(np.eye(D), sigma, gamma) > 1.5 * least
    random = np.random.RandomState(2)
    for size in (1e-3, 1e-2, 1e-1, 1):
        for _ in range(20):
            other = root + size * np.linalg.norm(root) / D * random.standard_normal((D, D))
            assert loss(other, sigma, gamma) >= 0.999 * least


def test_part_of_the_way_is_between_its_ends() -> None:
    """Whatever is true, as where weights are wrong of a text: no worse than the mean of the ends, in logarithms."""
    said, true = ((spectrum(a, 6), spectrum(b, 4)) for a, b in ((0, 1), (7, 8)))
    start, halfway, end = (loss(balance(*said, share=share)[0], *true) for share in (0, 0.5, 1))
    assert start == pytest.approx(loss(np.eye(D), *true))
    assert min(start, end) < halfway < np.sqrt(start * end)
    assert gain(said[0][None], said[1][None]) > 1.5
    assert gain(said[0][None], said[0][None]) == pytest.approx(1, abs=1e-3)


def test_the_loss_is_what_a_quantiser_loses() -> None:
    """E[(q·δ)²] of 4-bit codes, measured, falls by what the traces say; all coordinates have one variance."""
    sigma, gamma = spectrum(3, 7), spectrum(4, 5)
    random, codec, spread = np.random.RandomState(5), AdaptiveUniform(4, D), orthogonal(D, 0)
    keys = random.standard_normal((4000, D)) @ power(sigma, 0.5) + 3
    queries = random.standard_normal((500, D)) @ power(gamma, 0.5)
    centre = np.full((1, D), 3.0)
    found = []
    # the first is a rotation, for P = 1 where Γ is Σ
    for basis in (balanced(*2 * [sigma[None]], spread, centre), balanced(sigma[None], gamma[None], spread, centre)):
        x = (keys - centre)[None]
        y = basis.into(x)
        delta = basis.back(codec.decode(*codec.encode(y)))[0] - x[0]
        found.append(np.mean(np.square(queries @ delta.T)))
        variance = y[0].var(0)
    assert np.ptp(variance) < 0.2 * variance.mean()
    expected = loss(np.eye(D), sigma, gamma) / loss(balance(sigma, gamma)[0], sigma, gamma)
    assert found[0] / found[1] == pytest.approx(expected, rel=0.1)
    assert expected > 2


@pytest.mark.parametrize(
    ("sigma", "gamma"),
    [
        (spectrum(0, 60), spectrum(1, 60)),
        (np.ones((D, D)), np.eye(D)),
        (np.zeros((D, D)), np.zeros((D, D))),
        (np.eye(D), np.zeros((D, D))),
    ],
)
def test_conditioning_is_bounded(sigma: np.ndarray, gamma: np.ndarray) -> None:
    centre = np.zeros((1, D), np.float32)
    for limit in (1.0, 4.0, 32.0):
        basis = balanced(sigma[None], gamma[None], orthogonal(D, 0), centre, limit)
        assert basis.condition.max() <= limit * (1 + 1e-4)
        x = np.random.RandomState(0).standard_normal((1, 9, D))
        assert np.abs(basis.back(basis.into(x)) - x).max() < 1e-4


def test_scores_and_sums_stay_what_they_are() -> None:
    """(q·A⁻ᵀ)·(A·(k − c)) = q·(k − c), in a space of more coordinates, too."""
    random = np.random.RandomState(0)
    wide = np.linalg.qr(random.standard_normal((80, 80)))[0][:D].astype(np.float32)
    for spread in (orthogonal(D, 1), wide):
        pairs = [np.stack([spectrum(s, 5), spectrum(s + 1, 3)]) for s in (6, 8)]
        basis = balanced(*pairs, spread, random.standard_normal((2, D)))
        q, k = random.standard_normal((2, 2, 7, D))
        scores = q @ basis.dual.astype(np.float64) @ basis.into(k).swapaxes(1, 2)
        assert np.abs(scores - q @ k.swapaxes(1, 2)).max() < 1e-4
        assert basis.digest != balanced(*pairs, spread, basis.centre + 1).digest


def test_a_basis_is_checked() -> None:
    eye, centre = np.eye(4, dtype=np.float32)[None], np.zeros((2, 4), np.float32)
    for arguments, message in (
        ((eye, eye[:, :3], centre), "do not belong together"),
        ((np.repeat(eye, 3, 0), np.repeat(eye, 3, 0), centre), "3 heads for centres of 2"),
        ((np.full_like(eye, np.inf), eye, centre), "finite"),
        ((2 * eye, eye, centre), "not its inverse"),
    ):
        with pytest.raises(ValueError, match=message):
            HeadBasis(*arguments)
