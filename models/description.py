"""What a pass may ask of a model: its attention layers and the path of their keys and values through the state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec.kernel_files import KernelSet
from ovtq.codec.kernel_layout import KernelLayout
from ovtq.codec.packed_attention import PackedAttention, StateSlice
from ovtq.codec.window_layout import WindowLayout
from ovtq.ir.graph import MASKED, Port, consumers, dim, i64, redirect
from ovtq.states import StateSpec


@dataclass(frozen=True)
class KVPath:
    """The way of one tensor (K or V) through the state: ReadValue → Gather(beam_idx) → Concat(axis 2) → Assign.

    `past` and `appended` have shape (batch, kv_heads, tokens, head_dim).
    """

    read: Node
    beam_gather: Node
    append: Node
    assign: Node

    @property
    def past(self) -> Output:
        """The cached tokens, reordered by beam."""
        return self.beam_gather.output(0)

    @property
    def appended(self) -> Output:
        """The cached and the new tokens."""
        return self.append.output(0)

    @property
    def variable_id(self) -> str:
        """Name of the state."""
        return str(self.assign.get_variable_id())


@dataclass(frozen=True)
class TokenRows:
    """A tensor that tells how many past tokens there are: (batch, heads, rows, ·), a row for each, beams in order.

    Before them may be `extra` rows, which are there once any token is.
    """

    tensor: Output
    extra: int = 0

    def count(self) -> Node:
        """How many past tokens there are, an i64 vector of one element."""
        rows = dim(self.tensor, 2)
        return op.maximum(op.subtract(rows, i64([self.extra])), i64([0])) if self.extra else rows


# What a layer's cache is: as exported, or what a pass made of it. `rows` tells the past length, where the cache does;
# `lengths` are those of calls or texts beyond which the layer takes another way.


@dataclass(frozen=True)
class Exported:
    """Keys and values go through states of their own, as exported; `mask` is where the additive mask enters."""

    key: KVPath
    value: KVPath
    mask: Port
    lengths: tuple[int, ...] = ()

    @property
    def paths(self) -> tuple[KVPath, KVPath]:
        """Of keys and of values."""
        return self.key, self.value

    @property
    def rows(self) -> TokenRows:
        """All past tokens."""
        return TokenRows(self.key.past)


@dataclass(frozen=True)
class Window:
    """The last tokens, as they are, in a state of fixed length."""

    lengths: tuple[int, ...]
    rows: None = None


@dataclass(frozen=True)
class InPlaceWindow(Window):
    """The same of one sequence, in a state that a kernel of ovtq writes into."""

    layout: WindowLayout = field(kw_only=True)


@dataclass(frozen=True)
class SinkRow:
    """The plugin's own cache of all tokens, behind a row that is the sink."""

    rows: TokenRows
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Packed:
    """Packed codes, of a window or all tokens: `definition` is what the layer computes, `places` where they are."""

    definition: PackedAttention
    places: tuple[StateSlice, ...]
    rows: TokenRows | None
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class InPlace(Packed):
    """Packed codes of all tokens of one sequence, in a state of fixed length that kernels of ovtq write into."""

    layout: KernelLayout


@dataclass(frozen=True)
class Pruned(Packed):
    """Some tokens of all, packed or as they are; its definition is a PrunedAttention."""


Cache = Exported | Window | SinkRow | Packed | Pruned


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer: what it is in the exported model, where tensors enter and leave it now, and its cache.

    `query`, `key`, `value` are the ports where a step's new Q (batch, query_heads, tokens, head_dim) and K, V
    (batch, kv_heads, tokens, head_dim) enter the attention, after RoPE; `context` is what the attention itself gives,
    (batch, query_heads, tokens, head_dim).
    """

    index: int
    window: int | None  # tokens a query can see, its own included; None: all
    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    sinks: np.ndarray | None  # (query_heads,), one logit per query head
    key_bias: np.ndarray | None  # (kv_heads, head_dim), before RoPE
    value_bias: np.ndarray | None
    query: Port
    key: Port
    value: Port
    context: Output
    cache: Cache
    key_taken: np.ndarray | None = None  # (kv_heads, head_dim): what a pass has subtracted from all keys before `key`

    @property
    def paths(self) -> tuple[KVPath, ...]:
        """The K and V paths as exported; empty once a pass replaced them."""
        return self.cache.paths if isinstance(self.cache, Exported) else ()

    @property
    def exported(self) -> Exported:
        """Its cache as exported. Raises ValueError once a pass replaced it."""
        if not isinstance(self.cache, Exported):
            raise ValueError(f"layer {self.index} no longer has the exported KV states")
        return self.cache

    @property
    def reach(self) -> int:
        """Tokens that a query of a sliding layer can see. Raises ValueError for a full layer."""
        if self.window is None:
            raise ValueError(f"layer {self.index} has no window")
        return self.window

    @property
    def own_sinks(self) -> np.ndarray:
        """(query_heads,). Raises ValueError for a layer without sinks."""
        if self.sinks is None:
            raise ValueError(f"layer {self.index} has no sinks")
        return self.sinks

    @property
    def token_rows(self) -> TokenRows | None:
        """What of this layer's cache tells how many past tokens there are; None if nothing does."""
        return self.cache.rows

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of calls or texts beyond which it takes another way."""
        return self.cache.lengths

    @property
    def packed(self) -> PackedAttention | None:
        """What it should compute, if its cache is packed or pruned."""
        return self.cache.definition if isinstance(self.cache, Packed) else None

    @property
    def places(self) -> tuple[StateSlice, ...]:
        """Where its keys and values then are."""
        return self.cache.places if isinstance(self.cache, Packed) else ()

    @property
    def sink_logits(self) -> np.ndarray:
        """(1, kv_heads, group, 1, 1) f32."""
        sinks = self.sinks if self.sinks is not None else np.full(self.query_heads, MASKED)
        return np.asarray(sinks, np.float32).reshape(1, self.kv_heads, self.group, 1, 1)

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def shape(self) -> tuple[int | None, int, int, int]:
        """What layers must have in common to be rewritten together: window, query_heads, kv_heads, head_dim."""
        return self.window, self.query_heads, self.kv_heads, self.head_dim

    def rewritten(
        self, context: Node, cache: Cache, query: Port | None = None, key: Port | None = None, value: Port | None = None
    ) -> AttentionLayer:
        """This layer with another cache and attention: what read its context reads `context` from now on.

        Ports that are not given stay where they are.
        """
        redirect(self.context, context)
        query, key, value = query or self.query, key or self.key, value or self.value
        return replace(self, context=context.output(0), cache=cache, query=query, key=key, value=value)


@dataclass(frozen=True)
class ModelDescription:
    """A stateful language model as the passes see it; inputs have shape (batch, tokens), beam_idx (batch,).

    `attention_mask` is the input, or, once decouple-length has run, its columns of past and new tokens; then `past`
    is how many past tokens there are, an i64 vector of one element. `states` are all that the graph has.
    """

    architecture: str
    input_ids: Node
    attention_mask: Node
    beam_idx: Node
    layers: tuple[AttentionLayer, ...]
    states: tuple[StateSpec, ...]
    past: Node | None = None
    total: Node | None = None  # past and new tokens together, likewise

    @property
    def length(self) -> Node:
        """How many past and new tokens there are, an i64 vector of one element."""
        return dim(self.attention_mask, 1) if self.total is None else self.total

    @property
    def sliding(self) -> tuple[AttentionLayer, ...]:
        """The layers with a sliding window."""
        return tuple(layer for layer in self.layers if layer.window is not None)

    @property
    def full(self) -> tuple[AttentionLayer, ...]:
        """The layers that see every token."""
        return tuple(layer for layer in self.layers if layer.window is None)

    @property
    def sinks(self) -> bool:
        """Whether any layer's attention has sinks."""
        return any(layer.sinks is not None for layer in self.layers)

    def with_layers(self, changed: dict[int, AttentionLayer]) -> ModelDescription:
        """This description with some layers replaced, by index."""
        return replace(self, layers=tuple(changed.get(layer.index, layer) for layer in self.layers))

    def with_states(self, add: Iterable[StateSpec]) -> ModelDescription:
        """This description with more states."""
        return replace(self, states=(*self.states, *add))

    @property
    def kernels(self) -> list[KernelSet]:
        """Those that its layers are attended to by, each once."""
        caches = [layer.cache for layer in self.layers]
        return list(dict.fromkeys(cache.layout for cache in caches if isinstance(cache, InPlace | InPlaceWindow)))

    def recached(self, changed: dict[int, AttentionLayer], states: Iterable[StateSpec]) -> ModelDescription:
        """This description with layers, by index, that have other caches, in these states in place of the exported."""
        gone = {path.variable_id for layer in self.layers if layer.index in changed for path in layer.paths}
        left = tuple(state for state in self.states if state.name not in gone)
        return replace(self.with_layers(changed), states=(*left, *states))


def shape_readers(description: ModelDescription) -> list[tuple[Node, int, int, bool]]:
    """(ShapeOf, kv_heads, head_dim, reads the appended tokens) for every ShapeOf of an exported KV state."""
    return [
        (node, layer.kv_heads, layer.head_dim, appended)
        for layer in description.layers
        for path in layer.paths
        for tensor, appended in ((path.past, False), (path.appended, True))
        for node in consumers(tensor)
        if node.get_type_name() == "ShapeOf" and consumers(node.output(0))
    ]
