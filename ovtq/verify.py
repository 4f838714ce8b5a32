"""Run the original and the converted model side by side on a device, and measure how far apart they are."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import openvino as ov
from scipy.special import log_softmax

from ovtq.attend_blocks import BLOCK
from ovtq.cache import compiled_precisions, mark, marked
from ovtq.errors import VerificationFailed
from ovtq.extent import Scope, cut, rooted, shortened
from ovtq.graph import constant_of
from ovtq.models import AttentionLayer
from ovtq.packed_check import PackedCheck
from ovtq.pruning import PrunedAttention
from ovtq.runner import EXACT_PROPERTIES, Runner
from ovtq.system import trim_memory

ATTEMPTS = 5  # seeds
ROUTER_TIE = 32 * float(np.finfo(np.float32).eps)  # of the largest router logit of a position
TIES_UNSEEN = 0.02  # of the largest element, where the device does not show its codes: a code may be off by one
# How much of a result may change at a device's own inference precision: OWN_FACTOR times as much as in the original
# and OWN_FLOOR besides, for a code may turn out otherwise. What a plugin gets wrong is off by much more.
OWN_FACTOR, OWN_FLOOR = 4, 0.05
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
    packed: PackedDifference | None = None  # of layers whose cache is quantised
    own: OwnPrecision | None = None  # where a CPU does not compute in f32 by itself


@dataclass(frozen=True)
class OwnPrecision:
    """How far results at the device's own inference precision are from those at f32: the mean of ‖Δ‖/‖result‖."""

    precision: str
    original: float
    converted: float


@dataclass(frozen=True)
class PackedDifference:
    """How far packed layers are from their definition, and what their quantising did to the logits here."""

    layers: int
    relative: float  # the largest difference of a layer's context from numpy's, as a share of the largest element
    positions: int  # at which some layer read codes
    kld: float | None  # mean divergence of the logits from the original's there, in nats; None if some layers only
    same_top: float | None
    pruned: int  # tokens that a head had lost at the end of a text, at most


def schedule(window: int) -> list[Call]:
    """Calls that reach every case of the cache: empty, growing, longer than the window in one call and in chunks,
    decode across the window's edge, then a batch of two with left padding, then its sequences swapped by beam_idx; then
    again, forgotten with the batch as it is, and in calls so short that no token is old enough to be quantised."""
    one = [Call(window + 37), Call(1), Call(1), Call(7), Call(2 * window + 5), Call(1)]
    two = [Call(24, 2, pad=9, reset=True), Call(1, 2, beams=(1, 0)), Call(window, 2), Call(1, 2, beams=(1, 1))]
    new = [Call(window + 37, reset=True), Call(1), Call(9, reset=True)]
    return [*one, *two, *new, Call(20, 2, pad=5, reset=True), Call(1, 2, beams=(1, 0)), Call(7, 2)]


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
    check: PackedCheck | None = None,
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
        if check and (call.reset or not played):
            check.reset()
        ids = random.randint(0, vocabulary, (call.batch, call.tokens)).astype(np.int64)
        shown = np.ones(ids.shape, np.int64)
        shown[1:, : call.pad] = 0
        results = runner.step(ids, shown, np.asarray(call.beams, np.int32) if call.beams else None)
        visible = shown.astype(bool)
        if check:
            beams = np.asarray(call.beams or range(call.batch), np.int32)
            trim_memory()  # numpy and the plugin each keep what the other needs
            check.step(runner.request, shown, runner.mask, beams)
            trim_memory()
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
    layers: Sequence[AttentionLayer],
    device: str,
    seed: int,
    extent: Scope,
    tick: Callable[[], None] = lambda: None,
    ready: Callable[[ov.Model], None] = lambda model: None,
) -> Difference:
    """Compare two IRs as files, one after the other so that one is in memory at a time; `layers` are of the converted.

    Where no token that is read was quantised, results must be equal to f32 rounding. Layers that read codes are held
    to `PackedAttention` besides. Where ties in the routers leave less than half of the positions, the next seeds are
    tried. A CPU that computes in less than f32 by itself also runs both so: the converted model must not lose much more
    by it than the original. `ready` returns once the weights of a part of the converted model can be read. Raises
    VerificationFailed if it does or they differ by more, InputError if the device can't run them.
    """
    for attempt in range(seed, seed + ATTEMPTS):
        difference = _verify(original, converted, layers, device, attempt % 2**32, extent, tick, ready)
        if not difference.relative <= TOLERANCE:
            raise VerificationFailed(
                f"the converted model is wrong on {device}: its results differ by {difference.largest:.3g} "
                f"({difference.relative:.2g} of the largest, allowed {TOLERANCE:.2g}); nothing was written"
            )
        own = difference.own
        if own and not own.converted <= OWN_FACTOR * own.original + OWN_FLOOR:
            raise VerificationFailed(
                f"the converted model is wrong on {device} at {own.precision}, its own precision: results are "
                f"{own.converted:.2g} away from those at f32, the original's {own.original:.2g}; nothing was written"
            )
        if difference.positions > difference.skipped:
            return difference
    raise VerificationFailed(
        f"ties in the model's routers left too little to compare with seeds {seed} to {seed + ATTEMPTS - 1}; "
        "try another --verify-seed, or --verify-layers with a smaller number"
    )


def kept_precision(
    converted: Path,
    layers: Sequence[AttentionLayer],
    device: str,
    extent: Scope,
    ready: Callable[[ov.Model], None] = lambda model: None,
) -> str | None:
    """The precision in which the compiled model keeps its K and V, if the IR asks for one; None if it does not.

    Compiled as a host would that passes no property. Raises VerificationFailed if a cache is kept in another.
    """
    model = ov.Core().read_model(converted)
    precision = marked(model)
    if precision is None:
        return None
    if extent.end is not None:
        model = cut(model, extent)
        mark(model, precision)
    ready(model)
    caches = compiled_precisions(model, device)
    least = 2 * sum(layer.window is None and layer.index < extent.layers for layer in layers)
    if len(caches) < least or set(caches) != {precision}:
        raise VerificationFailed(
            f"{device} would not keep the caches in {precision}: of {least} at least, it keeps {len(caches)}, in "
            f"{', '.join(sorted(set(caches))) or 'none'}; nothing was written"
        )
    return precision


def calls_for(layers: Sequence[AttentionLayer]) -> list[Call]:
    """The schedule that reaches every case of these layers."""
    calls = schedule(_longest(layers))
    limits = [x.packed.room + x.packed.window + x.packed.flush for x in layers if isinstance(x.packed, PrunedAttention)]
    return [*calls, *overflow(max(limits))] if limits else calls


def own_precision(device: str) -> str:
    """In what a CPU computes if nothing is asked of it; f32 for other devices, where that is not tried."""
    return ov.Core().get_property(device, "INFERENCE_PRECISION_HINT").to_string() if device == "CPU" else "f32"


def even(layers: Sequence[AttentionLayer]) -> list[Call]:
    """A text in chunks of one length, beyond all windows: what a plugin keeps from a call, it then uses in the next.

    Each takes the way of a prefill. The text is shorter than most budgets: what those leave is not tried here.
    """
    return [Call(max(_longest(layers) // 3, BLOCK + 1))] * 8


def calls_of(layers: Sequence[AttentionLayer], device: str) -> int:
    """How many calls a verification makes."""
    return 2 * len(calls_for(layers)) + (4 * len(even(layers)) if own_precision(device) != "f32" else 0)


def _longest(layers: Sequence[AttentionLayer]) -> int:
    """Tokens of the longest window, of sliding layers or of what is kept at full precision."""
    packed = [layer.packed.window + layer.packed.flush for layer in layers if layer.packed]
    return max([*(layer.window or 0 for layer in layers), *packed]) or 128


def overflow(limit: int) -> list[Call]:
    """Calls that reach every case of a cache that holds no more than `limit` tokens: filled and overfull in chunks, by
    single tokens, in a batch with padding whose sequences are then swapped."""
    step = min(256, limit)
    chunks = [step] * (limit // step + 1)
    one = [Call(chunks[0], reset=True), *map(Call, chunks[1:]), Call(1), Call(1), Call(7), Call(1)]
    two = [Call(chunks[0], 2, pad=9, reset=True), *(Call(tokens, 2) for tokens in chunks[1:]), Call(1, 2, beams=(1, 0))]
    return [*one, *two, Call(step, 2), Call(1, 2, beams=(1, 1))]


def _verify(
    original: Path,
    converted: Path,
    layers: Sequence[AttentionLayer],
    device: str,
    seed: int,
    extent: Scope,
    tick: Callable[[], None],
    ready: Callable[[ov.Model], None],
) -> Difference:
    calls, results, own = calls_for(layers), [], own_precision(device)
    chunks, chunked, rounded = even(layers) if own != "f32" else [], [], []
    check = PackedCheck([layer for layer in layers if layer.index < extent.layers])
    parts = (functools.partial(_part, original, extent), functools.partial(_part, converted, extent, ready))
    for part in parts:
        model, vocabulary = part()
        chosen: list[int] = []
        if part is parts[0]:
            model, chosen = with_routers(model)
        elif check.layers:
            model = rooted(check.tapped(model))
        held = check if part is parts[1] and check.layers else None
        runner = Runner(model, device, EXACT_PROPERTIES)
        results.append(play(runner, calls, vocabulary, seed, tick, chosen, held))
        runner.reset()
        chunked.append(play(runner, chunks, vocabulary, seed, tick))
        runner.close()
        del runner, model
        gc.collect()
    for part, played in zip(parts, chunked, strict=True) if chunks else ():
        runner = Runner(part()[0], device, EXACT_PROPERTIES | {"INFERENCE_PRECISION_HINT": own})
        rounded.append(_apart(played, play(runner, chunks, vocabulary, seed, tick)))
        runner.close()
        del runner
        gc.collect()
    lossy = _reads_codes(calls, check)
    exact = [[played for played, old in zip(side, lossy, strict=True) if not old] for side in results]
    difference = compare(*exact, extent.layers, seed)
    if rounded:
        difference = replace(difference, own=OwnPrecision(own, *rounded))
    if not check.layers:
        return difference
    allowed = TOLERANCE if check.exact_codes else TIES_UNSEEN
    if not check.largest <= allowed:
        raise VerificationFailed(
            f"the converted model is wrong on {device}: a layer that reads packed codes is {check.largest:.2g} of its "
            f"largest result away from what numpy computes (allowed {allowed:.2g}); nothing was written"
        )
    if check.miscounted:
        raise VerificationFailed(f"the converted model is wrong on {device}: {check.miscounted}; nothing was written")
    rest = [[played for played, old in zip(side, lossy, strict=True) if old] for side in results]
    kld, same_top = _divergence(*rest) if extent.end is None else (None, None)
    positions = sum(int(played.usable.sum()) for played in rest[0])
    return replace(
        difference, packed=PackedDifference(len(check.layers), check.largest, positions, kld, same_top, check.pruned)
    )


def _part(xml: Path, extent: Scope, ready: Callable[[ov.Model], None] = lambda model: None) -> tuple[ov.Model, int]:
    """What is run of a model, and how many tokens it knows."""
    model = ov.Core().read_model(xml)
    vocabulary = model.output(0).get_partial_shape()[2].get_length()
    if extent.end is None:
        ready(model)
        return model, vocabulary
    model = cut(model, extent)
    ready(model)
    return model, shortened(model, vocabulary)


def _apart(reference: Sequence[Played], other: Sequence[Played]) -> float:
    """The mean of ‖b − a‖/‖a‖ over all positions."""
    apart = []
    for a, b in zip(reference, other, strict=True):
        length = np.linalg.norm(a.results, axis=-1)
        apart.append(np.linalg.norm(b.results - a.results, axis=-1) / np.maximum(length, np.finfo(np.float32).tiny))
    found = float(np.concatenate(apart, axis=None).mean())
    return found if np.isfinite(found) else float("inf")


def _reads_codes(calls: Sequence[Call], check: PackedCheck) -> list[bool]:
    """For each call, whether it reads a token that was quantised, or misses one that was pruned."""
    past, found = 0, []
    for call in calls:
        past = 0 if call.reset else past
        found.append(check.lossy(past))
        past += call.tokens
    return found


def _divergence(reference: list[Played], other: list[Played]) -> tuple[float, float]:
    """Mean KLD of the logits in nats, and the share of positions with the same top, where the reference is usable."""
    pairs = [[b.results[a.usable] for a, b in zip(reference, side, strict=True)] for side in (reference, other)]
    expected, got = (log_softmax(np.concatenate(side).astype(np.float64), -1) for side in pairs)
    kld = (np.exp(expected) * (expected - got)).sum(-1).mean()
    return float(kld), float((expected.argmax(-1) == got.argmax(-1)).mean())
