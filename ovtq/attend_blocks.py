"""The form for the CPU plugin: blocks of queries, unpacked by arithmetic.

That plugin keeps scores whole, so a call of more than BLOCK tokens runs in a Loop over blocks of as many queries: no
more than query_heads·BLOCK·tokens scores exist at a time. The last block, which is all of a decode step, is outside of
the Loop, for a Loop copies what it reads.

It also compiles a product anew for every length it has not met, 2 ms or more, and keeps it, 1.5 MB: in each decode
step, if the history grew by one. So tokens leave the recent rows, are quantised and join the history FLUSH at a time
(pruned, slack + 1); in all other steps no shape changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.attend import Columns, Held, Plan, Store, sink_columns, sink_logits
from ovtq.beams import Beams
from ovtq.graph import ALL, Port, body, dim, either, f32, i64, precise, scalar
from ovtq.models.description import AttentionLayer, ModelDescription
from ovtq.packed_attention import Place
from ovtq.prune import Survivors
from ovtq.quantizer import residues, unpack
from ovtq.ring import Ring
from ovtq.states import SCALES, Growing, StateSpec, cache_name

BLOCK = 32  # queries at a time: rows enough in a product to be worth the unpacking before it
FLUSH = 128  # tokens that join the history at a time


class Blocks:
    """The nodes that all layers share, and the attention of one layer."""

    def __init__(self, description: ModelDescription, plan: Plan, name: str) -> None:
        self.plan = plan
        self.flush = plan.pruning.flush if plan.pruning else FLUSH
        rows = plan.window + self.flush - 1
        self.columns = columns = Columns(description, rows)
        self.beams = Beams(description, "cpu")
        self.ring = Ring(description, name, plan.layers, rows, self.beams, plan.sink_rows)
        most = plan.pruning.room if plan.pruning and plan.pruning.mode == "evict" else None
        self.rule = Growing(plan.window, self.flush, most)
        self.scales = _Scales(self.beams, plan, self.rule) if plan.packed else None
        self.held: list[list[Held]] = []

        # Of `past` tokens the oldest ones are stored, a multiple of `flush`, and at least `window` are not.
        self.older, later = (self._stored(past) for past in (columns.past, columns.total))
        held = op.subtract(columns.past, self.older)
        self.leave = op.subtract(i64([1 + rows]), held)  # the row of the first token to join the history
        self.joining = op.subtract(later, self.older)
        self.left = op.add(self.leave, self.joining)

        self.survivors, self.stay = None, self.older
        if plan.pruning:
            span = tuple(op.subtract(row, i64([1])) for row in (self.leave, self.left))
            self.survivors = Survivors(
                self.beams, plan.layers, plan.pruning, columns, self.older, later, rows, span, self.rule
            )
            self.stay = self.survivors.stay

        trips = op.divide(op.subtract(columns.new, i64([1])), i64([BLOCK]))
        self.lead = op.multiply(trips, i64([BLOCK]))  # queries in the Loop
        self.seldom = op.greater(op.add(trips, self.joining), i64([0])).output(0)
        self.near = columns.near(self.older)
        far_mask = [] if plan.pruning else [columns.far_mask(self.older)]
        self.far_masks = iter(self.survivors.masks if self.survivors else [far_mask] * len(plan.layers))
        self.rest = op.subtract(columns.new, self.lead)
        self.near_mask = columns.near_mask(self.near, columns.recent, self.lead, self.rest)
        self.sinks = sink_columns([sink_logits(layer) for layer in plan.layers], columns.recent)

    def _stored(self, past: Node) -> Node:
        leaving = op.maximum(op.subtract(past, i64([self.plan.window])), i64([0]))
        return op.multiply(op.divide(leaving, i64([self.flush])), i64([self.flush]))

    def enter(self, layer: AttentionLayer) -> tuple[tuple[Node, Node], Port, Port]:
        """Recent keys, scaled and centred, and values, (batch, kv_heads, recent, d) each, and where new ones enter."""
        centre = self.plan.centres[layer.index]
        keys = scaled = op.multiply(layer.key.source, f32(layer.scale))
        if centre.any():
            keys = op.subtract(scaled, f32(centre[None, :, None]))
        recent = self.ring.join(keys), self.ring.join(layer.value.source)  # first the sink's row
        return recent, Port(scaled, 0), Port(recent[1], 1)

    def attend(self, layer: AttentionLayer, queries: Output, recent: tuple[Node, Node]) -> Node:
        """The context, (batch, query_heads, new, d), of the layers in turn; `recent` is what `enter` returned."""
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        columns = self.columns
        far = next(self.far_masks)
        rows = op.reshape(queries, i64([0, H, G, -1, d]), True)
        sinks = next(self.sinks)
        store = Store(self.beams, self.plan, layer, self.rule)
        block = _Block(layer, self.plan)
        history = [held.past for held in store.held] + ([self.scales.next()] if self.scales else [])
        leading, *joining = self._seldom(store, block, [rows, *recent, sinks, self.near, *far, *history])
        if self.scales:
            self.scales.join(joining.pop())
        for held, some in zip(store.held, joining, strict=True):
            shape = op.concat([columns.batch, i64([held.heads]), self.joining, i64([held.width])], 0)
            held.append(op.reshape(some, shape, False))
        self.held.append(store.held)
        rest = op.slice(rows, self.lead, i64([ALL]), i64([1]), i64([3]))
        sizes = columns.batch, self.stay, columns.recent, self.rest
        direct = block(rest, recent, history, far, self.near_mask, sinks, *sizes)
        direct = op.reshape(op.transpose(direct, i64([0, 3, 1, 2, 4])), i64([0, 0, H * G, d]), True)
        leading = op.reshape(leading, op.concat([columns.batch, self.lead, i64([H * G, d])], 0), False)
        return op.transpose(op.concat([leading, direct], 1), i64([0, 2, 1, 3]))

    def places(self, layer: AttentionLayer) -> tuple[Place, Place]:
        """Where keys and values of a layer are."""
        first = [other.index for other in self.plan.layers].index(layer.index) * self.plan.packed
        found = []
        for what, where in zip(("key", "value"), self.plan.layouts, strict=True):
            heads = slice(first * layer.kv_heads, (first + 1) * layer.kv_heads)
            found.append(Place(cache_name(layer.index, what), scale_heads=heads, scale_state=SCALES))
            first += where is not None
        key, value = found
        return key, value

    def rows(self, layer: AttentionLayer) -> None:
        """What tells the past length: nothing, for tokens join the history some at a time."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of calls or texts beyond which it takes another way: a block, a flush, the window, all that may stay."""
        room = self.plan.pruning.room if self.plan.pruning else 0
        return tuple(filter(None, (BLOCK, self.flush, self.plan.window, self.columns.rows, room)))

    def stores(self) -> list[Node]:
        """The Assigns of all states, once every layer is rewritten."""
        rows, assigns = self.survivors.store() if self.survivors else ([None] * len(self.held), [])
        for row, held in zip(rows, self.held, strict=True):
            assigns += [state.assign(row) for state in held]
        if self.scales:
            assigns.append(self.scales.store(self.joining, rows))
        return [*assigns, *self.ring.store()]

    def _seldom(self, store: Store, block: _Block, sources: Sequence[Node | Output]) -> list[Node]:
        """As vectors, the context of the leading blocks, batch first, and the rows that join the states, scales last.

        In most decode steps there are neither, and nothing runs: the other branch holds constants, which is why results
        are vectors. One If for both: with a second one for the rows, calls longer than all before them stored wrong
        numbers.
        """
        read = [x.output(0) if isinstance(x, Node) else x for x in (self.lead, self.leave, self.left, *sources)]
        layer = block.layer

        def some(inside: Sequence[Output]) -> list[Node]:
            lead, leave, left, *inside = inside
            leaving = op.concat([op.slice(rows, leave, left, i64([1]), i64([2])) for rows in inside[1:3]], 1)
            shape = op.concat([lead, dim(inside[0], 0), i64([layer.query_heads, layer.head_dim])], 0)
            leading = op.reshape(self._loop(block, lead, inside), shape, False)
            rows, scales = store.packed(leaving)
            return [op.reshape(x, i64([-1]), False) for x in (op.transpose(leading, i64([1, 0, 2, 3])), *rows, *scales)]

        def none(_: Sequence[Output]) -> list[Node]:
            kinds = [np.float32, *(held.kind.to_dtype() for held in store.held), np.float32]
            return [op.constant(np.zeros(0, kind)) for kind in kinds[: 4 if self.scales else 3]]

        return either(self.seldom, (read, some), ([], none), ("seldom", "usually"))

    def _loop(self, block: _Block, lead: Output, sources: Sequence[Output]) -> Node:
        """The context of the leading blocks, as a vector, tokens first."""
        trips = op.divide(lead, i64([BLOCK]))
        keep = op.multiply(op.minimum(trips, i64([1])), i64([ALL]))

        def cut(x: Output, axis: int, end: Node | Output = keep) -> Output:
            return precise(op.slice(x, i64([0]), end, i64([1]), i64([axis]))).output(0)

        # Precise, for of what it must convert before a Loop the CPU plugin goes on to read an earlier call's
        queries, keys, values, sinks, near, *more = sources
        masks, history = more[: -block.states], more[-block.states :]
        outer = [cut(queries, 3, lead), cut(keys, 2), cut(values, 2), cut(sinks, 4), cut(near, 2)]
        outer += [*(cut(x, 3) for x in masks), *(cut(x, axis) for x, axis in zip(history, (2, 2, 3), strict=False))]
        inner = [op.parameter(x.get_partial_shape(), x.get_element_type()) for x in outer]
        queries, keys, values, sinks, near, *more = (x.output(0) for x in inner)
        masks, history = more[: -block.states], more[-block.states :]
        turn = op.parameter([], np.int64)
        first = op.multiply(op.unsqueeze(turn, i64([0])), i64([BLOCK]))
        some = op.slice(queries, first, op.add(first, i64([BLOCK])), i64([1]), i64([3]))
        width = dim(near, 2)
        mask = self.columns.near_mask(near, width, first, i64([BLOCK]))
        recent = [keys, values]
        context = block(some, recent, history, masks, mask, sinks, dim(some, 0), dim(masks[0], 3), width, i64([BLOCK]))
        results = [op.result(op.constant(np.array(True))), op.result(op.unsqueeze(_flat(context), i64([0])))]
        loop = op.loop(scalar(trips), op.constant(np.array(True)))
        loop.set_function(body(results, [turn, *inner], "blocks"))
        loop.set_special_body_ports([0, 0])
        for parameter, source in zip(inner, outer, strict=True):
            loop.set_invariant_input(parameter, source)
        leading = loop.get_concatenated_slices(results[1].output(0), 0, 1, 1, -1, 0)  # (trips, BLOCK·batch·H·G·d)
        # With nothing to run, the CPU's Loop leaves its result in the shape it last had, or in none at all
        leading = op.slice(leading, i64([0]), trips, i64([1]), i64([0]))
        return op.reshape(leading, i64([-1]), False)


def _flat(context: Node) -> Node:
    """(batch, H, G, tokens, d) as a vector, tokens first."""
    return op.reshape(op.transpose(context, i64([3, 0, 1, 2, 4])), i64([-1]), False)


class _Scales:
    """Those of all layers' packed keys and values, in one state (batch, layers·tensors·kv_heads, tokens, 1) f32.

    Of each layer the keys' come first. A state a tensor would be five nodes each.
    """

    def __init__(self, beams: Beams, plan: Plan, rule: Growing) -> None:
        self.layers, self.parts, self.kv_heads = len(plan.layers), plan.packed, plan.layers[0].kv_heads
        heads = self.layers * self.parts * self.kv_heads
        self.held = Held(beams, StateSpec.growing(SCALES, "f32", heads, 1, rule, "scale", plan.indices))
        self.groups = iter(beams.in_groups(self.held.read, self.layers, self.parts))
        self.joined: list[Output] = []

    def next(self) -> Output:
        """What the next layer reads: (tensors, batch, kv_heads, tokens, 1)."""
        return next(self.groups)

    def join(self, rows: Output) -> None:
        """Put a layer's new ones behind them: (batch, tensors·kv_heads, joining, 1) as a vector."""
        self.joined.append(rows)

    def store(self, joining: Node, rows: Sequence[Output | None]) -> Node:
        """The Assign, once every layer joined: of all, or of `rows` of each layer's heads, (batch, kv_heads, ·)."""
        of_layer = self.parts * self.kv_heads
        shape = op.concat([i64([self.layers]), self.held.beams.batch, i64([of_layer]), joining], 0)
        new = op.transpose(op.reshape(op.concat(self.joined, 0), shape, False), i64([1, 0, 2, 3]))
        shape = op.concat([self.held.beams.batch, i64([self.held.heads]), joining, i64([1])], 0)
        self.held.append(op.reshape(new, shape, False))
        some = [row for row in rows for _ in range(self.parts) if row is not None]
        return self.held.assign(op.concat(some, 1) if some else None)


class _Block:
    """The attention of some queries of one layer, in the Loop or outside of it."""

    def __init__(self, layer: AttentionLayer, plan: Plan) -> None:
        self.layer, self.rotation = layer, plan.rotation
        self.keys, self.values = plan.layouts
        self.parts = plan.packed
        self.states = 3 if plan.packed else 2

    def __call__(
        self,
        queries: Node | Output,
        recent: Sequence[Node | Output],
        history: Sequence[Output],
        far_masks: Sequence[Node | Output],
        near_mask: Node | Output,
        sinks: Node | Output,
        batch: Node,
        past: Node,
        columns: Node,
        count: Node,
    ) -> Node:
        """Queries (batch, H, G, count, d) to their context of that shape; of `past` rows of history, `columns` recent.

        `recent`: keys and values.

        `far_masks`: what is added to scores of the history, and, maybe, what they and the weights are multiplied by.
        """
        G, d = self.layer.group, self.layer.head_dim
        key_bytes, value_bytes, *scales = history
        key_scales, value_scales = self._columns(scales, batch, past)
        key_rows, value_rows = recent
        rows = op.reshape(queries, i64([0, 0, -1, d]), True)  # (batch, H, G·count, d)
        by_query = op.concat([i64([0, 0, G]), count, i64([-1])], 0)
        near = op.reshape(op.matmul(rows, key_rows, False, True), by_query, True)
        near = op.add(op.add(near, near_mask), sinks)
        near = op.reshape(near, op.concat([i64([0, 0, -1]), columns], 0), True)
        far = self._products(rows, key_bytes)
        if key_scales is not None:
            far = op.multiply(far, key_scales)
        mask, *zeroed = far_masks
        for factor in zeroed:
            far = op.multiply(far, factor)
        far = op.add(far, mask)
        weights = op.softmax(op.concat([near, far], 3), 3)
        near, far = op.variadic_split(weights, i64(3), op.concat([columns, past], 0)).outputs()
        for factor in zeroed:
            far = op.multiply(far, factor)
        if value_scales is not None:
            far = op.multiply(far, value_scales)
        context = op.add(self._sums(far, value_bytes), op.matmul(near, value_rows, False, False))
        return op.reshape(context, i64([0, 0, G, -1, d]), True)

    def _columns(self, scales: Sequence[Output], batch: Node, past: Node) -> list[Node | None]:
        """Those of keys and of values, (batch, kv_heads, 1, past); None for what is not packed."""
        if not scales:
            return [None, None]
        shape = op.concat([batch, i64([self.layer.kv_heads, 1]), past], 0)
        parts = op.split(scales[0], i64(0), self.parts).outputs() if self.parts > 1 else scales
        found = iter([op.reshape(part, shape, False) for part in parts])
        return [next(found) if layout else None for layout in (self.keys, self.values)]

    def _products(self, rows: Node, keys: Output) -> Node:
        """rows · (K̂ without its scales)ᵀ: rotated and decoded on the rows' side, in one product."""
        layout = self.keys
        if layout is None:
            return op.matmul(rows, keys, False, True)
        rows = op.matmul(rows, f32(residues(layout) @ self.rotation.T), False, True)
        return op.matmul(rows, unpack(keys, layout), False, True)

    def _sums(self, weights: Output | Node, values: Output) -> Node:
        """weights · (V̂ without its scales), decoded and rotated back behind the sum, in one product."""
        layout = self.values
        if layout is None:
            return op.matmul(weights, values, False, False)
        sums = op.matmul(weights, unpack(values, layout), False, False)
        return op.matmul(sums, f32(self.rotation @ residues(layout).T), False, True)
