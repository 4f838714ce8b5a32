"""ovtq: shrinks the KV cache of stateful OpenVINO language models by rewriting their graph."""

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovtq import codec, errors
    from ovtq.api import (
        PRESETS,
        Conversion,
        compress,
        convert,
        describe,
        extensions,
        load,
        load_state,
        properties,
        pruning_counts,
        read_prompt,
        save_state,
        state_bytes,
        verify,
    )

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Conversion",
    "__version__",
    "codec",
    "compress",
    "convert",
    "describe",
    "errors",
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

# A checkout keeps passes/ and models/ beside ovtq/; a wheel carries them inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

# Our commands send nobody anything: without this package OpenVINO's telemetry is a stub (it asks for a name's address
# whenever OpenVINO is imported). Set in the processes of the commands and of `convert` and `verify`.
if os.environ.get("OVTQ_TELEMETRY") == "off":
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

_MODULES = ("codec", "errors")


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first asked for: `import ovtq` alone loads no OpenVINO."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(f"ovtq.{name}")
    found = getattr(importlib.import_module("ovtq.api"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
