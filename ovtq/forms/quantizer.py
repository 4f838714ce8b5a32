"""The codec as graph nodes: what `ovtq.codec.AdaptiveUniform` and `ovtq.codec.packing` say in numpy, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec import FLOOR, STEPS, AdaptiveUniform
from ovtq.codec.packing import OFFSET, Field, Layout
from ovtq.ir.graph import f32, i64, precise

LAST = (3,)  # the axis of head_dim


def encode(x: Node | Output, codecs: Sequence[AdaptiveUniform], matrix: np.ndarray) -> tuple[Node, Node]:
    """Quantise vectors (batch, heads, tokens, d), of which each codec has an equal share of the heads.

    Returns code − mid of y = x·matrix, (batch, heads, tokens, d) f32, and scale, (batch, heads, tokens, 1) f32; the
    matrix is a rotation, (d, d), or one for each head, (heads, d, d). One stream of nodes for all heads, with constants
    by head, because what counts on a GPU is how many kernels it takes. In f16 every intermediate is below 65504 if ‖x‖
    and ‖y‖ are.
    """
    heads = x.get_output_partial_shape(0)[1] if isinstance(x, Node) else x.get_partial_shape()[1]

    def by_head(values: ArrayLike) -> Node:
        share = heads.get_length() // len(codecs)
        return f32(np.repeat(np.asarray(values, np.float32), share).reshape(1, -1, 1, 1))

    mid = by_head([codec.mid for codec in codecs])
    peaks, spreads = zip(*(STEPS[codec.bits] for codec in codecs), strict=True)
    weights = by_batch(matrix.swapaxes(-2, -1))
    turned = op.matmul(x, f32(weights), False, True)
    # the larger of y and −y is what Absolute would take a kernel for
    both = op.matmul(x, f32(np.concatenate([weights, -weights], -2)), False, True)
    top = op.add(op.multiply(op.reduce_max(both, i64(LAST), True), by_head(peaks)), f32(FLOOR))
    norm = op.reduce_l2(x if matrix.ndim == 2 else turned, i64(LAST), True)  # a rotation keeps it
    if any(spreads):
        top = op.add(op.multiply(norm, by_head(np.divide(spreads, np.sqrt(codecs[0].head_dim)))), top)
    inside = op.clamp(op.divide(turned, top), -1.0, 1.0)
    centred = op.subtract(op.round(op.add(op.multiply(inside, mid), mid), "half_to_even"), mid)
    return centred, op.divide(norm, op.reduce_l2(centred, i64(LAST), True))


def by_batch(matrix: np.ndarray) -> np.ndarray:
    """A matrix for each head, (heads, ·, ·), as a factor of tensors (batch, heads, ·, ·); one of all heads, (·, ·)."""
    return matrix if matrix.ndim == 2 else matrix[0] if len(matrix) == 1 else matrix[None]


def pack(centred: Node, codecs: Sequence[AdaptiveUniform], layouts: Sequence[Layout]) -> list[Node]:
    """Bytes (batch, heads/codecs, tokens, d·bits/8) i8 of each codec's heads, from what `encode` returns."""
    heads = centred.get_output_partial_shape(0)[1].get_length() // len(codecs)
    if all(_is_pair(layout) for layout in layouts):
        bytes_ = _pack_pairs(centred, codecs, layouts, heads)
        return [
            op.slice(bytes_, i64([k * heads, 0]), i64([(k + 1) * heads, layout.bytes]), i64([1, 1]), i64([1, 3]))
            for k, layout in enumerate(layouts)
        ]
    parts = op.split(centred, i64(1), len(codecs)).outputs() if len(codecs) > 1 else [centred]
    return [
        _pack_fields(op.add(part, f32(codec.mid)), layout)
        for part, codec, layout in zip(parts, codecs, layouts, strict=True)
    ]


def _is_pair(layout: Layout) -> bool:
    """Whether every byte is one whole code, below at most one field more."""
    return len(_rows(layout)) <= 2 and layout.fields[0].count == layout.bytes


def _pack_pairs(centred: Node, codecs: Sequence[AdaptiveUniform], layouts: Sequence[Layout], heads: int) -> Node:
    """byte = code + 2^shift·(⌊code'/2^low⌋ mod 2^width) − 128 for all heads at once, code' moved there by a product."""
    d = codecs[0].head_dim
    moved = np.zeros((len(codecs), d, d), np.float32)
    divisor, modulus, weight = (np.ones((len(codecs), 1, d), np.float32) for _ in range(3))
    weight[:] = 0
    for k, layout in enumerate(layouts):
        for f in layout.fields[1:]:
            span = slice(f.first, f.first + f.count)
            moved[k, f.code + np.arange(f.count), f.first + np.arange(f.count)] = 1
            divisor[k, 0, span], modulus[k, 0, span], weight[k, 0, span] = 2**f.low, 2**f.width, 2**f.shift

    def by_head(values: np.ndarray) -> Node:
        return f32(np.repeat(values, heads, axis=0)[None])

    mid = np.array([codec.mid for codec in codecs], np.float32).reshape(-1, 1, 1)
    if not weight.any():
        return op.convert(op.add(centred, by_head(mid - OFFSET)), "i8")
    other = op.add(op.matmul(centred, by_head(moved), False, False), by_head(mid))
    piece = op.floor(op.floor_mod(op.multiply(other, by_head(1 / divisor)), by_head(modulus)))
    total = op.add(op.add(op.multiply(piece, by_head(weight)), centred), by_head(mid - OFFSET))
    return op.convert(total, "i8")


def _pack_fields(codes: Node, layout: Layout) -> Node:
    """Bytes of any layout: one row of fields over the other, summed."""
    rows = _rows(layout)
    code = np.zeros((len(rows), layout.bytes), np.int64)
    divisor, modulus, weight = (np.ones(code.shape, np.float32) for _ in range(3))
    weight[:] = 0
    for row, fields in enumerate(rows):
        for f in fields:
            span = slice(f.first, f.first + f.count)
            code[row, span] = f.code + np.arange(f.count)
            divisor[row, span], modulus[row, span], weight[row, span] = 2**f.low, 2**f.width, 2**f.shift
    pieces = op.gather(codes, i64(code), i64(3))  # (batch, heads, tokens, rows, bytes)
    pieces = op.floor_mod(op.floor(op.multiply(pieces, f32(1 / divisor))), f32(modulus))
    total = op.reduce_sum(op.multiply(pieces, f32(weight)), i64([3]), False)
    return op.convert(op.subtract(total, f32(OFFSET)), "i8")


def _rows(layout: Layout) -> list[list[Field]]:
    """The fields, laid into as few rows of bytes as hold them without overlap."""
    rows: list[list[Field]] = []
    for field in layout.fields:
        for row in rows:
            if all(field.first >= f.first + f.count or f.first >= field.first + field.count for f in row):
                row.append(field)
                break
        else:
            rows.append([field])
    return rows


def unpack(packed: Output, layout: Layout) -> Node:
    """The features of `low_bits_matrix`: (batch, heads, tokens, bytes) i8 → (…, features) f32.

    The lowest t bits of every byte, for each t at which a field begins or ends, less their mean, (2^t − 1)/2, because
    then features @ low_bits_matrix = code − mid. All in one formula, which is one node of the CPU plugin; no feature is
    above 127.5, so that bf16, which some CPUs compute in, holds each exactly.
    """
    edges = _edges(layout)
    x = op.reshape(packed, i64([0, 0, -1, 1, layout.bytes]), True)
    # The plugin reads bytes in the node that computes with them only if their Convert is f32 whatever it computes in
    x = op.add(precise(op.convert(x, "f32")), f32(OFFSET))
    if len(edges) > 1:
        x = op.floor_mod(x, f32(np.exp2(edges)[:, None]))
    x = op.subtract(x, f32((np.exp2(edges)[:, None] - 1) / 2))
    return op.reshape(x, i64([0, 0, -1, len(edges) * layout.bytes]), True)


def low_bits_matrix(layout: Layout) -> np.ndarray:
    """(features, head_dim) f32: what `layout.decode` is to fields, for `unpack`."""
    edges = _edges(layout)
    matrix = np.zeros((len(edges), layout.bytes, layout.head_dim), np.float32)
    for f in layout.fields:
        at = np.arange(f.count)
        for edge, sign in ((f.shift + f.width, 1), (f.shift, -1)):
            if edge:
                matrix[edges.index(edge), f.first + at, f.code + at] += sign * 2.0 ** (f.low - f.shift)
    return matrix.reshape(-1, layout.head_dim)


def _edges(layout: Layout) -> list[int]:
    return sorted({edge for f in layout.fields for edge in (f.shift, f.shift + f.width) if edge})


def features_lut(packed: Output, layout: Layout, scales: Output) -> Node:
    """scale·features, interleaved byte by byte: (batch, heads, tokens, bytes) i8 → (…, bytes·fields) f32.

    By one Gather with the bytes themselves as indices, which suits a GPU. `lut_matrix` decodes the features.
    """
    byte = np.arange(256)
    byte = np.where(byte < 128, byte, byte - 256) + OFFSET  # row j is that of index j, or of index j − 256
    table = np.stack([(byte >> shift) % 2**width - (2**width - 1) / 2 for shift, width in _kinds(layout)], 1)
    features = op.multiply(op.gather(f32(table), packed, i64(0)), op.unsqueeze(scales, i64(4)))
    return op.reshape(features, i64([0, 0, -1, layout.bytes * table.shape[1]]), True)


def dequantize_lut(packed: Output, layout: Layout, scales: Output, rotation: np.ndarray) -> Node:
    """Vectors again, turned back: (batch, heads, tokens, bytes) i8 and scales (…, 1) → (…, d) f32; for a GPU."""
    return op.matmul(features_lut(packed, layout, scales), f32(rotation @ lut_matrix(layout).T), False, True)


def dequantize_arithmetic(packed: Output, layout: Layout, scales: Output, rotation: np.ndarray) -> Node:
    """The same for a CPU."""
    vectors = op.matmul(unpack(packed, layout), f32(rotation @ low_bits_matrix(layout).T), False, True)
    return op.multiply(vectors, scales)


def lut_matrix(layout: Layout) -> np.ndarray:
    """(features, head_dim) f32: what `layout.decode` is to `unpack`, for `dequantize_lut`."""
    kinds = _kinds(layout)
    matrix = np.zeros((layout.bytes, len(kinds), layout.head_dim), np.float32)
    for f in layout.fields:
        at = np.arange(f.count)
        matrix[f.first + at, kinds.index((f.shift, f.width)), f.code + at] = 2**f.low
    return matrix.reshape(-1, layout.head_dim)


def _kinds(layout: Layout) -> list[tuple[int, int]]:
    return sorted({(field.shift, field.width) for field in layout.fields})
