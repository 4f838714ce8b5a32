"""What a model loses as hosts load it: no property set, at whatever precision the device then takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov

from ovtq.errors import InputError, VerificationFailed
from ovtq.passes.check_call import REFUSAL
from ovtq.runtime.runner import Runner
from ovtq.verification.closeness import Loss, Played, columns_of, lost
from ovtq.verification.schedule import Call, texts

FLOATS = frozenset(("f32", "f16", "bf16"))


@dataclass(frozen=True)
class HostDifference:
    """What results lose when no property is set, against those of the same model at f32."""

    precision: str  # what the device computes in then
    cache: str  # in what it keeps the caches of the original
    longest: int  # tokens of the longest call
    original: Loss
    converted: Loss


@dataclass(frozen=True)
class Hosted:
    """What the last calls lost, (batch, tokens) of `lost` each; what the device computes in and keeps caches in."""

    losses: list[np.ndarray]
    precision: str
    cache: str


def hosted(
    model: ov.Model,
    device: str,
    properties: Mapping[str, str],
    calls: Sequence[Call],
    vocabulary: int,
    seed: int,
    at_f32: Sequence[Played],
    tick: Callable[[], None] = lambda: None,
    skip: int = 0,
) -> Hosted:
    """Run the calls that `at_f32` has the results of, but for the first `skip` where the device keeps caches of floats.

    A compressed cache that has not held the longest text is wrong in what follows (P60), which would excuse anything.
    A model of `check-call` is also given a call that it must refuse. Raises VerificationFailed if it takes that, or
    says something else behind it.
    """
    checked = any(node.get_friendly_name() == REFUSAL for node in model.get_ops())
    runner = Runner(model, device, properties)
    columns, losses = columns_of(runner.vocabulary), []
    if not FLOATS.issuperset(runner.caches()):
        skip = 0
    for number, ((call, ids, shown), exact) in enumerate(zip(texts(calls, vocabulary, seed), at_f32, strict=True)):
        tick()
        if number < skip:
            continue
        if call.reset:
            runner.reset()
        results = runner.step(ids, shown, np.asarray(call.beams, np.int32) if call.beams else None)
        losses.append(lost(exact.results, results if columns is None else results[..., columns]))
    if checked:
        _refuse(runner, vocabulary, device, float(np.median(np.concatenate([loss.ravel() for loss in losses]))))
    found = Hosted(losses, *runner.precisions())
    runner.close()
    return found


def recurring(runs: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Of runs of the same calls with other tokens, what is lost at a position in at least half of them.

    A form that is wrong is wrong at the same positions whatever the text says. An expert that rounding chose is at
    another each time, but changes all that follows it in its text.
    """
    return [np.sort(np.stack(call), axis=0)[(len(runs) - 1) // 2] for call in zip(*runs, strict=True)]


def _refuse(runner: Runner, vocabulary: int, device: str, rounding: float) -> None:
    """Make a call that check-call must refuse, twice, and see that what follows is as before.

    On a CPU to the last bit. A GPU plugin swaps kernels while it runs: there the middle one of all positions may be
    `rounding` away, as much as half of all positions lose anyway. Single ones may choose other experts.
    """
    ids = np.random.RandomState(1).randint(0, vocabulary, (1, 65)).astype(np.int64)
    said = []
    for _ in range(2):
        runner.reset()
        said.append(runner.step(ids))
        runner.reset()
        runner.mask = np.ones((1, 0), np.int64)
        try:
            runner.step(ids, np.ones((1, 64), np.int64))
        except InputError:
            continue
        raise VerificationFailed(
            f"the converted model is wrong on {device}: it takes a call whose attention_mask is too short"
        )
    as_before = np.array_equal(said[0], said[1]) if device == "CPU" else np.median(lost(*said)) <= rounding
    if not as_before:
        raise VerificationFailed(
            f"the converted model is wrong on {device}: after a call that it refuses it says something else"
        )
