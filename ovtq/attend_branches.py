"""The form for the GPU plugin: one branch for a decode step, one for prefill, unpacked by look-up.

That plugin appends to a state in place if nothing but one Gather stands between the state and its Concat, and if the
appended tensor is read, never the past alone: so the history is all tokens, and those that are also recent are masked.
Unpacking is one Gather with the bytes as indices. Prefill reads keys and values of the usual width, broadcast to the
query heads, through the plugin's own fused attention, which never holds all scores; a decode step folds the query
heads that share a KV head into rows, and reads what was looked up as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op
from openvino.utils.node_factory import NodeFactory

from ovtq.attend import Columns, History, Plan, Store, sink_logits
from ovtq.beams import Beams
from ovtq.graph import ALL, MASKED, Port, dim, either, f32, i64
from ovtq.models.description import AttentionLayer, ModelDescription
from ovtq.packing import Layout
from ovtq.quantizer import interleaved, look_up
from ovtq.ring import Ring


class _Read(NamedTuple):
    """What a branch reads: the queries, looked-up keys and values, recent tokens of both, the masks of either.

    `far` is (batch, 1 or kv_heads, 1, rows of the history).
    """

    queries: Output
    keys: Output
    values: Output
    recent: Output
    far: Output
    near: Output


class Branches:
    """The nodes that all layers share, and the attention of one layer."""

    flush = 1

    def __init__(self, description: ModelDescription, plan: Plan, name: str) -> None:
        self.plan = plan
        self.columns = columns = Columns(description, plan.window)
        self.older = older = op.maximum(op.subtract(columns.past, i64([plan.window])), i64([0]))
        self.near_mask = columns.near_mask(columns.near(older), columns.recent, i64([0]), columns.new)
        self.is_prefill = op.not_equal(columns.new, i64([1])).output(0)
        # A window of none still has the sink's row, and a state that tells GenAI not to cut the others.
        self.beams = Beams(description, "gpu")
        self.ring = Ring(description, name, plan.layers, plan.window, self.beams, plan.sink_rows)
        self.parts, self.news, self.assigns = iter(self.ring.parts), [], []
        self.far_masks = self._far_masks()

    def _far_masks(self) -> Iterator[Output]:
        """What is added to the scores of the history, of the layers in turn."""
        return repeat(self.columns.far_mask(self.older, self.columns.total).output(0))

    def _history(self, layer: AttentionLayer, new: Node, recent: Node) -> tuple[Output, Output]:
        """Keys and values of the history, looked up; `recent` are the sink's row, recent tokens and the new ones."""
        store = Store(self.beams, self.plan, layer)
        store.append(store.packed(new))
        self.assigns += [state.assign() for state in store.held]
        return self._dense(store.keys), self._dense(store.values)

    def _dense(self, history: History) -> Output:
        """What was looked up. What is not packed is multiplied by 1, or 0 for padding: as it lies in a cache with room
        behind it, an If reads wrong rows of it."""
        if history.scales:
            return looked_up(history.layout, history.codes.appended, history.scales.appended)
        shown = op.unsqueeze(op.greater(self.columns.shown, i64([0])), i64([1, 3]))
        return op.multiply(history.codes.appended, op.select(shown, f32(1), f32(0))).output(0)

    def enter(self, layer: AttentionLayer) -> tuple[Node, Port, Port]:
        """New keys, scaled and centred, and values, (batch, 2·kv_heads, new, d), and where they enter."""
        centre = self.plan.centres[layer.index]
        entry = op.concat([layer.key.source, layer.value.source], 1)
        scale = np.ones((2 * layer.kv_heads, 1, 1), np.float32)
        scale[: layer.kv_heads] = layer.scale
        new = op.multiply(entry, f32(scale[None]))
        if centre.any():
            new = op.subtract(new, f32(np.concatenate([centre, 0 * centre])[None, :, None]))
        return new, Port(entry, 0), Port(entry, 1)

    def attend(self, layer: AttentionLayer, queries: Output, new: Node) -> Node:
        """The context, (batch, query_heads, new, d), of the layers in turn; `new` is what `enter` returned."""
        recent = op.concat([next(self.parts), new], 2)  # first the sink's row
        self.news.append(new)
        outer = _Read(
            queries,
            *self._history(layer, new, recent),
            recent.output(0),  # whole: of a Split's outputs the plugin's If reads the wrong half
            next(self.far_masks),
            self.near_mask.output(0),
        )
        (context,) = either(
            self.is_prefill,
            (outer, lambda read: [self._prefill(layer, _Read(*read))]),
            (outer, lambda read: [self._decode(layer, _Read(*read))]),
            ("prefill", "decode"),
        )
        return op.reshape(context, i64([0, layer.query_heads, -1, layer.head_dim]), True)

    @property
    def stored(self) -> dict[str, int]:
        """After t tokens the growing states hold all of them."""
        return {"window": 0, "multiple": 1}

    def stores(self) -> list[Node]:
        """The Assigns of all states, once every layer is rewritten."""
        return [*self.assigns, *self.ring.store(self.news)]

    def _decode(self, layer: AttentionLayer, read: _Read) -> Node:
        """One new token: the recent columns are 2 + window, so that every sum has a shape that fuses."""
        queries, keys, values, recent, far, near = read
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        (key_layout, value_layout), rotation = self.plan.layouts, self.plan.rotation
        width = 2 + self.columns.rows
        sinks = np.zeros((1, H, G, width), np.float32)
        sinks[..., :1] = sink_logits(layer)[..., 0]
        key_rows, value_rows = op.split(recent, i64(1), 2).outputs()
        rows = op.reshape(queries, i64([0, H, -1, d]), True)
        far_scores = op.add(op.matmul(_into(rows, key_layout, rotation), keys, False, True), far)
        near_scores = op.add(op.matmul(rows, key_rows, False, True), op.reshape(near, i64([0, 1, 1, width]), True))
        weights = op.softmax(op.concat([op.add(near_scores, f32(sinks)), far_scores], 3), 3)
        near_weights = op.slice(weights, i64([0]), i64([width]), i64([1]), i64([3]))
        far_weights = op.slice(weights, i64([width]), i64([ALL]), i64([1]), i64([3]))
        far_context = _out_of(op.matmul(far_weights, values, False, False), value_layout, rotation)
        context = op.add(far_context, op.matmul(near_weights, value_rows, False, False))
        return op.reshape(context, i64([0, H * G, -1, d]), True)

    def _prefill(self, layer: AttentionLayer, read: _Read) -> Node:
        """Any number of tokens: keys as the model made them (the centre added again), the plugin's own sinks."""
        queries, keys, values, recent, far, near = read
        heads, centre = layer.query_heads, self.plan.centres[layer.index]
        (key_layout, value_layout), rotation = self.plan.layouts, self.plan.rotation
        key_rows, value_rows = op.split(recent, i64(1), 2).outputs()
        keys = op.concat([key_rows, _out_of(keys, key_layout, rotation)], 2)
        keys = op.add(keys, f32(centre[None, :, None]))
        values = op.concat([value_rows, _out_of(values, value_layout, rotation)], 2)
        near = op.slice(op.squeeze(near, i64([1])), i64([1]), i64([ALL]), i64([1]), i64([3]))
        near = op.pad(near, i64([0, 0, 0, 1]), i64([0, 0, 0, 0]), "constant", op.constant(MASKED))
        masks = [near, far]
        if far.get_partial_shape()[1] != 1:  # each KV head has its own
            spread = op.broadcast(
                op.unsqueeze(far, i64([2])), i64([1, 1, layer.group, 1, 1]), broadcast_spec="BIDIRECTIONAL"
            )
            far = op.reshape(spread, i64([0, heads, 1, -1]), True)
            masks = [op.broadcast(near, i64([1, heads, 1, 1]), broadcast_spec="BIDIRECTIONAL"), far]
        shape = op.concat([dim(far, 0), dim(masks[0], 1), dim(queries, 2), dim(far, 3)], 0)
        mask = op.concat([masks[0], op.broadcast(far, shape)], 3)
        inputs = [queries, _spread(keys, layer), _spread(values, layer), mask, f32(np.array([1.0]))]
        if layer.sinks is not None:
            inputs.append(f32(layer.sinks.reshape(1, heads, 1, 1)))
        ports = [x.output(0) if isinstance(x, Node) else x for x in inputs]
        # the sixth input, sinks, is not in the Python signature of the operation
        return NodeFactory("opset13").create("ScaledDotProductAttention", ports, {"causal": False})


def looked_up(layout: Layout | None, tokens: Output, scales: Output | None = None) -> Output:
    """Of a history (batch, kv_heads, tokens, ·), what attention reads: (batch, kv_heads, tokens, features)."""
    if layout is None or scales is None:
        return tokens
    return look_up(tokens, layout, scales).output(0)


def _into(rows: Node, layout: Layout | None, rotation: np.ndarray) -> Node:
    """Rows (…, d) as they meet looked-up keys: rotated, and decoded on this side."""
    return rows if layout is None else op.matmul(rows, f32(interleaved(layout) @ rotation.T), False, True)


def _out_of(features: Node | Output, layout: Layout | None, rotation: np.ndarray) -> Node | Output:
    """Looked-up features, or a sum of them, as vectors (…, d) of the model."""
    return features if layout is None else op.matmul(features, f32(rotation @ interleaved(layout).T), False, True)


def _spread(tensor: Node, layer: AttentionLayer) -> Node:
    """(batch, kv_heads, tokens, d) broadcast to the query heads."""
    tensor = op.broadcast(
        op.unsqueeze(tensor, i64([2])), i64([1, 1, layer.group, 1, 1]), broadcast_spec="BIDIRECTIONAL"
    )
    return op.reshape(tensor, i64([0, layer.query_heads, -1, layer.head_dim]), True)
