"""Reading a model folder, and writing its files into another."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from xml.parsers import expat

import openvino as ov

from ovtq import disk, files, system, whereabouts
from ovtq.errors import InputError
from ovtq.errors import last_line as last_line
from ovtq.ir import weights
from ovtq.ir.operations import core
from ovtq.staging import RECORD, Identity, identity
from ovtq.states import StateSpec, of_model

MODEL = "openvino_model"
STAMP = "ovtq"  # the key in an IR's rt_info
REFUSALS = (RuntimeError, UnicodeDecodeError)  # of OpenVINO, whose text may name a path as no UTF-8 (Windows)


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

    text = files.read(xml)
    try:
        text.decode("utf-8")
        parser = expat.ParserCreate("utf-8")  # of millions of bytes, no element need be made
        parser.StartElementHandler = begin
        parser.Parse(text, True)  # at once: in pieces, the time for a long attribute would grow with its square
    except UnicodeDecodeError:
        raise InputError(f"{xml}: not an OpenVINO IR (not UTF-8 text)") from None
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise InputError(f"{xml}: not an OpenVINO IR ({error})") from None
    return needed


def load(model_dir: Path) -> ov.Model:
    """The model of a folder, its weights mapped, not read. Raises InputError if it can't be read."""
    xml = model_xml(model_dir)
    whereabouts.at(f"reading {xml}")
    try:
        model = core().read_model(xml)
    except REFUSALS as error:
        raise InputError(f"{xml}: OpenVINO can't read it ({last_line(error)})") from None
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type().is_dynamic():
            raise InputError(f"{xml}: the constant {node.get_friendly_name()!r} has no element type; export it again")
    return model


def text_sha256(path: Path) -> str:
    """SHA-256 of a text, however its lines end: Windows' OpenVINO ends those of an IR's XML with CR LF."""
    return hashlib.sha256(files.read(path).replace(b"\r\n", b"\n")).hexdigest()


def load_config(model_dir: Path, name: str = "config.json") -> dict[str, Any]:
    """config.json of a folder, or another such file. Raises InputError if it is missing or no JSON object."""
    path = system.long_path(model_dir) / name
    config = files.read_json(path, "it comes with the exported model")
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    return config


def stamp(model: ov.Model, facts: Mapping[str, Any]) -> None:
    """Write into the IR's rt_info what was done to it."""
    for key, value in facts.items():
        model.set_rt_info(json.dumps(value), [STAMP, key])


def stamp_of(model: ov.Model) -> dict[str, Any]:
    """What an earlier conversion wrote into the IR; empty if there was none. Raises InputError for what is not ours."""
    if STAMP not in model.get_rt_info():
        return {}
    where = f"the model's rt_info {STAMP!r}"
    try:
        found = {key: files.parse_json(str(text), where) for key, text in model.get_rt_info([STAMP]).value.items()}
    except (AttributeError, RuntimeError, TypeError):
        raise InputError(f"{where} was not written by ovtq; export the model again") from None
    steps = found.get("passes", [])
    if not isinstance(steps, list) or not all(map(_is_step, steps)) or not _is_object(found.get("versions", {})):
        raise InputError(f"{where} tells of no passes; convert the original model again")
    return found


def _is_step(step: Any) -> bool:
    """Whether it is what is recorded of a pass."""
    return _is_object(step) and isinstance(step.get("name"), str) and _is_object(step.get("options"))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


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
    record = load_config(path.parent, RECORD)
    if "passes" not in record:
        raise InputError(f"{path}: not a record of ovtq; convert the model again")
    told = [record.get(key) for key in ("passes", "schema", "states")]
    stamp = stamp_of(core().read_model(xml))
    if told != [stamp.get(key) for key in ("passes", "schema", "states")]:
        raise InputError(f"{path}: tells of another conversion than {xml.name} beside it; convert the model again")


def check_output(model_dir: Path, out_dir: Path, force: bool, flag: str = "--force") -> Identity:
    """What `out_dir` is now, for `staged`. Raises InputError if it can't take the result; `flag` is `force`'s name."""
    source, target = system.resolved(model_dir), system.resolved(out_dir)
    if source == target or source in target.parents or target in source.parents:
        raise InputError(f"{out_dir}: must not be the model's folder, inside it or around it; choose another")
    here = system.resolved(Path())
    if target == here or target in here.parents:
        raise InputError(f"{out_dir}: is the working directory or around it, which can't be replaced; choose another")
    target = system.long_path(target)
    try:
        was = identity(target)
        if target.is_dir() and any(target.iterdir()):
            if not force:
                raise InputError(f"{out_dir}: not empty; {flag} replaces it")
            if not (target / RECORD).is_file():
                raise InputError(
                    f"{out_dir}: not made by ovtq (no {RECORD} in it), so {flag} won't replace it; "
                    "remove it yourself or choose another"
                )
        if os.path.lexists(target) and not target.is_dir():
            raise InputError(f"{out_dir}: is a file; choose a folder")
        if disk.is_mount(target):
            raise InputError(f"{out_dir}: something is mounted there, so it can't be replaced; choose a folder in it")
        parent = next(path for path in target.parents if path.exists())
    except OSError as error:
        raise InputError(f"{out_dir}: can't be used ({system.reason(error)})") from None
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{parent}: can't be written to")
    sizes = {path: path.stat().st_size for path in files_of(model_dir)}
    needed = sum(sizes.values()) + (1 << 20)
    weights = model_xml(model_dir).with_suffix(".bin")
    try:
        cloned = disk.can_clone(weights, parent)
    except OSError as error:  # no file can be made there, whatever its rights say
        raise InputError(f"{parent}: can't be written to ({system.reason(error)})") from None
    if cloned:
        needed -= weights.stat().st_size
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"{parent}: no space left ({free >> 20} MiB free, {needed >> 20} MiB needed)")
    return was


def check_outputs(
    outputs: Mapping[str, Path | None], folders: Iterable[Path | None], inputs: Iterable[str | Path | None] = ()
) -> None:
    """Raise InputError if a file, by the option that names it, can't or must not be written.

    Nothing is written into `folders`, over what is read (`inputs`), or twice.
    """
    taken = {system.resolved(Path(path)) for path in inputs if path}
    for option, path in outputs.items():
        if path is None:
            continue
        files.check_writable(path, option)
        target = system.resolved(path)
        for folder in filter(None, folders):
            if system.resolved(folder) in target.parents:
                raise InputError(f"{option} {path}: must not be inside {folder}")
        if target in taken:
            raise InputError(f"{option} {path}: another option names the same file; choose another")
        taken.add(target)


def files_of(model_dir: Path) -> list[Path]:
    """All files of a folder, at any depth, behind links too; but not of version control, download or model caches.

    A link may lead to what is in the folder, or beside that to which openvino_model.xml leads: as in a download cache,
    whose files are links to its blobs. Raises InputError for any other, which could name whatever this user may read,
    for one that leads nowhere, and for what is no regular file.
    """
    found, seen, todo = [], set(), [system.long_path(model_dir)]
    homes = {system.resolved(model_dir), system.resolved(model_dir / f"{MODEL}.xml").parent}
    while todo:
        folder = todo.pop()
        real = system.resolved(folder)
        if real in seen:
            continue
        seen.add(real)
        for path in _listed(folder):
            if path.is_symlink():
                _check_link(path, homes)
            mode = path.stat().st_mode
            if stat.S_ISREG(mode):
                found.append(path)
            elif not stat.S_ISDIR(mode):
                raise InputError(
                    f"{path}: {files.kind(mode)}, which can't be copied; remove it from the model's folder"
                )
            elif path.name not in (".git", ".cache", "model_cache"):  # the last: what optimum-intel compiled for a GPU
                todo.append(path)
    return sorted(found)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: can't be read ({system.reason(error)})") from None


def _check_link(path: Path, homes: Collection[Path]) -> None:
    if not path.exists():
        raise InputError(f"{path}: a link that leads nowhere; remove it from the model's folder")
    end = system.resolved(path)
    if not any(home in (end, *end.parents) for home in homes):
        raise InputError(
            f"{path}: a link to {end}, outside the model's folder; put the file there itself, or remove the link"
        )


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
            _copy(path, folder / name)


def _copy(source: Path, target: Path) -> None:
    """A file's bytes, its time, and who may read, write and run it; nothing that lets it run as another user."""
    files.copy(source, target)
    facts = source.stat()
    target.chmod(stat.S_IMODE(facts.st_mode) & 0o777 | stat.S_IWUSR)
    os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))
