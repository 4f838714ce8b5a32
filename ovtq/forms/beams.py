"""The rows of states in the order of the beams that go on, read and kept as a plugin does it without copies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from openvino import Node, Output
from openvino import Type as ElementType
from openvino.op.util import Variable

from ovtq.codec.packing import Layout
from ovtq.ir.graph import dim, new_variable
from ovtq.models.description import ModelDescription
from ovtq.states import StateSpec


class Beams(ABC):
    """beam_idx, and what reading states in its order needs, once for all of them.

    `states` are those that were made with it. A subclass per plugin knows how it reads and keeps them.
    """

    def __init__(self, description: ModelDescription) -> None:
        self.index = description.beam_idx
        self.batch = dim(description.input_ids, 0)
        self.states: list[StateSpec] = []

    def variable(self, state: StateSpec) -> Variable:
        """A new variable for that state."""
        self.states.append(state)
        return new_variable(state)

    @abstractmethod
    def in_order(self, state: Node, exact: bool = True) -> Output:
        """(batch, heads, tokens, width): what the state holds for beam_idx[i] in place i.

        `exact`: as it is declared, whatever the plugin computes in; else it may keep and hand it out in that.
        """

    @abstractmethod
    def kept(self, rows: Node, exact: bool) -> Node:
        """`rows` as an Assign takes them; `exact`: in the type that the state is declared in."""

    @abstractmethod
    def start(self, value: np.ndarray, shape: Sequence[int]) -> Node:
        """What a state of that shape (without the batch) holds at first: `value`, of one number or of that shape."""

    @abstractmethod
    def no_rows(self, heads: int, width: int, kind: ElementType) -> Node:
        """(batch, heads, 0, width): what a growing state holds at first."""

    @abstractmethod
    def appended(self, past: Output, nothing: Node, new: Node | Output) -> Output:
        """What a growing state holds with `new` behind it; `nothing` is its `no_rows`."""

    @abstractmethod
    def cut_heads(self, tensor: Node | Output, count: int) -> list[Output]:
        """Axis 1 in `count` equal parts."""

    @abstractmethod
    def per_layer(self, tensor: Node, layers: int) -> list[Output]:
        """Axis 1, keys then values of each of `layers`, in the parts that a layer reads: one of both, or two."""

    @abstractmethod
    def dequantize(self, packed: Output, layout: Layout, scales: Output, rotation: np.ndarray) -> Node:
        """Vectors again, turned back: (batch, heads, tokens, bytes) i8 and scales (…, 1) → (…, d) f32."""
