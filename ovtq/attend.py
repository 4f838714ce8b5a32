"""Attention to a history of packed codes and to recent tokens at full precision: what the forms of both targets share.

One softmax over three kinds of columns: the sink, the recent and new tokens, the history. Query heads that share a KV
head are rows of one product, so that K and V are never broadcast to them in a decode step. Keys, the sink's among them,
carry the scale of the attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec import AdaptiveUniform
from ovtq.coding import Coding
from ovtq.graph import MASKED, dim, f32, i64, new_variable, scalar
from ovtq.models.description import AttentionLayer, ModelDescription
from ovtq.packing import Layout
from ovtq.pruning import Pruning
from ovtq.quantizer import encode, pack

ALL = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Plan(Coding):
    """What becomes of the tokens of some layers.

    `centres`, (kv_heads, head_dim) for each layer, are what was taken from its keys, scale included; `window` is how
    many recent tokens are at full precision, at the least. `pruning` says which of the others stay.
    """

    layers: tuple[AttentionLayer, ...]
    centres: dict[int, np.ndarray]
    window: int
    pruning: Pruning | None = None

    @cached_property
    def sink_rows(self) -> np.ndarray:
        """(layers·2·kv_heads, head_dim): the sink's key, −centre, and value, 0, of each layer."""
        return np.concatenate([np.concatenate([-c, 0 * c]) for c in (self.centres[x.index] for x in self.layers)])


@dataclass(frozen=True)
class History:
    """One tensor's (K or V) stored tokens: bytes (batch, kv_heads, tokens, ·) i8, scales (batch, kv_heads, tokens, 1).

    `past` are the tokens stored before this call, `appended` those of this call too. Without `layout` they are not
    packed but the tensor itself, (…, head_dim), and have no scales.
    """

    layout: Layout | None
    past: Output
    appended: Output
    past_scales: Output | None = None
    appended_scales: Output | None = None


def store(
    description: ModelDescription, plan: Plan, layer: AttentionLayer, tokens: Node
) -> tuple[History, History, list[Held]]:
    """Quantise keys and values, (batch, 2·kv_heads, tokens, d), and append them to what their states hold."""
    H, d = layer.kv_heads, layer.head_dim
    # cut, not split: a Split's halves, one packed and one as it is, the GPU plugin takes from wrong places
    halves = [op.slice(tokens, i64([k]), i64([k + H]), i64([1]), i64([1])).output(0) for k in (0, H)]
    packed = [(half, codec, where) for half, codec, where in _triples(plan, halves) if codec and where]
    codecs, layouts = [codec for _, codec, _ in packed], [where for *_, where in packed]
    done: Iterator[tuple[Node | Output, Output]] = iter(())
    if packed:
        centred, scales = encode(tokens if len(packed) == 2 else packed[0][0], codecs, plan.rotation)
        parts = op.split(scales, i64(1), 2).outputs() if len(packed) == 2 else [scales.output(0)]
        done = iter(zip(pack(centred, codecs, layouts), parts, strict=True))
    histories, held = [], []
    for name, (half, codec, where) in zip(("key", "value"), _triples(plan, halves), strict=True):
        name = f"ovtq.{layer.index}.{name}"
        if codec and where:
            data, scale = next(done)
            codes = Held(description, name, data, H, where.bytes, ov.Type.i8)
            scaled = Held(description, f"{name}.scale", scale, H, 1, ov.Type.f32)
            histories.append(History(where, codes.past, codes.appended, scaled.past, scaled.appended))
            held += [codes, scaled]
        else:
            plain = Held(description, name, half, H, d, ov.Type.f32)
            histories.append(History(None, plain.past, plain.appended))
            held.append(plain)
    return histories[0], histories[1], held


def _triples(plan: Plan, halves: Sequence[Output]) -> list[tuple[Output, AdaptiveUniform | None, Layout | None]]:
    return list(zip(halves, (plan.key, plan.value), plan.layouts, strict=True))


class Held:
    """A growing state (batch, heads, tokens, width): what it held, beams in order, and that with `new` behind it.

    Between the state and the Concat stands one Gather and nothing else: so the GPU plugin appends in place.
    """

    def __init__(
        self, description: ModelDescription, name: str, new: Node | Output, heads: int, width: int, kind: ov.Type
    ) -> None:
        self.variable = new_variable(name, [-1, heads, -1, width], kind)
        shape = op.concat([dim(description.input_ids, 0), i64([heads, 0, width])], 0)
        empty = op.broadcast(op.constant(np.zeros((), kind.to_dtype())), shape)
        past = op.gather(op.read_value(empty, self.variable), description.beam_idx, i64(0))
        self.past, self.appended = past.output(0), op.concat([past, new], 2).output(0)

    def assign(self, rows: Node | Output | None = None) -> Node:
        """The Assign of all it now holds, or, with `rows` (batch, heads, ·), of these rows of each head."""
        kept = self.appended.get_node() if rows is None else op.gather(self.appended, rows, i64(2), 2)
        return op.assign(kept, self.variable)


class Columns:
    """Lengths and masks that all layers share. Recent columns: the sink, `rows` recent tokens, the new ones.

    `older` of the past tokens are in the history; the others are the last of the recent rows.
    """

    def __init__(self, description: ModelDescription, rows: int) -> None:
        self.rows, self.shown = rows, description.attention_mask
        self.batch, self.new = (dim(description.input_ids, axis) for axis in (0, 1))
        self.total = dim(description.attention_mask, 1)
        self.past = op.subtract(self.total, self.new)
        self.recent = op.add(self.new, i64([1 + rows]))

    def far_mask(self, older: Node, columns: Node | None = None) -> Node:
        """(batch, 1, 1, columns or older), additive: every query sees the history, but for padding and what follows."""
        old = op.slice(self.shown, i64([0]), older, i64([1]), i64([1]))
        if columns is not None:
            behind = op.concat([i64([0]), op.subtract(columns, older)], 0)
            old = op.pad(old, i64([0, 0]), behind, "constant", i64(0))
        return op.select(op.equal(op.unsqueeze(old, i64([1, 2])), i64(0)), f32(MASKED), f32(0))

    def near(self, older: Node) -> Node:
        """(batch, 1, recent) boolean: the columns that are tokens and no padding. The sink's is not shown yet."""
        near = op.slice(self.shown, older, i64([ALL]), i64([1]), i64([1]))
        before = op.concat([i64([0]), op.subtract(self.recent, op.subtract(self.total, older))], 0)
        near = op.pad(near, before, i64([0, 0]), "constant", i64(0))
        return op.unsqueeze(op.not_equal(near, i64(0)), i64([1]))

    def near_mask(self, near: Node | Output, columns: Node, first: Node, count: Node) -> Node:
        """(batch, 1, 1, count, recent), additive: query first + i sees the sink and columns ≤ rows + 1 + first + i.

        The conditions are joined at rank 3: with a boolean of rank 5 and one of rank 2 the GPU plugin joins wrong rows.
        """
        query = op.range(scalar(first), scalar(op.add(first, count)), i64(1), "i64")
        column = op.unsqueeze(op.range(i64(0), scalar(columns), i64(1), "i64"), i64([0]))
        causal = op.less_equal(column, op.add(op.unsqueeze(query, i64([1])), i64([self.rows + 1])))
        visible = op.logical_and(op.unsqueeze(causal, i64([0])), near)  # (batch, count, recent)
        mask = op.select(visible, f32(0), f32(MASKED))
        mask = op.select(op.unsqueeze(op.less(column, i64([1])), i64([0])), f32(0), mask)
        return op.unsqueeze(mask, i64([1, 2]))


def sink_logits(layer: AttentionLayer) -> np.ndarray:
    """(1, kv_heads, group, 1, 1)."""
    sinks = layer.sinks if layer.sinks is not None else np.full(layer.query_heads, MASKED)
    return np.asarray(sinks, np.float32).reshape(1, layer.kv_heads, layer.group, 1, 1)
