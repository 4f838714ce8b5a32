"""quantize-kv: keep the keys and values of full layers as packed codes, quantised once, when they arrive."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.attend import History, Sources
from ovtq.attend_blocks import Blocks
from ovtq.attend_branches import Branches
from ovtq.codec import STEPS, AdaptiveUniform
from ovtq.errors import VerificationFailed
from ovtq.graph import Port, dim, f32, i64, new_variable, rebuild, redirect
from ovtq.models.description import AttentionLayer, ModelDescription
from ovtq.models.rope import mean_rotated_bias
from ovtq.packing import layout, packed_bytes
from ovtq.passes.base import Pass, Rewrite, option
from ovtq.passes.decouple_length import shape_readers
from ovtq.quantizer import encode, pack
from ovtq.ring import Ring
from ovtq.rotation import digest, randomized_hadamard

# The form that is right on a plugin and fast there. Each also runs on the other, where it is verified too.
FORMS = {"gpu": Branches, "cpu": Blocks}
RECENT = "ovtq.recent"  # the name of the state of all residual windows
BITS = ("none", *map(str, STEPS))


@dataclass(frozen=True)
class QuantizeKv(Pass):
    """softmax(q·K̂ᵀ)·V̂ with K̂, V̂ = scale·(code − mid) for all tokens but the recent ones, which stay as they are.

    A token's key and value are quantised once, when it arrives, and never again: bytes and scale are appended to the
    states, and a copy at full precision stays in the residual window until `residual-window` newer tokens have come.
    New tokens attend to each other, and to the window, at full precision.

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

    k_bits: str = option("6", "of a key's coordinate", choices=BITS)
    v_bits: str = option("4", "of a value's coordinate", choices=BITS)
    residual_window: int = option(64, "recent tokens kept at full precision")
    protect: str = option("", "full layers left alone: first:N, last:N or indices, separated by commas")
    centre: str = option("bias", "what to take from the keys", choices=("bias", "none"))
    seed: int = option(0, "of the rotation's random signs")
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
            raise self.refuse("no full layer is left to quantise" if description.full else "the model has no full layers")
        for layer in layers:
            if len(layer.paths) != 2:
                raise self.refuse(f"layer {layer.index} no longer has the exported KV states")
            if _shape(layer) != _shape(layers[0]):
                raise self.refuse(f"layers {layers[0].index} and {layer.index} differ in heads or head_dim")
        d = layers[0].head_dim
        if d & (d - 1):
            raise self.refuse(f"layer {layers[0].index} has head_dim {d}; a Hadamard rotation needs a power of two")
        for bits in {self.k_bits, self.v_bits} - {"none"}:
            try:
                packed_bytes(int(bits), d)
            except ValueError as error:
                raise self.refuse(f"layer {layers[0].index}: {error}") from None
        if shape_readers(description):
            raise self.refuse("lengths in this model come from a KV state; run decouple-length first")

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Replace each layer's states and attention."""
        layers = self.chosen(description)
        centres = {layer.index: self._centre(model, layer) for layer in layers}
        sinks = np.stack([np.concatenate([-centres[layer.index], 0 * centres[layer.index]]) for layer in layers])
        form = FORMS[self.target](description, layers, self.residual_window)
        if self.residual_window:
            ring = Ring(description, RECENT, layers, self.residual_window, sinks.reshape(-1, layers[0].head_dim))
            before = ring.parts
        else:
            shape = op.concat([dim(description.input_ids, 0), i64([sinks.shape[1], 1, sinks.shape[2]])], 0)
            before = [op.broadcast(f32(sink[None, :, None]), shape).output(0) for sink in sinks]
        changed, news, stores = {}, [], []
        for layer, rows in zip(layers, before, strict=True):
            new, more, rewritten = self._rewrite(description, form, rows, layer, centres[layer.index])
            news.append(new)
            stores += more
            changed[layer.index] = rewritten
        if self.residual_window:
            stores.append(ring.store(news))
        old = [path.assign for layer in layers for path in layer.paths]
        model = rebuild(model, drop=old, add=stores)
        return Rewrite(model, description.with_layers(changed), len(changed), self._facts(layers, centres))

    def _centre(self, model: ov.Model, layer: AttentionLayer) -> np.ndarray:
        """c·scale, (kv_heads, head_dim): zero if keys are not to be centred or have no bias."""
        mean = None
        if self.centre == "bias":
            mean = mean_rotated_bias(model, layer.key.source, layer.kv_heads, layer.head_dim, POSITIONS)
        if mean is None:
            return np.zeros((layer.kv_heads, layer.head_dim), np.float32)
        return (mean * np.float32(layer.scale)).astype(np.float32)

    def _rewrite(
        self,
        description: ModelDescription,
        form: Blocks | Branches,
        before: Output,
        layer: AttentionLayer,
        centre: np.ndarray,
    ) -> tuple[Node, list[Node], AttentionLayer]:
        """The new tokens of a layer for the ring, its Assigns, and the layer as it is now."""
        H, d = layer.kv_heads, layer.head_dim
        entry = op.concat([layer.key.source, layer.value.source], 1)  # (batch, 2H, new, d)
        ones = np.ones((H, 1, 1), np.float32)
        new = op.multiply(entry, f32(np.concatenate([layer.scale * ones, ones])[None]))
        if centre.any():
            new = op.subtract(new, f32(np.concatenate([centre, 0 * centre])[None, :, None]))

        codecs = self._codecs(d)
        rotation = randomized_hadamard(d, self.seed)
        halves = dict(zip(("key", "value"), op.split(new, i64(1), 2).outputs(), strict=True))
        centred, scales = encode(new if len(codecs) == 2 else halves[next(iter(codecs))], list(codecs.values()), rotation)
        layouts = {what: layout(codec.bits, d) for what, codec in codecs.items()}
        parts = op.split(scales, i64(1), len(codecs)).outputs() if len(codecs) == 2 else [scales.output(0)]
        packed = zip(codecs, pack(centred, list(codecs.values()), list(layouts.values())), parts, strict=True)
        packed = {what: (data, scale) for what, data, scale in packed}
        stores, histories = [], {}
        for what in halves:
            name = f"ovtq.{layer.index}.{what}"
            if what in packed:
                data, scale = packed[what]
                past, appended, store = _append(description, name, data, H, layouts[what].bytes, ov.Type.i8)
                past_scales, appended_scales, more = _append(description, f"{name}.scale", scale, H, 1, ov.Type.f32)
                histories[what] = History(past, appended, past_scales, appended_scales, layouts[what])
                stores += [store, more]
            else:
                past, appended, store = _append(description, name, halves[what], H, d, ov.Type.f32)
                histories[what] = History(past, appended, None, None, None)
                stores.append(store)

        recent = op.concat([before, new], 2).output(0)
        sources = Sources(layer, layer.query.source, histories["key"], histories["value"], recent, centre, rotation)
        context = form.attend(sources)
        redirect(layer.context, context)
        rewritten = replace(
            layer,
            key=Port(entry, 0),
            value=Port(entry, 1),
            context=context.output(0),
            mask=None,
            key_path=None,
            value_path=None,
        )
        return new, stores, rewritten

    def _codecs(self, head_dim: int) -> dict[str, AdaptiveUniform]:
        texts = {"key": self.k_bits, "value": self.v_bits}
        return {what: AdaptiveUniform(int(bits), head_dim) for what, bits in texts.items() if bits != "none"}

    def _facts(self, layers: Sequence[AttentionLayer], centres: dict[int, np.ndarray]) -> dict[str, Any]:
        d = layers[0].head_dim
        return {
            "layers": [layer.index for layer in layers],
            "quantizer_sha256": {what: codec.digest for what, codec in self._codecs(d).items()},
            "rotation_sha256": digest(randomized_hadamard(d, self.seed)),
            "centre_norms": {
                str(index): [round(float(norm), 4) for norm in np.linalg.norm(centre, axis=-1)]
                for index, centre in centres.items()
            },
        }

    def ensures(self, rewrite: Rewrite) -> None:
        """Every layer has a state of packed bytes and one of scales for K and for V, as wide as promised."""
        states = {v.get_info().variable_id: v.get_info() for v in rewrite.model.get_variables()}
        layers = self.chosen(rewrite.description)
        H, d = layers[0].kv_heads, layers[0].head_dim
        expected: dict[str, tuple[str, list[int]]] = {}
        for layer in layers:
            for what, bits in (("key", self.k_bits), ("value", self.v_bits)):
                width, kind = (d, "f32") if bits == "none" else (packed_bytes(int(bits), d), "i8")
                expected[f"ovtq.{layer.index}.{what}"] = (kind, [-1, H, -1, width])
                if bits != "none":
                    expected[f"ovtq.{layer.index}.{what}.scale"] = ("f32", [-1, H, -1, 1])
        if self.residual_window:
            expected[RECENT] = ("f32", [-1, 2 * H * len(layers), 1 + self.residual_window, d])
        for name, (kind, shape) in expected.items():
            info = states.get(name)
            if not info or info.data_type.get_type_name() != kind or info.data_shape != ov.PartialShape(shape):
                found = f"{info.data_type.get_type_name()}{info.data_shape}" if info else "none"
                raise VerificationFailed(f"{self.name}: expected a state {name} {kind}{shape}, found {found}")


POSITIONS = 4096  # over which a turning bias is averaged


def _shape(layer: AttentionLayer) -> tuple[int, int, int]:
    return layer.query_heads, layer.kv_heads, layer.head_dim


def _append(
    description: ModelDescription, name: str, new: Node | Output, heads: int, width: int, kind: ov.Type
) -> tuple[Output, Output, Node]:
    """A growing state (batch, heads, tokens, width): what it held, in the order of the beams, that and `new`, its Assign.

    Between the state and the Concat stands one Gather and nothing else: so the GPU plugin appends in place.
    """
    variable = new_variable(name, [-1, heads, -1, width], kind)
    shape = op.concat([dim(description.input_ids, 0), i64([heads, 0, width])], 0)
    empty = op.broadcast(op.constant(np.zeros((), kind.to_dtype())), shape)
    past = op.gather(op.read_value(empty, variable), description.beam_idx, i64(0))
    appended = op.concat([past, new], 2)
    return past.output(0), appended.output(0), op.assign(appended, variable)
