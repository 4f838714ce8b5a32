"""Faults that are planted in what conversions make, and that verification must find."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import openvino as ov
import pytest

import ovtq.codec.packing
import ovtq.forms.attend
import ovtq.forms.cpu.full
import ovtq.forms.window
import ovtq.forms.window_state
import ovtq.passes.rotate_heads
import ovtq.verification.verify
from ovtq.codec.packing import Layout
from ovtq.forms.attend import Columns, FullCacheSpec
from ovtq.forms.basis_nodes import Matrices
from ovtq.forms.beams import Beams
from ovtq.forms.cpu import window as cpu_window
from ovtq.forms.cpu.beams import CpuBeams
from ovtq.forms.gpu import window as gpu_window
from ovtq.forms.gpu.beams import GpuBeams
from ovtq.passes import RotateHeads, TruncateWindow
from ovtq.states import StateSpec


def not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ovtq.passes.rotate_heads, "insert_after", lambda old, make: old)
    monkeypatch.setattr(RotateHeads, "ensures", lambda self, rewrite: None)


def not_orthogonal(monkeypatch: pytest.MonkeyPatch) -> None:
    inverse = Matrices.inverse
    monkeypatch.setattr(Matrices, "inverse", lambda *args: ov.opset15.multiply(inverse(*args), np.float32(1.001)))


def band_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, between = ovtq.forms.window.seen, cpu_window._between

    def shifted(queries: int, keys: int, window: int) -> np.ndarray:
        right = seen(queries, keys, window)
        return np.roll(right, 1, axis=1) & right

    for form in (cpu_window, gpu_window):
        monkeypatch.setattr(form, "seen", shifted)
    monkeypatch.setattr(cpu_window, "_between", lambda a, b, above, last: between(a, b, above + 1, last))


def window_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    run = TruncateWindow.run

    def narrow(self: TruncateWindow, model: ov.Model, description: object) -> object:
        layers = {layer.index: dataclasses.replace(layer, window=layer.window - 1) for layer in description.sliding}
        return run(self, model, description.with_layers(layers))

    monkeypatch.setattr(TruncateWindow, "run", narrow)


def padding_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    op, pad = ov.opset15, ov.opset15.pad

    def all_shown(padded: ov.Node, *rest: object) -> ov.Node:
        is_mask = padded.get_output_element_type(0) == ov.Type.i64 if isinstance(padded, ov.Node) else True
        return pad(op.maximum(padded, op.constant(np.int64(1))) if is_mask else padded, *rest)

    monkeypatch.setattr(cpu_window.op, "pad", all_shown)


def scales_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ovtq.forms.attend.encode

    def louder(*args: object) -> tuple[ov.Node, ov.Node]:
        codes, scale = encode(*args)
        return codes, ov.opset15.multiply(scale, np.float32(1.1))

    monkeypatch.setattr(ovtq.forms.attend, "encode", louder)


def packed_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = dict(ovtq.codec.packing._FIELDS)
    fields[6] = (fields[6][0], *((*field[:4], 6, low) for field, low in zip(fields[6][1:], (4, 2, 0), strict=True)))
    pack = ovtq.forms.attend.pack

    def other(centred: ov.Node, codecs: list, layouts: list) -> list[ov.Node]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ovtq.codec.packing, "_FIELDS", fields)
            layouts = [ovtq.codec.packing.layout.__wrapped__(layout.bits, layout.head_dim) for layout in layouts]
        return pack(centred, codecs, layouts)

    monkeypatch.setattr(ovtq.forms.attend, "pack", other)


def tokens_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest recent token, in the history too (gpu), or the youngest of the history among the recent (cpu)."""
    history, recent = Columns.history_mask, Columns.recent_tokens

    def wider(self: Columns, older: ov.Node, columns: ov.Node | None = None) -> ov.Node:
        return history(self, older if columns is None else ov.opset15.minimum(older + 1, columns), columns)

    monkeypatch.setattr(Columns, "history_mask", wider)
    monkeypatch.setattr(
        Columns, "recent_tokens", lambda self, older: recent(self, ov.opset15.maximum(older - 1, older * 0))
    )


def not_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, limits = Columns.recent_mask, Columns.limits
    monkeypatch.setattr(Columns, "recent_mask", lambda self, *args: mask(self, *args[:2], args[2] + 1, args[3]))
    monkeypatch.setattr(Columns, "limits", lambda self, tokens: limits(self, tokens) - 1)


def sink_not_centred(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = property(lambda self: np.concatenate([0 * self.centre(layer) for layer in self.layers]))
    monkeypatch.setattr(FullCacheSpec, "sink_rows", zeros)


def scales_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes follow their beams, what layers read of the scales does not."""
    groups = CpuBeams.in_groups

    def deaf(self: CpuBeams, *some: object) -> list[ov.Output]:
        other = copy.copy(self)
        other.index, other._pairs = ov.opset15.multiply(self.index, np.int32(0)), {}
        return groups(other, *some)

    monkeypatch.setattr(CpuBeams, "in_groups", deaf)


def scales_of_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = CpuBeams.in_groups
    monkeypatch.setattr(CpuBeams, "in_groups", lambda self, *some: groups(self, *some)[::-1])


def scales_joined_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ovtq.forms.cpu.full._Scales.store

    def late(self: ovtq.forms.cpu.full._Scales, *rest: object) -> ov.Node:
        self.joined = dict(zip(self.joined, reversed(self.joined.values()), strict=True))
        return store(self, *rest)

    monkeypatch.setattr(ovtq.forms.cpu.full._Scales, "store", late)


def window_scales_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for beams in (CpuBeams, GpuBeams):

        def louder(
            self: Beams, packed: ov.Output, layout: Layout, scales: ov.Output, rotation: np.ndarray,
            dequantize: Callable[..., ov.Node] = beams.dequantize,
        ) -> ov.Node:  # fmt: skip
            return dequantize(self, packed, layout, ov.opset15.multiply(scales, np.float32(1.1)).output(0), rotation)

        monkeypatch.setattr(beams, "dequantize", louder)


def window_not_turned_back(monkeypatch: pytest.MonkeyPatch) -> None:
    eye = np.eye(64, dtype=np.float32)
    for beams in (CpuBeams, GpuBeams):

        def crooked(
            self: Beams, packed: ov.Output, layout: Layout, scales: ov.Output, rotation: np.ndarray,
            dequantize: Callable[..., ov.Node] = beams.dequantize,
        ) -> ov.Node:  # fmt: skip
            return dequantize(self, packed, layout, scales, eye)

        monkeypatch.setattr(beams, "dequantize", crooked)


def window_lags(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows kept are those of one token before."""
    store = ovtq.forms.window_state.FixedState.store

    def late(self: ovtq.forms.window_state.FixedState, new: ov.Node) -> ov.Node:
        self.kept = ov.opset15.maximum(self.kept - 1, self.kept * 0)
        return store(self, new)

    monkeypatch.setattr(ovtq.forms.window_state.FixedState, "store", late)


def heads_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read, not stored, as if keys and values of a layer stood side by side."""
    monkeypatch.setattr(ovtq.forms.window_state.np, "argsort", lambda order: np.arange(len(order)))


def beams_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes follow their beams, scales do not."""
    init = ovtq.forms.window_state.FixedState.__init__

    def deaf(self: ovtq.forms.window_state.FixedState, beams: Beams, state: StateSpec, *rest: object) -> None:
        if state.holds == "scale":
            beams = copy.copy(beams)
            beams.index, beams._pairs = ov.opset15.multiply(beams.index, np.int32(0)), {}
        init(self, beams, state, *rest)

    monkeypatch.setattr(ovtq.forms.window_state.FixedState, "__init__", deaf)
