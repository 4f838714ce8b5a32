"""Packed codes: layouts, round trips, and what the graph's formulas rest on."""

from __future__ import annotations

import numpy as np
import pytest

from ovtq.codec.codebook import lloyd_max, uniform
from ovtq.codec.packing import layout, pack, packed_bytes, unpack

BITS = range(1, 9)
EPS = float(np.finfo(np.float32).eps)
DIGESTS = {  # d = 64, 1 to 7 bits; at 8 a centroid is so near the middle of two f32 that another scipy may round it so
    lloyd_max: "b5a0fd21e29e7a16 8982b836930bf416 243b6c87786f5c2d aa5049085b4ca8f2 e542a03dede2c2fc "
    "04c07dfa4fe9d20d b8b5513716d22e74",
    uniform: "b5a0fd21e29e7a16 1cf7173215ecd2ea 4c6252038eeb617d d4d77c88670cf630 52391ee4d31e0fc7 "
    "f5078efc4412f5d4 ca41a71b8ece41fd",
}
both = pytest.mark.parametrize("make", [lloyd_max, uniform], ids=lambda make: make.__name__)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(8,), (24,), (3, 64), (2, 4, 5, 80), (1, 128), (0, 64)])
def test_packing_round_trip(shape: tuple[int, ...], bits: int) -> None:
    codes = np.random.RandomState(bits).randint(0, 2**bits, shape).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == np.int8
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert packed.shape[-1] == packed_bytes(bits, shape[-1]) == shape[-1] * bits / 8
    back = unpack(packed, bits)
    assert back.dtype == np.uint8
    assert np.array_equal(back, codes)
    assert np.array_equal(pack(codes.astype(np.int64), bits), packed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_no_bit_is_left_over(bits: int, head_dim: int) -> None:
    """Every bit of every byte and code is in exactly one field; so any bytes unpack to codes that pack to them."""
    where = layout(bits, head_dim)
    in_bytes, in_codes = np.zeros((where.bytes, 8), int), np.zeros((head_dim, bits), int)
    for f in where.fields:
        in_bytes[f.first : f.first + f.count, f.shift : f.shift + f.width] += 1
        in_codes[f.code : f.code + f.count, f.low : f.low + f.width] += 1
    assert (in_bytes == 1).all()
    assert (in_codes == 1).all()
    packed = np.random.RandomState(bits).randint(-128, 128, (5000, where.bytes)).astype(np.int8)
    assert packed.min() == -128
    assert packed.max() == 127
    assert np.array_equal(pack(unpack(packed, bits), bits), packed)


def test_packing_layout() -> None:
    c = {bits: np.random.RandomState(bits).randint(0, 2**bits, 8) for bits in BITS}
    low, high = c[6][6:] % 4, c[6][6:] // 16
    layouts = {
        1: [sum(2**k * c[1][k] for k in range(8))],
        2: c[2][:2] + 4 * c[2][2:4] + 16 * c[2][4:6] + 64 * c[2][6:],
        # whole codes, and above them codes 6 and 7: their low two bits in two bytes, their third bits in the last
        3: c[3][:3] + 8 * c[3][3:6] + 64 * np.array([*(c[3][6:] % 4), c[3][6] // 4 + 2 * (c[3][7] // 4)]),
        4: c[4][:4] + 16 * c[4][4:],
        5: c[5][:5]
        + 32 * np.array([*(c[5][5:] // 4), *(c[5][5:7] % 4)])
        + 128 * np.array([0, 0, 0, c[5][7] % 2, c[5][7] // 2 % 2]),
        6: c[6][:6] + 64 * np.array([*low, *(c[6][6:] // 4 % 4), *high]),
        7: c[7][:7] + 128 * np.array([c[7][7] >> k & 1 for k in range(7)]),
        8: c[8],
    }
    for bits, expected in layouts.items():
        assert (pack(c[bits], bits).astype(int) + 128).tolist() == list(expected)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_linear_in_the_groups(bits: int) -> None:
    """What a graph unpacks by: one formula a group, then one matrix."""
    where = layout(bits, 64)
    codes = np.random.RandomState(bits).randint(0, 2**bits, (500, 64)).astype(np.uint8)
    raw = pack(codes, bits).astype(np.float32) + 128
    features = [np.floor(raw[:, g.first : g.first + g.count] / 2**g.shift) % 2**g.width for g in where.groups]
    assert np.array_equal(np.concatenate(features, 1) @ where.decode, codes)
    assert len(where.groups) == {1: 8, 2: 4, 3: 5, 4: 2, 5: 4, 6: 2, 7: 2, 8: 1}[bits]


def test_packing_refusals() -> None:
    for bits, head_dim, needs in ((1, 60, 8), (2, 30, 4), (3, 60, 8), (4, 63, 2), (5, 12, 8), (6, 66, 4), (4, 0, 2)):
        with pytest.raises(ValueError, match=f"{bits}-bit codes need a head_dim divisible by {needs}, got {head_dim}"):
            pack(np.zeros((2, head_dim), np.uint8), bits)
    for bits in (0, 9):
        for call in (pack, unpack):
            with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
                call(np.zeros(64, np.int8), bits)
    for code in (-1, 16):
        with pytest.raises(ValueError, match=f"4-bit codes must be 0 to 15, got {min(code, 0)} to {max(code, 0)}"):
            pack(np.array([0, 0, 0, code]), 4)
    with pytest.raises(TypeError, match="codes must be integers, got float32"):
        pack(np.zeros(64, np.float32), 4)
    with pytest.raises(TypeError, match="must be int8, got uint8"):
        unpack(np.zeros(32, np.uint8), 4)
    for length, bits in ((47, 6), (0, 4), (1, 3), (5, 3)):
        with pytest.raises(ValueError, match=f"{length} bytes are no packed vector of {bits}-bit codes"):
            unpack(np.zeros(length, np.int8), bits)
