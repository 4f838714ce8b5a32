"""The form for the GPU plugin of attention to a window: every call in blocks, by one graph of few kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.forms.window import seen
from ovtq.forms.window_state import PackedWindowState, WindowState
from ovtq.ir.graph import MASKED, Port, dim, f32, i64, scalar
from ovtq.models.description import AttentionLayer, ModelDescription

BEYOND = 2**30  # a row index past any sequence


class Blocks:
    """Attention of `new` tokens to a window, block by block of queries.

    Names of axes: m queries per block, nb blocks, w = 1 + (window − 1 + m) key rows per block, the sink's first.
    Rows of a layer's keys: `rows` past ones, of which the last are the window, then the new tokens, then one row of
    zeros, which is the sink's. `shown` is attention_mask, `new` and `batch` (1,) i64. Tables are constants for a block
    of `window` queries, cut to m.
    """

    def __init__(self, layer: AttentionLayer, batch: Node, new: Node, shown: Node | Output, rows: int) -> None:
        window, self.new = layer.reach, new
        slack = rows - (window - 1)
        one, origin = i64([1]), i64([0])
        m = op.minimum(self.new, i64([window]))
        self.w = w = op.add(m, i64([window]))
        nb = op.divide(op.add(self.new, op.subtract(m, one)), m)
        self.by_block = op.concat([i64([0, 0]), nb, i64([-1, 0])], 0)  # (batch, H, nb·m, G, w) to (…, nb, m·G, w)
        zero_row = op.add(self.new, i64([rows]))
        start = op.unsqueeze(op.range(i64(0), scalar(self.new), scalar(m), "i64"), one)  # (nb, 1)

        # Rows past the end are the zero row: the sink's, and those of the last block's padding.
        queries = op.slice(i64(range(window)), origin, m, one, origin)
        self.query_rows = op.minimum(op.add(start, queries), op.subtract(self.new, one))  # (nb, m)
        keys = op.slice(i64([BEYOND, *range(slack, slack + 2 * window - 1)]), origin, w, one, origin)
        self.key_rows = op.minimum(op.add(start, keys), zero_row)  # (nb, w)

        # Query i of a block sees key rows i … i + window − 1 of it, and always the sink.
        # Counted in ones, which every inference precision holds exactly: two masks that cancel might be rounded apart.
        hidden = np.where(seen(window, 2 * window - 1, window), 0, 1)
        hidden = np.concatenate([np.full((window, 1), -1), hidden], 1)  # outweighs that the sink's row is no token
        band = op.slice(f32(hidden), i64([0, 0]), op.concat([m, w], 0), i64([1, 1]), i64([0, 1]))
        shown = op.pad(shown, i64([0, rows]), i64([0, 1]), "constant", i64(0))
        shown = op.slice(shown, op.negative(op.add(zero_row, one)), i64([BEYOND]), one, one)  # (batch, rows + new + 1)
        shown = op.unsqueeze(op.gather(shown, self.key_rows, i64(1)), i64(2))  # (batch, nb, 1, w)
        padding = op.select(op.equal(shown, i64(0)), f32(1), f32(0))
        mask = op.multiply(op.clamp(op.add(padding, band), 0, 1), f32(MASKED))  # (batch, nb, m, w)
        self.mask = op.reshape(mask, op.concat([i64([0, 1, -1, 1]), w], 0), True)  # (batch, 1, nb·m, 1, w)
        self.zero_rows = op.broadcast(f32(0), op.concat([batch, i64([2 * layer.kv_heads, 1, layer.head_dim])], 0))

    def sinks(self, layers: Sequence[AttentionLayer]) -> dict[int, Output]:
        """Sink logits of each layer in the sink's column, (1, H, 1, G, w), divided by the scale applied behind them."""
        is_sink = op.slice(f32(np.eye(1, 2 * layers[0].reach)[0]), i64([0]), self.w, i64([1]), i64([0]))
        sinks = np.stack([layer.sink_logits[0, :, None, :, 0] / layer.scale for layer in layers])
        found = op.split(op.multiply(is_sink, f32(sinks)), i64(0), len(layers))
        return dict(zip([layer.index for layer in layers], found.outputs(), strict=True))

    def attend(self, layer: AttentionLayer, entry: Node, every: Node, sinks: Output) -> Node:
        """The context, (batch, H·G, new, d); `entry` are queries (batch, H, G, new, d), `every` (batch, 2H, rows, d).

        H = kv_heads, d = head_dim.
        """
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        keys, values = op.split(op.gather(every, self.key_rows, i64(2)), i64(1), 2).outputs()  # (batch, H, nb, w, d)
        query = op.transpose(entry, i64([0, 1, 3, 2, 4]))  # (batch, H, new, G, d)
        query = op.reshape(op.gather(query, self.query_rows, i64(2)), i64([0, 0, 0, -1, d]), True)
        # The Reshape keeps the GPU plugin from fusing the sums into a product of rank 5, which then adds the wrong
        # blocks' masks.
        scores = op.reshape(op.matmul(query, keys, False, True), i64([0, 0, -1, G, 0]), True)  # (batch, H, nb·m, G, w)
        scores = op.multiply(op.add(op.add(scores, self.mask), sinks), f32(layer.scale))
        weights = op.reshape(op.softmax(scores, 4), self.by_block, True)
        context = op.matmul(weights, values, False, False)  # (batch, H, nb, m·G, d)
        context = op.reshape(context, i64([0, 0, -1, G, d]), True)
        context = op.slice(context, i64([0]), self.new, i64([1]), i64([2]))  # (batch, H, new, G, d)
        context = op.reshape(op.transpose(context, i64([0, 2, 1, 3, 4])), i64([0, 0, H * G, d]), True)
        return op.transpose(context, i64([0, 2, 1, 3]))


class GpuWindow:
    """For the GPU plugin: the nodes that all sliding layers share, and the rewrite of one layer."""

    def __init__(self, description: ModelDescription, slack: int, tokens: WindowState | PackedWindowState) -> None:
        layers = description.sliding
        window = layers[0].reach
        rows = window - 1 + slack
        batch, new = (dim(description.input_ids, axis) for axis in (0, 1))
        self.blocks = Blocks(layers[0], batch, new, description.attention_mask, rows)
        self.sinks = self.blocks.sinks(layers)
        self.tokens, self.states = tokens, tokens.states
        self.lengths = (window, rows)

    def rewrite(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer with a window for its cache."""
        new = op.concat([layer.key.source, layer.value.source], 1)  # (batch, 2·kv_heads, new, head_dim)
        every = self.tokens.join(layer, 0, new, last=self.blocks.zero_rows)
        entry = op.reshape(layer.query.source, i64([0, layer.kv_heads, layer.group, -1, layer.head_dim]), True)
        context = self.blocks.attend(layer, entry, every, self.sinks[layer.index])
        ports = {"query": Port(entry, 0), "key": Port(new, 0), "value": Port(new, 1)}
        return layer.rewritten(context, self.tokens.cache(layer, self.lengths), **ports)

    def rows(self, layer: AttentionLayer) -> None:
        """What tells the past length: nothing, a window is as long before its first token."""

    def finish(self) -> list[Node]:
        """The Assigns of all states, once every layer is rewritten."""
        return self.tokens.store()
