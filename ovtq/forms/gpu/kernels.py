"""The form for the GPU plugin with kernels of our own: `ovtq/codec/opencl`, called as `kernel_layout.py` there says.

A state of fixed length holds a layer's constants, codes and scales of all tokens, and the last tokens as they came;
kernels write new tokens into it in place, which its ReadValue alone would not keep the plugin from copying: so it has
one reader, the If. It starts with zeros, which all layers share (`Zeros`): what states start with the plugin keeps, as
large as they are. The first call brings the constants. A decode step is two kernels. Several tokens are
attended to by the plugin's own fused kernel, which a kernel hands the past to.

One sequence at a time: kernels don't move the rows of one sequence to another's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec.kernel_layout import WORD, KernelLayout
from ovtq.forms.attend import NEVER, FullCacheSpec
from ovtq.forms.gpu.guard import (
    LEAST,
    NEEDED,
    brought,
    carrier,
    filled,
    first_of,
    halves,
    of_all_kernels,
    refuse_others,
)
from ovtq.ir.graph import (
    ALL,
    MASKED,
    One,
    Port,
    Tensors,
    dim,
    f32,
    i64,
    if_else,
    joined,
    new_variable,
    numbers,
)
from ovtq.models.description import AttentionLayer, InPlace, ModelDescription
from ovtq.states import IN_PLACE, Fixed, StateSpec, cache_name

FLUSH = 1  # tokens that join the history at a time


@dataclass(frozen=True)
class Step(Tensors):
    """What one token reads; `columns`, (1, rows, 1, head_dim), say how many are past, and which of all it may see."""

    state: Output
    query: Output
    key: Output
    value: Output
    columns: Output


@dataclass(frozen=True)
class Text(Tensors):
    """What several tokens read: their `mask`, and attention_mask. Lengths come from shapes, which the host knows."""

    state: Output
    query: Output
    key: Output
    value: Output
    mask: Output
    shown: Output
    scratch: Output

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
        past = refuse_others(description, capacity)
        first, ((key, _), (value, _)) = plan.layers[0], plan.uniform.pairs
        bits = key.bits, value.bits
        self.plan = plan
        self.layout = KernelLayout(first.kv_heads, first.group, first.head_dim, bits, plan.window, capacity)
        self.new, self.past = dim(description.input_ids, 1).output(0), past.output(0)
        self.shown = description.attention_mask.output(0)
        # by its length alone: where an If took another way at the same lengths, it was seen to go wrong (P66)
        self.is_prefill = op.not_equal(self.new, i64([1])).output(0)
        self.columns = self._columns().output(0)
        seen = Seen(self.shown, numbers(self.new, 2).output(0))
        self.mask = if_else(
            self.is_prefill,
            (seen, lambda read: One(_mask(read, capacity))),
            (seen, lambda read: One(f32(np.zeros((1, 1, 1, 1))))),
            ("mask", "none"),
        ).value
        several = op.minimum(op.subtract(self.new, i64([1])), i64([1]))
        self.past_rows = op.multiply(several, brought(self.past, capacity))  # none where one token reads codes
        self.scratch: Output | None = None
        self.zeros = Zeros(dim(description.input_ids, 0), self.layout.shape)
        self.states: list[StateSpec] = []
        self.assigns: list[Node] = []

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of calls or texts beyond which it takes another way: one token, the window, rows brought to other lengths."""
        return tuple(filter(None, (1, self.plan.window, LEAST)))

    def rewrite(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer with its cache in one state."""
        state = self._state(layer)
        self.scratch = self.scratch or self._scratch(layer)
        ports = layer.query.source, layer.key.source, layer.value.source
        context = if_else(
            self.is_prefill,
            (
                Text(state, *ports, self.mask, self.shown, self.scratch),
                lambda read: One(self._prefill(layer, read)),
            ),
            (Step(state, *ports, self.columns), lambda read: One(self._decode(layer, read))),
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

    def _scratch(self, layer: AttentionLayer) -> Output:
        """What the past is read into, one for all layers: a branch keeps what it makes.

        Of a number that a GPU has computed, so that it lies in its memory.
        """
        layout = self.layout
        some = op.reshape(first_of(layer.query.source), i64([1]), False)
        size = op.multiply(self.past_rows, i64([2 * layout.kv_heads * layout.head_dim]))
        return op.broadcast(some, size).output(0)

    def _columns(self) -> Node:
        """How many tokens are past, and a bit of attention_mask for each, (1, rows, 1, head_dim) of fixed length.

        Of one sequence, and of no more tokens than there is room for: else a call fails here, before it is refused.
        """
        layout = self.layout
        most, room = layout.capacity, layout.words * WORD
        shown = op.slice(self.shown, i64([0, 0]), i64([1, most]), i64([1, 1]), i64([0, 1]))
        left = op.subtract(i64([room]), op.minimum(op.add(self.past, self.new), i64([most])))
        shown = op.pad(shown, i64([0, 0]), op.concat([i64([0]), left], 0), "constant", i64(0))
        bits = op.select(
            op.greater(op.reshape(shown, i64([-1, WORD]), False), i64(0)), f32(2.0 ** np.arange(WORD)), f32(0)
        )
        columns = op.concat(
            [op.convert(op.concat(halves(self.past), 0), "f32"), op.reduce_sum(bits, i64([1]), False)], 0
        )
        behind = i64([layout.columns * layout.head_dim - 2 - layout.words])
        columns = op.pad(columns, i64([0]), behind, "constant", op.constant(np.float32(0)))
        # of a length that is left open: what a kernel gives of known size is reordered by another
        return op.reshape(columns, i64([1, -1, 1, layout.head_dim]), False)

    def _state(self, layer: AttentionLayer) -> Output:
        """What a layer's kernels read and write; it starts with zeros."""
        one, rows, width = self.layout.shape
        spec = StateSpec(
            cache_name(layer.index, IN_PLACE[1:]), "f32", (-1, one, rows, width), Fixed(self.layout.capacity), "packed",
            (layer.index,),
        )  # fmt: skip
        variable = new_variable(spec)
        state = op.read_value(self.zeros.of_another(), variable)
        self.states.append(spec)
        self.assigns.append(op.assign(state, variable))
        return state.output(0)

    def _constants(self, layer: AttentionLayer, size: int) -> np.ndarray:
        """(size,): what a layer's kernels are given, or find in its state."""
        layout = self.layout
        key, value = self.plan.bases[layer.index]
        values = {
            "KEY_CENTRES": key.centre,
            "VALUE_CENTRES": value.centre,
            "QUERY_BASES": key.dual,
            "KEY_BASES": key.matrix,
            "VALUE_BASES": value.matrix,
            "KEY_RETURNS": key.inverse,
            "VALUE_RETURNS": value.inverse,
        }
        found = of_all_kernels(layer, layout.offsets)
        for name, some in values.items():
            if some.ndim == 3:  # one that all heads share
                some = np.broadcast_to(some, (layout.kv_heads, *some.shape[1:]))
            found[layout.offsets[name]] = some
        return filled(size, found)

    def _decode(self, layer: AttentionLayer, read: Step) -> Node:
        layout = self.layout
        step = op.concat([read.query, read.key, read.value, read.columns], 1)
        given = self._constants(layer, layout.given_cells * layout.cells)
        parts = _attend(step, f32(given.reshape(1, -1, layout.cells, 1)), read.state)
        parts = op.reshape(parts, i64([1, 1, -1, 4]), False)
        heads = f32(np.zeros((layout.query_heads, 5)))
        context = carrier(
            "opset2", "ROIPooling", [parts, heads], output_roi=[1, layout.head_dim], spatial_scale=1.0, method="max"
        )
        return op.reshape(context, i64([-1, layout.query_heads, 1, layout.head_dim]), False)

    def _prefill(self, layer: AttentionLayer, read: Text) -> Node:
        """The plugin's attention, one KV head after the other, to what `read` gives and what is new; then `append`."""
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        scratch = op.reshape(read.scratch, i64([1, -1, 1, 1]), False)
        # with a number of the query, which the layers before have made: so all of them have read the scratch
        query = op.reshape(first_of(read.query), i64([1]), False)
        counts = op.concat([op.convert(op.concat(halves(read.past), 0), "f32"), query, f32(np.zeros(1))], 0)
        done = op.reshape(_attend(counts, scratch, read.state), i64([1, 1, 1, 4]), False)
        found = op.reshape(read.scratch, i64([1, 2 * H, -1, d]), False)  # keys, then values
        queries = op.reshape(read.query, i64([0, H, -1, d]), True)
        keys = op.multiply(read.key, f32(layer.scale))
        out: list[Node] = []
        for head in range(H):
            mine, values_at = (_after((out or [done])[-1], number) for number in (head, H + head))
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
            out.append(carrier("opset13", "ScaledDotProductAttention", inputs, causal=False))
        context = joined(out, 1)
        return op.add(context, self._append(layer, read, context))

    def _append(self, layer: AttentionLayer, read: Text, context: Node) -> Node:
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
        left = op.multiply(rows, i64([5 * layout.fives - 2 * H * d]))
        counts = op.convert(op.concat([*halves(past), *halves(new)], 0), "f32")
        last = op.reshape(first_of(context), i64([1]), False)
        given = f32(self._constants(layer, 5 * layout.given_fives))
        step = op.concat([counts, last, given, *flat, op.broadcast(f32(0), left)], 0)
        done = carrier(
            "opset1", "PSROIPooling", [read.state, op.reshape(step, i64([-1, 5]), False)],
            output_dim=1, group_size=1, spatial_scale=1.0, spatial_bins_x=1, spatial_bins_y=1, mode="bilinear",
        )  # fmt: skip
        return first_of(done)


class Zeros:
    """What states of one shape start with, (batch, *shape), held once for all of them.

    States that start with the result of one node are copied in each step. So each has a view of its own: a reshape, of
    another view each, for of equal nodes OpenVINO makes one, and of reshapes in a row that nothing else reads, too.
    """

    def __init__(self, batch: Node, shape: Sequence[int]) -> None:
        self.shape, self.views = shape, 0
        self.flat = op.broadcast(f32(0), op.concat([batch, i64([math.prod(shape)])], 0))

    def of_another(self) -> Node:
        """For a state that has none yet."""
        one, rows, width = self.shape
        odd = self.views % 2
        if self.views:
            self.flat = op.reshape(self.flat, i64([0, 1, -1] if odd else [0, -1]), True)
        self.views += 1
        return op.reshape(self.flat, i64([-1, one, rows, width] if odd else [0, one, -1, width]), True)


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


def _attend(step: Node, given: Node, state: Output) -> Node:
    """A call of the kernel of that name."""
    return carrier(
        "opset6", "ExperimentalDetectronPriorGridGenerator", [op.reshape(step, i64([-1, 4]), False), given, state],
        flatten=True, h=0, w=0, stride_x=0.0, stride_y=0.0,
    )  # fmt: skip


def _after(done: Node, number: int) -> Node:
    """[number], which can't be computed before something was done."""
    some = op.reshape(first_of(done), i64([1]), False)
    return op.add(op.convert(op.less(some, some), "i64"), i64([number]))
