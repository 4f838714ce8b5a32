"""Calls that no host should make: refused without a trace, or answered as the exported model answers them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import TINY

from ovtq.passes.check_call import REFUSAL

PACKED = ["k6v4", "k6v4 --budget 128", "exact --window-bits 6,4"]
OPTIONS = [
    *(f"{preset} --target {target}" for preset in ("exact", "k6v4", "u8") for target in ("cpu", "gpu")),
    *(
        pytest.param(f"{some} --target {target}", marks=pytest.mark.slow)
        for some in PACKED[1:]
        for target in ("cpu", "gpu")
    ),
    *(pytest.param(f"{preset} --target cpu", marks=pytest.mark.slow) for preset in ("k8v4", "k4v4", "u4")),
    *(pytest.param(f"{preset} --target gpu", marks=pytest.mark.slow) for preset in ("k8v4", "k4v4", "u4")),
]
PRUNED = ["k6v4 --budget 128 --target gpu"]  # no cache there holds all tokens, so the mask tells how many there were
IDS = np.random.RandomState(0).randint(0, 256, (4, 400)).astype(np.int64)


@dataclass(frozen=True)
class Inputs:
    """What a host passes; by default what is right after `past` tokens."""

    ids: np.ndarray
    past: int = 0
    mask: tuple[int, int] | None = None  # its shape, where it is another
    positions: int | None = None
    beams: tuple[int, ...] | None = None

    def feed(self) -> dict[str, np.ndarray]:
        batch, new = self.ids.shape
        count = new if self.positions is None else self.positions
        return {
            "input_ids": self.ids,
            "attention_mask": np.ones(self.mask or (batch, self.past + new), np.int64),
            "position_ids": np.tile(np.arange(self.past, self.past + count), (batch, 1)),
            "beam_idx": np.arange(batch, dtype=np.int32) if self.beams is None else np.array(self.beams, np.int32),
        }


FIRST = Inputs(IDS[:1, :100])
STEP = IDS[:1, 100:101]
MALFORMED: dict[str, list[Inputs]] = {  # the last one is
    "mask too short": [Inputs(IDS[:1, :100], mask=(1, 50))],
    "mask one too short": [FIRST, Inputs(STEP, 100, mask=(1, 100))],
    "mask empty": [Inputs(IDS[:1, :100], mask=(1, 0))],
    "mask of another batch": [Inputs(IDS[:1, :100], mask=(2, 100))],
    "no tokens": [Inputs(IDS[:1, :0])],
    "no tokens, later": [FIRST, Inputs(IDS[:1, :0], 100)],
    "more beams than sequences": [FIRST, Inputs(STEP, 100, beams=(0, 0))],
}
ON_A_CPU = {  # where the values of beam_idx are checked, too
    "a beam that is not there": [FIRST, Inputs(STEP, 100, beams=(5,))],
    "a negative beam": [FIRST, Inputs(STEP, 100, beams=(-1,))],
    "a larger batch without a reset": [FIRST, Inputs(IDS[:2, 100:101], 100)],
}


@functools.lru_cache(maxsize=2)
def compiled(folder: Path) -> ov.CompiledModel:
    return ov.Core().compile_model(folder / "openvino_model.xml", "CPU")


def said(request: ov.InferRequest, calls: list[Inputs]) -> list[np.ndarray]:
    """Logits of each call of a new text."""
    request.reset_state()
    found = []
    for call in calls:
        request.infer(call.feed())
        found.append(np.array(request.get_output_tensor(0).data))
    return found


TEXT = [FIRST, Inputs(STEP, 100), Inputs(IDS[:1, 101:190], 101), Inputs(IDS[:1, 190:191], 190)]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_malformed_call_is_refused_and_leaves_nothing_behind(options: str, convert: Callable[..., Path]) -> None:
    """Twice, after calls of the very shapes of it and of what follows: in that request, and in one of its siblings."""
    model = compiled(convert(TINY["5.5"], "--preset", *options.split(), "--no-verify"))
    right = said(model.create_infer_request(), TEXT)
    cases = MALFORMED | (ON_A_CPU if options.endswith("cpu") else {})
    if options in PRUNED:
        cases = {name: calls for name, calls in cases.items() if not name.startswith("mask")}
    for name, calls in cases.items():
        request = model.create_infer_request()
        said(request, TEXT)
        for _ in range(2):
            said(request, calls[:-1])
            with pytest.raises(RuntimeError) as error:
                request.infer(calls[-1].feed())
            if name != "more beams than sequences":  # which another node may meet first, where batches are one
                assert REFUSAL in str(error.value), name
        for some in (request, model.create_infer_request()):
            for got, expected in zip(said(some, TEXT), right, strict=True):
                assert np.array_equal(got, expected), name


@pytest.mark.parametrize("options", [some for some in OPTIONS if getattr(some, "values", [some])[0] not in PRUNED])
def test_of_a_mask_that_is_too_long_the_first_columns_are_read(options: str, convert: Callable[..., Path]) -> None:
    """As of an exported model; hosts with a buffer of fixed length pass such."""
    model = compiled(convert(TINY["5.5"], "--preset", *options.split(), "--no-verify"))
    steps = [(0, 100), (100, 101), (101, 190), (190, 191), (191, 320), (320, 321)]
    calls = [Inputs(IDS[:2, a:b], a) for a, b in steps]
    longer = [
        Inputs(IDS[:2, a:b], a, mask=(2, length))
        for (a, b), length in zip(steps, (101, 512, 190, 512, 400, 512), strict=True)
    ]
    request = model.create_infer_request()
    for got, expected in zip(said(request, longer), said(request, calls), strict=True):
        assert np.array_equal(got, expected)


def test_an_exported_model_is_spoilt_by_a_call_that_it_refuses() -> None:
    """Why it must be the first node to refuse. If this fails, the plugin has been mended."""
    answered, refused, spoilt = {"mask too short", "mask one too short", "mask of another batch"}, {"mask empty"}, set()
    answered |= {"no tokens", "no tokens, later"}
    model = None
    for name, calls in (MALFORMED | ON_A_CPU).items():
        model = model or ov.Core().compile_model(TINY["5.5"] / "openvino_model.xml", "CPU")
        request = model.create_infer_request()
        right = said(request, TEXT)
        if name in answered:
            said(request, calls)
        else:
            with pytest.raises(RuntimeError):
                said(request, calls)
        if name in answered | refused:
            assert all(map(np.array_equal, said(request, TEXT), right)), name
            continue
        for some in (request, model.create_infer_request()):
            with pytest.raises(RuntimeError):
                said(some, TEXT)
        spoilt.add(name)
        model = None
    assert len(spoilt) == 4
