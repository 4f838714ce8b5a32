"""simplify-mask: build each attention mask from its definition, in a handful of nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import openvino as ov
from openvino import Node
from openvino import opset15 as op

from ovtq.errors import VerificationFailed
from ovtq.ir.graph import MASKED, Port, ancestors, dim, f32, i64, scalar
from ovtq.models.description import AttentionLayer, Exported, ModelDescription
from ovtq.passes.base import Pass, Rewrite


@dataclass(frozen=True)
class SimplifyMask(Pass):
    """mask[b, q, k] = 0 if k ≤ q, k > q − window and attention_mask[b, k], else −65504, from those three terms alone.

    Exporters look up the padding of each key by index arithmetic and broadcast every term to (batch, 1, query, key)
    before combining them: some forty nodes in every step. Layers of one window share one mask.

    Refuses if no layer has an exported mask left. Paged attention recognises sliding windows by the exported mask,
    so leave this pass out of models meant for it.
    """

    name: ClassVar[str] = "simplify-mask"
    exact: ClassVar[bool] = True
    paged_attention: ClassVar[bool] = False
    serves: ClassVar[bool] = True

    def sites(self, description: ModelDescription) -> int:
        """One per layer that has an exported mask."""
        return len(_masks(description))

    def needless(self, description: ModelDescription) -> str:
        """Where no exported mask is left."""
        return "" if _masks(description) else "no layer has an exported mask left"

    def requires(self, description: ModelDescription) -> None:
        """Refuses a model without exported masks."""
        self.refuse_if(self.needless(description))

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Make one mask per window and feed it to its layers."""
        masks: dict[int | None, Node] = {}
        found = _masks(description)
        for layer, mask in found:
            if layer.window not in masks:
                masks[layer.window] = _mask(description, layer.window)
            mask.feed(masks[layer.window])
        return Rewrite(model, description, len(found))

    def ensures(self, rewrite: Rewrite) -> None:
        """No mask depends on a state."""
        for layer, mask in _masks(rewrite.description):
            if any(node.get_type_name() == "ReadValue" for node in ancestors(mask.source)):
                raise VerificationFailed(f"{self.name}: the mask of layer {layer.index} depends on a state")


def _masks(description: ModelDescription) -> list[tuple[AttentionLayer, Port]]:
    """The layers with an exported mask, and where it enters."""
    return [(layer, layer.cache.mask) for layer in description.layers if isinstance(layer.cache, Exported)]


def _mask(description: ModelDescription, window: int | None) -> Node:
    """Additive mask, (batch, 1, new tokens, all tokens)."""
    new, total = scalar(dim(description.input_ids, 1)), scalar(description.length)
    key = op.range(i64(0), total, i64(1), "i64")
    query = op.unsqueeze(op.range(op.subtract(total, new), total, i64(1), "i64"), i64(1))
    visible = op.less_equal(key, query)
    if window is not None:
        visible = op.logical_and(visible, op.greater(key, op.subtract(query, i64(window))))
    shown = op.not_equal(op.unsqueeze(description.attention_mask, i64([1, 2])), i64(0))
    return op.select(op.logical_and(visible, shown), f32(0), f32(MASKED))
