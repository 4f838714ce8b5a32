"""Attention to a history of packed codes and to recent tokens at full precision, as graph nodes.

One softmax over three kinds of columns: the history, the recent and new tokens, and the sink. Query heads that share a
KV head are rows of one product, so K and V are never broadcast. A call of more than BLOCK tokens runs in blocks of as
many queries, in a Loop, so that no more than query_heads·BLOCK·tokens scores exist at a time; the last block, which is
all of a decode step, is outside of it, for a Loop copies what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.graph import MASKED, dim, f32, i64, scalar
from ovtq.models.description import AttentionLayer, ModelDescription
from ovtq.packing import Layout
from ovtq.quantizer import unpack

BLOCK = 32  # queries at a time: enough rows for the products to be worth the unpacking before them
PORTION = 2  # KV heads whose history is unpacked at a time: what a product reads was then just written, to a cache
ALL = 2**31 - 1


@dataclass(frozen=True)
class History:
    """One tensor's (K or V) history: bytes (batch, kv_heads, past, ·) i8 and scales (batch, kv_heads, past, 1).

    Without `layout` it holds the tensor itself, (…, d), and has no scales.
    """

    data: Output
    layout: Layout | None
    scales: Output | None


class Attention:
    """The nodes that all layers of a model share, and the attention of one layer."""

    def __init__(self, description: ModelDescription, layers: Sequence[AttentionLayer], window: int) -> None:
        self.window = window
        self.batch, self.new = (dim(description.input_ids, axis) for axis in (0, 1))
        total = dim(description.attention_mask, 1)
        self.past = op.subtract(total, self.new)
        self.recent = op.add(self.new, i64([window + 1]))  # columns: residual window, new tokens, sink
        one, last = i64([1]), i64([3])
        trips = op.divide(op.subtract(self.new, one), i64([BLOCK]))
        self.trips = scalar(trips)
        self.lead = op.multiply(trips, i64([BLOCK]))  # queries in the Loop
        self.keep = op.multiply(op.minimum(trips, one), i64([ALL]))  # what it reads of an axis: nothing or all

        # The history is what no recent row holds: every query sees all of it but the padding.
        shown = description.attention_mask
        older = op.maximum(op.subtract(self.past, i64([window])), i64([0]))
        old = op.slice(shown, i64([0]), older, one, one)
        behind = op.concat([i64([0]), op.subtract(self.past, older)], 0)
        old = op.pad(old, i64([0, 0]), behind, "constant", i64(0))
        self.old_mask = _additive(op.unsqueeze(old, i64([1, 2])))  # (batch, 1, 1, past)
        # Rows before the text begins are no tokens; the sink is always seen.
        near = op.pad(shown, i64([0, window]), i64([0, 1]), "constant", i64(0))
        near = op.slice(near, op.negative(self.recent), i64([ALL]), one, one)
        is_sink = op.pad(i64([1]), op.subtract(self.recent, one), i64([0]), "constant", i64(0))
        self.is_sink = is_sink
        near = op.maximum(near, is_sink)
        self.near_mask = op.unsqueeze(near, i64([1, 2, 3]))  # (batch, 1, 1, 1, recent), 0 or 1
        self.direct_mask = self._mask(self.near_mask, self.recent, self.lead, op.subtract(self.new, self.lead))

        heads, group = layers[0].kv_heads, layers[0].group
        sinks = np.stack([_sinks(layer).reshape(1, heads, group, 1, 1) for layer in layers])
        columns = op.concat([i64([0] * 5), op.subtract(self.recent, one)], 0)
        padded = op.pad(f32(sinks), columns, i64([0] * 6), "constant", op.constant(np.float32(0)))
        self.sinks = op.split(padded, i64(0), len(layers)).outputs()  # (1, 1, H, G, 1, recent) each

    def _mask(self, near: Node | Output, recent: Node, first: Node, count: Node) -> Node:
        """(batch, 1, 1, count, recent): query first + i sees rows ≤ window + first + i, and the sink."""
        row = op.unsqueeze(op.range(scalar(first), scalar(op.add(first, count)), i64(1), "i64"), i64([1]))
        column = op.range(i64(0), scalar(recent), i64(1), "i64")
        early = op.less_equal(column, op.add(row, i64([self.window])))
        early = op.logical_or(early, op.equal(column, op.subtract(recent, i64([1]))))
        return op.select(op.logical_and(early, op.not_equal(near, i64(0))), f32(0), f32(MASKED))

    def attend(
        self, number: int, layer: AttentionLayer, keys: History, values: History, recent: tuple[Output, Output]
    ) -> tuple[Node, Node]:
        """Nodes of layer `number`: where its queries enter, and its context (batch, query_heads, new, d).

        `recent`: keys and values (batch, kv_heads, window + new + 1, d), the last row the sink's.
        """
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        entry = op.multiply(layer.query.source, f32(layer.scale))
        query = op.reshape(entry, i64([0, H, G, -1, d]), True)  # (batch, H, G, new, d)
        sinks = op.squeeze(self.sinks[number], i64([0]))
        form = _Form(layer, keys.layout, values.layout)

        # The leading blocks. With none to run, a Loop leaves its result in the shape it last had, or in none at all: so
        # it is cut to length, and joined to the rest as a vector, tokens first.
        lead, axis = self.lead, i64([2])
        cut: Callable[[Output], Output] = lambda x: op.slice(x, i64([0]), self.keep, i64([1]), axis).output(0)  # noqa: E731
        outer = [
            op.slice(query, i64([0]), lead, i64([1]), i64([3])).output(0),
            *map(cut, (keys.data, values.data, *recent)),
            *map(cut, filter(None, (keys.scales, values.scales))),
            op.slice(self.old_mask, i64([0]), self.keep, i64([1]), i64([3])).output(0),
            self.near_mask.output(0),
            sinks.output(0),
        ]
        inner = [op.parameter(x.get_partial_shape(), x.get_element_type()) for x in outer]
        turn = op.parameter([], np.int64)
        it = iter(x.output(0) for x in inner)
        q, k, v, rk, rv = (next(it) for _ in range(5))
        ks = next(it) if keys.scales else None
        vs = next(it) if values.scales else None
        old, near, sink = (next(it) for _ in range(3))
        first = op.multiply(op.unsqueeze(turn, i64([0])), i64([BLOCK]))
        q = op.slice(q, first, op.add(first, i64([BLOCK])), i64([1]), i64([3]))
        columns = dim(near, 4)
        mask = self._mask(near, columns, first, i64([BLOCK]))
        block = form(
            q, History(k, keys.layout, ks), History(v, values.layout, vs), (rk, rv), old, mask, sink,
            i64([BLOCK]), dim(k, 2), columns,
        )  # fmt: skip
        results = [op.result(op.constant(np.array(True))), op.result(op.unsqueeze(_flat(block), i64([0])))]
        body = ov.Model(results, [turn, *inner], "blocks")
        loop = op.loop(self.trips, op.constant(np.array(True)))
        loop.set_function(body)
        loop.set_special_body_ports([0, 0])
        for parameter, source in zip(inner, outer, strict=True):
            loop.set_invariant_input(parameter, source)
        leading = loop.get_concatenated_slices(results[1].output(0), 0, 1, 1, -1, 0)  # (trips, BLOCK·batch·H·G·d)
        leading = op.slice(leading, i64([0]), op.unsqueeze(self.trips, i64([0])), i64([1]), i64([0]))
        leading = op.reshape(leading, i64([-1]), False)

        rest = op.slice(query, lead, i64([ALL]), i64([1]), i64([3]))
        count = op.subtract(self.new, lead)
        direct = form(
            rest, keys, values, recent, self.old_mask, self.direct_mask, sinks, count, self.past, self.recent
        )  # fmt: skip
        tokens = op.concat([self.new, self.batch, i64([H * G, d])], 0)
        context = op.reshape(op.concat([leading, _flat(direct)], 0), tokens, False)
        return entry, op.transpose(context, i64([1, 2, 0, 3]))


def _flat(context: Node) -> Node:
    """(batch, H, G, tokens, d) as a vector, tokens first."""
    return op.reshape(op.transpose(context, i64([3, 0, 1, 2, 4])), i64([-1]), False)


class _Form:
    """The attention of a block of queries of one layer."""

    def __init__(self, layer: AttentionLayer, keys: Layout | None, values: Layout | None) -> None:
        # Constants that the block inside of the Loop and the one outside share by value.
        self.layer, self.keys, self.values = layer, keys, values

    def __call__(
        self,
        query: Node | Output,
        keys: History,
        values: History,
        recent: tuple[Output, Output],
        old_mask: Node | Output,
        near_mask: Node | Output,
        sinks: Node | Output,
        count: Node,
        past: Node,
        columns: Node,
    ) -> Node:
        """Context (batch, H, G, count, d) of queries (batch, H, G, count, d), scaled already."""
        H, G, d = self.layer.kv_heads, self.layer.group, self.layer.head_dim
        rows = op.reshape(query, i64([0, 0, -1, d]), True)  # (batch, H, G·count, d)
        by_query = op.concat([i64([0, 0, G]), count, i64([-1])], 0)
        near = op.reshape(op.matmul(rows, recent[0], False, True), by_query, True)
        near = op.add(op.add(near, near_mask), sinks)
        near = op.reshape(near, op.concat([i64([0, 0, -1]), columns], 0), True)
        far = _products(rows, keys, H)
        if keys.scales:
            far = op.multiply(far, op.reshape(keys.scales, i64([0, H, 1, -1]), True))
        far = op.add(far, old_mask)
        weights = op.softmax(op.concat([far, near], 3), 3)
        far, near = op.variadic_split(weights, i64(3), op.concat([past, columns], 0)).outputs()
        if values.scales:
            far = op.multiply(far, op.reshape(values.scales, i64([0, H, 1, -1]), True))
        context = op.add(_sums(far, values, H), op.matmul(near, recent[1], False, False))
        return op.reshape(context, i64([0, 0, G, -1, d]), True)


def _products(rows: Node, keys: History, heads: int) -> Node:
    """rows · (codes − mid)ᵀ; the features of packed keys are decoded on the rows' side."""
    if keys.layout is None:
        return op.matmul(rows, keys.data, False, True)
    if not _is_identity(keys.layout.decode):
        rows = op.matmul(rows, f32(keys.layout.decode), False, True)
    counts = i64([group.count for group in keys.layout.groups])
    products = []
    for some_rows, some_keys in zip(_portions(rows, heads), _portions(keys.data, heads), strict=True):
        parts = op.variadic_split(some_rows, i64(3), counts).outputs()
        pairs = zip(parts, unpack(some_keys, keys.layout), strict=True)
        products.append(reduce(op.add, (op.matmul(part, feature, False, True) for part, feature in pairs)))
    return _joined(products, 1)


def _sums(weights: Node | Output, values: History, heads: int) -> Node:
    """weights · (codes − mid); the features of packed values are decoded after the sum."""
    if values.layout is None:
        return op.matmul(weights, values.data, False, False)
    sums = [
        _joined([op.matmul(some_weights, feature, False, False) for feature in unpack(some_values, values.layout)], 3)
        for some_weights, some_values in zip(_portions(weights, heads), _portions(values.data, heads), strict=True)
    ]
    decode = values.layout.decode
    return _joined(sums, 1) if _is_identity(decode) else op.matmul(_joined(sums, 1), f32(decode.T), False, True)


def _portions(tensor: Node | Output, heads: int) -> list[Node | Output]:
    count = heads // PORTION if heads % PORTION == 0 else 1
    return op.split(tensor, i64(1), count).outputs() if count > 1 else [tensor]


def _joined(parts: Sequence[Node], axis: int) -> Node:
    return op.concat(list(parts), axis) if len(parts) > 1 else parts[0]


def _is_identity(matrix: np.ndarray) -> bool:
    return matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix)))


def _additive(shown: Node) -> Node:
    return op.select(op.equal(shown, i64(0)), f32(MASKED), f32(0))


def _sinks(layer: AttentionLayer) -> np.ndarray:
    return layer.sinks if layer.sinks is not None else np.full(layer.query_heads, MASKED)
