"""centre-keys: subtract one vector from all keys of a head, which softmax does not see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import openvino as ov
from openvino import opset15 as op

from ovtq.errors import VerificationFailed
from ovtq.forms.bases import KINDS, Choice, statistics
from ovtq.ir.graph import consumers, f32
from ovtq.models.description import ModelDescription
from ovtq.models.rope import norms
from ovtq.passes.base import BasisPass, Rewrite, calibration_option, option
from ovtq.passes.checks import not_exported


@dataclass(frozen=True)
class CentreKeys(BasisPass):
    """softmax(s·q·(K − c)ᵀ) = softmax(s·q·Kᵀ): each score of a query loses the same s·q·cᵀ.

    What is left of keys with a strong bias, or a mean that no query's score depends on, is smaller, so that whatever
    quantises the cache later loses less. c is the mean of the key's bias as RoPE turns it over the first positions, or
    the mean key over a text. One Subtract on K where it enters the attention (after RoPE); the cache stays in the
    exported form, so that every fusion and paged attention still apply.

    A sink is one more score, which does not lose s·q·cᵀ by itself: its logit becomes z − s·q·cᵀ, one for each query.
    The CPU plugin's attention takes such sinks in the stateful path; paged attention does not. So layers with sinks are
    refused unless `sinks` is move; sink-row and quantize-kv centre keys of such layers themselves.

    Refuses layers that no longer have the exported states, and a model with nothing to subtract. Source: SageAttention
    (arXiv 2410.02367), section 4.2.
    """

    name: ClassVar[str] = "centre-keys"
    exact: ClassVar[bool] = True

    centre: str = option(
        "auto",
        "the mean of the key's bias, or the mean key over a text; auto: mean if calibrated, else bias",
        choices=("auto", "bias", "mean"),
    )
    sinks: str = option(
        "refuse",
        "of layers with sinks: refuse, or move their logits (a CPU's stateful path)",
        choices=("refuse", "move"),
    )
    basis: str = option("rotation", "what rotate-heads stores heads in, by which auto goes", choices=KINDS)
    calibration: str = calibration_option()

    @property
    def paged_attention(self) -> bool:
        """Unless sinks move along."""
        return self.sinks == "refuse"

    @property
    def choice(self) -> Choice:
        """Of what the centres are made."""
        return Choice("rotation", Choice(self.basis, self.centre).centred_by, self.calibration)

    def sites(self, description: ModelDescription) -> int:
        """One per layer."""
        return len(description.layers)

    def needless(self, description: ModelDescription) -> str:
        """In a model without biases of keys, if it is these that are asked for."""
        biased = any(layer.key_bias is not None for layer in description.layers)
        mean = self.choice.centred_by == "mean"
        return "" if biased or mean else "no key of this model has a bias; centre=mean, of a text, needs none"

    def requires(self, description: ModelDescription) -> None:
        """Refuses sinks that may not move, other caches, and keys without a bias where that is asked for."""
        self.refuse_if(not_exported(description.layers))
        for layer in description.layers:
            if layer.sinks is not None and self.sinks == "refuse":
                raise self.refuse(
                    f"layer {layer.index} has sinks, which would not lose what scores lose; with sinks=move their "
                    "logits follow, in the CPU's stateful path alone; sink-row and quantize-kv centre keys themselves"
                )
            if layer.key_taken is not None:
                raise self.refuse(f"keys of layer {layer.index} are centred already")
        self.refuse_if(self.needless(description) or self.choice.unfit(description.layers))

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Insert the Subtracts."""
        known, changed, moved = self.choice.calibration(), {}, {}
        centres = {
            layer.index: self.choice.centres(model, layer, known.layers[layer.index] if known else None)[0]
            for layer in description.layers
        }
        for layer in description.layers:
            centre = moved[layer.index] = centres[layer.index]
            if layer.sinks is not None:
                of_query = f32(np.repeat(layer.scale * centre, layer.group, 0)[None, :, :, None])
                logits = f32(layer.sinks.reshape(1, -1, 1, 1))
                shifted = op.subtract(logits, op.matmul(layer.query.source, of_query, False, False))
                layer.context.get_node().input(5).replace_source_output(shifted.output(0))
            layer.key.feed(op.subtract(layer.key.source, f32(centre[None, :, None])))
            changed[layer.index] = replace(layer, key_taken=centre)
        facts = {"centre_norms": norms(moved), **statistics(self.choice)}
        return Rewrite(model, description.with_layers(changed), len(changed), facts)

    def ensures(self, rewrite: Rewrite) -> None:
        """Keys come from a Subtract, which nothing else reads."""
        for layer in rewrite.description.layers:
            node = layer.key.source.get_node()
            if node.get_type_name() != "Subtract" or len(consumers(node.output(0))) != 1:
                raise VerificationFailed(f"{self.name}: keys of layer {layer.index} are not centred")
