"""rotate-heads: store keys and values in a randomly rotated basis."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec.rotation import digest, randomized_hadamard
from ovtq.errors import VerificationFailed
from ovtq.ir.graph import consumers, f32, insert_after
from ovtq.models.description import AttentionLayer, Exported, ModelDescription
from ovtq.passes.base import Pass, Rewrite, option


@dataclass(frozen=True)
class RotateHeads(Pass):
    """softmax((qR)(KR)ᵀ)·(VR)·Rᵀ = softmax(qKᵀ)·V for orthogonal R, a randomised Hadamard matrix.

    The rotation, the same for all heads, spreads outlier channels over all coordinates, so that whatever quantises the
    cache later loses less.
    One MatMul each on Q, K and V where they enter the attention (after RoPE), one on its result. K and V stay in the
    exported form Assign ← Concat ← Gather ← ReadValue, so that every fusion and paged attention still apply.

    On GPUs of the Xe2 generation the node after the attention has a use of its own: OpenVINO 2026.4 can't compile
    a six-input attention (sinks) that a Transpose follows at once.

    Refuses a head_dim that is no power of two. Source: TurboQuant (arXiv 2504.19874), section 3; QuaRot
    (arXiv 2404.00456) for rotating the KV cache.
    """

    name: ClassVar[str] = "rotate-heads"
    exact: ClassVar[bool] = True
    paged_attention: ClassVar[bool] = True

    seed: int = option(0, "seed of the random signs")
    tensors: str = option("qkv", "what to rotate: queries and keys, values, or both", choices=("qkv", "qk", "v"))
    layers: str = option("all", "which layers; left: full ones not packed, if any", choices=("all", "full", "left"))

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")

    def _chosen(self, description: ModelDescription) -> tuple[AttentionLayer, ...]:
        if self.layers == "left":
            return tuple(layer for layer in description.full if isinstance(layer.cache, Exported))
        return description.layers if self.layers == "all" else description.full

    def sites(self, description: ModelDescription) -> int:
        """One per layer."""
        return len(self._chosen(description))

    def needless(self, description: ModelDescription) -> str:
        """In a model without such layers."""
        return "" if self._chosen(description) or self.layers == "left" else f"the model has no {self.layers} layers"

    def requires(self, description: ModelDescription) -> None:
        """Refuses a head_dim without a Hadamard matrix, and a model without such layers."""
        chosen = self._chosen(description)
        self.refuse_if(self.needless(description))
        for layer in chosen:
            if layer.head_dim & (layer.head_dim - 1):
                raise self.refuse(
                    f"layer {layer.index} has head_dim {layer.head_dim}; a Hadamard rotation needs a power of two"
                )

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Insert the MatMuls."""
        rotated, hashes = 0, {}
        constants: dict[int, tuple[ov.Node, ov.Node]] = {}
        for layer in self._chosen(description):
            if layer.head_dim not in constants:
                rotation = randomized_hadamard(layer.head_dim, self.seed)
                hashes[str(layer.head_dim)] = digest(rotation)
                # Both matrices are stored as the CPU plugin wants weights, transposed. They are constants of their own:
                # with one constant, and transpose_b on one MatMul only, the plugin takes the repacked weights of the
                # one for the other's and silently gives wrong numbers.
                constants[layer.head_dim] = f32(np.ascontiguousarray(rotation.T)), f32(rotation)
            forward, inverse = constants[layer.head_dim]
            ports = (layer.query, layer.key) if "qk" in self.tensors else ()
            for port in (*ports, *((layer.value,) if "v" in self.tensors else ())):
                port.feed(op.matmul(port.source, forward, False, True))
            if "v" in self.tensors:
                insert_after(layer.context, functools.partial(_rotated, matrix=inverse))
            rotated += 1
        return Rewrite(model, description, rotated, {"matrix_sha256": hashes})

    def ensures(self, rewrite: Rewrite) -> None:
        """What enters the attention comes from a MatMul, and what it gives goes to one and nowhere else."""
        for layer in self._chosen(rewrite.description):
            around = [layer.query.source.get_node(), layer.key.source.get_node()] if "qk" in self.tensors else []
            if "v" in self.tensors:
                around += [layer.value.source.get_node(), *consumers(layer.context)]
            if any(node.get_type_name() != "MatMul" for node in around):
                raise VerificationFailed(f"{self.name}: layer {layer.index} is not rotated")


def _rotated(tensor: Output, matrix: Node) -> Node:
    """`tensor` times a matrix that is stored transposed."""
    return op.matmul(tensor, matrix, False, True)
