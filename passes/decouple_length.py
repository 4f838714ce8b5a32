"""decouple-length: take the past length from the inputs, not from a state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.errors import VerificationFailed
from ovtq.ir.graph import constant_of, consumers, dim, i64, id_of, redirect, scalar
from ovtq.models.description import ModelDescription, shape_readers
from ovtq.passes.base import Pass, Rewrite


@dataclass(frozen=True)
class DecoupleLength(Pass):
    """past = length(attention_mask) − length(input_ids), wherever the graph asks a KV state for its shape.

    Exported graphs take the past length of every mask and every head broadcast from layer 0's key state. That layer
    is a sliding one: as soon as its state is cut, every length in the model would be wrong. The attention mask must be
    as long as past and new tokens together, which is how all consumers (optimum-intel, openvino_genai) pass it;
    check-call, the last pass, takes the past length from a state again, and then it may be longer.

    Rewrites every ShapeOf of a state's past or appended tokens; where masks come from the inputs alone and no head is
    broadcast there is none, and the past length is known all the same. Refuses a second run.
    """

    name: ClassVar[str] = "decouple-length"
    exact: ClassVar[bool] = True
    paged_attention: ClassVar[bool] = False
    serves: ClassVar[bool] = True

    def sites(self, description: ModelDescription) -> int:
        """One per ShapeOf of a KV state."""
        return len(shape_readers(description))

    def requires(self, description: ModelDescription) -> None:
        """Refuses a model whose past length is that of the inputs already."""
        if description.past is not None:
            raise self.refuse("the lengths in this model come from the inputs already; leave this pass out")

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Replace each ShapeOf by the lengths of the inputs and the (constant) heads and head_dim."""
        readers = shape_readers(description)
        batch, new = (dim(description.input_ids, axis) for axis in (0, 1))
        past = op.subtract(dim(description.attention_mask, 1), new)
        total = op.add(past, new)
        mask = op.slice(description.attention_mask, i64([0]), total, i64([1]), i64([1]))
        for reader, kv_heads, head_dim, appended in readers:
            axes = [batch, i64([kv_heads]), total if appended else past, i64([head_dim])]
            for node in consumers(reader.output(0)):
                if node.get_type_name() == "Gather" and (picked := constant_of(node.input_value(1))) is not None:
                    parts = [axes[int(axis)] for axis in picked.reshape(-1)]
                    shape = parts[0] if len(parts) == 1 else op.concat(parts, 0)
                    shape = scalar(shape) if picked.ndim == 0 else shape
                    redirect(node.output(0), _typed(shape, node.output(0)))
                else:
                    redirect(reader.output(0), _typed(op.concat(axes, 0), reader.output(0)))
                    break
        return Rewrite(model, replace(description, attention_mask=mask, past=past, total=total), len(readers))

    def ensures(self, rewrite: Rewrite) -> None:
        """No live node asks a KV state for its shape."""
        live = {id_of(node) for node in rewrite.model.get_ops()}
        left = [reader for reader, *_ in shape_readers(rewrite.description) if id_of(reader) in live]
        if left:
            raise VerificationFailed(f"{self.name}: {left[0].get_friendly_name()} still reads the length of a state")


def _typed(shape: Node, like: Output) -> Node:
    return shape if like.get_element_type() == ov.Type.i64 else op.convert(shape, like.get_element_type())
