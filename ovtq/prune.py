"""Which tokens the full layers keep, as nodes: scores, and `ovtq.pruning` in the graph for the CPU plugin.

All layers share the states and the nodes: scores, and with `evict` the numbers of the tokens, in one state each. The
CPU plugin's TopK takes a time that grows with how many it finds (37 ms for 960 of 1,088 and 16 heads), its SearchSorted
reads all for each (340 ms): so the score at the budget's edge is found by halving an interval, in a Loop that takes one
turn where no token leaves the recent ones, and the n-th row that stays is scattered to place n.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.attend import Columns, Held
from ovtq.beams import Beams
from ovtq.graph import ALL, MASKED, body, dim, f32, i32, i64, scalar
from ovtq.models.attention import projected
from ovtq.models.description import AttentionLayer
from ovtq.pruning import (
    DIGIT,
    DIGITS,
    DROPPED,
    EMPTY,
    FIRST,
    PADDED,
    SHOWN,
    SPREAD,
    TABLE,
    Pruning,
)
from ovtq.ring import State
from ovtq.states import KEY_SUM, POSITION, PRUNED, SCORE, Growing, StateSpec, recent_name

TURNS = 26  # halvings of −2²³ … 2²³ to 1, and some; the plugins divide whole numbers as f32
WHOLE = 64  # in which the larger part of a sum of keys is counted: 2,048 of them an f16 still tells apart


class Scores:
    """Scores of a call's own tokens; (batch, heads, …) with the KV heads of all layers one after the other."""

    def __init__(
        self,
        beams: Beams,
        layers: Sequence[AttentionLayer],
        pruning: Pruning,
        columns: Columns,
    ) -> None:
        self.beams, self.layers, self.pruning, self.columns = beams, layers, pruning, columns
        self.count, self.kv_heads = len(layers), layers[0].kv_heads
        self.indices = [layer.index for layer in layers]
        self.heads = self.count * self.kv_heads
        self.states: list[Node] = []  # Assigns of what the score itself remembers
        self.arrived = self._arriving()

    def _arriving(self) -> Node:
        """Scores of the new tokens, (batch, heads, new, 1), padding and the prefix marked."""
        columns, pruning = self.columns, self.pruning
        every = op.minimum(op.convert(columns.shown, "i32"), i32(1))
        shown = op.slice(every, columns.past, i64([ALL]), i64([1]), i64([1]))
        self.shown = op.unsqueeze(op.unsqueeze(shown, i64([1])), i64([3]))  # (batch, 1, new, 1) i32
        score = self._raw()  # f32
        if pruning.shared and self.kv_heads > 1:
            shape = i64([0, self.count, self.kv_heads, -1])
            mean = op.reduce_mean(op.reshape(score, shape, True), i64([2]), True)
            mean = op.multiply(mean, f32(np.ones((1, 1, self.kv_heads, 1))))
            score = op.unsqueeze(op.reshape(mean, i64([0, self.heads, -1]), True), i64([3]))
        # A whole number, which no inference precision rounds; in parts, each of them finite in f16
        score = op.clamp(score, -pruning.largest, pruning.largest)
        part = op.floor(score)
        whole = op.convert(part, "i32")
        for _ in range(DIGITS[pruning.score]):
            score = op.multiply(op.subtract(score, part), f32(DIGIT))
            part = op.floor(score)
            whole = op.add(op.multiply(whole, i32(DIGIT)), op.convert(part, "i32"))
        score = whole
        self.ahead = op.reduce_sum(every, i64([1]), True)  # (batch, 1): all that are no padding
        if pruning.prefix:
            before = op.subtract(self.ahead, op.reduce_sum(shown, i64([1]), True))
            rank = op.add(op.cum_sum(shown, i64(1)), before)
            rank = op.unsqueeze(op.unsqueeze(rank, i64([1])), i64([3]))
            score = op.select(op.less_equal(rank, i32(pruning.prefix)), i32(FIRST), score)
        return op.select(op.equal(self.shown, i32(0)), i32(PADDED), score)

    def _raw(self) -> Node:
        score = self.pruning.score
        if score == "random":
            return self._random()
        if score == "triattention":
            return self._triattention()
        what = "value" if score == "value-norm" else "key"
        tokens = op.concat([getattr(layer, what).source for layer in self.layers], 1)  # (batch, heads, new, d)
        if score == "keydiff":
            return self._keydiff(tokens)
        norm = op.reduce_l2(tokens, i64([3]), True)
        return op.negative(norm) if score == "norm-low" else norm

    def _triattention(self) -> Node:
        """A product of each key before RoPE, and of its pairs' lengths, with constants: one for each query head."""
        H, d = self.kv_heads, self.layers[0].head_dim
        straight = [
            op.transpose(op.reshape(projected(x.key.source, H, d), i64([0, 0, H, d]), True), i64([0, 2, 1, 3]))
            for x in self.layers
        ]
        keys = op.concat(straight, 1)  # (batch, heads, new, d)
        first, second = op.split(keys, i64(3), 2).outputs()
        lengths = op.sqrt(op.add(op.multiply(first, first), op.multiply(second, second)))
        products = [self.pruning.statistics.product(layer.index, H) for layer in self.layers]
        factors, offsets = (np.concatenate(parts)[None] for parts in zip(*products, strict=True))
        found = op.matmul(op.concat([keys, lengths], 3), f32(SPREAD * factors), False, False)
        return op.reduce_max(op.add(found, f32(SPREAD * offsets[:, :, None])), i64([3]), True)

    def _random(self) -> Node:
        tables = [self.pruning.table(layer.index, self.kv_heads) for layer in self.layers]
        tables = np.concatenate(tables)  # (heads, TABLE)
        number = op.range(scalar(self.columns.past), scalar(self.columns.total), i64(1), "i64")
        picked = op.gather(f32(tables), op.floor_mod(number, i64(TABLE)), i64(1))  # (heads, new)
        shape = op.concat([self.columns.batch, i64([1, 1, 1])], 0)
        return op.multiply(op.broadcast(f32(1), shape), op.unsqueeze(op.unsqueeze(picked, i64([0])), i64([3])))

    def _keydiff(self, keys: Node) -> Node:
        """The sum of all keys is kept as how often it holds WHOLE, and the rest.

        In one f16, which a GPU makes of it, what a token adds would be lost after some hundred of them. The angle is to
        the sum over WHOLE, which does not overflow.
        """
        d, part = self.layers[0].head_dim, f32(1 / WHOLE)
        unit = op.divide(keys, op.maximum(op.reduce_l2(keys, i64([3]), True), f32(1e-12)))
        spec = StateSpec.fixed(KEY_SUM, "f32", [self.heads, 2, d], "sum", self.indices)
        state = State(self.beams, spec, np.zeros(1, np.float32))
        whole, rest = (op.slice(state.past, i64([k]), i64([k + 1]), i64([1]), i64([2])) for k in (0, 1))
        counted = op.multiply(unit, op.convert(self.shown, "f32"))
        total = op.add(op.multiply(op.add(op.cum_sum(counted, i64(2)), rest), part), whole)
        rest = op.add(rest, op.reduce_sum(counted, i64([2]), True))
        carry = op.floor(op.multiply(rest, part))
        parts = [op.add(whole, carry), op.subtract(rest, op.multiply(carry, f32(WHOLE)))]
        self.states.append(op.assign(op.concat(parts, 2), state.variable))
        length = op.maximum(op.reduce_l2(total, i64([3]), True), f32(1e-12))
        return op.negative(op.divide(op.reduce_sum(op.multiply(unit, total), i64([3]), True), length))

    def counts(self, gone: Node) -> Node:
        """The Assign of the state PRUNED; `gone` (batch, heads, 1) tokens were pruned in this call."""
        variable = self.beams.variable(StateSpec.fixed(PRUNED, "i32", [self.heads, 2], "count", self.indices, rows=1))
        zero = op.broadcast(i32(0), op.concat([self.columns.batch, i64([self.heads, 2])], 0))
        past = op.gather(op.read_value(zero, variable), self.beams.index, i64(0))
        total = op.add(op.slice(past, i64([0]), i64([1]), i64([1]), i64([2])), gone)
        return op.assign(op.concat([total, op.subtract(op.unsqueeze(self.ahead, i64([2])), total)], 2), variable)


class Survivors(Scores):
    """The nodes of all layers, for a CPU; (batch, heads, …) with the KV heads of all layers one after the other.

    `older` tokens have left the recent rows before this call, `later` after it; `span` are the rows, the first and the
    one after the last, of the recent and new tokens that leave them. `stay` is how many rows the history has, `masks`
    what each layer's scores of it are added to (and multiplied by).
    """

    def __init__(
        self,
        beams: Beams,
        layers: Sequence[AttentionLayer],
        pruning: Pruning,
        columns: Columns,
        older: Node,
        later: Node,
        rows: int,
        span: tuple[Node, Node],
        rule: Growing,
    ) -> None:
        super().__init__(beams, layers, pruning, columns)
        self.older, self.later, self.rule = older, later, rule
        kept = op.add(i64(range(rows)), columns.new)
        start = np.full(1, EMPTY, np.int32)
        recent = StateSpec.fixed(recent_name(SCORE), "i32", [self.heads, rows, 1], "score", self.indices)
        self.recent = State(beams, recent, start, kept)
        leaving = op.slice(op.concat([self.recent.past, self.arrived], 2), *span, i64([1]), i64([2]))
        self.scores = Held(beams, StateSpec.growing(SCORE, "i32", self.heads, 1, rule, "score", self.indices))
        self.scores.append(leaving)
        self.stay = op.minimum(older, i64([pruning.room])) if self.evicts else older
        self.masks = self._masks()

    @property
    def evicts(self) -> bool:
        """Whether tokens leave the states."""
        return self.pruning.mode == "evict"

    def _masks(self) -> list[list[Output]]:
        scores = op.reshape(self.scores.past, i64([0, 0, 1, -1]), True)  # (batch, heads, 1, rows)
        hidden = op.less_equal(scores, i32(SHOWN))
        if self.pruning.mode == "zero":  # what is pruned is not masked, only padding is
            dropped = op.equal(scores, i32(DROPPED))
            hidden = op.logical_and(hidden, op.logical_not(dropped))
        found = [op.select(hidden, f32(MASKED), f32(0))]
        if self.pruning.mode == "zero":
            found.append(op.select(dropped, f32(0), f32(1)))
        split = [op.split(x, i64(1), self.count).outputs() for x in found]
        return [list(some) for some in zip(*split, strict=True)]

    def store(self) -> tuple[list[Output | None], list[Node]]:
        """Which rows of each layer's history stay (None: all), and the Assigns of the states made here."""
        heads, room = self.heads, self.pruning.room
        scores = self.scores.appended  # (batch, heads, rows, 1)
        rows = dim(scores, 2)
        leaving = op.subtract(self.later, self.older)
        best = _best(scores, room, op.minimum(op.subtract(rows, i64([room])), leaving))
        alive = op.greater(scores, i32(SHOWN))
        gone = op.logical_and(alive, op.logical_not(best))
        count = op.squeeze(op.reduce_sum(op.convert(gone, "i32"), i64([2]), True), i64([3]))
        assigns = [*self.states, self.counts(count), self.recent.store(self.arrived)]
        if not self.evicts:
            dropped = op.select(gone, i32(DROPPED), scores)
            return [None] * self.count, [*assigns, op.assign(dropped, self.scores.variable)]
        numbers = op.convert(op.range(scalar(self.older), scalar(self.later), i64(1), "i64"), "i32")
        shape = op.concat([self.columns.batch, i64([heads]), leaving, i64([1])], 0)
        numbers = op.broadcast(op.unsqueeze(op.unsqueeze(numbers, i64([0])), i64([2])), shape)
        positions = Held(self.beams, StateSpec.growing(POSITION, "i32", heads, 1, self.rule, "position", self.indices))
        positions.append(numbers)
        # the n-th row that stays is written to place n, all others to one behind the last
        stay = op.minimum(rows, i64([room]))
        best = op.squeeze(op.convert(best, "i32"), i64([3]))
        behind = op.convert(stay, "i32")
        place = op.select(op.equal(best, i32(0)), behind, op.subtract(op.cum_sum(best, i64(2)), i32(1)))
        batch_heads = op.concat([self.columns.batch, i64([heads])], 0)
        places = op.broadcast(i32(0), op.concat([batch_heads, op.add(stay, i64([1]))], 0))
        every = op.range(i64(0), scalar(rows), i64(1), "i32")
        every = op.broadcast(every, op.concat([batch_heads, rows], 0))
        index = op.scatter_elements_update(places, place, every, i64(2))
        index = op.slice(index, i64([0]), stay, i64([1]), i64([2]))  # (batch, heads, stay)
        assigns += [self.scores.assign(index), positions.assign(index)]
        return list(op.split(index, i64(1), self.count).outputs()), assigns


def filled(above: Node, tied: Node, room: int) -> Node:
    """`above`, (batch, heads, rows, …), fewer than `room` of a head, and the first ones of `tied`, up to `room`."""
    left = op.subtract(i32(room), op.reduce_sum(op.convert(above, "i32"), i64([2]), True))
    first = op.less_equal(op.cum_sum(op.convert(tied, "i32"), i64(2)), left)
    return op.logical_or(above, op.logical_and(tied, first))


def _best(scores: Output, room: int, over: Node) -> Node:
    """Which of (batch, heads, rows, 1) are the `room` of highest score, first ones of equals; all, if `over` < 1."""
    batch_heads = op.concat([dim(scores, 0), dim(scores, 1), i64([1, 1])], 0)
    low, high = (op.broadcast(i32(edge), batch_heads) for edge in (EMPTY, -EMPTY - 1))
    turns = op.minimum(op.maximum(op.multiply(over, i64([TURNS])), i64([1])), i64([TURNS]))
    turns = scalar(turns)  # at least one: none at all leaves a CPU's Loop without a result
    turn = op.parameter([], np.int64)
    shape = low.output(0).get_partial_shape()
    inner = [op.parameter(x, np.int32) for x in (scores.get_partial_shape(), shape, shape)]
    some, down, up = inner
    middle = op.add(down, op.divide(op.subtract(up, down), i32(2)))
    reach = op.reduce_sum(op.convert(op.greater_equal(some, middle), "i32"), i64([2]), True)
    enough = op.greater_equal(reach, i32(room))
    results = [
        op.result(op.constant(np.array(True))),
        op.result(op.select(enough, middle, down)),
        op.result(op.select(enough, up, middle)),
    ]
    loop = op.loop(turns, op.constant(np.array(True)))
    loop.set_function(body(results, [turn, *inner], "edge"))
    loop.set_special_body_ports([0, 0])
    loop.set_invariant_input(some, scores)
    loop.set_merged_input(down, low.output(0), results[1].output(0))
    loop.set_merged_input(up, high.output(0), results[2].output(0))
    down, up = (loop.get_iter_value(result.output(0), -1) for result in results[1:])
    above = op.greater_equal(scores, up)  # fewer than room
    tied = op.logical_and(op.greater_equal(scores, down), op.logical_not(above))
    best = filled(above, tied, room)
    return op.logical_or(best, op.less(op.reshape(op.convert(over, "i32"), i64([1, 1, 1, 1]), False), i32(1)))
