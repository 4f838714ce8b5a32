"""A state of fixed length that holds the last tokens of several layers."""

from __future__ import annotations

from collections.abc import Sequence

import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.graph import dim, f32, i64, new_variable
from ovtq.models.description import AttentionLayer, ModelDescription


class Ring:
    """The last `rows` tokens of `layers`, keys then values of each, in one state (batch, layers·2·kv_heads, rows, d).

    Zero before the text begins. One state for all: a copy and a wait in a step, where a state a layer costs one each.
    Its fixed shape tells GenAI's chat that no tokens can be cut from its end: it resets and prefills again instead.
    """

    def __init__(self, description: ModelDescription, name: str, layers: Sequence[AttentionLayer], rows: int) -> None:
        heads, d = 2 * layers[0].kv_heads * len(layers), layers[0].head_dim
        batch = dim(description.input_ids, 0)
        self.tail = op.add(i64(range(rows)), dim(description.input_ids, 1))
        self.variable = new_variable(name, [-1, heads, rows, d], ov.Type.f32)
        empty = op.broadcast(f32(0), op.concat([batch, i64([heads, rows, d])], 0))
        self.past = op.gather(op.read_value(empty, self.variable), description.beam_idx, i64(0))
        self.parts = op.split(self.past, i64(1), len(layers)).outputs()

    def store(self, news: Sequence[Node | Output]) -> Node:
        """The Assign that keeps the last tokens; `news` are the new ones of each layer, (batch, 2·kv_heads, new, d)."""
        tokens = op.concat([self.past, op.concat(list(news), 1)], 2)
        return op.assign(op.gather(tokens, self.tail, i64(2)), self.variable)
