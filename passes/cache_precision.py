"""cache-precision: ask the runtime to compress the KV cache that it keeps, by a mark in the IR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import openvino as ov

from ovtq.errors import VerificationFailed
from ovtq.ir.cache import mark, marked
from ovtq.models.description import Exported, ModelDescription, SinkRow, Window
from ovtq.passes.base import Pass, Rewrite, option


@dataclass(frozen=True)
class CachePrecision(Pass):
    """Whatever loads the model keeps the K and V that no pass took in 8 or 4 bits, unless told another precision.

    No property has to be passed, by no host. OpenVINO's own mark for it, `runtime_options` in rt_info, is ignored by
    the GPU plugin on chips with XMX (Arc, Lunar Lake); the one that it takes on all chips was made for another purpose,
    and both are written. Lossy: by how much is the plugin's affair.

    Refuses a model that has no such layer left, and one with a sink row (which is for the GPU) beside windows that are
    not packed: while there are floats in another state, the GPU plugin compresses none.
    """

    name: ClassVar[str] = "cache-precision"
    exact: ClassVar[bool] = False
    paged_attention: ClassVar[bool] = True

    precision: str = option("u8", "of keys and values in the plugin's cache", choices=("u8", "u4"))

    def sites(self, description: ModelDescription) -> int:
        """One per layer whose cache is the plugin's own."""
        return sum(isinstance(layer.cache, Exported | SinkRow) for layer in description.layers)

    def needless(self, description: ModelDescription) -> str:
        """Where no layer's cache is the plugin's own."""
        return "" if self.sites(description) else "no layer's cache is left to the plugin"

    def requires(self, description: ModelDescription) -> None:
        """Refuses a model without such layers, or with a cache that a GPU would not compress."""
        self.refuse_if(self.needless(description))
        sink_row = any(isinstance(layer.cache, SinkRow) for layer in description.full)
        if sink_row and any(isinstance(layer.cache, Window) for layer in description.sliding):
            raise self.refuse(
                "the GPU plugin compresses no cache beside windows of floats; pack them, as with --window-bits 8,8"
            )

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Write the marks."""
        mark(model, self.precision)
        return Rewrite(model, description, self.sites(description), {"cache_precision": self.precision})

    def ensures(self, rewrite: Rewrite) -> None:
        """The marks are there."""
        if (found := marked(rewrite.model)) != self.precision:
            raise VerificationFailed(f"{self.name}: expected {self.precision} in rt_info, found {found}")
