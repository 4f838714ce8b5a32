"""The form for the GPU plugin with kernels of our own: `ovtq/codec/opencl`, called as `ovtq/kernel_layout.py` says.

A state of fixed length holds a layer's constants, packed rows of all tokens, and the last tokens as they came; kernels
write new tokens into it in place, which its ReadValue alone would not keep the plugin from copying: so it has one
reader, the If, and a start of its own. A decode step is two kernels. Several tokens are attended to by the plugin's own
fused kernel, which a kernel hands the past to.

One sequence at a time: kernels don't move the rows of one sequence to another's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op
from openvino.utils.node_factory import NodeFactory

from ovtq.codec.kernel_layout import READ_ROWS, KernelLayout, in_two
from ovtq.forms.attend import NEVER, FullCacheSpec
from ovtq.ir.graph import (
    ALL,
    MASKED,
    One,
    Port,
    Tensors,
    ancestors,
    dim,
    f32,
    i64,
    id_of,
    if_else,
    joined,
    new_variable,
    numbers,
)
from ovtq.models.description import AttentionLayer, InPlace, ModelDescription
from ovtq.states import IN_PLACE, Fixed, StateSpec, cache_name

GUARD = (
    "ovtq's kernels, which run on a GPU with the property CONFIG_FILE = the path of the file ovtq_kernels/kernels.xml "
    "in the model's folder; it is missing, or this is no GPU, and without it"
)  # the name of an operation, before what a plugin says of it: it is not supported
NEEDED = "for a GPU with the property CONFIG_FILE"  # before the names of what only that runs: a CPU quotes one
FLUSH = 1  # tokens that join the history at a time
LEAST = 64  # rows that new or past tokens are brought to, at the least; then a power of two


@dataclass(frozen=True)
class Step(Tensors):
    """What one token reads; `facts` are the rows behind its query, key and value."""

    state: Output
    query: Output
    key: Output
    value: Output
    facts: Output


@dataclass(frozen=True)
class Text(Tensors):
    """What several tokens read: their `mask`, and attention_mask. Lengths come from shapes, which the host knows."""

    state: Output
    query: Output
    key: Output
    value: Output
    mask: Output
    shown: Output

    @property
    def new(self) -> Node:
        """How many new tokens there are, (1,) i64."""
        return dim(self.query, 2)

    @property
    def past(self) -> Node:
        """How many there were before."""
        return op.subtract(dim(self.shown, 1), self.new)


@dataclass(frozen=True)
class Seen(Tensors):
    """What a mask is made of: attention_mask, and the numbers of the new tokens, (1, 1, new, 1)."""

    shown: Output
    query: Output


class Kernels:
    """What all layers share, and the rewrite of one layer."""

    def __init__(self, description: ModelDescription, plan: FullCacheSpec, capacity: int) -> None:
        if description.past is None:
            raise ValueError("lengths come from a state still; decouple-length comes first")
        first, ((key, _), (value, _)) = plan.layers[0], plan.uniform.pairs
        bits = key.bits, value.bits
        self.plan = plan
        self.layout = KernelLayout(first.kv_heads, first.group, first.head_dim, bits, plan.window, capacity)
        self.batch, new = (dim(description.input_ids, axis) for axis in (0, 1))
        self.new, self.past = new.output(0), description.past.output(0)
        self.shown = description.attention_mask.output(0)
        self._limit(description, capacity)
        self.is_prefill = op.not_equal(self.new, i64([1])).output(0)
        self.facts = self._facts().output(0)
        seen = Seen(self.shown, numbers(self.new, 2).output(0))
        self.mask = if_else(
            self.is_prefill,
            (seen, lambda read: One(_mask(read, capacity))),
            (seen, lambda read: One(f32(np.zeros((1, 1, 1, 1))))),
            ("mask", "none"),
        ).value
        self.states: list[StateSpec] = []
        self.assigns: list[Node] = []

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of calls or texts beyond which it takes another way: one token, the window, rows brought to other lengths."""
        return tuple(filter(None, (1, self.plan.window, LEAST)))

    def rewrite(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer with its cache in one state."""
        state = self._state(layer)
        ports = layer.query.source, layer.key.source, layer.value.source
        context = if_else(
            self.is_prefill,
            (
                Text(state, *ports, self.mask, self.shown),
                lambda read: One(self._prefill(layer, read)),
            ),
            (Step(state, *ports, self.facts), lambda read: One(self._decode(layer, read))),
            (f"{NEEDED}: prefill", f"{NEEDED}: decode"),
        ).value
        entry = context.get_node()
        context = op.reshape(context, i64([0, layer.query_heads, -1, layer.head_dim]), True)
        definition = self.plan.definition(layer, FLUSH)
        cache = InPlace(definition, (), None, self.lengths, self.layout)
        found = {(x.get_node().get_name(), x.get_index()): number for number, x in enumerate(entry.input_values())}
        query, key, value = (Port(entry, found[x.get_node().get_name(), x.get_index()]) for x in ports)
        return layer.rewritten(context, cache, query=query, key=key, value=value)

    def rows(self, layer: AttentionLayer) -> None:
        """What tells the past length: nothing, a state is as long before its first token."""

    def finish(self) -> list[Node]:
        """The Assigns of all states, once every layer is rewritten."""
        return self.assigns

    def _limit(self, description: ModelDescription, capacity: int) -> None:
        """Let the model's tokens pass through a node that refuses a call for which there is no right result.

        The GPU plugin computes it once whether the kernels are there, and compares lengths on the host.
        """
        guard = _carrier("opset14", "Inverse", [f32(np.full((1, 1, 1), 2))], adjoint=False)
        guard.set_friendly_name(GUARD)
        missing = op.convert(op.less(op.reshape(guard, i64([1]), False), f32(np.array([0.75]))), "i64")
        over = [op.subtract(self.batch, i64([1])), op.subtract(op.add(self.past, self.new), i64([capacity]))]
        over = op.reduce_max(op.concat([i64([0]), missing, *over], 0), i64([0]), True)
        ids = description.input_ids
        taken = op.variadic_split(ids, i64(1), op.add(self.new, over))
        taken.set_friendly_name(refusal(capacity))
        earlier = {id_of(node) for node in ancestors(taken.output(0))}
        for reader in list(ids.output(0).get_target_inputs()):
            if id_of(reader.get_node()) not in earlier:
                reader.replace_source_output(taken.output(0))

    def _facts(self) -> Node:
        """What is behind query, key and value of one token, (1, rows, 1, head_dim): its place, whether it is shown."""
        layout = self.layout
        rows = layout.step_rows - layout.query_heads - 2 * layout.kv_heads
        # of one sequence, however many there are: else a batch fails here, before it is refused for what it is
        shown = op.slice(self.shown, i64([0, -1]), i64([1, ALL]), i64([1, 1]), i64([0, 1]))
        shown = op.reshape(shown, i64([-1]), False)
        zeros = i64([0] * (rows * layout.head_dim - 3))
        facts = op.concat([*_in_two(self.past), op.convert(op.greater(shown, i64([0])), "i64"), zeros], 0)
        return op.reshape(op.convert(facts, "f32"), i64([1, rows, 1, layout.head_dim]), False)

    def _state(self, layer: AttentionLayer) -> Output:
        """What a layer's kernels are given; it starts with the layer's constants, and zeros."""
        layout, plan = self.layout, self.plan
        key, value = plan.bases[layer.index]
        constants = {
            "SCALE": in_two(np.array(layer.scale)),
            "SINKS": in_two(layer.sink_logits.reshape(-1)),
            "KEY_CENTRES": key.centre,
            "VALUE_CENTRES": value.centre,
            "QUERY_BASES": key.dual,
            "KEY_BASES": key.matrix,
            "VALUE_BASES": value.matrix,
            "KEY_RETURNS": key.inverse,
            "VALUE_RETURNS": value.inverse,
        }
        head = np.zeros(layout.offsets["ROWS"], np.float32)
        for name, values in constants.items():
            if values.ndim == 3:  # one that all heads share
                values = np.broadcast_to(values, (layout.kv_heads, *values.shape[1:]))
            head[layout.offsets[name] :][: values.size] = values.reshape(-1)
        one, rows, width = layout.shape
        spec = StateSpec(
            cache_name(layer.index, IN_PLACE[1:]), "f32", (-1, one, rows, width), Fixed(layout.capacity), "packed",
            (layer.index,),
        )  # fmt: skip
        rest = op.concat([self.batch, i64([rows * width - head.size])], 0)
        first = op.broadcast(f32(head), op.concat([self.batch, i64([head.size])], 0))
        start = op.concat([first, op.broadcast(f32(0), rest)], 1)
        variable = new_variable(spec)
        state = op.read_value(op.reshape(start, i64([-1, one, rows, width]), False), variable)
        self.states.append(spec)
        self.assigns.append(op.assign(state, variable))
        return state.output(0)

    def _decode(self, layer: AttentionLayer, read: Step) -> Node:
        layout = self.layout
        step = op.concat([read.query, read.key, read.value, read.facts], 1)
        parts = _carrier(
            "opset1", "PSROIPooling", [read.state, op.reshape(step, i64([-1, 5]), False)],
            output_dim=1, group_size=layout.side, spatial_scale=1.0, spatial_bins_x=1, spatial_bins_y=1,
            mode="bilinear",
        )  # fmt: skip
        heads = f32(np.zeros((layout.query_heads, 5)))
        context = _carrier(
            "opset2", "ROIPooling", [parts, heads], output_roi=[1, layout.head_dim], spatial_scale=1.0, method="max"
        )
        return op.reshape(context, i64([-1, layout.query_heads, 1, layout.head_dim]), False)

    def _prefill(self, layer: AttentionLayer, read: Text) -> Node:
        """The plugin's attention, one KV head after the other, to what `read` gives and what is new; then `append`."""
        layout = self.layout
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        past = read.past
        rows = brought(past, layout.capacity)
        groups = op.multiply(op.divide(rows, i64([READ_ROWS])), i64([H]))
        counts = op.broadcast(op.convert(past, "i32"), groups)
        corners = op.broadcast(f32(0), op.concat([groups, i64([4])], 0))
        found = _carrier(
            "opset9", "ROIAlign", [read.state, corners, counts],
            pooled_h=2 * READ_ROWS, pooled_w=d, sampling_ratio=1, spatial_scale=1.0, mode="avg",
            aligned_mode="asymmetric",
        )  # fmt: skip
        found = op.reshape(found, i64([1, 2 * H, -1, d]), False)  # keys, then values
        queries = op.reshape(read.query, i64([0, H, -1, d]), True)
        keys = op.multiply(read.key, f32(layer.scale))
        out: list[Node] = []
        for head in range(H):
            mine, values_at = (_after(out, number) for number in (head, H + head))
            inputs = [
                op.reshape(op.gather(queries, mine, i64(1)), i64([0, G, -1, d]), True),
                op.concat([op.gather(found, mine, i64(1)), op.gather(keys, mine, i64(1))], 2),
                op.concat([op.gather(found, values_at, i64(1)), op.gather(read.value, mine, i64(1))], 2),
                read.mask,
                f32(np.array([1.0])),
            ]
            if layer.sinks is not None:
                inputs.append(f32(layer.sinks.reshape(1, H, -1, 1)[:, head, :, None]))
            # the sixth input, sinks, is not in the Python signature of the operation
            out.append(_carrier("opset13", "ScaledDotProductAttention", inputs, causal=False))
        context = joined(out, 1)
        return op.add(context, self._append(read, context))

    def _append(self, read: Text, context: Node) -> Node:
        """Zero, (1, 1, 1, 1), once the new tokens are appended, behind what reads those before them."""
        layout = self.layout
        H, d = layout.kv_heads, layout.head_dim
        new, past = read.new, read.past
        rows = brought(new, layout.capacity)
        more = op.subtract(rows, new)
        behind = op.concat([i64([0, 0]), more, i64([0])], 0)
        flat = [
            op.reshape(op.pad(x, i64([0] * 4), behind, "constant", op.constant(np.float32(0))), i64([-1]), False)
            for x in (read.key, read.value)
        ]
        shown = op.slice(read.shown, past, i64([ALL]), i64([1]), i64([1]))
        shown = op.convert(op.greater(op.reshape(shown, i64([-1]), False), i64([0])), "f32")
        left = op.subtract(op.multiply(rows, i64([5 * layout.fives - 2 * H * d])), new)
        shown = op.pad(shown, i64([0]), left, "constant", op.constant(np.float32(0)))
        counts = op.convert(op.concat([*_in_two(past), *_in_two(new)], 0), "f32")
        last = op.reshape(_first(context), i64([1]), False)
        step = op.reshape(op.concat([counts, last, *flat, shown], 0), i64([-1, 5]), False)
        done = _carrier(
            "opset1", "DeformablePSROIPooling", [read.state, step],
            output_dim=1, group_size=1, spatial_scale=1.0, trans_std=0.0, part_size=1, spatial_bins_x=1,
            spatial_bins_y=1, mode="bilinear_deformable",
        )  # fmt: skip
        return _first(done)


def refusal(capacity: int) -> str:
    """The name of the node that refuses, which plugins quote."""
    return (
        f"ovtq refuses this call: this model takes one sequence at a time (batch 1), and {capacity} tokens at most, "
        "past and new (--capacity of ovtq-convert), on a GPU with the property CONFIG_FILE = the path of the file "
        "ovtq_kernels/kernels.xml in the model's folder"
    )


def brought(count: Node | Output, most: int) -> Node:
    """LEAST, or the power of two above it that is not below `count`: few lengths, for a kernel is built for each."""
    steps = [LEAST]
    while steps[-1] < most:
        steps.append(2 * steps[-1])
    # by sums and products of whole numbers, which the plugin computes on the host
    over = op.minimum(op.maximum(op.subtract(count, i64([0, *steps[:-1]])), i64([0])), i64([1]))
    return op.maximum(op.reduce_max(op.multiply(over, i64(steps)), i64([0]), True), i64([LEAST]))


def _mask(read: Seen, capacity: int) -> Node:
    """(1, 1, new, rows of the past + new), additive: what is shown and not later than the query."""
    new = dim(read.query, 2)
    past = op.subtract(dim(read.shown, 1), new)
    rows = brought(past, capacity)
    column = numbers(op.add(rows, new), 3)
    own = op.subtract(column, rows)  # of a new column, which new token it is
    old, own_shown = (
        op.unsqueeze(op.slice(read.shown, a, b, i64([1]), i64([1])), i64([1, 2]))
        for a, b in ((i64([0]), past), (past, i64([ALL])))
    )
    behind = op.concat([i64([0, 0, 0]), op.subtract(rows, past)], 0)
    shown = op.concat([op.pad(old, i64([0] * 4), behind, "constant", i64(0)), own_shown], 3)
    since = op.select(op.greater(shown, i64([0])), own, i64(NEVER))
    return op.select(op.less_equal(since, read.query), f32(0), f32(MASKED))


def _carrier(opset: str, kind: str, inputs: list[Node | Output], **attributes: object) -> Node:
    ports = [x.output(0) if isinstance(x, Node) else x for x in inputs]
    return NodeFactory(opset).create(kind, ports, attributes)


def _in_two(count: Node | Output) -> list[Node]:
    """1024·high + low, exact in f16: (1,) i64 each."""
    high = op.divide(count, i64([1024]))
    return [high, op.subtract(count, op.multiply(high, i64([1024])))]


def _first(x: Node) -> Node:
    """Its first number, (1, 1, 1, 1)."""
    return op.slice(x, i64([0] * 4), i64([1] * 4), i64([1] * 4))


def _after(done: list[Node], number: int) -> Node:
    """[number], which can't be computed before what was done last."""
    if not done:
        return i64([number])
    some = op.reshape(_first(done[-1]), i64([1]), False)
    return op.add(op.convert(op.less(some, some), "i64"), i64([number]))
