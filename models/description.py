"""What a pass may ask of a model: its attention layers and the path of their keys and values through the state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.graph import Port, dim, i64, redirect
from ovtq.packed_attention import PackedAttention, Place
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


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer.

    `query`, `key`, `value` are the ports where a step's new Q (batch, query_heads, tokens, head_dim) and K, V
    (batch, kv_heads, tokens, head_dim) enter the attention, after RoPE; `context` is what the attention itself gives,
    (batch, query_heads, tokens, head_dim). A pass that gives the layer another cache sets `key_path`, `value_path`
    and `mask` to None.
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
    mask: Port | None
    key_path: KVPath | None
    value_path: KVPath | None
    packed: PackedAttention | None = None  # what it should compute once its cache is quantised
    places: tuple[Place, ...] = ()  # then: where its keys and values are
    rows: TokenRows | None = None  # what tells the past length, once its cache is another than exported
    lengths: tuple[int, ...] = ()  # of calls or texts beyond which its new form takes another way

    @property
    def paths(self) -> tuple[KVPath, ...]:
        """The K and V paths as exported; empty once a pass replaced them."""
        return tuple(path for path in (self.key_path, self.value_path) if path is not None)

    @property
    def token_rows(self) -> TokenRows | None:
        """What of this layer's cache tells how many past tokens there are; None if nothing does."""
        return TokenRows(self.key_path.past) if self.key_path else self.rows

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def shape(self) -> tuple[int | None, int, int, int]:
        """What layers must have in common to be rewritten together: window, query_heads, kv_heads, head_dim."""
        return self.window, self.query_heads, self.kv_heads, self.head_dim

    def rewritten(self, context: Node, **changes: Any) -> AttentionLayer:
        """This layer with another cache and attention: what read its context reads `context` from now on."""
        redirect(self.context, context)
        return replace(self, context=context.output(0), mask=None, key_path=None, value_path=None, **changes)


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

    def with_layers(self, changed: dict[int, AttentionLayer]) -> ModelDescription:
        """This description with some layers replaced, by index."""
        return replace(self, layers=tuple(changed.get(layer.index, layer) for layer in self.layers))

    def with_states(self, drop: Iterable[str], add: Iterable[StateSpec]) -> ModelDescription:
        """This description without the states of some names, and with others."""
        gone = set(drop)
        return replace(self, states=(*(state for state in self.states if state.name not in gone), *add))
