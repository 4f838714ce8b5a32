"""Faults planted in what prune-kv writes: verification refuses each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import TINY

import ovtq.forms.cpu.prune
import ovtq.forms.gpu.histories
import ovtq.forms.gpu.prune
from ovtq.cli.convert import main
from ovtq.forms.beams import Beams
from ovtq.forms.cpu.block import HistoryMask
from ovtq.forms.pruning import VISIBLE_ABOVE
from ovtq.forms.scores import Arriving
from ovtq.forms.scores.keydiff import KeyDiff
from ovtq.states import SCORE, StateSpec


def _flipped(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = KeyDiff.nodes

    def flipped(self: KeyDiff, call: Arriving) -> tuple[ov.Node, list[ov.Node]]:
        score, assigns = nodes(self, call)
        return ov.opset15.negative(score), assigns

    monkeypatch.setattr(KeyDiff, "nodes", flipped)


def _prefix_not_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ovtq.forms.cpu.prune, "FIRST", VISIBLE_ABOVE + 1)


def _one_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ovtq.forms.cpu.prune._best
    monkeypatch.setattr(ovtq.forms.cpu.prune, "_best", lambda scores, room, over: chosen(scores, room - 1, over))


def _mask_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = ovtq.forms.cpu.prune.CpuEviction._masks

    def shifted(self: ovtq.forms.cpu.prune.CpuEviction) -> dict[int, HistoryMask]:
        op, by_one = ov.opset15, ov.opset15.constant(np.int64([-1]))
        return {
            index: mask.filled([op.roll(x, by_one, op.constant(np.int64([3]))).output(0) for x in mask.flatten()])
            for index, mask in masks(self).items()
        }

    monkeypatch.setattr(ovtq.forms.cpu.prune.CpuEviction, "_masks", shifted)


def _before(row: ov.Output) -> ov.Output:
    op, one = ov.opset15, ov.opset15.constant(np.int32(1))
    return op.subtract(op.maximum(row, one), one).output(0)


def _rows_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evicting takes the neighbour of each row that should stay, but for the scores."""
    finish = ovtq.forms.cpu.prune.CpuEviction.finish

    def shifted(self: ovtq.forms.cpu.prune.CpuEviction) -> tuple:
        rows, assigns = finish(self)
        return {index: _before(row) for index, row in rows.items()}, assigns

    monkeypatch.setattr(ovtq.forms.cpu.prune.CpuEviction, "finish", shifted)


def _beams_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores stay with their row of the batch when the tokens move."""
    init = ovtq.forms.cpu.prune.GrowingState.__init__

    def deaf(self: ovtq.forms.cpu.prune.GrowingState, beams: Beams, state: StateSpec) -> None:
        if state.name == SCORE:
            op, beams = ov.opset15, copy.copy(beams)
            count = op.squeeze(op.shape_of(beams.index, "i32"), op.constant(np.int64([0])))
            beams.index = op.range(op.constant(np.int32(0)), count, op.constant(np.int32(1)), "i32")
            beams._pairs = {}
        init(self, beams, state)

    form = ovtq.forms.cpu.prune
    monkeypatch.setattr(form, "GrowingState", type("GrowingState", (form.GrowingState,), {"__init__": deaf}))


def _best_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the GPU's form a step evicts the best token, not the worst."""
    but_one = ovtq.forms.gpu.prune.GpuEviction._but_one

    def wrong(self: ovtq.forms.gpu.prune.GpuEviction, rivals: ov.Output) -> ov.Node:
        return but_one(self, ov.opset15.negative(rivals).output(0))

    monkeypatch.setattr(ovtq.forms.gpu.prune.GpuEviction, "_but_one", wrong)


def _worst_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the GPU's form a longer call takes the tokens of lowest score."""
    best = ovtq.forms.gpu.prune.best
    monkeypatch.setattr(
        ovtq.forms.gpu.prune, "best", lambda scores, room: best(ov.opset15.negative(scores).output(0), room)
    )


def _places_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values, but not scores, of the neighbours of those that stay."""
    store = ovtq.forms.gpu.histories._Stack.store
    monkeypatch.setattr(
        ovtq.forms.gpu.histories._Stack, "store", lambda self, new, rows: store(self, new, _before(rows).get_node())
    )


def _miscounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the counter is wrong: it counts padding."""
    monkeypatch.setattr(ovtq.forms.cpu.prune, "VISIBLE_ABOVE", ovtq.forms.cpu.prune.EMPTY)


FLAGS = ["--preset", "exact", "--target", "cpu", "--budget", "48", "--recent-window", "16", "--slack", "7"]
ON_GPU = ["--target", "gpu", "--slack", "0"]


@pytest.mark.parametrize(
    ("harm", "flags"),
    [
        (_flipped, []),
        (_prefix_not_protected, []),
        pytest.param(_one_too_few, ["--mode", "mask"], marks=pytest.mark.slow),
        (_mask_off_by_one, ["--mode", "mask"]),
        (_rows_off_by_one, []),
        pytest.param(_beams_ignored, [], marks=pytest.mark.slow),
        pytest.param(_miscounted, [], marks=pytest.mark.slow),
        (_best_kept, ON_GPU),
        pytest.param(_worst_sorted, ON_GPU, marks=pytest.mark.slow),
        pytest.param(_places_off_by_one, ON_GPU, marks=pytest.mark.slow),
    ],
)
def test_a_broken_pruning_is_refused(
    harm: Callable[[pytest.MonkeyPatch], None],
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    harm(monkeypatch)
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), *FLAGS, *flags]) == 2
    assert "the converted model is wrong on CPU: " in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
