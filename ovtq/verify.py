"""Run the original and the converted model side by side on a device, and measure how far apart they are."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import Output

from ovtq.errors import VerificationFailed
from ovtq.graph import ancestors, constant_of, consumers, id_of
from ovtq.models import ModelDescription
from ovtq.runner import EXACT_PROPERTIES, Runner

ATTEMPTS = 5  # seeds
ROUTER_TIE = 32 * float(np.finfo(np.float32).eps)  # of the largest router logit of a position
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
    skipped: int  # positions behind a tie in a router, where rounding decides which expert answers
    seed: int


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
    # a state that layers share is written by later ones too: let an earlier one write in their stead
    for sink in sinks:
        for step in list(ancestors(sink.input_value(0))):
            if step.get_type_name() == "Concat":
                kept = [value for value in step.input_values() if id_of(value.get_node()) in needed]
                for index, value in enumerate(step.input_values()):
                    if kept and id_of(value.get_node()) not in needed and _alike(value, kept[0]):
                        step.input(index).replace_source_output(kept[0])
    return ov.Model([ov.opset15.result(node.output(0))], sinks, model.get_parameters())


def _alike(a: Output, b: Output) -> bool:
    return str(a.get_partial_shape()) == str(b.get_partial_shape())


def schedule(window: int) -> list[Call]:
    """Calls that reach every case of the cache: empty, growing, longer than the window in one call and in chunks,
    decode across the window's edge, then a batch of two with left padding, then its sequences swapped by beam_idx."""
    one = [Call(window + 37), Call(1), Call(1), Call(7), Call(2 * window + 5), Call(1)]
    two = [Call(24, 2, pad=9, reset=True), Call(1, 2, beams=(1, 0)), Call(window, 2), Call(1, 2, beams=(1, 1))]
    return one + two


@dataclass(frozen=True)
class Played:
    """One call's results (batch, tokens, width); which positions (batch, tokens) are no padding, which to compare."""

    results: np.ndarray
    shown: np.ndarray
    usable: np.ndarray


def with_routers(model: ov.Model) -> tuple[ov.Model, list[int]]:
    """`model` with the logits of its experts' routers as further results, and how many experts each one chooses."""
    routers = [node for node in model.get_ordered_ops() if node.get_type_name() == "TopK"]
    taps = [ov.opset15.result(node.input_value(0)) for node in routers]
    chosen = [int(constant_of(node.input_value(1))) for node in routers]
    return ov.Model([*model.get_results(), *taps], model.get_sinks(), model.get_parameters()), chosen


def undecided(router: np.ndarray, chosen: int) -> np.ndarray:
    """Where the last expert chosen and the first one left out, of (positions, experts), are within rounding."""
    ordered = np.sort(router, axis=-1)[:, ::-1]
    return ordered[:, chosen - 1] - ordered[:, chosen] <= ROUTER_TIE * np.abs(router).max(-1)


def play(
    runner: Runner,
    calls: list[Call],
    vocabulary: int,
    seed: int,
    tick: Callable[[], None] = lambda: None,
    chosen: Sequence[int] = (),
) -> list[Played]:
    """Run the calls on seeded random tokens; padding is not usable, nor, with routers, is what follows a tie.

    `chosen` belongs to a model of `with_routers`. A tie makes its position unusable, those after it in its sequence,
    and all later calls up to the next reset.
    """
    random, played, tied = np.random.RandomState(seed), [], False
    for call in calls:
        if call.reset:
            runner.reset()
            tied = False
        ids = random.randint(0, vocabulary, (call.batch, call.tokens)).astype(np.int64)
        shown = np.ones(ids.shape, np.int64)
        shown[1:, : call.pad] = 0
        results = np.array(runner.step(ids, shown, np.asarray(call.beams, np.int32) if call.beams else None))
        visible = shown.astype(bool)
        usable = visible & (not tied)
        for index, experts in enumerate(chosen, start=1):
            router = runner.request.get_output_tensor(index).data
            ties = undecided(router.reshape(-1, router.shape[-1]), experts).reshape(ids.shape) & visible
            usable &= ~np.logical_or.accumulate(ties, axis=1)
            tied = tied or bool(ties.any())
        played.append(Played(results, visible, usable))
        tick()
    return played


def compare(reference: list[Played], other: list[Played], layers: int, seed: int = 0) -> Difference:
    """The difference of two runs of the same calls, at the positions usable in the reference."""
    pairs = [(a.results[a.usable], b.results[a.usable]) for a, b in zip(reference, other, strict=True)]
    expected, got = (np.concatenate(side) for side in zip(*pairs, strict=True))
    largest = float(np.abs(expected - got).max(initial=0)) if np.isfinite(got).all() else float("inf")
    scale = float(np.abs(expected).max(initial=np.finfo(np.float32).tiny))
    same = float((expected.argmax(-1) == got.argmax(-1)).mean()) if len(got) else 0.0
    total = sum(int(played.shown.sum()) for played in reference)
    return Difference(layers, largest, largest / scale, same, len(got), total - len(got), seed)


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

    Where ties in the routers leave less than half of the positions, the next seeds are tried.
    Raises VerificationFailed if they differ by more than f32 rounding, InputError if the device can't run them.
    """
    for attempt in range(seed, seed + ATTEMPTS):
        difference = _verify(original, converted, schedule(window), device, attempt % 2**32, extent, tick)
        if not difference.relative <= TOLERANCE:
            raise VerificationFailed(
                f"the converted model is wrong on {device}: its results differ by {difference.largest:.3g} "
                f"({difference.relative:.2g} of the largest, allowed {TOLERANCE:.2g}); nothing was written"
            )
        if difference.positions > difference.skipped:
            return difference
    raise VerificationFailed(
        f"ties in the model's routers left too little to compare with seeds {seed} to {seed + ATTEMPTS - 1}; "
        "try another --verify-seed, or --verify-layers with a smaller number"
    )


def _verify(
    original: Path, converted: Path, calls: list[Call], device: str, seed: int, extent: Scope, tick: Callable[[], None]
) -> Difference:
    results = []
    for xml in (original, converted):
        model = ov.Core().read_model(xml)
        vocabulary = model.output(0).get_partial_shape()[2].get_length()
        if extent.end is not None:
            model = cut(model, extent.end)
        chosen: list[int] = []
        if xml == original:
            model, chosen = with_routers(model)
        runner = Runner(model, device, EXACT_PROPERTIES)
        results.append(play(runner, calls, vocabulary, seed, tick, chosen))
        del runner, model
        gc.collect()
    return compare(*results, extent.layers, seed)
