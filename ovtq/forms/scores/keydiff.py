"""keydiff: keys unlike those before them stay."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from openvino import Node
from openvino import opset15 as op

from ovtq.forms.scores.base import Arriving, Score, Tokens
from ovtq.forms.window_state import FixedState
from ovtq.ir.graph import f32, i64
from ovtq.states import KEY_SUM, StateSpec

WHOLE = 64  # in which the larger part of a sum of keys is counted: 2,048 of them an f16 still tells apart


class KeyDiff(Score):
    """−cos(k_t, Σ_{s ≤ t} k_s/‖k_s‖), higher for keys unlike those before.

    KeyDiff (arXiv 2504.15364), made static: there the mean is of all keys at the time of pruning. Padding is not in the
    sum.
    """

    name: ClassVar[str] = "keydiff"
    digits: ClassVar[int] = 2

    def numpy(self, tokens: Tokens) -> np.ndarray:
        """Of all tokens, (batch, kv_heads, tokens)."""
        keys = tokens.keys
        unit = keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
        total = np.cumsum(unit * tokens.real[:, None, :, None], axis=2)
        return -(unit * total).sum(-1) / np.maximum(np.linalg.norm(total, axis=-1), 1e-12)

    def nodes(self, call: Arriving) -> tuple[Node, list[Node]]:
        """Of the new ones, (batch, heads, new, 1) f32.

        The sum of all keys is kept as how often it holds WHOLE, and the rest. In one f16, which a GPU makes of it, what
        a token adds would be lost after some hundred of them. The angle is to the sum over WHOLE, which does not
        overflow.
        """
        keys = call.tensors("key")
        d, part = call.layers[0].head_dim, f32(1 / WHOLE)
        unit = op.divide(keys, op.maximum(op.reduce_l2(keys, i64([3]), True), f32(1e-12)))
        spec = StateSpec.fixed(KEY_SUM, "f32", [call.heads, 2, d], "sum", call.indices)
        state = FixedState(call.beams, spec, np.zeros(1, np.float32))
        whole, rest = (op.slice(state.past, i64([k]), i64([k + 1]), i64([1]), i64([2])) for k in (0, 1))
        counted = op.multiply(unit, op.convert(call.shown, "f32"))
        total = op.add(op.multiply(op.add(op.cum_sum(counted, i64(2)), rest), part), whole)
        rest = op.add(rest, op.reduce_sum(counted, i64([2]), True))
        carry = op.floor(op.multiply(rest, part))
        parts = [op.add(whole, carry), op.subtract(rest, op.multiply(carry, f32(WHOLE)))]
        assign = op.assign(op.concat(parts, 2), state.variable)
        length = op.maximum(op.reduce_l2(total, i64([3]), True), f32(1e-12))
        return op.negative(op.divide(op.reduce_sum(op.multiply(unit, total), i64([3]), True), length)), [assign]
