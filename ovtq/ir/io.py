"""Reading a model folder, and writing one so that it is there whole or not at all."""

from __future__ import annotations

import gc
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from xml.parsers import expat

import openvino as ov

from ovtq import signals, system
from ovtq.errors import InputError
from ovtq.ir import weights
from ovtq.states import StateSpec, of_model

MODEL = "openvino_model"
RECORD = "ovtq.json"
STAMP = "ovtq"  # the key in an IR's rt_info
REFUSALS = (RuntimeError, UnicodeDecodeError)  # of OpenVINO, whose text may name a path as no UTF-8 (Windows)
LONGEST = 150  # characters of OUT_DIR's name that the names beside it begin with; file systems allow 255 bytes


def model_xml(model_dir: Path) -> Path:
    """The model's XML in a folder, with its .bin beside it. Raises InputError if something is not there or cut off."""
    model_dir = system.long_path(model_dir)
    if not model_dir.is_dir():
        raise InputError(f"{model_dir}: no such folder{_on_the_hub(model_dir)}")
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


def _on_the_hub(model_dir: Path) -> str:
    """How to get a model whose name on the Hugging Face hub (OWNER/NAME) was given in the place of a folder."""
    name = model_dir.as_posix()
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or model_dir.parent.exists():
        return ""
    folder = model_dir.name
    if model_dir.parent.name == "OpenVINO":
        return f"; a model of the Hugging Face hub is downloaded first: hf download {name} --local-dir {folder}"
    return (
        "; a model of the Hugging Face hub is exported first: optimum-cli export openvino --model "
        f"{name} --weight-format int4 {folder}; or download one that is exported: hf download "
        f"OpenVINO/{folder}-int4-ov --local-dir {folder}, if there is one"
    )


def _bytes_needed(xml: Path) -> int:
    """Length that the .bin of an IR must have; raises InputError if the XML is not an IR."""
    needed, root = 0, ""

    def begin(tag: str, attributes: dict[str, str]) -> None:
        nonlocal needed, root
        root = root or tag
        if root != "net":
            raise InputError(f"{xml}: not an OpenVINO IR (its root is <{root}>, not <net>)")
        if tag == "data" and "offset" in attributes:
            needed = max(needed, int(attributes["offset"]) + int(attributes["size"]))

    parser = expat.ParserCreate()  # of millions of bytes, no element need be made
    parser.StartElementHandler = begin
    try:
        with xml.open("rb") as file:
            parser.ParseFile(file)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise InputError(f"{xml}: not an OpenVINO IR ({error})") from None
    return needed


def load(model_dir: Path) -> ov.Model:
    """The model of a folder, its weights mapped, not read. Raises InputError if it can't be read."""
    xml = model_xml(model_dir)
    try:
        return ov.Core().read_model(xml)
    except REFUSALS as error:
        raise InputError(f"{xml}: OpenVINO can't read it ({last_line(error)})") from None


def text_sha256(path: Path) -> str:
    """SHA-256 of a text, however its lines end: Windows' OpenVINO ends those of an IR's XML with CR LF."""
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def load_config(model_dir: Path, name: str = "config.json") -> dict[str, Any]:
    """config.json of a folder, or another such file. Raises InputError if it is missing or no JSON object."""
    path = system.long_path(model_dir) / name
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


def states_of(model: ov.Model) -> tuple[StateSpec, ...]:
    """The states of a model that was read. Raises InputError if they are not what its stamp says."""
    return of_model([variable.get_info() for variable in model.get_variables()], stamp_of(model))


def record_of(model_dir: Path) -> dict[str, Any]:
    """What the record in a converted folder says; empty if there is none. Raises InputError if it can't be read."""
    folder = system.long_path(model_dir)
    return load_config(folder, RECORD) if (folder / RECORD).is_file() else {}


def refuse_mismatch(xml: Path) -> None:
    """Raise InputError if the record beside an IR tells of another conversion (bits, hashes, layers) than its stamp."""
    path = xml.with_name(RECORD)
    if not path.is_file():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        told = [record["passes"], record.get("schema"), record.get("states")]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: not a record of ovtq ({error}); convert the model again") from None
    stamp = stamp_of(ov.Core().read_model(xml))
    if told != [stamp.get(key) for key in ("passes", "schema", "states")]:
        raise InputError(f"{path}: tells of another conversion than {xml.name} beside it; convert the model again")


def check_output(model_dir: Path, out_dir: Path, force: bool, flag: str = "--force") -> None:
    """Raise InputError if `out_dir` can't take the result; `flag` is what `force` is called there."""
    source, target = system.resolved(model_dir), system.resolved(out_dir)
    if source == target or source in target.parents or target in source.parents:
        raise InputError(f"{out_dir}: must not be the model's folder, inside it or around it; choose another")
    target = system.long_path(target)
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise InputError(f"{out_dir}: not empty; {flag} replaces it")
        if not (target / RECORD).is_file():
            raise InputError(
                f"{out_dir}: not made by ovtq (no {RECORD} in it), so {flag} won't replace it; "
                "remove it yourself or choose another"
            )
    if target.exists() and not target.is_dir():
        raise InputError(f"{out_dir}: is a file; choose a folder")
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{parent}: can't be written to")
    needed = sum(path.stat().st_size for path in files_of(model_dir)) + (1 << 20)
    if system.can_clone(model_xml(model_dir).with_suffix(".bin"), parent):
        needed -= model_xml(model_dir).with_suffix(".bin").stat().st_size
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"{parent}: no space left ({free >> 20} MiB free, {needed >> 20} MiB needed)")


def check_json(path: Path, model_dir: Path, out_dir: Path | None) -> None:
    """Raise InputError if a record can't or must not be written to `path`."""
    target = system.resolved(path)
    if not target.parent.is_dir() or target.is_dir() or not os.access(target.parent, os.W_OK):
        raise InputError(f"--json {path}: no such folder, or not a file that can be written")
    for folder in filter(None, (model_dir, out_dir)):
        if system.resolved(folder) in target.parents:
            raise InputError(f"--json {path}: must not be inside {folder}")


def files_of(model_dir: Path) -> list[Path]:
    """All files of a folder, at any depth, behind links too; but not of version control, download or model caches."""
    found, seen, todo = [], set(), [system.long_path(model_dir)]
    while todo:
        folder = todo.pop()
        if system.resolved(folder) in seen:
            continue
        seen.add(system.resolved(folder))
        for path in folder.iterdir():
            if not path.is_dir():
                found.append(path)
            elif path.name not in (".git", ".cache", "model_cache"):  # the last: what optimum-intel compiled for a GPU
                todo.append(path)
    return sorted(found)


@contextmanager
def staged(out_dir: Path) -> Iterator[Path]:
    """A temporary folder beside `out_dir` that takes its place when the block ends well and vanishes otherwise.

    Whatever maps its files must be gone by the end of the block, or Windows can't rename it. Raises InputError if the
    system does not let it be written.
    """
    target = system.long_path(system.resolved(out_dir))
    try:
        with signals.Held() as held:
            place = _Place(target)
            try:
                place.make()
                with held.let_through():
                    yield place.folder
                gc.collect()
                place.swap()
                held.done()
            except BaseException as error:
                signals.forget(error)
                raise
            finally:
                place.leave()
    except OSError as error:
        raise InputError(f"{target.parent}: can't write there ({system.reason(error)})") from None


class _Place:
    """The names beside an OUT_DIR that one run takes: a folder to write in, an old result set aside, and their lock.

    The lock file is there before the others and goes after them, so that a later run can tell what a killed one left.
    """

    def __init__(self, target: Path, lock: Path | None = None) -> None:
        """New names; or those that belong to a lock file that is there."""
        self.target = target
        stem = lock.name.removesuffix(".lock") if lock else f"{_prefix(target)}{secrets.token_hex(4)}"
        self.folder = target.with_name(stem)
        self.old, self.gone = target.with_name(f"{stem}.old"), target.with_name(f"{stem}.gone")
        self._lock: system.Lock | None = None

    def take(self) -> None:
        """Take the lock. Raises BlockingIOError if another run has it."""
        self._lock = system.Lock(self.folder.with_name(f"{self.folder.name}.lock"))

    def make(self) -> None:
        """Tidy up after other runs, and make the folder. Raises OSError."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        _tidy_up(self.target)
        self.take()
        self.folder.mkdir()

    def swap(self) -> None:
        """Put the folder in the place of OUT_DIR, which is whole under another name until the new one is there."""
        if self.target.exists():
            system.rename(self.target, self.old)
        system.rename(self.folder, self.target)

    def leave(self) -> None:
        """Remove what is left under these names, the lock last; an old result goes back if nothing took its place."""
        if self._lock is None:
            return
        if self.old.exists():
            with suppress(OSError):
                # a name of its own, so that no half of it can be taken for the whole
                system.rename(self.old, self.gone if self.target.exists() else self.target)
        left = [path for path in (self.folder, self.gone) if path.exists() and not system.remove(path)]
        self._lock.release(keep=bool(left) or self.old.exists())
        self._lock = None


def _tidy_up(target: Path) -> None:
    """What killed runs left is removed; an old result that they set aside is put back if nothing took its place."""
    for path in target.parent.glob(f"{glob.escape(_prefix(target))}*.lock"):
        if re.fullmatch(r"[0-9a-f]{8}\.lock", path.name.removeprefix(_prefix(target))):
            place = _Place(target, path)
            with suppress(OSError):  # it is at work, or another user's
                place.take()
                place.leave()


def _prefix(target: Path) -> str:
    name = target.name
    if len(os.fsencode(name)) > LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}.ovtq-"


@contextmanager
def saving(model: ov.Model, folder: Path, source: Path) -> Iterator[weights.Written]:
    """Write the IR, every weight in the type it has, to where `source`, the XML it was read from, cannot be harmed.

    Within the block the weights may be on their way yet (`weights.writing`); when it ends well, all are there. Raises
    InputError if the disk does not take it.
    """
    with ExitStack() as stack:
        with _to(folder):
            xml = folder / f"{MODEL}.xml"
            written = stack.enter_context(weights.writing(model, xml, source.with_suffix(".bin")))
            model_xml(folder)
        yield written
        with _to(folder):
            written.wait()


@contextmanager
def _to(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, *REFUSALS, InputError) as error:
        free = shutil.disk_usage(folder).free >> 20
        raise InputError(
            f"{folder.parent}: the model could not be written ({last_line(error)}; {free} MiB free)"
        ) from None


def copy_rest(model_dir: Path, folder: Path) -> None:
    """Copy everything of a model folder but the IR and the record: tokenizers, configurations, whatever there is."""
    model_dir = system.long_path(model_dir)
    for path in files_of(model_dir):
        name = path.relative_to(model_dir)
        if str(name) not in (f"{MODEL}.xml", f"{MODEL}.bin", RECORD):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / name)


def last_line(error: Exception) -> str:
    """The last line of an error's text: OpenVINO puts the reason there, below file names of its own sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
