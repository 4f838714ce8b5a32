#!/usr/bin/env python3
"""Draw docs/key-vector.svg: what becomes of one key of the bundled model, and where each form keeps it.

usage: draw_key_vector.py [OUT.svg]

The bars are a real key: layer 1, KV head 0, of the 40th token of tests/data/heldout.txt, and what `ovtq.codec.coding`
makes of it in 6 bits. Needs the `eval` extra, for the tokenizer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset15 as op

from ovtq.codec.coding import coding
from ovtq.codec.packing import pack
from ovtq.ir.io import load, load_config
from ovtq.models import describe
from ovtq.models.rope import mean_rotated_bias
from ovtq.runtime.runner import EXACT_PROPERTIES
from ovtq.runtime.text import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL, TEXT = ROOT / "models" / "gpt-oss-mini", ROOT / "tests" / "data" / "heldout.txt"
LAYER, HEAD, TOKEN, BITS = 1, 0, 40, "6"
WIDTH, HEIGHT = 1080, 652
INK, SOFT, LINE, PAPER = "#1f2328", "#59636e", "#8c959f", "#ffffff"
CPU, GPU, SHARED = "#dbeafe", "#dcfce7", "#f3f4f6"


def a_key() -> tuple[np.ndarray, np.ndarray]:
    """The key and the centre of its head, both times the attention's scale: (64,) each."""
    model = load(MODEL)
    layer = describe(model, load_config(MODEL)).layers[LAYER]
    centre = mean_rotated_bias(model, layer.key.source, layer.kv_heads, layer.head_dim)[HEAD]
    tapped = ov.Model([op.result(layer.key.source)], model.get_sinks(), model.get_parameters())
    request = ov.Core().compile_model(tapped, "CPU", EXACT_PROPERTIES).create_infer_request()
    ids = np.array([Tokenizer(MODEL).encode(TEXT.read_text(encoding="utf-8")[:2000])[:TOKEN]])
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "beam_idx": np.zeros(1, np.int32)}
    given["position_ids"] = np.arange(TOKEN)[None]
    names = {name for port in request.model_inputs for name in port.names}
    found = request.infer({name: value for name, value in given.items() if name in names})
    return found[0][0, HEAD, -1] * layer.scale, centre * layer.scale


class Page:
    """An SVG as it grows."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, size: int = 13, colour: str = INK, more: str = "") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}"{more}>{words}</text>')

    def bold(self, x: float, y: float, words: str, size: int = 13, middle: bool = False) -> None:
        self.text(x, y, words, size, more=' font-weight="600"' + (' text-anchor="middle"' if middle else ""))

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, line: str = LINE, more: str = ""
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{line}"{more}/>'
        )

    def box(self, x: float, y: float, width: float, height: float, fill: str, title: str, *lines: str) -> None:
        self.rect(x, y, width, height, fill, more=' rx="6"')
        self.bold(x + 12, y + 22, title)
        for number, line in enumerate(lines):
            self.text(x + 12, y + 42 + 18 * number, line, 12)

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="{INK}" marker-end="url(#tip)"{dash}/>')

    def bars(self, x: float, y: float, values: np.ndarray, most: float, colour: str) -> None:
        """64 bars up and down from the middle of a field of 240 by 84."""
        self.rect(x, y, 240, 84, PAPER, "#d0d7de")
        middle = y + 42
        self.parts.append(f'<path d="M{x:g} {middle:g} h240" stroke="#d0d7de"/>')
        for number, value in enumerate(values):
            high = abs(value) / most * 40
            top = middle - high if value > 0 else middle
            self.parts.append(
                f'<rect x="{x + 4 + number * 3.64:.1f}" y="{top:.1f}" width="2.6" height="{high:.1f}" fill="{colour}"/>'
            )

    def cells(self, x: float, y: float, values: np.ndarray) -> None:
        """48 bytes as grey squares in four rows."""
        self.rect(x, y, 240, 84, PAPER, "#d0d7de")
        for number, value in enumerate(values):
            row, column = divmod(number, 12)
            grey = 235 - int(value) * 170 // 255
            self.parts.append(
                f'<rect x="{x + 12 + column * 18.2:.1f}" y="{y + 7 + row * 18:g}" width="15" height="15" '
                f'fill="rgb({grey},{grey},{grey})"/>'
            )

    def written(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" role="img">\n'
            "<title>The life of one key vector in a packed model, in the forms for a CPU and for a GPU</title>\n"
            '<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
            f'<path d="M0 0 L9 4 L0 8 z" fill="{INK}"/></marker></defs>\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{PAPER}"/>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def draw() -> str:
    """The picture."""
    key, centre = a_key()
    how = coding((BITS, "4"), key.size, 0)
    turned = (key - centre) @ how.rotation
    codes, scale = how.key.encode(turned[None])
    packed = pack(codes, int(BITS))[0]
    page = Page()

    page.bold(24, 34, "What becomes of it: one key of layer 1 in the preset k6v4, 64 numbers", 15)
    stored = how.key.decode(codes, scale)[0]
    most = float(max(np.abs(some).max() for some in (key, key - centre, stored)))
    columns = (24, 292, 560, 816)
    page.bars(columns[0], 82, key, most, "#57606a")
    page.bars(columns[1], 82, key - centre, most, "#57606a")
    page.bars(columns[2], 82, stored, most, "#0969da")
    page.cells(columns[3], 82, packed.astype(np.int64) % 256)
    heads = (
        ("1  arrives", "after RoPE, times the scale"),
        ("2  is centred", "less c, what is left of its bias"),
        ("3  is rotated and quantised", "times R, on 64 equal levels"),
        ("4  is packed", f"{packed.size} bytes and one scale, not {key.size * 2}"),
    )
    for x, (title, line) in zip(columns, heads, strict=True):
        page.bold(x, 58, title)
        page.text(x, 75, line, 12, SOFT)
    for start, end in ((264, 292), (532, 560), (800, 816)):
        page.arrow((start, 124), (end - 1, 124))

    page.bold(24, 206, "Where it is", 15)
    for x, words in ((24, "in the call it comes in"), (560, "from then on"), (816, "read in every later call")):
        page.text(x, 226, words, 12, SOFT)

    page.rect(12, 238, WIDTH - 24, 142, CPU, "none", ' rx="8" fill-opacity="0.45"')
    page.bold(24, 258, "for a CPU: --target cpu")
    page.box(24, 270, 240, 96, PAPER, "recent window", "state ovtq.recent, as after 2", "the newest 64 to 191 tokens")
    page.box(
        292,
        270,
        240,
        96,
        PAPER,
        "3 and 4",
        "once 128 tokens are older than 64:",
        "all of them together, in an If",
        "that most steps skip",
    )
    page.box(
        560,
        270,
        228,
        96,
        PAPER,
        "history",
        "ovtq.1.key: 48 bytes, i8",
        "ovtq.scale: f32, of all layers",
        "quantised once, never again",
    )
    page.box(
        816,
        270,
        240,
        96,
        PAPER,
        "unpacked by arithmetic",
        "fields cut out of the bytes; one",
        "matrix rotates and decodes the",
        "query; 32 queries at a time",
    )
    for start, end in ((264, 292), (532, 560), (788, 816)):
        page.arrow((start, 318), (end - 1, 318))

    page.rect(12, 396, WIDTH - 24, 166, GPU, "none", ' rx="8" fill-opacity="0.45"')
    page.bold(24, 416, "for a GPU: --target gpu")
    page.box(24, 428, 240, 54, PAPER, "recent window", "ovtq.recent, the newest 64 tokens")
    page.box(
        292,
        448,
        240,
        96,
        PAPER,
        "3 and 4",
        "at once, with the token's call;",
        "both keep it while it is recent,",
        "and there the history is masked",
    )
    page.box(
        560, 448, 228, 96, PAPER, "history", "ovtq.1.key: 48 bytes, i8", "ovtq.1.key.scale: f16", "appended in place"
    )
    page.box(
        816,
        428,
        240,
        116,
        PAPER,
        "looked up by its bytes",
        "one token: in a table of 256",
        "rows, times the scale; several:",
        "decoded for one KV head after",
        "the other, fused attention",
    )
    page.arrow((144, 482), (144, 512), (291, 512))
    for start, end in ((532, 560), (788, 816)):
        page.arrow((start, 496), (end - 1, 496))
    page.text(36, 532, "new tokens enter both", 12, SOFT)

    page.box(
        24,
        580,
        508,
        56,
        SHARED,
        "one softmax over",
        "the sink · recent and new tokens, as they are · the history's codes",
    )
    page.box(
        560, 580, 496, 56, SHARED, "the context", "weights times values, which take the same way in 4 bits, not centred"
    )
    page.arrow((532, 608), (559, 608))
    page.arrow((936, 544), (936, 571), (278, 571), (278, 579), dashed=True)
    return page.written()


def main() -> int:
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(sys.argv[1]) if len(sys.argv) == 2 else ROOT / "docs" / "key-vector.svg"
    out.write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
