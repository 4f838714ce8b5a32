"""Attention to a window: what sliding layers become, in blocks of queries that each read their own keys.

On the GPU, where one graph of few kernels serves all lengths, every call is blocks. On the CPU a decode step has a
shorter way: there it is the number of nodes that costs, and what they copy.
"""

from __future__ import annotations

import numpy as np
from openvino import Node
from openvino import opset15 as op

from ovtq.forms.attend import sink_columns
from ovtq.forms.ring import PackedRing, Ring
from ovtq.ir.graph import ALL, MASKED, Port, dim, f32, i64, scalar
from ovtq.models.description import AttentionLayer, ModelDescription

FAR = 2**30  # a row index past any sequence
BLOCK = 64  # queries at a time; the last ones, no more than that, are scored against all keys of the call


class WindowRows:
    """For the CPU plugin: the nodes that all sliding layers share, and the rewrite of one layer.

    The last queries, all of a decode step, are scored against all keys of the call, in two products without a copy but
    that of the window. The leading ones of a longer call, a multiple of BLOCK, are cut into blocks, each against its
    own window − 1 + BLOCK keys; where there are none, tensors are empty, and the plugin passes over their nodes.

    Columns of scores: the sink, whose key and value are 0, the rows of the ring, the new tokens.
    """

    def __init__(self, description: ModelDescription, slack: int, ring: Ring | PackedRing) -> None:
        layers = description.sliding
        H, d, window = layers[0].kv_heads, layers[0].head_dim, layers[0].reach
        rows = window - 1 + slack
        batch, new = (dim(description.input_ids, axis) for axis in (0, 1))
        self.trips = op.divide(op.subtract(new, i64([1])), i64([BLOCK]))
        self.lead = op.multiply(self.trips, i64([BLOCK]))
        self.columns = op.add(new, i64([1 + rows]))
        self.rest = op.subtract(new, self.lead)
        self.sink = op.broadcast(f32(0), op.concat([batch, i64([H, 1, d])], 0))

        # Query t sees the columns t + slack < j ≤ t + 1 + rows, and the sink; padding is 0 in attention_mask
        shown = op.slice(
            description.attention_mask, op.negative(op.add(new, i64([rows]))), i64([ALL]), i64([1]), i64([1])
        )
        before = op.subtract(self.columns, dim(shown, 1))
        shown = op.pad(shown, op.concat([i64([0]), before], 0), i64([0, 0]), "constant", i64(0))
        query = op.unsqueeze(op.range(scalar(self.lead), scalar(new), i64(1), "i64"), i64([1]))
        column = op.unsqueeze(op.range(i64(0), scalar(self.columns), i64(1), "i64"), i64([0]))
        sink = op.equal(column, i64(0))
        shown = op.logical_or(op.not_equal(shown, i64(0)), sink)  # (batch, columns)
        band = op.logical_or(_between(query, column, slack, 1 + rows), sink)
        seen = op.logical_and(op.unsqueeze(band, i64([0])), op.unsqueeze(shown, i64([1])))  # (batch, rest, columns)
        self.mask = op.unsqueeze(op.select(seen, f32(0), f32(MASKED)), i64([1, 2]))
        # Divided by the scale that is applied behind them
        logits = {layer.index: layer.sink_logits / layer.scale for layer in layers}
        self.sinks = sink_columns(logits, self.columns)

        # Block t has the sink, and the columns from t·BLOCK + slack + 1 on
        begin = op.multiply(op.range(i64(0), scalar(self.trips), i64(1), "i64"), i64(BLOCK))
        width = window - 1 + BLOCK
        own = op.add(op.unsqueeze(begin, i64([1])), i64(slack + 1 + np.arange(width)[None]))
        zero = op.broadcast(i64(0), op.concat([self.trips, i64([1])], 0))
        self.index = op.concat([zero, own], 1)  # (trips, 1 + width)
        # Whether a column is seen is told by booleans, never by masks that cancel: at bf16 the plugin rounds what a
        # Select gives, -65504 to -65536, but not a constant, so that 32 would be left of their sum
        within = np.concatenate([np.full((BLOCK, 1), True), _seen(BLOCK, width, window)], 1)
        padding = op.unsqueeze(op.gather(shown, self.index, i64(1)), i64([2]))  # (batch, trips, 1, 1 + width)
        seen = op.logical_and(padding, op.constant(within))  # (batch, trips, BLOCK, 1 + width)
        self.block_mask = op.unsqueeze(op.select(seen, f32(0), f32(MASKED)), i64([1, 3]))
        self.width = 1 + width
        self.ring, self.states = ring, ring.states
        self.lengths = (BLOCK, window, rows)

    def rewrite(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer with a window for its cache."""
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        queries = op.reshape(layer.query.source, i64([0, H, G, -1, d]), True)
        entries = enumerate((layer.key.source, layer.value.source))
        keys, values = (self.ring.join(layer, which, source, self.sink) for which, source in entries)
        contexts = [self._leading(layer, queries, keys, values), self._last(layer, queries, keys, values)]
        context = op.transpose(op.concat(contexts, 1), i64([0, 2, 1, 3]))  # (batch, H·G, new, d)
        ports = {"query": Port(queries, 0), "key": Port(keys, 2), "value": Port(values, 2)}
        return layer.rewritten(context, self.ring.cache(layer, self.lengths), **ports)

    def rows(self, layer: AttentionLayer) -> None:
        """What tells the past length: nothing, a window is as long before its first token."""

    def finish(self) -> list[Node]:
        """The Assigns, once every layer is rewritten."""
        return self.ring.store()

    def _last(self, layer: AttentionLayer, queries: Node, keys: Node, values: Node) -> Node:
        """The context of the last queries, (batch, rest, query_heads, d)."""
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        rows = op.slice(queries, self.lead, i64([ALL]), i64([1]), i64([3]))
        rows = op.reshape(rows, i64([0, 0, -1, d]), True)  # those that share a KV head
        by_query = op.concat([i64([0, 0, G]), self.rest, i64([-1])], 0)
        scores = op.reshape(op.matmul(rows, keys, False, True), by_query, True)
        # The scale comes last, for right behind the product the plugin would scale the keys instead
        scores = op.multiply(op.add(op.add(scores, self.mask), self.sinks[layer.index]), f32(layer.scale))
        weights = op.reshape(op.softmax(scores, 4), op.concat([i64([0, 0, -1]), self.columns], 0), True)
        context = op.reshape(op.matmul(weights, values, False, False), i64([0, 0, G, -1, d]), True)
        return op.reshape(op.transpose(context, i64([0, 3, 1, 2, 4])), i64([0, 0, H * G, d]), True)

    def _leading(self, layer: AttentionLayer, queries: Node, keys: Node, values: Node) -> Node:
        """The context of all before them, (batch, lead, query_heads, d)."""
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        rows = op.slice(queries, i64([0]), self.lead, i64([1]), i64([3]))
        rows = op.reshape(rows, op.concat([i64([0, H, G]), self.trips, i64([BLOCK, d])], 0), True)
        rows = op.reshape(op.transpose(rows, i64([0, 1, 3, 2, 4, 5])), i64([0, 0, 0, G * BLOCK, d]), True)
        keys, values = (op.gather(x, self.index, i64(2)) for x in (keys, values))  # (batch, H, trips, width, d)
        scores = op.matmul(rows, keys, False, True)
        scores = op.reshape(scores, i64([0, 0, 0, G, BLOCK, self.width]), True)
        sinks = np.zeros((H, 1, G, 1, self.width), np.float32)
        sinks[..., :1] = layer.sink_logits[0, :, None, :, :] / layer.scale
        scores = op.multiply(op.add(op.add(scores, self.block_mask), f32(sinks[None])), f32(layer.scale))
        # A Softmax of rank 6 the plugin would take apart
        weights = op.softmax(op.reshape(scores, i64([0, 0, 0, G * BLOCK, self.width]), True), 4)
        context = op.reshape(op.matmul(weights, values, False, False), i64([0, 0, 0, G, BLOCK, d]), True)
        context = op.transpose(context, i64([0, 2, 4, 1, 3, 5]))  # (batch, trips, BLOCK, H, G, d)
        return op.reshape(context, op.concat([i64([0]), self.lead, i64([H * G, d])], 0), True)


def _seen(queries: int, keys: int, window: int) -> np.ndarray:
    """Which keys of its block each query sees, (queries, keys): key rows i … i + window − 1 the i-th."""
    query, key = np.arange(queries)[:, None], np.arange(keys)[None]
    return (query <= key) & (key < query + window)


def _between(query: Node, column: Node, above: int, last: int) -> Node:
    """query + above < column ≤ query + last."""
    return op.logical_and(
        op.less(op.add(query, i64([above])), column), op.less_equal(column, op.add(query, i64([last])))
    )


class WindowBlocks:
    """For the GPU plugin: the nodes that all sliding layers share, and the rewrite of one layer.

    Names of axes: m queries a block, nb blocks, w = 1 + (window − 1 + m) key rows a block, the sink's first.
    Rows of a layer's keys: the state, then the new tokens, then one row of zeros, which is the sink's.
    Tables are constants for a block of `window` queries, cut to m.
    """

    def __init__(self, description: ModelDescription, slack: int, ring: Ring | PackedRing) -> None:
        layers = description.sliding
        layer, window = layers[0], layers[0].reach
        rows = window - 1 + slack
        one, origin = i64([1]), i64([0])
        batch, self.new = (dim(description.input_ids, axis) for axis in (0, 1))
        m = op.minimum(self.new, i64([window]))
        w = op.add(m, i64([window]))
        nb = op.divide(op.add(self.new, op.subtract(m, one)), m)
        self.by_block = op.concat([i64([0, 0]), nb, i64([-1, 0])], 0)  # (batch, H, nb·m, G, w) to (…, nb, m·G, w)
        zero_row = op.add(self.new, i64([rows]))
        start = op.unsqueeze(op.range(i64(0), scalar(self.new), scalar(m), "i64"), one)  # (nb, 1)

        # Rows past the end are the zero row: the sink's, and those of the last block's padding.
        queries = op.slice(i64(range(window)), origin, m, one, origin)
        self.query_rows = op.minimum(op.add(start, queries), op.subtract(self.new, one))  # (nb, m)
        keys = op.slice(i64([FAR, *range(slack, slack + 2 * window - 1)]), origin, w, one, origin)
        self.key_rows = op.minimum(op.add(start, keys), zero_row)  # (nb, w)

        # Query i of a block sees key rows i … i + window − 1 of it, and always the sink.
        # Counted in ones, which every inference precision holds exactly: two masks that cancel might be rounded apart.
        hidden = np.where(_seen(window, 2 * window - 1, window), 0, 1)
        hidden = np.concatenate([np.full((window, 1), -1), hidden], 1)  # outweighs that the sink's row is no token
        band = op.slice(f32(hidden), i64([0, 0]), op.concat([m, w], 0), i64([1, 1]), i64([0, 1]))
        shown = op.pad(description.attention_mask, i64([0, rows]), i64([0, 1]), "constant", i64(0))
        shown = op.slice(shown, op.negative(op.add(zero_row, one)), i64([FAR]), one, one)  # (batch, rows + new + 1)
        shown = op.unsqueeze(op.gather(shown, self.key_rows, i64(1)), i64(2))  # (batch, nb, 1, w)
        padding = op.select(op.equal(shown, i64(0)), f32(1), f32(0))
        mask = op.multiply(op.clamp(op.add(padding, band), 0, 1), f32(MASKED))  # (batch, nb, m, w)
        self.mask = op.reshape(mask, op.concat([i64([0, 1, -1, 1]), w], 0), True)  # (batch, 1, nb·m, 1, w)

        # The sink logits of all layers in the sink's column, divided by the scale that is applied behind them.
        is_sink = op.slice(f32(np.eye(1, 2 * window)[0]), origin, w, one, origin)
        sinks = np.stack([layer.sink_logits[0, :, None, :, 0] / layer.scale for layer in layers])
        sinks = op.split(op.multiply(is_sink, f32(sinks)), i64(0), len(layers))  # (1, H, 1, G, w) each
        self.sinks = dict(zip([layer.index for layer in layers], sinks.outputs(), strict=True))

        self.zero_rows = op.broadcast(f32(0), op.concat([batch, i64([2 * layer.kv_heads, 1, layer.head_dim])], 0))
        self.ring, self.states = ring, ring.states
        self.lengths = (window, rows)

    def rewrite(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer with a window for its cache; shapes are noted with H = kv_heads, d = head_dim."""
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        new = op.concat([layer.key.source, layer.value.source], 1)  # (batch, 2H, new, d)
        tokens = self.ring.join(layer, 0, new, last=self.zero_rows)
        keys, values = op.split(op.gather(tokens, self.key_rows, i64(2)), i64(1), 2).outputs()  # (batch, H, nb, w, d)

        entry = op.reshape(layer.query.source, i64([0, H, G, -1, d]), True)
        query = op.transpose(entry, i64([0, 1, 3, 2, 4]))  # (batch, H, new, G, d)
        query = op.reshape(op.gather(query, self.query_rows, i64(2)), i64([0, 0, 0, -1, d]), True)
        # The Reshape keeps the GPU plugin from fusing the sums into a product of rank 5, which then adds the wrong
        # blocks' masks.
        scores = op.reshape(op.matmul(query, keys, False, True), i64([0, 0, -1, G, 0]), True)  # (batch, H, nb·m, G, w)
        scores = op.multiply(op.add(op.add(scores, self.mask), self.sinks[layer.index]), f32(layer.scale))
        weights = op.reshape(op.softmax(scores, 4), self.by_block, True)
        context = op.matmul(weights, values, False, False)  # (batch, H, nb, m·G, d)
        context = op.reshape(context, i64([0, 0, -1, G, d]), True)
        context = op.slice(context, i64([0]), self.new, i64([1]), i64([2]))  # (batch, H, new, G, d)
        context = op.reshape(op.transpose(context, i64([0, 2, 1, 3, 4])), i64([0, 0, H * G, d]), True)
        context = op.transpose(context, i64([0, 2, 1, 3]))  # (batch, H·G, new, d)
        ports = {"query": Port(entry, 0), "key": Port(new, 0), "value": Port(new, 1)}
        return layer.rewritten(context, self.ring.cache(layer, self.lengths), **ports)

    def rows(self, layer: AttentionLayer) -> None:
        """What tells the past length: nothing, a window is as long before its first token."""

    def finish(self) -> list[Node]:
        """The Assigns, once every layer is rewritten."""
        return self.ring.store()
