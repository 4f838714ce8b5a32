"""Faults that only show as hosts load a model: at its own precision, in long calls, in the second call of a shape."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import ROOT, TINY
from openvino import opset15 as op

sys.path.insert(0, str(ROOT / "tools"))
import make_synthetic as synthetic

import ovtq.forms.cpu.full
import ovtq.passes.check_call
import ovtq.states
from ovtq.cli.convert import main
from ovtq.errors import InputError, VerificationFailed
from ovtq.forms.cpu.window import BLOCK, CpuWindow
from ovtq.ir.graph import MASKED, f32, i64, new_variable
from ovtq.states import StateSpec
from ovtq.verification.closeness import Loss, divergence, loss, lost, played, relative, scale_of, too_lossy
from ovtq.verification.hosts import _refuse, recurring
from ovtq.verification.schedule import Call
from ovtq.verification.verify import compare

Harm = Callable[[pytest.MonkeyPatch], None]
AS_HOSTS_LOAD_IT = "the converted model is wrong on CPU as hosts load it, with no property"


def needs_bf16() -> None:
    if ov.Core().get_property("CPU", "INFERENCE_PRECISION_HINT") != ov.Type.bf16:
        pytest.skip("this CPU does not compute in bf16 by itself")


def after_init(monkeypatch: pytest.MonkeyPatch, change: Callable[[CpuWindow], None]) -> None:
    init = CpuWindow.__init__

    def changed(self: CpuWindow, *args: object) -> None:
        init(self, *args)
        change(self)

    monkeypatch.setattr(CpuWindow, "__init__", changed)


def _masks_that_cancel(monkeypatch: pytest.MonkeyPatch, block: int | None = None) -> None:
    """The sink's column is no token, so it is masked, and then raised by as much: in all blocks but a call's last.

    0 at f32. At bf16 the plugin rounds what a Select gives, not a constant. The Unsqueeze between the two keeps it from
    computing both in one node, at f32.
    """

    def change(rows: CpuWindow) -> None:
        sink = np.arange(rows.width) == 0
        number = op.reshape(
            op.range(i64(0), op.squeeze(rows.trips, i64([0])), i64(1), "i64"), i64([1, -1, 1, 1]), False
        )
        here = op.greater_equal(number, i64(0)) if block is None else op.equal(number, i64(block))
        mask = op.squeeze(rows.block_mask, i64([1, 3]))
        lowered = op.select(op.logical_and(here, op.constant(sink)), f32(MASKED), mask)
        raised = f32(np.where(sink, -MASKED, np.float32(0)))
        rows.block_mask = op.minimum(op.add(op.unsqueeze(lowered, i64([1, 3])), raised), f32(0))

    after_init(monkeypatch, change)


def _masks_that_cancel_in_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in the fourth block of 64 queries alone: in 64 positions of a call of 1,025."""
    _masks_that_cancel(monkeypatch, block=3)


def _scores_that_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores carry an offset that softmax does not see at f32, and that they drown in at bf16."""

    def change(rows: CpuWindow) -> None:
        rows.mask, rows.block_mask = (op.add(mask, f32(1024)) for mask in (rows.mask, rows.block_mask))

    after_init(monkeypatch, change)


def _second_of_equal_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of more than a block, as long as the call before, weighs the sink of its last queries otherwise."""

    def change(rows: CpuWindow) -> None:
        variable, store = new_variable(StateSpec.fixed("fault", "i32", [1], "past", rows=1)), rows.tokens.store
        new = op.convert(op.reshape(rows.columns, i64([1, 1]), False), "i32")
        before = op.read_value(op.multiply(new, op.constant(np.int32(0))), variable)
        again = op.logical_and(op.equal(before, new), op.greater(rows.trips, i64([0])))
        column = op.range(i64(0), op.squeeze(rows.columns, i64([0])), i64(1), "i64")
        raised = op.select(op.logical_and(op.squeeze(again, i64([0])), op.equal(column, i64(0))), f32(100), f32(0))
        rows.sinks = {index: op.add(sinks, raised) for index, sinks in rows.sinks.items()}
        monkeypatch.setattr(rows.tokens, "store", lambda: [*store(), op.assign(new, variable)])

    after_init(monkeypatch, change)
    monkeypatch.setattr(ovtq.states, "other_than", lambda specs, infos: "")


def _later_blocks_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks but the first read keys one row late: calls of no more than two blocks are right."""

    def change(rows: CpuWindow) -> None:
        begin = op.slice(rows.index, i64([0]), i64([2**31 - 1]), i64([1]), i64([1]))
        late = op.greater(op.slice(begin, i64([1]), i64([2]), i64([1]), i64([1])), i64(BLOCK + 1))
        rows.index = op.subtract(rows.index, op.convert(late, "i64"))

    after_init(monkeypatch, change)


def test_an_original_whose_cache_is_compressed_excuses_nothing(tmp_path: Path) -> None:
    """P60: a CPU compresses the cache where weights are compressed, and what follows a short text would be garbage."""
    synthetic.make(tmp_path / "model", "llama3-tiny", layers=2, tokenizer=False)
    assert main([str(tmp_path / "model"), str(tmp_path / "out"), "--preset", "exact"]) == 0
    host = json.loads((tmp_path / "out" / "ovtq.json").read_text(encoding="utf-8"))["verified"]["host"]
    assert host["cache"] == "u8"
    assert host["original"]["largest"] < 0.1


@pytest.mark.parametrize(
    "harm",
    [pytest.param(_masks_that_cancel, marks=pytest.mark.slow), _masks_that_cancel_in_one_block, _scores_that_round],
)
def test_what_is_wrong_as_hosts_load_it_alone_is_refused(
    harm: Harm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    needs_bf16()
    harm(monkeypatch)
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--preset", "exact", "--target", "cpu"]) == 2
    assert AS_HOSTS_LOAD_IT in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_what_is_wrong_beyond_a_block_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _later_blocks_shifted(monkeypatch)
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--preset", "exact", "--target", "cpu"]) == 2
    assert "the converted model is wrong on CPU: its results differ by" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_what_is_wrong_in_the_second_of_equal_calls_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _second_of_equal_calls(monkeypatch)
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--preset", "exact", "--target", "cpu"]) == 2
    assert "the converted model is wrong on CPU: its results differ by" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_a_call_that_must_be_refused_is_tried(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With a check that lets everything pass, some other node fails, and leaves its shapes behind; or none does."""

    class Lenient:
        def __getattr__(self, name: str) -> object:
            return getattr(op, name)

        def variadic_split(self, ids: ov.Node, axis: ov.Node, lengths: ov.Node) -> ov.Node:
            return op.slice(ids, i64([0]), lengths, i64([1]), i64([1]))

    monkeypatch.setattr(ovtq.passes.check_call, "op", Lenient())
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--preset", "exact", "--target", target]) == 2
    said = capsys.readouterr().err
    assert "it takes a call whose attention_mask is too short" in said or "tokens failed" in said


class Refusing:
    """Stands for a Runner whose results behind a refused call are `apart` from those before, as a share."""

    def __init__(self, apart: float) -> None:
        self.results = np.random.RandomState(0).standard_normal((1, 65, 32)).astype(np.float32)
        self.apart = apart

    def reset(self) -> None:
        self.mask = None

    def step(self, ids: np.ndarray, shown: np.ndarray | None = None) -> np.ndarray:
        if shown is not None:
            raise InputError("refused")
        self.results, before = self.results * np.float32(1 + self.apart), self.results
        return before


@pytest.mark.parametrize(
    ("device", "apart", "accepted"),
    [("CPU", 0, True), ("CPU", 1e-4, False), ("GPU", 1e-4, True), ("GPU.0", 1e-4, True), ("GPU", 0.1, False)],
)
def test_behind_a_refused_call_a_gpu_may_round_otherwise(device: str, apart: float, accepted: bool) -> None:
    """It swaps kernels while it runs; a state that a refused call left changed is further away than rounding is."""
    if accepted:
        _refuse(Refusing(apart), 32, device, 1e-2)
    else:
        with pytest.raises(VerificationFailed, match="after a call that it refuses it says something else"):
            _refuse(Refusing(apart), 32, device, 1e-2)


# ------------------------------------------------------------------------------------ how far apart


def normal(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


def test_the_scale_of_results_is_that_of_most() -> None:
    results = normal(5, 4000)
    middle, scale = scale_of(results)
    assert np.allclose(middle, 0, atol=0.2)
    assert (scale > 3).all()
    results[:, 7] = -1e9
    assert np.allclose(scale_of(results)[1], scale, rtol=0.2)


def test_differences_are_shares_of_it() -> None:
    expected = normal(5, 4000)
    _, scale = scale_of(expected)
    got = expected.copy()
    got[2, 3] += 0.1 * np.median(scale)
    assert relative(expected, got).max() == pytest.approx(0.1, rel=1e-3)
    expected[:, 7] = got[:, 7] = -np.inf
    assert relative(expected, got).max() == pytest.approx(0.1, rel=1e-3)
    got[0, 7] = 0
    assert relative(expected, got).max() == np.inf
    got[0, 7] = np.nan
    assert relative(expected, got).max() == np.inf


@pytest.mark.parametrize("low", [0, -1e9, -np.inf])
def test_what_a_position_loses(low: float) -> None:
    expected = normal(1, 6, 4000)
    got = expected + 0.25 * normal(1, 6, 4000)[:, ::-1]
    before = lost(expected, got)
    expected[..., 11] += low
    got[..., 11] += low
    assert np.allclose(lost(expected, got), before, rtol=0.01)
    assert np.allclose(before, 0.25, atol=0.02)
    got[0, 0, 5] = np.nan
    got[0, 1, 11] = 0 if low else np.inf
    assert np.isinf(lost(expected, got)[0, :2]).all()


def test_a_constant_output_is_nothing_to_compare() -> None:
    same = [played(np.ones((1, 9, 4), np.float32), np.ones((1, 9), bool), np.ones((1, 9), bool))]
    with pytest.raises(VerificationFailed, match="the same results for all tokens"):
        compare(same, same, 1)


def test_how_many_positions_are_wrong_is_seen() -> None:
    """64 of 1,024 that a mean hides; or every call's first, or last; or calls of one token."""
    calls = [Call(512), Call(1), Call(511)]
    shown = [np.ones((1, call.tokens), bool) for call in calls]

    def summary(change: Callable[[list[np.ndarray]], None]) -> Loss:
        losses = [np.full((1, call.tokens), 0.005) for call in calls]
        change(losses)
        return loss(calls, losses, shown)

    right = none = summary(lambda losses: None)
    assert too_lossy(right, right, none, chooses=False) is None
    for expected, index, where, chooses in (
        ("at one position in a hundred", 0, slice(64, 128), True),
        ("at 16 positions in a row", 0, slice(64, 73), True),
        ("at the first position", slice(0, 3, 2), slice(0, 1), True),
        ("at the last position", slice(0, 3, 2), slice(-1, None), True),
        ("in calls of one token", 1, slice(0, 1), True),
        ("at some position", 0, slice(77, 78), False),
    ):

        def spoil(losses: list[np.ndarray], index: object = index, where: slice = where) -> None:
            for some in losses[index] if isinstance(index, slice) else [losses[index]]:
                some[0, where] = 0.3

        assert expected in str(too_lossy(right, summary(spoil), none, chooses))


def test_divergence_of_equal_logits_is_none() -> None:
    logits = normal(3, 50)
    logits[:, 4] = -np.inf
    assert np.allclose(divergence(logits, logits), 0)
    assert np.allclose(divergence(logits, logits + 3), 0, atol=1e-6)


def test_an_expert_that_rounding_chose_does_not_recur() -> None:
    """What differs from text to text goes; what is wrong at the same positions of each stays."""
    quiet = [np.full((1, 8), 0.01), np.full((2, 1), 0.01)]
    chosen = [call.copy() for call in quiet]
    chosen[0][0, 3:] = 0.3
    assert all(np.array_equal(a, b) for a, b in zip(recurring([chosen, quiet]), quiet, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(recurring([quiet, chosen, quiet]), quiet, strict=True))
    wrong = [call.copy() for call in quiet]
    wrong[1][1] = 0.2
    assert recurring([wrong, chosen, wrong])[1].tolist() == [[0.01], [0.2]]
    assert all(np.array_equal(a, b) for a, b in zip(recurring([wrong]), wrong, strict=True))
