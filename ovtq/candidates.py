"""What ovtq-eval and ovtq-bench compare: a model folder with the plugin's properties, and what its cache really is.

DIR[,KEY=VALUE]…          a model folder, with properties of the plugin
stock[:KEY=VALUE,…]       the reference's folder, with properties of the plugin
host:k6v4, host:prune128  the reference, its states compressed by the host in numpy, as model cards do
paged:DIR[,KEY=VALUE]…    a model folder under paged attention (CPU)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import openvino as ov
from openvino.op.util import VariableInfo

from ovtq import host
from ovtq.cache import BESIDE, marked, precisions
from ovtq.errors import InputError
from ovtq.gpu_cache import as_gpu_stores
from ovtq.io import load, model_xml, stamp_of
from ovtq.paged import PagedRunner
from ovtq.runner import Runner, computes_in

BITS = {"f32": 32, "f16": 16, "bf16": 16, "u8": 8, "i8": 8, "u4": 4, "u3": 3}
GRIDS = {"u4": 15, "u8": 255}  # steps between a row's smallest and largest element
TURBO_BESIDE = 4  # bytes of a row's norm in the CPU plugin's TURBO cache
PROBE = 40  # tokens after which a cache is looked at
HOSTS = ("INFERENCE_NUM_THREADS", "ENABLE_CPU_PINNING", "PERFORMANCE_HINT")  # what changes no number
PLUGIN_CACHE = (".key", ".value")  # how the names of states end that a plugin may compress


class Subject(Protocol):
    """What a text can be fed to, call by call: a Runner, or whatever does the same."""

    vocabulary: int

    def reset(self) -> None:
        """Forget everything."""

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits (1, tokens, vocabulary) of `ids` (1, tokens)."""


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
    """The candidate of such a text. Raises InputError if it can't be read, or its folder holds no model."""
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


def open_candidate(candidate: Candidate, device: str, defaults: Mapping[str, str], capacity: int = 1024) -> Subject:
    """The candidate's model, compiled; `capacity` tokens are enough under paged attention.

    Raises InputError if it can't be run so.
    """
    if candidate.as_hosts:
        defaults = {name: value for name, value in defaults.items() if name in HOSTS}
    properties = with_defaults(candidate.properties, defaults)
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
    wrong: str = ""  # why it is not what was asked for; empty if it is
    computes: str = ""  # the precision of all else, as the device tells it


def look(candidate: Candidate, subject: Subject, device: str) -> Cache:
    """What the compiled model keeps, from its states, its runtime graph and the values of its cache; leaves it reset.

    On the CPU a compressed cache is seen in its values: a row of u8 lies on 256 equidistant levels, one of u4 on 16.
    A TURBO cache is one that the plugin gives out no values of.
    """
    if isinstance(subject, PagedRunner):
        size = round(sum(size for _, size in subject.caches.values()))
        return Cache(f"paged, {subject.form}", size, 0, computes=computes_in(subject.request.get_compiled_model()))
    draw = np.random.default_rng(0)
    subject.reset()
    subject.step(draw.integers(0, subject.vocabulary, (1, PROBE)))
    compiled = subject.request.get_compiled_model()
    fused = precisions(compiled)
    model = subject.model if isinstance(subject.model, ov.Model) else ov.Core().read_model(subject.model)
    infos = [variable.get_info() for variable in model.get_variables()]
    kept = {"key": None, "value": None}
    wrong = []
    if fused:
        for which in kept:
            kept[which] = _kept(candidate, subject, device, which, fused)
            asked = _asked(candidate.properties, which) or marked(model)
            if asked and kept[which].removeprefix("TURBO ") not in (asked, {"bf16": "f16"}.get(asked)):
                wrong.append(f"{which}s are kept in {kept[which]}, not in {asked}")
    elif _names_a_cache(candidate.properties):
        wrong.append("the plugin keeps no cache of its own in this model, so the properties change nothing")
    most = _most(model)
    per_token, flat = _bytes(infos, kept if fused else None, device, most)
    if candidate.gpu_cache:
        kept = dict.fromkeys(kept, f"{candidate.gpu_cache} by the GPU's arithmetic")
        per_token, flat = _bytes(infos, dict.fromkeys(kept, candidate.gpu_cache), "GPU")
    subject.reset()
    return Cache(_text(candidate, infos, kept, fused), per_token, flat, "; ".join(wrong), computes_in(compiled))


def _asked(given: Mapping[str, str], which: str) -> str | None:
    """The precision that the properties name."""
    return given.get(f"{which.upper()}_CACHE_PRECISION", given.get("KV_CACHE_PRECISION"))


def _kept(candidate: Candidate, subject: Runner, device: str, which: str, fused: list[str]) -> str:
    """The precision of the keys or values that the plugin keeps."""
    if not device.startswith("CPU"):
        return "/".join(dict.fromkeys(fused))
    state = next(s for s in subject.request.query_state() if s.name.endswith(f".{which}"))
    try:
        rows = np.array(state.state.data, np.float64)
    except RuntimeError:
        bits = subject.request.get_compiled_model().get_property(f"{which.upper()}_CACHE_PRECISION").to_string()
        return f"TURBO {bits}"
    low, high = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
    if candidate.change is None:
        for precision, steps in GRIDS.items():
            levels = (rows - low) / np.maximum(high - low, np.finfo(np.float32).tiny) * steps
            if np.abs(levels - np.round(levels)).max() < 0.02:
                return precision
    return fused[0]


def _most(model: ov.Model) -> int | None:
    """How many tokens a pruned model holds at most in the states that ovtq made, by its stamp."""
    steps = stamp_of(model).get("passes", [])
    return next((found["most"] for step in steps if "most" in (found := step["facts"].get("stored", {}))), None)


def _bytes(
    infos: list[VariableInfo], kept: Mapping[str, str | None] | None, device: str, most: int | None = None
) -> tuple[int, int]:
    """Bytes that a token adds to the states, and those that are there whatever the length, for one sequence.

    States of ovtq that hold at most `most` tokens count as there with all of them.
    """
    per_token = flat = 0
    target, floats = ("cpu", 4) if device.startswith("CPU") else ("gpu", 2)
    for info in infos:
        *axes, width = (axis.get_length() if axis.is_static else None for axis in info.data_shape)
        row = width * (floats if info.data_type.is_real() else info.data_type.size)
        grows = None in axes[1:]
        which = info.variable_id.rsplit(".", 1)[-1]
        precision = kept.get(which) if kept and grows and info.data_type.is_real() else None
        if precision:
            bits = BITS[precision.removeprefix("TURBO ")]
            beside = 0 if bits > 8 else TURBO_BESIDE if "TURBO" in precision else BESIDE[target, precision]
            row = width * bits // 8 + beside
        row *= int(np.prod([length for length in axes[1:] if length is not None]))
        if grows and most is not None and info.variable_id.startswith("ovtq."):
            row, grows = row * most, False
        per_token, flat = (per_token + row, flat) if grows else (per_token, flat + row)
    return per_token, flat


def _text(candidate: Candidate, infos: list[VariableInfo], kept: Mapping[str, str | None], fused: list[str]) -> str:
    """One line: what the plugin keeps and which states there are besides."""
    parts = []
    own = [info for info in infos if fused and info.variable_id.endswith(PLUGIN_CACHE)]
    if own:
        same = kept["key"] == kept["value"]
        parts.append(f"{len(fused)} caches {kept['key']}" if same else f"K {kept['key']}, V {kept['value']}")
    rest: dict[str, int] = {}
    for info in infos:
        if info not in own:
            kind = info.data_type.get_type_name()
            rest[kind] = rest.get(kind, 0) + 1
    parts += [f"{count} {kind} state{'s' * (count > 1)}" for kind, count in sorted(rest.items())]
    if candidate.change:
        parts.append("changed by the host")
    return " + ".join(parts)
