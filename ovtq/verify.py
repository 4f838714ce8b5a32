"""Run the original and the converted model side by side on a device, and measure how far apart they are."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov

from ovtq.errors import InputError, VerificationFailed
from ovtq.io import last_line

# f32 everywhere, so that what remains is rounding: no f16 inference, no compressed cache, no quantised activations.
EXACT_PROPERTIES = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
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

    largest: float  # absolute, of any logit
    relative: float  # the largest as a share of the largest |logit|
    same_top: float  # share of positions with the same most likely token
    positions: int


def schedule(window: int) -> list[Call]:
    """Calls that reach every case of the cache: empty, growing, longer than the window in one call and in chunks,
    decode across the window's edge, then a batch of two with left padding, then its sequences swapped by beam_idx."""
    one = [Call(window + 37), Call(1), Call(1), Call(7), Call(2 * window + 5), Call(1)]
    two = [Call(24, 2, pad=9, reset=True), Call(1, 2, beams=(1, 0)), Call(window, 2), Call(1, 2, beams=(1, 1))]
    return one + two


class Runner:
    """A compiled model fed call by call, the attention mask always as long as the logical past.

    Raises InputError if the device is not there or does not compile the model.
    """

    def __init__(self, model: Path | ov.Model, device: str, properties: dict[str, str] | None = None) -> None:
        core = ov.Core()
        if device.split(".")[0] not in {name.split(".")[0] for name in core.available_devices}:
            raise InputError(f"device {device} is not there; available: {', '.join(core.available_devices) or 'none'}")
        try:
            self.request = core.compile_model(model, device, properties or {}).create_infer_request()
        except RuntimeError as error:
            raise InputError(f"{model}: {device} does not compile it ({last_line(error)})") from None
        self.names = {name for port in self.request.model_inputs for name in port.names}
        self.mask: np.ndarray | None = None

    def reset(self) -> None:
        """Forget everything."""
        self.request.reset_state()
        self.mask = None

    def step(self, ids: np.ndarray, shown: np.ndarray | None = None, beams: np.ndarray | None = None) -> np.ndarray:
        """Logits (batch, tokens, vocabulary) of `ids` (batch, tokens); `shown` is 0 where `ids` is padding.

        `beams[i]` is the sequence whose past sequence i continues.
        """
        batch = ids.shape[0]
        beams = np.arange(batch, dtype=np.int32) if beams is None else np.asarray(beams, dtype=np.int32)
        shown = np.ones(ids.shape, np.int64) if shown is None else shown
        self.mask = shown if self.mask is None else np.concatenate([self.mask[beams], shown], axis=1)
        positions = np.maximum(np.cumsum(self.mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions, "beam_idx": beams}
        outputs = self.request.infer({name: value for name, value in inputs.items() if name in self.names})
        return outputs[0]


def play(runner: Runner, calls: list[Call], vocabulary: int, seed: int, tick: Callable[[], None]) -> list[np.ndarray]:
    """The logits of each call on seeded random tokens, padded positions left out: (positions, vocabulary) each."""
    random, logits = np.random.RandomState(seed), []
    for call in calls:
        if call.reset:
            runner.reset()
        ids = random.randint(0, vocabulary, (call.batch, call.tokens)).astype(np.int64)
        shown = np.ones(ids.shape, np.int64)
        shown[1:, : call.pad] = 0
        out = runner.step(ids, shown, np.asarray(call.beams, np.int32) if call.beams else None)
        logits.append(np.asarray(out)[shown.astype(bool)])
        tick()
    return logits


def compare(reference: list[np.ndarray], other: list[np.ndarray]) -> Difference:
    """The difference of two runs of the same calls."""
    largest = max(float(np.abs(a - b).max()) for a, b in zip(reference, other, strict=True))
    scale = max(float(np.abs(a).max()) for a in reference)
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(reference, other, strict=True)]
    if not all(np.isfinite(b).all() for b in other):
        largest = float("inf")
    return Difference(largest, largest / scale, float(np.concatenate(same).mean()), sum(map(len, same)))


def verify(
    original: Path, converted: Path, window: int, device: str, seed: int, tick: Callable[[], None] = lambda: None
) -> Difference:
    """Compare two IRs as files, one after the other so that one is in memory at a time.

    Raises VerificationFailed if they differ by more than f32 rounding, InputError if the device can't run them.
    """
    calls, results = schedule(window), []
    for xml in (original, converted):
        runner = Runner(xml, device, EXACT_PROPERTIES)
        vocabulary = _vocabulary(runner)
        results.append(play(runner, calls, vocabulary, seed, tick))
        del runner
        gc.collect()
    difference = compare(*results)
    if not difference.relative <= TOLERANCE:
        raise VerificationFailed(
            f"the converted model is wrong on {device}: its logits differ by {difference.largest:.3g} "
            f"({difference.relative:.2g} of the largest logit, allowed {TOLERANCE:.2g}); nothing was written"
        )
    return difference


def _vocabulary(runner: Runner) -> int:
    shape = runner.request.model_outputs[0].partial_shape
    return shape[2].get_length()
