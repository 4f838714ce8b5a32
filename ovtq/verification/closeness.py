"""How far apart two runs of the same calls are, whatever else their results are like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from ovtq.verification.schedule import Call

# Times the length on which a quarter of a position's results lie: what is farther from there does not set the scale.
ORDINARY = 128
LARGE = 16  # a number that many times the scale may differ by as much of itself as one of the scale of the scale
MASSES = 4  # numbers that so many results may have in common
STRETCH, BLOCK = 16, 64  # positions in a row
COLUMNS = 2048  # of a vocabulary's logits that are kept of a call, where there are more


@dataclass(frozen=True)
class Played:
    """One call's results (batch, tokens, width); which positions (batch, tokens) are no padding, which to compare.

    Of logits the results may be those of a part of the vocabulary; `top` is the largest of all.
    """

    results: np.ndarray
    shown: np.ndarray
    usable: np.ndarray
    top: np.ndarray


def played(results: np.ndarray, shown: np.ndarray, usable: np.ndarray, columns: np.ndarray | None = None) -> Played:
    """Keep of a call's results what is compared."""
    return Played(results if columns is None else results[..., columns], shown, usable, results.argmax(-1))


def columns_of(vocabulary: int) -> np.ndarray | None:
    """Which logits are kept of a vocabulary: a random choice of a large one, None for all."""
    if vocabulary <= COLUMNS:
        return None
    return np.sort(np.random.RandomState(0).permutation(vocabulary)[:COLUMNS])


def scale_of(results: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middle of each position of (…, width), and how far its ordinary results are from it, at most.

    Ordinary is what lies where results lie closest. Others (tokens that are forbidden by -1e9, say) do not count:
    measured by them every fault would be small. Nor do infinities, nor a number that a quarter of the rest are.
    """
    rows = results.reshape(-1, results.shape[-1])
    some = rows[:, :: max(rows.shape[-1] // 512, 1)]
    centre, width = _densest(some)
    if (alike := ~(width > 0)).any():  # what differs at all may be few
        centre[alike], width[alike] = _densest(rows[alike])
    limit = (ORDINARY * width)[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        close = np.sort(np.where(np.abs(some - centre[:, None]) <= limit, some, np.nan), -1)
        count = np.isfinite(close).sum(-1)
        median = np.take_along_axis(close, np.maximum(count // 2, 0)[:, None] % close.shape[-1], -1)[:, 0]
        middle = np.where(count > 0, median, centre)
        away = np.abs(rows - middle[:, None])
        away[~(np.abs(rows - centre[:, None]) <= limit)] = 0
    away[~np.isfinite(away)] = 0
    return middle.reshape(results.shape[:-1]), away.max(-1, initial=0).reshape(results.shape[:-1])


def _densest(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The centre and width of the shortest interval that holds a quarter of each row's numbers.

    Less those that a quarter of them are equal to; the width is 0 where no others are left.
    """
    centre, width = np.full(len(rows), np.nan, np.float32), np.zeros(len(rows), np.float32)
    left = np.arange(len(rows))
    some = np.sort(np.where(np.isfinite(rows), rows, np.nan), -1)  # what is no number comes last
    for _ in range(MASSES):
        counts = np.isfinite(some[left]).sum(-1)
        for count in np.unique(counts[counts > 0]):
            at = left[counts == count]
            quarter = max(int(count) // 4, 1) if count > 1 else 0
            numbers = some[at, :count]
            with np.errstate(over="ignore"):
                spans = numbers[:, quarter:] - numbers[:, : count - quarter]
            first = spans.argmin(-1)[:, None]
            width[at] = np.take_along_axis(spans, first, -1)[:, 0]
            centre[at] = np.take_along_axis(numbers, first + quarter // 2, -1)[:, 0]
        left = left[(counts > 1) & (width[left] == 0)]
        if not left.size:
            break
        some[left] = np.sort(np.where(some[left] == centre[left, None], np.nan, some[left]), -1)
    return centre, width


def relative(expected: np.ndarray, got: np.ndarray) -> np.ndarray:
    """The largest difference of each position of (positions, width), in shares of the scale of them all.

    A number much larger than that is held to its own size. Infinities must be equal; what is no number is as far away
    as can be.
    """
    scale = max(float(np.median(scale_of(expected)[1])) if len(expected) else 0, float(np.finfo(np.float32).tiny))
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(got - expected) / np.maximum(scale, np.abs(expected) / LARGE)
    apart[got == expected] = 0  # infinities, too
    apart[np.isnan(apart)] = np.inf
    return apart.max(-1, initial=0)


def divergence(expected: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Of logits (positions, width), the KL divergence of each position in nats."""
    logs = [log_softmax(np.maximum(x.astype(np.float64), -1e30), -1) for x in (expected, got)]
    return (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)


def lost(expected: np.ndarray, got: np.ndarray) -> np.ndarray:
    """‖got − expected‖/‖expected − its middle‖ of each position of (…, width), over its ordinary results.

    Infinity where a result is far from that and not much the same, or no number.
    """
    middle, scale = (x[..., None] for x in scale_of(expected))
    with np.errstate(invalid="ignore", over="ignore"):
        apart, away = got - expected, expected - middle
        far = ~(np.abs(away) <= scale)
        if far.any():
            alike = np.isfinite(expected) & (np.abs(apart) <= np.abs(expected) / LARGE)
            strange = far & ~((got == expected) | alike)
            apart[far] = away[far] = 0
            apart[strange] = np.inf
        found = np.linalg.norm(apart, axis=-1) / np.maximum(np.linalg.norm(away, axis=-1), np.finfo(np.float32).tiny)
    return np.where(np.isfinite(found), found, np.inf)


@dataclass(frozen=True)
class Loss:
    """What a model's results lose at a device's own properties, by position: shares of a result, as of `lost`.

    `largest` is that of any one position, `often` that of one in a hundred. The others are middles, which an expert
    that rounding chose does not move: `stretch` and `block` of 16 and 64 positions in a row, the worst; `first` and
    `last` of the first and the last positions of calls, `step` of calls of one token.
    """

    mean: float
    often: float
    largest: float
    stretch: float
    block: float
    first: float
    last: float
    step: float


def loss(calls: Sequence[Call], losses: Sequence[np.ndarray], shown: Sequence[np.ndarray]) -> Loss:
    """Summarise losses (batch, tokens) of each call; hidden positions are left out."""
    long = [(some, seen) for call, some, seen in zip(calls, losses, shown, strict=True) if call.tokens > 1]
    every = np.concatenate([some[seen] for some, seen in zip(losses, shown, strict=True)])
    steps = [some.reshape(-1) for call, some in zip(calls, losses, strict=True) if call.tokens == 1]
    return Loss(
        mean=float(every.mean()),
        often=float(np.quantile(every, 0.99, method="higher")),  # there may be infinities
        largest=float(every.max()),
        stretch=_worst(every, STRETCH),
        block=_worst(every, BLOCK),
        first=_middle([some[seen[:, 0], 0] for some, seen in long]),
        last=_middle([some[seen[:, -1], -1] for some, seen in long]),
        step=_middle(steps),
    )


def _worst(losses: np.ndarray, count: int) -> float:
    """The largest middle of so many in a row."""
    runs = np.lib.stride_tricks.sliding_window_view(losses, min(count, len(losses)))
    return float(np.median(runs, axis=-1).max())


def _middle(parts: Sequence[np.ndarray]) -> float:
    return float(np.median(np.concatenate(parts))) if parts else 0.0


def too_lossy(original: Loss, converted: Loss, quantised: Loss, chooses: bool) -> str | None:
    """What a conversion loses more by its precision than it may, as a phrase; None if nothing.

    It may lose as much again as its quantising costs, `quantised`, for with inputs rounded otherwise codes fall
    otherwise. `chooses`: experts are chosen in the model, and at another precision others, here and there: then the
    largest loss of single positions says nothing.
    """
    for name, (factor, floor) in BOUNDS.items():
        if chooses and name == "largest":
            continue
        before, after, codes = (getattr(some, name) for some in (original, converted, quantised))
        if not after <= factor * before + codes + floor:
            return f"{WORDS[name]} results are {after:.2g} away from those at f32, the original's {before:.2g}"
    return None


# How many times as much as the original, and how much of a result besides, a conversion may lose of each
BOUNDS = {
    "mean": (3, 0.02), "often": (3, 0.1), "stretch": (3, 0.02), "block": (2, 0.01), "first": (3, 0.02),
    "last": (3, 0.02), "step": (3, 0.02), "largest": (3, 0.1),
}  # fmt: skip
WORDS = {
    "mean": "on average",
    "often": "at one position in a hundred",
    "stretch": f"at {STRETCH} positions in a row",
    "block": f"at {BLOCK} positions in a row",
    "first": "at the first position of a call",
    "last": "at the last position of a call",
    "step": "in calls of one token",
    "largest": "at some position",
}
