"""quantize-kv: keep the keys and values of full layers as packed codes, quantised once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import openvino as ov

from ovtq.codec.coding import BITS
from ovtq.errors import VerificationFailed
from ovtq.forms.table import TARGETS
from ovtq.models.description import ModelDescription
from ovtq.passes.base import Rewrite, basis_option, calibration_option, centre_option, option
from ovtq.passes.full_cache import FullCache, FullCachePass


@dataclass(frozen=True)
class QuantizeKv(FullCachePass):
    """softmax(q·K̂ᵀ)·V̂ with K̂, V̂ = scale·(code − mid) for all tokens but the recent ones, which stay as they are.

    A token's key and value are quantised once and never again: bytes and scale are appended to the states. The last
    `residual-window` tokens (at least: a target may keep a few more) are held at full precision; new tokens attend to
    each other, and to these, as they are.

    Keys are centred first: softmax does not change when every key is shifted by the same vector c and the sink logit
    by −q·c, and what is left of a key with a strong bias is smaller. c is the mean of the bias as RoPE turns it over
    the first positions, which is what does not turn: it costs nothing by token, where adding back q·RoPE_t(b) would
    cost a product as large as that with the keys. The sink's row in the recent keys is −c. With statistics of a text c
    is the mean key, and values lose theirs, too, which the result is given back once.

    Codes are of vectors in a basis: a rotation, or one that balances what keys are multiplied with against what they
    are (`ovtq.codec.basis`), for each KV head. The inverse merges into the decoding, so it costs nothing.

    With `bits` layers have widths of their own: as named, or, auto, the fewest bytes whose loss is predicted to be
    within `budget-kld`, by what statistics say that each layer's keys and values cost (`ovtq.codec.allotment`).

    Refuses models whose full layers no longer have the exported KV states, whose lengths come from them (run
    decouple-length first), or whose shapes differ; and a head_dim that the packing can't fill. Source: TurboQuant
    (arXiv 2504.19874), Algorithm 1, with the step of `ovtq.codec.AdaptiveUniform` instead of a fixed codebook;
    SageAttention (arXiv 2410.02367), section 4.2, for centred keys; KIVI (arXiv 2402.02750) for the residual window.
    """

    name: ClassVar[str] = "quantize-kv"

    k_bits: str = option("6", "bits per coordinate of a key", choices=BITS)
    v_bits: str = option("4", "bits per coordinate of a value", choices=BITS)
    bits: str = option(
        "", "bits of layers of their own, LAYER:K/V,… such as 0:6/4,3:4/3; or auto, by what each loses of budget-kld"
    )
    budget_kld: float = option(0.0, "with bits auto: the mean KLD, in nats, that may be predicted of the whole model")
    residual_window: int = option(64, "recent tokens kept at full precision")
    protect: str = option("", "full layers left alone: first:N, last:N or indices, separated by commas")
    centre: str = centre_option()
    seed: int = option(0, "seed of the rotation's random signs")
    target: str = option("gpu", "whose plugin the graph is made for", choices=TARGETS)
    kernels: bool = option(False, "experimental, on a GPU: attend by kernels of ovtq")
    capacity: int = option(32768, "tokens that kernels have room for, taken up front")
    basis: str = basis_option()
    calibration: str = calibration_option()

    def __post_init__(self) -> None:
        if not 0 <= self.residual_window <= 4096:
            raise ValueError(f"residual-window must be from 0 to 4096, got {self.residual_window}")
        if self.k_bits == self.v_bits == "none":
            raise ValueError("k-bits and v-bits are both none; leave the pass out")
        if not 1024 <= self.capacity <= 2**20:
            raise ValueError(f"capacity must be from 1024 to {2**20} tokens, got {self.capacity}")
        _ = self.packed

    @property
    def packed(self) -> FullCache:
        """What it gives to full layers."""
        bits = self.k_bits, self.v_bits
        capacity = self.capacity if self.kernels else None
        return FullCache(
            bits, self.residual_window, self.protect, self.centre, self.seed, self.target,
            basis=self.basis, calibration=self.calibration, capacity=capacity, by_layer=self.bits, most=self.budget_kld,
        )  # fmt: skip

    def requires(self, description: ModelDescription) -> None:
        """Refuses models without such layers in exported form, and those not decoupled yet."""
        self.refuse_if(self.packed.unfit(description))

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Replace each layer's states and attention."""
        sites = self.sites(description)
        model, description, facts = self.packed.give(model, description)
        return Rewrite(model, description, sites, facts)

    def ensures(self, rewrite: Rewrite) -> None:
        """No layer that was packed has floats in place of codes."""
        if fault := self.packed.not_as_asked(rewrite.description):
            raise VerificationFailed(f"{self.name}: {fault}")
