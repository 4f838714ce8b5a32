"""What rounding one layer's keys, or its values, to a few bits costs of the whole model's logits, measured.

A text is read in two calls, the first of PAST tokens as the model is. In the second, of NEW tokens, the past of one
layer's keys or values is what codes of some bits make of it, in the basis that statistics say; the new tokens are as
they are. Of these the first RECENT are not scored: so each query has from RECENT to NEW − 1 tokens before it that no
code touched, as in the CPU's form of quantize-kv. That counts, for what is near is looked at most: on the bundled model
the first 32 lose ten times what those behind them do. What the logits of the second call then are from those without
codes is a mean KLD. The graph has the codes of every tensor at once, each with a row of one table that switches it on
and says its bits: so it is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec import FLOOR, STEPS
from ovtq.codec.basis import HeadBasis
from ovtq.codec.moments import PROBED, Calibration
from ovtq.codec.rotation import orthogonal
from ovtq.errors import InputError
from ovtq.evidence.divergence import log_softmax
from ovtq.evidence.unfinished import Unfinished
from ovtq.forms.bases import Choice
from ovtq.forms.quantizer import by_batch
from ovtq.ir import io
from ovtq.ir.graph import f32, i64
from ovtq.models import AttentionLayer, describe
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

PAST, NEW = 256, 192  # tokens of a text's two calls
RECENT = 64  # of the second that are not scored
TEXTS = 4  # at most
TABLE = "ovtq.probe"  # the input: (rows, 4) f32, of each tensor 1 or 0, and mid, peak and spread of its codes
NOTHING = 0.0, 1.0, 1.0, 1.0
ROWS = 16  # positions whose distributions are compared at a time


def texts_in(tokens: int, begin: int | None) -> int:
    """How many texts so many tokens make."""
    return min(tokens // (PAST + NEW - (begin is not None)), TEXTS)


def runs(layers: int, texts: int) -> int:
    """How many calls of NEW tokens it takes for so many full layers."""
    return texts * (1 + 2 * layers * len(PROBED))


def probe(
    model_dir: Path,
    found: Calibration,
    ids: np.ndarray,
    device: str = "CPU",
    tick: Callable[[], None] = lambda: None,
    begin: int | None = None,
    unfinished: Unfinished | None = None,
) -> Calibration:
    """The statistics with what each full layer's keys and values cost, as `Moments.key_kld` and `value_kld`.

    ids (tokens,) are a text, read in texts of PAST + NEW tokens, the token `begin` among them if there is one. `tick`
    is called behind each call of NEW tokens, those of an interrupted run included. Raises InputError if there are no
    full layers, or not tokens enough for one text.
    """
    unfinished = unfinished or Unfinished()
    graph = Probed(model_dir, found, device)
    each = PAST + NEW - (begin is not None)
    count = texts_in(len(ids), begin)
    if not count:
        raise InputError(f"sensitivities need {each} tokens behind those that moments are of, there are {len(ids)}")
    texts = ids[: count * each].reshape(count, each)
    if begin is not None:
        texts = np.insert(texts, 0, begin, axis=1)
    rows = 2 * len(graph.layers)
    done = unfinished.taken("probe") or {"sums": np.zeros((rows, len(PROBED))), "done": np.array(0)}
    sums, behind, number = done["sums"], int(done["done"]), 0
    for text in texts:
        calls = [(row, at) for row in range(rows) for at in range(len(PROBED))]
        left = [call for n, call in enumerate(calls) if number + n >= behind]
        for _ in range(len(calls) - len(left)):
            tick()
        number += len(calls)
        if left:
            graph.read(text)
        tick()
        for row, at in left:
            sums[row, at] += graph.lost({row: PROBED[at]}).mean()
            behind += 1
            unfinished.keep("probe", {"sums": sums, "done": np.array(behind)})
            tick()
    graph.runner.close()
    means = sums / count
    known = {layer.index: (means[2 * n], means[2 * n + 1]) for n, layer in enumerate(graph.layers)}
    layers = {
        index: replace(some, key_kld=known[index][0], value_kld=known[index][1]) if index in known else some
        for index, some in found.layers.items()
    }
    return replace(found, layers=layers)


def full_layers(model_dir: Path) -> tuple[AttentionLayer, ...]:
    """Those whose losses are measured."""
    return describe(io.load(model_dir), io.load_config(model_dir)).full


class Probed:
    """A model as exported, at f32 on a CPU, in which the past of any full layer's keys and values can be rounded.

    Raises InputError for a model without full layers.
    """

    def __init__(self, model_dir: Path, found: Calibration, device: str = "CPU") -> None:
        model = io.load(model_dir)
        self.layers = describe(model, io.load_config(model_dir)).full
        if not self.layers:
            raise InputError(f"{model_dir}: has no full layers, whose bits could be chosen")
        table = op.parameter([2 * len(self.layers), 4], np.float32)
        table.output(0).set_names({TABLE})
        spread = orthogonal(self.layers[0].head_dim, 0)
        bases = Choice("calibrated").of(model, self.layers, (spread, spread), known=found)
        for number, layer in enumerate(self.layers):
            for which, (path, basis) in enumerate(zip(layer.paths, bases[layer.index], strict=True)):
                row = op.gather(table, i64(2 * number + which), i64(0))
                path.append.input(0).replace_source_output(_rounded(path.past, basis, layer, row).output(0))
        probed = ov.Model(model.get_results(), model.get_sinks(), [*model.get_parameters(), table])
        self.runner = Runner(probed, device, EXACT_PROPERTIES if device == "CPU" else {})

    def read(self, text: np.ndarray) -> None:
        """Read the first PAST of a text's tokens, (PAST + NEW,), and what follows them, without any codes."""
        self.runner.reset()
        self.runner.more[TABLE] = self._table({})
        self.runner.step(text[None, :PAST])
        self.shown = self.runner.mask
        self.states = {state.name: np.array(state.state.data) for state in self.runner.request.query_state()}
        self.new = text[None, PAST:]
        self.plain = self._logits({})

    def lost(self, bits: Mapping[int, int]) -> np.ndarray:
        """KLD in nats, (NEW − RECENT,), with codes of so many bits of tensors: 2·n are the nth full layer's keys."""
        found, kld = self._logits(bits), np.empty(NEW - RECENT)
        for first in range(0, NEW - RECENT, ROWS):
            these = slice(first, first + ROWS)
            p, q = log_softmax(self.plain[these]), log_softmax(found[these])
            kld[these] = (np.exp(p) * (p - q)).sum(-1)
        return kld

    def _logits(self, bits: Mapping[int, int]) -> np.ndarray:
        """(NEW − RECENT, vocabulary), from the states behind the first call."""
        for state in self.runner.request.query_state():
            state.state = ov.Tensor(self.states[state.name])
        self.runner.mask = self.shown
        self.runner.more[TABLE] = self._table(bits)
        return self.runner.step(self.new)[0, RECENT:]

    def _table(self, bits: Mapping[int, int]) -> np.ndarray:
        rows = [
            (1.0, (2 ** bits[n] - 1) / 2, *STEPS[bits[n]]) if n in bits else NOTHING
            for n in range(2 * len(self.layers))
        ]
        return np.array(rows, np.float32)


def _rounded(x: Output, basis: HeadBasis, layer: AttentionLayer, row: Node) -> Node:
    """Vectors x (batch, kv_heads, tokens, d) as `AdaptiveUniform` codes in a basis make them, if `row` says so."""
    switch, mid, peak, spread = (op.gather(row, i64(at), i64(0)) for at in range(4))
    y = op.matmul(op.subtract(x, f32(basis.centre[None, :, None])), f32(by_batch(basis.matrix)), False, False)
    norm = op.reduce_l2(y, i64([3]), True)
    top = op.multiply(norm, op.multiply(spread, f32(layer.head_dim**-0.5)))
    top = op.add(op.add(op.multiply(op.reduce_max(op.abs(y), i64([3]), True), peak), top), f32(FLOOR))
    inside = op.clamp(op.divide(y, top), -1.0, 1.0)
    code = op.subtract(op.round(op.add(op.multiply(inside, mid), mid), "half_to_even"), mid)
    error = op.subtract(op.multiply(code, op.divide(norm, op.reduce_l2(code, i64([3]), True))), y)
    return op.add(x, op.multiply(op.matmul(error, f32(by_batch(basis.inverse)), False, False), switch))
