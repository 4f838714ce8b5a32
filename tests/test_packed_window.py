"""truncate-window with bits: its attention against numpy, its states byte by byte, what it records and refuses."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import TINY, load
from test_passes import EPS, SCHEDULES, Tapped, applied

from ovtq.codec import AdaptiveUniform
from ovtq.codec.packing import unpack
from ovtq.codec.rotation import digest, randomized_hadamard
from ovtq.errors import InputError, PreconditionFailed
from ovtq.models.description import Packed
from ovtq.passes import DecoupleLength, QuantizeKv, SimplifyMask, TruncateWindow
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.verification.verify import TOLERANCE

TOGETHER = ("--preset", "k6v4", "--residual-window", "16", "--window-bits", "8,4", "--target", "cpu")
WINDOW, H, LAYERS = 16, 2, (0, 2)  # of the tiny model: window, KV heads, sliding layers
FORMS: dict[str, TruncateWindow] = {
    f"{target}, K{k}V{v}{f', slack {slack}' if slack else ''}": TruncateWindow(slack, k, v, seed, target)
    for target in ("cpu", "gpu")
    for k, v, slack, seed in (
        ("8", "8", 0, 0),
        ("8", "4", 0, 3),
        ("6", "4", 5, 0),
        ("3", "3", 0, 0),
        ("2", "5", 0, 0),
    )
}


@functools.cache
def tapped(form: str) -> Tapped:
    return Tapped(TINY["5.5"], (DecoupleLength(), FORMS[form]))


class States:
    """What a compiled model's window holds now, by the layout that PackedWindowState tells of."""

    def __init__(self, model: Tapped, item: TruncateWindow) -> None:
        states = {state.name: np.array(state.state.data) for state in model.request.query_state()}
        numbers = states["ovtq.window.scale"]
        assert numbers.dtype == np.int32
        self.codes, self.scales, self.item = states["ovtq.window"], ((numbers / 4096) ** 2).astype(np.float32), item

    def of(self, number: int, which: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes (batch, H, rows, 64) and scales (batch, H, rows, 1) of one layer's keys (0) or values (1)."""
        k_bits, v_bits = int(self.item.k_bits), int(self.item.v_bits)
        first = (2 * number + which) * H if k_bits == v_bits else (which * len(LAYERS) + number) * H
        scales = self.scales[:, first : first + H]
        if k_bits == v_bits:
            return unpack(self.codes[:, first : first + H], k_bits), scales
        codes = self.codes[:, number * H : (number + 1) * H]
        return unpack(np.split(codes, [8 * k_bits], -1)[which], (k_bits, v_bits)[which]), scales


CASES = [
    (form, name)
    for form, item in FORMS.items()
    for name in SCHEDULES
    if name == "window edges" or (item.k_bits == "6" and item.target == "cpu") or (item.k_bits, name) == ("8", "beams")
]


@pytest.mark.parametrize(("form", "schedule"), CASES)
def test_attention_equals_numpy(form: str, schedule: str) -> None:
    """Codes of new tokens but for ties, then moved byte by byte; with these codes the context of every layer."""
    model, item = tapped(form), FORMS[form]
    model.request.reset_state()
    random, mask, rows = np.random.RandomState(7), None, WINDOW - 1 + item.slack
    codecs = AdaptiveUniform(int(item.k_bits), 64), AdaptiveUniform(int(item.v_bits), 64)
    rotation = randomized_hadamard(64, item.seed).astype(np.float64)
    found = None
    for call in SCHEDULES[schedule]:
        ids = random.randint(0, 256, (call.batch, call.tokens)).astype(np.int64)
        shown = np.ones(ids.shape, np.int64)
        shown[1:, : call.pad] = 0
        beams = np.array(call.beams or range(call.batch), np.int32)
        mask = shown if mask is None else np.concatenate([mask[beams], shown], axis=1)
        _, inner, outer = model.step(ids, mask, beams)
        left = States(model, item)
        for number, index in enumerate(LAYERS):
            layer, (query, *news) = model.layers[index], inner[index]
            tensors = []
            for which, (codec, new) in enumerate(zip(codecs, news, strict=True)):
                codes, scales = left.of(number, which)
                old_codes, old_scales = (x[beams] for x in found.of(number, which)) if found else (codes, 0 * scales)
                kept = min(call.tokens, rows)
                moved = slice(0, rows - kept)
                assert np.array_equal(scales[:, :, moved], old_scales[:, :, kept:])
                if found:
                    assert np.array_equal(codes[:, :, moved], old_codes[:, :, kept:])
                _fresh(codec, new[:, :, -kept:] @ rotation, codes[:, :, rows - kept :], scales[:, :, rows - kept :])
                decoded = codec.decode(old_codes, old_scales) @ rotation.T
                past = mask.shape[1] - call.tokens
                behind = np.zeros((*new.shape[:2], max(past - rows, 0), 64))  # out of sight
                tensors.append(np.concatenate([behind, decoded[:, :, max(rows - past, 0) :], new], 2))
            expected = reference.attention(query, *tensors, mask, layer.sinks, layer.scale, WINDOW)
            real = shown.astype(bool)
            got, expected = (np.moveaxis(x, 1, 2)[real] for x in (outer[index], expected))
            assert np.abs(got - expected).max() <= 32 * EPS * np.abs(expected).max(), (index, call)
        found = left


def _fresh(codec: AdaptiveUniform, y: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> None:
    """What a call has stored of its own tokens."""
    expected, expected_scales = codec.encode(y)
    tie = codec.near_tie(y, 64 * EPS)
    assert np.array_equal(codes[~tie], expected[~tie])
    assert np.abs(codes.astype(int) - expected).max() <= 1
    assert tie.sum() <= 3 + 0.01 * tie.size
    clear = (codes == expected).all(-1, keepdims=True)
    root, number = (4096 * np.sqrt(side[clear].astype(np.float64)) for side in (expected_scales, scales))
    assert np.abs(root - number).max(initial=0) <= 0.5 + 1e-3


@pytest.mark.parametrize("bits", ["8,8", "6,4"])
def test_state_bytes_are_the_formula(bits: str, convert: Callable[..., Path]) -> None:
    """layers·kv_heads·(window − 1) times head_dim·(k-bits + v-bits)/8 bytes and two scales, in states of rank 4."""
    out = convert(TINY["5.5"], "--preset", "exact", "--target", "cpu", "--window-bits", bits, "--no-verify")
    record = json.loads((out / "ovtq.json").read_text())
    vectors, packed = len(LAYERS) * H * (WINDOW - 1), 64 * sum(map(int, bits.split(","))) // 8
    assert record["state_bytes"]["after"]["flat"] == vectors * (packed + 2 * 4) + 4  # how many tokens there were
    assert record["state_bytes"]["after"]["per_token"] == 2 * H * 2 * 64 * 4
    runner = Runner(out / "openvino_model.xml", "CPU", EXACT_PROPERTIES)
    for tokens in (1, 50):
        runner.step(np.ones((1, tokens), np.int64))
        flat = [state.state for state in runner.request.query_state() if state.name.startswith("ovtq.window")]
        assert sum(tensor.byte_size for tensor in flat) == vectors * (packed + 2 * 4)
        assert {(len(tensor.shape), tensor.shape[2]) for tensor in flat} == {(4, WINDOW - 1)}


def test_it_is_recorded_as_lossy(convert: Callable[..., Path]) -> None:
    record = json.loads((convert(TINY["5.5"], *TOGETHER) / "ovtq.json").read_text())
    step = record["passes"][1]
    assert (step["name"], step["exact"]) == ("truncate-window", False)
    assert step["options"] == {
        "slack": 0,
        "k_bits": "8",
        "v_bits": "4",
        "seed": 0,
        "target": "cpu",
        "kernels": False,
        "up_to": 0,
    }
    hashes = {"key": AdaptiveUniform(8, 64).digest, "value": AdaptiveUniform(4, 64).digest}
    assert step["facts"]["quantizer_sha256"] == hashes
    assert step["facts"]["rotation_sha256"] == digest(randomized_hadamard(64, 0))
    assert [layer["exact"] for layer in record["passes"]] == [True, False, True, False, True, True]
    assert (TruncateWindow().exact, TruncateWindow(k_bits="8", v_bits="4").exact) == (True, False)


def test_together_with_packed_full_layers(convert: Callable[..., Path]) -> None:
    """Every layer is held to numpy."""
    found = json.loads((convert(TINY["5.5"], *TOGETHER, verified=True) / "ovtq.json").read_text())["verified"]
    assert found["packed"]["layers"] == 4
    assert 0 < found["packed"]["relative"] <= TOLERANCE
    assert 0 < found["packed"]["kld"] < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k-bits": "8"}, "truncate-window: k-bits and v-bits go together: give both or neither"),
        ({"k_bits": "7", "v_bits": "4"}, "truncate-window: k_bits is one of none, 2, 3, 4, 5, 6, 8, got '7'"),
        ({"seed": "-1"}, "truncate-window: seed must be from 0 to 4294967295, got -1"),
    ],
)
def test_options_are_checked(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TruncateWindow.parse(options)


def test_it_refuses_a_head_that_cannot_be_packed() -> None:
    import dataclasses

    rewrite = applied(TINY["5.5"], DecoupleLength())
    layers = {i: dataclasses.replace(rewrite.description.layers[i], head_dim=81) for i in LAYERS}
    odd = rewrite.description.with_layers(layers)
    with pytest.raises(PreconditionFailed, match="layer 0 can't be packed"):
        TruncateWindow(k_bits="8", v_bits="4").apply(rewrite.model, odd)


def test_a_second_run_refuses() -> None:
    item = TruncateWindow(k_bits="8", v_bits="4")
    once = applied(TINY["5.5"], DecoupleLength(), item, SimplifyMask(), QuantizeKv())
    with pytest.raises(PreconditionFailed, match="layer 0 no longer has the exported KV states"):
        item.apply(once.model, once.description)
    assert all(type(layer.cache) is Packed and len(layer.places) == 2 for layer in once.description.layers)
    assert not isinstance(load(TINY["5.5"])[1].layers[0].cache, Packed)
