"""`ovtq` for programs: what `import ovtq` gives. Nothing is printed; whatever is wrong is raised as an `ovtq.errors`.

Options are those of ovtq-convert, by the same names (`ovtq.options`).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import openvino as ov

from ovtq import child, conversion, files
from ovtq.codec import moments
from ovtq.conversion import Conversion, OnProgress, counted
from ovtq.errors import InputError, OvtqError, foreseen, telling
from ovtq.forms import pruning
from ovtq.ir import cache, io
from ovtq.models import ModelDescription, projections
from ovtq.models import describe as described
from ovtq.options import Checks, Options, PassList, Settings, among
from ovtq.passes import QuantizeKv
from ovtq.pipeline import PRESETS
from ovtq.prefix import load_state, read_prompt, save_state
from ovtq.runtime.loading import extensions, load, properties
from ovtq.runtime.runner import check_device
from ovtq.verification.verify import Difference

__all__ = [
    "PRESETS",
    "Conversion",
    "compress",
    "convert",
    "describe",
    "extensions",
    "load",
    "load_state",
    "properties",
    "pruning_counts",
    "read_prompt",
    "save_state",
    "state_bytes",
    "verify",
]

Folder = str | Path
Config = Mapping[str, Any] | str | Path  # of a model: what config.json holds, that file, or its folder


@runtime_checkable
class Host(Protocol):
    """What of optimum-intel's OVModelForCausalLM is used here, which nothing has to be imported for."""

    model: Any
    config: Any

    def replace_ov_model(self, current_model: ov.Model, new_model: ov.Model) -> None:
        """Take another graph, and forget what was compiled."""


M = TypeVar("M", bound="ov.Model | Host")


class PruningCounts(NamedTuple):
    """Tokens of one layer, (batch, kv_heads) each, without padding."""

    pruned: np.ndarray
    kept: np.ndarray


@telling
def compress(
    model: M,
    config: Config | None = None,
    *,
    preset: str | None = None,
    target: str = "gpu",
    passes: PassList | None = None,
    k_bits: int | str | None = None,
    v_bits: int | str | None = None,
    bits: str | None = None,
    budget_kld: float | None = None,
    residual_window: int | None = None,
    protect: str | None = None,
    centre: str | None = None,
    kernels: bool | None = None,
    capacity: int | None = None,
    extension: bool | None = None,
    window_bits: Sequence[int | str] | None = None,
    basis: str | None = None,
    calibration: str | Path | None = None,
    budget: int | None = None,
    recent_window: int | None = None,
    prefix: int | None = None,
    score: str | None = None,
    stats: str | Path | None = None,
    mode: str | None = None,
    slack: int | None = None,
    heads: str | None = None,
    settings: Settings | None = None,
) -> M:
    """Rewrite a model in memory so that its KV cache is smaller. Nothing is verified: `ovtq.convert` and `verify` do.

    An `ov.Model` is left as it is; the result shares its weights, and has what was done in its rt_info, as a written
    one has. `config` is what its config.json holds, that file, or its folder. An OVModelForCausalLM of optimum-intel is
    changed in place and returned; it compiles again when it is used next, and `save_pretrained` writes the new model.

    `preset` is one of PRESETS, or "auto" (if there is none, nor `passes`), which takes what was measured to be best for
    target and model (`ovtq.automatic`); `target` is gpu or cpu. All else as for ovtq-convert; None: as the preset has
    it. Raises InputError, UnsupportedModel or PreconditionFailed; the model is then as it was.
    """
    options = among(Options, locals())
    graph = _graph(model)
    options.refuse_bad()  # before the rest takes seconds
    facts = _config(model, config)
    conversion.refuse_converted("the model", graph)
    copy = graph.clone()  # passes reuse the nodes of what they are given
    description = described(copy, facts)
    folder = _folder_of(config) if isinstance(config, str | Path) else None
    calibrated = folder is not None and (folder / moments.NAME).is_file()
    options, _ = options.settled(description, calibrated, lambda: projections.tell(copy, description.layers))
    items = options.chosen(description=description)
    if any(isinstance(item, QuantizeKv) and item.kernels for item in items):
        raise InputError("kernels are files beside a model, which is written for them: use ovtq.convert")
    if folder is not None:
        items = tuple(item.at(folder) for item in items)
    made = conversion.rewrite(copy, description, options, items)
    conversion.stamp(made)
    if isinstance(model, ov.Model):
        return cast(M, made.model)
    model.replace_ov_model(graph, made.model)
    return model


def convert(
    model_dir: Folder,
    out_dir: Folder | None,
    *,
    preset: str | None = None,
    target: str = "gpu",
    passes: PassList | None = None,
    k_bits: int | str | None = None,
    v_bits: int | str | None = None,
    bits: str | None = None,
    budget_kld: float | None = None,
    residual_window: int | None = None,
    protect: str | None = None,
    centre: str | None = None,
    kernels: bool | None = None,
    capacity: int | None = None,
    extension: bool | None = None,
    window_bits: Sequence[int | str] | None = None,
    basis: str | None = None,
    calibration: str | Path | None = None,
    budget: int | None = None,
    recent_window: int | None = None,
    prefix: int | None = None,
    score: str | None = None,
    stats: str | Path | None = None,
    mode: str | None = None,
    slack: int | None = None,
    heads: str | None = None,
    settings: Settings | None = None,
    verify: bool = True,
    verify_device: str = "CPU",
    verify_seed: int = 0,
    verify_layers: int | None = None,
    force: bool = False,
    card: bool = True,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Convert a model's folder into another, as ovtq-convert does: verified, whole or not at all.

    `out_dir` None: tell what would be done, write and verify nothing. `force` replaces a folder that ovtq made.
    `card`: leave a model card, README.md, in it.
    `on_progress(stage, done, total)` is called as each of the stages read, rewrite, write and verify begins and goes
    on; what it raises ends the conversion. The work is done in a process of its own, so that OpenVINO's death is an
    InputError. Options as of `compress`, `verify_…` as of ovtq-convert. Raises OvtqError;
    `model_dir` is never changed.
    """
    options, checks = among(Options, locals()), among(Checks, locals())
    raised: list[Exception] = []

    def told(stage: str, done: int, total: int) -> None:
        try:
            if on_progress:
                on_progress(stage, done, total)
        except Exception as error:
            raised.append(error)
            raise

    with foreseen(raised):
        options.refuse_bad()  # said at once, before a process is started
        checks.refuse_bad()
        given = _path(model_dir, "model_dir"), _out(out_dir), options, checks, force, card
        return _converted(given, told, raised)


def _converted(
    given: tuple[Path, Path | None, Options, Checks, bool, bool], told: OnProgress, raised: Sequence[Exception]
) -> Conversion:
    """In a process of its own, if what is given can be sent there. What `told` raised is raised here."""
    try:
        try:
            return cast(Conversion, child.call("ovtq.conversion", "convert_as_given", *given, on_progress=told))
        except child.Unsendable:  # a pass of the caller's own script
            return conversion.convert_as_given(*given, on_progress=told)
    except OvtqError:
        if raised:  # not one of the disk or of the model, as which it was taken
            raise raised[0] from None
        raise


@telling
def describe(model: ov.Model | Host | Folder, config: Config | None = None) -> ModelDescription:
    """The attention layers and states of a model as exported, in memory or in a folder.

    `config` as of `compress`; a folder and an OVModelForCausalLM have their own. Raises InputError for a converted
    model, UnsupportedModel for one of no known architecture.
    """
    if isinstance(model, str | Path):
        graph, facts = io.load(Path(model)), _config(model, Path(model) if config is None else config)
    else:
        graph, facts = _graph(model), _config(model, config)
    conversion.refuse_converted(model if isinstance(model, str | Path) else "the model", graph)
    return described(graph, facts)


@telling
def verify(
    original: ov.Model | Folder,
    converted: ov.Model | Host | Folder,
    config: Config | None = None,
    *,
    device: str = "CPU",
    calibration: str | Path | None = None,
) -> Difference:
    """Run a converted model beside the original, as ovtq-convert does before it writes; says how far apart they are.

    Folders, or models in memory, which are written to a temporary folder for it; `config` is then that of the original.
    The recorded passes are run again: the converted model must be what they make. Statistics of a text that they need
    are those in a folder of the two, or in that of `config`; else name the file, `calibration`. Raises
    VerificationFailed if it is not, or wrong on the device; InputError if the device can't run it, if it was not made
    by ovtq, or if there are no such statistics.
    """
    with tempfile.TemporaryDirectory(prefix="ovtq-", ignore_cleanup_errors=True) as scratch:
        if isinstance(original, str | Path):
            first = Path(original)
        else:
            first = _written(original, Path(scratch) / "original")
            text = json.dumps(dict(_config(original, config)))
            files.write(first / "config.json", text)
        if isinstance(converted, str | Path):
            other = Path(converted)
        else:
            other = _written(converted, Path(scratch) / "converted")
        if not io.stamp_of(io.load(other)):
            what = converted if isinstance(converted, str | Path) else "the converted model"
            raise InputError(f"{what}: not made by ovtq; give the original first, then the converted")
        check_device(device)
        others = [] if config is None or isinstance(config, Mapping) else [_folder_of(config)]
        if calibration is not None:
            others.append(Path(scratch) / "statistics")
            others[-1].mkdir()
            files.copy(_statistics(Path(calibration)), others[-1] / moments.NAME)
        return child.call("ovtq.verification.recheck", "recheck", first, other, device, *others)


@telling
def state_bytes(model: ov.Model | Host | Folder, tokens: int, *, target: str | None = None, batch: int = 1) -> int:
    """Bytes of all states of a model, in memory or in a folder, after `tokens` tokens on a target.

    `target` is gpu or cpu; None: what a converted model is for, or gpu. Floating-point states are counted at f16 on a
    GPU and at f32 on a CPU, a cache that the plugin keeps in the precision that the model asks for. Raises InputError.
    """
    graph = io.load(Path(model)) if isinstance(model, str | Path) else _graph(model)
    stamp = io.stamp_of(graph)
    known = stamp.get("target")
    if known is None and stamp and isinstance(model, str | Path):
        known = io.record_of(Path(model)).get("target")
    return counted(io.states_of(graph), tokens, target or known or "gpu", cache.marked(graph), batch)


@telling
def pruning_counts(request: ov.InferRequest) -> dict[int, PruningCounts]:
    """How many tokens each pruned layer of a running model has lost so far and still has, by layer.

    Empty for a model without prune-kv, and before the first call. `request` is what runs the model: an infer request,
    such as an OVModelForCausalLM has in `.request`.
    """
    went, stay = pruning.pruned(request), pruning.kept(request)
    return {layer: PruningCounts(count, stay[layer]) for layer, count in went.items()}


def _graph(model: Any) -> ov.Model:
    graph = model if isinstance(model, ov.Model) else model.model if isinstance(model, Host) else None
    if not isinstance(graph, ov.Model):
        raise InputError(
            f"expected an ov.Model or an OVModelForCausalLM (not compile_only), got {type(model).__name__}"
            + (f" of {type(graph).__name__}" if graph is not None else "")
        )
    return graph


def _written(model: ov.Model | Host, folder: Path) -> Path:
    folder.mkdir()
    ov.save_model(_graph(model), folder / f"{io.MODEL}.xml", compress_to_fp16=False)
    return folder


def _out(out_dir: Folder | None) -> Path | None:
    return None if out_dir is None else _path(out_dir, "out_dir")


def _path(given: Folder, name: str) -> Path:
    """Raises InputError for what is no path, or an empty text, which would be the working directory."""
    if not isinstance(given, str | os.PathLike) or "\0" in str(given):
        raise InputError(f"{name}: expected a path, got {given!r}")
    if not str(given).strip():
        raise InputError(f"{name} is empty")
    return Path(given)


def _statistics(path: Path) -> Path:
    """That file. Raises InputError if it holds no statistics."""
    moments.load(path)
    return path


def _folder_of(config: Folder) -> Path:
    return Path(config) if Path(config).is_dir() else Path(config).parent


def _config(model: Any, config: Config | None) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if isinstance(config, str | Path):
        path = Path(config)
        return io.load_config(path) if path.is_dir() else io.load_config(path.parent, path.name)
    if config is not None:
        raise InputError(f"config: expected a mapping, or the path of a config.json, got {type(config).__name__}")
    if isinstance(model, Host):
        return cast(Mapping[str, Any], model.config.to_dict())
    raise InputError("config is missing: give what config.json of the model holds, or its path")
