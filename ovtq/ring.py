"""A state of fixed length that holds the last tokens of several layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.graph import dim, f32, i64, new_variable
from ovtq.models.description import AttentionLayer, ModelDescription


class Ring:
    """The last `rows` tokens of `layers`, keys then values of each, in one state (batch, layers·2·kv_heads, rows, d).

    Zero before the text begins. One state for all: a copy and a wait in a step, where a state a layer costs one each.
    Its fixed shape tells GenAI's chat that no tokens can be cut from its end: it resets and prefills again instead.

    `head`, (layers·2·kv_heads, d), becomes a row before all others that stays where it is.
    """

    def __init__(
        self,
        description: ModelDescription,
        name: str,
        layers: Sequence[AttentionLayer],
        rows: int,
        head: np.ndarray | None = None,
    ) -> None:
        heads, d = 2 * layers[0].kv_heads * len(layers), layers[0].head_dim
        batch, new = (dim(description.input_ids, axis) for axis in (0, 1))
        self.kept = op.add(i64(range(rows)), new)
        start, length = np.zeros(1, np.float32), rows
        if head is not None:
            self.kept, length = op.concat([i64([0]), op.add(self.kept, i64([1]))], 0), rows + 1
            start = np.zeros((1, heads, length, d), np.float32)
            start[0, :, 0] = head
        self.variable = new_variable(name, [-1, heads, length, d], ov.Type.f32)
        first = op.broadcast(f32(start), op.concat([batch, i64([heads, length, d])], 0))
        self.past = op.gather(op.read_value(first, self.variable), description.beam_idx, i64(0))
        self.parts = op.split(self.past, i64(1), len(layers)).outputs()

    def store(self, news: Sequence[Node | Output]) -> Node:
        """The Assign that keeps the last tokens; `news` are the new ones of each layer, (batch, 2·kv_heads, new, d)."""
        tokens = op.concat([self.past, op.concat(list(news), 1)], 2)
        return op.assign(op.gather(tokens, self.kept, i64(2)), self.variable)
