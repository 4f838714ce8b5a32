"""Attention to a history of packed codes and to recent tokens at full precision: what the forms of both targets share.

One softmax over three kinds of columns: the sink, the recent and new tokens, the history. Query heads that share a KV
head are rows of one product, so that K and V are never broadcast to them in a decode step. Keys, the sink's among them,
carry the scale of the attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec import AdaptiveUniform
from ovtq.codec.coding import Codecs
from ovtq.codec.packed_attention import PackedAttention, StateSlice
from ovtq.forms.bases import LayerBases
from ovtq.forms.beams import Beams
from ovtq.forms.pruning import PrunedAttention, Pruning
from ovtq.forms.quantizer import encode, pack
from ovtq.ir.graph import ALL, MASKED, dim, f32, i64, numbers, scalar
from ovtq.models.attention import projected
from ovtq.models.description import AttentionLayer, ModelDescription, Packed, Pruned, TokenRows
from ovtq.states import Growing, StateSpec, cache_name

NEVER = 2**30  # no query is so late


@dataclass(frozen=True, eq=False)
class FullCacheSpec:
    """What becomes of the tokens of some layers.

    `coded` are the codecs of each layer, by index; all layers pack their keys, or none, and so with values. `bases` are
    those of each layer's keys, times the scale of its attention, and of its values; `window` is how many recent tokens
    are at full precision, at the least. `pruning` says which of the others stay; None: all.
    """

    coded: Mapping[int, Codecs]
    layers: tuple[AttentionLayer, ...]
    bases: dict[int, LayerBases]
    window: int
    pruning: Pruning | None = None

    def definition(self, layer: AttentionLayer, flush: int) -> PackedAttention:
        """What a layer then computes, where tokens leave the recent ones `flush` at a time."""
        mine, sinks = self.coded[layer.index], layer.sink_logits.reshape(-1)
        args = (mine.key, mine.value), self.bases[layer.index], sinks, layer.scale, self.window, flush
        if self.pruning is None:
            return PackedAttention(*args)
        first = self.indices.index(layer.index) * layer.kv_heads
        beside = [projected(layer.key.source, layer.kv_heads, layer.head_dim)] if self.pruning.statistics else []
        return PrunedAttention(*args, pruning=self.pruning, layer=layer.index, first=first, beside=beside)

    def cache(
        self, layer: AttentionLayer, flush: int, places: tuple[StateSlice, StateSlice], rows: TokenRows | None,
        lengths: tuple[int, ...],
    ) -> Packed:  # fmt: skip
        """What a layer's cache then is."""
        return (Pruned if self.pruning else Packed)(self.definition(layer, flush), places, rows, lengths)

    @property
    def pruned_by(self) -> Pruning:
        """The rule by which tokens stay. Raises ValueError if all do."""
        if self.pruning is None:
            raise ValueError("in this plan all tokens stay")
        return self.pruning

    @property
    def mode(self) -> str | None:
        """What becomes of tokens that are not to stay; None: all stay."""
        return self.pruning.mode if self.pruning else None

    @property
    def indices(self) -> list[int]:
        """Of the layers."""
        return [layer.index for layer in self.layers]

    @property
    def packed(self) -> int:
        """How many of a layer's two tensors, keys and values, are."""
        return sum(layout is not None for layout in self.coded[self.indices[0]].layouts)

    @property
    def alike(self) -> bool:
        """Whether all layers have the same codecs."""
        return len({(some.key, some.value) for some in self.coded.values()}) == 1

    @property
    def uniform(self) -> Codecs:
        """The codecs of all layers. Raises ValueError if layers have others."""
        if not self.alike:
            raise ValueError("here all layers must have the same codecs")
        return self.coded[self.indices[0]]

    @property
    def digests(self) -> dict[str, Any]:
        """What tells these codecs from all others, for the record of a conversion."""
        if self.alike:
            return self.uniform.digests
        hashes = {str(index): some.digests["quantizer_sha256"] for index, some in self.coded.items()}
        return {"quantizer_sha256": hashes}

    def centre(self, layer: AttentionLayer) -> np.ndarray:
        """(2·kv_heads, head_dim): what is taken from a layer's scaled keys and from its values."""
        key, value = self.bases[layer.index]
        return np.concatenate([key.centre, value.centre])

    @cached_property
    def sink_rows(self) -> np.ndarray:
        """(layers·2·kv_heads, head_dim): the sink's key and value of each layer, zeros less the centre."""
        return np.concatenate([-self.centre(layer) for layer in self.layers])

    def encoder(self, layers: Sequence[AttentionLayer], codecs: Sequence[AdaptiveUniform]) -> np.ndarray:
        """What `encode` multiplies with: heads of the keys of all `layers` first, then of their values, if packed.

        The layers have the same codecs.
        """
        mine = self.coded[layers[0].index]
        which = [k for k, codec in enumerate((mine.key, mine.value)) if codec in codecs and codec]
        some = [self.bases[layer.index][k] for k in which for layer in layers]
        if all(basis.shared and np.array_equal(basis.matrix, some[0].matrix) for basis in some):
            return some[0].matrix[0]
        return np.concatenate([np.broadcast_to(b.matrix, (len(b.centre), *b.matrix.shape[1:])) for b in some])


class GrowingState:
    """A growing state (batch, heads, tokens, width).

    Once `append` was called, `appended` is what it held, with this call's rows behind it.
    """

    def __init__(self, beams: Beams, state: StateSpec) -> None:
        self.beams, self.state, self.kind = beams, state, state.element_type
        _, self.heads, _, self.width = state.shape
        self.variable = beams.variable(state)
        self.none = beams.no_rows(self.heads, self.width, self.kind)
        self.read = op.read_value(self.none, self.variable)
        self.appended: Output

    @cached_property
    def past(self) -> Output:
        """What it held, beams in order."""
        return self.beams.in_order(self.read)

    def append(self, new: Node | Output) -> None:
        """(batch, heads, new, width)."""
        self.appended = self.beams.appended(self.past, self.none, new)

    def assign(self, rows: Node | Output | None = None) -> Node:
        """The Assign of all it now holds, or, with `rows` (batch, heads, ·), of these rows of each head."""
        kept = self.appended.get_node() if rows is None else op.gather(self.appended, rows, i64(2), 2)
        return op.assign(kept, self.variable)


class LayerEncoder:
    """The history of one layer but for its scales, and what becomes of tokens that join it.

    `held` are bytes (batch, kv_heads, tokens, ·) i8 of keys and of values; what is not packed is there as it is.
    """

    def __init__(self, beams: Beams, plan: FullCacheSpec, layer: AttentionLayer, rule: Growing) -> None:
        self.plan, self.layer, self.beams, self.codecs = plan, layer, beams, plan.coded[layer.index]
        self.held = [
            GrowingState(
                beams,
                StateSpec.growing(
                    cache_name(layer.index, what), "i8" if where else "f32", layer.kv_heads,
                    where.bytes if where else layer.head_dim, rule, what, [layer.index],
                ),
            )
            for what, where in zip(("key", "value"), self.codecs.layouts, strict=True)
        ]  # fmt: skip

    def packed(self, tokens: Node | Output) -> tuple[list[Node | Output], list[Node]]:
        """Rows for both states, from keys and values (batch, 2·kv_heads, tokens, d) in one tensor.

        And the scales of those that are packed, (batch, ·kv_heads, tokens, 1) in one tensor, if there are any.
        """
        halves = self.beams.cut_heads(tokens, 2)
        mine = self.codecs
        triples = list(zip(halves, (mine.key, mine.value), mine.layouts, strict=True))
        chosen = [(half, codec, where) for half, codec, where in triples if codec and where]
        if not chosen:
            return [*halves], []
        codecs, layouts = [codec for _, codec, _ in chosen], [where for *_, where in chosen]
        matrix = self.plan.encoder([self.layer], codecs)
        centred, scales = encode(tokens if len(chosen) == 2 else chosen[0][0], codecs, matrix)
        done = iter(pack(centred, codecs, layouts))
        return [next(done) if codec else half for half, codec, _ in triples], [scales]


class Columns:
    """Lengths and masks that all layers share. Recent columns: the sink, `rows` recent tokens, the new ones.

    `older` of the past tokens are in the history; the others are the last of the recent rows.
    """

    def __init__(self, description: ModelDescription, rows: int) -> None:
        self.rows, self.shown = rows, description.attention_mask
        self.batch, self.new = (dim(description.input_ids, axis) for axis in (0, 1))
        self.total = description.length
        self.past = op.subtract(self.total, self.new)
        self.recent = op.add(self.new, i64([1 + rows]))

    def history_mask(self, older: Node, columns: Node | None = None) -> Node:
        """(batch, 1, 1, columns or older), additive: every query sees the history, but for padding and what follows."""
        old = op.slice(self.shown, i64([0]), older, i64([1]), i64([1]))
        if columns is not None:
            behind = op.concat([i64([0]), op.subtract(columns, older)], 0)
            old = op.pad(old, i64([0, 0]), behind, "constant", i64(0))
        return op.select(op.equal(op.unsqueeze(old, i64([1, 2])), i64(0)), f32(MASKED), f32(0))

    def recent_tokens(self, older: Node) -> Node:
        """(batch, 1, recent) boolean: the columns that are tokens and no padding. The sink's is not shown yet."""
        tokens = op.slice(self.shown, older, i64([ALL]), i64([1]), i64([1]))
        before = op.concat([i64([0]), op.subtract(self.recent, op.subtract(self.total, older))], 0)
        tokens = op.pad(tokens, before, i64([0, 0]), "constant", i64(0))
        return op.unsqueeze(op.not_equal(tokens, i64(0)), i64([1]))

    def recent_mask(self, tokens: Node | Output, columns: Node, first: Node, count: Node) -> Node:
        """(batch, 1, 1, count, recent), additive: query first + i sees the sink and columns ≤ rows + 1 + first + i.

        The conditions are joined at rank 3: with a boolean of rank 5 and one of rank 2 the GPU plugin joins wrong rows.
        """
        query = op.range(scalar(first), scalar(op.add(first, count)), i64(1), "i64")
        column = op.unsqueeze(op.range(i64(0), scalar(columns), i64(1), "i64"), i64([0]))
        causal = op.less_equal(column, op.add(op.unsqueeze(query, i64([1])), i64([self.rows + 1])))
        visible = op.logical_and(op.unsqueeze(causal, i64([0])), tokens)  # (batch, count, recent)
        mask = op.select(visible, f32(0), f32(MASKED))
        mask = op.select(op.unsqueeze(op.less(column, i64([1])), i64([0])), f32(0), mask)
        return op.unsqueeze(mask, i64([1, 2]))

    def limits(self, tokens: Node | Output) -> Node:
        """(batch, 1, 1, recent) i64: the first new query that sees a recent column, NEVER for padding.

        The sink's column, seen by all, is that of a past token.
        """
        number = numbers(self.recent, 3)
        real = op.logical_or(op.unsqueeze(tokens, i64([1])), op.less(number, i64([1])))
        return op.select(real, op.subtract(number, i64([self.rows + 1])), i64(NEVER))


def sink_columns(logits: Mapping[int, np.ndarray], columns: Node) -> dict[int, Output]:
    """Each layer's `logits`, as of `sink_logits`, in the first of as many columns, (1, H, G, 1, columns); else zero."""
    behind = op.concat([i64([0] * 5), op.subtract(columns, i64([1]))], 0)
    padded = op.pad(f32(np.stack([*logits.values()])), i64([0] * 6), behind, "constant", op.constant(np.float32(0)))
    parts = op.split(padded, i64(0), len(logits)).outputs()
    return {index: op.squeeze(part, i64([0])).output(0) for index, part in zip(logits, parts, strict=True)}
