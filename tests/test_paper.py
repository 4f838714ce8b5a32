"""docs/paper.md says what tools/paper.py finds."""

from __future__ import annotations

import re
import runpy

import numpy as np
import pytest
from conftest import ROOT

PAPER = runpy.run_path(str(ROOT / "tools" / "paper.py"))
TEXT = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")


def rows(heading: str) -> dict[str, list[float]]:
    """The numbers of the table under a heading, by its first column."""
    part = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")][2:]
    return {first: [float(x) for x in re.findall(r"[\d.]+", " ".join(rest))] for first, *rest in lines}


@pytest.mark.parametrize("bits", [2, 4])
def test_errors_and_bounds(bits: int) -> None:
    found = rows("The squared error of a unit vector, by bits of a coordinate")[str(bits)]
    lower, at_64, at_128, at_1024, integral, paper, upper, restored = found[:8]
    measured, corrected = PAPER["distortion"](64, bits)
    assert (at_64, restored) == pytest.approx((measured, corrected), rel=0.01)
    assert lower == pytest.approx(4.0**-bits, rel=0.01)
    assert upper == pytest.approx(np.sqrt(3) * np.pi / 2 * 4.0**-bits, rel=0.01)
    assert lower < at_64 < at_128 < at_1024 < upper
    assert (at_1024, paper) == pytest.approx((integral, integral), rel=0.07)


def test_inner_products_and_search() -> None:
    found = PAPER["inner_products"](64, 2).values()
    expected = [*(slope for slope, _ in found), *(error for _, error in found)]
    assert rows("Inner products: bias and error")["2"] == pytest.approx(expected, rel=0.01)
    neighbours = rows("Nearest neighbours, and ranks")["3"][:3]
    first, ten, rho = PAPER["search"](64, 3)
    assert neighbours == pytest.approx([100 * first, 100 * ten, rho], rel=0.02)
