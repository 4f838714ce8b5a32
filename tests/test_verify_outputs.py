"""Verification of models whose outputs are odd: a right conversion passes, a wrong one is refused all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import TINY
from faults import band_off_by_one
from openvino import opset15 as op
from test_verify_host import normal

from ovtq.cli.convert import main
from ovtq.verification.closeness import relative, scale_of

VOCABULARY = 256


def of_logits(change: Callable[[ov.Output], ov.Node]) -> Callable[[ov.Model], None]:
    """The logits are what `change` makes of them."""

    def changed(model: ov.Model) -> None:
        result = model.get_results()[0]
        source = result.input_value(0)
        names = source.get_names()
        source.set_names(set())
        made = change(source).output(0)
        made.set_names(names)
        result.input(0).replace_source_output(made)

    return changed


def plus(values: dict[int, float]) -> Callable[[ov.Model], None]:
    """Some tokens have a number added to their logits."""
    bias = np.zeros(VOCABULARY, np.float32)
    for token, value in values.items():
        bias[token] = value
    return of_logits(lambda logits: op.add(logits, op.constant(bias)))


def times(factor: float) -> Callable[[ov.Model], None]:
    return of_logits(lambda logits: op.multiply(logits, op.constant(np.float32(factor))))


def alike(logits: ov.Output) -> ov.Node:
    """All logits of a position are their mean."""
    mean = op.reduce_mean(logits, op.constant(np.array([-1], np.int64)), keep_dims=True)
    return op.add(mean, op.constant(np.zeros(VOCABULARY, np.float32)))


def huge_channel(model: ov.Model) -> None:
    """One element of the hidden state is a thousand times all others, as in real models, from the first layer on."""
    found = [
        node for node in model.get_ops() if node.get_type_name() == "MatMul" and "o_proj" in node.get_friendly_name()
    ]
    weight = found[0].input_value(1).get_node()
    assert weight.get_type_name() == "Constant"
    values = np.array(weight.data, np.float32)
    values[3] *= 1000
    found[0].input(1).replace_source_output(op.constant(values).output(0))


OUTPUTS = {
    "tiny": times(1e-30),
    "huge": times(1e30),
    "one far above": plus({7: 1e9}),
    "one far below": plus({7: -1e9}),
    "infinities": plus({3: -np.inf, 7: -np.inf}),
    "infinite": plus({3: np.inf}),
    "half of them forbidden": plus(dict.fromkeys(range(100, 256), -np.inf)),
    "most of them forbidden": plus(dict.fromkeys(range(16, 256), -1e9)),
    "as far as f32 tells them": plus(dict.fromkeys(range(90, 256), -1e6)),
    "a huge channel": huge_channel,
}
FAST = ("tiny", "infinities", "as far as f32 tells them")


def made(model_dir: Path, change: Callable[[ov.Model], None]) -> None:
    """The tiny model with other outputs."""
    model = ov.Core().read_model(TINY["5.5"] / "openvino_model.xml")
    change(model)
    model.validate_nodes_and_infer_types()
    for name in ("openvino_model.xml", "openvino_model.bin"):
        (model_dir / name).unlink()
    ov.save_model(model, model_dir / "openvino_model.xml", compress_to_fp16=False)


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("output", [pytest.param(x, marks=[] if x in FAST else pytest.mark.slow) for x in OUTPUTS])
def test_odd_outputs_hide_nothing_and_refuse_nothing(
    output: str, wrong: bool, monkeypatch: pytest.MonkeyPatch, tiny_copy: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The fault: a window's mask that is one token too narrow."""
    made(tiny_copy, OUTPUTS[output])
    if wrong:
        band_off_by_one(monkeypatch)
    code = main([str(tiny_copy), str(tmp_path / "out"), "--preset", "exact", "--target", "cpu"])
    said = capsys.readouterr().err
    assert code == (2 if wrong else 0), said
    assert "the converted model is wrong on CPU: its results differ" in said or not wrong


@pytest.mark.parametrize(
    ("change", "reason"), [(of_logits(alike), "all logits of a position"), (times(1e-42), "the same results for all")]
)
def test_outputs_that_say_nothing_are_nothing_to_compare(
    change: Callable[[ov.Model], None], reason: str, tiny_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a mean of all logits rounding is all there is; what a CPU takes for zero is constant."""
    made(tiny_copy, change)
    assert main([str(tiny_copy), str(tmp_path / "out"), "--preset", "exact", "--target", "cpu"]) == 2
    assert reason in (said := capsys.readouterr().err)
    assert "there is nothing to compare" in said


@pytest.mark.parametrize("share", [0.1, 0.3, 0.55, 0.9])
@pytest.mark.parametrize("low", [-100.0, -65504.0, -1e6, -1e9, -1e30, -np.inf, 1e9])
def test_the_scale_is_that_of_what_differs(share: float, low: float) -> None:
    """Whatever share of a vocabulary is moved, by however much."""
    expected = normal(4, 4000)
    expected[:, : int(share * 4000)] += np.float32(low)
    assert (scale_of(expected)[1] < 8 if abs(low) > 100 else scale_of(expected)[1] < 110).all()
    got = expected.copy()
    got[1, -1] += 0.1
    assert relative(expected, got).max() > (5e-3 if abs(low) > 100 else 5e-4)
    assert relative(expected, expected).max() == 0


def test_the_scale_of_a_few() -> None:
    for numbers, scale in (([5, 6, 7.5], 1.5), ([5, 9], 4), ([5], 0), ([5, 5, 5], 0), ([], 0)):
        results = np.full((2, 50), -1e9, np.float32)
        results[:, 3 : 3 + len(numbers)] = numbers
        assert scale_of(results)[1].tolist() == pytest.approx([scale] * 2)
    assert scale_of(np.full((3, 50), np.nan, np.float32))[1].tolist() == [0, 0, 0]


def test_a_huge_element_is_held_to_itself_and_hides_no_other() -> None:
    """Of attention outputs, as a part of a model is compared."""
    expected = normal(5, 64)
    expected[:, 3] += 1e7
    rounded = expected * np.float32(1 + 2**-23)
    assert relative(expected, rounded).max() < 1e-5
    wrong = expected.copy()
    wrong[2, 9] += 0.01
    assert relative(expected, wrong).max() > 1e-3
    wrong = expected.copy()
    wrong[2, 3] *= np.float32(1.001)
    assert relative(expected, wrong).max() > 1e-3
