"""sink-row: carry the sink logits in the keys, so that attention needs no sixth input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.errors import VerificationFailed
from ovtq.graph import dim, f32, i64, id_of, new_variable, rebuild, redirect
from ovtq.models.description import AttentionLayer, ModelDescription
from ovtq.passes.base import Pass, Rewrite, option
from ovtq.passes.decouple_length import shape_readers
from ovtq.rotation import digest, hadamard_matrix, randomized_frame

PADDING = 16  # coordinates more than head_dim: kernels of the GPU plugin take a head in sixteens


@dataclass(frozen=True)
class SinkRow(Pass):
    """softmax over [z, s₁ … sₙ] without its first weight = softmax over [0, s₁ − z … sₙ − z] with a value row of 0.

    z is a query head's sink logit, s = scale·q·kᵀ. A score that is smaller by z for every real token is a product of
    longer vectors: q' = qR − z/(scale·b)·u, k' = kR + b·u, with orthonormal rows R (head_dim, width) and u (width,).
    The first row of the cache is zeros, key and value: its score is 0. Values are stored as vR, the result times Rᵀ is
    what the attention gave: (RRᵀ = 1). So the full layers become attention with five inputs over a cache that grows
    from no row at all to one row more than there are tokens, which is what the GPU plugin appends to in place, stores
    in 8 or 4 bits and never broadcasts to query heads; with a sixth input it does none of this.

    R spreads a vector over head_dim + 16 coordinates: a quantiser's range gets smaller by √(head_dim/width), as with a
    rotation, and the error of a rounded zero point, the same in all coordinates, meets vectors that sum to 0. `rotate
    = false` appends zeros and one coordinate for the sink instead, to measure what that is worth.

    b weighs two errors. A stored coordinate is off by e, in proportion to |k'| = √(|k|² + b²), so the score by e·|q'|
    with |q'| = √(|q|² + (z/(scale·b))²): the product is least at b² = z/scale · |k|/|q|. Keys are taken to be as long
    as queries, z to be the root mean square over the query heads of a KV head: b = `magnitude`·√(z/scale).

    Refuses models without full layers in exported form with sinks, those not decoupled yet, and a head_dim for whose
    width no Hadamard matrix is known. Source: Xiao et al. (arXiv 2309.17453), section 3.3, for a zero sink;
    TurboQuant (arXiv 2504.19874), section 3, for the rotation.
    """

    name: ClassVar[str] = "sink-row"
    exact: ClassVar[bool] = True
    paged_attention: ClassVar[bool] = False

    seed: int = option(0, "of the rotation's random rows and signs")
    rotate: bool = option(True, "spread vectors over all coordinates, those for the sink included")
    magnitude: float = option(1.0, "of the sink's part of a key, in units of √(logit/scale)")

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if not 1e-3 <= self.magnitude <= 1e3:
            raise ValueError(f"magnitude must be from 0.001 to 1000, got {self.magnitude}")

    def sites(self, description: ModelDescription) -> int:
        """One per full layer."""
        return len(description.full)

    def requires(self, description: ModelDescription) -> None:
        """Refuses models without such layers, and those not decoupled yet."""
        if not description.full:
            raise self.refuse("the model has no full layers")
        for layer in description.full:
            if len(layer.paths) != 2 or layer.mask is None:
                raise self.refuse(f"layer {layer.index} no longer has the exported KV states")
            if layer.sinks is None:
                raise self.refuse(f"layer {layer.index} has no sinks; leave this pass out")
            try:
                hadamard_matrix(layer.head_dim + PADDING)
            except ValueError as error:
                raise self.refuse(f"layer {layer.index} has head_dim {layer.head_dim}: {error}") from None
        if shape_readers(description):
            raise self.refuse("lengths in this model come from a KV state; run decouple-length first")

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Replace each layer's states and attention."""
        rows = _Rows(self, description)
        changed = {layer.index: rows.attend(layer) for layer in description.full}
        old = [path.assign for layer in description.full for path in layer.paths]
        model = rebuild(model, drop=old, add=rows.assigns)
        facts = {
            "width": rows.width,
            "matrix_sha256": digest(np.concatenate([rows.frame, rows.sink[None]])),
            "magnitudes": {str(index): [round(float(b), 4) for b in some] for index, some in rows.magnitudes.items()},
        }
        return Rewrite(model, description.with_layers(changed), len(changed), facts)

    def ensures(self, rewrite: Rewrite) -> None:
        """Each full layer has two states of the new width, and attention of five inputs."""
        states = {v.get_info().variable_id: v.get_info().data_shape for v in rewrite.model.get_variables()}
        for layer in rewrite.description.full:
            shape = ov.PartialShape([-1, layer.kv_heads, -1, layer.head_dim + PADDING])
            for what in ("key", "value"):
                if states.get(f"ovtq.{layer.index}.{what}") != shape:
                    raise VerificationFailed(f"{self.name}: layer {layer.index} has no {what} state {shape}")
        found = [node for node in rewrite.model.get_ops() if node.get_type_name() == "ScaledDotProductAttention"]
        five = sum(node.get_input_size() == 5 for node in found)
        if five != len(rewrite.description.full):
            raise VerificationFailed(
                f"{self.name}: expected {len(rewrite.description.full)} attentions of five inputs, found {five}"
            )


class _Rows:
    """The nodes that all full layers share, and the rewrite of one layer."""

    def __init__(self, item: SinkRow, description: ModelDescription) -> None:
        layer = description.full[0]
        d, self.width = layer.head_dim, layer.head_dim + PADDING
        if item.rotate:
            self.frame, self.sink = randomized_frame(d, self.width, item.seed)
        else:
            self.frame, self.sink = np.eye(d, self.width, dtype=np.float32), np.eye(1, self.width, d, np.float32)[0]
        # constants of their own: see rotate-heads for what sharing one does
        self.into, self.back = f32(np.ascontiguousarray(self.frame.T)), f32(self.frame)
        self.description, self.magnitude = description, item.magnitude
        batch, new = (dim(description.input_ids, axis) for axis in (0, 1))
        past = op.subtract(dim(description.attention_mask, 1), new)
        self.first = op.subtract(
            i64([1]), op.minimum(past, i64([1]))
        )  # rows to put before the new ones: the sink's, once
        self.before = op.concat([i64([0, 0]), self.first, i64([0])], 0)
        self.mask_before = op.concat([i64([0, 0]), self.first, i64([1])], 0)
        self.batch = batch
        self.masks: dict[tuple[str, int], Node] = {}
        self.magnitudes: dict[int, np.ndarray] = {}
        self.assigns: list[Node] = []

    def attend(self, layer: AttentionLayer) -> AttentionLayer:
        """Rewrite one layer; w = width."""
        H, G, w = layer.kv_heads, layer.group, self.width
        logits = layer.sinks.reshape(H, G) / layer.scale
        strength = self.magnitude * np.sqrt(np.sqrt(np.square(logits).mean(1)))
        strength = np.where(strength > 0, strength, self.magnitude)
        self.magnitudes[layer.index] = strength
        part = (-logits / strength[:, None]).reshape(1, H * G, 1, 1) * self.sink
        query = self._pad(op.add(self._rotate(layer.query.source), f32(part)), H * G)
        key = op.add(self._rotate(layer.key.source), f32(strength.reshape(1, H, 1, 1) * self.sink))
        states = [
            self._append(layer, "key", key),
            self._append(layer, "value", self._rotate(layer.value.source)),
        ]
        heads = [
            op.reshape(
                op.broadcast(op.unsqueeze(state, i64([2])), i64([1, 1, G, 1, 1]), broadcast_spec="BIDIRECTIONAL"),
                i64([0, H * G, -1, w]),
                True,
            )
            for state in states
        ]
        mask = self._mask(layer.mask.source)
        context = op.scaled_dot_product_attention(query, *heads, mask, f32(np.float32(layer.scale)), False)
        real = op.slice(context, self.first, i64([2**31 - 1]), i64([1]), i64([2]))
        redirect(layer.context, op.matmul(real, self.back, False, True))
        return replace(layer, context=context.output(0), mask=None, key_path=None, value_path=None)

    def _rotate(self, source: Output) -> Node:
        return op.matmul(source, self.into, False, True)

    def _pad(self, new: Node, heads: int) -> Node:
        """`new`, (batch, heads, new, w), with a row of zeros before it in the first call.

        The Reshape says how many heads and coordinates there are, which Pad forgets and the GPU plugin's kernels need.
        """
        rows = op.pad(new, self.before, i64([0, 0, 0, 0]), "constant", op.constant(np.float32(0)))
        return op.reshape(rows, i64([0, heads, -1, self.width]), True)

    def _append(self, layer: AttentionLayer, what: str, new: Node) -> Node:
        """The state's rows and the new ones; the sink's before them in the first call."""
        H, w = layer.kv_heads, self.width
        variable = new_variable(f"ovtq.{layer.index}.{what}", [-1, H, -1, w], ov.Type.f32)
        empty = op.broadcast(f32(0), op.concat([self.batch, i64([H, 0, w])], 0))
        past = op.gather(op.read_value(empty, variable), self.description.beam_idx, i64(0))
        appended = op.concat([past, self._pad(new, H)], 2)
        self.assigns.append(op.assign(appended, variable))
        return appended

    def _mask(self, mask: Output) -> Node:
        """`mask`, (batch, 1, new, all), with a column of zeros before the others: the sink is always seen."""
        place = id_of(mask.get_node()), mask.get_index()
        if place not in self.masks:
            zero = op.constant(np.float32(0))
            self.masks[place] = op.pad(mask, self.mask_before, i64([0, 0, 0, 0]), "constant", zero)
        return self.masks[place]
