"""The targets: a folder of files and a row of this table is all that a new one needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from openvino import Node

from ovtq.codec.coding import Coding
from ovtq.forms.attend import FullCacheSpec
from ovtq.forms.beams import Beams
from ovtq.forms.cpu import full as cpu_full
from ovtq.forms.cpu import prune as cpu_prune
from ovtq.forms.cpu.beams import CpuBeams
from ovtq.forms.cpu.growing_window import LEAST, CpuGrowingState, CpuGrowingWindow
from ovtq.forms.cpu.window import CpuWindow, CpuWindowState
from ovtq.forms.gpu import full as gpu_full
from ovtq.forms.gpu import histories as gpu_histories
from ovtq.forms.gpu.beams import GpuBeams
from ovtq.forms.gpu.window import GpuWindow
from ovtq.forms.pruning import Pruning
from ovtq.forms.window_state import PackedWindowState, WindowState
from ovtq.models.description import AttentionLayer, ModelDescription, TokenRows
from ovtq.states import WINDOW, StateSpec


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


def _cpu(description: ModelDescription, plan: FullCacheSpec) -> CacheForm:
    nodes = cpu_full.Nodes(description, plan)
    kinds: dict[str | None, Callable[[cpu_full.Nodes], cpu_full.Keeping]] = {
        None: cpu_full.Appended,
        "evict": cpu_prune.Evicted, "mask": cpu_prune.Masked, "zero": cpu_prune.Masked,
    }  # fmt: skip
    return cpu_full.CpuFull(nodes, kinds[plan.mode](nodes))


def _gpu(description: ModelDescription, plan: FullCacheSpec) -> CacheForm:
    nodes = gpu_full.Nodes(description, plan)
    kinds: dict[str | None, Callable[[gpu_full.Nodes], gpu_full.Keeping]] = {
        None: gpu_full.Appended,
        "evict": gpu_histories.Evicted, "mask": gpu_histories.Masked, "zero": gpu_histories.Masked,
    }  # fmt: skip
    return gpu_full.GpuFull(nodes, kinds[plan.mode](nodes))


def _cpu_window(description: ModelDescription, slack: int, coding: Coding | None, beams: Beams) -> CacheForm:
    layers, rows = description.sliding, description.sliding[0].reach - 1 + slack
    if coding is None and layers[0].reach > LEAST and not description.sinks:
        return CpuGrowingWindow(description, slack, CpuGrowingState(description, layers, rows, beams))
    return CpuWindow(description, slack, _window_state(CpuWindowState, description, rows, coding, beams))


def _gpu_window(description: ModelDescription, slack: int, coding: Coding | None, beams: Beams) -> CacheForm:
    rows = description.sliding[0].reach - 1 + slack
    return GpuWindow(description, slack, _window_state(WindowState, description, rows, coding, beams))


def _window_state(
    floats: type[WindowState], description: ModelDescription, rows: int, coding: Coding | None, beams: Beams
) -> WindowState | PackedWindowState:
    if coding is None:
        return floats(description, WINDOW, description.sliding, rows, beams)
    return PackedWindowState(description, WINDOW, description.sliding, rows, coding, beams)


@dataclass(frozen=True)
class Target:
    """What a model for one plugin is made of. Each form is made for its own plugin alone.

    `batch` is how many tokens over the budget are waited for before any is evicted, unless said; `unfit` why a rule of
    pruning can't be carried out, empty if it can. `kernels`: the plugin runs those of ovtq. `counts`: past tokens are
    counted in a state of their own, for no cache of ovtq holds a row for each of them.
    """

    beams: type[Beams]
    full: Callable[[ModelDescription, FullCacheSpec], CacheForm]
    window: Callable[[ModelDescription, int, Coding | None, Beams], CacheForm]  # with a slack, packed or not
    batch: int
    unfit: Callable[[Pruning], str]
    kernels: bool
    counts: bool


# The GPU's is verified on a CPU, too, but not to be run there: with a single packed layer it can't be reset (P01,
# `extent.keep_initial_values`).
TARGET = {
    "gpu": Target(GpuBeams, _gpu, _gpu_window, 0, gpu_histories.unfit, kernels=True, counts=False),
    "cpu": Target(CpuBeams, _cpu, _cpu_window, 127, cpu_prune.unfit, kernels=False, counts=True),
}
TARGETS = tuple(TARGET)
