"""The form for the GPU plugin of layers that are pruned: `Branches` that read another history, or mask some of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.attend import Plan
from ovtq.attend_branches import Branches, looked_up
from ovtq.beams import Beams
from ovtq.codec import AdaptiveUniform
from ovtq.graph import cut_heads, i64, joined
from ovtq.models.description import AttentionLayer
from ovtq.packed_attention import Place
from ovtq.packing import Layout
from ovtq.prune_branches import Marked, Residents
from ovtq.quantizer import encode, pack
from ovtq.ring import State
from ovtq.states import StateSpec, cache_name, scale_name


class Masking(Branches):
    """Tokens that are pruned stay in the history, and are masked, or read as 0."""

    def _far_masks(self) -> Iterator[Output]:
        plan = self.plan
        self.marked = Marked(self.beams, plan.layers, plan.pruning, self.columns, self.is_prefill)
        self.factors = iter(self.marked.factors)
        return iter(self.marked.masks)

    def _history(self, layer: AttentionLayer, new: Node, recent: Node) -> tuple[Output, Output]:
        tensors, factor = super()._history(layer, new, recent), next(self.factors)
        if factor is None:
            return tensors
        keys, values = (op.multiply(tensor, factor).output(0) for tensor in tensors)
        return keys, values

    def stores(self) -> list[Node]:
        """The Assigns of all states, once every layer is rewritten."""
        return [*super().stores(), *self.marked.store()]


class Evicting(Branches):
    """The history is what stays of it, for all layers in states of one fixed length.

    Each state is copied whole in every step, whether a token is evicted or not: a bounded number of bytes.
    """

    def _far_masks(self) -> Iterator[Output]:
        plan = self.plan
        self.residents = Residents(self.beams, plan.layers, plan.pruning, self.columns, self.is_prefill)
        self.stacks = [
            _Stack(self.beams, plan, what, codec, layout)
            for what, codec, layout in zip(("key", "value"), (plan.key, plan.value), plan.layouts, strict=True)
        ]
        self.pasts = zip(*(stack.pasts() for stack in self.stacks), strict=True)
        self.leaving: list[list[Output]] = []
        return repeat(self.residents.mask)

    def _history(self, layer: AttentionLayer, new: Node, recent: Node) -> tuple[Output, Output]:
        after = op.add(self.columns.new, i64([1]))  # behind the sink's row
        self.leaving.append(op.split(op.slice(recent, i64([1]), after, i64([1]), i64([2])), i64(1), 2).outputs())
        return next(self.pasts)

    def places(self, layer: AttentionLayer) -> tuple[Place, Place]:
        """Where keys and values of a layer are."""
        number = [other.index for other in self.plan.layers].index(layer.index)
        heads = slice(number * layer.kv_heads, (number + 1) * layer.kv_heads)
        names = (cache_name(self.plan.indices, what) for what in ("key", "value"))
        key, value = (Place(name, heads, slice(None), heads) for name in names)
        return key, value

    def rows(self, layer: AttentionLayer) -> None:
        """What tells the past length: nothing."""

    def stores(self) -> list[Node]:
        """The Assigns of all states, once every layer is rewritten."""
        assigns = [*super().stores(), *self.residents.store()]
        leaving = [joined(list(tokens), 1) for tokens in zip(*self.leaving, strict=True)]
        done = self._packed([(stack, some) for stack, some in zip(self.stacks, leaving, strict=True) if stack.layout])
        for stack, some in zip(self.stacks, leaving, strict=True):
            assigns += stack.store(next(done) if stack.layout else [some], self.residents.rows)
        return assigns

    def _packed(self, some: list[tuple[_Stack, Node | Output]]) -> Iterator[list[Node | Output]]:
        """Bytes and scales of those that are packed, in one stream of nodes: nodes are what costs, the rows are few."""
        if not some:
            return
        codecs, layouts = zip(*((stack.codec, stack.layout) for stack, _ in some), strict=True)
        centred, scales = encode(joined([tokens for _, tokens in some], 1), codecs, self.plan.rotation)
        parts = cut_heads(scales, len(some), "gpu")
        for tensors in zip(pack(centred, codecs, layouts), parts, strict=True):
            yield list(tensors)


class _Stack:
    """Keys or values of all layers that stay: (batch, layers·kv_heads, room, ·), and their scales if packed."""

    def __init__(
        self,
        beams: Beams,
        plan: Plan,
        what: str,
        codec: AdaptiveUniform | None,
        layout: Layout | None,
    ) -> None:
        self.plan, self.codec, self.layout = plan, codec, layout
        layer, room = plan.layers[0], plan.pruning.room
        self.heads = len(plan.layers) * layer.kv_heads
        width, kind = (layout.bytes, np.int8) if layout else (layer.head_dim, np.float32)
        name, these = cache_name(plan.indices, what), plan.indices
        spec = StateSpec.fixed(name, "i8" if layout else "f32", [self.heads, room, width], what, these)
        self.states = [State(beams, spec, np.zeros(1, kind))]
        if layout:
            spec = StateSpec.fixed(scale_name(name), "f32", [self.heads, room, 1], "scale", these)
            self.states.append(State(beams, spec, np.zeros(1, np.float32)))

    def pasts(self) -> list[Output]:
        """What each layer reads, looked up."""
        parts = [cut_heads(state.past, len(self.plan.layers), "gpu") for state in self.states]
        return [looked_up(self.layout, *part) for part in zip(*parts, strict=True)]

    def store(self, tensors: Sequence[Node | Output], rows: Node) -> list[Node]:
        """The Assigns that keep `rows` of these and of what leaves: tokens as they are, or bytes and scales."""
        return [state.store(new, rows) for state, new in zip(self.states, tensors, strict=True)]
