"""The form for the CPU plugin: blocks of queries, unpacked by arithmetic.

That plugin keeps scores whole, so a call of more than BLOCK tokens runs in a Loop over blocks of as many queries: no
more than query_heads·BLOCK·tokens scores exist at a time. The last block, which is all of a decode step, is outside of
the Loop, for a Loop copies what it reads.

It also compiles a product anew for every length it has not met, 2 ms or more, and keeps it, 1.5 MB: in each decode
step, if the history grew by one. So tokens leave the recent rows, are quantised and join the history FLUSH at a time
(pruned, slack + 1); in all other steps no shape changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec.packed_attention import StateSlice
from ovtq.forms.attend import Columns, FullCacheSpec, GrowingState, LayerEncoder, sink_columns
from ovtq.forms.cpu.beams import CpuBeams
from ovtq.forms.cpu.block import Block, BlockAttention, History, HistoryMask, Sizes, flat
from ovtq.forms.cpu.window import CpuWindowState
from ovtq.ir.graph import ALL, Nothing, Port, Tensors, body, dim, f32, i64, if_else, precise, scalar
from ovtq.models.description import AttentionLayer, ModelDescription, TokenRows
from ovtq.states import RECENT, SCALES, Growing, StateSpec, cache_name

BLOCK = 32  # queries at a time: rows enough in a product to be worth the unpacking before it
FLUSH = 128  # tokens that join the history at a time


class Nodes:
    """Lengths that all layers share, and when tokens join the history.

    Of `past` tokens the oldest `older` are stored before this call and `later` after it, a multiple of `flush`; at
    least `window` are not. `leave` and `left` are the rows, the first and the one after the last, of the recent and new
    tokens (the sink's row before them) that join the history: `joining` of them.
    """

    def __init__(self, description: ModelDescription, plan: FullCacheSpec) -> None:
        self.plan, self.description = plan, description
        self.flush = plan.pruning.flush if plan.pruning else FLUSH
        self.recent = plan.window + self.flush - 1  # rows
        self.columns = columns = Columns(description, self.recent)
        self.beams = CpuBeams(description)
        self.older, self.later = (self._stored(past) for past in (columns.past, columns.total))
        held = op.subtract(columns.past, self.older)
        self.leave = op.subtract(i64([1 + self.recent]), held)
        self.joining = op.subtract(self.later, self.older)
        self.left = op.add(self.leave, self.joining)

    def _stored(self, past: Node) -> Node:
        leaving = op.maximum(op.subtract(past, i64([self.plan.window])), i64([0]))
        return op.multiply(op.divide(leaving, i64([self.flush])), i64([self.flush]))


class Keeping(Protocol):
    """What becomes of tokens once they are in the history."""

    rule: Growing  # how many rows its states have
    stay: Node  # how many they have now

    def history_mask(self, layer: AttentionLayer) -> HistoryMask:
        """What is done to the scores of a layer's history."""

    def finish(self) -> tuple[dict[int, Output], list[Node]]:
        """Which rows of each layer's heads stay, (batch, kv_heads, ·), if not all; and Assigns of states of its own."""


class Appended:
    """They stay."""

    def __init__(self, nodes: Nodes) -> None:
        self.rule, self.stay = Growing(nodes.plan.window, nodes.flush), nodes.older
        self.mask = HistoryMask(nodes.columns.history_mask(nodes.older).output(0))

    def history_mask(self, layer: AttentionLayer) -> HistoryMask:
        """The same for every layer."""
        return self.mask

    def finish(self) -> tuple[dict[int, Output], list[Node]]:
        """All rows stay."""
        return {}, []


@dataclass(frozen=True)
class Call(Tensors):
    """What the leading blocks, and the tokens that join the history, are made of."""

    lead: Node
    leave: Node
    left: Node
    block: Block


@dataclass(frozen=True)
class FlushOrPrefill(Tensors):
    """As vectors: the context of the leading blocks, batch first, and the rows that join the states."""

    context: Node
    keys: Node
    values: Node
    scales: Node | None


class CpuFull:
    """The nodes that all layers share, and the rewrite of one layer; `keeping` is what becomes of the history."""

    def __init__(self, nodes: Nodes, keeping: Keeping) -> None:
        self.nodes, self.keeping, self.plan = nodes, keeping, nodes.plan
        self.beams, self.columns, plan = nodes.beams, nodes.columns, nodes.plan
        columns, self.states = nodes.columns, nodes.beams.states
        self.tokens = CpuWindowState(nodes.description, RECENT, plan.layers, nodes.recent, self.beams, plan.sink_rows)
        self.scales = _Scales(self.beams, plan, keeping.rule) if plan.packed else None
        self.held: dict[int, list[GrowingState]] = {}

        trips = op.divide(op.subtract(columns.new, i64([1])), i64([BLOCK]))
        self.lead = op.multiply(trips, i64([BLOCK]))  # queries in the Loop
        self.is_flush_or_prefill = op.greater(op.add(trips, nodes.joining), i64([0])).output(0)
        self.recent_tokens = columns.recent_tokens(nodes.older)
        self.rest = op.subtract(columns.new, self.lead)
        self.recent_mask = columns.recent_mask(self.recent_tokens, columns.recent, self.lead, self.rest)
        self.sinks = sink_columns({layer.index: layer.sink_logits for layer in plan.layers}, columns.recent)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of calls or texts beyond which it takes another way: a block, a flush, the window, all that may stay."""
        room = self.plan.pruning.room if self.plan.pruning else 0
        return tuple(filter(None, (BLOCK, self.nodes.flush, self.plan.window, self.columns.rows, room)))

    def rewrite(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer with a packed or pruned cache."""
        key, value = (basis.centre[None, :, None] for basis in self.plan.bases[layer.index])
        scaled = op.multiply(layer.key.source, f32(layer.scale))
        centred = op.subtract(scaled, f32(key)) if key.any() else scaled
        moved = op.subtract(layer.value.source, f32(value)) if value.any() else layer.value.source
        # first the sink's row
        keys, values = (self.tokens.join(layer, which, some) for which, some in enumerate((centred, moved)))
        context = self._attend(layer, keys, values)
        if value.any():
            context = op.add(context, f32(np.repeat(value, layer.group, 1)))
        entry = Port(moved, 0) if isinstance(moved, Node) else Port(values, 1)
        cache = self.plan.cache(layer, self.nodes.flush, self._places(layer), self.rows(layer), self.lengths)
        return layer.rewritten(context, cache, key=Port(scaled, 0), value=entry)

    def rows(self, layer: AttentionLayer) -> TokenRows | None:
        """What tells the past length: nothing, for tokens join the history some at a time."""
        return None

    def finish(self) -> list[Node]:
        """The Assigns of all states, once every layer is rewritten."""
        rows, assigns = self.keeping.finish()
        for layer in self.plan.layers:
            assigns += [held.assign(rows.get(layer.index)) for held in self.held[layer.index]]
        if self.scales:
            assigns.append(self.scales.store(self.nodes.joining, rows))
        return [*assigns, *self.tokens.store()]

    def _places(self, layer: AttentionLayer) -> tuple[StateSlice, StateSlice]:
        """Where keys and values of a layer are."""
        first = self.plan.indices.index(layer.index) * self.plan.packed
        found = []
        for what, where in zip(("key", "value"), self.plan.coded[layer.index].layouts, strict=True):
            heads = slice(first * layer.kv_heads, (first + 1) * layer.kv_heads)
            found.append(StateSlice(cache_name(layer.index, what), scale_heads=heads, scale_state=SCALES))
            first += where is not None
        key, value = found
        return key, value

    def _attend(self, layer: AttentionLayer, keys: Node, values: Node) -> Node:
        """The context, (batch, query_heads, new, d)."""
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        columns = self.columns
        rows = op.reshape(layer.query.source, i64([0, H, G, -1, d]), True)
        encoder = LayerEncoder(self.beams, self.plan, layer, self.keeping.rule)
        held_keys, held_values = (held.past for held in encoder.held)
        history = History(held_keys, held_values, self.scales.groups[layer.index] if self.scales else None)
        read = Block(
            rows, keys, values, self.sinks[layer.index], self.recent_tokens, self.keeping.history_mask(layer), history
        )
        attention = BlockAttention(layer, self.plan)
        found = self._flush_or_prefill(encoder, attention, read)
        if self.scales:
            self.scales.joined[layer.index] = found.scales
        for held, some in zip(encoder.held, (found.keys, found.values), strict=True):
            shape = op.concat([columns.batch, i64([held.heads]), self.nodes.joining, i64([held.width])], 0)
            held.append(op.reshape(some, shape, False))
        self.held[layer.index] = encoder.held
        rest = op.slice(rows, self.lead, i64([ALL]), i64([1]), i64([3]))
        sizes = Sizes(columns.batch, self.keeping.stay, columns.recent, self.rest)
        direct = attention.of(read, rest, self.recent_mask, sizes)
        direct = op.reshape(op.transpose(direct, i64([0, 3, 1, 2, 4])), i64([0, 0, H * G, d]), True)
        leading = op.reshape(found.context, op.concat([columns.batch, self.lead, i64([H * G, d])], 0), False)
        return op.transpose(op.concat([leading, direct], 1), i64([0, 2, 1, 3]))

    def _flush_or_prefill(self, encoder: LayerEncoder, attention: BlockAttention, block: Block) -> FlushOrPrefill:
        """What in most decode steps there is nothing of, and nothing runs.

        The other branch then holds constants, which is why results are vectors. One If for both: with a second one for
        the rows, calls longer than all before them stored wrong numbers.
        """
        layer = attention.layer

        def some(call: Call) -> FlushOrPrefill:
            recent = (call.block.keys, call.block.values)
            leaving = op.concat([op.slice(rows, call.leave, call.left, i64([1]), i64([2])) for rows in recent], 1)
            batch = dim(call.block.queries, 0)
            shape = op.concat([call.lead, batch, i64([layer.query_heads, layer.head_dim])], 0)
            leading = op.reshape(self._loop(attention, call.lead, call.block), shape, False)
            (keys, values), scales = encoder.packed(leaving)
            found = op.transpose(leading, i64([1, 0, 2, 3])), keys, values, *scales
            vectors = [op.reshape(x, i64([-1]), False) for x in found]
            return FlushOrPrefill(vectors[0], vectors[1], vectors[2], vectors[3] if scales else None)

        def none(_: Nothing) -> FlushOrPrefill:
            kinds = [np.float32, *(held.kind.to_dtype() for held in encoder.held), np.float32]
            context, keys, values, scales = (op.constant(np.zeros(0, kind)) for kind in kinds)
            return FlushOrPrefill(context, keys, values, scales if self.scales else None)

        call = Call(self.lead, self.nodes.leave, self.nodes.left, block)
        return if_else(self.is_flush_or_prefill, (call, some), (Nothing(), none), ("flush_or_prefill", "idle"))

    def _loop(self, attention: BlockAttention, lead: Output, block: Block) -> Node:
        """The context of the leading blocks, as a vector, tokens first."""
        trips = op.divide(lead, i64([BLOCK]))
        keep = op.multiply(op.minimum(trips, i64([1])), i64([ALL]))

        def cut(x: Output | None, axis: int, end: Node | Output = keep) -> Output | None:
            # Precise, for of what it must convert before a Loop the CPU plugin goes on to read an earlier call's
            return None if x is None else precise(op.slice(x, i64([0]), end, i64([1]), i64([axis]))).output(0)

        seen = block.history_mask
        outer = Block(
            cut(block.queries, 3, lead), cut(block.keys, 2), cut(block.values, 2), cut(block.sinks, 4),
            cut(block.recent_tokens, 2), HistoryMask(cut(seen.mask, 3), cut(seen.factor, 3)),
            History(cut(block.history.keys, 2), cut(block.history.values, 2), cut(block.history.scales, 3)),
        )  # fmt: skip
        inner = [op.parameter(x.get_partial_shape(), x.get_element_type()) for x in outer.flatten()]
        read = outer.filled([x.output(0) for x in inner])
        turn = op.parameter([], np.int64)
        first = op.multiply(op.unsqueeze(turn, i64([0])), i64([BLOCK]))
        some = op.slice(read.queries, first, op.add(first, i64([BLOCK])), i64([1]), i64([3]))
        width = dim(read.recent_tokens, 2)
        mask = self.columns.recent_mask(read.recent_tokens, width, first, i64([BLOCK]))
        sizes = Sizes(dim(some, 0), dim(read.history_mask.mask, 3), width, i64([BLOCK]))
        context = attention.of(read, some, mask, sizes)
        results = [op.result(op.constant(np.array(True))), op.result(op.unsqueeze(flat(context), i64([0])))]
        loop = op.loop(scalar(trips), op.constant(np.array(True)))
        loop.set_function(body(results, [turn, *inner], "blocks"))
        loop.set_special_body_ports([0, 0])
        for parameter, source in zip(inner, outer.flatten(), strict=True):
            loop.set_invariant_input(parameter, source)
        leading = loop.get_concatenated_slices(results[1].output(0), 0, 1, 1, -1, 0)  # (trips, BLOCK·batch·H·G·d)
        # With nothing to run, the CPU's Loop leaves its result in the shape it last had, or in none at all
        leading = op.slice(leading, i64([0]), trips, i64([1]), i64([0]))
        return op.reshape(leading, i64([-1]), False)


class _Scales:
    """Those of all layers' packed keys and values, in one state (batch, layers·tensors·kv_heads, tokens, 1) f32.

    Of each layer the keys' come first. A state per tensor would be five nodes each. `groups` are what each layer reads,
    (tensors, batch, kv_heads, tokens, 1); `joined` its new ones, (batch, tensors·kv_heads, joining, 1) as a vector.
    """

    def __init__(self, beams: CpuBeams, plan: FullCacheSpec, rule: Growing) -> None:
        self.indices, self.parts, self.kv_heads = plan.indices, plan.packed, plan.layers[0].kv_heads
        heads = len(self.indices) * self.parts * self.kv_heads
        self.held = GrowingState(beams, StateSpec.growing(SCALES, "f32", heads, 1, rule, "scale", plan.indices))
        groups = beams.in_groups(self.held.read, len(self.indices), self.parts)
        self.groups = dict(zip(self.indices, groups, strict=True))
        self.joined: dict[int, Output] = {}

    def store(self, joining: Node, rows: Mapping[int, Output]) -> Node:
        """The Assign, once every layer joined: of all, or of `rows` of each layer's heads, (batch, kv_heads, ·)."""
        of_layer = self.parts * self.kv_heads
        shape = op.concat([i64([len(self.indices)]), self.held.beams.batch, i64([of_layer]), joining], 0)
        joined = op.concat([self.joined[index] for index in self.indices], 0)
        new = op.transpose(op.reshape(joined, shape, False), i64([1, 0, 2, 3]))
        shape = op.concat([self.held.beams.batch, i64([self.held.heads]), joining, i64([1])], 0)
        self.held.append(op.reshape(new, shape, False))
        some = [rows[index] for index in self.indices if index in rows for _ in range(self.parts)]
        return self.held.assign(op.concat(some, 1) if some else None)
