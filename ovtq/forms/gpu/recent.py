"""Full layers for the GPU plugin: recent tokens as they are, older ones in its own compressed cache.

One softmax over both, in two parts. The recent part, of a query's own token, the `window` before it and the sink, is a
softmax of its own, with the context c and the log-sum-exp L of its scores. The history part is the plugin's fused
attention, of all older tokens and of one row more, the *anchor*, whose score is L. That softmax gives each old token
the weight it has among all, and the anchor what all recent tokens have together, p = e^L / (e^L + Σ_history e^s). So

    context = Σ_history weight·value + p·c

without a division. p is read off the result itself: real keys and values are zero in the last coordinates, the anchor
is MARK in one of these and zero in all others. As a key it meets L/MARK, which the query has there; as a value it
leaves p·MARK.

What is exact: all but the rounding of p and L. Between 0 and MARK, which is 255·4 and 15·68, the anchor's row is stored
exactly in 8 and in 4 bits. A zero of another row may come back as half a step of that row: of L, and of p, it moves
step/(2·MARK), 1e-3 where values reach 30. At f16 an L of 16 is off by 2⁻⁸ at most, so that the parts' ratio is off by
0.4%, no more than any score of that size. Where one part outweighs the other by e^20, p is 1 − 2e-9 or 2e-9 before, and
1 or nearly 0 after rounding: what is lost is 2⁻¹¹ of the heavier part at most, and L, which is a maximum less a
logarithm of a weight of 1/(window + 2) at least, neither overflows nor vanishes. With an empty history, in a text no
longer than the window, only the anchor is visible there, and p is 1.

Rows come to the cache one token late: from the last row of the window, which before the text is the anchor. So a call
brings as many rows as it has tokens, the anchor is row 0, and a token is quantised once. The fused attention's mask
hides those that are still recent. A query's recent part is the same whatever calls a text comes in.

Of attention without sinks the sink's row is there, too, and no query sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec.rotation import digest, randomized_frame, spread_width
from ovtq.forms.attend import GrowingState
from ovtq.forms.gpu.beams import GpuBeams
from ovtq.forms.gpu.window import BEYOND
from ovtq.forms.window_state import WholeWindowState
from ovtq.ir.graph import ALL, MASKED, dim, f32, i64, redirect, scalar
from ovtq.models.description import AttentionLayer, ModelDescription, SinkRow, TokenRows
from ovtq.states import RECENT, Growing, StateSpec, cache_name

PADDING = 16  # coordinates more than head_dim: kernels of the GPU plugin take a head in sixteens
MARK = 1020.0  # least and largest of a row are stored exactly in 8 and in 4 bits: a multiple of 255 and of 15
SINK, ANCHOR = -2, -1  # the coordinates that these two rows have for themselves


class RecentRows:
    """The nodes that all full layers share, and the rewrite of one layer.

    Rows of a layer's keys and values: the sink's, the window's, the new ones. Names of axes: m queries per block, nb
    blocks, w = 1 + window + m rows that a block reads, H = kv_heads, G = group, D = head_dim + PADDING. `centres`,
    (kv_heads, head_dim) for each layer, are taken from keys.
    """

    def __init__(
        self,
        description: ModelDescription,
        window: int,
        centres: Mapping[int, np.ndarray],
        seed: int,
        rotate: bool,
    ) -> None:
        layers = description.full
        layer, self.window, self.sinks = layers[0], window, layers[0].sinks is not None
        d, self.width = layer.head_dim, layer.head_dim + PADDING
        self.frame = np.zeros((d, self.width), np.float32)
        inner = spread_width(d, self.width + SINK) if rotate else d
        self.frame[:, :inner] = randomized_frame(d, inner, seed)[0] if rotate else np.eye(d)
        # Each in a layout of its own: see rotate-heads for what sharing one does
        self.into, self.back = f32(np.ascontiguousarray(self.frame.T)), f32(self.frame)
        mark = np.eye(1, self.width, self.width + ANCHOR, dtype=np.float32) / MARK
        self.mark, self.share = f32(mark[None, None]), f32(np.repeat(mark, self.width, 0))
        self.batch, self.new = (dim(description.input_ids, axis) for axis in (0, 1))
        self.beams = GpuBeams(description)
        self.moved = {layer.index: -centres[layer.index] @ self.frame for layer in layers}  # (H, D)
        self.tokens = WholeWindowState(description, RECENT, layers, window, self._start(layer.kv_heads), self.beams)
        self.states = self.beams.states
        self.assigns: list[Node] = []
        self._blocks(description, layer.kv_heads, layer.group)
        self.history_mask = self._history_mask(description)

    def attend(self, layer: AttentionLayer) -> AttentionLayer:
        """Rewrite one layer."""
        H, G, D = layer.kv_heads, layer.group, self.width
        moved = np.zeros((2 * H, 1, D), np.float32)
        moved[:H, 0] = self.moved[layer.index]
        tokens = op.concat([layer.key.source, layer.value.source], 1)
        rows = op.add(op.matmul(tokens, self.into, False, True), f32(moved[None]))  # (batch, 2H, new, D)
        every = self.tokens.join(layer, 0, rows)
        own = op.split(op.gather(every, self.key_rows, i64(2)), i64(1), 2).outputs()
        keys, values = (op.reshape(x, self.rows_by_block, True) for x in own)  # (batch, H·nb, w, D)

        turned = f32(np.ascontiguousarray(layer.scale * self.frame.T))
        query = op.matmul(layer.query.source, turned, False, True)
        if self.sinks:
            sinks = np.zeros((H * G, 1, D), np.float32)
            sinks[:, 0, SINK] = layer.own_sinks / MARK
            query = op.add(query, f32(sinks[None]))
        context, top, largest = self._recent(layer, query, keys, values)
        # Made as wide as a query first, all of this is one kernel
        logit = op.subtract(op.multiply(top, f32(np.ones((1, 1, 1, D)))), op.log(largest))
        query = op.add(op.multiply(logit, self.mark), query)

        late = [self._late(layer, what, every) for what in ("key", "value")]
        grouped = [self._to_query_heads(rows, H, G) for rows, _ in late]
        older = op.scaled_dot_product_attention(query, *grouped, self.history_mask, f32(1), False)
        # p in all coordinates, and a sum that reads the history by a Reshape of its own: one kernel with the product
        line, again = (op.reshape(older, i64([-1, D]), zeros_too) for zeros_too in (False, True))
        recent_part = op.multiply(op.matmul(line, self.share, False, True), op.reshape(context, i64([-1, D]), False))
        both = op.concat([self.batch, i64([H * G]), self.new, i64([D])], 0)
        both = op.reshape(op.add(recent_part, again), both, False)
        redirect(layer.context, op.matmul(both, self.back, False, True))
        return replace(layer, context=older.output(0), cache=SinkRow(TokenRows(late[0][1])))

    @property
    def digest(self) -> str:
        """Of the rows that vectors are spread by."""
        return digest(self.frame)

    def finish(self) -> list[Node]:
        """The Assigns, once every layer is rewritten."""
        return [*self.assigns, *self.tokens.store()]

    def _start(self, heads: int) -> np.ndarray:
        """(layers·2·heads, 1 + window, D): before the text there are the sink's row and the anchor's."""
        rows = np.zeros((len(self.moved), 2, heads, 1 + self.window, self.width), np.float32)
        rows[:, :, :, -1, ANCHOR] = MARK
        rows[:, 0, :, 0] = [*self.moved.values()]
        rows[:, 0, :, 0, SINK] = MARK
        return rows.reshape(-1, 1 + self.window, self.width)

    def _blocks(self, description: ModelDescription, heads: int, group: int) -> None:
        """Which rows each block of queries reads, and what of them each query sees."""
        window, one, origin = self.window, i64([1]), i64([0])
        m = op.minimum(self.new, i64([window]))
        w = op.add(m, i64([1 + window]))
        nb = op.divide(op.add(self.new, op.subtract(m, one)), m)
        start = op.unsqueeze(op.range(i64(0), scalar(self.new), scalar(m), "i64"), one)  # (nb, 1)
        queries = op.add(start, op.slice(i64(range(window)), origin, m, one, origin))
        last = op.subtract(self.new, one)
        # Indices in one line: where they are all rows in order, as in a decode step, the plugin leaves the Gather out
        self.query_rows = op.reshape(op.minimum(queries, last), i64([-1]), False)
        keys = op.slice(i64([-BEYOND, *range(1, 2 * window + 1)]), origin, w, one, origin)
        keys = op.maximum(op.minimum(op.add(start, keys), op.add(last, i64([1 + window]))), origin)  # (nb, w)
        self.key_rows = op.reshape(keys, i64([-1]), False)
        blocks = op.multiply(nb, i64([heads]))
        self.rows_by_block = op.concat([i64([0]), blocks, i64([-1, self.width])], 0)

        # In ones, which every precision holds exactly: a query sees its own token, the window before it, and a sink
        query, key = np.arange(window)[:, None], np.arange(2 * window)[None]
        hidden = np.where((query <= key) & (key <= query + window), 0, 1)
        sink = -1 if self.sinks else 1  # outweighs that the sink's row is no token
        hidden = np.concatenate([np.full((window, 1), sink), hidden], 1)
        band = op.slice(f32(hidden), i64([0, 0]), op.concat([m, w], 0), i64([1, 1]), i64([0, 1]))
        shown = op.pad(description.attention_mask, i64([0, 1 + window]), i64([0, 0]), "constant", i64(0))
        every = op.add(self.new, i64([1 + window]))
        shown = op.slice(shown, op.negative(every), i64([ALL]), one, one)  # (batch, 1 + window + new)
        shown = op.unsqueeze(op.gather(shown, keys, i64(1)), i64(2))  # (batch, nb, 1, w)
        padding = op.select(op.equal(shown, i64(0)), f32(1), f32(0))
        mask = op.multiply(op.clamp(op.add(padding, band), 0, 1), f32(MASKED))  # (batch, nb, m, w)
        mask = op.reshape(mask, op.concat([i64([0, 1, -1, 1]), w], 0), True)  # (batch, 1, nb·m, 1, w)
        # As large as the scores, for the GPU plugin makes one kernel of a product and such a sum
        mask = op.broadcast(mask, i64([1, heads, 1, group, 1]), broadcast_spec="BIDIRECTIONAL")
        self.recent_mask = op.reshape(
            mask, op.concat([i64([0]), blocks, i64([-1]), w], 0), True
        )  # (batch, H·nb, m·G, w)

    def _history_mask(self, description: ModelDescription) -> Node:
        """(batch, 1, new, rows), additive: every query sees the anchor and the tokens that are no longer recent."""
        total = description.length
        row = op.unsqueeze(op.range(i64(0), scalar(total), i64(1), "i64"), i64([0]))
        first = op.subtract(op.subtract(total, self.new), i64([self.window]))
        query = op.range(scalar(first), scalar(op.add(first, self.new)), i64(1), "i64")
        shown = op.pad(description.attention_mask, i64([0, 1]), i64([0, 0]), "constant", i64(1))
        shown = op.slice(shown, i64([0]), total, i64([1]), i64([1]))
        old = op.less_equal(row, op.maximum(op.unsqueeze(query, i64([1])), i64([0])))  # (new, rows)
        visible = op.logical_and(op.unsqueeze(old, i64([0])), op.unsqueeze(op.not_equal(shown, i64(0)), i64([1])))
        return op.unsqueeze(op.select(visible, f32(0), f32(MASKED)), i64([1]))

    def _recent(self, layer: AttentionLayer, query: Node, keys: Node, values: Node) -> tuple[Node, Node, Node]:
        """The recent part's context, (batch, H·G, new, D), largest score and largest weight, (batch, H·G, new, 1).

        Blocks are beside heads, for at rank 5 the GPU plugin takes a product and the sum with a mask for one kernel,
        which adds other blocks' rows of it.
        """
        H, G, D = layer.kv_heads, layer.group, self.width
        rows = op.transpose(op.reshape(query, i64([0, H, G, -1, D]), True), i64([0, 1, 3, 2, 4]))
        rows = op.reshape(op.gather(rows, self.query_rows, i64(2)), self.rows_by_block, True)  # (batch, H·nb, m·G, D)
        scores = op.add(op.matmul(rows, keys, False, True), self.recent_mask)  # (batch, H·nb, m·G, w)
        weights = op.softmax(scores, 3)
        context = op.matmul(weights, values, False, False)  # (batch, H·nb, m·G, D)
        top, largest = (self._in_order(layer, op.reduce_max(x, i64([3]), True), 1) for x in (scores, weights))
        return self._in_order(layer, context, D), top, largest

    def _in_order(self, layer: AttentionLayer, x: Node, width: int) -> Node:
        """(batch, H·G, new, width) of what blocks of queries gave."""
        H, G = layer.kv_heads, layer.group
        x = op.slice(op.reshape(x, i64([0, H, -1, G, width]), True), i64([0]), self.new, i64([1]), i64([2]))
        return op.reshape(op.transpose(x, i64([0, 1, 3, 2, 4])), i64([0, H * G, -1, width]), True)

    def _late(self, layer: AttentionLayer, what: str, every: Node) -> tuple[Node, Output]:
        """A layer's rows in the plugin's cache, (batch, H, rows, D), and those of them that were there before.

        The new ones are all but the last, behind the one before them. The Reshape says how many heads and coordinates
        there are, which the GPU plugin's kernels need.
        """
        H, D = layer.kv_heads, self.width
        first = H if what == "value" else 0
        end = op.concat([i64([first + H]), op.add(self.new, i64([self.window]))], 0)
        rows = op.slice(every, i64([first, self.window]), end, i64([1, 1]), i64([1, 2]))
        rows = op.reshape(rows, i64([0, H, -1, D]), True)
        state = StateSpec.growing(
            cache_name(layer.index, what), "f32", H, D, Growing(), what, [layer.index], native=True
        )
        held = GrowingState(self.beams, state)
        held.append(rows)
        self.assigns.append(held.assign())
        return held.appended.get_node(), held.past

    @staticmethod
    def _to_query_heads(rows: Node, heads: int, group: int) -> Node:
        """In the exported form, which no plugin carries out."""
        grouped = op.broadcast(op.unsqueeze(rows, i64([2])), i64([1, 1, group, 1, 1]), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(grouped, i64([0, heads * group, -1, rows.get_output_partial_shape(0)[3].get_length()]), True)
