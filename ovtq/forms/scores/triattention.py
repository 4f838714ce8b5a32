"""triattention: what a model's usual queries will make of a key, averaged over distances."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from openvino import Node
from openvino import opset15 as op

from ovtq.forms.scores.base import Arriving, Score, Tokens
from ovtq.forms.triattention import Statistics
from ovtq.ir.graph import f32, i64
from ovtq.models.attention import projected

SPREAD = 8  # what a z-score is multiplied with first


class TriAttention(Score):
    """The highest z-score of the query heads, by `ovtq.forms.triattention`, from statistics of the model's queries."""

    name: ClassVar[str] = "triattention"
    digits: ClassVar[int] = 1

    @property
    def known(self) -> Statistics:
        """The statistics. Raises ValueError if it was made without."""
        if self.statistics is None:
            raise ValueError("the score triattention needs statistics of the model's queries")
        return self.statistics

    def numpy(self, tokens: Tokens) -> np.ndarray:
        """Of all tokens, (batch, kv_heads, tokens)."""
        if tokens.pre_rope is None:
            raise ValueError("the score triattention is of keys before RoPE; they were not given")
        return SPREAD * self.known.scores(tokens.layer, tokens.pre_rope)

    def nodes(self, call: Arriving) -> tuple[Node, list[Node]]:
        """Of the new ones, (batch, heads, new, 1) f32.

        A product of each key before RoPE, and of its pairs' lengths, with constants: one for each query head.
        """
        H, d = call.kv_heads, call.layers[0].head_dim
        pre_rope = [
            op.transpose(op.reshape(projected(x.key.source, H, d), i64([0, 0, H, d]), True), i64([0, 2, 1, 3]))
            for x in call.layers
        ]
        keys = op.concat(pre_rope, 1)  # (batch, heads, new, d)
        first, second = op.split(keys, i64(3), 2).outputs()
        lengths = op.sqrt(op.add(op.multiply(first, first), op.multiply(second, second)))
        products = [self.known.product(layer.index, H) for layer in call.layers]
        factors, offsets = (np.concatenate(parts)[None] for parts in zip(*products, strict=True))
        found = op.matmul(op.concat([keys, lengths], 3), f32(SPREAD * factors), False, False)
        return op.reduce_max(op.add(found, f32(SPREAD * offsets[:, :, None])), i64([3]), True), []
