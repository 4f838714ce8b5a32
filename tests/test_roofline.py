"""The lower bound of a decode step, by hand."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

from ovtq import roofline

sys.path.insert(0, str(ROOT / "tools"))
import make_synthetic_gpt_oss as synthetic


def test_by_hand() -> None:
    config = list(synthetic.configurations("20b", None))[1]
    weights = 24 * (2 * 2880 * 4096 + 2 * 2880 * 512 + 2880 * 32 + 4 * 3 * 2880 * 2880 * 9 // 16) + 201088 * 2880
    assert roofline.weight_bytes(config) == weights
    found = roofline.table(config, "arc-140v", [0, 1000])
    least = {(row["cache"], row["context"]): row["least_ms"] for row in found["rows"]}
    assert least["exact", 0] == pytest.approx(1e3 * (weights / 136e9 + 890 * 5e-6))
    assert least["stock", 1000] - least["stock", 0] == pytest.approx(24 * 34_834 * 1000 / 136e9 * 1e3)
    assert least["u8", 1000] - least["u8", 0] == pytest.approx(12 * 1_333 * 1000 / 136e9 * 1e3)
    assert any("assumed, not measured" in line for line in found["assumptions"])


def test_other_heads_and_machines_are_refused() -> None:
    config = list(synthetic.configurations("mini", None))[1]
    with pytest.raises(ValueError, match="not \\[16, 2, 64\\]"):
        roofline.table(config, "arc-140v", [0])
    with pytest.raises(KeyError):
        roofline.table(list(synthetic.configurations("20b", None))[1], "arc-0", [0])
