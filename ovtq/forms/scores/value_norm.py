"""value-norm: the length of the value."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from openvino import Node
from openvino import opset15 as op

from ovtq.forms.scores.base import Arriving, Score, Tokens
from ovtq.ir.graph import i64


class ValueNorm(Score):
    """The length of the value."""

    name: ClassVar[str] = "value-norm"
    digits: ClassVar[int] = 1

    def numpy(self, tokens: Tokens) -> np.ndarray:
        """Of all tokens, (batch, kv_heads, tokens)."""
        return np.linalg.norm(tokens.values, axis=-1)

    def nodes(self, call: Arriving) -> tuple[Node, list[Node]]:
        """Of the new ones, (batch, heads, new, 1) f32."""
        return op.reduce_l2(call.tensors("value"), i64([3]), True), []
