"""Which calls a verification makes: so that every form takes every way it has, in calls as hosts make them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ovtq.forms.pruning import PrunedAttention
from ovtq.models import AttentionLayer
from ovtq.models.description import InPlace

PASTED = 1025  # tokens of one call, as of a text that somebody pastes; no multiple of any block
PART = 513  # of a big model, whose form for a GPU would take 1.5 GB more for 1,025 tokens on a CPU
NEAR = 4  # tokens apart
STEPS = 16  # single tokens in a row, as in every answer


@dataclass(frozen=True)
class Call:
    """One call of the model: `tokens` new tokens a sequence, `pad` of the first ones masked in sequence 1."""

    tokens: int
    batch: int = 1
    pad: int = 0
    beams: tuple[int, ...] = ()
    reset: bool = False


def lengths_of(layers: Sequence[AttentionLayer]) -> list[int]:
    """Lengths beyond which a call or a text takes another way in some layer, the layers' windows among them.

    Of those next to each other (a window, and the rows that are kept for it) the longest.
    """
    found = sorted({length for layer in layers for length in (*layer.lengths, layer.window or 1)})
    return [length for length, after in zip(found, [*found[1:], PASTED * 2], strict=True) if after - length > NEAR]


def calls_for(layers: Sequence[AttentionLayer], longest: int = PASTED) -> list[Call]:
    """The calls that reach every case of these layers: of lengths, of the cache, of pruning; none over `longest`."""
    windows = [layer.window for layer in layers if layer.window is not None]
    packed = [layer.packed.window + layer.packed.flush for layer in layers if layer.packed]
    window = max([*windows, *packed], default=0) or 128
    limits = [x.packed.room + x.packed.window + x.packed.flush for x in layers if isinstance(x.packed, PrunedAttention)]
    room = [layer.cache.layout.capacity for layer in layers if isinstance(layer.cache, InPlace)]
    if room:  # two more tokens follow the longest call, and a batch is refused
        calls = [*pasted(lengths_of(layers), min(longest, *room) - 2), *edges(window)]
        return [call for call in calls if call.batch == 1]
    calls = [*pasted(lengths_of(layers), longest), *edges(window)]
    return [*calls, *overflow(max(limits))] if limits else calls


def pasted(lengths: Sequence[int], longest: int) -> list[Call]:
    """A long text in one call, and the answer begun; then a text in calls one longer than each length, the shortest and
    the longest twice, for what a plugin keeps from a call it uses in the next of that shape, and a short one again."""
    ways = [length + 1 for length in lengths if 1 < length < longest] or [2]
    text = [ways[0], *ways, ways[-1], ways[0]]
    return [Call(longest, reset=True), Call(1), Call(1), Call(text[0], reset=True), *map(Call, text[1:])]


def edges(window: int) -> list[Call]:
    """Calls that reach every case of the cache: empty, growing by single tokens across the window's edge; forgotten
    with the batch as it is; a batch of two with left padding, then its sequences swapped by beam_idx; and calls so
    short that no token is old enough to be quantised. A long window is reached in calls of PASTED tokens, and in a
    batch not at all: a form does there what it does behind a short one."""
    long, rest = divmod(max(window - 5, 1), PASTED)
    edge = [PASTED] * long + [rest] * bool(rest)
    window = min(window, PASTED)
    steps = [*[Call(1)] * STEPS, Call(7), Call(1), Call(9, reset=True)]
    one = [Call(edge[0], reset=True), *map(Call, edge[1:]), *steps]
    two = [Call(24, 2, pad=9, reset=True), Call(1, 2, beams=(1, 0)), Call(window, 2), Call(1, 2, beams=(1, 1))]
    return [*one, *two, Call(20, 2, pad=5, reset=True), Call(1, 2, beams=(1, 0)), Call(7, 2)]


def overflow(limit: int) -> list[Call]:
    """Calls that reach every case of a cache that holds no more than `limit` tokens: filled and overfull in chunks, by
    single tokens, in a batch with padding whose sequences are then swapped."""
    step = min(256, limit)
    chunks = [step] * (limit // step + 1)
    one = [Call(chunks[0], reset=True), *map(Call, chunks[1:]), Call(1), Call(1), Call(7), Call(1)]
    two = [Call(chunks[0], 2, pad=9, reset=True), *(Call(tokens, 2) for tokens in chunks[1:]), Call(1, 2, beams=(1, 0))]
    return [*one, *two, Call(step, 2), Call(1, 2, beams=(1, 1))]


def texts(calls: Sequence[Call], vocabulary: int, seed: int) -> Iterator[tuple[Call, np.ndarray, np.ndarray]]:
    """Each call with its random tokens and which of them are shown, (batch, tokens) i64."""
    random = np.random.RandomState(seed)
    for call in calls:
        ids = random.randint(0, vocabulary, (call.batch, call.tokens)).astype(np.int64)
        shown = np.ones(ids.shape, np.int64)
        shown[1:, : call.pad] = 0
        yield call, ids, shown
