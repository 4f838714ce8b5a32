"""Verifying the first layers alone, as of big models: what is run, and that it still finds what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import openvino as ov
import pytest
from conftest import TINY, load
from faults import not_orthogonal

from ovtq.cli.convert import main
from ovtq.errors import VerificationFailed
from ovtq.ir import io
from ovtq.passes import RotateHeads
from ovtq.verification.extent import cut, scope
from ovtq.verification.verify import TOLERANCE, verify


@pytest.mark.parametrize(("layers", "packed"), [(2, 1), (3, 2)])
def test_packed_windows_of_the_first_layers_alone(layers: int, packed: int, tmp_path: Path) -> None:
    """Layers that are not run share the states of those that are."""
    options = ["--preset", "exact", "--window-bits", "6,4", "--verify-layers", str(layers)]
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), *options]) == 0
    found = json.loads((tmp_path / "out" / io.RECORD).read_text())["verified"]["packed"]
    assert found["layers"] == packed
    assert 0 < found["relative"] <= TOLERANCE
    model = cut(io.load(tmp_path / "out"), scope(load(TINY["5.5"])[1], layers))
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert (kinds.count("TopK"), kinds.count("Assign")) == (layers - 1, 2 + 2 * (layers // 2))


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_the_first_packed_layers_alone(target: str, tmp_path: Path) -> None:
    """Its states are shared: what the layers left out would have written must not be what an earlier token was."""
    flags = ["--preset", "k6v4", "--residual-window", "16", "--target", target, "--verify-layers", "2"]
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), *flags]) == 0
    found = json.loads((tmp_path / "out" / io.RECORD).read_text())["verified"]
    assert (found["layers"], found["packed"]["layers"]) == (2, 1)


@pytest.mark.parametrize("layers", [2, 3])
def test_the_first_layers_alone(layers: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What big models are verified by: a right conversion passes, one that is wrong in these layers does not."""
    model, description = load(tiny)
    extent = scope(description, layers)
    assert (extent.layers, extent.end is None) == (layers, False)
    pair = (tiny / "openvino_model.xml", tmp_path / "openvino_model.xml")
    rewrite = RotateHeads().apply(model, description)
    ov.save_model(rewrite.model, pair[1], compress_to_fp16=False)
    found = verify(*pair, description.layers, "CPU", 0, extent)
    assert (found.layers, found.relative <= TOLERANCE) == (layers, True)
    not_orthogonal(monkeypatch)
    model, description = load(tiny)
    ov.save_model(RotateHeads().apply(model, description).model, pair[1], compress_to_fp16=False)
    with pytest.raises(VerificationFailed, match="wrong on CPU"):
        verify(*pair, description.layers, "CPU", 0, extent)


@pytest.mark.parametrize("layers", [2, 3])
def test_a_cut_model_holds_no_later_layers(layers: int, tiny: Path, convert: Callable[..., Path]) -> None:
    """Else verifying four layers of a big model would need the memory of all: the truncated layers share one state."""
    converted = convert(tiny, "--preset", "exact")
    extent = scope(load(tiny)[1], layers)
    for folder in (tiny, converted):
        kinds = [node.get_type_name() for node in cut(io.load(folder), extent).get_ops()]
        assert kinds.count("TopK") == layers - 1  # one router a layer, behind its attention
        assert kinds.count("Assign") == (2 * layers if folder == tiny else 1 + 2 * (layers // 2))
    xml = "openvino_model.xml"
    assert verify(tiny / xml, converted / xml, load(tiny)[1].layers, "CPU", 0, extent).relative <= TOLERANCE


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        ["k6v4"],
        ["k6v4", "--target", "cpu"],
        ["k6v4", "--target", "cpu", "--budget", "128"],
        ["k4v4", "--target", "cpu"],
        ["exact", "--target", "cpu", "--window-bits", "6,4"],
    ],
    ids=" ".join,
)
def test_nor_does_one_whose_layers_share_packed_states(
    options: list[str], layers: int, convert: Callable[..., Path]
) -> None:
    """Scales of all layers are joined as vectors, rings by their heads."""
    converted = convert(TINY["5.5"], "--preset", *options, "--no-verify")
    model = cut(io.load(converted), scope(load(TINY["5.5"])[1], layers))
    assert [node.get_type_name() for node in model.get_ops()].count("TopK") == layers - 1


def test_never_without_what_tells_the_past_length(tiny: Path) -> None:
    """The cache of the first full layer, which is the second."""
    assert scope(load(tiny)[1], 1) == scope(load(tiny)[1], 2)
