"""What a case is, and mutated models: their XML, weights, config.json and records."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny-transformers-5.5"
MINI = ROOT / "models" / "gpt-oss-mini"
STATISTICS = MINI / "triattention.npz"
XML, BIN = "openvino_model.xml", "openvino_model.bin"

NUMBERS = ("-1", "0", "1", "7", "65536", str(2**31), str(2**63), str(2**64), "1e9", "nan", "x", "", "٣")
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 2**31, 2**63, -(2**64), 10**30, 10**400, 1e308, -0.0, "", "x", "128", "gpt_oss", "\ud800",
    "\u202e\u0000", "</script><script>", "é" * 5000, [], {}, [[]], {"a": {}}, ["full_attention"], [1] * 3000,
    float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
WORDS = (
    "MatMul",
    "Add",
    "Const",
    "Parameter",
    "Result",
    "ReadValue",
    "If",
    "Loop",
    "Gather",
    "i64",
    "f16",
    "u4",
    "dynamic",
)


@dataclass(frozen=True)
class Case:
    """A command of ovtq with its arguments, and the folder that it is given; what was done to that, in words."""

    number: int
    kind: str
    command: str  # of ovtq, or `library`: a function of it by name, and what it is called with as JSON
    arguments: list[str]
    done: str
    verified: bool = False  # whether it verifies, so that what it writes must be right
    made: tuple[str, ...] = ("out",)  # names that it may leave where it ends well
    always: tuple[str, ...] = ()  # and those that it may leave or change in any case


@dataclass(frozen=True)
class Given:
    """What a case is made of: its number, kind and chance, its empty folder, and models that are there already."""

    number: int
    kind: str
    draw: random.Random
    folder: Path
    base: Path  # with `converted`, the tiny model as ovtq writes it, `kernels`, with kernels of its own, `stats.npz`

    @property
    def converted(self) -> Path:
        """The tiny model as ovtq writes it."""
        return self.base / "converted"

    def case(self, command: str, arguments: Sequence[object], done: str, **more: Any) -> Case:
        """A case of this number."""
        return Case(self.number, self.kind, command, [str(x) for x in arguments], done, **more)


def model(given: Given, source: Path = TINY) -> Path:
    """A model of the case's own."""
    return Path(shutil.copytree(source, given.folder / "model"))


def convert(given: Given, done: str, more: Sequence[str] = (), often: float = 0.04, **names: Any) -> Case:
    """A conversion of `model` to `out`, verified as often as asked for."""
    draw, folder = given.draw, given.folder
    verified = draw.random() < often
    preset = draw.choice(("exact", "rotate", "f16")) if verified else draw.choice(("exact", "u8", "k6v4", "rotate"))
    arguments = [
        str(folder / "model"),
        str(folder / "out"),
        "--preset",
        preset,
        "--target",
        draw.choice(("cpu", "gpu")),
    ]
    arguments += ["--verify-layers", "2"] if verified else ["--no-verify"]
    return given.case("convert", [*arguments, *more], done, verified=verified, **names)


# ------------------------------------------------------------------------------------------ bytes and texts


def garble(data: bytes, draw: random.Random) -> bytes:
    """Bytes with some changed, removed, doubled or put in."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        at = draw.randrange(len(out) + 1)
        what = draw.randrange(5)
        if what == 0 and out:
            out[at % len(out)] ^= 1 << draw.randrange(8)
        elif what == 1:
            del out[at : at + draw.choice((1, 4, 100, 5000))]
        elif what == 2:
            out[at:at] = out[at : at + draw.choice((1, 10, 1000))]
        elif what == 3:
            out[at:at] = draw.randbytes(draw.choice((1, 16, 300)))
        else:
            size = draw.choice((4, 64, 4096))
            out[at : at + size] = draw.choice((b"\0", b"\xff", b"\x7f", b"\xc0")) * min(size, len(out) - at)
    return bytes(out)


def xml(given: Given) -> Case:
    """Values, edges, types and lines of the XML."""
    draw = given.draw
    path = model(given, given.converted if draw.random() < 0.1 else TINY) / XML
    text = path.read_text(encoding="utf-8")
    ways: list[Callable[[str], str]] = [
        lambda t: _replaced(t, r'="(\d+)"', NUMBERS, draw),
        lambda t: _replaced(t, r'="(\d+)"', [str(draw.randrange(400)) for _ in range(4)], draw),  # rewires edges
        lambda t: _replaced(t, r'type="(\w+)"', WORDS, draw),
        lambda t: _replaced(t, r'="([^"]*)"', ("", "x" * draw.choice((10, 100_000)), "\ud7ff", "&#0;", "&lt;"), draw),
        lambda t: _replaced(t, r"<dim>(-?\d+)</dim>", NUMBERS, draw),
        lambda t: _replaced(t, r"(<edge [^>]*/>)", ("", "<edge/>"), draw),
        lambda t: _replaced(t, r"(<rt_info>)", ("<rt_info>" + "<a>" * 5000, "", "<rt_info><ovtq value='1'/>"), draw),
        lambda t: _lines(t, draw),
        lambda t: t.replace("<?xml", '<!DOCTYPE a [<!ENTITY b "bb">]><?xml', 1),
        lambda t: t[: draw.randrange(len(t))],
    ]
    done = []
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        way = draw.randrange(len(ways))
        done.append(str(way))
        text = ways[way](text)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return convert(given, f"ways {', '.join(done)}")


def _replaced(text: str, pattern: str, values: Any, draw: random.Random) -> str:
    """One of the places where `pattern` stands, with its group replaced."""
    found = list(re.finditer(pattern, text))
    if not found:
        return text
    one = draw.choice(found)
    return text[: one.start(1)] + draw.choice(values) + text[one.end(1) :]


def _lines(text: str, draw: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    at, count, to = draw.randrange(len(lines)), draw.choice((1, 3, 20)), draw.randrange(len(lines))
    some = lines[at : at + count]
    if draw.random() < 0.5:
        del lines[at : at + count]
    lines[to:to] = some if draw.random() < 0.7 else []
    return "".join(lines)


def xml_bytes(given: Given) -> Case:
    """Bytes of the XML."""
    path = model(given) / XML
    path.write_bytes(garble(path.read_bytes(), given.draw))
    return convert(given, "bytes of the XML")


def weights(given: Given) -> Case:
    """Bytes and length of the weights."""
    path, draw = model(given) / BIN, given.draw
    data = path.read_bytes()
    what = draw.randrange(4)
    data = [garble(data, draw), data[: draw.randrange(len(data))], data + draw.randbytes(99), b"\xff" * len(data)][what]
    path.write_bytes(data)
    return convert(given, f"bytes of the .bin, way {what}", often=0.2)


def changed(value: Any, draw: random.Random) -> Any:
    """A JSON value with something in it replaced, removed or added."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        if draw.random() < 0.15:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], *([changed(value[at], draw)] * draw.choice((0, 1, 1, 2))), *value[at + 1 :]]
    return draw.choice(VALUES)


def json_text(value: Any, draw: random.Random) -> bytes:
    text = json.dumps(value).encode()
    return draw.choice((text, text, text, text, garble(text, draw), b"\xef\xbb\xbf" + text, b"[" * 100_000, text[:-1]))


def config(given: Given) -> Case:
    """Values of config.json."""
    path, draw = model(given) / "config.json", given.draw
    path.write_bytes(json_text(changed(json.loads(path.read_bytes()), draw), draw))
    return convert(given, "config.json", often=0.15)


def record(given: Given) -> Case:
    """What an earlier run recorded, beside the IR or in it."""
    path, draw = model(given, given.converted) / "ovtq.json", given.draw
    path.write_bytes(json_text(changed(json.loads(path.read_bytes()), draw), draw))
    if draw.random() < 0.5:
        xml = path.with_name(XML)
        text = xml.read_text(encoding="utf-8")
        values = ("1", "{", "[{}]", "null", "&quot;", '{"a":1}'.replace('"', "&quot;"))
        place = text.index("<ovtq")
        xml.write_text(text[:place] + _replaced(text[place:], r'value="([^"]*)"', values, draw), encoding="utf-8")
    return given.case("inspect", [given.folder / "model", "--context", "4k"], "ovtq.json, stamp")


def statistics(given: Given) -> Case:
    """Bytes of statistics."""
    path = given.folder / "s.npz"
    path.write_bytes(garble(STATISTICS.read_bytes(), given.draw))
    options = ["--dry-run", "--budget", "100", "--score", "triattention", "--stats", path]
    return given.case("convert", [MINI, *options], "bytes of the statistics")


FIGURES = {
    "kind": "eval", "model": "m", "device": "CPU", "text": "t", "windows": 5, "window": 1024, "chunk": 64,
    "ovtq": "0.1.0", "versions": {"openvino": "2026.4.1-1", "python": "3.11"}, "date": "2026-01-02T03:04:05",
    "positions": [[0, 512], [512, 1024]],
    "rows": [
        {
            "candidate": f"c{number}", "role": role, "cache": "u8", "bytes_per_token": 1728, "flat_bytes": 0,
            "mean_kld": number * 1e-4, "median_kld": 1e-5, "kld_p999": 1e-2, "kld_by_position": [1e-4, 2e-4],
            "same_top": 0.99, "perplexity": 20.5, "bits_per_byte": 1.1, "verdict": "ok", "reason": "",
            "needles": [{"needles": 1, "length": 4096, "depth": 0.5, "right": 3, "of": 4}],
            "greedy": {"prompts": 8, "tokens": 64, "same": 41.5, "identical": 3},
        }
        for number, role in enumerate(("reference", "floor", "candidate"))
    ],
}  # fmt: skip


def figures(given: Given) -> Case:
    """Figures of which a report is made."""
    path, draw = given.folder / "eval.json", given.draw
    path.write_bytes(json_text(changed(FIGURES, draw), draw))
    return given.case("report", [path, "--output", given.folder / "r.html"], "figures of ovtq-eval", made=("r.html",))


# ------------------------------------------------------------------------------------------ graphs still

ALIKE = (
    ("Add", "Multiply", "Subtract", "Divide", "Maximum", "Minimum", "Power", "Mod", "SquaredDifference"),
    ("Sin", "Cos", "Sqrt"),
    ("Greater", "LessEqual", "GreaterEqual", "Less", "Equal", "NotEqual"),
    ("ReduceMean", "ReduceSum", "ReduceProd", "ReduceMax"),
)
KEYS = (
    "axis", "batch_dims", "keep_dims", "transpose_a", "transpose_b", "special_zero", "auto_broadcast", "mode",
    "destination_type", "output_type", "element_type", "min", "max", "alpha", "sort", "variable_id", "variable_type",
    "name", "precision", "causal", "names", "PRECISION",
)  # fmt: skip
GOOD = (
    "true", "false", "-1", "0", "1", "2", "3", "numpy", "none", "bidirectional", "explicit", "f32", "f16", "bf16",
    "i32", "i64", "boolean", "dynamic", "1e-9", "1e38", "nan", "-inf", "logits", "input_ids", "beam_idx",
    "模型\u202e", "a\tb",
)  # fmt: skip


def graph(given: Given) -> Case:
    """Operations, their attributes and their edges, so that most of what comes of it is a model OpenVINO can run."""
    path, draw = model(given) / XML, given.draw
    text, done = path.read_text(encoding="utf-8"), []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        way = draw.randrange(5)
        done.append(str(way))
        if way == 0:
            kinds = draw.choice(ALIKE)
            text = _replaced(text, rf'<layer [^>]*type="({"|".join(kinds)})"', kinds, draw)
        elif way == 1:
            text = _replaced(text, rf' {draw.choice(KEYS)}="([^"]*)"', GOOD, draw)
        elif way == 2:  # an edge from another place
            found = re.findall(r'from-layer="(\d+)" from-port="(\d+)"', text)
            text = _replaced(text, r'(from-layer="\d+" from-port="\d+")', _edges(found), draw)
        elif way == 3:  # two that trade places
            pattern = draw.choice((r'variable_id="([^"]*)"', r'from-layer="(\d+)"', r' name="([^"]*)"'))
            text = _traded(text, pattern, draw)
        else:  # a constant that is another's
            text = _replaced(text, r'<data [^>]*offset="(\d+)"', re.findall(r'offset="(\d+)"', text), draw)
    path.write_text(text, encoding="utf-8")
    return convert(given, f"the graph, ways {', '.join(done)}", often=0.4)


def _edges(found: Sequence[tuple[str, str]]) -> list[str]:
    return [f'from-layer="{layer}" from-port="{port}"' for layer, port in found]


def _traded(text: str, pattern: str, draw: random.Random) -> str:
    """Two of the places where `pattern` stands, with their groups exchanged."""
    found = list(re.finditer(pattern, text))
    if len(found) < 2:
        return text
    one, two = sorted(draw.sample(found, 2), key=lambda match: match.start())
    return text[: one.start(1)] + two[1] + text[one.end(1) : two.start(1)] + one[1] + text[two.end(1) :]


def constants(given: Given) -> Case:
    """Where constants lie in the weights: over one another, odd, beyond the end; and a .bin that is cut."""
    path, draw = model(given) / XML, given.draw
    text, bin_path = path.read_text(encoding="utf-8"), path.with_name(BIN)
    size = bin_path.stat().st_size
    for _ in range(draw.choice((1, 2, 8))):
        key = draw.choice(("offset", "offset", "size"))
        values = [str(x) for x in (0, 1, 3, size - 1, size, size * 2, 2**31, 2**63, 2**64, -1, draw.randrange(size))]
        text = _replaced(text, rf'<data [^>]*{key}="(\d+)"', values, draw)
    path.write_text(text, encoding="utf-8")
    if draw.random() < 0.3:
        os.truncate(bin_path, draw.choice((0, 1, size // 2, size - 1)))
    return convert(given, "places of constants", often=0.4)
