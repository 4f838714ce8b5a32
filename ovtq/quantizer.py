"""The codec as graph nodes: what `ovtq.codec.AdaptiveUniform` and `ovtq.packing` say in numpy, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec import STEPS, AdaptiveUniform
from ovtq.graph import f32, i64
from ovtq.packing import OFFSET, Field, Layout

TINY = 1e-6  # a vector whose coordinates are all smaller is stored as zero; an f16 still holds it


def encode(tensors: Sequence[Node | Output], codecs: Sequence[AdaptiveUniform], heads: int) -> tuple[Node, Node]:
    """Codes and scales of several tensors at once: each (batch, heads, tokens, d) → both (batch, sum of heads, …).

    codes (…, tokens, d) f32, whole numbers; scale (…, tokens, 1) f32. One stream of nodes for all, with constants by
    head. Every intermediate stays below 65504 whatever its input's size, so that f16 bears it.
    """
    x = op.concat(list(tensors), 1) if len(tensors) > 1 else tensors[0]
    last = i64([-1])

    def by_head(values: Sequence[float]) -> Node:
        return f32(np.repeat(np.asarray(values, np.float32), heads).reshape(1, -1, 1, 1))

    d = codecs[0].head_dim
    mid = by_head([codec.mid for codec in codecs])
    peak = op.maximum(op.reduce_max(op.absolute(x), last, True), f32(TINY))
    u = op.divide(x, peak)
    norm = op.sqrt(op.reduce_sum(op.multiply(u, u), last, True))
    steps = [STEPS[codec.bits] for codec in codecs]
    if any(spread for _, spread in steps):
        step = op.add(
            op.multiply(norm, by_head([spread / np.sqrt(d) for _, spread in steps])), by_head([part for part, _ in steps])
        )
        u = op.divide(u, step)
    top = by_head([2 * codec.mid for codec in codecs])
    codes = op.round(op.add(op.multiply(u, mid), mid), "half_to_even")
    codes = op.minimum(op.maximum(codes, f32(0)), top)
    e = op.subtract(op.multiply(codes, by_head([1 / codec.mid for codec in codecs])), f32(1))  # (code − mid)/mid
    length = op.sqrt(op.reduce_sum(op.multiply(e, e), last, True))
    scale = op.divide(op.multiply(peak, norm), op.multiply(length, mid))
    return codes, scale


def pack(codes: Node | Output, layout: Layout) -> Node:
    """Codes (batch, heads, tokens, d), whole numbers in f32 → bytes (…, d·bits/8) i8."""
    rows = _rows(layout)
    if len(rows) == 1:
        return op.convert(op.subtract(codes, f32(OFFSET)), "i8")
    bytes_, depth = layout.bytes, len(rows)
    code, low, width, weight = (np.zeros((depth, bytes_), np.float32) for _ in range(4))
    for row, fields in enumerate(rows):
        for f in fields:
            span = slice(f.first, f.first + f.count)
            code[row, span] = f.code + np.arange(f.count)
            low[row, span], width[row, span], weight[row, span] = 2**f.low, 2**f.width, 2**f.shift
    pieces: Node = op.gather(codes, i64(code.astype(np.int64)), i64(3))  # (batch, heads, tokens, depth, bytes)
    if low.max() > 1 or (width < 2**layout.bits).any():
        pieces = op.floor(op.multiply(pieces, f32(1 / np.maximum(low, 1))))
        pieces = op.floor_mod(pieces, f32(np.maximum(width, 1)))
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


def unpack(packed: Output, layout: Layout) -> list[Node]:
    """The features of `layout.decode`, group by group, less their mean: (…, bytes) i8 → (…, count) f32 each.

    Less the mean, (2^width − 1)/2, because then features @ decode = code − mid. A field is cut out by FloorMod rather
    than by subtracting the fields above it: in bf16, which some CPUs compute in, that difference would drown.

    The CPU plugin reads the bytes in the node that uses them only if each formula has a Convert of its own; equal ones
    would be merged, so each reads the bytes in another shape.
    """
    features = []
    for number, group in enumerate(layout.groups):
        x: Node | Output = packed
        if group.count < layout.bytes:
            x = op.slice(packed, i64([group.first]), i64([group.first + group.count]), i64([1]), i64([3]))
        x = op.convert(op.reshape(x, i64([0, 0, -1]), True) if number else x, "f32")
        middle = (2**group.width - 1) / 2
        whole = group.shift + group.width == 8
        if group.shift == 0:
            low = x if whole else op.floor_mod(op.add(x, f32(OFFSET)), f32(2**group.width))
            feature = op.add(low, f32(OFFSET - middle if whole else -middle))
        else:
            feature = op.floor(op.multiply(x, f32(2.0**-group.shift)))
            if not whole:
                feature = op.floor_mod(op.add(feature, f32(OFFSET / 2**group.shift)), f32(2**group.width))
            feature = op.add(feature, f32((OFFSET / 2**group.shift if whole else 0) - middle))
        features.append(op.reshape(feature, i64([0, 0, -1, group.count]), True) if number else feature)
    return features
