"""quantize-kv: keep the keys and values of full layers as packed codes, quantised once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import openvino as ov

from ovtq.attend import Plan, sink_logits
from ovtq.attend_blocks import Blocks
from ovtq.attend_branches import Branches
from ovtq.coding import BITS, coding, unfit
from ovtq.errors import VerificationFailed
from ovtq.graph import rebuild
from ovtq.models.description import AttentionLayer, ModelDescription
from ovtq.models.rope import mean_rotated_bias, norms
from ovtq.packed_attention import PackedAttention
from ovtq.passes.base import Pass, Rewrite, option
from ovtq.passes.decouple_length import shape_readers
from ovtq.states import RECENT

# The form that is right on a plugin and fast there. Each also runs on the other, where it is verified too; but on a CPU
# the GPU's with a single packed layer can't be reset (see `extent.rooted`).
FORMS = {"gpu": Branches, "cpu": Blocks}


@dataclass(frozen=True)
class QuantizeKv(Pass):
    """softmax(q·K̂ᵀ)·V̂ with K̂, V̂ = scale·(code − mid) for all tokens but the recent ones, which stay as they are.

    A token's key and value are quantised once and never again: bytes and scale are appended to the states. The last
    `residual-window` tokens (at least: a target may keep a few more) are held at full precision; new tokens attend to
    each other, and to these, as they are.

    Keys are centred first: softmax does not change when every key is shifted by the same vector c and the sink logit
    by −q·c, and what is left of a key with a strong bias is smaller. c is the mean of the bias as RoPE turns it over
    the first positions, which is what does not turn: it costs nothing by token, where adding back q·RoPE_t(b) would
    cost a product as large as that with the keys. The sink's row in the recent keys is −c.

    Refuses models whose full layers no longer have the exported KV states, whose lengths come from them (run
    decouple-length first), or whose shapes differ; and a head_dim that the packing can't fill. Source: TurboQuant
    (arXiv 2504.19874), Algorithm 1, with the step of `ovtq.codec.AdaptiveUniform` instead of a fixed codebook;
    SageAttention (arXiv 2410.02367), section 4.2, for centred keys; KIVI (arXiv 2402.02750) for the residual window.
    """

    name: ClassVar[str] = "quantize-kv"
    exact: ClassVar[bool] = False
    paged_attention: ClassVar[bool] = False

    k_bits: str = option("6", "bits per coordinate of a key", choices=BITS)
    v_bits: str = option("4", "bits per coordinate of a value", choices=BITS)
    residual_window: int = option(64, "recent tokens kept at full precision")
    protect: str = option("", "full layers left alone: first:N, last:N or indices, separated by commas")
    centre: str = option("bias", "what is subtracted from all keys", choices=("bias", "none"))
    seed: int = option(0, "seed of the rotation's random signs")
    target: str = option("gpu", "whose plugin the graph is made for", choices=tuple(FORMS))

    def __post_init__(self) -> None:
        if not 0 <= self.residual_window <= 4096:
            raise ValueError(f"residual-window must be from 0 to 4096, got {self.residual_window}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if self.k_bits == self.v_bits == "none":
            raise ValueError("k-bits and v-bits are both none; leave the pass out")
        for part in filter(None, self.protect.split(",")):
            if not re.fullmatch(r"(first:|last:)?\d+", part):
                raise ValueError(f"protect: expected first:N, last:N or an index, got {part!r}")

    def chosen(self, description: ModelDescription) -> tuple[AttentionLayer, ...]:
        """The full layers that are not protected."""
        full = description.full
        kept: set[int] = set()
        for part in filter(None, self.protect.split(",")):
            kind, _, number = part.rpartition(":")
            count = int(number)
            some = {"first": full[:count], "last": full[len(full) - min(count, len(full)) :]}.get(kind)
            kept |= {count} if some is None else {layer.index for layer in some}
        return tuple(layer for layer in full if layer.index not in kept)

    def sites(self, description: ModelDescription) -> int:
        """One per full layer that is not protected."""
        return len(self.chosen(description))

    def requires(self, description: ModelDescription) -> None:
        """Refuses models without such layers in exported form, and those not decoupled yet."""
        indices = {layer.index for layer in description.full}
        for part in filter(None, self.protect.split(",")):
            if part.isdigit() and int(part) not in indices:
                raise self.refuse(f"protect: layer {part} is no full layer; those are {', '.join(map(str, indices))}")
        layers = self.chosen(description)
        if not layers:
            raise self.refuse(
                "no full layer is left to quantise" if description.full else "the model has no full layers"
            )
        for layer in layers:
            if len(layer.paths) != 2:
                raise self.refuse(f"layer {layer.index} no longer has the exported KV states")
            if layer.shape != layers[0].shape:
                raise self.refuse(f"layers {layers[0].index} and {layer.index} differ in heads or head_dim")
        reason = unfit(self.bits, layers[0].head_dim)
        if reason:
            raise self.refuse(f"layer {layers[0].index} {reason}")
        if shape_readers(description):
            raise self.refuse("lengths in this model come from a KV state; run decouple-length first")

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Replace each layer's states and attention."""
        layers = self.chosen(description)
        plan = self._plan(model, layers)
        form = self._form(description, plan, RECENT)
        changed = {layer.index: self._rewrite(form, plan, layer) for layer in layers}
        old = [path.assign for layer in layers for path in layer.paths]
        model = rebuild(model, drop=old, add=form.stores())
        names = [path.variable_id for layer in layers for path in layer.paths]
        description = description.with_layers(changed).with_states(names, form.beams.states)
        return Rewrite(model, description, len(changed), _facts(plan))

    def _plan(self, model: ov.Model, layers: tuple[AttentionLayer, ...]) -> Plan:
        how = coding(self.bits, layers[0].head_dim, self.seed)
        centres = {layer.index: self._centre(model, layer) for layer in layers}
        return Plan(how.key, how.value, how.rotation, layers, centres, self.residual_window)

    def _form(self, description: ModelDescription, plan: Plan, name: str) -> Blocks | Branches:
        return FORMS[self.target](description, plan, name)

    def _definition(self, plan: Plan, form: Blocks | Branches, layer: AttentionLayer) -> PackedAttention:
        centre, sinks = plan.centres[layer.index], sink_logits(layer).reshape(-1)
        codecs = plan.key, plan.value
        return PackedAttention(codecs, plan.rotation, centre, sinks, layer.scale, plan.window, form.flush)

    @property
    def bits(self) -> tuple[str, str]:
        """Of keys and values."""
        return self.k_bits, self.v_bits

    def _centre(self, model: ov.Model, layer: AttentionLayer) -> np.ndarray:
        """c·scale, (kv_heads, head_dim): zero if keys are not to be centred or have no bias."""
        mean = None
        if self.centre == "bias":
            mean = mean_rotated_bias(model, layer.key.source, layer.kv_heads, layer.head_dim)
        if mean is None:
            return np.zeros((layer.kv_heads, layer.head_dim), np.float32)
        return (mean * np.float32(layer.scale)).astype(np.float32)

    def _rewrite(self, form: Blocks | Branches, plan: Plan, layer: AttentionLayer) -> AttentionLayer:
        new, key, value = form.enter(layer)
        context = form.attend(layer, layer.query.source, new)
        packed, places = self._definition(plan, form, layer), form.places(layer)
        return layer.rewritten(
            context, key=key, value=value, packed=packed, places=places, rows=form.rows(layer), lengths=form.lengths
        )

    def ensures(self, rewrite: Rewrite) -> None:
        """No layer that was packed has floats in place of codes."""
        whole = {what for what, bits in zip(("key", "value"), self.bits, strict=True) if bits == "none"}
        packed = {layer.index for layer in self.chosen(rewrite.description)}
        for state in rewrite.description.states:
            if state.holds in ("key", "value") and packed & {*state.layers} and state.real != (state.holds in whole):
                raise VerificationFailed(f"{self.name}: the state {state.name} is {state.type}")


def _facts(plan: Plan) -> dict[str, Any]:
    return {
        "layers": [layer.index for layer in plan.layers],
        **plan.digests,
        "centre_norms": norms(plan.centres),
    }
