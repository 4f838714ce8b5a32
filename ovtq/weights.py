"""Writing the IR of a rewritten model without reading its weights: the .bin is cloned whole, and what is new appended.

An IR has one .bin, and passes add constants to it. So it can't be a link to the original's, which must not change.
Where the file system shares blocks, a clone costs nothing; elsewhere it is a copy, which goes on while the model is
verified. `ov.save_model` would read and hash every weight instead, with all of them in memory.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

import openvino as ov
from openvino import Node
from openvino import opset15 as op

from ovtq.copying import Copy

STAND_IN = 4096  # bytes; shorter constants are appended, as if they were new
ALIGNED = 4096  # where what is appended starts
TAG = re.compile(rb"""<[^<>"']*(?:"[^"]*"[^<>"']*|'[^']*'[^<>"']*)*>""")


@dataclass(frozen=True)
class Kept:
    """Where a constant lies in the original's .bin: `size` bytes from `offset` on."""

    offset: int
    size: int
    element_type: str
    shape: str


@dataclass(frozen=True)
class Written:
    """An IR whose weights may be on their way yet; `how` says how they come: `reflink`, `copy`, or `written` anew."""

    how: str
    weights: Path
    copy: Copy | None = None

    def wait(self) -> None:
        """Until all of them are there. Raises OSError if they can't be."""
        if self.copy:
            self.copy.wait()

    def wait_for(self, model: ov.Model) -> None:
        """Until those are there that `model`, read from this IR, holds. Raises OSError if they can't be."""
        if self.copy:
            spans = _mapped(self.weights)
            constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
            places = [(_place(node, spans), node.get_byte_size()) for node in constants]
            self.copy.wait([(offset, size) for offset, size in places if offset is not None])


@contextmanager
def writing(model: ov.Model, xml: Path, source: Path) -> Iterator[Written]:
    """Write `model` to `xml` and the .bin beside it; `source` is the .bin from which it was read.

    Within the block the files have their lengths, and what is new is in them. Weights that are copied come meanwhile:
    what reads them waits for them, and whoever wants the whole file for all. Raises OSError or RuntimeError if the
    files can't be written, or are not the model's once read back.
    """
    stood_in, kept = _with_stand_ins(model, _mapped(source))
    weights = xml.with_suffix(".bin")
    if not kept:
        ov.save_model(model, xml, compress_to_fp16=False)
        yield Written("written", weights)
        return
    start = -(-source.stat().st_size // ALIGNED) * ALIGNED
    copy = Copy(source, weights)
    try:
        copy.start()
        text, new = _serialised(stood_in, xml.parent)
        xml.write_bytes(_point_at(text, kept, start))
        with weights.open("r+b") as file:
            file.truncate(start)
            file.seek(start)
            file.write(new)
        _check(model, xml, kept)
        yield Written(copy.how, weights, copy)
    finally:
        copy.stop()


def _serialised(model: ov.Model, folder: Path) -> tuple[bytes, bytes]:
    """The XML and the .bin of an IR."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        xml = Path(place) / "new.xml"
        ov.save_model(model, xml, compress_to_fp16=False)
        return xml.read_bytes(), xml.with_suffix(".bin").read_bytes()


def _mapped(path: Path) -> list[tuple[int, int, int]]:
    """Where a file is mapped in this process: first and last address, and the offset in the file of the first."""
    status, found = path.stat(), []
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        span, _, offset, on, inode, *_ = line.split(maxsplit=5)
        if on == device and int(inode) == status.st_ino:
            first, last = (int(part, 16) for part in span.split("-"))
            found.append((first, last, int(offset, 16)))
    return found


def _place(node: Node, spans: list[tuple[int, int, int]]) -> int | None:
    """The offset of a constant's bytes in the mapped file; None if they lie elsewhere."""
    address = node.data.ctypes.data
    for first, last, offset in spans:
        if first <= address and address + node.get_byte_size() <= last:
            return address - first + offset
    return None


def _with_stand_ins(model: ov.Model, spans: list[tuple[int, int, int]]) -> tuple[ov.Model, dict[str, Kept]]:
    """A copy of `model` with inputs in the place of constants that lie in the mapped file, and these by name.

    What the writer does not see it does not read. A name that two nodes have stands for neither.
    """
    copy = model.clone()
    names = [node.get_friendly_name() for node in copy.get_ops()]
    once = {name for name in names if names.count(name) == 1} if len(set(names)) < len(names) else set(names)
    inputs, kept = list(copy.get_parameters()), {}
    for node in copy.get_ops():
        if node.get_type_name() != "Constant" or node.get_byte_size() < STAND_IN:
            continue
        place, name = _place(node, spans), node.get_friendly_name()
        if place is None or name not in once:
            continue
        stand_in = op.parameter(node.get_output_shape(0), node.get_element_type())
        stand_in.set_friendly_name(name)
        stand_in.output(0).set_names(node.output(0).get_names())
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(stand_in.output(0))
        inputs.append(stand_in)
        shape = ", ".join(map(str, node.get_output_shape(0)))
        kept[name] = Kept(place, node.get_byte_size(), node.get_element_type().get_type_name(), shape)
    fresh = ov.Model(copy.get_results(), copy.get_sinks(), inputs, copy.get_friendly_name())
    for key, value in copy.get_rt_info().items():
        fresh.set_rt_info(value, [key])
    return fresh, kept


def _point_at(xml: bytes, kept: Mapping[str, Kept], start: int) -> bytes:
    """The XML with its stand-ins turned back into constants, and the others moved to `start`, where they are appended.

    Only the tags concerned change: an element tree would take seconds to read and to write.
    """
    parser, path, edits = expat.ParserCreate(), [], []

    def begin(tag: str, found: dict[str, str]) -> None:
        layer = path[-1] if path and tag == "data" else found
        place = kept.get(layer["name"]) if tag in ("layer", "data") and layer.get("type") == "Parameter" else None
        if place and len(path) == 2:  # of the model itself, not of a branch
            edits.append((parser.CurrentByteIndex, tag, found | {"type": "Const"}))
        elif place and len(path) == 3:
            edits.append((parser.CurrentByteIndex, tag, {key: str(value) for key, value in asdict(place).items()}))
        elif tag == "data" and layer.get("type") == "Const":  # at any depth: a branch has constants of its own
            edits.append((parser.CurrentByteIndex, tag, found | {"offset": str(int(found["offset"]) + start)}))
        path.append(found)

    parser.StartElementHandler, parser.EndElementHandler = begin, lambda _: path.pop()
    parser.Parse(xml, True)
    parts, end = [], 0
    for index, tag, attributes in edits:
        old = TAG.match(xml, index)
        text = " ".join(f"{key}={quoteattr(value)}" for key, value in attributes.items())
        parts += xml[end:index], f"<{tag} {text}{'/' if old[0].endswith(b'/>') else ''}>".encode()
        end = old.end()
    return b"".join([*parts, xml[end:]])


def _check(model: ov.Model, xml: Path, kept: Mapping[str, Kept]) -> None:
    """Raise RuntimeError if the constants of the written file are not those of `model`; weights by their place."""
    written = ov.Core().read_model(xml)
    spans = _mapped(xml.with_suffix(".bin"))
    inputs = [[port.get_any_name() for port in some.inputs] for some in (model, written)]
    found = {node.get_friendly_name(): node for node in written.get_ops() if node.get_type_name() == "Constant"}
    if inputs[0] != inputs[1] or len(model.get_ops()) != len(written.get_ops()):
        raise RuntimeError("the written model has other inputs or nodes than the one in memory")
    for node in model.get_ops():
        if node.get_type_name() != "Constant":
            continue
        name = node.get_friendly_name()
        other = found.get(name)
        same = other is not None and node.get_element_type() == other.get_element_type()
        if same and name in kept:
            same = _place(other, spans) == kept[name].offset and other.get_byte_size() == kept[name].size
        elif same:
            same = node.data.tobytes() == other.data.tobytes()
        if not same or node.get_output_shape(0) != other.get_output_shape(0):
            raise RuntimeError(f"the constant {name} of the written model is not that of the one in memory")
