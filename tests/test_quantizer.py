"""The codec's graph nodes against the codec in numpy, on the CPU at f32: codes, bytes, scales, and back."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as op

from ovtq.codec import STEPS, AdaptiveUniform
from ovtq.packing import Layout, layout, pack, unpack
from ovtq.quantizer import encode
from ovtq.quantizer import pack as pack_nodes
from ovtq.quantizer import unpack as unpack_nodes
from ovtq.runner import EXACT_PROPERTIES

EPS = float(np.finfo(np.float32).eps)


def run(model: ov.Model, *inputs: np.ndarray) -> list[np.ndarray]:
    results = ov.Core().compile_model(model, "CPU", EXACT_PROPERTIES)(list(inputs))
    return [np.array(results[index]) for index in range(len(results))]


def vectors(heads: int, tokens: int, head_dim: int, seed: int) -> np.ndarray:
    """Of very different lengths, with a zero among them."""
    x = np.random.RandomState(seed).standard_normal((2, heads, tokens, head_dim)).astype(np.float32)
    x *= np.exp(np.random.RandomState(seed + 1).uniform(-6, 6, (2, heads, tokens, 1))).astype(np.float32)
    x[0, 0, 0] = 0
    return x


def near_a_tie(codec: AdaptiveUniform, x: np.ndarray) -> np.ndarray:
    """Where f32 rounding may choose the neighbouring code."""
    peak, spread = STEPS[codec.bits]
    x = x.astype(np.float64)
    step = peak * np.abs(x).max(-1, keepdims=True) + spread * np.sqrt(np.mean(x**2, -1, keepdims=True))
    y = codec.mid * np.divide(x, step, out=np.zeros_like(x), where=step > 0) + codec.mid
    return np.abs(y - np.floor(y) - 0.5) < 16 * EPS * codec.mid


@pytest.mark.parametrize("bits", STEPS)
def test_encoding_equals_numpy(bits: int) -> None:
    codec, x = AdaptiveUniform(bits, 64), vectors(3, 200, 64, bits)
    source = op.parameter([-1, 3, -1, 64], np.float32)
    codes, scale = encode([source], [codec], 3)
    got, got_scale = run(ov.Model([op.result(codes), op.result(scale)], [source]), x)
    expected, expected_scale = codec.encode(x)
    tie = near_a_tie(codec, x)
    assert np.array_equal(got[~tie], expected[~tie])
    assert np.abs(got - expected).max() <= 1
    assert tie.mean() < 3e-3
    clear = ~tie.any(-1, keepdims=True)
    assert np.allclose(got_scale[clear], expected_scale[clear], rtol=32 * EPS, atol=0)


def test_several_tensors_in_one_stream_are_each_its_own() -> None:
    codecs = [AdaptiveUniform(bits, 64) for bits in (6, 4)]
    tensors = [vectors(2, 50, 64, seed) for seed in (1, 2)]
    sources = [op.parameter([-1, 2, -1, 64], np.float32) for _ in codecs]
    together = encode(sources, codecs, 2)
    codes, scales = run(ov.Model([op.result(node) for node in together], sources), *tensors)
    for number, (codec, x) in enumerate(zip(codecs, tensors, strict=True)):
        alone, scale = codec.encode(x)
        tie = near_a_tie(codec, x)
        assert np.array_equal(codes[:, 2 * number : 2 * number + 2][~tie], alone[~tie])
        clear = ~tie.any(-1, keepdims=True)
        assert np.allclose(scales[:, 2 * number : 2 * number + 2][clear], scale[clear], rtol=32 * EPS, atol=0)


def all_codes(bits: int, head_dim: int) -> np.ndarray:
    return np.random.RandomState(bits).randint(0, 2**bits, (1, 2, 300, head_dim)).astype(np.uint8)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("bits", STEPS)
def test_packing_equals_numpy(bits: int, head_dim: int) -> None:
    codes, source = all_codes(bits, head_dim), op.parameter([-1, 2, -1, head_dim], np.float32)
    got = run(ov.Model([op.result(pack_nodes(source, layout(bits, head_dim)))], [source]), codes.astype(np.float32))[0]
    assert got.dtype == np.int8
    assert np.array_equal(got, pack(codes, bits))


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("bits", STEPS)
def test_unpacking_is_the_inverse(bits: int, head_dim: int) -> None:
    """The features, decoded by the layout's matrix, are the codes less their middle, exactly."""
    where: Layout = layout(bits, head_dim)
    packed = pack(all_codes(bits, head_dim), bits)
    source = op.parameter([-1, 2, -1, where.bytes], np.int8)
    features = run(ov.Model([op.result(node) for node in unpack_nodes(source.output(0), where)], [source]), packed)
    middle = (2**bits - 1) / 2
    assert np.array_equal(np.concatenate(features, -1) @ where.decode + middle, unpack(packed, bits))
