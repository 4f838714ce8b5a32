"""The form for the GPU plugin of attention to a window with a kernel of our own, `ovtq/codec/opencl/window.cl`.

A state of a layer is a ring of its last tokens, which the kernel writes into in place. One call of it attends for any
number of tokens and keeps the last: there is no branch, whose buffers a plugin would keep for each layer. Several
tokens are brought to a power of two, because a kernel is built for each new shape.
"""

from __future__ import annotations

from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec.window_layout import WindowLayout
from ovtq.forms.gpu.guard import (
    LEAST,
    NEEDED,
    brought,
    carrier,
    of_all_kernels,
    refuse_others,
    start,
)
from ovtq.ir.graph import ALL, Port, dim, f32, i64, new_variable
from ovtq.models.description import AttentionLayer, InPlaceWindow, ModelDescription
from ovtq.states import Fixed, StateSpec, cache_name

RING = "window"  # what a layer's state is called
MOST = 2**20  # tokens of a call, of which kernels are built for other numbers


class KernelWindow:
    """What all sliding layers share, and the rewrite of one layer."""

    def __init__(self, description: ModelDescription) -> None:
        past = refuse_others(description)
        layer = description.sliding[0]
        self.layout = WindowLayout(layer.kv_heads, layer.group, layer.head_dim, layer.reach)
        self.batch, self.new = (dim(description.input_ids, axis) for axis in (0, 1))
        # a token by itself, several as many as they are brought to
        several = op.minimum(op.subtract(self.new, i64([1])), i64([1]))
        more = op.subtract(brought(self.new, MOST), i64([1]))
        self.brought = op.add(op.multiply(several, more), i64([1]))
        self.facts = self._facts(description.attention_mask, past)
        self.states: list[StateSpec] = []
        self.assigns: list[Node] = []

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of calls or texts beyond which it takes another way."""
        return 1, self.layout.window - 1, self.layout.window, LEAST

    def rewrite(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer with its window in a state of its own."""
        layout, state = self.layout, self._state(layer)
        sources = [layer.query.source, layer.key.source, layer.value.source]
        parts = [op.reshape(source, i64([-1]), False) for source in sources]
        left = op.subtract(op.multiply(self.brought, i64([layout.numbers])), op.multiply(self.new, i64([layout.used])))
        step = op.concat([*parts, op.broadcast(f32(0), left)], 0)
        context = carrier(
            "opset1", "DeformablePSROIPooling", [state, op.reshape(step, i64([-1, layout.step]), False), self.facts],
            output_dim=1, group_size=layout.side, spatial_scale=1.0, trans_std=0.0, part_size=1, spatial_bins_x=1,
            spatial_bins_y=1, mode="bilinear_deformable",
        )  # fmt: skip
        context.set_friendly_name(f"{NEEDED}: window {layer.index}")
        size = op.multiply(self.new, i64([layout.query_heads * layout.head_dim]))
        context = op.slice(op.reshape(context, i64([-1]), False), i64([0]), size, i64([1]), i64([0]))
        context = op.reshape(context, i64([1, layout.query_heads, -1, layout.head_dim]), False)
        query, key, value = (Port(part, 0) for part in parts)
        cache = InPlaceWindow(self.lengths, layout=layout)
        return layer.rewritten(context, cache, query=query, key=key, value=value)

    def rows(self, layer: AttentionLayer) -> None:
        """What tells the past length: nothing, a window is as long before its first token."""

    def finish(self) -> list[Node]:
        """The Assigns of all states, once every layer is rewritten."""
        return self.assigns

    def _facts(self, mask: Node, past: Node) -> Node:
        """Which tokens are shown, from the first that a window reaches, and the two counts, (1, 1, 1, ·) i32."""
        reach = self.layout.window - 1
        most = op.add(self.new, i64([reach]))
        # of one sequence, however many there are: else a batch fails here, before it is refused for what it is
        first = op.concat([i64([0]), op.subtract(i64([0]), most)], 0)
        shown = op.slice(mask, first, i64([1, ALL]), i64([1, 1]), i64([0, 1]))
        before, behind = (
            op.concat([i64([0]), op.subtract(*two)], 0) for two in ((most, dim(shown, 1)), (self.brought, self.new))
        )
        shown = op.reshape(op.pad(shown, before, behind, "constant", i64(0)), i64([-1]), False)
        facts = op.convert(op.concat([shown, past, self.new], 0), "i32")
        return op.reshape(facts, i64([1, 1, 1, -1]), False)

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
