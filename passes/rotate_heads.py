"""rotate-heads: store keys and values in a randomly rotated, or a balanced, basis."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec.rotation import digest, orthogonal
from ovtq.errors import VerificationFailed
from ovtq.forms.bases import Choice, LayerBases, told
from ovtq.forms.basis_nodes import Matrices
from ovtq.ir.graph import consumers, insert_after
from ovtq.models.description import AttentionLayer, Exported, ModelDescription
from ovtq.passes.base import BasisPass, Rewrite, basis_option, calibration_option, option


@dataclass(frozen=True)
class RotateHeads(BasisPass):
    """softmax((qA⁻ᵀ)(KA)ᵀ)·(VB)·B⁻¹ = softmax(qKᵀ)·V for any invertible A and B.

    `rotation`: A = B, the same for all heads, is a randomised Hadamard matrix, or where none is known another
    orthogonal one. It spreads outlier channels over all coordinates, so that whatever quantises the cache later loses
    less. `weights` and `calibrated`: A balances keys against the queries they meet, B values against the output
    projection, for each KV head (`ovtq.codec.basis`), by what the weights or a text say of them; where held-out text
    says that this loses, a layer gets the rotation. Nothing is centred here: see centre-keys.
    One MatMul each on Q, K and V where they enter the attention (after RoPE), one on its result. K and V stay in the
    exported form Assign ← Concat ← Gather ← ReadValue, so that every fusion and paged attention still apply.

    On GPUs of the Xe2 generation the node after the attention has a use of its own: OpenVINO 2026.4 can't compile
    a six-input attention (sinks) that a Transpose follows at once.

    Refuses a model without such layers, and statistics of another. Source: TurboQuant (arXiv 2504.19874), section 3;
    QuaRot (arXiv 2404.00456) for rotating the KV cache.
    """

    name: ClassVar[str] = "rotate-heads"
    exact: ClassVar[bool] = True
    paged_attention: ClassVar[bool] = True

    seed: int = option(0, "seed of the random signs")
    tensors: str = option("qkv", "what to rotate: queries and keys, values, or both", choices=("qkv", "qk", "v"))
    layers: str = option(
        "all", "which layers; left: those whose cache is as exported, if any", choices=("all", "full", "left")
    )
    basis: str = basis_option()
    calibration: str = calibration_option()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")

    @property
    def choice(self) -> Choice:
        """How its bases are made."""
        return Choice(self.basis, "none", self.calibration)

    def _chosen(self, description: ModelDescription) -> tuple[AttentionLayer, ...]:
        if self.layers == "left":
            return tuple(layer for layer in description.layers if isinstance(layer.cache, Exported))
        return description.layers if self.layers == "all" else description.full

    def sites(self, description: ModelDescription) -> int:
        """One per layer."""
        return len(self._chosen(description))

    def needless(self, description: ModelDescription) -> str:
        """In a model without such layers."""
        return "" if self._chosen(description) or self.layers == "left" else f"the model has no {self.layers} layers"

    def requires(self, description: ModelDescription) -> None:
        """Refuses a model without such layers, and statistics that are not of it."""
        chosen = self._chosen(description)
        self.refuse_if(self.needless(description) or self.choice.unfit(chosen))

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Insert the MatMuls."""
        chosen, hashes = self._chosen(description), {}
        bases: dict[int, LayerBases] = {}
        for layer in chosen:
            spread = orthogonal(layer.head_dim, self.seed)
            hashes[str(layer.head_dim)] = digest(spread)
            bases |= self.choice.of(model, [layer], (spread, spread), centred=False)
        constants = Matrices()
        for layer in chosen:
            key, value = bases[layer.index]
            if "qk" in self.tensors:
                layer.query.feed(op.matmul(layer.query.source, constants.dual(key, layer.group), False, True))
                layer.key.feed(op.matmul(layer.key.source, constants.forward(key), False, True))
            if "v" in self.tensors:
                layer.value.feed(op.matmul(layer.value.source, constants.forward(value), False, True))
                inverse = constants.inverse(value, layer.group)
                insert_after(layer.context, functools.partial(_rotated, matrix=inverse))
        facts = {"matrix_sha256": hashes}
        return Rewrite(
            model, description, len(chosen), facts if self.basis == "rotation" else facts | self._told(bases)
        )

    def _told(self, bases: dict[int, LayerBases]) -> dict[str, object]:
        found = told(self.choice, bases)
        return {name: found[name] for name in ("balanced", "condition", "calibration") if name in found}

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
