"""Sliding layers with windows of hundreds and thousands of tokens: what is advised, told and verified."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import load, widened

import ovtq
from ovtq.advice import advise
from ovtq.verification.schedule import PASTED, calls_for
from ovtq.verification.verify import TOLERANCE


@pytest.mark.parametrize("window", [128, 512, 4096])
def test_a_window_without_sinks_is_not_cut_on_a_cpu(window: int, family: Callable[[str], Path]) -> None:
    """There a cut window is up to twice as slow as the exported model, in short texts."""
    _, description = load(family("gemma2"))
    changed = {layer.index: dataclasses.replace(layer, window=window) for layer in description.sliding}
    advice = advise(description.with_layers(changed), "cpu")
    assert advice.preset == "u8"
    assert "slower than the exported model" in advice.reason


def test_a_long_window_is_crossed_in_calls_that_are_not_long(family: Callable[[str], Path], tmp_path: Path) -> None:
    _, description = load(widened(family("gemma2"), tmp_path / "model", 4096))
    assert [layer.window for layer in description.layers] == [4096, None]
    calls = calls_for(description.layers)
    assert max(call.tokens for call in calls) == PASTED
    assert sum(call.tokens * call.batch for call in calls) < 8000
    text, longest = 0, 0
    for call in calls:
        text = call.tokens if call.reset else text + call.tokens
        longest = max(longest, text)
    assert 4096 < longest < 4200


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_a_long_window_is_verified(target: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    folder = widened(family("gemma2"), tmp_path / "model", 2000)
    settings = {"truncate-window": {"up_to": 0}}
    made = ovtq.convert(folder, tmp_path / "out", preset="exact", target=target, settings=settings)
    assert made.verification is not None
    assert made.verification.relative <= TOLERANCE
