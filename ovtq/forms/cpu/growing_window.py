"""The form for the CPU plugin of attention to a large window: states that grow with the text until they are full.

A state of a window's length is copied in every step from the first token on, and scored whole; of a large window that
is most of what a step in a short text costs. Here as many rows are held as there are tokens. They grow STEP at a time,
for the plugin compiles a product anew for every length that it has not met (P07).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from openvino import Node, Output
from openvino import opset15 as op
from openvino.op.util import Variable

from ovtq.forms.beams import Beams
from ovtq.forms.cpu.window import BLOCK, CpuWindow
from ovtq.forms.window import SHORT_WINDOW
from ovtq.forms.window_state import Rows
from ovtq.ir.graph import MASKED, dim, f32, i64, scalar
from ovtq.models.description import AttentionLayer, ModelDescription, Window
from ovtq.states import Growing, StateSpec, cache_name

STEP = 128  # rows that a state grows by
LEAST = SHORT_WINDOW  # tokens of a window; of no more a state of fixed length from the first token on costs nothing


class CpuGrowingState(Rows):
    """The last `rows` tokens of `layers`, or all while they are fewer, in a state a tensor, (batch, kv_heads, held, d).

    `held` is the number of tokens, made up to a multiple of STEP by rows of zeros before the text. A state for all
    layers would be one more copy of all rows in every step.
    """

    def __init__(
        self, description: ModelDescription, layers: Sequence[AttentionLayer], rows: int, beams: Beams
    ) -> None:
        H, d, self.beams, self.states = layers[0].kv_heads, layers[0].head_dim, beams, beams.states
        rule = Growing(window=1 - STEP, multiple=STEP, most=rows)
        self.nothing = beams.no_rows(H, d, StateSpec.growing("", "f32", H, d, rule, "key", []).element_type)
        self.variables: list[Variable] = []
        reads = []
        for layer in layers:
            for what in ("key", "value"):
                state = StateSpec.growing(cache_name(layer.index, what), "f32", H, d, rule, what, [layer.index])
                self.variables.append(beams.variable(state))
                reads.append(op.read_value(self.nothing, self.variables[-1]))
        self.held = dim(reads[0], 2)
        blocks = op.divide(op.add(description.length, i64([STEP - 1])), i64([STEP]))
        later = op.minimum(op.multiply(blocks, i64([STEP])), i64([rows]))
        # Of the rows that are joined, the first of which is zero
        first = op.subtract(op.add(op.add(self.held, dim(description.input_ids, 1)), i64([1])), later)
        kept = op.add(op.range(i64(0), scalar(later), i64(1), "i64"), first)
        self.kept = op.maximum(kept, i64([0]))
        super().__init__(layers, [beams.in_order(read, exact=False) for read in reads])

    def join(
        self, layer: AttentionLayer, which: int, new: Node | Output, first: Node | None = None, last: Node | None = None
    ) -> Node:
        """A row of zeros, what is held, `new`; with nothing between: see `CpuBeams.appended`."""
        rows = [first, self.parts[layer.index, which], self.nothing, new, last]
        self.joined[layer.index, which] = op.concat([x for x in rows if x is not None], 2)
        return self.joined[layer.index, which]

    def store(self) -> list[Node]:
        """The Assigns that keep the last tokens, once every layer has joined its own."""
        rows = [op.gather(self.joined[part], self.kept, i64(2)) for part in self.parts]
        kept = [self.beams.kept(some, exact=False) for some in rows]
        return [op.assign(some, variable) for some, variable in zip(kept, self.variables, strict=True)]

    def cache(self, layer: AttentionLayer, lengths: tuple[int, ...]) -> Window:
        """What it is to a sliding layer."""
        return Window(lengths)


class CpuGrowingWindow(CpuWindow):
    """A CpuWindow whose rows are as many as there are, for attention without sinks.

    Column 0 is the row of zeros that states begin with, which no query sees. A block of leading queries has the columns
    before it that there are, at most window − 1.
    """

    def __init__(self, description: ModelDescription, slack: int, tokens: CpuGrowingState) -> None:
        self.held = tokens.held
        super().__init__(description, slack, tokens)
        self.lengths = (BLOCK, STEP, *self.lengths[1:])

    def _rows(self, more: int) -> Node:
        return op.add(self.held, i64([more]))

    def _sink_shown(self, column: Node, band: Node, shown: Node) -> tuple[Node, Node]:
        """No query sees it."""
        return op.logical_and(band, op.greater(column, i64(0))), shown

    def _sinks(self, layers: Sequence[AttentionLayer]) -> Mapping[int, Output]:
        return {}

    def _blocks(self, shown: Node) -> None:
        reach = op.minimum(op.add(self._rows(0), self.lead), i64([self.window - 1]))
        self.columns_of_block = op.add(reach, i64([BLOCK]))
        begin = op.multiply(op.range(i64(0), scalar(self.trips), i64(1), "i64"), i64(BLOCK))
        begin = op.add(begin, op.subtract(self._rows(1), reach))
        key = op.unsqueeze(op.range(i64(0), scalar(self.columns_of_block), i64(1), "i64"), i64([0]))  # of a block
        own = op.add(op.unsqueeze(begin, i64([1])), key)  # (trips, width)
        self.index = op.maximum(own, i64(0))
        real = op.logical_and(op.gather(shown, self.index, i64(1)), op.greater(own, i64(0)))
        query = op.add(op.unsqueeze(op.range(i64(0), i64(BLOCK), i64(1), "i64"), i64([1])), reach)
        band = op.logical_and(op.less_equal(key, query), op.less(op.subtract(query, i64([self.window])), key))
        visible = op.logical_and(op.unsqueeze(real, i64([2])), band)  # (batch, trips, BLOCK, width)
        self.block_mask = op.unsqueeze(op.select(visible, f32(0), f32(MASKED)), i64([1, 3]))

    def _wide(self, shape: list[int]) -> Node:
        return op.concat([i64(shape), self.columns_of_block], 0)
