"""Which tokens the full layers keep, as nodes that the GPU plugin runs: `ovtq.forms.pruning` in the graph.

No tensor ever has no rows, which that plugin fails at, and no boolean decides about a Loop. A decode step brings one
token that can leave, so it looks for the worst alone; only longer calls sort.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.forms.attend import Columns, GrowingState
from ovtq.forms.beams import Beams
from ovtq.forms.cpu.prune import Scores, filled
from ovtq.forms.pruning import DROPPED, EMPTY, VISIBLE_ABOVE, Pruning
from ovtq.forms.window_state import FixedState
from ovtq.ir.graph import ALL, MASKED, One, dim, f32, i32, i64, if_else, scalar, slice_heads
from ovtq.models.description import AttentionLayer
from ovtq.states import POSITION, SCORE, Growing, StateSpec

SORTED = -(2**23)  # below minus any row number, in place of those that need not be sorted


class GpuEviction(Scores):
    """`room` rows for each head: the tokens that stay, in order, behind rows that are empty yet.

    In every call as many rows leave the recent ones as there are new tokens; before the recent ones are full, empty
    ones. Those compete with the residents, and the best stay. `rows`, (batch, heads, room) i32, are what stays of the
    residents and those that leave; `mask`, (batch, 1, 1, room), is added to the scores of the residents. It is that of
    any head: rows that hold no token, or padding, are the same in all.
    """

    def __init__(
        self,
        beams: Beams,
        layers: Sequence[AttentionLayer],
        pruning: Pruning,
        columns: Columns,
        is_prefill: Output,
    ) -> None:
        super().__init__(beams, layers, pruning, columns)
        self.room, self.window = pruning.room, pruning.window
        # one state for residents and recent tokens: each state costs a wait
        length = self.room + self.window
        spec = StateSpec.fixed(SCORE, "i32", [self.heads, length, 1], "score", self.indices)
        self.scores = FixedState(beams, spec, np.full(1, EMPTY, np.int32))
        every = op.concat([self.scores.past, self.arrived], 2)
        self.rivals = op.slice(every, i64([0]), op.add(columns.new, i64([self.room])), i64([1]), i64([2]))
        rivals = op.reshape(self.rivals, i64([0, self.heads, -1]), True)
        found = if_else(
            is_prefill,
            (One(rivals), lambda read: One(self._sorted(read.value))),
            (One(rivals), lambda read: One(self._but_one(read.value))),
            ("sorted", "but_one"),
        ).value
        self.places, self.rows = (
            op.slice(found, i64([0]), i64([count]), i64([1]), i64([2])) for count in (length, self.room)
        )
        first = op.slice(self.scores.past, i64([0, 0]), i64([1, self.room]), i64([1, 1]), i64([1, 2]))
        hidden = op.less_equal(op.reshape(first, i64([0, 1, 1, self.room]), True), i32(VISIBLE_ABOVE))
        self.mask = op.select(hidden, f32(MASKED), f32(0)).output(0)

    def finish(self) -> list[Node]:
        """The Assigns of the states made here."""
        columns, room, window = self.columns, self.room, self.window
        before, after = (
            op.reduce_sum(op.convert(op.greater(some, i32(VISIBLE_ABOVE)), "i32"), i64([2]), False)
            for some in (self.rivals, op.gather(self.rivals, self.rows, i64(2), 2))
        )
        spec = StateSpec.fixed(POSITION, "i32", [self.heads, room, 1], "position", self.indices)
        positions = FixedState(self.beams, spec, np.full(1, -1, np.int32))
        first = op.subtract(columns.past, i64([window]))
        number = op.range(scalar(first), scalar(op.add(first, columns.new)), i64(1), "i64")
        shape = op.concat([columns.batch, i64([self.heads]), columns.new, i64([1])], 0)
        numbers = op.broadcast(op.unsqueeze(op.convert(number, "i32"), i64([0, 1, 3])), shape)
        return [
            *self.states,
            self.scores.store(self.arrived, self.places),
            positions.store(numbers, self.rows),
            self.counts(op.subtract(before, after)),
        ]

    # What stays of residents, recent and new tokens, (batch, heads, room + window), and as many more numbers as tokens
    # are new: on the GPU plugin what reads an If's output goes on to read the other branch's, if no shape changes.

    def _sorted(self, rivals: Output) -> Node:
        rows = dim(rivals, 2)
        others = op.add(rows, i64([self.window - self.room]))  # recent and new tokens behind the rivals
        rest = op.range(scalar(rows), scalar(op.add(rows, others)), i64(1), "i64")
        rest = op.broadcast(op.convert(rest, "i32"), op.concat([dim(rivals, 0), i64([self.heads]), others], 0))
        return op.concat([rows_of(best(rivals, self.room), self.room), rest], 2)

    def _but_one(self, rivals: Output) -> Node:
        """All but the last of the worst of room + 1."""
        worst = op.equal(rivals, op.reduce_min(rivals, i64([2]), True))
        last = op.reduce_max(op.select(worst, _numbers(self.room + 1), i32(-1)), i64([2]), True)  # (batch, heads, 1)
        number = _numbers(self.room + self.window + 1)
        return op.select(op.less(number, last), number, op.add(number, i32(1)))


def _numbers(count: int) -> Node:
    return op.constant(np.arange(count, dtype=np.int32)[None, None])


class GpuMask(Scores):
    """All tokens in order, those that are pruned with the score DROPPED.

    `masks`, (batch, kv_heads, 1, past + new) of each layer, are added to the scores of the history, in which the recent
    and the new tokens are hidden; with the mode zero `factors`, (batch, kv_heads, past + new, 1), are 0 where it was
    pruned.
    """

    def __init__(
        self,
        beams: Beams,
        layers: Sequence[AttentionLayer],
        pruning: Pruning,
        columns: Columns,
        is_prefill: Output,
    ) -> None:
        super().__init__(beams, layers, pruning, columns)
        self.is_prefill = is_prefill
        # Masks read what was there before, for new scores depend on what layers make of the masks. One row more stands
        # before all others, so that there is always one.
        ahead = op.broadcast(i32(EMPTY), op.concat([columns.batch, i64([self.heads, 1, 1])], 0))
        held = GrowingState(beams, StateSpec.growing(SCORE, "i32", self.heads, 1, Growing(), "score", self.indices))
        self.variable = held.variable
        # After reset_state the CPU plugin goes on to read this one with its old rows: the last ones are those meant
        start = op.subtract(i64([-1]), columns.past)
        past = op.slice(op.concat([ahead, held.past], 2), start, i64([ALL]), i64([1]), i64([2]))
        past = op.reshape(past, i64([0, self.heads, -1]), True)
        # (batch, heads, 1 + past), the first of an old row none
        self.past = op.select(op.less(self._numbers(columns.past), i64([0])), i32(EMPTY), past)
        older = op.subtract(columns.past, i64([pruning.window]))
        readable = op.select(op.less(self._numbers(columns.past), older), self.past, i32(EMPTY))
        # EMPTY for tokens of this call, too. Selected last: an If reads a slice of something else in the wrong place
        ends = (i64([0, 0, 0]), op.concat([i64([0, 0]), columns.new], 0))
        readable = op.pad(readable, *ends, "constant", i32(EMPTY))
        readable = op.slice(readable, i64([1]), i64([ALL]), i64([1]), i64([2]))
        self.factors: dict[int, Output] = {}
        if pruning.mode == "zero":
            parts = slice_heads(op.unsqueeze(readable, i64([3])), self.count)
            factors = [op.select(op.equal(x, i32(DROPPED)), f32(0), f32(1)).output(0) for x in parts]
            self.factors = dict(zip(self.indices, factors, strict=True))
            readable = op.select(op.equal(readable, i32(DROPPED)), i32(0), readable)
        parts = slice_heads(op.unsqueeze(readable, i64([2])), self.count)
        masks = [op.select(op.less_equal(x, i32(VISIBLE_ABOVE)), f32(MASKED), f32(0)).output(0) for x in parts]
        self.masks = dict(zip(self.indices, masks, strict=True))

    def _numbers(self, tokens: Node) -> Node:
        """Of the tokens of the rows, from −1: (1, 1, 1 + tokens)."""
        return op.unsqueeze(op.range(i64(-1), scalar(tokens), i64(1), "i64"), i64([0, 1]))

    def finish(self) -> list[Node]:
        """The Assigns of the states made here."""
        columns = self.columns
        later = op.subtract(columns.total, i64([self.pruning.window]))
        arrived = op.reshape(self.arrived, i64([0, self.heads, -1]), True)
        every = op.concat([self.past, arrived], 2)
        rivals = op.select(op.less(self._numbers(columns.total), later), every, i32(EMPTY))
        # (batch, heads, 1 + past + new), 1 where a token is pruned now. From one branch two of them, so that the shape
        # changes with the branch, as for residents: after a reset a text may be as long as the last one was.
        found = if_else(
            self.is_prefill,
            (One(rivals), lambda read: One(op.concat([op.unsqueeze(self._beyond(read.value), i64([0]))] * 2, 0))),
            (One(rivals), lambda read: One(op.unsqueeze(self._worst(read.value), i64([0])))),
            ("beyond", "worst"),
        ).value
        gone = op.gather(found, i64(0), i64(0))
        kept = op.select(op.equal(gone, i32(0)), every, i32(DROPPED))
        # By a Gather: an Assign that a Slice feeds corrupts other tensors on the CPU plugin
        rows = op.range(i64(1), scalar(op.add(columns.total, i64([1]))), i64(1), "i64")
        kept = op.gather(op.unsqueeze(kept, i64([3])), rows, i64(2))
        count = op.reduce_sum(gone, i64([2]), True)
        return [*self.states, op.assign(kept, self.variable), self.counts(count)]

    def _beyond(self, rivals: Output) -> Node:
        """Tokens that are not among the best."""
        room = self.pruning.room
        padded = op.pad(rivals, i64([0, 0, 0]), i64([0, 0, room]), "constant", i32(EMPTY))
        stay = op.slice(best(padded.output(0), room), i64([0]), i64([-room]), i64([1]), i64([2]))
        return op.convert(op.logical_and(op.greater(rivals, i32(VISIBLE_ABOVE)), op.logical_not(stay)), "i32")

    def _worst(self, rivals: Output) -> Node:
        """The last of the worst tokens, if there are too many."""
        alive = op.greater(rivals, i32(VISIBLE_ABOVE))
        count = op.reduce_sum(op.convert(alive, "i32"), i64([2]), True)
        least = op.reduce_min(op.select(alive, rivals, i32(-EMPTY)), i64([2]), True)
        tied = op.logical_and(alive, op.equal(rivals, least))
        number = op.convert(op.unsqueeze(op.range(i64(0), scalar(dim(rivals, 2)), i64(1), "i64"), i64([0, 1])), "i32")
        last = op.reduce_max(op.select(tied, number, i32(-1)), i64([2]), True)
        last = op.select(op.greater(count, i32(self.pruning.room)), last, i32(-1))
        return op.convert(op.equal(number, last), "i32")


def best(scores: Output, room: int) -> Node:
    """Which of (batch, heads, rows), at least `room`, are the `room` of highest score; of equal ones the first."""
    ordered = op.topk(scores, op.constant(np.int64(room)), 2, "max", "value", "i32").output(0)
    edge = op.gather(ordered, i64([room - 1]), i64(2))  # (batch, heads, 1)
    above = op.greater(scores, edge)  # fewer than room
    tied = op.equal(scores, edge)
    return filled(above, tied, room)


def rows_of(chosen: Node, room: int) -> Node:
    """The numbers of the `room` rows that are chosen of (batch, heads, rows), in order: (batch, heads, room) i32."""
    number = op.unsqueeze(op.range(i64(0), scalar(dim(chosen, 2)), i64(1), "i64"), i64([0, 1]))
    key = op.select(chosen, op.subtract(i32(0), op.convert(number, "i32")), i32(SORTED))
    return op.subtract(i32(0), op.topk(key, op.constant(np.int64(room)), 2, "max", "value", "i32").output(0))
