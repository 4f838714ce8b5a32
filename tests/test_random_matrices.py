"""The random matrices of the codec: orthogonal, of Haar's distribution, and the same wherever they are made."""

from __future__ import annotations

import numpy as np
import pytest
from test_codec import within

from ovtq.codec import (
    gaussian_projection,
)
from ovtq.codec.rotation import random_orthogonal

EPS = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("head_dim", [1, 2, 7, 64, 128])
def test_random_orthogonal(head_dim: int) -> None:
    rotation = random_orthogonal(head_dim, 5)
    assert rotation.dtype == np.float32
    assert np.abs(rotation @ rotation.T - np.eye(head_dim)).max() < 8 * EPS
    assert np.array_equal(rotation, random_orthogonal(head_dim, 5))


def test_random_orthogonal_is_haar() -> None:
    """Without the sign fix LAPACK's first column has a sign of its own; the trace of a Haar matrix is N(0, 1)-like."""
    traces = np.array([np.trace(random_orthogonal(6, seed)) for seed in range(4000)])
    assert within(traces, 0, 0.1)
    assert within(traces**2, 1, 0.1)


def test_random_matrices_do_not_drift() -> None:
    """RandomState's stream is frozen; an orthogonal matrix comes from LAPACK, so only its digits to 1e-6 are."""
    assert gaussian_projection(4, 7)[0] == pytest.approx([1.6905257, -0.46593738, 0.03282016, 0.40751629], abs=1e-7)
    assert random_orthogonal(3, 7)[0] == pytest.approx([0.97215307, 0.08177661, 0.21961550], abs=1e-6)
