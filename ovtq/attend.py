"""Attention to a history of packed codes and to recent tokens at full precision: the parts both targets share.

One softmax over three kinds of columns: the sink, the recent and new tokens, the history. Query heads that share a KV
head are rows of one product, so that K and V are never broadcast to them in a decode step. Keys, the sink's among them,
carry the scale of the attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.graph import MASKED, dim, f32, i64, scalar
from ovtq.models.description import AttentionLayer, ModelDescription
from ovtq.packing import Layout

ALL = 2**31 - 1


@dataclass(frozen=True)
class History:
    """One tensor's (K or V) stored tokens: bytes (batch, kv_heads, tokens, ·) i8, scales (batch, kv_heads, tokens, 1).

    `past` are the tokens of earlier calls, `appended` those of this one too. Without `layout` they are not packed, but
    the tensor itself, (…, head_dim), and have no scales.
    """

    past: Output
    appended: Output
    past_scales: Output | None
    appended_scales: Output | None
    layout: Layout | None


@dataclass(frozen=True)
class Sources:
    """What the attention of one layer reads: queries (batch, query_heads, new, d), K and V, and the recent tokens.

    `recent`, (batch, 2·kv_heads, 1 + window + new, d), is first the sink's row, keys above values, then the residual
    window, then the new tokens. `centre`, (kv_heads, d), is what was taken from every key (scale included).
    """

    layer: AttentionLayer
    queries: Output
    keys: History
    values: History
    recent: Output
    centre: np.ndarray
    rotation: np.ndarray


class Columns:
    """Lengths and masks that all layers share. Recent columns: the sink, the residual window, the new tokens."""

    def __init__(self, description: ModelDescription, window: int) -> None:
        self.window, self.shown = window, description.attention_mask
        self.batch, self.new = (dim(description.input_ids, axis) for axis in (0, 1))
        self.total = dim(description.attention_mask, 1)
        self.past = op.subtract(self.total, self.new)
        self.recent = op.add(self.new, i64([1 + window]))
        near = op.pad(self.shown, i64([0, 1 + window]), i64([0, 0]), "constant", i64(0))
        near = op.slice(near, op.negative(self.recent), i64([ALL]), i64([1]), i64([1]))
        self.near = op.unsqueeze(op.not_equal(near, i64(0)), i64([1]))  # (batch, 1, recent), the sink not yet shown

    def far_mask(self, columns: Node) -> Node:
        """(batch, 1, 1, columns), additive: what no recent column holds is seen by every query, but for the padding."""
        older = op.maximum(op.subtract(self.past, i64([self.window])), i64([0]))
        old = op.slice(self.shown, i64([0]), older, i64([1]), i64([1]))
        rest = op.concat([i64([0]), op.subtract(columns, older)], 0)
        old = op.unsqueeze(op.pad(old, i64([0, 0]), rest, "constant", i64(0)), i64([1, 2]))
        return op.select(op.equal(old, i64(0)), f32(MASKED), f32(0))

    def near_mask(self, near: Node | Output, columns: Node, first: Node, count: Node) -> Node:
        """(batch, 1, 1, count, recent), additive: query first + i sees the sink and columns ≤ window + 1 + first + i."""
        query = op.range(scalar(first), scalar(op.add(first, count)), i64(1), "i64")
        column = op.range(i64(0), scalar(columns), i64(1), "i64")
        column = op.unsqueeze(column, i64([0]))
        causal = op.less_equal(column, op.add(op.unsqueeze(query, i64([1])), i64([self.window + 1])))
        visible = op.logical_and(op.unsqueeze(causal, i64([0])), near)  # (batch, count, recent)
        mask = op.select(visible, f32(0), f32(MASKED))
        mask = op.select(op.unsqueeze(op.less(column, i64([1])), i64([0])), f32(0), mask)
        return op.unsqueeze(mask, i64([1, 2]))


def sink_logits(layer: AttentionLayer) -> np.ndarray:
    """(1, kv_heads, group, 1, 1)."""
    sinks = layer.sinks if layer.sinks is not None else np.full(layer.query_heads, MASKED)
    return np.asarray(sinks, np.float32).reshape(1, layer.kv_heads, layer.group, 1, 1)
