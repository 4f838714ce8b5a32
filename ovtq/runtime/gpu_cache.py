"""What the GPU plugin's compressed KV cache stores, as arithmetic in a graph: to measure on a CPU what it loses.

Read off the kernel `dynamic_quantize_gpu_kv_cache` of OpenVINO 2026.4.1: every row (one token of one head) is quantised
by itself, when it arrives, between its smallest and largest element. Scale and zero point are kept in f16; the zero
point of 8 bits is rounded to an integer on chips with XMX (Arc, Lunar Lake).
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.errors import InputError
from ovtq.ir.graph import f32, i64

PRECISIONS = ("u8", "u4")
LEAST_RANGE = 1e-3  # taken for that of a row of equal elements


def as_gpu_stores(model: ov.Model, precision: str) -> int:
    """Let every cache of `model` that the plugin would compress hold what it would; returns how many there are.

    Those are the states of full layers that `sink-row` made: Assign ← Concat(past, new). Raises InputError if there is
    none, or for another precision than u8 and u4.
    """
    if precision not in PRECISIONS:
        raise InputError(f"GPU_CACHE={precision}: expected {' or '.join(PRECISIONS)}")
    found = 0
    for assign in model.get_sinks():
        append = assign.input_value(0).get_node()
        if append.get_type_name() == "Concat" and assign.get_variable_id().endswith((".key", ".value")):
            append.input(1).replace_source_output(restored(append.input_value(1), precision).output(0))
            found += 1
    if not found:
        raise InputError("GPU_CACHE: the model has no cache that the GPU plugin compresses; sink-row makes them")
    model.validate_nodes_and_infer_types()
    return found


def restored(rows: Node | Output, precision: str) -> Node:
    """Rows (…, width) as they are after quantising and back."""
    x = _f16(rows)
    low, high = op.reduce_min(x, i64([-1]), True), op.reduce_max(x, i64([-1]), True)
    span = op.subtract(high, low)
    span = op.select(op.equal(span, f32(0)), f32(LEAST_RANGE), span)
    factor = op.divide(f32(255 if precision == "u8" else 15), span)
    zero = op.multiply(op.negative(low), factor)
    if precision == "u8":
        factor, zero = _f16(factor), _f16(op.subtract(zero, f32(128)))
        codes = op.clamp(op.round(_f16(op.add(op.multiply(x, factor), zero)), "half_to_even"), -128.0, 127.0)
        zero = op.round(zero, "half_to_even")
    else:
        codes = op.clamp(op.round(op.add(op.multiply(x, factor), zero), "half_to_even"), 0.0, 15.0)
        zero = _f16(zero)
    return op.multiply(op.subtract(codes, zero), _f16(op.divide(f32(1), factor)))


def _f16(x: Node | Output) -> Node:
    """Rounded to an f16's 11 bits of mantissa (Veltkamp's splitting): a pair of Converts would be optimised out."""
    high = op.multiply(x, f32(np.float32(2**13 + 1)))
    return op.subtract(high, op.subtract(high, x))
