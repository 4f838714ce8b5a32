"""Loading a converted model into a host: what a host has to be given where kernels of ovtq attend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from ovtq import files
from ovtq.codec.kernel_files import CONFIG, FOLDER
from ovtq.errors import InputError, telling
from ovtq.staging import RECORD

if TYPE_CHECKING:
    from openvino_genai import LLMPipeline
    from optimum.intel import OVModelForCausalLM

    from ovtq.ir.operations import Operation

HOSTS = {"genai": "ovtq[genai]", "optimum": "ovtq[optimum]"}  # and what installs them


@telling
def properties(model_dir: Path | str) -> dict[str, str]:
    """The properties that a converted model is compiled with: CONFIG_FILE and no model cache, if it has kernels.

    Of any other there are none. What is loaded from a model cache ends the process on the emulated device, and
    optimum-intel sets CACHE_DIR unless it is given.

    For a GPU, by any host: LLMPipeline(DIR, "GPU", **properties(DIR)), OVModelForCausalLM.from_pretrained(DIR,
    device="GPU", ov_config=properties(DIR)), core.compile_model(xml, "GPU", properties(DIR)).
    """
    path = _config(model_dir)
    return {"CONFIG_FILE": str(path.resolve()), "CACHE_DIR": ""} if path.is_file() else {}


@telling
def extensions(model_dir: Path | str) -> list[type[Operation]]:
    """The operations that a host needs to read a converted model, if it was converted with `--extension`.

    LLMPipeline(DIR, "GPU", extensions=extensions(DIR), **properties(DIR)); core.add_extension(x) for each.
    """
    path = _config(model_dir)
    if not path.is_file():
        return []
    from ovtq.ir.operations import OPERATIONS, TYPES

    text = files.read_text(path)
    return list(OPERATIONS) if any(f'"{kind}"' in text for kind in TYPES.values()) else []


@overload
def load(
    model_dir: Path | str, host: Literal["genai"] = "genai", device: str | None = None, **given: Any
) -> LLMPipeline: ...


@overload
def load(
    model_dir: Path | str, host: Literal["optimum"], device: str | None = None, **given: Any
) -> OVModelForCausalLM: ...


def load(model_dir: Path | str, host: str = "genai", device: str | None = None, **given: Any) -> Any:
    """A converted model in a host, with the properties and operations that it needs: for models with kernels.

    Any other is loaded as the host does without. `host` is genai, an openvino_genai.LLMPipeline, or optimum, an
    optimum.intel.OVModelForCausalLM; `device` is GPU or CPU, as the model was made for, if none is named. What else is
    given goes to the host: properties to genai, keywords (`ov_config` among them) to optimum. Raises InputError for a
    folder without a model, an unknown host, one that is not installed, and for a model with kernels another device than
    a GPU, or a CACHE_DIR; what a host raises is left as it is.
    """
    folder = _folder(model_dir, host)
    device, own, more = device or _device(folder), properties(folder), extensions(folder)
    if own and "GPU" not in device:
        raise InputError(f"{folder}: its kernels run on a GPU, not on {device}; convert it without --kernels for that")
    config = given if host == "genai" else given.pop("ov_config", None) or {}
    if own and config.get("CACHE_DIR"):
        raise InputError(f"{folder}: its kernels can't be loaded from a model cache; leave CACHE_DIR out")
    try:
        if host == "genai":
            from openvino_genai import LLMPipeline

            return LLMPipeline(str(folder), device, **({"extensions": more} if more else {}), **{**own, **config})
        from optimum.intel import OVModelForCausalLM
        from optimum.intel.openvino import modeling_base
    except ImportError as error:
        raise InputError(f"{host} is not installed ({error}): pip install '{HOSTS[host]}'") from None
    for kind in more:
        modeling_base.core.add_extension(kind)
    return OVModelForCausalLM.from_pretrained(str(folder), device=device, ov_config={**own, **config}, **given)


@telling
def _folder(model_dir: Path | str, host: str) -> Path:
    folder = Path(model_dir)
    if not (folder / "openvino_model.xml").is_file():
        raise InputError(f"{folder} has no openvino_model.xml")
    if host not in HOSTS:
        raise InputError(f"host is one of {', '.join(HOSTS)}, got {host!r}")
    return folder


def _config(model_dir: Path | str) -> Path:
    return Path(model_dir) / FOLDER / CONFIG


def _device(folder: Path) -> str:
    """That which the record names; GPU, as of conversions, where it tells nothing."""
    try:
        return str(files.read_json(folder / RECORD)["target"]).upper()
    except (InputError, LookupError, TypeError):
        return "GPU"
