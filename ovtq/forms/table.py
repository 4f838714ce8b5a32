"""The forms that a layer's cache is given, by target: a row of each table is all that a new target needs here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from openvino import Node

from ovtq.forms.attend import Plan
from ovtq.forms.cpu import full as cpu_full
from ovtq.forms.cpu import prune as cpu_prune
from ovtq.forms.gpu import full as gpu_full
from ovtq.forms.gpu import histories as gpu_histories
from ovtq.forms.ring import PackedRing, Ring
from ovtq.forms.window import WindowBlocks, WindowRows
from ovtq.models.description import AttentionLayer, ModelDescription, TokenRows
from ovtq.states import StateSpec


class CacheForm(Protocol):
    """Gives some layers another cache, and the attention to it, in the form that a plugin runs fast.

    Made for all its layers at once; `rewrite` is called once for each of them, in any order, then `finish`.
    """

    @property
    def states(self) -> Sequence[StateSpec]:
        """All it made; complete once it is finished."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of calls or texts beyond which a layer takes another way."""

    def rewrite(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer with its new cache; what read its context reads the new one."""

    def rows(self, layer: AttentionLayer) -> TokenRows | None:
        """What tells the past length, if something of a rewritten layer's cache does."""

    def finish(self) -> list[Node]:
        """The Assigns of all states, once every layer is rewritten."""


def _cpu(description: ModelDescription, plan: Plan) -> CacheForm:
    nodes = cpu_full.Nodes(description, plan)
    kinds: dict[str | None, Callable[[cpu_full.Nodes], cpu_full.Keeping]] = {
        None: cpu_full.Appended,
        "evict": cpu_prune.Evicted, "mask": cpu_prune.Masked, "zero": cpu_prune.Masked,
    }  # fmt: skip
    return cpu_full.Blocks(nodes, kinds[plan.mode](nodes))


def _gpu(description: ModelDescription, plan: Plan) -> CacheForm:
    nodes = gpu_full.Nodes(description, plan)
    kinds: dict[str | None, Callable[[gpu_full.Nodes], gpu_full.Keeping]] = {
        None: gpu_full.Appended,
        "evict": gpu_histories.Evicted, "mask": gpu_histories.Masked, "zero": gpu_histories.Masked,
    }  # fmt: skip
    return gpu_full.Branches(nodes, kinds[plan.mode](nodes))


# Each is made for its own plugin alone. The GPU's is verified on a CPU, too, but not to be run there: with a single
# packed layer it can't be reset (P01, `extent.rooted`), and at many heads some long calls are wrong (P59).
FULL: dict[str, Callable[[ModelDescription, Plan], CacheForm]] = {"gpu": _gpu, "cpu": _cpu}
WINDOW: dict[str, Callable[[ModelDescription, int, Ring | PackedRing], CacheForm]] = {
    "gpu": WindowBlocks,
    "cpu": WindowRows,
}
TARGETS = tuple(FULL)
