"""The form for the CPU plugin of attention to a window: a decode step without blocks, longer calls in blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.forms.attend import sink_columns
from ovtq.forms.cpu.beams import CpuBeams
from ovtq.forms.window import seen
from ovtq.forms.window_state import WindowState, WindowTokens
from ovtq.ir.graph import ALL, MASKED, Port, dim, f32, i64, scalar
from ovtq.models.description import AttentionLayer, ModelDescription

BLOCK = 64  # queries at a time; the last ones, no more than that, are scored against all keys of the call


class CpuWindowState(WindowState):
    """Read in one copy of keys and values apart; what is kept comes from what layers have joined already."""

    beams: CpuBeams

    def _parts(self, layers: int) -> list[Output]:
        return self.beams.in_parts(self.state.read, 2 * layers)

    def store(self) -> list[Node]:
        """The Assign that keeps the last tokens, once every layer has joined its own."""
        kept = op.add(self.state.kept, i64([self.skipped]))
        return [self.state.keep(op.gather(self.in_turn(self.joined), kept, i64(2)))]


class CpuWindow:
    """For the CPU plugin: the nodes that all sliding layers share, and the rewrite of one layer.

    The last queries, all of a decode step, are scored against all keys of the call, in two products without a copy but
    that of the window. The leading ones of a longer call, a multiple of BLOCK, are cut into blocks, each against its
    own window − 1 + BLOCK keys; where there are none, tensors are empty, and the plugin passes over their nodes.

    Columns of scores: the sink, whose key and value are 0, the rows of the state, the new tokens.
    """

    tokens: WindowTokens

    def __init__(self, description: ModelDescription, slack: int, tokens: WindowTokens) -> None:
        layers = description.sliding
        H, d, window = layers[0].kv_heads, layers[0].head_dim, layers[0].reach
        self.window, self.slack, self.tokens, self.states = window, slack, tokens, tokens.states
        batch, new = (dim(description.input_ids, axis) for axis in (0, 1))
        self.trips = op.divide(op.subtract(new, i64([1])), i64([BLOCK]))
        self.lead = op.multiply(self.trips, i64([BLOCK]))
        self.columns = op.add(new, self._rows(1))
        self.rest = op.subtract(new, self.lead)
        self.sink = op.broadcast(f32(0), op.concat([batch, i64([H, 1, d])], 0))

        # Query t sees the columns t + slack < j ≤ t + 1 + rows, and the sink; padding is 0 in attention_mask
        shown = op.slice(
            description.attention_mask, op.negative(op.add(new, self._rows(0))), i64([ALL]), i64([1]), i64([1])
        )
        before = op.subtract(self.columns, dim(shown, 1))
        shown = op.pad(shown, op.concat([i64([0]), before], 0), i64([0, 0]), "constant", i64(0))
        query = op.unsqueeze(op.range(scalar(self.lead), scalar(new), i64(1), "i64"), i64([1]))
        column = op.unsqueeze(op.range(i64(0), scalar(self.columns), i64(1), "i64"), i64([0]))
        shown = op.not_equal(shown, i64(0))  # (batch, columns)
        band = _between(query, column, self._rows(1 - window), self._rows(1))
        band, shown = self._sink_shown(column, band, shown)
        visible = op.logical_and(op.unsqueeze(band, i64([0])), op.unsqueeze(shown, i64([1])))  # (batch, rest, columns)
        self.mask = op.unsqueeze(op.select(visible, f32(0), f32(MASKED)), i64([1, 2]))
        self.sinks = self._sinks(layers)
        self._blocks(shown)
        self.lengths: tuple[int, ...] = (BLOCK, window, window - 1 + slack)

    def _rows(self, more: int) -> Node:
        """How many rows are held, and `more`, a vector of one element."""
        return i64([self.window - 1 + self.slack + more])

    def _sink_shown(self, column: Node, band: Node, shown: Node) -> tuple[Node, Node]:
        """The band and the tokens that are shown, with the sink's column, which every query sees."""
        sink = op.equal(column, i64(0))
        shown = op.logical_or(shown, sink)
        return op.logical_or(band, sink), shown

    def _sinks(self, layers: Sequence[AttentionLayer]) -> Mapping[int, Output]:
        """What is added to scores behind the mask, divided by the scale that is applied behind both."""
        return sink_columns({layer.index: layer.sink_logits / layer.scale for layer in layers}, self.columns)

    def _blocks(self, shown: Node) -> None:
        """Which columns each block of leading queries is scored against, and what it sees of them."""
        # Block t has the sink, and the columns from t·BLOCK + slack + 1 on
        begin = op.multiply(op.range(i64(0), scalar(self.trips), i64(1), "i64"), i64(BLOCK))
        width = self.window - 1 + BLOCK
        own = op.add(op.unsqueeze(begin, i64([1])), i64(self.slack + 1 + np.arange(width)[None]))
        zero = op.broadcast(i64(0), op.concat([self.trips, i64([1])], 0))
        self.index = op.concat([zero, own], 1)  # (trips, 1 + width)
        # Whether a column is seen is told by booleans, never by masks that cancel: at bf16 the plugin rounds what a
        # Select gives, -65504 to -65536, but not a constant, so that 32 would be left of their sum
        within = np.concatenate([np.full((BLOCK, 1), True), seen(BLOCK, width, self.window)], 1)
        padding = op.unsqueeze(op.gather(shown, self.index, i64(1)), i64([2]))  # (batch, trips, 1, 1 + width)
        visible = op.logical_and(padding, op.constant(within))  # (batch, trips, BLOCK, 1 + width)
        self.block_mask = op.unsqueeze(op.select(visible, f32(0), f32(MASKED)), i64([1, 3]))
        self.width = 1 + width

    def _wide(self, shape: list[int]) -> Node:
        """A shape of scores of blocks, with the columns of a block behind."""
        return i64([*shape, self.width])

    def rewrite(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer with a window for its cache."""
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        queries = op.reshape(layer.query.source, i64([0, H, G, -1, d]), True)
        entries = enumerate((layer.key.source, layer.value.source))
        keys, values = (self.tokens.join(layer, which, source, self.sink) for which, source in entries)
        contexts = [self._leading(layer, queries, keys, values), self._last(layer, queries, keys, values)]
        context = op.transpose(op.concat(contexts, 1), i64([0, 2, 1, 3]))  # (batch, H·G, new, d)
        ports = {"query": Port(queries, 0), "key": Port(keys, 2), "value": Port(values, 2)}
        return layer.rewritten(context, self.tokens.cache(layer, self.lengths), **ports)

    def rows(self, layer: AttentionLayer) -> None:
        """What tells the past length: nothing, a window is as long before its first token."""

    def finish(self) -> list[Node]:
        """The Assigns, once every layer is rewritten."""
        return self.tokens.store()

    def _last(self, layer: AttentionLayer, queries: Node, keys: Node, values: Node) -> Node:
        """The context of the last queries, (batch, rest, query_heads, d)."""
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        rows = op.slice(queries, self.lead, i64([ALL]), i64([1]), i64([3]))
        rows = op.reshape(rows, i64([0, 0, -1, d]), True)  # those that share a KV head
        by_query = op.concat([i64([0, 0, G]), self.rest, i64([-1])], 0)
        scores = op.reshape(op.matmul(rows, keys, False, True), by_query, True)
        # The scale comes last, for right behind the product the plugin would scale the keys instead
        scores = op.add(scores, self.mask)
        if layer.index in self.sinks:
            scores = op.add(scores, self.sinks[layer.index])
        scores = op.multiply(scores, f32(layer.scale))
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
        scores = op.reshape(scores, self._wide([0, 0, 0, G, BLOCK]), True)
        scores = op.add(scores, self.block_mask)
        if layer.index in self.sinks:
            sinks = np.zeros((H, 1, G, 1, self.width), np.float32)
            sinks[..., :1] = layer.sink_logits[0, :, None, :, :] / layer.scale
            scores = op.add(scores, f32(sinks[None]))
        scores = op.multiply(scores, f32(layer.scale))
        # A Softmax of rank 6 the plugin would take apart
        weights = op.softmax(op.reshape(scores, self._wide([0, 0, 0, G * BLOCK]), True), 4)
        context = op.reshape(op.matmul(weights, values, False, False), i64([0, 0, 0, G, BLOCK, d]), True)
        context = op.transpose(context, i64([0, 2, 4, 1, 3, 5]))  # (batch, trips, BLOCK, H, G, d)
        return op.reshape(context, op.concat([i64([0]), self.lead, i64([H * G, d])], 0), True)


def _between(query: Node, column: Node, above: Node, last: Node) -> Node:
    """query + above < column ≤ query + last."""
    return op.logical_and(op.less(op.add(query, above), column), op.less_equal(column, op.add(query, last)))
