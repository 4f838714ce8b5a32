"""States of fixed length that hold the last tokens of several layers.

One for all layers: a copy and a wait in a step, where a state per layer costs one each. Their fixed shape tells GenAI's
chat that no tokens can be cut from their end: it resets and prefills again instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec.basis import rotated
from ovtq.codec.coding import UNIT, Coding
from ovtq.codec.packed_attention import PackedAttention, StateSlice
from ovtq.forms.beams import Beams
from ovtq.forms.quantizer import encode, pack
from ovtq.ir.graph import ALL, dim, f32, i64, joined
from ovtq.models.description import AttentionLayer, ModelDescription, Packed, Window
from ovtq.states import StateSpec, scale_name

# Of a WholeWindowState: with them no number leaves f16's range, nor do multiples of 1/PARTS fall below its normal ones
UNITS, PARTS, MOST = 2.0**5, 2.0**14, 1023.5


class FixedState:
    """(batch, heads, length, width), `start` before the text begins; `kept` are the rows of it and of what is new.

    Not `exact`, a CPU that computes in bf16 keeps it in bf16, too: right for what comes from a bf16 and goes to one.
    """

    def __init__(
        self,
        beams: Beams,
        state: StateSpec,
        start: np.ndarray,
        kept: Node | None = None,
        exact: bool = True,
    ) -> None:
        self.kept = kept
        self.variable = beams.variable(state)
        self.beams, self.exact = beams, exact
        self.read = op.read_value(beams.start(start, state.shape[1:]), self.variable)

    @cached_property
    def past(self) -> Output:
        """What it held, beams in order."""
        return self.beams.in_order(self.read, self.exact)

    def store(self, new: Node | Output, rows: Node | None = None) -> Node:
        """The Assign that keeps the last rows; `new` is (batch, heads, tokens, width).

        With `rows`, (batch, heads, length), it keeps these of each head instead.
        """
        every = self.beams.kept(op.concat([self.past, new], 2), self.exact)
        return self.keep(op.gather(every, self.kept, i64(2)) if rows is None else op.gather(every, rows, i64(2), 2))

    def keep(self, rows: Node) -> Node:
        """The Assign of all its rows."""
        return op.assign(self.beams.kept(rows, self.exact), self.variable)


class WindowTokens(Protocol):
    """What holds the last tokens of layers, as the attention to a window uses it."""

    states: list[StateSpec]

    def join(
        self, layer: AttentionLayer, which: int, new: Node | Output, first: Node | None = None, last: Node | None = None
    ) -> Node:
        """What a layer reads of it, `new` behind, and maybe one more row before or after all of them."""

    def store(self) -> list[Node]:
        """The Assigns that keep the last tokens, once every layer has joined its own."""

    def cache(self, layer: AttentionLayer, lengths: tuple[int, ...]) -> Window | Packed:
        """What it is to a sliding layer."""


class Rows:
    """What layers read of a window state, and what they put behind it; a part is a layer's index, which of its tensors.

    Keys and values of a layer in one (batch, 2·kv_heads, rows, d), which is number 0; for a CPU, which splits nothing
    for free, apart: 0 and 1.
    """

    def __init__(self, layers: Sequence[AttentionLayer], parts: Sequence[Output]) -> None:
        each = range(len(parts) // len(layers))
        self.parts = dict(zip([(layer.index, k) for layer in layers for k in each], parts, strict=True))
        self.news: dict[tuple[int, int], Node | Output] = {}  # (batch, heads, new, d)
        self.joined: dict[tuple[int, int], Node] = {}
        self.skipped = 0  # rows before what was held

    def join(
        self, layer: AttentionLayer, which: int, new: Node | Output, first: Node | None = None, last: Node | None = None
    ) -> Node:
        """What a layer reads, `new` behind it, and maybe one more row before or after all of them."""
        part = layer.index, which
        self.news[part] = new
        self.skipped = 0 if first is None else 1
        rows = [first, self.parts[part], new, last]
        self.joined[part] = op.concat([some for some in rows if some is not None], 2)
        return self.joined[part]

    def in_turn(self, some: Mapping[tuple[int, int], Node | Output]) -> Node:
        """Those of all parts, (batch, heads, ·, d), heads in the order of the states."""
        return op.concat([some[part] for part in self.parts], 1)


class WindowState(Rows):
    """The last `rows` tokens of `layers`, keys then values of each, in one state (batch, layers·2·kv_heads, rows, d).

    Zero before the text begins. `head`, (layers·2·kv_heads, d), becomes a row before all others that stays where it is.
    """

    def __init__(
        self,
        description: ModelDescription,
        name: str,
        layers: Sequence[AttentionLayer],
        rows: int,
        beams: Beams,
        head: np.ndarray | None = None,
    ) -> None:
        heads, d = 2 * layers[0].kv_heads * len(layers), layers[0].head_dim
        kept = op.add(i64(range(rows)), dim(description.input_ids, 1))
        start, length = np.zeros(1, np.float32), rows
        if head is not None:
            kept, length = op.concat([i64([0]), op.add(kept, i64([1]))], 0), rows + 1
            start = np.zeros((1, heads, length, d), np.float32)
            start[0, :, 0] = head
        these = [layer.index for layer in layers]
        state = StateSpec.fixed(name, "f32", [heads, length, d], "tokens", these)
        self.beams, self.states = beams, beams.states
        self.state = FixedState(beams, state, start, kept, exact=False)
        super().__init__(layers, self._parts(len(layers)))

    def _parts(self, layers: int) -> list[Output]:
        """What each of as many layers reads of it, in one part or in two."""
        return op.split(self.state.past, i64(1), layers).outputs()

    def store(self) -> list[Node]:
        """The Assign that keeps the last tokens, once every layer has joined its own."""
        return [self.state.store(self.in_turn(self.news))]

    def cache(self, layer: AttentionLayer, lengths: tuple[int, ...]) -> Window:
        """What it is to a sliding layer."""
        return Window(lengths)


class WholeWindowState(Rows):
    """The last `rows` tokens of `layers`, in one state (batch, layers·2·kv_heads, 1 + rows, 2·width) of whole numbers.

    Keys then values of each layer. `start`, (layers·2·kv_heads, 1 + rows, width), is what there is before the text
    begins; its first row stays where it is. A number x is kept as n = ⌊UNITS·x⌉ and ⌊PARTS·(UNITS·x − n)⌉, in the two
    halves of a row: all of an f16 of 2⁻⁸ or more, and none is off by more than 1/(2·UNITS·PARTS). What is larger than
    MOST becomes MOST. Whole, for beside floats of another state the GPU plugin compresses no cache of its own; in two,
    for none of it leaves the range of f16.
    """

    def __init__(
        self,
        description: ModelDescription,
        name: str,
        layers: Sequence[AttentionLayer],
        rows: int,
        start: np.ndarray,
        beams: Beams,
    ) -> None:
        self.rows = rows
        count = op.minimum(dim(description.input_ids, 1), i64([rows]))
        kept = op.concat([i64([0]), op.add(count, i64(range(1, rows + 1)))], 0)
        whole = np.round(UNITS * start)
        numbers = np.concatenate([whole, np.round(PARTS * (UNITS * start - whole))], 2).astype(np.int32)
        state = StateSpec.fixed(name, "i32", numbers.shape, "tokens", [layer.index for layer in layers])
        self.state = FixedState(beams, state, numbers[None], kept)
        units, parts = op.split(op.convert(self.state.past, "f32"), i64(3), 2).outputs()
        past = op.multiply(op.add(units, op.multiply(parts, f32(1 / PARTS))), f32(1 / UNITS))
        super().__init__(layers, op.split(past, i64(1), len(layers)).outputs())

    def store(self) -> list[Node]:
        """The Assign that keeps the last tokens, once every layer has joined its own."""
        last = {part: op.slice(x, i64([-self.rows]), i64([ALL]), i64([1]), i64([2])) for part, x in self.news.items()}
        units = op.multiply(op.clamp(self.in_turn(last), -MOST, MOST), f32(UNITS))
        whole = op.round(units, "half_to_even")
        parts = op.round(op.multiply(op.subtract(units, whole), f32(PARTS)), "half_to_even")
        return [self.state.store(op.convert(op.concat([whole, parts], 3), "i32"))]


class PackedWindowState(Rows):
    """A WindowState whose tokens are packed when they leave the call they came in, and then moved as they are.

    Bytes (batch, layers·kv_heads, rows, bytes of a key and a value) i8 and scales (batch, layers·2·kv_heads, rows, 1)
    i32, keys of all layers first; with codecs that are equal (batch, layers·2·kv_heads, rows, bytes) and keys then
    values of each layer, as in a WindowState. Zero before the text begins, so that those rows are read as zeros.

    Scales are whole numbers (see `coding.UNIT`), for the GPU plugin compresses no KV cache of its own in a model with
    a floating-point state that is not one: not knowing what it is, it takes the model for a hybrid one.

    What is kept is decoded whole, for all layers in one stream of nodes: they are few rows, and nodes are what costs.
    So for the time of a call it takes what a WindowState does besides.
    """

    def __init__(
        self,
        description: ModelDescription,
        name: str,
        layers: Sequence[AttentionLayer],
        rows: int,
        coding: Coding,
        beams: Beams,
    ) -> None:
        self.rows, self.coding, self.name, self.states = rows, coding, name, beams.states
        H = self.kv_heads = layers[0].kv_heads
        count = len(layers)
        same = coding.key == coding.value
        coded = coding.pairs[:1] if same else coding.pairs
        self.codecs, self.layouts = [codec for codec, _ in coded], [layout for _, layout in coded]
        heads = np.arange(count * 2 * H).reshape(count, 2, H)
        self.order = None if same else heads.swapaxes(0, 1).reshape(-1)  # of heads, in a WindowState's
        self.widths = [layout.bytes for layout in self.layouts]

        kept = op.add(i64(range(rows)), op.minimum(dim(description.input_ids, 1), i64([rows])))
        shape = [heads.size // len(self.codecs), rows, sum(self.widths)]
        these = [layer.index for layer in layers]
        codes = StateSpec.fixed(name, "i8", shape, "tokens", these)
        self.codes = FixedState(beams, codes, np.zeros(1, np.int8), kept)
        scale = StateSpec.fixed(scale_name(name), "i32", [heads.size, rows, 1], "scale", these)
        self.scales = FixedState(beams, scale, np.zeros(1, np.int32), kept)
        root = op.multiply(op.convert(self.scales.past, "f32"), f32(1 / UNIT))
        bytes_, scales = [self.codes.past], [op.multiply(root, root).output(0)]
        if not same:
            bytes_ = op.variadic_split(self.codes.past, i64(3), i64(self.widths)).outputs()
            scales = op.split(scales[0], i64(1), 2).outputs()
        packed = zip(bytes_, self.layouts, scales, strict=True)
        past = joined([beams.dequantize(*some, coding.rotation) for some in packed], 1)
        if self.order is not None:
            past = op.gather(past, i64(np.argsort(self.order)), i64(1))
        super().__init__(layers, beams.per_layer(past, count))

    def store(self) -> list[Node]:
        """The Assigns that keep the last tokens, once every layer has joined its own."""
        new = op.slice(self.in_turn(self.news), i64([-self.rows]), i64([ALL]), i64([1]), i64([2]))
        if self.order is not None:
            new = op.gather(new, i64(self.order), i64(1))
        centred, scales = encode(new, self.codecs, self.coding.rotation)
        numbers = op.convert(op.add(op.multiply(op.sqrt(scales), f32(UNIT)), f32(0.5)), "i32")
        return [self.codes.store(joined(pack(centred, self.codecs, self.layouts), 3)), self.scales.store(numbers)]

    def cache(self, layer: AttentionLayer, lengths: tuple[int, ...]) -> Packed:
        """What it is to a sliding layer: all that a call finds in it was packed, and nothing of what came with it."""
        plain = rotated(self.coding.rotation, np.zeros((layer.kv_heads, layer.head_dim)))
        definition = PackedAttention(
            (self.coding.key, self.coding.value), (plain, plain),
            layer.sink_logits.reshape(-1), scale=1, window=0, reach=layer.window, query_scale=layer.scale, whole=True,
        )  # fmt: skip
        return Packed(definition, self.places(layer), None, lengths)

    def places(self, layer: AttentionLayer) -> tuple[StateSlice, StateSlice]:
        """Where the codes of its keys and values are."""
        H, widths = self.kv_heads, self.widths
        number = [index for index, which in self.parts if which == 0].index(layer.index)
        if self.order is None:
            spans = [slice(first, first + H) for first in (2 * number * H, (2 * number + 1) * H)]
            keys, values = (StateSlice(self.name, span, slice(None), span) for span in spans)
            return keys, values
        key, value = (np.flatnonzero(self.order == head)[0] for head in (2 * number * H, (2 * number + 1) * H))
        heads = slice(key, key + H)
        return (
            StateSlice(self.name, heads, slice(widths[0]), heads),
            StateSlice(self.name, heads, slice(widths[0], None), slice(value, value + H)),
        )
