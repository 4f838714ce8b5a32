"""Sliding layers with windows of hundreds and thousands of tokens: what is advised, told and verified."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import load
from openvino import opset15 as op

import ovtq
from ovtq.advice import advise
from ovtq.cli.convert import main as convert
from ovtq.ir import io
from ovtq.ir.graph import constant_of
from ovtq.verification.schedule import PASTED, calls_for
from ovtq.verification.verify import TOLERANCE


@pytest.mark.parametrize(("window", "preset"), [(256, "exact"), (512, "u8"), (4096, "u8")])
def test_a_large_window_is_not_cut_on_a_cpu(window: int, preset: str, family: Callable[[str], Path]) -> None:
    """There `exact` is up to seven times slower than the exported model, in short texts."""
    _, description = load(family("gemma2"))
    changed = {layer.index: dataclasses.replace(layer, window=window) for layer in description.sliding}
    advice = advise(description.with_layers(changed), "cpu")
    assert advice.preset == preset
    assert ("slower than the exported model" in advice.reason) == (preset == "u8")


def _widened(folder: Path, out: Path, window: int) -> Path:
    """A copy of a model whose windows are of so many tokens."""
    shutil.copytree(folder, out)
    model = io.load(folder)
    for node in model.get_ops():
        value = constant_of(node.input_value(1)) if node.get_type_name() == "Add" else None
        if value is not None and value.size == 1 and value.reshape(-1)[0] == -24:
            node.input(1).replace_source_output(op.constant(np.full(value.shape, -window, value.dtype)).output(0))
    ov.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)
    return out


def test_a_large_window_that_is_cut_is_told(
    family: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _widened(family("gemma2"), tmp_path / "model", 300)
    assert convert([str(folder), "--dry-run", "--preset", "exact", "--target", "cpu"]) == 0
    assert "a window of 300 tokens is held from the first token on" in " ".join(capsys.readouterr().out.split())


def test_a_long_window_is_crossed_in_calls_that_are_not_long(family: Callable[[str], Path], tmp_path: Path) -> None:
    _, description = load(_widened(family("gemma2"), tmp_path / "model", 4096))
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
    folder = _widened(family("gemma2"), tmp_path / "model", 2000)
    made = ovtq.convert(folder, tmp_path / "out", preset="exact", target=target)
    assert made.verification is not None
    assert made.verification.relative <= TOLERANCE
