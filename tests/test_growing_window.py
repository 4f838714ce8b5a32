"""Windows of more than 256 tokens on a CPU: left as exported where that is faster, or cut, in states that grow."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import load, widened

from ovtq import pipeline
from ovtq.cli.convert import main as convert
from ovtq.forms.cpu.growing_window import STEP
from ovtq.forms.window import LONG_WINDOW, SHORT_WINDOW
from ovtq.models import ModelDescription
from ovtq.models.description import Exported
from ovtq.passes import CheckCall, DecoupleLength, SimplifyMask, TruncateWindow
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.verification.schedule import Call
from ovtq.verification.verify import TOLERANCE, play

WINDOW = 300
CUT = (DecoupleLength(), TruncateWindow(target="cpu"), SimplifyMask(), CheckCall(target="cpu"))
# From empty, across a step, the window and blocks of queries, by chunks and single tokens; forgotten, in a batch with
# padding that outgrows the window, its sequences swapped; a call longer than the window from empty, and behind it
CALLS = [
    *(Call(1), Call(STEP - 2), *[Call(1)] * 3, Call(140), *[Call(1)] * 3, Call(40), *[Call(1)] * 2, Call(230), Call(1)),
    *(Call(24, 2, pad=9, reset=True), Call(1, 2, beams=(1, 0)), Call(330, 2), Call(1, 2, beams=(1, 1)), Call(2, 2)),
    *(Call(9, reset=True), Call(1), Call(700, reset=True), Call(1), Call(70), Call(1)),
]


def cut(folder: Path, passes: tuple[pipeline.Pass, ...] = CUT) -> tuple[ov.Model, ModelDescription]:
    model, description, _ = pipeline.run(*load(folder), passes)
    return model, description


@pytest.mark.parametrize("name", ["gemma3", pytest.param("mistral-window", marks=pytest.mark.slow)])
def test_logits_equal_the_exported_models(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    folder = widened(family(name), tmp_path / "model", WINDOW)
    sides = [play(Runner(model, "CPU", EXACT_PROPERTIES), CALLS, 256, 0) for model in (load(folder)[0], cut(folder)[0])]
    for call, expected, got in zip(CALLS, *sides, strict=True):
        shown = slice(call.pad, None) if call.tokens > 1 else slice(None)  # what follows the padding
        a, b = (side.results[:, shown] for side in (expected, got))
        assert np.abs(a - b).max() <= TOLERANCE * np.abs(a).max(), call


def test_states_hold_as_many_rows_as_there_are_tokens(family: Callable[[str], Path], tmp_path: Path) -> None:
    """Made up to a step, until the window is full; and none after a reset, whatever stood there."""
    model, description = cut(widened(family("gemma3"), tmp_path / "model", WINDOW))
    states = {state.name: state for state in description.states}
    sliding = [name for name in states if name.startswith("ovtq.0.")]
    assert sorted(sliding) == ["ovtq.0.key", "ovtq.0.value"]
    runner, text = Runner(model, "CPU", EXACT_PROPERTIES), 0
    expected = [(1, STEP), (STEP - 1, STEP), (1, 2 * STEP), (150, WINDOW - 1), (500, WINDOW - 1), (1, WINDOW - 1)]
    for tokens, rows in expected:
        runner.step(np.ones((1, tokens), np.int64))
        text += tokens
        shapes = {state.name: state.state.shape for state in runner.request.query_state()}
        for name in sliding:
            assert shapes[name][2] == rows == states[name].rows(text)
    runner.reset()
    runner.step(np.ones((2, 3), np.int64))
    shapes = {state.name: state.state.shape for state in runner.request.query_state()}
    assert [tuple(shapes[name][:3]) for name in sliding] == [(2, 1, STEP)] * 2


def test_short_windows_and_those_with_sinks_keep_the_form_of_fixed_length(
    family: Callable[[str], Path], tiny: Path, tmp_path: Path
) -> None:
    _, description = cut(widened(family("gemma3"), tmp_path / "model", SHORT_WINDOW))
    assert "ovtq.window" in {state.name for state in description.states}
    _, description = cut(widened(tiny, tmp_path / "sinks", WINDOW, was=16))
    assert "ovtq.window" in {state.name for state in description.states}


@pytest.mark.parametrize(
    ("preset", "window", "left"),
    [("exact", WINDOW, True), ("exact", SHORT_WINDOW, False), ("k6v4", WINDOW, False), ("k6v4", LONG_WINDOW + 1, True)],
)
def test_what_a_preset_leaves_as_exported(
    preset: str, window: int, left: bool, family: Callable[[str], Path], tmp_path: Path
) -> None:
    model, description = load(widened(family("gemma3"), tmp_path / "model", window))
    found = pipeline.run(model, description, pipeline.PRESETS[preset].on("cpu", description))
    assert isinstance(found[1].sliding[0].cache, Exported) == left
    (step,) = (step for step in found[2] if step.name == "truncate-window")
    assert bool(step.skipped) == left
    if left:  # then values are rotated, as those of every layer that the plugin quantises
        (rotated,) = (step for step in found[2] if step.name == "rotate-heads")
        assert rotated.sites == (2 if preset == "exact" else 1)
    gpu = pipeline.PRESETS[preset].on("gpu", description)
    assert all(item.up_to == 0 for item in gpu if isinstance(item, TruncateWindow))


def test_of_nothing_but_long_windows_a_packed_preset_packs_none(family: Callable[[str], Path], tmp_path: Path) -> None:
    model, description = load(widened(family("mistral-window"), tmp_path / "model", LONG_WINDOW + 1))
    _, _, steps = pipeline.run(model, description, pipeline.PRESETS["k6v4"].on("cpu", description))
    assert [step.name for step in steps if not step.skipped] == ["rotate-heads"]
    assert "quantize-kv: the model has no full layers" in pipeline.told(steps)
    assert "truncate-window.up-to=0 cuts it" in pipeline.told(steps)


def test_what_is_cut_and_what_is_left_is_told(
    family: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = widened(family("gemma2"), tmp_path / "model", WINDOW)
    command = [str(folder), "--dry-run", "--preset", "exact", "--target", "cpu"]
    said = []
    for options in ([], ["--set", "truncate-window.up-to=0"], ["--window-bits", "8,8"]):
        assert convert([*command, *options]) == 0
        said.append(" ".join(capsys.readouterr().out.split()))
    assert "a window of 300 tokens is slower cut than whole" in said[0]
    assert "truncate-window.up-to=0 cuts it" in said[0]
    for text in said[1:]:
        assert "what a window of 300 tokens holds is copied in every step" in text
        assert "truncate-window left out" not in text


def test_an_unusable_length_is_refused(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    assert convert([str(tiny), "--dry-run", "--preset", "exact", "--set", "truncate-window.up-to=-1"]) == 2
    assert re.search(r"up-to must be from 0 to 1048576 tokens, got -1", " ".join(capsys.readouterr().err.split()))
