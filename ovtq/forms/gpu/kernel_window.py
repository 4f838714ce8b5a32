"""The form for the GPU plugin of attention to a window with a kernel of our own, `ovtq/codec/opencl/window.cl`.

A state of a layer is a ring of its last tokens, which the kernel writes into in place. A decode step is one kernel.
Several tokens are attended to in blocks of queries, as without kernels; behind them the kernel keeps the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec.window_layout import WindowLayout
from ovtq.forms.gpu.guard import NEEDED, carrier, first_of, of_all_kernels, refuse_others, start
from ovtq.forms.gpu.window import Blocks
from ovtq.ir.graph import ALL, One, Port, Tensors, dim, f32, i64, if_else, new_variable, scalar
from ovtq.models.description import AttentionLayer, InPlaceWindow, ModelDescription
from ovtq.states import Fixed, StateSpec, cache_name

RING = "window"  # what a layer's state is called


@dataclass(frozen=True)
class Step(Tensors):
    """What one token reads; `facts` are which of the last tokens are shown, and how many are past."""

    state: Output
    query: Output
    key: Output
    value: Output
    facts: Output


@dataclass(frozen=True)
class Text(Tensors):
    """What several tokens read, attention_mask among it."""

    state: Output
    query: Output
    key: Output
    value: Output
    shown: Output


class KernelWindow:
    """What all sliding layers share, and the rewrite of one layer."""

    def __init__(self, description: ModelDescription) -> None:
        past = refuse_others(description)
        layer = description.sliding[0]
        self.layout = WindowLayout(layer.kv_heads, layer.group, layer.head_dim, layer.reach)
        self.batch, new = (dim(description.input_ids, axis) for axis in (0, 1))
        self.shown = description.attention_mask.output(0)
        self.is_prefill = op.not_equal(new, i64([1])).output(0)
        self.facts = self._facts(past).output(0)
        self.states: list[StateSpec] = []
        self.assigns: list[Node] = []

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of calls or texts beyond which it takes another way."""
        return 1, self.layout.window - 1, self.layout.window

    def rewrite(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer with its window in a state of its own."""
        state = self._state(layer)
        ports = layer.query.source, layer.key.source, layer.value.source
        context = if_else(
            self.is_prefill,
            (Text(state, *ports, self.shown), lambda read: One(self._prefill(layer, read))),
            (Step(state, *ports, self.facts), lambda read: One(self._decode(layer, read))),
            (f"{NEEDED}: window, prefill", f"{NEEDED}: window, decode"),
        ).value
        entry = context.get_node()
        context = op.reshape(context, i64([0, layer.query_heads, -1, layer.head_dim]), True)
        found = {(x.get_node().get_name(), x.get_index()): number for number, x in enumerate(entry.input_values())}
        query, key, value = (Port(entry, found[x.get_node().get_name(), x.get_index()]) for x in ports)
        cache = InPlaceWindow(self.lengths, layout=self.layout)
        return layer.rewritten(context, cache, query=query, key=key, value=value)

    def rows(self, layer: AttentionLayer) -> None:
        """What tells the past length: nothing, a window is as long before its first token."""

    def finish(self) -> list[Node]:
        """The Assigns of all states, once every layer is rewritten."""
        return self.assigns

    def _facts(self, past: Node) -> Node:
        """Which of the last tokens are shown, and how many are past, (1, 1, 1, window + 1) i32."""
        window = self.layout.window
        # of one sequence, however many there are: else a batch fails here, before it is refused for what it is
        shown = op.slice(self.shown, i64([0, -window]), i64([1, ALL]), i64([1, 1]), i64([0, 1]))
        before = op.concat([i64([0]), op.subtract(i64([window]), dim(shown, 1))], 0)
        # what is before the text is never read: so the padding may be the number that is to stand behind
        facts = op.pad(shown, before, i64([0, 1]), "constant", scalar(past))
        return op.reshape(op.convert(facts, "i32"), i64([1, 1, 1, window + 1]), False)

    def _state(self, layer: AttentionLayer) -> Output:
        """What a layer's kernel is given; it starts with the layer's constants, and zeros."""
        name, shape = cache_name(layer.index, RING), self.layout.shape
        spec = StateSpec(name, "f32", (-1, *shape), Fixed(self.layout.window), "tokens", (layer.index,))
        variable = new_variable(spec)
        values = of_all_kernels(layer, self.layout.offsets)
        state = op.read_value(start(self.batch, layer, shape, values), variable)
        self.states.append(spec)
        self.assigns.append(op.assign(state, variable))
        return state.output(0)

    def _decode(self, layer: AttentionLayer, read: Step) -> Node:
        layout = self.layout
        tokens: list[Node | Output] = [read.query, read.key, read.value]
        if layout.padding:
            tokens.append(f32(np.zeros((1, layout.padding, 1, layout.head_dim))))
        context = self._kernel(read.state, op.concat(tokens, 1), read.facts, layout.step)
        return op.reshape(context, i64([-1, layout.query_heads, 1, layout.head_dim]), False)

    def _prefill(self, layer: AttentionLayer, read: Text) -> Node:
        """In blocks, to what the ring holds and what is new; then the last tokens are kept."""
        layout, H, d = self.layout, layer.kv_heads, layer.head_dim
        window, one = layout.window, i64([1])
        new = dim(read.query, 2)
        past = op.subtract(dim(read.shown, 1), new)
        ring = op.slice(op.reshape(read.state, i64([-1]), False), i64([layout.offsets["RING"]]),
                        i64([layout.offsets["RING"] + layout.ring]), one, i64([0]))  # fmt: skip
        # in the order of the text: the token after the last but `window` first
        since = op.add(past, i64(range(1, window)))
        places = op.subtract(since, op.multiply(op.divide(since, i64([window])), i64([window])))
        old = op.gather(op.reshape(ring, i64([1, 2 * H, window, d]), False), places, i64(2))
        tokens = op.concat([read.key, read.value], 1)
        blocks = Blocks(layer, one, new, read.shown, window - 1)
        entry = op.reshape(read.query, i64([0, H, layer.group, -1, d]), True)
        every = op.concat([old, tokens, blocks.zero_rows], 2)
        context = blocks.attend(layer, entry, every, blocks.sinks([layer])[layer.index])
        return op.add(context, self._keep(read, tokens, past, new, context))

    def _keep(self, read: Text, tokens: Node, past: Node, new: Node, context: Node) -> Node:
        """Zero, (1, 1, 1, 1), once the last of the new tokens are kept, behind what reads those before them."""
        layout = self.layout
        window, d = layout.window, layout.head_dim
        last = op.slice(tokens, i64([-window]), i64([ALL]), i64([1]), i64([2]))
        missing = op.subtract(i64([window]), op.minimum(new, i64([window])))
        before = op.concat([i64([0, 0]), missing, i64([0])], 0)
        last = op.pad(last, before, i64([0] * 4), "constant", op.constant(np.float32(0)))
        behind = op.concat([op.reshape(first_of(context), i64([1]), False), f32(np.zeros(2 * d - 1))], 0)
        step = op.concat([op.reshape(last, i64([-1]), False), behind], 0)
        counts = op.reshape(op.convert(op.concat([past, new], 0), "i32"), i64([1, 1, 2, 1]), False)
        return first_of(self._kernel(read.state, step, counts, layout.kept))

    def _kernel(self, state: Output, step: Node, facts: Node | Output, each: int) -> Node:
        """(parts of `each` number, 1, side, side).

        How many parts is to be left open in a call of several tokens: a single number of a result of known size is
        reordered by a kernel that does not build (P63).
        """
        parts = op.reshape(step, i64([-1, each]), False)
        return carrier(
            "opset1", "DeformablePSROIPooling", [state, parts, facts],
            output_dim=1, group_size=self.layout.side, spatial_scale=1.0, trans_std=0.0, part_size=1, spatial_bins_x=1,
            spatial_bins_y=1, mode="bilinear_deformable",
        )  # fmt: skip
