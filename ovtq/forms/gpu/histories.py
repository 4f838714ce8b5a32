"""Histories of the form for the GPU plugin that some tokens are pruned from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec import AdaptiveUniform
from ovtq.codec.packed_attention import StateSlice
from ovtq.codec.packing import Layout
from ovtq.forms.attend import FullCacheSpec
from ovtq.forms.beams import Beams
from ovtq.forms.gpu.full import Appended, Nodes, looked_up
from ovtq.forms.gpu.prune import GpuEviction, GpuMask
from ovtq.forms.pruning import Pruning
from ovtq.forms.quantizer import encode, pack
from ovtq.forms.window_state import FixedState
from ovtq.ir.graph import i64, joined, slice_heads
from ovtq.models.description import AttentionLayer, TokenRows
from ovtq.states import StateSpec, cache_name, scale_name


def unfit(pruning: Pruning) -> str:
    """Why a rule can't be carried out by this form; empty if it can."""
    if pruning.flush > 1:
        return f"slack {pruning.flush - 1}: for a GPU tokens leave one by one; leave it out, or use --target cpu"
    return ""


class Masked:
    """Tokens that are pruned stay where all others are, and are masked, or read as 0."""

    def __init__(self, nodes: Nodes) -> None:
        self.appended, plan = Appended(nodes), nodes.plan
        self.marked = GpuMask(nodes.beams, plan.layers, plan.pruned_by, nodes.columns, nodes.is_prefill)

    def history_mask(self, layer: AttentionLayer) -> Output:
        """One of its own for every layer."""
        return self.marked.masks[layer.index]

    def read(self, layer: AttentionLayer, new: Node, recent: Node) -> tuple[Output, Output]:
        """Of past and new tokens."""
        keys, values = self.appended.read(layer, new, recent)
        factor = self.marked.factors.get(layer.index)
        if factor is None:
            return keys, values
        return op.multiply(keys, factor).output(0), op.multiply(values, factor).output(0)

    def places(self, layer: AttentionLayer) -> tuple[StateSlice, StateSlice]:
        """States of its own."""
        return self.appended.places(layer)

    def rows(self, layer: AttentionLayer) -> TokenRows | None:
        """The layer's keys."""
        return self.appended.rows(layer)

    def finish(self) -> list[Node]:
        """The Assigns of all that is held, and of what is known of it."""
        return [*self.appended.finish(), *self.marked.finish()]


class Evicted:
    """The history is what stays of it, for all layers in states of one fixed length.

    Each state is copied whole in every step, whether a token is evicted or not: a bounded number of bytes.
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes, self.plan = nodes, nodes.plan
        plan = nodes.plan
        self.residents = GpuEviction(nodes.beams, plan.layers, plan.pruned_by, nodes.columns, nodes.is_prefill)
        coded = plan.uniform
        self.stacks = [
            _Stack(nodes.beams, plan, what, codec, layout)
            for what, codec, layout in zip(("key", "value"), (coded.key, coded.value), coded.layouts, strict=True)
        ]
        pasts = zip(*(stack.pasts() for stack in self.stacks), strict=True)
        self.pasts = dict(zip(plan.indices, pasts, strict=True))
        self.leaving: dict[int, list[Output]] = {}

    def history_mask(self, layer: AttentionLayer) -> Output:
        """The same for every layer."""
        return self.residents.mask

    def read(self, layer: AttentionLayer, new: Node, recent: Node) -> tuple[Output, Output]:
        """Of what stayed."""
        after = op.add(self.nodes.columns.new, i64([1]))  # behind the sink's row
        leaving = op.slice(recent, i64([1]), after, i64([1]), i64([2]))
        self.leaving[layer.index] = op.split(leaving, i64(1), 2).outputs()
        return self.pasts[layer.index]

    def places(self, layer: AttentionLayer) -> tuple[StateSlice, StateSlice]:
        """Its heads in the states of all."""
        number = self.plan.indices.index(layer.index)
        heads = slice(number * layer.kv_heads, (number + 1) * layer.kv_heads)
        names = (cache_name(self.plan.indices, what) for what in ("key", "value"))
        key, value = (StateSlice(name, heads, slice(None), heads) for name in names)
        return key, value

    def rows(self, layer: AttentionLayer) -> None:
        """Nothing tells the past length."""

    def finish(self) -> list[Node]:
        """The Assigns of what stays, and of what is known of it."""
        assigns = self.residents.finish()
        each = zip(*(self.leaving[index] for index in self.plan.indices), strict=True)
        leaving = [joined(list(tokens), 1) for tokens in each]
        done = self._packed([(stack, some) for stack, some in zip(self.stacks, leaving, strict=True) if stack.layout])
        for stack, some in zip(self.stacks, leaving, strict=True):
            assigns += stack.store(next(done) if stack.layout else [some], self.residents.rows)
        return assigns

    def _packed(self, some: list[tuple[_Stack, Node | Output]]) -> Iterator[list[Node | Output]]:
        """Bytes and scales of those that are packed, in one stream of nodes: nodes are what costs, the rows are few."""
        if not some:
            return
        codecs, layouts = zip(*((stack.codec, stack.layout) for stack, _ in some), strict=True)
        matrix = self.plan.encoder(self.plan.layers, codecs)
        centred, scales = encode(joined([tokens for _, tokens in some], 1), codecs, matrix)
        parts = slice_heads(scales, len(some))
        for tensors in zip(pack(centred, codecs, layouts), parts, strict=True):
            yield list(tensors)


class _Stack:
    """Keys or values of all layers that stay: (batch, layers·kv_heads, room, ·), and their scales if packed."""

    def __init__(
        self,
        beams: Beams,
        plan: FullCacheSpec,
        what: str,
        codec: AdaptiveUniform | None,
        layout: Layout | None,
    ) -> None:
        self.plan, self.codec, self.layout = plan, codec, layout
        layer, room = plan.layers[0], plan.pruned_by.room
        self.heads = len(plan.layers) * layer.kv_heads
        width, kind = (layout.bytes, np.int8) if layout else (layer.head_dim, np.float32)
        name, these = cache_name(plan.indices, what), plan.indices
        spec = StateSpec.fixed(name, "i8" if layout else "f32", [self.heads, room, width], what, these)
        self.states = [FixedState(beams, spec, np.zeros(1, kind))]
        if layout:
            spec = StateSpec.fixed(scale_name(name), "f32", [self.heads, room, 1], "scale", these)
            self.states.append(FixedState(beams, spec, np.zeros(1, np.float32)))

    def pasts(self) -> list[Output]:
        """What each layer reads, looked up."""
        parts = [slice_heads(state.past, len(self.plan.layers)) for state in self.states]
        return [looked_up(self.layout, *part) for part in zip(*parts, strict=True)]

    def store(self, tensors: Sequence[Node | Output], rows: Node) -> list[Node]:
        """The Assigns that keep `rows` of these and of what leaves: tokens as they are, or bytes and scales."""
        return [state.store(new, rows) for state, new in zip(self.states, tensors, strict=True)]
