"""The form for the CPU plugin: blocks of queries, unpacked by arithmetic.

That plugin keeps scores whole, so a call of more than BLOCK tokens runs in a Loop over blocks of as many queries: no
more than query_heads·BLOCK·tokens scores exist at a time. The last block, which is all of a decode step, is outside of
the Loop, for a Loop copies what it reads.

It also compiles a product anew for every length it has not met, 2 ms or more, and keeps it, 1.5 MB: in each decode
step, if the history grew by one. So tokens leave the recent rows, are quantised and join the history FLUSH at a time;
in all other steps no shape changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.attend import ALL, Columns, History, Plan, sink_logits, store
from ovtq.graph import body, dim, f32, i64, joined, scalar
from ovtq.models.description import AttentionLayer, ModelDescription
from ovtq.prune import Survivors
from ovtq.quantizer import unpack
from ovtq.ring import Ring

BLOCK = 32  # queries at a time: rows enough in a product to be worth the unpacking before it
FLUSH = 128  # tokens that join the history at a time
PORTION = 2  # KV heads whose history is unpacked at a time: a product then reads what was just written, from a cache


class Blocks:
    """The nodes that all layers share, and the attention of one layer."""

    def __init__(self, description: ModelDescription, plan: Plan, name: str) -> None:
        self.description, self.plan = description, plan
        self.flush = plan.pruning.flush if plan.pruning else FLUSH
        rows = plan.window + self.flush - 1
        self.columns = columns = Columns(description, rows)
        self.ring = Ring(description, name, plan.layers, rows, plan.sink_rows)
        self.parts, self.news, self.held = iter(self.ring.parts), [], []

        # Of `past` tokens the oldest ones are stored, a multiple of FLUSH, and at least `window` are not.
        self.older, later = (self._stored(past) for past in (columns.past, columns.total))
        held = op.subtract(columns.past, self.older)
        self.leave = op.subtract(i64([1 + rows]), held)  # the row of the first token to join the history
        self.left = op.add(self.leave, op.subtract(later, self.older))

        self.survivors, self.stay = None, self.older
        if plan.pruning:
            span = tuple(op.subtract(row, i64([1])) for row in (self.leave, self.left))
            self.survivors = Survivors(description, plan.layers, plan.pruning, columns, self.older, later, rows, span)
            self.stay = self.survivors.stay

        trips = op.divide(op.subtract(columns.new, i64([1])), i64([BLOCK]))
        self.trips = scalar(trips)
        self.lead = op.multiply(trips, i64([BLOCK]))  # queries in the Loop
        self.keep = op.multiply(op.minimum(trips, i64([1])), i64([ALL]))  # what it reads of an axis: nothing or all
        self.near = columns.near(self.older)
        far_mask = [] if plan.pruning else [columns.far_mask(self.older)]
        self.far_masks = iter(self.survivors.masks if self.survivors else [far_mask] * len(plan.layers))
        rest = op.subtract(columns.new, self.lead)
        self.near_mask = columns.near_mask(self.near, columns.recent, self.lead, rest)
        behind = op.concat([i64([0] * 5), op.subtract(columns.recent, i64([1]))], 0)
        sinks = f32(np.stack([sink_logits(layer) for layer in plan.layers]))
        sinks = op.pad(sinks, i64([0] * 6), behind, "constant", op.constant(np.float32(0)))
        self.sinks = iter(op.split(sinks, i64(0), len(plan.layers)).outputs())  # (1, 1, H, G, 1, recent) each

    def _stored(self, past: Node) -> Node:
        leaving = op.maximum(op.subtract(past, i64([self.plan.window])), i64([0]))
        return op.multiply(op.divide(leaving, i64([self.flush])), i64([self.flush]))

    def attend(self, layer: AttentionLayer, queries: Output, new: Node) -> Node:
        """The context, (batch, query_heads, new, d), of the layers in turn; `new` is (batch, 2·kv_heads, new, d)."""
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        columns = self.columns
        recent = op.concat([next(self.parts), new], 2)  # first the sink's row
        leaving = op.slice(recent, self.leave, self.left, i64([1]), i64([2]))
        keys, values, held = store(self.description, self.plan, layer, leaving)
        self.news.append(new)
        self.held.append(held)
        far = next(self.far_masks)
        rows = op.reshape(queries, i64([0, H, G, -1, d]), True)
        sinks = op.squeeze(next(self.sinks), i64([0]))
        block = _Block(layer, keys, values, self.plan.rotation)
        rest = op.slice(rows, self.lead, i64([ALL]), i64([1]), i64([3]))
        histories = [keys.past, values.past, *filter(None, (keys.past_scales, values.past_scales))]
        direct = block(rest, recent, histories, far, self.near_mask, sinks, self.stay, columns.recent)
        leading = self._loop(block, rows, recent, histories, far, sinks)
        tokens = op.concat([columns.new, columns.batch, i64([H * G, d])], 0)
        context = op.reshape(op.concat([leading, _flat(direct)], 0), tokens, False)
        return op.transpose(context, i64([1, 2, 0, 3]))

    @property
    def stored(self) -> dict[str, int]:
        """After t tokens the growing states hold max(t − window, 0) of them, less the rest modulo multiple.

        And no more than `most`, if that is given.
        """
        rule = {"window": self.plan.window, "multiple": self.flush}
        return rule | self.survivors.stored if self.survivors else rule

    def stores(self) -> list[Node]:
        """The Assigns of all states, once every layer is rewritten."""
        rows, assigns = self.survivors.store() if self.survivors else ([None] * len(self.held), [])
        for row, held in zip(rows, self.held, strict=True):
            assigns += [state.assign(row) for state in held]
        return [*assigns, *self.ring.store(self.news)]

    def _loop(
        self, block: _Block, queries: Node, recent: Node, histories: list[Output], far: Sequence[Node], sinks: Node
    ) -> Node:
        """The context of the leading blocks, as a vector, tokens first."""

        def cut(x: Node | Output, axis: int, end: Node) -> Output:
            return op.slice(x, i64([0]), end, i64([1]), i64([axis])).output(0)

        outer = [
            cut(queries, 3, self.lead),
            *(cut(x, 2, self.keep) for x in (recent, *histories)),
            *(cut(x, 3, self.keep) for x in far),
            cut(self.near, 2, self.keep),
            cut(sinks, 4, self.keep),
        ]
        turn = op.parameter([], np.int64)
        inner = [op.parameter(x.get_partial_shape(), x.get_element_type()) for x in outer]
        some, rows, *past, near, sink = (x.output(0) for x in inner)
        past, masks = past[: len(histories)], past[len(histories) :]
        first = op.multiply(op.unsqueeze(turn, i64([0])), i64([BLOCK]))
        some = op.slice(some, first, op.add(first, i64([BLOCK])), i64([1]), i64([3]))
        width = dim(near, 2)
        mask = self.columns.near_mask(near, width, first, i64([BLOCK]))
        context = block(some, rows, past, masks, mask, sink, dim(masks[0], 3), width)
        results = [op.result(op.constant(np.array(True))), op.result(op.unsqueeze(_flat(context), i64([0])))]
        loop = op.loop(self.trips, op.constant(np.array(True)))
        loop.set_function(body(results, [turn, *inner], "blocks"))
        loop.set_special_body_ports([0, 0])
        for parameter, source in zip(inner, outer, strict=True):
            loop.set_invariant_input(parameter, source)
        leading = loop.get_concatenated_slices(results[1].output(0), 0, 1, 1, -1, 0)  # (trips, BLOCK·batch·H·G·d)
        # With nothing to run, the CPU's Loop leaves its result in the shape it last had, or in none at all: so it is
        # cut to length, and joined to the rest as a vector.
        leading = op.slice(leading, i64([0]), op.unsqueeze(self.trips, i64([0])), i64([1]), i64([0]))
        return op.reshape(leading, i64([-1]), False)


def _flat(context: Node) -> Node:
    """(batch, H, G, tokens, d) as a vector, tokens first."""
    return op.reshape(op.transpose(context, i64([3, 0, 1, 2, 4])), i64([-1]), False)


class _Block:
    """The attention of some queries of one layer, in the Loop or outside of it."""

    def __init__(self, layer: AttentionLayer, keys: History, values: History, rotation: np.ndarray) -> None:
        self.layer, self.keys, self.values, self.rotation = layer, keys, values, rotation

    def __call__(
        self,
        queries: Node | Output,
        recent: Node | Output,
        histories: Sequence[Output],
        far_masks: Sequence[Node | Output],
        near_mask: Node | Output,
        sinks: Node | Output,
        past: Node,
        columns: Node,
    ) -> Node:
        """Queries (batch, H, G, count, d) to their context of that shape.

        `far_masks`: what is added to scores of the history, and, maybe, what they and the weights are multiplied by.
        """
        H, G, d = self.layer.kv_heads, self.layer.group, self.layer.head_dim
        key_bytes, value_bytes, *scales = histories
        key_rows, value_rows = op.split(recent, i64(1), 2).outputs()
        rows = op.reshape(queries, i64([0, 0, -1, d]), True)  # (batch, H, G·count, d)
        by_query = op.concat([i64([0, 0, G]), dim(queries, 3), i64([-1])], 0)
        near = op.reshape(op.matmul(rows, key_rows, False, True), by_query, True)
        near = op.add(op.add(near, near_mask), sinks)
        near = op.reshape(near, op.concat([i64([0, 0, -1]), columns], 0), True)
        far = self._products(rows, key_bytes)
        if self.keys.layout:
            far = op.multiply(far, op.reshape(scales[0], i64([0, H, 1, -1]), True))
        mask, *zeroed = far_masks
        for factor in zeroed:
            far = op.multiply(far, factor)
        far = op.add(far, mask)
        weights = op.softmax(op.concat([near, far], 3), 3)
        near, far = op.variadic_split(weights, i64(3), op.concat([columns, past], 0)).outputs()
        for factor in zeroed:
            far = op.multiply(far, factor)
        if self.values.layout:
            far = op.multiply(far, op.reshape(scales[-1], i64([0, H, 1, -1]), True))
        context = op.add(self._sums(far, value_bytes), op.matmul(near, value_rows, False, False))
        return op.reshape(context, i64([0, 0, G, -1, d]), True)

    def _products(self, rows: Node, keys: Output) -> Node:
        """rows · (K̂ without its scales)ᵀ: rotated and decoded on the rows' side, in one product."""
        layout = self.keys.layout
        if layout is None:
            return op.matmul(rows, keys, False, True)
        rows = op.matmul(rows, f32(layout.decode @ self.rotation.T), False, True)
        counts, heads = i64([group.count for group in layout.groups]), self.layer.kv_heads
        products = []
        for some_rows, some_keys in zip(_portions(rows, heads), _portions(keys, heads), strict=True):
            parts = op.variadic_split(some_rows, i64(3), counts).outputs()
            pairs = zip(parts, unpack(some_keys, layout), strict=True)
            products.append(reduce(op.add, (op.matmul(part, feature, False, True) for part, feature in pairs)))
        return joined(products, 1)

    def _sums(self, weights: Output | Node, values: Output) -> Node:
        """weights · (V̂ without its scales), decoded and rotated back behind the sum, in one product."""
        layout = self.values.layout
        if layout is None:
            return op.matmul(weights, values, False, False)
        heads = self.layer.kv_heads
        sums = [
            joined([op.matmul(some_weights, feature, False, False) for feature in unpack(some_values, layout)], 3)
            for some_weights, some_values in zip(_portions(weights, heads), _portions(values, heads), strict=True)
        ]
        return op.matmul(joined(sums, 1), f32(self.rotation @ layout.decode.T), False, True)


def _portions(tensor: Node | Output, heads: int) -> list[Node | Output]:
    count = heads // PORTION if heads % PORTION == 0 else 1
    return op.split(tensor, i64(1), count).outputs() if count > 1 else [tensor]
