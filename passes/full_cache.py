"""A packed or pruned cache for full layers: what the passes that give them one have in common."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import openvino as ov

from ovtq.codec.allotment import AUTO, allot, named
from ovtq.codec.coding import Codecs, codecs, unfit
from ovtq.codec.kernel_files import HEAD_DIMS
from ovtq.codec.kernel_layout import MOST_HEADS
from ovtq.codec.rotation import orthogonal
from ovtq.forms.attend import FullCacheSpec
from ovtq.forms.bases import Choice, LayerBases, told
from ovtq.forms.gpu.kernels import Kernels
from ovtq.forms.pruning import Pruning
from ovtq.forms.table import TARGET, TARGETS
from ovtq.ir.graph import rebuild
from ovtq.models.description import AttentionLayer, ModelDescription
from ovtq.passes.base import BasisPass
from ovtq.passes.checks import coupled, not_exported, taken, unequal
from ovtq.states import RECENT


@dataclass(frozen=True)
class FullCache:
    """Which full layers get one, how it is packed (`bits` of keys and values, each one of BITS), and what is pruned.

    `window` recent tokens, at the least, stay as they are. Raises ValueError for unusable options.
    """

    bits: tuple[str, str]
    window: int
    protect: str
    centre: str
    seed: int
    target: str
    pruning: Pruning | None = None
    capacity: int | None = None  # tokens that kernels of ovtq have room for; None: no kernels
    basis: str = "rotation"
    calibration: str = ""
    by_layer: str = ""  # bits of some layers, or of all by what they lose, in place of `bits`
    most: float = 0.0  # mean KLD that may then be predicted, in nats; 0: `by_layer` says which bits

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        for part in filter(None, self.protect.split(",")):
            if not re.fullmatch(r"(first:|last:)?\d+", part):
                raise ValueError(f"protect: expected first:N, last:N or an index, got {part!r}")
        named(self.by_layer)
        if self.automatic != bool(self.most) or not 0 <= self.most < float("inf"):
            raise ValueError(
                f"bits auto and budget-kld, a number of nats above 0, go together; got bits {self.by_layer or 'none'} "
                f"and budget-kld {self.most:g}"
            )

    @property
    def automatic(self) -> bool:
        """Whether bits are chosen by what they lose."""
        return self.by_layer == AUTO

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

    def unfit(self, description: ModelDescription) -> str:
        """Why it can't be given to this model; empty if it can."""
        indices = {layer.index for layer in description.full}
        for part in filter(None, self.protect.split(",")):
            if part.isdigit() and int(part) not in indices:
                return f"protect: layer {part} is no full layer; those are {', '.join(map(str, indices))}"
        layers = self.chosen(description)
        if not layers:
            return "no full layer is left to quantise" if description.full else "the model has no full layers"
        reason = unfit(self.bits, layers[0].head_dim)
        return (
            (self.capacity and self._without_kernels(layers[0]))
            or not_exported(layers)
            or unequal(layers, "heads or head_dim")
            or (f"layer {layers[0].index} {reason}" if reason else "")
            or coupled(description)
            or taken(description.states, RECENT)
            or self.choice.unfit(layers)
            or self._without_bits(layers)
        )

    def _without_bits(self, layers: tuple[AttentionLayer, ...]) -> str:
        """Why these layers can't have bits of their own, if they are to."""
        if not self.by_layer:
            return ""
        if "none" in self.bits:
            return "bits: keys and values are both packed then; give k-bits and v-bits numbers"
        if other := [index for index in named(self.by_layer) if index not in {layer.index for layer in layers}]:
            have = ", ".join(str(layer.index) for layer in layers)
            return f"bits: layer {other[0]} is no full layer that is packed; those are {have}"
        try:
            coded, _ = self.allotted(layers)
        except ValueError as error:
            return str(error)
        if self.capacity and len({*coded.values()}) > 1:
            return "kernels have the same bits in all layers; leave out kernels, or bits"
        return ""

    def allotted(self, layers: tuple[AttentionLayer, ...]) -> tuple[dict[int, tuple[str, str]], dict[str, Any]]:
        """Bits of each layer, and what is told of them. Raises ValueError if none are as good as is asked for."""
        if not self.by_layer:
            return {layer.index: self.bits for layer in layers}, {}
        facts: dict[str, Any] = {}
        some = named(self.by_layer)
        if self.automatic:
            found = allot(self._sensitivities(layers), layers[0].head_dim, self.most)
            some, facts = dict(found.bits), {"predicted_kld": found.predicted}
        bits = {x.index: tuple(map(str, some[x.index])) if x.index in some else self.bits for x in layers}
        for index, pair in bits.items():
            if reason := unfit(pair, layers[0].head_dim):
                raise ValueError(f"layer {index} {reason}")
        facts["bits"] = {str(index): [int(key), int(value)] for index, (key, value) in bits.items()}
        return {index: (key, value) for index, (key, value) in bits.items()}, facts

    def _sensitivities(self, layers: tuple[AttentionLayer, ...]) -> dict[int, tuple[float, float]]:
        found = self.choice.calibration()
        if self.basis != "calibrated" or found is None:
            raise ValueError("bits auto: needs the basis calibrated, in which losses were measured")
        known = {}
        for layer in layers:
            key, value = (found.layers[layer.index].sensitivity(which) for which in ("key", "value"))
            if key is None or value is None:
                raise ValueError(
                    f"bits auto: {self.calibration} does not say what layer {layer.index} loses; run ovtq-calibrate "
                    "--sensitivity MODEL_DIR"
                )
            known[layer.index] = key, value
        return known

    def _without_kernels(self, layer: AttentionLayer) -> str:
        if not TARGET[self.target].kernels:
            able = " or ".join(name for name in TARGETS if TARGET[name].kernels)
            return f"kernels are for a {able.upper()}; add --target {able}, or leave them out"
        if "none" in self.bits:
            return "kernels read packed keys and values alone; give k-bits and v-bits numbers"
        if layer.head_dim not in HEAD_DIMS or layer.group > MOST_HEADS:
            return (
                f"layer {layer.index} has head_dim {layer.head_dim} and {layer.group} query heads to a KV head; "
                f"kernels take head_dim {' or '.join(map(str, HEAD_DIMS))} and up to {MOST_HEADS} heads"
            )
        return ""

    @property
    def choice(self) -> Choice:
        """How its bases are made."""
        return Choice(self.basis, self.centre, self.calibration)

    def plan(self, model: ov.Model, layers: tuple[AttentionLayer, ...]) -> FullCacheSpec:
        """The same with what it needs of the model."""
        spread = orthogonal(layers[0].head_dim, self.seed)
        bases = self.choice.of(model, layers, (spread, spread))
        scaled = {x.index: LayerBases(bases[x.index].key.scaled(x.scale), bases[x.index].value) for x in layers}
        coded = {index: Codecs(*codecs(bits, layers[0].head_dim)) for index, bits in self.allotted(layers)[0].items()}
        return FullCacheSpec(coded, layers, scaled, self.window, self.pruning)

    def give(
        self, model: ov.Model, description: ModelDescription
    ) -> tuple[ov.Model, ModelDescription, Mapping[str, Any]]:
        """The model with that cache; facts tell the layers, and what tells these codecs from others."""
        layers = self.chosen(description)
        plan = self.plan(model, layers)
        form = (
            TARGET[self.target].full(description, plan)
            if self.capacity is None
            else Kernels(description, plan, self.capacity)
        )
        changed = {layer.index: form.rewrite(layer) for layer in layers}
        model = rebuild(model, drop=[path.assign for layer in layers for path in layer.paths], add=form.finish())
        facts = {"layers": plan.indices, **plan.digests, **told(self.choice, plan.bases), **self.allotted(layers)[1]}
        if isinstance(form, Kernels):
            facts["kernels_sha256"] = form.layout.digest
        return model, description.recached(changed, form.states), facts

    def not_as_asked(self, description: ModelDescription) -> str:
        """What of its states is floats in place of codes, or codes in place of floats; empty if nothing is."""
        whole = {what for what, bits in zip(("key", "value"), self.bits, strict=True) if bits == "none"}
        mine = {layer.index for layer in self.chosen(description)}
        for state in description.states:
            if state.holds in ("key", "value") and mine & {*state.layers} and state.real != (state.holds in whole):
                return f"the state {state.name} is {state.type}"
        return ""


@dataclass(frozen=True)
class FullCachePass(BasisPass):
    """A pass that gives such a cache to the full layers that are not protected."""

    exact: ClassVar[bool] = False
    paged_attention: ClassVar[bool] = False
    recaches: ClassVar[bool] = True

    @property
    @abstractmethod
    def packed(self) -> FullCache:
        """What it gives to them, were nothing pruned."""

    @property
    def choice(self) -> Choice:
        """How its bases are made."""
        return self.packed.choice

    def chosen(self, description: ModelDescription) -> tuple[AttentionLayer, ...]:
        """The full layers that are not protected."""
        return self.packed.chosen(description)

    def sites(self, description: ModelDescription) -> int:
        """One per full layer that is not protected."""
        return len(self.chosen(description))

    def needless(self, description: ModelDescription) -> str:
        """In a model without full layers."""
        return "" if description.full else "the model has no full layers"
