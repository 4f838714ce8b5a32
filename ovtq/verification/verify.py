"""Run the original and the converted model side by side on a device, and measure how far apart they are."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import openvino as ov

from ovtq import whereabouts
from ovtq.errors import VerificationFailed
from ovtq.ir.cache import compiled_precisions, mark, marked
from ovtq.ir.io import stamp_of
from ovtq.ir.operations import core
from ovtq.models import AttentionLayer
from ovtq.runtime import loading
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.system import trim_memory
from ovtq.verification.closeness import (
    Played,
    columns_of,
    divergence,
    loss,
    lost,
    played,
    relative,
    scale_of,
    too_lossy,
)
from ovtq.verification.extent import Scope, cut, keep_initial_values, shortened
from ovtq.verification.hosts import HostDifference, Hosted, hosted, recurring
from ovtq.verification.packed_check import PackedCheck
from ovtq.verification.rounding import RUNS as ROUNDINGS
from ovtq.verification.rounding import Moved, bounds, moved, turned, within
from ovtq.verification.routers import undecided, with_routers
from ovtq.verification.schedule import PART, PASTED, Call, calls_for, texts

ATTEMPTS = 5  # seeds
TIES_UNSEEN = 0.02  # of the largest element, where the device does not show its codes: a code may be off by one
TOLERANCE = 128 * float(np.finfo(np.float32).eps)  # of the scale of results: 24 layers of f32 sums in another order
HOPELESS = 0.01  # of the scale of results: no rounding at f32 moves them so far
SAME_TEXT = 1e-6  # nats, the mean divergence of logits that differ by rounding alone


@dataclass(frozen=True)
class Difference:
    """How far apart two models are over all calls."""

    layers: int  # how many layers were run
    largest: float  # absolute, of any logit (of the last layer's attention output, if not all layers were run)
    relative: float  # the largest as a share of the scale of results (see `closeness.relative`)
    same_top: float  # share of positions with the same largest element
    positions: int
    skipped: int  # positions behind a tie in a router, where rounding decides which expert answers
    seed: int
    kld: float | None = None  # of logits, mean, in nats
    tolerance: float = TOLERANCE  # what `relative` may be at most
    rounding: float | None = None  # how far rounding alone moves the original's results, where that had to be known
    packed: PackedDifference | None = None  # of layers whose cache is quantised
    host: HostDifference | None = None  # as a host loads them


@dataclass(frozen=True)
class PackedDifference:
    """How far packed layers are from their definition, and what their quantising did to the logits here."""

    layers: int
    relative: float  # the largest difference of a layer's context from numpy's, as a share of the largest element
    positions: int  # at which some layer read codes
    kld: float | None  # mean divergence of the logits from the original's there, in nats; None if some layers only
    same_top: float | None
    pruned: int  # tokens that a head had lost at the end of a text, at most


def play(
    runner: Runner,
    calls: Sequence[Call],
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
    tied = False
    done: list[Played] = []
    columns = columns_of(runner.vocabulary)
    for call, ids, shown in texts(calls, vocabulary, seed):
        if call.reset:
            runner.reset()
            tied = False
        if check and (call.reset or not done):
            check.reset()
        results = runner.step(ids, shown, np.asarray(call.beams, np.int32) if call.beams else None)
        visible = shown.astype(bool)
        if check:
            beams = np.asarray(call.beams or range(call.batch), np.int32)
            trim_memory()  # numpy and the plugin each keep what the other needs
            check.step(runner.request, shown, runner.attention_mask, beams)
            trim_memory()
        usable = visible & (not tied)
        for index, experts in enumerate(chosen, start=1):
            router = runner.request.get_output_tensor(index).data
            ties = undecided(router.reshape(-1, router.shape[-1]), experts).reshape(ids.shape) & visible
            usable &= ~np.logical_or.accumulate(ties, axis=1)
            tied = tied or bool(ties.any())
        done.append(played(results, visible, usable, columns))
        tick()
    return done


def compare(
    reference: Sequence[Played], other: Sequence[Played], layers: int, seed: int = 0, logits: bool = True
) -> Difference:
    """The difference of two runs of the same calls, at the positions usable in the reference.

    Raises VerificationFailed if the reference gives the same results whatever it reads.
    """
    expected, got = (_chosen(reference, side) for side in (reference, other))
    if len(expected) > 1 and (expected == expected[:1]).all():
        raise VerificationFailed("the original gives the same results for all tokens; there is nothing to compare")
    if logits and len(expected) and not np.median(scale_of(expected)[1]):
        raise VerificationFailed(
            "all logits of a position are the same in the original, but for infinities; there is nothing to compare"
        )
    with np.errstate(invalid="ignore"):
        largest = float(np.where(expected == got, 0, np.abs(expected - got)).max(initial=0))
    tops, others = (_chosen(reference, side, "top") for side in (reference, other))
    total = sum(int(call.shown.sum()) for call in reference)
    some = slice(None, None, -(-len(got) // 512) or 1)  # more say nothing more of a mean
    return Difference(
        layers,
        largest if np.isfinite(largest) else float("inf"),
        float(relative(expected, got).max(initial=0)),
        float((tops == others).mean()) if len(got) else 0.0,
        len(got),
        total - len(got),
        seed,
        float(divergence(expected[some], got[some]).mean()) if logits and len(got) else None,
    )


def _chosen(reference: Sequence[Played], side: Sequence[Played], what: str = "results") -> np.ndarray:
    return np.concatenate([getattr(b, what)[a.usable] for a, b in zip(reference, side, strict=True)])


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

    At f32, where no token that is read was quantised, results must be equal to rounding. Layers that read codes are
    held to `PackedAttention` besides. Where ties in the routers leave less than half of the positions, the next seeds
    are tried. Then the same calls as a host makes them, with no property set: position by position, the converted model
    must not lose much more by that than the original does; and a call that it must refuse leaves nothing behind.
    `ready` returns once the weights of a part of the converted model can be read. Raises VerificationFailed if it does
    or they differ by more, InputError if the device can't run them.
    """
    for attempt in range(seed, seed + ATTEMPTS):
        difference = _verify(original, converted, layers, device, attempt % 2**32, extent, tick, ready)
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
    model = core().read_model(converted)
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
            f"{', '.join(sorted(set(caches))) or 'none'}"
        )
    return precision


def calls_of(layers: Sequence[AttentionLayer]) -> int:
    """How many calls a verification makes."""
    return 4 * len(calls_for(layers))


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
    calls = calls_for(layers, PASTED if extent.end is None else PART)
    check = PackedCheck([layer for layer in layers if layer.index < extent.layers])
    file = core().read_model(converted)
    precision = marked(file)  # then the original is given the same cache
    foreign = device == "CPU" and stamp_of(file).get("target") == "gpu" and bool(check.layers)
    del file

    whereabouts.at("running the original")
    model, vocabulary = _part(original, extent)
    model, chosen = with_routers(model)
    before = _played(model, device, calls, vocabulary, seed, tick, chosen)
    del model
    # What the original loses it loses in any text: the longest is read by the converted model alone, if it can be.
    long = next(number for number, call in enumerate(calls) if number and call.reset)
    properties = {"KV_CACHE_PRECISION": precision} if precision else {}
    at = (calls, vocabulary, seed)
    original_host = hosted(_part(original, extent)[0], device, properties, *at, before, tick, long)
    gc.collect()

    own = loading.properties(converted.parent)
    model = _part(converted, extent, ready)[0]
    if check.layers:
        model = keep_initial_values(check.tapped(model))
    whereabouts.at("running the converted model")
    after = _played(model, device, *at, tick, check=check, properties=own)
    del model

    def shaken(number: int) -> list[Played]:
        """The original, rounded otherwise."""
        other = with_routers(turned(_part(original, extent)[0], number))[0]
        return _played(other, device, *at, chosen=chosen)

    # what is wrong at f32 is said first
    difference = _at_f32(calls, before, after, check, extent, device, seed, shaken)

    def as_hosts(seed: int, at_f32: Sequence[Played], tick: Callable[[], None] = lambda: None) -> Hosted:
        model = _part(converted, extent, ready)[0]
        if foreign:  # what only a CPU gets wrong in a form that is not for it (P01) no GPU does
            model = keep_initial_values(model)
        found = hosted(model, device, own, calls, vocabulary, seed, at_f32, tick)
        gc.collect()
        return found

    host = as_hosts(seed, after, tick)
    shown = [call.shown for call in before]
    codes = loss(calls, [lost(a.results, b.results) for a, b in zip(before, after, strict=True)], shown)
    told = len(original_host.losses)
    reference = loss(calls[-told:], original_host.losses, shown[-told:])
    runs = [host.losses]
    while reason := too_lossy(reference, found := loss(calls, recurring(runs), shown), codes, bool(chosen)):
        if not chosen or len(runs) == ATTEMPTS:  # without experts no text is an excuse
            raise VerificationFailed(
                f"the converted model is wrong on {device} as hosts load it, with no property ({host.precision}): "
                f"{reason}"
            )
        other = (seed + len(runs)) % 2**32
        again = _played(_part(converted, extent, ready)[0], device, calls, vocabulary, other, properties=own)
        runs.append(as_hosts(other, again).losses)
    longest = max(call.tokens for call in calls)
    return replace(difference, host=HostDifference(host.precision, original_host.cache, longest, reference, found))


def _played(
    model: ov.Model,
    device: str,
    calls: Sequence[Call],
    vocabulary: int,
    seed: int,
    tick: Callable[[], None] = lambda: None,
    chosen: Sequence[int] = (),
    check: PackedCheck | None = None,
    properties: Mapping[str, str] | None = None,
) -> list[Played]:
    """What a model says at f32, with `properties` besides."""
    runner = Runner(model, device, EXACT_PROPERTIES | dict(properties or {}))
    found = play(runner, calls, vocabulary, seed, tick, chosen, check if check and check.layers else None)
    runner.close()
    del runner, model
    gc.collect()
    return found


def _at_f32(
    calls: Sequence[Call],
    original: list[Played],
    converted: list[Played],
    check: PackedCheck,
    extent: Scope,
    device: str,
    seed: int,
    shaken: Callable[[int], list[Played]],
) -> Difference:
    """How far apart they are at f32; `shaken(n)` plays the original with another rounding.

    Raises VerificationFailed if that is too far.
    """
    lossy = _reads_codes(calls, check)

    def exact(side: list[Played]) -> list[Played]:
        return [call for call, old in zip(side, lossy, strict=True) if not old]

    before, after = exact(original), exact(converted)
    difference = compare(before, after, extent.layers, seed, logits=extent.end is None)
    if TOLERANCE < difference.relative < HOPELESS:
        runs = [_apart(before, exact(shaken(number))) for number in range(ROUNDINGS)]
        bound = bounds(TOLERANCE, runs)
        if within(_apart(before, after), bound):
            most = max(run.largest for run in runs)
            difference = replace(difference, tolerance=bound.largest, rounding=most)
    if not difference.relative <= difference.tolerance or (difference.kld or 0) > SAME_TEXT:
        raise VerificationFailed(
            f"the converted model is wrong on {device}: its results differ by {difference.largest:.3g} "
            f"({difference.relative:.2g} of their scale, allowed {difference.tolerance:.2g})"
        )
    if not check.layers:
        return difference
    allowed = TOLERANCE if check.exact_codes else TIES_UNSEEN
    if not check.largest <= allowed:
        raise VerificationFailed(
            f"the converted model is wrong on {device}: a layer that reads packed codes is {check.largest:.2g} of its "
            f"largest result away from what numpy computes (allowed {allowed:.2g})"
        )
    if check.miscounted:
        raise VerificationFailed(f"the converted model is wrong on {device}: {check.miscounted}")
    rest = [[call for call, old in zip(side, lossy, strict=True) if old] for side in (original, converted)]
    kld = same_top = None
    if extent.end is None:
        kld = float(divergence(*(_chosen(rest[0], side) for side in rest)).mean())
        tops = [_chosen(rest[0], side, "top") for side in rest]
        same_top = float((tops[0] == tops[1]).mean())
    positions = sum(int(call.usable.sum()) for call in rest[0])
    packed = PackedDifference(len(check.layers), check.largest, positions, kld, same_top, check.pruned)
    return replace(difference, packed=packed)


def _apart(before: Sequence[Played], after: Sequence[Played]) -> Moved:
    return moved(_chosen(before, before), _chosen(before, after))


def _part(xml: Path, extent: Scope, ready: Callable[[ov.Model], None] = lambda model: None) -> tuple[ov.Model, int]:
    """What is run of a model, and how many tokens it knows."""
    model = core().read_model(xml)
    vocabulary = model.output(0).get_partial_shape()[2].get_length()
    if extent.end is None:
        ready(model)
        return model, vocabulary
    precision = marked(model)
    model = cut(model, extent)
    if precision:
        mark(model, precision)
    ready(model)
    return model, shortened(model, vocabulary)


def _reads_codes(calls: Sequence[Call], check: PackedCheck) -> list[bool]:
    """For each call, whether it reads a token that was quantised, or misses one that was pruned."""
    past, found = 0, []
    for call in calls:
        past = 0 if call.reset else past
        found.append(check.lossy(past))
        past += call.tokens
    return found
