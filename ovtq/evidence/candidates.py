"""What ovtq-eval and ovtq-bench compare: a model folder with the plugin's properties, and what its cache really is."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import openvino as ov

from ovtq import states
from ovtq.errors import InputError
from ovtq.ir.cache import marked, precisions
from ovtq.ir.io import load, model_xml, states_of
from ovtq.ir.operations import core
from ovtq.runtime import host, loading
from ovtq.runtime.gpu_cache import as_gpu_stores
from ovtq.runtime.paged import PagedRunner
from ovtq.runtime.runner import Runner, computes_in
from ovtq.states import TURBO, StateSpec

# How one is written.
GRAMMAR = """candidates:
  DIR[,KEY=VALUE]…            a model folder, with properties of the plugin
  stock[:KEY=VALUE,…]         MODEL_DIR with properties, such as stock:KV_CACHE_PRECISION=u8
  host:k6v4, host:prune128    MODEL_DIR, its states changed by the host in numpy, as model cards do
  paged:DIR[,KEY=VALUE]…      under paged attention (CPU); DIR may be stock
"""
GRIDS = {"u4": 15, "u8": 255}  # steps between a row's smallest and largest element
PROBE = 40  # tokens after which a cache is looked at
HOSTS = ("INFERENCE_NUM_THREADS", "ENABLE_CPU_PINNING", "PERFORMANCE_HINT")  # what changes no number


class Subject(Protocol):
    """What a text can be fed to, call by call: a Runner, or whatever does the same."""

    @property
    def vocabulary(self) -> int:
        """Length of the logits' last axis."""

    def reset(self) -> None:
        """Forget everything."""

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits (1, tokens, vocabulary) of `ids` (1, tokens)."""


Opened = Runner | PagedRunner  # the subjects that a candidate is opened as


@dataclass(frozen=True)
class Candidate:
    """A model folder and how it is run; `label` is how the user wrote it."""

    label: str
    folder: Path
    properties: Mapping[str, str]
    paged: bool = False
    change: host.Quantize | host.ZeroLowNorms | None = None
    gpu_cache: str | None = None  # the GPU plugin's compressed cache as arithmetic, on a CPU
    as_hosts: bool = False  # loaded as hosts do, with no property but its own

    @property
    def xml(self) -> Path:
        """The model's XML. Raises InputError if the folder holds no model."""
        return model_xml(self.folder)


def parse(text: str, reference: Path) -> Candidate:
    """The candidate of a text, as in GRAMMAR. Raises InputError if it can't be read, or its folder holds no model."""
    kind, colon, rest = text.partition(":")
    if kind == "stock" and (colon or text == "stock"):
        candidate = Candidate(text, reference, _properties(text, rest.split(",") if rest else []))
    elif kind == "host" and colon:
        method, *settings = rest.split(",")
        candidate = Candidate(text, reference, _properties(text, settings), change=host.method(method))
    else:
        folder, *settings = (rest if kind == "paged" and colon else text).split(",")
        properties = _properties(text, settings)
        gpu_cache = properties.pop("GPU_CACHE", None)
        where = reference if folder == "stock" else Path(folder)
        candidate = Candidate(text, where, properties, kind == "paged" and bool(colon), gpu_cache=gpu_cache)
    model_xml(candidate.folder)
    return candidate


def as_hosts_load(candidate: Candidate) -> Candidate:
    """The same, loaded with no property but its own."""
    return replace(candidate, label=f"{candidate.label}, as hosts load it", as_hosts=True)


def _properties(text: str, settings: list[str]) -> dict[str, str]:
    if any("=" not in setting for setting in settings):
        raise InputError(f"{text}: write DIR,KEY=VALUE,… or stock:KEY=VALUE,…")
    return dict(setting.split("=", 1) for setting in settings)


def with_defaults(given: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """`given` over `defaults`; a cache's precision given for keys or values leaves the other to the plugin."""
    properties = {**defaults, **given}
    if "KV_CACHE_PRECISION" not in given and _names_a_cache(given):
        properties.pop("KV_CACHE_PRECISION", None)  # it would speak for both
    return properties


def _names_a_cache(given: Mapping[str, str]) -> bool:
    return any(key.startswith(("KV_CACHE_", "KEY_CACHE_", "VALUE_CACHE_")) for key in given)


def open_candidate(candidate: Candidate, device: str, defaults: Mapping[str, str], capacity: int = 1024) -> Opened:
    """The candidate's model, compiled; `capacity` tokens are enough under paged attention.

    Raises InputError if it can't be run so.
    """
    if candidate.as_hosts:
        defaults = {name: value for name, value in defaults.items() if name in HOSTS}
    own = {} if device.startswith("CPU") else loading.properties(candidate.folder)
    properties = own | with_defaults(candidate.properties, defaults)
    if marked(load(candidate.folder)) and not _names_a_cache(candidate.properties):
        properties.pop("KV_CACHE_PRECISION", None)  # the model itself asks for one
    if candidate.paged:
        if device != "CPU":
            raise InputError(f"{candidate.label}: paged attention is run on the CPU only here")
        return PagedRunner(candidate.folder, properties, capacity)
    if candidate.gpu_cache:
        model = load(candidate.folder)
        as_gpu_stores(model, candidate.gpu_cache)
        return Runner(model, device, properties)
    if candidate.change:
        runner = host.HostRunner(candidate.xml, device, properties)
        runner.change = candidate.change
        return runner
    return Runner(candidate.xml, device, properties)


@dataclass(frozen=True)
class Cache:
    """What a candidate's cache is, as the running model shows it."""

    text: str
    per_token: int | None  # bytes
    flat: int | None
    bytes: Callable[[int], int]  # after so many tokens
    wrong: str = ""  # why it is not what was asked for; empty if it is
    computes: str = ""  # the precision of all else, as the device tells it


def inspect_cache(candidate: Candidate, subject: Opened, device: str) -> Cache:
    """What the compiled model keeps, from its states, its runtime graph and the values of its cache; leaves it reset.

    On the CPU a compressed cache is seen in its values: a row of u8 lies on 256 equidistant levels, one of u4 on 16.
    A TURBO cache is one that the plugin gives out no values of.
    """
    if isinstance(subject, PagedRunner):
        size = round(sum(size for _, size in subject.caches.values()))
        computes = computes_in(subject.request.get_compiled_model())
        return Cache(f"paged, {subject.form}", size, 0, functools.partial(operator.mul, size), computes=computes)
    draw = np.random.default_rng(0)
    subject.reset()
    subject.step(draw.integers(0, subject.vocabulary, (1, PROBE)))
    compiled = subject.request.get_compiled_model()
    fused = precisions(compiled)
    model = subject.model if isinstance(subject.model, ov.Model) else core().read_model(subject.model)
    these = states_of(model)
    kept: dict[str, str | None] = {"key": None, "value": None}
    wrong = []
    if fused:
        for which in kept:
            kept[which] = found = _kept(candidate, subject, these, device, which, fused)
            asked = _asked(candidate.properties, which) or marked(model)
            if asked and found.removeprefix(TURBO) not in (asked, {"bf16": "f16"}.get(asked)):
                wrong.append(f"{which}s are kept in {found}, not in {asked}")
    elif _names_a_cache(candidate.properties):
        wrong.append("the plugin keeps no cache of its own in this model, so the properties change nothing")
    target, precision = "cpu" if device.startswith("CPU") else "gpu", kept if fused else None
    if candidate.gpu_cache:
        kept = dict.fromkeys(kept, f"{candidate.gpu_cache} by the GPU's arithmetic")
        target, precision = "gpu", dict.fromkeys(kept, candidate.gpu_cache)
    subject.reset()
    text = _text(candidate, these, kept, fused)
    sizes = states.per_token(these, target, precision), states.flat(these, target, precision)
    total = functools.partial(states.total, these, target=target, precision=precision)
    return Cache(text, *sizes, total, "; ".join(wrong), computes_in(compiled))


def _asked(given: Mapping[str, str], which: str) -> str | None:
    """The precision that the properties name."""
    return given.get(f"{which.upper()}_CACHE_PRECISION", given.get("KV_CACHE_PRECISION"))


def _kept(
    candidate: Candidate, subject: Runner, these: Sequence[StateSpec], device: str, which: str, fused: list[str]
) -> str:
    """The precision of the keys or values that the plugin keeps."""
    if not device.startswith("CPU"):
        return "/".join(dict.fromkeys(fused))
    names = {state.name for state in these if state.native and state.holds == which}
    state = next(s for s in subject.request.query_state() if s.name in names)
    try:
        rows = np.array(state.state.data, np.float64)
    except RuntimeError:
        bits = subject.request.get_compiled_model().get_property(f"{which.upper()}_CACHE_PRECISION").to_string()
        return f"{TURBO}{bits}"
    low, high = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
    if candidate.change is None:
        for precision, steps in GRIDS.items():
            levels = (rows - low) / np.maximum(high - low, np.finfo(np.float32).tiny) * steps
            if np.abs(levels - np.round(levels)).max() < 0.02:
                return precision
    return fused[0]


def _text(candidate: Candidate, these: Sequence[StateSpec], kept: Mapping[str, str | None], fused: list[str]) -> str:
    """One line: what the plugin keeps and which states there are besides."""
    parts = []
    own = [state for state in these if fused and state.native]
    if own:
        same = kept["key"] == kept["value"]
        parts.append(f"{len(fused)} caches {kept['key']}" if same else f"K {kept['key']}, V {kept['value']}")
    rest: dict[str, int] = {}
    for state in these:
        if state not in own:
            rest[state.type] = rest.get(state.type, 0) + 1
    parts += [f"{count} {kind} state{'s' * (count > 1)}" for kind, count in sorted(rest.items())]
    if candidate.change:
        parts.append("changed by the host")
    return " + ".join(parts)
