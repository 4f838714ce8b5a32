"""The rows of states in the order of the beams that go on."""

from __future__ import annotations

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.graph import dim, i64, precise
from ovtq.models.description import ModelDescription


class Beams:
    """beam_idx, and what reading states in its order needs, once for all of them; `target` is gpu or cpu."""

    def __init__(self, description: ModelDescription, target: str) -> None:
        self.index, self.target = description.beam_idx, target
        self.batch = dim(description.input_ids, 0)
        self._before: Node | None = None  # the batch that the states were written with
        self._rows: dict[int, Node] = {}

    def in_order(self, state: Node) -> Output:
        """(batch, heads, tokens, width): what the state holds for beam_idx[i] in place i.

        The GPU plugin appends in place behind one Gather of the batch and nothing else. The CPU's copies what belongs
        to an index in one thread, which in a batch of one is everything: there each head is a row of its own.
        """
        if self.target == "gpu":
            return op.gather(state, self.index, i64(0)).output(0)
        _, heads, tokens, width = (-1 if x.is_dynamic else x.get_length() for x in state.get_output_partial_shape(0))
        if self._before is None:
            self._before = dim(state, 0)
        rows = op.reshape(state, op.concat([op.multiply(self._before, i64([heads])), i64([-1])], 0), False)
        picked = precise(op.gather(rows, self._row_of(heads), i64(0)))
        return op.reshape(picked, op.concat([self.batch, i64([heads, tokens, width])], 0), False).output(0)

    def _row_of(self, heads: int) -> Node:
        if heads not in self._rows:
            first = op.unsqueeze(op.multiply(op.convert(self.index, "i64"), i64(heads)), i64([1]))
            self._rows[heads] = op.reshape(op.add(first, i64(np.arange(heads)[None])), i64([-1]), False)
        return self._rows[heads]
