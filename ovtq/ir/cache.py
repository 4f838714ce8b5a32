"""The KV cache that a plugin keeps of a full layer: how to ask for its precision, and what it then really is."""

from __future__ import annotations

from pathlib import Path

import openvino as ov

from ovtq.errors import InputError
from ovtq.ir.io import last_line
from ovtq.ir.operations import core

# In rt_info. The first is read by the CPU plugin, and by the GPU plugin on chips without XMX; the second by the GPU
# plugin on all chips.
MARKS = (("runtime_options", "KV_CACHE_PRECISION"), ("auxiliary_kv_cache_precision",))


def mark(model: ov.Model, precision: str) -> None:
    """Ask whatever compiles `model` for a KV cache of that precision."""
    for path in MARKS:
        model.set_rt_info(precision, list(path))


def marked(model: ov.Model) -> str | None:
    """The precision that `mark` asked for, None if nothing did."""
    found = {_told(model, path) for path in MARKS}
    return found.pop() if len(found) == 1 else None


def _told(model: ov.Model, path: tuple[str, ...]) -> str | None:
    """What rt_info has at a path; None also where a text stands in place of what leads there."""
    try:
        return str(model.get_rt_info(list(path)).value) if model.has_rt_info(list(path)) else None
    except RuntimeError:
        return None


def compiled_precisions(model: ov.Model | Path, device: str) -> list[str]:
    """The precision of each K and V cache that the plugin keeps, from the model as compiled with no property set.

    The CPU plugin tells it of each attention. The GPU plugin shows bytes in place of u8 and u4: then it is what the
    compiled model was asked for. Raises InputError if the device does not compile it.
    """
    try:
        compiled = core().compile_model(model, device)
    except RuntimeError as error:
        raise InputError(f"{device} does not compile the converted model ({last_line(error)})") from None
    return precisions(compiled)


def precisions(compiled: ov.CompiledModel) -> list[str]:
    """The same of a model that is compiled already."""
    asked = compiled.get_property("KV_CACHE_PRECISION").to_string()
    found: list[str] = []
    for node in compiled.get_runtime_model().get_ops():
        info = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        if "kv_cache_precision" in info:
            found += [info["kv_cache_precision"]] * 2
        elif info["layerType"] == "kv_cache":
            kind = info["outputPrecisions"].split(",")[0]
            found.append({"i8": "u8"}.get(asked, asked) if kind == "i8" else kind)
    return found
