"""What a score of tokens is: its definition in numpy, and the same as nodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from openvino import Node
from openvino import opset15 as op

from ovtq.forms.beams import Beams
from ovtq.forms.triattention import Statistics
from ovtq.models.description import AttentionLayer


@dataclass(frozen=True)
class Tokens:
    """All tokens of one layer: keys, after RoPE, and values, (batch, kv_heads, tokens, d); `real` is not padding.

    `pre_rope` are the keys before RoPE, for a score that needs them.
    """

    layer: int
    keys: np.ndarray
    values: np.ndarray
    real: np.ndarray  # (batch, tokens)
    pre_rope: np.ndarray | None


@dataclass(frozen=True)
class Arriving:
    """The new tokens of a call, of some layers whose KV heads stand one after the other (heads, in all).

    `past` and `total`, i64 vectors of one element, are how many tokens there were before it and are behind it, `batch`
    how many sequences; `shown`, (batch, 1, new, 1) i32, is 0 for padding.
    """

    beams: Beams
    layers: Sequence[AttentionLayer]
    batch: Node
    past: Node
    total: Node
    shown: Node

    @property
    def kv_heads(self) -> int:
        """Of a layer."""
        return self.layers[0].kv_heads

    @property
    def heads(self) -> int:
        """Of all layers."""
        return len(self.layers) * self.kv_heads

    @property
    def indices(self) -> list[int]:
        """Of the layers."""
        return [layer.index for layer in self.layers]

    def tensors(self, what: str) -> Node:
        """Keys or values, (batch, heads, new, d)."""
        return op.concat([getattr(layer, what).source for layer in self.layers], 1)


@dataclass(frozen=True)
class Score(ABC):
    """Of two tokens the one with the higher score stays.

    It is written once, when the token arrives, and depends on the tokens up to its own. It is kept in 2^10 steps to the
    power of `digits`. `seed` and `statistics` are for scores that need them.
    """

    name: ClassVar[str]
    digits: ClassVar[int]

    seed: int = 0
    statistics: Statistics | None = None

    @abstractmethod
    def numpy(self, tokens: Tokens) -> np.ndarray:
        """Of all tokens, (batch, kv_heads, tokens)."""

    @abstractmethod
    def nodes(self, call: Arriving) -> tuple[Node, list[Node]]:
        """Of the new ones, (batch, heads, new, 1) f32; and the Assigns of states that it remembers itself by."""
