"""One layer of the form with kernels on a GPU, call by call, as JSON: run by test_kernels_on_gpu.py, emulated.

usage: tools/gpu/emulated python tests/kernels_on_gpu.py FOLDER PRECISION TEXTS {K,V|window}[,HEAD_DIM[,GROUP[,PARTS]]]…

PRECISION is f32 or f16, or either with +xmx: what stands in for XMX (xmx_stand_in.cl) is then before `attend`, which
does not build unless it takes it. GROUP are query heads of a KV head. PARTS are work-groups of a KV head; with 2 one of
them has the whole history, 128 tokens at a time.

TEXTS are tokens of each call, such as 37,1x40,20/1,70: a stroke is a reset, 1x40 forty calls of one. Some tokens on the
left of each longer call are padding; in every fifth call some of the past are hidden, which are seen again in the next.
For each of the layers prints the largest error of any call's context, as a share of the largest element that numpy
computes there. TEXTS - : what is said of calls that must be refused, instead. TEXTS + : two requests of one compiled
model in turn.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino as ov
from openvino import opset15 as op

from ovtq.codec import kernel_files, kernel_layout
from ovtq.codec.basis import HeadBasis
from ovtq.codec.coding import Codecs, codecs
from ovtq.codec.packed_attention import PackedAttention
from ovtq.forms.attend import FullCacheSpec
from ovtq.forms.bases import LayerBases
from ovtq.forms.gpu.kernel_window import KernelWindow
from ovtq.forms.gpu.kernels import Kernels
from ovtq.ir.graph import Port, dim, i64
from ovtq.models.description import AttentionLayer, ModelDescription
from ovtq.runtime.loading import properties

HEADS, WINDOW, CAPACITY = 2, 16, 1024
STAND_IN = Path(__file__).parent / "xmx_stand_in.cl"


class Layer(NamedTuple):
    """Without bits a sliding one."""

    bits: tuple[int, int] | None
    head_dim: int = 64
    group: int = 4
    parts: int = 32

    @property
    def sinks(self) -> np.ndarray:
        return np.random.RandomState(1).standard_normal(HEADS * self.group).astype(np.float32)


def parameter(name: str, shape: list[int], kind: ov.Type) -> ov.Node:
    node = op.parameter(shape, kind, name=name)
    node.output(0).set_names({name})
    return node


def one_layer(of: Layer) -> tuple[ov.Model, ModelDescription, PackedAttention]:
    """A model of nothing but a layer; its context is the result; what it computes."""
    bits, head_dim = of.bits, of.head_dim
    ids, mask = (parameter(name, [-1, -1], ov.Type.i64) for name in ("input_ids", "attention_mask"))
    query, key, value = (
        parameter(name, [-1, heads, -1, head_dim], ov.Type.f32)
        for name, heads in (("query", HEADS * of.group), ("key", HEADS), ("value", HEADS))
    )
    # Tokens serve to let a refusal be seen: they are part of the result, and stand before the layer as in a model
    tokens = op.reshape(op.multiply(op.convert(ids, "f32"), op.constant(np.float32(0))), i64([0, 1, -1, 1]), True)
    entry, stand_in = op.concat([op.add(query, tokens), key, value], 1), op.add(query, tokens)
    ports = (Port(entry, number) for number in range(3))
    window, scale = (None if bits else WINDOW), head_dim**-0.5
    layer = AttentionLayer(
        0, window, HEADS * of.group, HEADS, head_dim, scale, of.sinks, None, None, *ports, stand_in.output(0), None
    )
    result = op.result(op.add(stand_in, op.multiply(tokens, tokens)))
    past = op.subtract(dim(mask, 1), dim(ids, 1))
    description = ModelDescription("none", ids, mask, None, (layer,), (), past)
    if bits is None:
        plain = HeadBasis(np.eye(head_dim)[None], np.eye(head_dim)[None], np.zeros((HEADS, head_dim)))
        whole = PackedAttention((None, None), (plain, plain), of.sinks, 1, 0, reach=WINDOW, query_scale=layer.scale)
        form = KernelWindow(description)
    else:
        centre = rounded(0.3 * np.random.RandomState(2).standard_normal((HEADS, head_dim)))
        middle = rounded(0.3 * np.random.RandomState(3).standard_normal((HEADS, head_dim)))
        bases = LayerBases(skewed(head_dim, centre, 4), skewed(head_dim, middle, 5))
        coded = {0: Codecs(*codecs(tuple(map(str, bits)), head_dim))}
        plan = FullCacheSpec(coded, (layer,), {0: bases}, WINDOW)
        form = Kernels(description, plan, CAPACITY)
    made = form.rewrite(layer)
    model = ov.Model([result], form.finish(), [ids, mask, query, key, value], "layer")
    return model, description.with_layers({0: made}), made.packed or whole


def rounded(x: np.ndarray) -> np.ndarray:
    """To f16: else another rounding of the input would choose another code, which is no error of a kernel."""
    return x.astype(np.float16).astype(np.float32)


def inputs(rng: np.random.RandomState, tokens: int, shown: np.ndarray, of: Layer, batch: int = 1) -> dict:
    shapes = [(batch, heads, tokens, of.head_dim) for heads in (HEADS * of.group, HEADS, HEADS)]
    query, key, value = (rounded(rng.standard_normal(shape)) for shape in shapes)
    ids = np.zeros((batch, tokens), np.int64)
    return {"input_ids": ids, "attention_mask": shown, "query": query, "key": key, "value": value}


def skewed(head_dim: int, centre: np.ndarray, seed: int) -> HeadBasis:
    """A basis for each head that is no rotation, in numbers that f16 holds: a permutation, doubled here and there."""
    random = np.random.RandomState(seed)
    matrix = np.zeros((HEADS, head_dim, head_dim), np.float32)
    for one in matrix:
        one[np.arange(head_dim), random.permutation(head_dim)] = random.choice([-2, -1, 0.5, 1, 2], head_dim)
    return HeadBasis(matrix, np.linalg.inv(matrix).astype(np.float32), centre)


def calls(text: str) -> list[int]:
    found: list[int] = []
    for item in text.split(","):
        tokens, _, times = item.partition("x")
        found += [int(tokens)] * int(times or 1)
    return found


class Text:
    """One request, the numpy that it is held to, and the text so far."""

    def __init__(self, compiled: ov.CompiledModel, attention: PackedAttention, of: Layer, seed: int = 0) -> None:
        self.request, self.attention, self.of = compiled.create_infer_request(), attention, of
        self.rng, self.largest, self.calls = np.random.RandomState(seed), 0.0, 0
        self.reset()

    def reset(self) -> None:
        self.request.reset_state()
        self.attention.reset()
        self.shown = np.ones((1, 0), np.int64)
        self.calls = 0

    def call(self, tokens: int) -> None:
        """Some tokens more; of every fifth call, with some of the past hidden."""
        new = np.ones((1, tokens), np.int64)
        new[:, : tokens // 6] = 0  # padding, on the left of each
        self.shown = np.concatenate([self.shown, new], 1)
        seen = self.shown.copy()
        if self.calls % 5 == 4:
            seen[:, : -tokens - 3 : 3] = 0  # old ones, recent ones
        self.calls += 1
        given = inputs(self.rng, tokens, seen, self.of)
        got = self.request.infer(given)[0].astype(np.float64)[:, :, tokens // 6 :]
        three = (given[name] for name in ("query", "key", "value"))
        expected = self.attention.step(*three, seen, np.zeros(1, np.int64))[:, :, tokens // 6 :]
        error = np.abs(got - expected).max() / np.abs(expected).max()
        self.largest = max(self.largest, float(error) if np.isfinite(got).all() else float("inf"))


def take_xmx(folder: Path) -> None:
    """Put what stands in for XMX before the sources of `attend`, and behind them what does not build without."""
    kernels = folder / kernel_files.FOLDER
    (kernels / STAND_IN.name).write_bytes(STAND_IN.read_bytes())
    (kernels / "taken.cl").write_text("#ifndef XMX\n#error the plain form was taken\n#endif\n")
    config = kernels / kernel_files.CONFIG
    before, sources = config.read_text().split('<Kernel entry="ovtq_attend">\n')
    first, last = (f'<Source filename="{name}"/>\n' for name in (STAND_IN.name, "taken.cl"))
    sources = first + sources.replace("</Kernel>", last + "</Kernel>", 1)
    config.write_text(f'{before}<Kernel entry="ovtq_attend">\n{sources}')


def worst(folder: Path, precision: str, texts: str, of: Layer) -> float:
    kernel_layout.GROUPS = HEADS * of.parts
    model, description, attention = one_layer(of)
    kernel_files.write(description.kernels, folder)
    precision, *xmx = precision.split("+")
    if xmx:
        take_xmx(folder)
    config = {"INFERENCE_PRECISION_HINT": precision, **properties(folder)}
    compiled = ov.Core().compile_model(model, "GPU", config)
    if texts == "+":
        two = [Text(compiled, one_layer(of)[2], of, seed) for seed in (1, 2)]
        for tokens in (20, *[1] * 20, 7, 1, 1):
            for text in two:
                text.call(tokens)
        return max(text.largest for text in two)
    text = Text(compiled, attention, of)
    for part in texts.split("/"):
        text.reset()
        for tokens in calls(part):
            text.call(tokens)
    return text.largest


def refused(folder: Path) -> dict[str, str]:
    """What is said, by what is wrong; empty where something is computed."""
    said: dict[str, str] = {}
    layer = Layer((6, 4))
    model, description, attention = one_layer(layer)
    kernel_files.write(description.kernels, folder)
    rng, config = np.random.RandomState(0), {"INFERENCE_PRECISION_HINT": "f32"}

    def attempt(what: str, device: str, given: dict[str, str], batch: int, tokens: int, past: int = 0) -> None:
        try:
            request = ov.Core().compile_model(model, device, {**config, **given}).create_infer_request()
            request.infer(inputs(rng, tokens, np.ones((batch, past + tokens), np.int64), layer, batch))
            said[what] = ""
        except RuntimeError as error:
            said[what] = str(error)

    bound = properties(folder)
    attempt("no property", "GPU", {}, 1, 3)
    attempt("CPU", "CPU", {}, 1, 3)
    attempt("batch", "GPU", bound, 2, 3)
    attempt("capacity", "GPU", bound, 1, 1, CAPACITY)
    attempt("full", "GPU", bound, 1, 1, CAPACITY - 1)
    text = Text(ov.Core().compile_model(model, "GPU", {**config, **bound}), attention, layer)
    for tokens in (20, 1):
        text.call(tokens)
    try:  # a call too long, in the middle of a text; the same request goes on, and begins anew
        text.request.infer(inputs(rng, 5, np.ones((1, CAPACITY + 1), np.int64), layer))
        said["after"] = "a call past the capacity was taken"
    except RuntimeError:
        for tokens in (1, 7, 1):
            text.call(tokens)
        text.reset()
        for tokens in (20, 1, 1):
            text.call(tokens)
        said["after"] = "" if text.largest < 1e-5 else f"{text.largest} off"
    return said


def main(folder: str, precision: str, texts: str, *layers: str) -> None:
    """Print the errors, or what is refused."""
    found: dict[str, object] = {}
    if texts == "-":
        found = dict(refused(Path(folder)))
    for number, text in enumerate(layers):
        first, *rest = text.split(",")
        key_and_value = None if first == "window" else (int(first), int(rest.pop(0)))
        place = Path(folder) / str(number)
        place.mkdir()
        found[text] = worst(place, precision, texts, Layer(key_and_value, *map(int, rest)))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
