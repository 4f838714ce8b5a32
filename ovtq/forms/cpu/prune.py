"""Which tokens the full layers keep, as nodes: scores, and `ovtq.forms.pruning` in the graph for the CPU plugin.

All layers share the states and the nodes: scores, and with `evict` the numbers of the tokens, in one state each. The
CPU plugin's TopK takes a time that grows with how many it finds (37 ms for 960 of 1,088 and 16 heads), its SearchSorted
reads all for each (340 ms): so the score at the budget's edge is found by halving an interval, in a Loop that takes one
turn where no token leaves the recent ones, and the n-th row that stays is scattered to place n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.forms.attend import Columns, GrowingState
from ovtq.forms.beams import Beams
from ovtq.forms.cpu.block import HistoryMask
from ovtq.forms.cpu.full import Nodes
from ovtq.forms.pruning import (
    DIGIT,
    DROPPED,
    EMPTY,
    FIRST,
    PADDED,
    VISIBLE_ABOVE,
    Pruning,
)
from ovtq.forms.scores import Arriving
from ovtq.forms.window_state import FixedState
from ovtq.ir.graph import ALL, MASKED, body, dim, f32, i32, i64, scalar
from ovtq.models.description import AttentionLayer
from ovtq.states import POSITION, PRUNED, SCORE, Growing, StateSpec, recent_name

TURNS = 26  # halvings of −2²³ … 2²³ to 1, and some; the plugins divide whole numbers as f32


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
        self.states: list[Node]  # Assigns of what the score itself remembers
        self.arrived = self._arriving()

    def _arriving(self) -> Node:
        """Scores of the new tokens, (batch, heads, new, 1), padding and the prefix marked."""
        columns, pruning = self.columns, self.pruning
        every = op.minimum(op.convert(columns.shown, "i32"), i32(1))
        shown = op.slice(every, columns.past, i64([ALL]), i64([1]), i64([1]))
        self.shown = op.unsqueeze(op.unsqueeze(shown, i64([1])), i64([3]))  # (batch, 1, new, 1) i32
        call = Arriving(self.beams, self.layers, columns.batch, columns.past, columns.total, self.shown)
        score, self.states = pruning.method.nodes(call)
        if pruning.shared and self.kv_heads > 1:
            shape = i64([0, self.count, self.kv_heads, -1])
            mean = op.reduce_mean(op.reshape(score, shape, True), i64([2]), True)
            mean = op.multiply(mean, f32(np.ones((1, 1, self.kv_heads, 1))))
            score = op.unsqueeze(op.reshape(mean, i64([0, self.heads, -1]), True), i64([3]))
        # A whole number, which no inference precision rounds; in parts, each of them finite in f16
        score = op.clamp(score, -pruning.largest, pruning.largest)
        part = op.floor(score)
        whole = op.convert(part, "i32")
        for _ in range(pruning.method.digits):
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

    def counts(self, gone: Node) -> Node:
        """The Assign of the state PRUNED; `gone` (batch, heads, 1) tokens were pruned in this call."""
        variable = self.beams.variable(StateSpec.fixed(PRUNED, "i32", [self.heads, 2], "count", self.indices, rows=1))
        zero = op.broadcast(i32(0), op.concat([self.columns.batch, i64([self.heads, 2])], 0))
        past = op.gather(op.read_value(zero, variable), self.beams.index, i64(0))
        total = op.add(op.slice(past, i64([0]), i64([1]), i64([1]), i64([2])), gone)
        return op.assign(op.concat([total, op.subtract(op.unsqueeze(self.ahead, i64([2])), total)], 2), variable)


def unfit(pruning: Pruning) -> str:
    """Why a rule can't be carried out by this form; empty if it can."""
    if pruning.window + pruning.flush == 1:
        return "recent-window 0 with slack 0: a CPU's states need a row; give either 1 or more"
    return ""


class CpuEviction(Scores, ABC):
    """The history of the form for a CPU, of which some stays; (batch, heads, …) with the KV heads of all layers.

    `stay` is how many rows it has, `masks` what is done to each layer's scores of it.
    """

    rule: Growing
    stay: Node

    def __init__(self, nodes: Nodes) -> None:
        plan, columns = nodes.plan, nodes.columns
        super().__init__(nodes.beams, plan.layers, plan.pruned_by, columns)
        self.nodes = nodes
        rows, span = nodes.recent, [op.subtract(row, i64([1])) for row in (nodes.leave, nodes.left)]
        kept = op.add(i64(range(rows)), columns.new)
        start = np.full(1, EMPTY, np.int32)
        recent = StateSpec.fixed(recent_name(SCORE), "i32", [self.heads, rows, 1], "score", self.indices)
        self.recent = FixedState(self.beams, recent, start, kept)
        leaving = op.slice(op.concat([self.recent.past, self.arrived], 2), *span, i64([1]), i64([2]))
        self.scores = self._held(SCORE, "score")
        self.scores.append(leaving)
        self.masks = self._masks()

    def history_mask(self, layer: AttentionLayer) -> HistoryMask:
        """What is done to the scores of a layer's history."""
        return self.masks[layer.index]

    def finish(self) -> tuple[dict[int, Output], list[Node]]:
        """Which rows of each layer's history stay, if not all, and the Assigns of the states made here."""
        room, scores = self.pruning.room, self.scores.appended  # (batch, heads, rows, 1)
        rows = dim(scores, 2)
        leaving = op.subtract(self.nodes.later, self.nodes.older)
        best = _best(scores, room, op.minimum(op.subtract(rows, i64([room])), leaving))
        alive = op.greater(scores, i32(VISIBLE_ABOVE))
        gone = op.logical_and(alive, op.logical_not(best))
        count = op.squeeze(op.reduce_sum(op.convert(gone, "i32"), i64([2]), True), i64([3]))
        kept, assigns = self._kept(rows, leaving, best, gone)
        return kept, [*self.states, self.counts(count), self.recent.store(self.arrived), *assigns]

    @abstractmethod
    def _kept(self, rows: Node, leaving: Node, best: Node, gone: Node) -> tuple[dict[int, Output], list[Node]]:
        """What `finish` returns; `best` and `gone`, (batch, heads, rows, 1), are the rows to stay and to go.

        Of `rows` rows `leaving` are new.
        """

    def _held(self, name: str, holds: str) -> GrowingState:
        return GrowingState(self.beams, StateSpec.growing(name, "i32", self.heads, 1, self.rule, holds, self.indices))

    def _masks(self) -> dict[int, HistoryMask]:
        scores = op.reshape(self.scores.past, i64([0, 0, 1, -1]), True)  # (batch, heads, 1, rows)
        hidden = op.less_equal(scores, i32(VISIBLE_ABOVE))
        if self.pruning.mode == "zero":  # what is pruned is not masked, only padding is
            dropped = op.equal(scores, i32(DROPPED))
            hidden = op.logical_and(hidden, op.logical_not(dropped))
        found = [op.select(hidden, f32(MASKED), f32(0))]
        if self.pruning.mode == "zero":
            found.append(op.select(dropped, f32(0), f32(1)))
        split = zip(*(op.split(x, i64(1), self.count).outputs() for x in found), strict=True)
        return {index: HistoryMask(*some) for index, some in zip(self.indices, split, strict=True)}


class Masked(CpuEviction):
    """Tokens stay where they are, and are masked, or read as 0."""

    def __init__(self, nodes: Nodes) -> None:
        self.rule, self.stay = Growing(nodes.plan.window, nodes.flush), nodes.older
        super().__init__(nodes)

    def _kept(self, rows: Node, leaving: Node, best: Node, gone: Node) -> tuple[dict[int, Output], list[Node]]:
        dropped = op.select(gone, i32(DROPPED), self.scores.appended)
        return {}, [op.assign(dropped, self.scores.variable)]


class Evicted(CpuEviction):
    """Tokens leave the states."""

    def __init__(self, nodes: Nodes) -> None:
        room = nodes.plan.pruned_by.room
        self.rule = Growing(nodes.plan.window, nodes.flush, room)
        self.stay = op.minimum(nodes.older, i64([room]))
        super().__init__(nodes)

    def _kept(self, rows: Node, leaving: Node, best: Node, gone: Node) -> tuple[dict[int, Output], list[Node]]:
        heads, nodes = self.heads, self.nodes
        number = op.range(scalar(nodes.older), scalar(nodes.later), i64(1), "i64")
        numbers = op.convert(number, "i32")
        shape = op.concat([self.columns.batch, i64([heads]), leaving, i64([1])], 0)
        numbers = op.broadcast(op.unsqueeze(op.unsqueeze(numbers, i64([0])), i64([2])), shape)
        positions = self._held(POSITION, "position")
        positions.append(numbers)
        # the n-th row that stays is written to place n, all others to one behind the last
        stay = op.minimum(rows, i64([self.pruning.room]))
        best = op.squeeze(op.convert(best, "i32"), i64([3]))
        behind = op.convert(stay, "i32")
        place = op.select(op.equal(best, i32(0)), behind, op.subtract(op.cum_sum(best, i64(2)), i32(1)))
        batch_heads = op.concat([self.columns.batch, i64([heads])], 0)
        places = op.broadcast(i32(0), op.concat([batch_heads, op.add(stay, i64([1]))], 0))
        every = op.range(i64(0), scalar(rows), i64(1), "i32")
        every = op.broadcast(every, op.concat([batch_heads, rows], 0))
        index = op.scatter_elements_update(places, place, every, i64(2))
        index = op.slice(index, i64([0]), stay, i64([1]), i64([2]))  # (batch, heads, stay)
        kept = zip(self.indices, op.split(index, i64(1), self.count).outputs(), strict=True)
        return dict(kept), [self.scores.assign(index), positions.assign(index)]


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
