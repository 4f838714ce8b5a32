"""Verification must catch what it is there for: conversions that load, run and are silently wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import MINI, TINY, load
from faults import (
    band_off_by_one,
    beams_mixed_up,
    heads_in_the_wrong_order,
    not_causal,
    not_orthogonal,
    not_undone,
    packed_in_another_order,
    padding_ignored,
    scales_joined_in_another_order,
    scales_of_another_layer,
    scales_stay_where_they_are,
    scales_too_large,
    sink_not_centred,
    tokens_counted_twice,
    window_lags,
    window_not_turned_back,
    window_off_by_one,
    window_scales_too_large,
)

import ovtq.codec.packing
import ovtq.forms.attend
import ovtq.forms.cpu.full
import ovtq.forms.window
import ovtq.forms.window_state
import ovtq.passes.rotate_heads
import ovtq.verification.verify
from ovtq import pipeline
from ovtq.cli.convert import main
from ovtq.errors import VerificationFailed
from ovtq.forms.attend import GrowingState
from ovtq.ir import io
from ovtq.passes import DecoupleLength, RotateHeads, TruncateWindow
from ovtq.verification.closeness import played
from ovtq.verification.extent import Scope
from ovtq.verification.routers import undecided
from ovtq.verification.schedule import PASTED, STEPS, Call, calls_for, edges, lengths_of
from ovtq.verification.verify import TOLERANCE, compare, verify

EXACT = "decouple-length,truncate-window,simplify-mask,rotate-heads:tensors=v:layers=full,check-call"


@pytest.mark.parametrize("target", ["gpu", "cpu"])
@pytest.mark.parametrize("harm", [not_undone, not_orthogonal, band_off_by_one, window_off_by_one, padding_ignored])
def test_a_broken_conversion_is_refused(
    harm: Callable[[pytest.MonkeyPatch], None],
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    harm(monkeypatch)
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--passes", EXACT, "--target", target]) == 2
    said = capsys.readouterr().err
    assert "the converted model is wrong on CPU: its results differ by" in said
    assert said.endswith("; nothing was written\n")
    assert not any(tmp_path.iterdir())


def test_a_conversion_wrong_at_bf16_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """At f32 a number comes back when another is added and taken away; at bf16 it drowns."""
    if ov.Core().get_property("CPU", "INFERENCE_PRECISION_HINT") != ov.Type.bf16:
        pytest.skip("this CPU does not compute in bf16 by itself")
    insert, op = ovtq.passes.rotate_heads.insert_after, ov.opset15

    def drowned(old: ov.Output, make: Callable[[ov.Output], ov.Node]) -> ov.Output:
        def there_and_back(value: ov.Output) -> ov.Node:
            same = np.eye(value.get_partial_shape()[3].get_length(), dtype=np.float32)
            return op.subtract(op.matmul(op.add(make(value), np.float32(64)), same, False, False), np.float32(64))

        return insert(old, there_and_back)

    monkeypatch.setattr(ovtq.passes.rotate_heads, "insert_after", drowned)
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--preset", "rotate"]) == 2
    assert "the converted model is wrong on CPU as hosts load it, with no property (bf16" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


WRONG = "the converted model is wrong on CPU: "


def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What a conversion says that fails, and leaves nothing behind."""
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), *options]) == 2
    assert not any(tmp_path.iterdir())
    return capsys.readouterr().err


@pytest.mark.parametrize("target", ["gpu", "cpu"])
@pytest.mark.parametrize(
    "harm", [scales_too_large, packed_in_another_order, tokens_counted_twice, not_causal, sink_not_centred]
)
def test_a_broken_packed_cache_is_refused(
    harm: Callable[[pytest.MonkeyPatch], None],
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    harm(monkeypatch)
    assert WRONG in refusal(tmp_path, capsys, "--preset", "k6v4", "--residual-window", "16", "--target", target)


@pytest.mark.parametrize("harm", [scales_stay_where_they_are, scales_of_another_layer, scales_joined_in_another_order])
def test_scales_of_all_layers_that_are_mixed_up_are_refused(
    harm: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    harm(monkeypatch)
    assert WRONG in refusal(tmp_path, capsys, "--preset", "k6v4", "--residual-window", "16", "--target", "cpu")


@pytest.mark.parametrize("target", ["gpu", "cpu"])
@pytest.mark.parametrize("bits", [(), pytest.param(("--v-bits", "none"), marks=pytest.mark.slow)])
def test_a_single_packed_layer_is_right_and_forgets(target: str, bits: tuple[str, ...], tmp_path: Path) -> None:
    """Its states have no others of their shape."""
    flags = ["--preset", "k6v4", "--residual-window", "16", "--protect", "last:1", "--target", target, *bits]
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), *flags]) == 0


def test_rows_that_outlive_a_reset_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As they do if nothing but ReadValue reads what a growing state starts from."""

    def append(self: GrowingState, new: ov.Output) -> None:
        self.appended = ov.opset15.concat([self.past, new], 2).output(0)

    monkeypatch.setattr(GrowingState, "append", append)
    said = refusal(tmp_path, capsys, "--preset", "k6v4", "--residual-window", "16", "--target", "cpu")
    assert re.search(rf"a step of \d+ tokens failed|{WRONG}", said)


@pytest.mark.parametrize(
    "harm",
    [
        window_scales_too_large,
        window_not_turned_back,
        window_lags,
        heads_in_the_wrong_order,
        beams_mixed_up,
        window_off_by_one,
        padding_ignored,
    ],
)
def test_a_broken_packed_window_is_refused(
    harm: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    harm(monkeypatch)
    assert WRONG in refusal(tmp_path, capsys, "--preset", "exact", "--window-bits", "8,4", "--target", "cpu")


def test_packed_layers_are_held_to_numpy_where_they_read_codes(convert: Callable[..., Path]) -> None:
    found = json.loads((convert(TINY["5.5"], "--preset", "k6v4", verified=True) / io.RECORD).read_text())["verified"]
    assert found["packed"]["layers"] == 2
    assert found["packed"]["positions"] > 50
    assert 0 < found["packed"]["relative"] <= TOLERANCE
    assert 0 < found["packed"]["kld"] < 0.1
    assert found["positions"] > 50


def _pair(folder: Path) -> tuple[Path, Path]:
    return TINY["5.5"] / "openvino_model.xml", folder / "openvino_model.xml"


def test_rotation_survives_saving_and_reading_back(tmp_path: Path) -> None:
    """A file merges equal constants; the CPU plugin has confused two products over one matrix because of it."""
    model, description = load(TINY["5.5"])
    rewrite = RotateHeads().apply(model, description)
    ov.save_model(rewrite.model, tmp_path / "openvino_model.xml", compress_to_fp16=False)
    found = verify(*_pair(tmp_path), load(TINY["5.5"])[1].layers, "CPU", 1, Scope(4))
    assert found.relative <= TOLERANCE


def test_a_scale_wrong_by_one_in_ten_thousand_is_caught(tmp_path: Path) -> None:
    model, description = load(TINY["5.5"])
    decoupled = DecoupleLength().apply(model, description)
    wrong = {
        layer.index: dataclasses.replace(layer, scale=layer.scale * 1.0001) for layer in decoupled.description.sliding
    }
    rewrite = TruncateWindow().apply(decoupled.model, decoupled.description.with_layers(wrong))
    ov.save_model(rewrite.model, tmp_path / "openvino_model.xml", compress_to_fp16=False)
    with pytest.raises(VerificationFailed, match="wrong on CPU") as error:
        verify(*_pair(tmp_path), load(TINY["5.5"])[1].layers, "CPU", 0, Scope(4))
    assert "written" not in str(error.value)  # by a program that only asked


def _ill_conditioned(folder: Path, harm: float = 1.0) -> tuple[Path, Path]:
    """A model whose logits lose what is small, and its rotation, with scores of sliding layers times `harm`."""
    pair = (folder / "original.xml", folder / "converted.xml")
    for path in pair:
        model, description = load(TINY["5.5"])
        result = model.get_results()[0]
        logits = result.input_value(0)
        above = ov.opset15.abs(ov.opset15.add(logits, np.float32(1 << 12)))
        result.input(0).replace_source_output(ov.opset15.subtract(above, np.float32(1 << 12)).output(0))
        if path is pair[1]:
            model = RotateHeads().apply(model, description).model
            for layer in description.sliding if harm != 1 else ():
                node = layer.context.get_node()
                node.input(4).replace_source_output(ov.opset15.constant(np.float32(layer.scale * harm)).output(0))
        ov.save_model(model, path, compress_to_fp16=False)
    return pair


def test_a_model_that_rounding_moves_far_is_held_to_that(tmp_path: Path) -> None:
    """As models with real weights are: a right conversion passes, one that is wrong by 1 in 300 does not."""
    layers = load(TINY["5.5"])[1].layers
    found = verify(*_ill_conditioned(tmp_path), layers, "CPU", 0, Scope(4))
    assert found.rounding
    assert TOLERANCE < found.relative <= found.tolerance < 1e-2
    with pytest.raises(VerificationFailed, match="wrong on CPU"):
        verify(*_ill_conditioned(tmp_path, 1.003), layers, "CPU", 0, Scope(4))


@pytest.mark.slow
def test_ties_in_a_router_are_no_difference(exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this seed two experts of the bundled model are 8e-7 apart: rounding decides which one answers."""
    monkeypatch.setattr(ovtq.verification.verify, "PASTED", PASTED)
    found = verify(MINI / "openvino_model.xml", exact / "openvino_model.xml", load(MINI)[1].layers, "CPU", 23, Scope(6))
    assert (found.seed, found.skipped > 50, found.relative <= TOLERANCE) == (23, True, True)
    shown = [call.tokens * call.batch - call.pad * (call.batch - 1) for call in calls_for(load(MINI)[1].layers)]
    assert found.positions + found.skipped == sum(shown)


def test_what_follows_a_tie_is_not_compared() -> None:
    results, shown = np.arange(8, dtype=np.float32).reshape(1, 4, 2), np.ones((1, 4), bool)
    other = results.copy()
    other[0, 2:] = 9
    usable = np.array([[True, True, False, False]])
    found = compare([played(results, shown, usable)], [played(other, shown, shown)], 1)
    assert (found.largest, found.positions, found.skipped) == (0, 2, 2)
    assert compare([played(results, shown, shown)], [played(other, shown, shown)], 1).largest == 5


def test_a_router_tie_is_seen() -> None:
    logits = np.array([[3, 1, 2, 1], [3, 1, 2, 2 - 1e-7], [1, 1, 0, 3]], np.float32)
    assert undecided(logits, 2).tolist() == [False, True, True]
    assert undecided(logits, 1).tolist() == [False, False, False]
    assert undecided(logits, 4).tolist() == [False, False, False]  # all are chosen


def test_not_a_number_never_passes() -> None:
    good, bad = np.float32([[1, 2, 4], [4, 1, 2]]), np.full((2, 3), np.nan, np.float32)
    shown = np.ones((1, 2), bool)
    found = compare([played(good[None], shown, shown)], [played(bad[None], shown, shown)], 1)
    assert found.largest == math.inf
    assert not found.relative <= TOLERANCE


@pytest.mark.parametrize("window", [1, 2, 16, 128, 4096])
def test_the_schedule_reaches_every_case(window: int) -> None:
    calls = edges(window)
    text = [call.tokens for call in calls[: [call.reset for call in calls].index(True, 1)]]
    assert text[0] < max(window, 2) < sum(text)  # from within the window to beyond it …
    assert text.count(1) > STEPS  # … by single tokens
    assert any(call.pad for call in calls)
    assert any(call.beams and call.beams != tuple(range(call.batch)) for call in calls)
    # a reset behind a call that read what it found, without a change of batch
    triples = zip(calls, calls[1:], calls[2:], strict=False)
    assert any(c.reset and not b.reset and a.batch == b.batch == c.batch for a, b, c in triples)
    assert all(isinstance(call, Call) and call.tokens > call.pad for call in calls)


@pytest.mark.parametrize("options", [["exact"], ["k6v4"], ["k6v4", "--budget", "128"], ["u8"]], ids=" ".join)
@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_every_length_of_every_form_is_passed(options: list[str], target: str) -> None:
    """Calls longer than each, the shortest and the longest twice in a row; and one as people paste them."""
    passes = pipeline.PRESETS[options[0]].on(target, pruned=options[1:] != [])
    if options[1:]:
        passes = pipeline.with_settings(pipeline.with_pruning(passes, target), ["prune-kv.budget=128"])
    layers = pipeline.run(*load(TINY["5.5"]), passes)[1].layers
    lengths, calls = lengths_of(layers), calls_for(layers)
    assert {16, 64 if target == "cpu" else 16} <= {*lengths, *(layer.window for layer in layers)}
    assert max(call.tokens for call in calls) == PASTED > 1000
    for length in lengths:
        assert any(call.tokens > length for call in calls), length
    pairs = {a.tokens for a, b in itertools.pairwise(calls) if a.tokens == b.tokens and not b.reset}
    assert {min(x for x in lengths if x > 1) + 1, max(x for x in lengths if x < PASTED) + 1} <= pairs
