"""truncate-window: sliding-window layers keep the tokens they can still see, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import openvino as ov

from ovtq.codec.coding import BITS, coding, unfit
from ovtq.codec.kernel_files import HEAD_DIMS
from ovtq.errors import VerificationFailed
from ovtq.forms.gpu.kernel_window import KernelWindow
from ovtq.forms.table import TARGET, TARGETS, CacheForm
from ovtq.forms.window import PAYS
from ovtq.ir.graph import rebuild
from ovtq.models.description import ModelDescription
from ovtq.passes.base import Pass, Rewrite, option
from ovtq.passes.checks import coupled, not_exported, unequal
from ovtq.states import Growing


@dataclass(frozen=True)
class TruncateWindow(Pass):
    """A query at position t sees the keys t − window < k ≤ t: so the state is the last window − 1 tokens, no others.

    The K and V states of all sliding layers become one state (batch, layers·2·kv_heads, window − 1 + slack, head_dim)
    of fixed length, zero before the text begins: one copy and one wait in a step, where one per layer costs one each.
    Attention is computed in blocks of queries, each against its own window − 1 + block keys: a prefill of n tokens
    costs n·2·window scores per head instead of n², a decode step one block of one query. Query heads that share a KV
    head are rows of one product, so K and V are never broadcast.

    The sink logit is the score of an all-zero key and value row, added to it where the mask is. The exported mask is
    not used: the band is constant, the padding is read from attention_mask.

    For a CPU, a window of more than 256 tokens in a model without sinks has a state a tensor, which grows with the text
    until it is full. What is kept is copied in every step; without sinks the plugin reads its own cache in place, in 8
    bits, so that a larger window is slower cut than whole until a text is several windows long. With `up-to` such
    layers are left as exported.

    GenAI's chat can't cut tokens from the end of such a state; seeing its fixed shape it resets and prefills again
    when a history diverges, which is right. `slack` keeps that many tokens more than needed, masked until a host
    rolls the state back by shifting it.

    With `kernels` each layer has a state of its own, a ring of its last tokens, which an OpenCL kernel writes into in
    place: no copy, and one kernel in a decode step; several tokens are attended to in blocks as without.

    With `k-bits` and `v-bits` the state holds packed codes, as those of quantize-kv are, with the scales in a second
    one. New tokens attend to each other as they are; those of earlier calls are read as x̂ = scale·(code − mid)·Rᵀ, and
    were quantised once, at the end of the call that they came in.

    Refuses if there is no sliding layer, if their windows or shapes differ, or if a length still comes from their
    states (run decouple-length first); with bits, a head_dim that the rotation or the packing can't fill.
    """

    name: ClassVar[str] = "truncate-window"
    paged_attention: ClassVar[bool] = False
    recaches: ClassVar[bool] = True

    slack: int = option(0, "tokens to keep beyond those that can be seen")
    k_bits: str = option("none", "bits per coordinate of a key", choices=BITS)
    v_bits: str = option("none", "bits per coordinate of a value", choices=BITS)
    seed: int = option(0, "seed of the rotation before packing")
    target: str = option("gpu", "whose plugin the graph is made for", choices=TARGETS)
    kernels: bool = option(
        False, "attend with an OpenCL kernel of ovtq, which a GPU is given by the property CONFIG_FILE"
    )
    up_to: int = option(0, "tokens; without sinks, larger windows are left as exported (0: none is)")

    def __post_init__(self) -> None:
        if not 0 <= self.up_to <= 2**20:
            raise ValueError(f"up-to must be from 0 to {2**20} tokens, got {self.up_to}")
        if not 0 <= self.slack <= 4096:
            raise ValueError(f"slack must be from 0 to 4096, got {self.slack}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if (self.k_bits == "none") != (self.v_bits == "none"):
            raise ValueError("k-bits and v-bits go together: give both or neither")
        if self.kernels and not (self.k_bits == "none" and self.slack == 0):
            raise ValueError("kernels keep the window as it is, and no more; leave k-bits, v-bits and slack out")

    @property
    def exact(self) -> bool:
        """Unless the window is packed."""
        return self.k_bits == "none"

    def sites(self, description: ModelDescription) -> int:
        """One per sliding layer."""
        return len(description.sliding)

    def needless(self, description: ModelDescription) -> str:
        """In a model without sliding layers, or with larger windows than it is to cut."""
        if not description.sliding:
            return "the model has no sliding-window layers"
        window = max(layer.reach for layer in description.sliding)
        if description.sinks or not 0 < self.up_to < window:
            return ""
        return (
            f"a window of {window:,} tokens is slower cut than whole in texts of less than some {PAYS * window:,}; for "
            f"longer ones, and for less memory, {self.name}.up-to=0 cuts it"
        )

    def requires(self, description: ModelDescription) -> None:
        """Refuses models without uniform sliding layers in exported form, and those not decoupled yet."""
        layers = description.sliding
        self.refuse_if(self.needless(description))
        self.refuse_if(not_exported(layers) or unequal(layers, "window, heads or head_dim"))
        reason = None if self.exact else unfit((self.k_bits, self.v_bits), layers[0].head_dim)
        self.refuse_if(reason and f"layer {layers[0].index} {reason}")
        self.refuse_if(coupled(description))
        if self.kernels and not TARGET[self.target].kernels:
            raise self.refuse("kernels are for a GPU; add --target gpu, or leave them out")
        if self.kernels and layers[0].head_dim not in HEAD_DIMS:
            sizes = " or ".join(map(str, HEAD_DIMS))
            raise self.refuse(f"layer {layers[0].index} has head_dim {layers[0].head_dim}; kernels take {sizes}")

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Replace each sliding layer's states and attention."""
        layers = description.sliding
        form, made = self._form(description)
        rows = layers[0].reach - 1 + self.slack
        facts = {"window": layers[0].window, "rows": rows, "layers": [layer.index for layer in layers], **made}
        changed = {layer.index: form.rewrite(layer) for layer in layers}
        old = [path.assign for layer in layers for path in layer.paths]
        model = rebuild(model, drop=old, add=form.finish())
        return Rewrite(model, description.recached(changed, form.states), len(changed), facts)

    def _form(self, description: ModelDescription) -> tuple[CacheForm, Mapping[str, Any]]:
        """The form, and what tells its codecs or kernels from others."""
        if self.kernels:
            kernels = KernelWindow(description)
            return kernels, {"kernels_sha256": kernels.layout.digest}
        target = TARGET[self.target]
        how = None if self.exact else coding((self.k_bits, self.v_bits), description.sliding[0].head_dim, self.seed)
        form = target.window(description, self.slack, how, target.beams(description))
        return form, how.digests if how else {}

    def ensures(self, rewrite: Rewrite) -> None:
        """What the sliding layers have is bounded."""
        sliding = {layer.index for layer in rewrite.description.sliding}
        for state in rewrite.description.states:
            if sliding & {*state.layers} and isinstance(state.held, Growing) and state.held.most is None:
                raise VerificationFailed(f"{self.name}: the state {state.name} grows with every text")
