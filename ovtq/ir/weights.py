"""Writing the IR of a rewritten model without reading its weights: the .bin is cloned whole, and what is new appended.

An IR has one .bin, and passes add constants to it. So it can't be a link to the original's, which must not change.
Where the file system shares blocks, a clone costs nothing; elsewhere it is a copy, which goes on while the model is
verified, if the system lets a file be read that is being written (Windows does not). `ov.save_model` would read and
hash every weight instead, with all of them in memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

import numpy as np
import openvino as ov
from openvino import Node
from openvino import opset15 as op

from ovtq import disk
from ovtq.ir.copying import Copy
from ovtq.ir.operations import core
from ovtq.system import trim_memory

STAND_IN = 4096  # bytes; shorter constants are appended, as if they were new
ALIGNED = 4096  # where what is appended starts
PROBED = 64  # bytes at either end of a constant that must be the file's at the place where it is said to lie
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
            span = _span(model, self.weights)
            constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
            places = [(_place(node, span), node.get_byte_size()) for node in constants]
            self.copy.wait([(offset, size) for offset, size in places if offset is not None] if span else None)


@contextmanager
def writing(model: ov.Model, xml: Path, source: Path) -> Iterator[Written]:
    """Write `model` to `xml` and the .bin beside it; `source` is the .bin from which it was read.

    Within the block the files have their lengths, and what is new is in them. Weights that are copied come meanwhile:
    what reads them waits for them, and whoever wants the whole file for all. Raises OSError or RuntimeError if the
    files can't be written, or are not the model's once read back.
    """
    stood_in, kept = _with_stand_ins(model, _read_span(model, source))
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
        if not disk.SHARES_OPEN_FILES:
            copy.wait()
        with weights.open("r+b") as file:
            file.truncate(start)
            file.seek(start)
            file.write(new)
        del stood_in, text, new  # with what trim_memory gives back, 200 MB of Llama-3-8B's while it is run
        _check(model, xml, kept)
        trim_memory()
        yield Written(copy.how, weights, copy)
    finally:
        copy.stop()


def _serialised(model: ov.Model, folder: Path) -> tuple[bytes, bytes]:
    """The XML and the .bin of an IR."""
    with disk.temporary(folder) as place:
        xml = Path(place) / "new.xml"
        ov.save_model(model, xml, compress_to_fp16=False)
        # on Windows OpenVINO ends lines as texts do there; the same model has the same bytes everywhere
        return xml.read_bytes().replace(b"\r\n", b"\n"), xml.with_suffix(".bin").read_bytes()


def _span(model: ov.Model, path: Path) -> range | None:
    """Where the .bin of an IR lies in memory, as `model`, read from it, sees it: addresses; None if it does not.

    A constant's address less the offset that the XML gives it is where the file begins. Most constants must agree:
    passes may have put others in the place of some.
    """
    offsets: dict[str, list[tuple[int, int]]] = {}
    layers: list[dict[str, str]] = []

    def begin(tag: str, found: dict[str, str]) -> None:
        if tag == "data" and len(layers) == 3 and layers[-1].get("type") == "Const":  # of the model, not of a branch
            offsets.setdefault(layers[-1]["name"], []).append((int(found["offset"]), int(found["size"])))
        layers.append(found)

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = begin, lambda _: layers.pop()
    parser.Parse(path.with_suffix(".xml").read_bytes(), True)
    starts: Counter[int] = Counter()
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_byte_size() >= STAND_IN:
            for offset, size in offsets.get(node.get_friendly_name(), []):
                if size == node.get_byte_size():
                    starts[node.data.ctypes.data - offset] += 1
    if not starts:
        return None
    (start, votes), *_ = starts.most_common(1)
    return range(start, start + path.stat().st_size) if 2 * votes > starts.total() else None


def _read_span(model: ov.Model, path: Path) -> range | None:
    """`_span` of a file that holds all its bytes already, which those in memory must be."""
    span = _span(model, path)
    if span is None:
        return None
    with path.open("rb") as file:
        for node in model.get_ops():
            place = _place(node, span) if node.get_type_name() == "Constant" else None
            if place is not None:
                data, size = node.data.reshape(-1).view(np.uint8), node.get_byte_size()
                for start in {0, max(size - PROBED, 0)}:
                    file.seek(place + start)
                    if file.read(min(PROBED, size)) != data[start : start + PROBED].tobytes():
                        return None
    return span


def _place(node: Node, span: range | None) -> int | None:
    """The offset of a constant's bytes in the file that lies at `span`; None if they lie elsewhere."""
    address = node.data.ctypes.data
    if span is None or address < span.start or address + node.get_byte_size() > span.stop:
        return None
    return address - span.start


def _with_stand_ins(model: ov.Model, span: range | None) -> tuple[ov.Model, dict[str, Kept]]:
    """A copy of `model` with inputs in the place of constants that lie in the file at `span`, and these by name.

    What the writer does not see it does not read. A name that two nodes have stands for neither.
    """
    copy = model.clone()
    names = [node.get_friendly_name() for node in copy.get_ops()]
    once = {name for name in names if names.count(name) == 1} if len(set(names)) < len(names) else set(names)
    inputs, kept = list(copy.get_parameters()), {}
    for node in copy.get_ops():
        if node.get_type_name() != "Constant" or node.get_byte_size() < STAND_IN:
            continue
        place, name = _place(node, span), node.get_friendly_name()
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
    parser = expat.ParserCreate()
    path: list[dict[str, str]] = []
    edits: list[tuple[int, str, dict[str, str]]] = []

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
    parts: list[bytes] = []
    end = 0
    for index, tag, attributes in edits:
        old = TAG.match(xml, index)
        if old is None:
            raise RuntimeError(f"byte {index} of the written XML begins no tag")
        text = " ".join(f"{key}={quoteattr(value)}" for key, value in attributes.items())
        parts += xml[end:index], f"<{tag} {text}{'/' if old[0].endswith(b'/>') else ''}>".encode()
        end = old.end()
    return b"".join([*parts, xml[end:]])


def _check(model: ov.Model, xml: Path, kept: Mapping[str, Kept]) -> None:
    """Raise RuntimeError if the constants of the written file are not those of `model`; weights by their place."""
    written = core().read_model(xml)
    span = _span(written, xml.with_suffix(".bin"))
    inputs = [[port.get_any_name() for port in some.inputs] for some in (model, written)]
    found = {node.get_friendly_name(): node for node in written.get_ops() if node.get_type_name() == "Constant"}
    if inputs[0] != inputs[1] or len(model.get_ops()) != len(written.get_ops()):
        raise RuntimeError("the written model has other inputs or nodes than the one in memory")
    for node in model.get_ops():
        if node.get_type_name() != "Constant":
            continue
        name = node.get_friendly_name()
        other = found.get(name)
        if other is None or not _same(node, other, kept.get(name), span):
            raise RuntimeError(f"the constant {name} of the written model is not that of the one in memory")


def _same(node: Node, other: Node, place: Kept | None, span: range | None) -> bool:
    """Whether `other` is the constant `node`: in type and shape, and by its place or, without one, by its bytes."""
    if node.get_element_type() != other.get_element_type() or node.get_output_shape(0) != other.get_output_shape(0):
        return False
    if place is not None:
        return _place(other, span) == place.offset and other.get_byte_size() == place.size
    return bool(node.data.tobytes() == other.data.tobytes())
