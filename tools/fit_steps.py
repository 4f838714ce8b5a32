#!/usr/bin/env python3
"""How the step of a uniformly quantised vector should follow its largest and its root mean square coordinate.

usage: fit_steps.py [HEAD_DIM …]        (default: 64 128)

For every width prints the (peak, spread) of least mean distortion over the head_dims given, on a grid of tenths, over
seeded random directions: what ovtq.codec.STEPS holds. Beside it, Lloyd-Max codes with norm correction. A minute.
"""

from __future__ import annotations

import sys
from itertools import product

import numpy as np

from ovtq.codec import STEPS, dequantize, quantize
from ovtq.codec.codebook import lloyd_max

VECTORS = 6000


def distortion(y: np.ndarray, bits: int, peak: float, spread: float) -> float:
    """E‖u − û‖² for y = √d·u, (vectors, d), with norm correction."""
    mid = (2**bits - 1) / 2
    step = (peak * np.abs(y).max(1, keepdims=True) + spread) / mid
    code = np.clip(np.round(y / step + mid), 0, 2 * mid) - mid
    norm = np.linalg.norm(y, axis=1, keepdims=True)
    return float(((code * norm / np.linalg.norm(code, axis=1, keepdims=True) - y) ** 2).mean())


def main() -> int:
    try:
        dims = [int(arg) for arg in sys.argv[1:]] or [64, 128]
    except ValueError:
        print(__doc__, file=sys.stderr)
        return 2
    vectors = {d: np.random.RandomState(0).standard_normal((VECTORS, d)) for d in dims}
    vectors = {d: y * np.sqrt(d) / np.linalg.norm(y, axis=1, keepdims=True) for d, y in vectors.items()}
    tenths = np.arange(0, 11) / 10, np.arange(0, 16) / 10
    for bits in STEPS:
        grid = [(peak, spread) for peak, spread in product(*tenths) if peak + spread / 2.5 > 0.5]
        found = {point: [distortion(vectors[d], bits, *point) for d in dims] for point in grid}
        least = [min(column) for column in zip(*found.values(), strict=True)]
        best = min(grid, key=lambda point: sum(a / b for a, b in zip(found[point], least, strict=True)))
        print(f"{bits} bits: peak {best[0]}, spread {best[1]}")
        for d, value in zip(dims, found[best], strict=True):
            other = dequantize(*quantize(vectors[d], lloyd_max(bits, d)), lloyd_max(bits, d))
            print(f"   head_dim {d}: {value:.6f}; Lloyd-Max {((other - vectors[d]) ** 2).mean():.6f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
