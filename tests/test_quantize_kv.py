"""quantize-kv: its attention against numpy, step by step; its states, byte by byte; what it refuses."""

from __future__ import annotations

import functools
import re

import numpy as np
import openvino as ov
import pytest
from conftest import MINI, TINY, load
from test_passes import Tapped, applied

from ovtq.codec import STEPS, AdaptiveUniform
from ovtq.codec.basis import rotated
from ovtq.codec.packed_attention import PackedAttention
from ovtq.codec.packing import unpack
from ovtq.codec.rotation import randomized_hadamard
from ovtq.errors import InputError, PreconditionFailed
from ovtq.forms.cpu.full import FLUSH
from ovtq.models import ModelDescription
from ovtq.models.rope import mean_rotated_bias
from ovtq.passes import DecoupleLength, Pass, QuantizeKv, SimplifyMask, TruncateWindow
from ovtq.runtime.runner import EXACT_PROPERTIES
from ovtq.verification.verify import Call

EPS = float(np.finfo(np.float32).eps)
EXACT = (DecoupleLength(), TruncateWindow(), SimplifyMask())

SCHEDULES = {
    "prefill, then one by one": [Call(140), *[Call(1)] * 6, Call(7), *[Call(1)] * 3],
    "chunks": [Call(5), Call(31), Call(32), Call(33), Call(64), Call(129), Call(1), Call(100), Call(1)],
    "padding": [Call(124, 3, pad=11), Call(1, 3), Call(39, 3), Call(1, 3), Call(1, 3)],
    "beams": [
        Call(150),
        Call(1, 4, beams=(0, 0, 0, 0)),
        Call(1, 4, beams=(1, 1, 3, 0)),
        Call(9, 4, beams=(3, 2, 1, 0)),
    ],
    "from one token": [*[Call(1)] * 18, Call(120), Call(1)],
}
FORMS: dict[str, QuantizeKv] = {
    f"{target}, {name}": QuantizeKv(target=target, residual_window=window, **options)
    for target in ("cpu", "gpu")
    for name, window, options in (
        ("K6V4", 16, {}),
        ("no window", 0, {}),
        ("K4V4, no centre", 8, {"k_bits": "4", "centre": "none"}),
        ("K8V4", 16, {"k_bits": "8"}),
        ("K2V3", 16, {"k_bits": "2", "v_bits": "3"}),
        ("K5V2", 16, {"k_bits": "5", "v_bits": "2"}),
        ("K3V8", 16, {"k_bits": "3", "v_bits": "8"}),
        ("values alone", 16, {"k_bits": "none", "v_bits": "6"}),
        ("keys alone", 16, {"v_bits": "none"}),
        ("bits by layer", 16, {"bits": "1:8/3"}),  # layer 3 has those of all
    )
}


def references(item: QuantizeKv) -> dict[int, PackedAttention]:
    model, description = load(TINY["5.5"])
    made = {}
    for layer in item.chosen(description):
        d, texts = layer.head_dim, ("8", "3") if item.bits and layer.index == 1 else (item.k_bits, item.v_bits)
        codecs = tuple(None if bits == "none" else AdaptiveUniform(int(bits), d) for bits in texts)
        centre = np.zeros((layer.kv_heads, d), np.float32)
        if item.centre == "auto":
            centre = mean_rotated_bias(model, layer.key.source, layer.kv_heads, d)
            centre = (centre * np.float32(layer.scale)).astype(np.float32)
        rotation = randomized_hadamard(d, item.seed)
        made[layer.index] = PackedAttention(
            codecs, (rotated(rotation, centre), rotated(rotation, 0 * centre)), layer.sinks, layer.scale,
            item.residual_window, FLUSH if item.target == "cpu" else 1,
        )  # fmt: skip
    return made


@functools.cache
def tapped(form: str) -> Tapped:
    return Tapped(TINY["5.5"], (*EXACT, FORMS[form]))


def as_stored(model: Tapped, index: int, packed: PackedAttention, which: int, x: np.ndarray) -> np.ndarray:
    """All keys or values as the graph has stored them: by the codec's codes and scale, but where f32 decides a code."""
    codec = packed.codecs[which]
    if codec is None:
        return x
    states = {s.name: s.state.data for s in model.request.query_state()}
    name = f"ovtq.{index}.{('key', 'value')[which]}"
    codes, (scale, heads) = unpack(states[name], codec.bits), scales_of(states, index, packed, which)
    scale = scale[:, heads]
    count = codes.shape[2]
    assert count == (x.shape[2] if packed.flush == 1 else max(x.shape[2] - packed.window, 0) // FLUSH * FLUSH)
    y = packed.bases[which].into(x[:, :, :count])
    expected, expected_scale = codec.encode(y)
    tie = codec.near_tie(y, 64 * EPS)  # x itself is rounded, and so the centre
    assert np.array_equal(codes[~tie], expected[~tie])
    assert np.abs(codes.astype(int) - expected).max(initial=0) <= 1
    assert tie.sum() <= 3 + 0.01 * tie.size
    clear = (codes == expected).all(-1, keepdims=True)
    assert np.allclose(scale[clear], expected_scale[clear], rtol=64 * EPS, atol=0)
    decoded = packed.bases[which].back(codec.decode(codes, scale))
    return np.concatenate([decoded, x[:, :, count:]], 2)


def scales_of(
    states: dict[str, np.ndarray], index: int, packed: PackedAttention, which: int
) -> tuple[np.ndarray, slice]:
    """The state that holds them, and at which heads: for a CPU, whose flush is above 1, one state has all of them."""
    if packed.flush == 1:
        return states[f"ovtq.{index}.{('key', 'value')[which]}.scale"], slice(None)
    description = load(TINY["5.5"])[1]
    H, parts = description.layers[index].kv_heads, sum(codec is not None for codec in packed.codecs)
    number = [layer.index for layer in description.full].index(index)
    first = (number * parts + (which if parts == 2 else 0)) * H
    return states["ovtq.scale"], slice(first, first + H)


WHOLE = ("K6V4", "no window")  # these in every schedule, the others in one


@pytest.mark.parametrize(
    ("form", "schedule"),
    [
        pytest.param(form, name, marks=[pytest.mark.slow] if "no window" in form and "one" in name else [])
        for form in FORMS
        for name in SCHEDULES
        if name == "chunks" or form.split(", ", 1)[1] in WHOLE
    ],
)
def test_attention_equals_numpy(form: str, schedule: str) -> None:
    """Every packed layer, from its own Q, K, V: codes but for ties, scales, and with these codes the context."""
    model, packed = tapped(form), references(FORMS[form])
    model.request.reset_state()
    random, mask = np.random.RandomState(3), None
    for call in SCHEDULES[schedule]:
        ids = random.randint(0, 256, (call.batch, call.tokens)).astype(np.int64)
        shown = np.ones(ids.shape, np.int64)
        shown[1:, : call.pad] = 0
        beams = np.array(call.beams or range(call.batch), np.int32)
        mask = shown if mask is None else np.concatenate([mask[beams], shown], axis=1)
        _, inner, outer = model.step(ids, mask, beams)
        real = shown.astype(bool)  # what padding attends to is nobody's business
        for layer, (q, k, v), got in zip(model.layers, inner, outer, strict=True):
            if layer.index in packed:
                stored = functools.partial(as_stored, model, layer.index, packed[layer.index])
                expected = packed[layer.index].step(q, k, v, mask, beams, stored)
                got, expected = (np.moveaxis(x, 1, 2)[real] for x in (got, expected))
                assert np.abs(got - expected).max() <= 32 * EPS * np.abs(expected).max(), (layer.index, call)


@pytest.mark.parametrize("bits", STEPS)
@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_state_bytes_are_the_formula(bits: int, target: str) -> None:
    """Read from the compiled model's states: head_dim·bits/8 bytes and one scale a vector, and a flat window."""
    item = QuantizeKv(k_bits=str(bits), v_bits=str(bits), target=target, residual_window=16)
    model = applied(MINI, *EXACT, item).model
    request = ov.Core().compile_model(model, "CPU", EXACT_PROPERTIES).create_infer_request()
    sizes, past = [], 0
    for tokens in (16 + FLUSH - 1, 2 * FLUSH):  # one token short of a flush, and so again
        inputs = {
            "input_ids": np.ones((1, tokens), np.int64),
            "attention_mask": np.ones((1, past + tokens), np.int64),
            "position_ids": np.arange(past, past + tokens)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer(inputs)
        past += tokens
        states = {state.name: state.state for state in request.query_state()}
        sizes.append(sum(tensor.byte_size for tensor in states.values()))
        for name, tensor in states.items():
            if re.fullmatch(r"ovtq\.\d+\.(key|value)", name):
                assert tensor.element_type == ov.Type.i8
                stored = past if target == "gpu" else (past - 16) // FLUSH * FLUSH
                assert list(tensor.shape) == [1, 2, stored, 64 * bits // 8]
        rows = 16 if target == "gpu" else 16 + FLUSH - 1
        assert list(states["ovtq.recent"].shape) == [1, 3 * 2 * 2, 1 + rows, 64]
    layers, kv_heads, scale_bytes = 3, 2, 4  # scales are f32 on the CPU, f16 on a GPU
    assert sizes[1] - sizes[0] == 2 * FLUSH * layers * 2 * kv_heads * (64 * bits // 8 + scale_bytes)


def test_centre_is_the_mean_of_the_turned_bias() -> None:
    torch = pytest.importorskip("torch")
    rotary = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss").GptOssRotaryEmbedding
    from transformers import AutoConfig

    model, description = load(MINI)
    rope = rotary(AutoConfig.from_pretrained(MINI))
    cos, sin = (table[0].numpy() for table in rope(torch.zeros(1, 1, 64), torch.arange(500)[None]))
    for layer in description.full:
        got = mean_rotated_bias(model, layer.key.source, layer.kv_heads, layer.head_dim, 500)
        low, high = np.split(layer.key_bias[:, None].astype(np.float64), 2, -1)
        expected = np.concatenate([low * cos - high * sin, high * cos + low * sin], -1).mean(1)
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def _chosen(description: ModelDescription, protect: str) -> list[int]:
    return [layer.index for layer in QuantizeKv(protect=protect).chosen(description)]


def test_protected_layers_stay_as_they_are() -> None:
    description = load(MINI)[1]  # full layers 1, 3, 5
    assert _chosen(description, "") == [1, 3, 5]
    assert _chosen(description, "first:1,last:1") == [3]
    assert _chosen(description, "5") == [1, 3]
    assert _chosen(description, "last:2") == [1]
    with pytest.raises(PreconditionFailed, match="no full layer is left to quantise"):
        applied(MINI, *EXACT, QuantizeKv(protect="first:9"))
    with pytest.raises(PreconditionFailed, match="protect: layer 2 is no full layer; those are 1, 3, 5"):
        applied(MINI, *EXACT, QuantizeKv(protect="2"))
    rewrite = applied(MINI, *EXACT, QuantizeKv(protect="1,last:1"))
    names = {v.get_info().variable_id for v in rewrite.model.get_variables()}
    assert {name for name in names if "past" in name} == {
        path.variable_id for i in (1, 5) for path in description.layers[i].paths
    }
    assert {name for name in names if name.startswith("ovtq.3.")} == {
        "ovtq.3.key", "ovtq.3.key.scale", "ovtq.3.value", "ovtq.3.value.scale"
    }  # fmt: skip
    rewrite = applied(MINI, *EXACT, QuantizeKv(protect="last:1", target="cpu"))
    infos = [variable.get_info() for variable in rewrite.model.get_variables()]
    shapes = {info.variable_id: str(info.data_shape) for info in infos if info.variable_id.startswith("ovtq.")}
    assert shapes == {
        "ovtq.window": "[?,12,127,64]", "ovtq.recent": "[?,8,192,64]", "ovtq.scale": "[?,8,?,1]",
        **{f"ovtq.{i}.key": "[?,2,?,48]" for i in (1, 3)}, **{f"ovtq.{i}.value": "[?,2,?,32]" for i in (1, 3)},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_bits": "7"}, "quantize-kv: k_bits is one of none, 2, 3, 4, 5, 6, 8, got '7'"),
        ({"k_bits": "none", "v_bits": "none"}, "k-bits and v-bits are both none; leave the pass out"),
        ({"protect": "middle"}, "protect: expected first:N, last:N or an index, got 'middle'"),
        ({"residual-window": "-1"}, "residual-window must be from 0 to 4096, got -1"),
        ({"seed": "-1"}, "seed must be from 0 to 4294967295, got -1"),
        ({"bits": "1:8/7"}, "bits: expected auto, or LAYER:K/V,… such as 0:6/4,3:4/3, each layer once"),
        ({"bits": "1:8/4,1:6/4"}, "each layer once, with bits of 2, 3, 4, 5, 6, 8, got '1:6/4'"),
        ({"bits": "auto"}, "bits auto and budget-kld, a number of nats above 0, go together; got bits auto and"),
        ({"budget_kld": "1e-3"}, "go together; got bits none and budget-kld 0.001"),
        ({"bits": "auto", "budget_kld": "nan"}, "a number of nats above 0"),
        ({"bits": "auto", "budget_kld": "inf"}, "a number of nats above 0"),
        ({"bits": "auto", "budget_kld": "little"}, "budget_kld needs float, got 'little'"),
        ({"target": "npu"}, "quantize-kv: target is one of gpu, cpu, got 'npu'"),
    ],
)
def test_options_are_checked(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        QuantizeKv.parse(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "0:6/4"}, "bits: layer 0 is no full layer that is packed; those are 1, 3"),
        ({"bits": "1:6/4", "protect": "first:1"}, "bits: layer 1 is no full layer that is packed; those are 3"),
        ({"bits": "1:6/4", "v_bits": "none"}, "bits: keys and values are both packed then"),
        ({"bits": "1:6/3", "kernels": True}, "kernels have the same bits in all layers"),
        ({"bits": "auto", "budget_kld": 1e-3}, "bits auto: needs the basis calibrated, in which losses were measured"),
    ],
)
def test_bits_by_layer_that_can_not_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(PreconditionFailed, match=re.escape(f"quantize-kv: {message}")):
        applied(TINY["5.5"], *EXACT, QuantizeKv(**options))


@pytest.mark.parametrize(("before", "message"), [((), "run decouple-length first")])
def test_refusals(before: tuple[Pass, ...], message: str) -> None:
    with pytest.raises(PreconditionFailed, match=message):
        applied(TINY["5.5"], *before, QuantizeKv())
