"""The form for the GPU plugin: one branch for a decode step, one for prefill, unpacked by look-up.

That plugin appends to a state in place if nothing but one Gather stands between the state and its Concat, and if the
appended tensor is read, never the past alone: so the history is all tokens, and those that are also recent are masked.
Unpacking is one Gather with the bytes as indices. Prefill reads keys and values of the usual width, one KV head after
the other, through the plugin's own fused attention, which never holds all scores; a decode step folds the query heads
that share a KV head into rows, and reads what was looked up as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op
from openvino.utils.node_factory import NodeFactory

from ovtq.codec.basis import HeadBasis
from ovtq.codec.packed_attention import StateSlice
from ovtq.codec.packing import Layout
from ovtq.forms.attend import NEVER, Columns, FullCacheSpec, GrowingState, LayerEncoder
from ovtq.forms.gpu.beams import GpuBeams
from ovtq.forms.quantizer import by_batch, features_lut, lut_matrix
from ovtq.forms.window_state import WindowState
from ovtq.ir.graph import ALL, MASKED, One, Port, Tensors, f32, i64, if_else, joined, numbers
from ovtq.models.description import AttentionLayer, ModelDescription, TokenRows
from ovtq.states import RECENT, Growing, StateSpec, cache_name, scale_name

FLUSH = 1  # tokens that join the history at a time


class Nodes:
    """What all layers share: lengths, and `older`, how many past tokens are no longer among the recent ones."""

    def __init__(self, description: ModelDescription, plan: FullCacheSpec) -> None:
        self.plan, self.description = plan, description
        self.columns = columns = Columns(description, plan.window)
        self.older = op.maximum(op.subtract(columns.past, i64([plan.window])), i64([0]))
        self.is_prefill = op.not_equal(columns.new, i64([1])).output(0)
        self.beams = GpuBeams(description)


class Keeping(Protocol):
    """The history, and what becomes of tokens in it."""

    def history_mask(self, layer: AttentionLayer) -> Output:
        """What is added to the scores of a layer's history, (batch, 1 or kv_heads, 1, rows)."""

    def read(self, layer: AttentionLayer, new: Node, recent: Node) -> tuple[Output, Output]:
        """Keys and values of the history, looked up; `recent` are the sink's row, recent tokens and the new ones."""

    def places(self, layer: AttentionLayer) -> tuple[StateSlice, StateSlice]:
        """Where keys and values of a layer are."""

    def rows(self, layer: AttentionLayer) -> TokenRows | None:
        """What tells the past length."""

    def finish(self) -> list[Node]:
        """The Assigns of its states, once every layer is rewritten."""


class Appended:
    """All tokens stay, in states of each layer; those that are also recent, or new, are masked."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes, self.plan = nodes, nodes.plan
        self.mask: Output | None = None
        self.assigns: list[Node] = []
        self.histories: dict[int, Output] = {}  # what was held of each layer's keys

    def history_mask(self, layer: AttentionLayer) -> Output:
        """The same for every layer."""
        if self.mask is None:
            columns = self.nodes.columns
            self.mask = columns.history_mask(self.nodes.older, columns.total).output(0)
        return self.mask

    def read(self, layer: AttentionLayer, new: Node, recent: Node) -> tuple[Output, Output]:
        """Of past and new tokens."""
        encoder = LayerEncoder(self.nodes.beams, self.plan, layer, Growing())
        self.histories[layer.index] = encoder.held[0].past
        rows, scales = encoder.packed(new)
        parts = iter(op.split(scales[0], i64(1), self.plan.packed).outputs() if self.plan.packed > 1 else scales)
        keys, values = (
            self._dense(*some, parts) for some in zip(encoder.held, rows, encoder.codecs.layouts, strict=True)
        )
        return keys, values

    def _dense(
        self, codes: GrowingState, rows: Node | Output, layout: Layout | None, scales: Iterator[Node | Output]
    ) -> Output:
        """What is held, `rows` behind it, looked up.

        What is not packed is multiplied by 1, or 0 for padding: as it lies in a cache with room behind it, an If reads
        wrong rows of it.
        """
        codes.append(rows)
        self.assigns.append(codes.assign())
        if layout:
            name, these = scale_name(codes.state.name), codes.state.layers
            spec = StateSpec.growing(name, "f32", codes.heads, 1, Growing(), "scale", these)
            held = GrowingState(self.nodes.beams, spec)
            held.append(next(scales))
            self.assigns.append(held.assign())
            return looked_up(layout, codes.appended, held.appended)
        shown = op.unsqueeze(op.greater(self.nodes.columns.shown, i64([0])), i64([1, 3]))
        return op.multiply(codes.appended, op.select(shown, f32(1), f32(0))).output(0)

    def places(self, layer: AttentionLayer) -> tuple[StateSlice, StateSlice]:
        """States of its own."""
        key, value = (StateSlice(cache_name(layer.index, what)) for what in ("key", "value"))
        return key, value

    def rows(self, layer: AttentionLayer) -> TokenRows | None:
        """The layer's keys."""
        return TokenRows(self.histories[layer.index])

    def finish(self) -> list[Node]:
        """The Assigns of all that is held, in the order of the layers."""
        return self.assigns


@dataclass(frozen=True)
class Limits(Tensors):
    """The first new query that sees each recent column, and, of several tokens, the query and the history's mask."""

    limits: Output
    query: Output | None = None
    history_mask: Output | None = None


@dataclass(frozen=True)
class Prefill(Tensors):
    """What several tokens read: `seen` is their mask, or what it is made of for each KV head."""

    queries: Output
    keys: Output
    values: Output
    recent: Output
    seen: One | Limits


@dataclass(frozen=True)
class Decode(Tensors):
    """What one token reads; of masks (batch, 1 or kv_heads, 1, rows of the history) and (batch, 1, 1, recent)."""

    queries: Output
    keys: Output
    values: Output
    recent: Output
    history_mask: Output
    recent_mask: Output


class GpuFull:
    """The nodes that all layers share, and the rewrite of one layer; `keeping` is its history."""

    def __init__(self, nodes: Nodes, keeping: Keeping) -> None:
        self.nodes, self.keeping, self.plan, self.columns = nodes, keeping, nodes.plan, nodes.columns
        self.states = nodes.beams.states
        self.limits = self.columns.limits(self.columns.recent_tokens(nodes.older)).output(0)
        self.query = numbers(self.columns.new, 2).output(0)
        # A window of none still has the sink's row, and a state that tells GenAI not to cut the others.
        plan = self.plan
        self.tokens = WindowState(nodes.description, RECENT, plan.layers, plan.window, nodes.beams, plan.sink_rows)
        self.recent_mask: Output | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of calls or texts beyond which it takes another way: one token, the window, all that may stay."""
        room = self.plan.pruning.room if self.plan.pruning else 0
        return tuple(filter(None, (1, self.plan.window, room)))

    def rewrite(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer with a packed or pruned cache."""
        centre = self.plan.centre(layer)
        # in one tensor, for kernels are what a step costs
        entry = op.concat([layer.key.source, layer.value.source], 1)
        scale = np.ones((2 * layer.kv_heads, 1, 1), np.float32)
        scale[: layer.kv_heads] = layer.scale
        new = op.multiply(entry, f32(scale[None]))
        if centre.any():
            new = op.subtract(new, f32(centre[None, :, None]))
        context = self._attend(layer, new)
        keeping = self.keeping
        cache = self.plan.cache(layer, FLUSH, keeping.places(layer), keeping.rows(layer), self.lengths)
        return layer.rewritten(context, cache, key=Port(entry, 0), value=Port(entry, 1))

    def rows(self, layer: AttentionLayer) -> TokenRows | None:
        """What tells the past length."""
        return self.keeping.rows(layer)

    def finish(self) -> list[Node]:
        """The Assigns of all states, once every layer is rewritten."""
        return [*self.keeping.finish(), *self.tokens.store()]

    def _attend(self, layer: AttentionLayer, new: Node) -> Node:
        """The context, (batch, query_heads, new, d); `new` are keys and values, (batch, 2·kv_heads, new, d)."""
        recent = self.tokens.join(layer, 0, new)  # first the sink's row
        # recent as a whole: of a Split's outputs the plugin's If reads the wrong half
        shared = layer.query.source, *self.keeping.read(layer, new, recent), recent.output(0)
        history_mask = self.keeping.history_mask(layer)
        recent_mask, seen = self._masks(history_mask)
        context = if_else(
            self.nodes.is_prefill,
            (Prefill(*shared, seen), lambda read: One(self._prefill(layer, read))),
            (Decode(*shared, history_mask, recent_mask), lambda read: One(self._decode(layer, read))),
            ("prefill", "decode"),
        )
        return self._whole(layer, context.value)

    def _whole(self, layer: AttentionLayer, context: Output) -> Node:
        """What the If gives, its rows in order.

        By lengths that are computed. The CPU plugin prepares all that follows an If, up to what depends on data, before
        it runs any of it, and knows only of what such a node has read that it must outlive that (P59).
        """
        pattern = [self.columns.batch, i64([layer.query_heads]), self.columns.new, i64([layer.head_dim])]
        return op.reshape(context, op.concat(pattern, 0), False)

    def _masks(self, history_mask: Output) -> tuple[Output, One | Limits]:
        """What a decode step adds to the scores of recent columns, and what tells a prefill which columns are seen.

        That is one mask for all layers, made once, where they have one `history_mask`; else what each makes its own of.
        """
        alike = history_mask.get_partial_shape()[1] == 1
        if self.recent_mask is None:
            if alike:  # of several tokens it is their mask
                self.recent_mask = if_else(
                    self.nodes.is_prefill,
                    (Limits(self.limits, self.query, history_mask), lambda read: One(_mask(read, read.history_mask))),
                    (Limits(self.limits), lambda read: One(_recent_mask(read.limits))),
                    ("mask", "recent_mask"),
                ).value
            else:
                self.recent_mask = _recent_mask(self.limits).output(0)
        return self.recent_mask, One(self.recent_mask) if alike else Limits(self.limits, self.query, history_mask)

    def _decode(self, layer: AttentionLayer, read: Decode) -> Node:
        """One new token: the recent columns are 2 + window, so that every sum has a shape that fuses."""
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        (key_layout, value_layout), (key, value) = self.plan.coded[layer.index].layouts, self.plan.bases[layer.index]
        width = 2 + self.columns.rows
        sinks = np.zeros((1, H, G, width), np.float32)
        sinks[..., :1] = layer.sink_logits[..., 0]
        key_rows, value_rows = op.split(read.recent, i64(1), 2).outputs()
        rows = op.reshape(read.queries, i64([0, H, -1, d]), True)
        history_scores = op.add(op.matmul(_into(rows, key_layout, key), read.keys, False, True), read.history_mask)
        recent_scores = op.add(
            op.matmul(rows, key_rows, False, True), op.reshape(read.recent_mask, i64([0, 1, 1, width]), True)
        )
        weights = op.softmax(op.concat([op.add(recent_scores, f32(sinks)), history_scores], 3), 3)
        recent_weights = op.slice(weights, i64([0]), i64([width]), i64([1]), i64([3]))
        history_weights = op.slice(weights, i64([width]), i64([ALL]), i64([1]), i64([3]))
        history_context = _out_of(op.matmul(history_weights, read.values, False, False), value_layout, value.dual)
        context = op.add(history_context, op.matmul(recent_weights, value_rows, False, False))
        if value.centre.any():
            context = op.add(context, f32(value.centre[None, :, None]))
        return op.reshape(context, i64([0, H * G, -1, d]), True)

    def _prefill(self, layer: AttentionLayer, read: Prefill) -> Node:
        """Any number of tokens: keys and values as the model made them (centres added again), the plugin's own sinks.

        One KV head after the other, so that one's buffers serve the next: an If has buffers of its own, which it keeps,
        so those of all heads would be there once for each layer. K and V of one head meet the queries of its group as
        they are, where those of several would be copied to all query heads. The plugin runs nodes by their depth, so
        what reads a head takes its number from what the head before it gave.
        """
        (key_layout, value_layout), (key, value) = self.plan.coded[layer.index].layouts, self.plan.bases[layer.index]
        H, d, seen = layer.kv_heads, layer.head_dim, read.seen
        groups = op.reshape(read.queries, i64([0, H, -1, d]), True)
        out: list[Node] = []
        for head in range(H):
            mine, values_at = (_after(out, number) for number in (head, H + head))
            centre = f32(key.centre[head][None, None, None])
            key_rows, value_rows = (op.gather(read.recent, at, i64(1)) for at in (mine, values_at))
            of_key, of_value = (basis.dual[0 if basis.shared else head][None] for basis in (key, value))
            history_keys = _out_of(op.gather(read.keys, mine, i64(1)), key_layout, of_key)
            history_values = _out_of(op.gather(read.values, mine, i64(1)), value_layout, of_value)
            values = op.concat([value_rows, history_values], 2)
            if value.centre.any():
                values = op.add(values, f32(value.centre[head][None, None, None]))
            inputs = [
                op.reshape(op.gather(groups, mine, i64(1)), i64([0, layer.group, -1, d]), True),
                op.concat([op.add(key_rows, centre), op.add(history_keys, centre)], 2),
                values,
                seen.value if isinstance(seen, One) else _mask(seen, op.gather(seen.history_mask, mine, i64(1))),
                f32(np.array([1.0])),
            ]
            if layer.sinks is not None:
                inputs.append(f32(layer.sinks.reshape(1, H, -1, 1)[:, head, :, None]))
            ports = [x.output(0) if isinstance(x, Node) else x for x in inputs]
            # the sixth input, sinks, is not in the Python signature of the operation
            out.append(NodeFactory("opset13").create("ScaledDotProductAttention", ports, {"causal": False}))
        return joined(out, 1)


def _after(done: list[Node], number: int) -> Node:
    """[number], which can't be computed before what was done last."""
    if not done:
        return i64([number])
    some = op.reshape(op.slice(done[-1], i64([0] * 4), i64([1] * 4), i64([1] * 4)), i64([1]), False)
    return op.add(op.convert(op.less(some, some), "i64"), i64([number]))


def _recent_mask(limits: Output) -> Node:
    """(batch, 1, 1, recent): what a single new token's scores of recent columns are added to."""
    return op.select(op.less_equal(limits, i64([0])), f32(0), f32(MASKED))


def _mask(read: Limits, history_mask: Output | Node) -> Node:
    """(batch, 1, new, columns): what the scores of several tokens are added to. The sink's column is not seen."""
    recent = op.slice(read.limits, i64([1]), i64([ALL]), i64([1]), i64([3]))
    recent = op.pad(recent, i64([0, 0, 0, 1]), i64([0, 0, 0, 0]), "constant", i64(NEVER))
    history = op.select(op.less(history_mask, f32(0)), i64(NEVER), i64(0))
    return op.select(op.less_equal(op.concat([recent, history], 3), read.query), f32(0), f32(MASKED))


def looked_up(layout: Layout | None, tokens: Output, scales: Output | None = None) -> Output:
    """Of a history (batch, kv_heads, tokens, ·), what attention reads: (batch, kv_heads, tokens, features)."""
    if layout is None or scales is None:
        return tokens
    return features_lut(tokens, layout, scales).output(0)


def _into(rows: Node, layout: Layout | None, basis: HeadBasis) -> Node:
    """Rows (…, d) as they meet looked-up keys: in the dual basis, and decoded on this side."""
    if layout is None:
        return rows
    return op.matmul(rows, f32(by_batch(lut_matrix(layout) @ basis.inverse)), False, True)


def _out_of(features: Node | Output, layout: Layout | None, dual: np.ndarray) -> Node | Output:
    """Looked-up features, or a sum of them, as vectors (…, d) of the model; `dual` (heads, d, d) of their basis."""
    if layout is None:
        return features
    return op.matmul(features, f32(by_batch(dual @ lut_matrix(layout).T)), False, True)
