"""The CPU form's attention of some queries of one layer: what it reads, and what it makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from openvino import Node, Output
from openvino import opset15 as op

from ovtq.forms.attend import FullCacheSpec
from ovtq.forms.quantizer import by_batch, low_bits_matrix, unpack
from ovtq.ir.graph import Tensors, f32, i64
from ovtq.models.description import AttentionLayer


@dataclass(frozen=True)
class HistoryMask(Tensors):
    """What is done to the scores of the history, (batch, 1 or kv_heads, 1, stay): `mask` is added to them.

    They, and the weights, are multiplied by `factor`, if there is one.
    """

    mask: Output
    factor: Output | None = None


@dataclass(frozen=True)
class History(Tensors):
    """Keys and values as they are held, (batch, kv_heads, stay, ·); and the scales of what is packed, if anything is.

    Those are (tensors, batch, kv_heads, stay, 1).
    """

    keys: Output
    values: Output
    scales: Output | None


@dataclass(frozen=True)
class Block(Tensors):
    """What attention reads: queries (batch, kv_heads, group, count, d), recent keys and values, and the history.

    Of the recent columns the sink's is the first: keys and values (batch, kv_heads, recent, d); `sinks`, (1, kv_heads,
    group, 1, recent), are added to their scores; `recent_tokens`, (batch, 1, recent), says which are tokens. To the
    scores of the history `history_mask` is done.
    """

    queries: Output
    keys: Output
    values: Output
    sinks: Output
    recent_tokens: Output
    history_mask: HistoryMask
    history: History


@dataclass(frozen=True)
class Sizes:
    """Lengths, i64 vectors of one element: sequences, rows of history, recent columns, queries."""

    batch: Node
    past: Node
    columns: Node
    count: Node


def flat(context: Node) -> Node:
    """(batch, kv_heads, group, tokens, d) as a vector, tokens first."""
    return op.reshape(op.transpose(context, i64([3, 0, 1, 2, 4])), i64([-1]), False)


class BlockAttention:
    """The attention of some queries of one layer, in the Loop or outside of it."""

    def __init__(self, layer: AttentionLayer, plan: FullCacheSpec) -> None:
        self.layer, self.bases = layer, plan.bases[layer.index]
        self.keys, self.values = plan.coded[layer.index].layouts
        self.parts = plan.packed

    def __call__(self, read: Block, recent_mask: Node | Output, sizes: Sizes) -> Node:
        """The context, of the queries' shape.

        `recent_mask`, (batch, 1, 1, count, recent), is added to the scores of recent columns.
        """
        G, d = self.layer.group, self.layer.head_dim
        key_scales, value_scales = self._columns(read.history.scales, sizes)
        rows = op.reshape(read.queries, i64([0, 0, -1, d]), True)  # (batch, H, G·count, d)
        by_query = op.concat([i64([0, 0, G]), sizes.count, i64([-1])], 0)
        recent = op.reshape(op.matmul(rows, read.keys, False, True), by_query, True)
        recent = op.add(op.add(recent, recent_mask), read.sinks)
        recent = op.reshape(recent, op.concat([i64([0, 0, -1]), sizes.columns], 0), True)
        history = self._products(rows, read.history.keys)
        if key_scales is not None:
            history = op.multiply(history, key_scales)
        if read.history_mask.factor is not None:
            history = op.multiply(history, read.history_mask.factor)
        history = op.add(history, read.history_mask.mask)
        weights = op.softmax(op.concat([recent, history], 3), 3)
        recent, history = op.variadic_split(weights, i64(3), op.concat([sizes.columns, sizes.past], 0)).outputs()
        if read.history_mask.factor is not None:
            history = op.multiply(history, read.history_mask.factor)
        if value_scales is not None:
            history = op.multiply(history, value_scales)
        context = op.add(self._sums(history, read.history.values), op.matmul(recent, read.values, False, False))
        return op.reshape(context, i64([0, 0, G, -1, d]), True)

    def of(self, read: Block, queries: Node | Output, recent_mask: Node | Output, sizes: Sizes) -> Node:
        """The same for other queries."""
        return self(replace(read, queries=queries), recent_mask, sizes)

    def _columns(self, scales: Output | None, sizes: Sizes) -> list[Node | None]:
        """Those of keys and of values, (batch, kv_heads, 1, past); None for what is not packed."""
        if scales is None:
            return [None, None]
        shape = op.concat([sizes.batch, i64([self.layer.kv_heads, 1]), sizes.past], 0)
        parts: Sequence[Output] = op.split(scales, i64(0), self.parts).outputs() if self.parts > 1 else [scales]
        found = iter([op.reshape(part, shape, False) for part in parts])
        return [next(found) if layout else None for layout in (self.keys, self.values)]

    def _products(self, rows: Node, keys: Output) -> Node:
        """rows · (K̂ without its scales)ᵀ: rotated and decoded on the rows' side, in one product."""
        layout = self.keys
        if layout is None:
            return op.matmul(rows, keys, False, True)
        rows = op.matmul(rows, f32(by_batch(low_bits_matrix(layout) @ self.bases.key.inverse)), False, True)
        return op.matmul(rows, unpack(keys, layout), False, True)

    def _sums(self, weights: Output | Node, values: Output) -> Node:
        """weights · (V̂ without its scales), decoded and rotated back behind the sum, in one product."""
        layout = self.values
        if layout is None:
            return op.matmul(weights, values, False, False)
        sums = op.matmul(weights, unpack(values, layout), False, False)
        return op.matmul(sums, f32(by_batch(self.bases.value.dual @ low_bits_matrix(layout).T)), False, True)
