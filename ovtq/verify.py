"""Run the original and the converted model side by side on a device, and measure how far apart they are."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov

from ovtq.errors import VerificationFailed
from ovtq.graph import ancestors, consumers, id_of
from ovtq.models import ModelDescription
from ovtq.runner import EXACT_PROPERTIES, Runner

TOLERANCE = 128 * float(np.finfo(np.float32).eps)  # of the largest logit: 24 layers of f32 sums in another order


@dataclass(frozen=True)
class Call:
    """One call of the model: `tokens` new tokens a sequence, `pad` of the first ones masked in sequence 1."""

    tokens: int
    batch: int = 1
    pad: int = 0
    beams: tuple[int, ...] = ()
    reset: bool = False


@dataclass(frozen=True)
class Difference:
    """How far apart two models are over all calls."""

    layers: int  # how many layers were run
    largest: float  # absolute, of any logit (of the last layer's attention output, if not all layers were run)
    relative: float  # the largest as a share of the largest |logit|
    same_top: float  # share of positions with the same largest element
    positions: int


@dataclass(frozen=True)
class Scope:
    """How much of the model is run: its first `layers` layers, up to the node named `end`; None: all, to the logits."""

    layers: int
    end: str | None = None


def scope(description: ModelDescription, layers: int | None = None) -> Scope:
    """The scope of the first `layers` layers (None: all) of a model still as exported."""
    count = len(description.layers)
    if layers is None or layers >= count:
        return Scope(count)
    node = consumers(description.layers[layers - 1].context)[0]
    while node.get_type_name() != "MatMul":  # Transpose, Reshape, then o_proj, which no pass touches
        node = consumers(node.output(0))[0]
    return Scope(layers, node.get_friendly_name())


def cut(model: ov.Model, end: str) -> ov.Model:
    """What the node named `end` depends on, with the states read there, and that node as the result."""
    node = next(node for node in model.get_ops() if node.get_friendly_name() == end)
    needed = {id_of(step) for step in ancestors(node.output(0))}
    reads = {
        step.get_attributes()["variable_id"]
        for step in model.get_ops()
        if step.get_type_name() == "ReadValue" and id_of(step) in needed
    }
    sinks = [sink for sink in model.get_sinks() if sink.get_variable_id() in reads]
    return ov.Model([ov.opset15.result(node.output(0))], sinks, model.get_parameters())


def schedule(window: int) -> list[Call]:
    """Calls that reach every case of the cache: empty, growing, longer than the window in one call and in chunks,
    decode across the window's edge, then a batch of two with left padding, then its sequences swapped by beam_idx."""
    one = [Call(window + 37), Call(1), Call(1), Call(7), Call(2 * window + 5), Call(1)]
    two = [Call(24, 2, pad=9, reset=True), Call(1, 2, beams=(1, 0)), Call(window, 2), Call(1, 2, beams=(1, 1))]
    return one + two


def play(
    runner: Runner, calls: list[Call], vocabulary: int, seed: int, tick: Callable[[], None] = lambda: None
) -> list[np.ndarray]:
    """The results of each call on seeded random tokens, padded positions left out: (positions, width) each."""
    random, results = np.random.RandomState(seed), []
    for call in calls:
        if call.reset:
            runner.reset()
        ids = random.randint(0, vocabulary, (call.batch, call.tokens)).astype(np.int64)
        shown = np.ones(ids.shape, np.int64)
        shown[1:, : call.pad] = 0
        out = runner.step(ids, shown, np.asarray(call.beams, np.int32) if call.beams else None)
        results.append(np.asarray(out)[shown.astype(bool)])
        tick()
    return results


def compare(reference: list[np.ndarray], other: list[np.ndarray], layers: int) -> Difference:
    """The difference of two runs of the same calls."""
    largest = max(float(np.abs(a - b).max()) for a, b in zip(reference, other, strict=True))
    scale = max(float(np.abs(a).max()) for a in reference)
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(reference, other, strict=True)]
    if not all(np.isfinite(b).all() for b in other):
        largest = float("inf")
    return Difference(layers, largest, largest / scale, float(np.concatenate(same).mean()), sum(map(len, same)))


def verify(
    original: Path,
    converted: Path,
    window: int,
    device: str,
    seed: int,
    extent: Scope,
    tick: Callable[[], None] = lambda: None,
) -> Difference:
    """Compare two IRs as files, one after the other so that one is in memory at a time.

    Raises VerificationFailed if they differ by more than f32 rounding, InputError if the device can't run them.
    """
    calls, results = schedule(window), []
    for xml in (original, converted):
        model = ov.Core().read_model(xml)
        vocabulary = model.output(0).get_partial_shape()[2].get_length()
        if extent.end is not None:
            model = cut(model, extent.end)
        runner = Runner(model, device, EXACT_PROPERTIES)
        results.append(play(runner, calls, vocabulary, seed, tick))
        del runner, model
        gc.collect()
    difference = compare(*results, extent.layers)
    if not difference.relative <= TOLERANCE:
        raise VerificationFailed(
            f"the converted model is wrong on {device}: its results differ by {difference.largest:.3g} "
            f"({difference.relative:.2g} of the largest, allowed {TOLERANCE:.2g}); nothing was written"
        )
    return difference
