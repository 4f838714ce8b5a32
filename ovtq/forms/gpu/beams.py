"""How the GPU plugin reads and keeps states: in place, behind one Gather of the batch and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from openvino import Node, Output
from openvino import Type as ElementType
from openvino import opset15 as op

from ovtq.codec.packing import Layout
from ovtq.forms.beams import Beams
from ovtq.forms.quantizer import dequantize_lut
from ovtq.ir.graph import i64, slice_heads


class GpuBeams(Beams):
    """The GPU plugin appends in place behind one Gather of the batch, and keeps what it is given."""

    def in_order(self, state: Node, exact: bool = True) -> Output:
        """One Gather of the batch."""
        return op.gather(state, self.index, i64(0)).output(0)

    def kept(self, rows: Node, exact: bool) -> Node:
        """As they are."""
        return rows

    def start(self, value: np.ndarray, shape: Sequence[int]) -> Node:
        """One Broadcast."""
        return op.broadcast(op.constant(value), op.concat([self.batch, i64(shape)], 0))

    def no_rows(self, heads: int, width: int, kind: ElementType) -> Node:
        """One Broadcast to no rows."""
        zero = op.constant(np.zeros((), kind.to_dtype()))
        return op.broadcast(zero, op.concat([self.batch, i64([heads, 0, width])], 0))

    def appended(self, past: Output, nothing: Node, new: Node | Output) -> Output:
        """One Concat, which the plugin carries out in place."""
        return op.concat([past, new], 2).output(0)

    def cut_heads(self, tensor: Node | Output, count: int) -> list[Output]:
        """By Slices."""
        return slice_heads(tensor, count)

    def per_layer(self, tensor: Node, layers: int) -> list[Output]:
        """A layer's keys and values in one part."""
        return op.split(tensor, i64(1), layers).outputs()

    def dequantize(self, packed: Output, layout: Layout, scales: Output, rotation: np.ndarray) -> Node:
        """By a table of all bytes."""
        return dequantize_lut(packed, layout, scales, rotation)
