"""How the CPU plugin reads and keeps states: copies by many threads, in the type that they are declared in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from openvino import Node, Output
from openvino import Type as ElementType
from openvino import opset15 as op

from ovtq.codec.packing import Layout
from ovtq.forms.beams import Beams
from ovtq.forms.quantizer import dequantize_arithmetic
from ovtq.ir.graph import gather_heads, i64, precise, scalar
from ovtq.models.description import ModelDescription


class CpuBeams(Beams):
    """The CPU's Gather copies what belongs to an index in one thread, all of a batch of one: here a head is an index.

    Not `exact`, a CPU that computes in bf16 keeps a state in bf16, too: right for what comes from a bf16 and goes to
    one.
    """

    def __init__(self, description: ModelDescription) -> None:
        super().__init__(description)
        self._pairs: dict[tuple[int, int | None], Node] = {}

    def in_order(self, state: Node, exact: bool = True) -> Output:
        """One GatherND of pairs of a beam and a head."""
        heads = state.get_output_partial_shape(0)[1].get_length()
        found = op.gather_nd(state, self._beam_and_head(heads), 0)
        return (precise(found) if exact else found).output(0)

    def in_parts(self, state: Node, count: int) -> list[Output]:
        """What `in_order` is, not `exact`: `count` parts (batch, heads/count, tokens, width) of its heads.

        One copy of all of them: the parts of the first axis are where they are.
        """
        heads = state.get_output_partial_shape(0)[1].get_length()
        found = op.gather_nd(state, self._beam_and_head(heads, count), 0)  # (count, batch, heads/count, tokens, width)
        return [op.squeeze(part, i64([0])).output(0) for part in op.split(found, i64(0), count).outputs()]

    def in_groups(self, state: Node, groups: int, parts: int) -> list[Output]:
        """What `in_order` is, `groups` times (parts, batch, heads/groups/parts, tokens, width)."""
        heads = state.get_output_partial_shape(0)[1].get_length()
        index = op.split(self._beam_and_head(heads, groups * parts), i64(0), groups)
        return [precise(op.gather_nd(state, some, 0)).output(0) for some in index.outputs()]

    def kept(self, rows: Node, exact: bool) -> Node:
        """`exact`: marked so, for written in another type than the state's it would be converted in every step."""
        return precise(rows) if exact else rows

    def start(self, value: np.ndarray, shape: Sequence[int]) -> Node:
        """The Reshape tells the shape: where ReadValue's is another than the Assign's, the plugin copies the state."""
        length = math.prod(shape)
        flat = value.reshape(1, -1) if value.size > 1 else value
        rows = op.broadcast(op.constant(flat), op.concat([self.batch, i64([length])], 0))
        return op.reshape(rows, i64([-1, *shape]), False)

    def no_rows(self, heads: int, width: int, kind: ElementType) -> Node:
        """None of one row: a length that is known, be it 0, is not the Assign's, and the plugin would copy it."""
        zero = op.constant(np.zeros((), kind.to_dtype()))
        row = op.broadcast(zero, op.concat([self.batch, i64([heads * width])], 0))
        row = op.reshape(row, i64([-1, heads, 1, width]), False)
        return op.gather(row, op.range(i64(0), scalar(op.subtract(self.batch, self.batch)), i64(1), "i64"), i64(2))

    def appended(self, past: Output, nothing: Node, new: Node | Output) -> Output:
        """With `nothing` between: what only ReadValue reads, the plugin takes into it, and a reset leaves the rows."""
        return precise(op.concat([past, nothing, new], 2)).output(0)

    def cut_heads(self, tensor: Node | Output, count: int) -> list[Output]:
        """By Gathers."""
        return gather_heads(tensor, count)

    def per_layer(self, tensor: Node, layers: int) -> list[Output]:
        """A layer's keys and its values, for the plugin splits nothing for free."""
        return gather_heads(tensor, 2 * layers)

    def dequantize(self, packed: Output, layout: Layout, scales: Output, rotation: np.ndarray) -> Node:
        """By arithmetic."""
        return dequantize_arithmetic(packed, layout, scales, rotation)

    def _beam_and_head(self, heads: int, parts: int | None = None) -> Node:
        """(batch, heads, 2), or (parts, batch, heads/parts, 2)."""
        if (heads, parts) not in self._pairs:
            beam = op.unsqueeze(op.convert(self.index, "i64"), i64([1, 2]))
            head = np.stack([np.zeros(heads), np.arange(heads)], 1)
            head = head[None] if parts is None else head.reshape(parts, 1, -1, 2)
            self._pairs[heads, parts] = op.add(op.multiply(beam, i64([[[1, 0]]])), i64(head))
        return self._pairs[heads, parts]
