"""truncate-window: sliding-window layers keep the tokens they can still see, and no others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import openvino as ov
from openvino import Node
from openvino import opset15 as op

from ovtq.beams import Beams
from ovtq.coding import BITS, Coding, coding, unfit
from ovtq.errors import VerificationFailed
from ovtq.graph import MASKED, Port, dim, f32, i64, rebuild, redirect, scalar
from ovtq.models.description import AttentionLayer, ModelDescription
from ovtq.packed_attention import PackedAttention
from ovtq.packing import packed_bytes
from ovtq.passes.base import Pass, Rewrite, option
from ovtq.passes.decouple_length import shape_readers
from ovtq.ring import PackedRing, Ring

STATE = "ovtq.window"  # the name of the one state of all sliding layers
FAR = 2**30  # a row index past any sequence


@dataclass(frozen=True)
class TruncateWindow(Pass):
    """A query at position t sees the keys t − window < k ≤ t: so the state is the last window − 1 tokens, always.

    The K and V states of all sliding layers become one state (batch, layers·2·kv_heads, window − 1 + slack, head_dim)
    of fixed length, zero before the text begins: one copy and one wait in a step, where a state a layer costs one each.
    Attention is computed in blocks of at most `window` queries, each against its own window − 1 + block keys: a prefill
    of n tokens costs n·2·window scores a head instead of n², a decode step one block of one query. Query heads that
    share a KV head are rows of one product, so K and V are never broadcast.

    The sink logit is the score of an all-zero key and value row, added to it where the mask is. The exported mask is
    not used: the band is constant, the padding is read from attention_mask.

    GenAI's chat can't cut tokens from the end of such a state; seeing its fixed shape it resets and prefills again
    when a history diverges, which is right. `slack` keeps that many tokens more than needed, masked until a host
    rolls the state back by shifting it.

    With `k-bits` and `v-bits` the state holds packed codes, as those of quantize-kv are, with the scales in a second
    one. New tokens attend to each other as they are; those of earlier calls are read as x̂ = scale·(code − mid)·Rᵀ, and
    were quantised once, at the end of the call that they came in.

    Refuses if there is no sliding layer, if their windows or shapes differ, or if a length still comes from their
    states (run decouple-length first); with bits, a head_dim that the rotation or the packing can't fill.
    """

    name: ClassVar[str] = "truncate-window"
    paged_attention: ClassVar[bool] = False

    slack: int = option(0, "tokens to keep beyond those that can be seen")
    k_bits: str = option("none", "of a key's coordinate", choices=BITS)
    v_bits: str = option("none", "of a value's coordinate", choices=BITS)
    seed: int = option(0, "of the random signs of the rotation before packing")
    target: str = option("gpu", "whose plugin the graph is made for", choices=("gpu", "cpu"))

    def __post_init__(self) -> None:
        if not 0 <= self.slack <= 4096:
            raise ValueError(f"slack must be from 0 to 4096, got {self.slack}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if (self.k_bits == "none") != (self.v_bits == "none"):
            raise ValueError("k-bits and v-bits go together: give both or neither")

    @property
    def exact(self) -> bool:
        """Unless the window is packed."""
        return self.k_bits == "none"

    def sites(self, description: ModelDescription) -> int:
        """One per sliding layer."""
        return len(description.sliding)

    def requires(self, description: ModelDescription) -> None:
        """Refuses models without uniform sliding layers in exported form, and those not decoupled yet."""
        layers = description.sliding
        if not layers:
            raise self.refuse("the model has no sliding-window layers")
        for layer in layers:
            if len(layer.paths) != 2:
                raise self.refuse(f"layer {layer.index} no longer has the exported KV states")
            if _shape(layer) != _shape(layers[0]):
                raise self.refuse(f"layers {layers[0].index} and {layer.index} differ in window, heads or head_dim")
        reason = None if self.exact else unfit((self.k_bits, self.v_bits), layers[0].head_dim)
        if reason:
            raise self.refuse(f"layer {layers[0].index} {reason}")
        if shape_readers(description):
            raise self.refuse("lengths in this model come from a KV state; run decouple-length first")

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Replace each sliding layer's states and attention."""
        layers = description.sliding
        rows = layers[0].window - 1 + self.slack
        facts = {"window": layers[0].window, "rows": rows, "layers": [layer.index for layer in layers]}
        beams = Beams(description, self.target)
        ring: Ring | PackedRing
        if self.exact:
            ring = Ring(description, STATE, layers, rows, beams)
        else:
            how = coding((self.k_bits, self.v_bits), layers[0].head_dim, self.seed)
            ring = PackedRing(description, STATE, layers, rows, how, beams)
            facts |= how.digests
        blocks = _Blocks(description, self.slack, ring)
        changed = {layer.index: blocks.attend(layer) for layer in layers}
        if not self.exact:
            changed = {
                layer.index: replace(layer, packed=_packed(layer, how), places=ring.places(number))
                for number, layer in enumerate(changed.values())
            }
        old = [path.assign for layer in layers for path in layer.paths]
        model = rebuild(model, drop=old, add=ring.store(blocks.news))
        return Rewrite(model, description.with_layers(changed), len(changed), facts)

    def ensures(self, rewrite: Rewrite) -> None:
        """States of fixed length for the sliding layers, and two for each full layer, are all there are."""
        layers = rewrite.description.sliding
        heads, rows, d = layers[0].kv_heads * len(layers), layers[0].window - 1 + self.slack, layers[0].head_dim
        expected = {STATE: ("f32", [-1, 2 * heads, rows, d])}
        if not self.exact:
            key, value = (packed_bytes(int(bits), d) for bits in (self.k_bits, self.v_bits))
            shape = [2 * heads, rows, key] if self.k_bits == self.v_bits else [heads, rows, key + value]
            expected = {STATE: ("i8", [-1, *shape]), f"{STATE}.scale": ("i32", [-1, 2 * heads, rows, 1])}
        self.expect(rewrite.model, expected)
        count = len(expected) + 2 * len(rewrite.description.full)
        found = len(rewrite.model.get_variables())
        if found != count:
            raise VerificationFailed(f"{self.name}: expected {count} states, found {found}")


def _shape(layer: AttentionLayer) -> tuple[int | None, int, int, int]:
    return layer.window, layer.query_heads, layer.kv_heads, layer.head_dim


def _packed(layer: AttentionLayer, how: Coding) -> PackedAttention:
    """All that a call finds in the window was packed, and nothing of what came with it."""
    return PackedAttention(
        (how.key, how.value), how.rotation, np.zeros((layer.kv_heads, layer.head_dim)), _sinks(layer),
        scale=1, window=0, reach=layer.window, query_scale=layer.scale, whole=True,
    )  # fmt: skip


def _sinks(layer: AttentionLayer) -> np.ndarray:
    return layer.sinks if layer.sinks is not None else np.full(layer.query_heads, MASKED)


class _Blocks:
    """The nodes that all sliding layers share, and the rewrite of one layer.

    Names of axes: m queries a block, nb blocks, w = 1 + (window − 1 + m) key rows a block, the sink's first.
    Rows of a layer's keys: the state, then the new tokens, then one row of zeros, which is the sink's.
    Tables are constants for a block of `window` queries, cut to m: every node spared is 5 µs a step on a CPU.
    """

    def __init__(self, description: ModelDescription, slack: int, ring: Ring | PackedRing) -> None:
        layers = description.sliding
        layer, window = layers[0], layers[0].window
        rows = window - 1 + slack
        one, origin = i64([1]), i64([0])
        batch, self.new = (dim(description.input_ids, axis) for axis in (0, 1))
        m = op.minimum(self.new, i64([window]))
        w = op.add(m, i64([window]))
        nb = op.divide(op.add(self.new, op.subtract(m, one)), m)
        self.by_block = op.concat([i64([0, 0]), nb, i64([-1, 0])], 0)  # (batch, H, nb·m, G, w) to (…, nb, m·G, w)
        zero_row = op.add(self.new, i64([rows]))
        start = op.unsqueeze(op.range(i64(0), scalar(self.new), scalar(m), "i64"), one)  # (nb, 1)

        # Rows past the end are the zero row: the sink's, and those of the last block's padding.
        queries = op.slice(i64(range(window)), origin, m, one, origin)
        self.query_rows = op.minimum(op.add(start, queries), op.subtract(self.new, one))  # (nb, m)
        keys = op.slice(i64([FAR, *range(slack, slack + 2 * window - 1)]), origin, w, one, origin)
        self.key_rows = op.minimum(op.add(start, keys), zero_row)  # (nb, w)

        # Query i of a block sees key rows i … i + window − 1 of it, and always the sink.
        i, j = np.arange(window)[:, None], np.arange(-1, 2 * window - 1)[None]
        visible = np.where((i <= j) & (j < i + window), 0, MASKED)
        visible[:, 0] = -MASKED  # outweighs the padding of a row that is no token; cut to 0 below
        band = op.slice(f32(visible), i64([0, 0]), op.concat([m, w], 0), i64([1, 1]), i64([0, 1]))
        shown = op.pad(description.attention_mask, i64([0, rows]), i64([0, 1]), "constant", i64(0))
        shown = op.slice(shown, op.negative(op.add(zero_row, one)), i64([FAR]), one, one)  # (batch, rows + new + 1)
        shown = op.unsqueeze(op.gather(shown, self.key_rows, i64(1)), i64(2))  # (batch, nb, 1, w)
        padding = op.select(op.equal(shown, i64(0)), f32(MASKED), f32(0))
        mask = op.minimum(op.add(padding, band), f32(0))  # (batch, nb, m, w)
        self.mask = op.reshape(mask, op.concat([i64([0, 1, -1, 1]), w], 0), True)  # (batch, 1, nb·m, 1, w)

        # The sink logits of all layers in the sink's column, divided by the scale that is applied behind them.
        is_sink = op.slice(f32(np.eye(1, 2 * window)[0]), origin, w, one, origin)
        sinks = np.stack([_sinks(layer).reshape(layer.kv_heads, 1, layer.group, 1) / layer.scale for layer in layers])
        sinks = op.split(op.multiply(is_sink, f32(sinks)), i64(0), len(layers))  # (1, H, 1, G, w) each
        self.sinks = iter(sinks.outputs())

        self.zero_rows = op.broadcast(f32(0), op.concat([batch, i64([2 * layer.kv_heads, 1, layer.head_dim])], 0))
        self.parts = iter(ring.parts)
        self.news: list[Node] = []

    def attend(self, layer: AttentionLayer) -> AttentionLayer:
        """Rewrite one layer; shapes are noted with H = kv_heads, d = head_dim."""
        H, G, d = layer.kv_heads, layer.group, layer.head_dim
        new = op.concat([layer.key.source, layer.value.source], 1)  # (batch, 2H, new, d)
        self.news.append(new)
        tokens = op.concat([next(self.parts), new, self.zero_rows], 2)
        keys, values = op.split(op.gather(tokens, self.key_rows, i64(2)), i64(1), 2).outputs()  # (batch, H, nb, w, d)

        entry = op.reshape(layer.query.source, i64([0, H, G, -1, d]), True)
        query = op.transpose(entry, i64([0, 1, 3, 2, 4]))  # (batch, H, new, G, d)
        query = op.reshape(op.gather(query, self.query_rows, i64(2)), i64([0, 0, 0, -1, d]), True)
        # The Reshape keeps the GPU plugin from fusing the sums into a product of rank 5, which then adds the wrong
        # blocks' masks; the scale comes last, for right behind it the CPU plugin would scale the keys instead.
        scores = op.reshape(op.matmul(query, keys, False, True), i64([0, 0, -1, G, 0]), True)  # (batch, H, nb·m, G, w)
        scores = op.multiply(op.add(op.add(scores, self.mask), next(self.sinks)), f32(layer.scale))
        weights = op.reshape(op.softmax(scores, 4), self.by_block, True)
        context = op.matmul(weights, values, False, False)  # (batch, H, nb, m·G, d)
        context = op.reshape(context, i64([0, 0, -1, G, d]), True)
        context = op.slice(context, i64([0]), self.new, i64([1]), i64([2]))  # (batch, H, new, G, d)
        context = op.reshape(op.transpose(context, i64([0, 2, 1, 3, 4])), i64([0, 0, H * G, d]), True)
        context = op.transpose(context, i64([0, 2, 1, 3]))  # (batch, H·G, new, d)
        redirect(layer.context, context)
        return replace(
            layer,
            query=Port(entry, 0),
            key=Port(new, 0),
            value=Port(new, 1),
            context=context.output(0),
            mask=None,
            key_path=None,
            value_path=None,
        )
