"""Cases of a campaign: each number makes one, the same whenever it is asked for."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
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
    None, True, 0, -1, 1.5, 10**30, "", "x", "gpt_oss", "\ud800", [], {}, [[]], {"a": {}}, ["full_attention"],
    float("nan"), float("inf"),
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
    command: str  # convert, inspect or report
    arguments: list[str]
    done: str
    verified: bool  # whether it verifies, so that what it writes must be right


def make(number: int, folder: Path, converted: Path) -> Case:
    """The case of a number, its files in `folder`, which is empty; `converted` is the tiny model as ovtq writes it."""
    draw = random.Random(number)
    kind = draw.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    return KINDS[kind][1](number, kind, draw, folder, converted)


def _model(folder: Path, source: Path = TINY) -> Path:
    return Path(shutil.copytree(source, folder / "model"))


def _convert(
    number: int, kind: str, draw: random.Random, folder: Path, done: str, more: list[str] | None = None
) -> Case:
    verified = draw.random() < 0.04
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
    return Case(number, kind, "convert", arguments + (more or []), done, verified)


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


def _xml(number: int, kind: str, draw: random.Random, folder: Path, converted: Path) -> Case:
    path = _model(folder, converted if draw.random() < 0.1 else TINY) / XML
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
    return _convert(number, kind, draw, folder, f"ways {', '.join(done)}")


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


def _xml_bytes(number: int, kind: str, draw: random.Random, folder: Path, converted: Path) -> Case:
    path = _model(folder) / XML
    path.write_bytes(garble(path.read_bytes(), draw))
    return _convert(number, kind, draw, folder, "bytes of the XML")


def _bin(number: int, kind: str, draw: random.Random, folder: Path, converted: Path) -> Case:
    path = _model(folder) / BIN
    data = path.read_bytes()
    what = draw.randrange(4)
    data = [garble(data, draw), data[: draw.randrange(len(data))], data + draw.randbytes(99), b"\xff" * len(data)][what]
    path.write_bytes(data)
    return _convert(number, kind, draw, folder, f"bytes of the .bin, way {what}")


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


def _json_text(value: Any, draw: random.Random) -> bytes:
    text = json.dumps(value).encode()
    return draw.choice((text, text, text, text, garble(text, draw), b"\xef\xbb\xbf" + text, b"[" * 100_000, text[:-1]))


def _config(number: int, kind: str, draw: random.Random, folder: Path, converted: Path) -> Case:
    path = _model(folder) / "config.json"
    path.write_bytes(_json_text(changed(json.loads(path.read_bytes()), draw), draw))
    return _convert(number, kind, draw, folder, "config.json")


def _record(number: int, kind: str, draw: random.Random, folder: Path, converted: Path) -> Case:
    """What an earlier run recorded, beside the IR or in it."""
    path = _model(folder, converted) / "ovtq.json"
    path.write_bytes(_json_text(changed(json.loads(path.read_bytes()), draw), draw))
    if draw.random() < 0.5:
        xml = path.with_name(XML)
        text = xml.read_text(encoding="utf-8")
        values = ("1", "{", "[{}]", "null", "&quot;", '{"a":1}'.replace('"', "&quot;"))
        place = text.index("<ovtq")
        xml.write_text(text[:place] + _replaced(text[place:], r'value="([^"]*)"', values, draw), encoding="utf-8")
    return Case(number, kind, "inspect", [str(folder / "model"), "--context", "4k"], "ovtq.json, stamp", False)


def _statistics(number: int, kind: str, draw: random.Random, folder: Path, converted: Path) -> Case:
    path = folder / "s.npz"
    path.write_bytes(garble(STATISTICS.read_bytes(), draw))
    options = ["--dry-run", "--budget", "100", "--score", "triattention", "--stats", str(path)]
    return Case(number, kind, "convert", [str(MINI), *options], "bytes of the statistics", False)


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


def _figures(number: int, kind: str, draw: random.Random, folder: Path, converted: Path) -> Case:
    path = folder / "eval.json"
    path.write_bytes(_json_text(changed(FIGURES, draw), draw))
    return Case(number, kind, "report", [str(path), "--output", str(folder / "r.html")], "figures of ovtq-eval", False)


# ------------------------------------------------------------------------------------------ options and folders

FLAGS = (
    "--preset", "--passes", "--set", "--target", "--k-bits", "--v-bits", "--residual-window", "--protect", "--centre",
    "--window-bits", "--budget", "--recent-window", "--prefix", "--score", "--stats", "--mode", "--slack", "--heads",
    "--verify-device", "--verify-seed", "--verify-layers", "--json", "--dump-after", "--force", "--dry-run",
)  # fmt: skip
GIVEN = (
    *NUMBERS, "cpu", "gpu", "u8", "k6v4", "none", "8,4", "first:1", "last:9", "truncate-window.slack=3", "a.b=c",
    "=", "quantize-kv", "truncate-window:slack=-1", ",", "\x00", "/dev/full", "/dev/null", "/", ".", "x" * 300, "NPU",
    "\udcff",
)  # fmt: skip


def _options(number: int, kind: str, draw: random.Random, folder: Path, converted: Path) -> Case:
    _model(folder)
    more = []
    for _ in range(draw.choice((1, 2, 3, 6))):
        flag = draw.choice(FLAGS)
        more += [flag] if draw.random() < 0.1 or flag in ("--force", "--dry-run") else [f"{flag}={draw.choice(GIVEN)}"]
    arguments = [str(folder / "model"), str(folder / "out"), *more, "--no-verify"]
    return Case(number, kind, "convert", arguments, "options", False)


def _links(number: int, kind: str, draw: random.Random, folder: Path, converted: Path) -> Case:
    model = _model(folder)
    for _ in range(draw.choice((1, 2))):
        path = model / draw.choice(("extra", "config.json", XML, BIN, "sub", "tokenizer.json"))
        if os.path.lexists(path):
            path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
        way = draw.randrange(5)
        if way == 0:
            os.mkfifo(path)
        elif way == 1:
            path.mkdir()
            (path / "file").write_text("x")
        else:
            path.symlink_to(
                draw.choice(("nothing", path.name, "/dev/zero", "/etc", "/etc/passwd", ".", "..", "config.json"))
            )
    return _convert(number, kind, draw, folder, "links and special files")


def _outputs(number: int, kind: str, draw: random.Random, folder: Path, converted: Path) -> Case:
    _model(folder)
    out = folder / "out"
    way = draw.randrange(7)
    if way == 0:
        out.write_text("")
    elif way == 1:
        out.symlink_to(draw.choice(("nothing", "out", "model", "/dev/null", ".")))
    elif way == 2:
        shutil.copytree(converted, out)
    elif way == 3:
        out.mkdir()
        (out / "ovtq.json").mkdir()
    elif way == 4:
        stem = folder / ".out.ovtq-0123abcd"
        Path(f"{stem}.lock").write_text(draw.choice(("", "3", "999999", "x")))
        shutil.copytree(converted, f"{stem}{draw.choice(('', '.old', '.gone'))}")
    elif way == 5:
        os.mkfifo(out)
    more = ["--force"] if draw.random() < 0.5 else []
    return _convert(number, kind, draw, folder, f"what OUT_DIR is, way {way}", more)


KINDS: dict[str, tuple[int, Callable[[int, str, random.Random, Path, Path], Case]]] = {
    "xml": (30, _xml),
    "xml bytes": (12, _xml_bytes),
    "bin": (6, _bin),
    "config": (14, _config),
    "record": (10, _record),
    "statistics": (4, _statistics),
    "figures": (4, _figures),
    "options": (12, _options),
    "links": (8, _links),
    "outputs": (6, _outputs),
}
