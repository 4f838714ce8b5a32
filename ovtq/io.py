"""Reading a model folder, and writing one so that it is there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openvino as ov

from ovtq.errors import InputError

MODEL = "openvino_model"
RECORD = "ovtq.json"
STAMP = "ovtq"  # the key in an IR's rt_info


def model_xml(model_dir: Path) -> Path:
    """The model's XML in a folder, with its .bin beside it. Raises InputError if something is not there or cut off."""
    if not model_dir.is_dir():
        raise InputError(f"{model_dir}: no such folder")
    xml = model_dir / f"{MODEL}.xml"
    if not xml.is_file():
        others = ", ".join(sorted(path.name for path in model_dir.iterdir())[:5]) or "nothing"
        raise InputError(
            f"{model_dir}: no {MODEL}.xml in it (found {others}); "
            "export one with: optimum-cli export openvino --task text-generation-with-past"
        )
    weights = xml.with_suffix(".bin")
    if not weights.is_file():
        raise InputError(f"{weights}: no such file; the weights belong beside {xml.name}")
    needed, have = _bytes_needed(xml), weights.stat().st_size
    if have < needed:
        raise InputError(f"{weights}: cut off, {have} bytes of {needed}; copy or download it again")
    return xml


def _bytes_needed(xml: Path) -> int:
    """Length that the .bin of an IR must have; raises InputError if the XML is not an IR."""
    needed = 0
    try:
        with xml.open("rb") as file:
            for position, (_, element) in enumerate(ElementTree.iterparse(file, events=("start",))):
                if position == 0 and element.tag != "net":
                    raise InputError(f"{xml}: not an OpenVINO IR (its root is <{element.tag}>, not <net>)")
                if element.tag == "data" and "offset" in element.attrib:
                    needed = max(needed, int(element.attrib["offset"]) + int(element.attrib["size"]))
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"{xml}: not an OpenVINO IR ({error})") from None
    return needed


def load(model_dir: Path) -> ov.Model:
    """The model of a folder, its weights mapped, not read. Raises InputError if it can't be read."""
    xml = model_xml(model_dir)
    try:
        return ov.Core().read_model(xml)
    except RuntimeError as error:
        raise InputError(f"{xml}: OpenVINO can't read it ({last_line(error)})") from None


def load_config(model_dir: Path) -> dict[str, Any]:
    """config.json of a folder. Raises InputError if it is missing or no JSON object."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; it comes with the exported model") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    return config


def stamp(model: ov.Model, facts: Mapping[str, Any]) -> None:
    """Write into the IR's rt_info what was done to it."""
    for key, value in facts.items():
        model.set_rt_info(json.dumps(value), [STAMP, key])


def stamp_of(model: ov.Model) -> dict[str, Any]:
    """What an earlier conversion wrote into the IR; empty if there was none."""
    if STAMP not in model.get_rt_info():
        return {}
    return {key: json.loads(str(text)) for key, text in model.get_rt_info([STAMP]).value.items()}


def check_output(model_dir: Path, out_dir: Path, force: bool) -> None:
    """Raise InputError if `out_dir` can't take the result."""
    source, target = model_dir.resolve(), out_dir.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise InputError(f"{out_dir}: must not be the model's folder, inside it or around it; choose another")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise InputError(f"{out_dir}: not empty; --force replaces it")
        if not (target / RECORD).is_file():
            raise InputError(
                f"{out_dir}: not made by ovtq (no {RECORD} in it), so --force won't replace it; "
                "remove it yourself or choose another"
            )
    if target.exists() and not target.is_dir():
        raise InputError(f"{out_dir}: is a file; choose a folder")
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{parent}: can't be written to")
    needed = sum(path.stat().st_size for path in files_of(model_dir)) + (1 << 20)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"{parent}: no space left ({free >> 20} MiB free, {needed >> 20} MiB needed)")


def files_of(model_dir: Path) -> list[Path]:
    """All files of a folder, at any depth."""
    return sorted(path for path in model_dir.rglob("*") if path.is_file())


@contextmanager
def staged(out_dir: Path) -> Iterator[Path]:
    """A temporary folder beside `out_dir` that takes its place when the block ends well and vanishes otherwise."""
    target = out_dir.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.ovtq-"
    for stale in target.parent.glob(f"{prefix}*"):
        if not _alive(stale.name.removeprefix(prefix).partition(".")[0]):  # left by a killed run
            _bring_back(stale, target)
    folder = target.parent / f"{prefix}{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        if target.exists():
            aside = folder.with_name(f"{folder.name}.old")
            target.rename(aside)
            folder.rename(target)
            shutil.rmtree(aside)
        else:
            folder.rename(target)
    except OSError as error:
        reason = "no space left" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise InputError(f"{target.parent}: can't write there ({reason})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _bring_back(stale: Path, target: Path) -> None:
    """A run killed between its two renames leaves the old result aside: put it back; else remove what is stale."""
    if stale.name.endswith(".old") and not target.exists():
        stale.rename(target)
    else:
        shutil.rmtree(stale, ignore_errors=True)


def save(model: ov.Model, folder: Path) -> None:
    """Write the IR, every weight in the type it has. Raises InputError if the disk does not take it."""
    xml = folder / f"{MODEL}.xml"
    try:
        ov.save_model(model, xml, compress_to_fp16=False)
        model_xml(folder)
    except (RuntimeError, InputError) as error:
        free = shutil.disk_usage(folder).free >> 20
        raise InputError(
            f"{folder.parent}: the model could not be written ({last_line(error)}; {free} MiB free)"
        ) from None


def copy_rest(model_dir: Path, folder: Path) -> None:
    """Copy everything of a model folder but the IR and the record: tokenizers, configurations, whatever there is."""
    for path in files_of(model_dir):
        name = path.relative_to(model_dir)
        if str(name) not in (f"{MODEL}.xml", f"{MODEL}.bin", RECORD):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / name)


def last_line(error: Exception) -> str:
    """The last line of an error's text: OpenVINO puts the reason there, below file names of its own sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
