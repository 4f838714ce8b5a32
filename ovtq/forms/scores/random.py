"""random: any tokens stay, to compare other scores with."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from openvino import Node
from openvino import opset15 as op

from ovtq.forms.scores.base import Arriving, Score, Tokens
from ovtq.ir.graph import f32, i64, scalar

TABLE = 4093  # random scores of a head before they repeat; a prime


class Random(Score):
    """Uniform in 0…1, by layer, KV head and the token's number."""

    name: ClassVar[str] = "random"
    digits: ClassVar[int] = 2

    def table(self, layer: int, kv_heads: int) -> np.ndarray:
        """Of a layer, (kv_heads, TABLE) f32: token t has that at t modulo TABLE."""
        return np.random.RandomState([self.seed, layer]).rand(kv_heads, TABLE).astype(np.float32)

    def numpy(self, tokens: Tokens) -> np.ndarray:
        """Of all tokens, (batch, kv_heads, tokens)."""
        _, kv_heads, count, _ = tokens.keys.shape
        table = self.table(tokens.layer, kv_heads)
        return np.broadcast_to(table[None, :, np.arange(count) % TABLE], tokens.keys.shape[:3])

    def nodes(self, call: Arriving) -> tuple[Node, list[Node]]:
        """Of the new ones, (batch, heads, new, 1) f32."""
        tables = np.concatenate([self.table(index, call.kv_heads) for index in call.indices])  # (heads, TABLE)
        number = op.range(scalar(call.past), scalar(call.total), i64(1), "i64")
        picked = op.gather(f32(tables), op.floor_mod(number, i64(TABLE)), i64(1))  # (heads, new)
        shape = op.concat([call.batch, i64([1, 1, 1])], 0)
        return op.multiply(op.broadcast(f32(1), shape), op.unsqueeze(op.unsqueeze(picked, i64([0])), i64([3]))), []
