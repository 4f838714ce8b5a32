"""The codec's graph nodes against the codec in numpy, on the CPU at f32: codes, bytes, scales, and back."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as op

from ovtq.codec import STEPS, AdaptiveUniform
from ovtq.codec.packing import Layout, layout, pack, unpack
from ovtq.codec.rotation import randomized_hadamard
from ovtq.forms.quantizer import encode, features_lut, low_bits_matrix, lut_matrix
from ovtq.forms.quantizer import pack as pack_nodes
from ovtq.forms.quantizer import unpack as unpack_nodes
from ovtq.runtime.runner import EXACT_PROPERTIES

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


ROTATION = randomized_hadamard(64, 0)


def near_a_tie(codec: AdaptiveUniform, x: np.ndarray) -> np.ndarray:
    """Where f32 rounding may choose the neighbouring code."""
    y = x.astype(np.float64) @ ROTATION.astype(np.float64)
    peak, spread = STEPS[codec.bits]
    top = peak * np.abs(y).max(-1, keepdims=True) + spread * np.sqrt(np.mean(y**2, -1, keepdims=True)) + 1e-4
    code = codec.mid * y / top + codec.mid
    return np.abs(code - np.floor(code) - 0.5) < 32 * EPS * codec.mid


@pytest.mark.parametrize("second", STEPS)
@pytest.mark.parametrize("bits", STEPS)
def test_encoding_equals_numpy(bits: int, second: int) -> None:
    """Two tensors in one stream of nodes, each with its own width."""
    codecs, heads = [AdaptiveUniform(bits, 64), AdaptiveUniform(second, 64)], 3
    x, source = vectors(2 * heads, 100, 64, bits), op.parameter([-1, 2 * heads, -1, 64], np.float32)
    layouts = [layout(codec.bits, 64) for codec in codecs]
    centred, scale = encode(source, codecs, ROTATION)
    nodes = [centred, scale, *pack_nodes(centred, codecs, layouts)]
    centred, scale, *packed = run(ov.Model([op.result(node) for node in nodes], [source]), x)
    for number, (codec, bytes_) in enumerate(zip(codecs, packed, strict=True)):
        span = slice(number * heads, (number + 1) * heads)
        expected, expected_scale = codec.encode(x[:, span].astype(np.float64) @ ROTATION)
        got, tie = centred[:, span] + codec.mid, near_a_tie(codec, x[:, span])
        assert np.array_equal(got[~tie], expected[~tie])
        assert np.abs(got - expected).max() <= 1
        assert tie.mean() < 6e-3
        clear = ~tie.any(-1, keepdims=True)
        assert np.allclose(scale[:, span][clear], expected_scale[clear], rtol=32 * EPS, atol=0)
        assert bytes_.dtype == np.int8
        assert np.array_equal(bytes_, pack(got.astype(np.uint8), codec.bits))


def all_codes(bits: int, head_dim: int) -> np.ndarray:
    return np.random.RandomState(bits).randint(0, 2**bits, (1, 2, 300, head_dim)).astype(np.uint8)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("bits", STEPS)
def test_unpacking_is_the_inverse(bits: int, head_dim: int) -> None:
    """The features, decoded by the layout's matrix, are the codes less their middle, exactly."""
    where: Layout = layout(bits, head_dim)
    packed = pack(all_codes(bits, head_dim), bits)
    source = op.parameter([-1, 2, -1, where.bytes], np.int8)
    (features,) = run(ov.Model([op.result(unpack_nodes(source.output(0), where))], [source]), packed)
    middle = (2**bits - 1) / 2
    assert np.array_equal(features.astype(np.float64) @ low_bits_matrix(where) + middle, unpack(packed, bits))
    # each exactly a bf16: 8 bits of which the last are 0 or 1 halves
    assert np.abs(features).max() <= 127.5


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("bits", STEPS)
def test_looking_up_is_the_inverse(bits: int, head_dim: int) -> None:
    """Every byte there is, in every place, negative indices among them."""
    where = layout(bits, head_dim)
    packed = pack(all_codes(bits, head_dim), bits)
    packed[0, 0, :256] = np.arange(-128, 128, dtype=np.int8)[:, None]
    source, factor = op.parameter([-1, 2, -1, where.bytes], np.int8), op.parameter([-1, 2, -1, 1], np.float32)
    scale = np.random.RandomState(1).uniform(0.1, 2, (1, 2, 300, 1)).astype(np.float32)
    nodes = features_lut(source.output(0), where, factor.output(0))
    got = run(ov.Model([op.result(nodes)], [source, factor]), packed, scale)[0]
    expected = scale * (unpack(packed, bits) - np.float32((2**bits - 1) / 2))
    assert np.allclose(got @ lut_matrix(where), expected, rtol=4 * EPS, atol=4 * EPS * np.abs(expected).max())
