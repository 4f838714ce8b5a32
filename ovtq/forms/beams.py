"""The rows of states in the order of the beams that go on."""

from __future__ import annotations

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op
from openvino.op.util import Variable

from ovtq.ir.graph import dim, i64, new_variable, precise
from ovtq.models.description import ModelDescription
from ovtq.states import StateSpec


class Beams:
    """beam_idx, and what reading states in its order needs, once for all of them; `target` is gpu or cpu.

    `states` are those that were made with it.
    """

    def __init__(self, description: ModelDescription, target: str) -> None:
        self.index, self.target = description.beam_idx, target
        self.batch = dim(description.input_ids, 0)
        self.states: list[StateSpec] = []
        self._pairs: dict[tuple[int, int | None], Node] = {}

    def variable(self, state: StateSpec) -> Variable:
        """A new variable for that state."""
        self.states.append(state)
        return new_variable(state)

    def in_order(self, state: Node, exact: bool = True) -> Output:
        """(batch, heads, tokens, width): what the state holds for beam_idx[i] in place i.

        `exact`: as it is declared, whatever the CPU plugin computes in; else it keeps and hands it out in that.

        The GPU plugin appends in place behind one Gather of the batch and nothing else. The CPU's Gather copies what
        belongs to an index in one thread, which in a batch of one is everything: there each head is an index.
        """
        if self.target == "gpu":
            return op.gather(state, self.index, i64(0)).output(0)
        heads = state.get_output_partial_shape(0)[1].get_length()
        found = op.gather_nd(state, self._beam_and_head(heads), 0)
        return (precise(found) if exact else found).output(0)

    def in_parts(self, state: Node, count: int) -> list[Output]:
        """What `in_order` is for a CPU, not `exact`: `count` parts (batch, heads/count, tokens, width) of its heads.

        One copy of all of them: the parts of the first axis are where they are.
        """
        heads = state.get_output_partial_shape(0)[1].get_length()
        found = op.gather_nd(state, self._beam_and_head(heads, count), 0)  # (count, batch, heads/count, tokens, width)
        return [op.squeeze(part, i64([0])).output(0) for part in op.split(found, i64(0), count).outputs()]

    def in_groups(self, state: Node, groups: int, parts: int) -> list[Output]:
        """What `in_order` is for a CPU, `groups` times (parts, batch, heads/groups/parts, tokens, width)."""
        heads = state.get_output_partial_shape(0)[1].get_length()
        index = op.split(self._beam_and_head(heads, groups * parts), i64(0), groups)
        return [precise(op.gather_nd(state, some, 0)).output(0) for some in index.outputs()]

    def _beam_and_head(self, heads: int, parts: int | None = None) -> Node:
        """(batch, heads, 2), or (parts, batch, heads/parts, 2)."""
        if (heads, parts) not in self._pairs:
            beam = op.unsqueeze(op.convert(self.index, "i64"), i64([1, 2]))
            head = np.stack([np.zeros(heads), np.arange(heads)], 1)
            head = head[None] if parts is None else head.reshape(parts, 1, -1, 2)
            self._pairs[heads, parts] = op.add(op.multiply(beam, i64([[[1, 0]]])), i64(head))
        return self._pairs[heads, parts]
