"""Which tokens a layer keeps, and attention to those alone, in numpy by definition: what the graphs are held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov

from ovtq.codec.packed_attention import PackedAttention
from ovtq.forms.scores import SCORES, Score, Tokens
from ovtq.forms.triattention import Statistics
from ovtq.states import POSITION, PRUNED, SCORE, layers_named

MODES = ("evict", "mask", "zero")
# A score is kept as ⌊fraction·score⌋, fraction being DIGIT to the power of its digits, so that no inference precision
# changes which of two is larger; what is beyond 2²¹ then is cut to it. All are exact as f32.
DIGIT = 2**10
# What stands in place of a score:
EMPTY, DROPPED, PADDED, FIRST = -(2**23), -(3 * 2**21), -(2**22), 2**22
VISIBLE_ABOVE = -(3 * 2**20)  # a token that may be attended to has a higher score
TIE = 64 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True, eq=False)
class Pruning:
    """The rule: of the tokens older than the recent ones, those of highest score stay, `room` of them for each KV head.

    Tokens leave the recent ones `flush` at a time, so that between `window` and window + flush − 1 of them are recent,
    and no more than budget + flush − 1 are kept, budget being room + window. The first `prefix` tokens are always
    among those that stay, padding never is. A score depends on the tokens up to its own and is never changed: what is
    out stays out, however the text is cut into calls. With `shared` the scores of a layer's KV heads are averaged.
    `statistics` belong to the score triattention.
    """

    budget: int
    window: int
    prefix: int
    score: str
    mode: str
    shared: bool
    flush: int
    seed: int = 0
    statistics: Statistics | None = None

    @property
    def method(self) -> Score:
        """The score."""
        return SCORES[self.score](self.seed, self.statistics)

    @property
    def fraction(self) -> int:
        """Steps of a score in 1."""
        return DIGIT**self.method.digits

    @property
    def largest(self) -> float:
        """Scores beyond are all alike."""
        return 2**21 / self.fraction

    @property
    def room(self) -> int:
        """Tokens that stay besides the recent ones."""
        return self.budget - self.window

    def older(self, past: int) -> int:
        """How many of `past` tokens are no longer among the recent ones."""
        return max(past - self.window, 0) // self.flush * self.flush

    def scores(
        self, layer: int, keys: np.ndarray, values: np.ndarray, shown: np.ndarray, pre_rope: np.ndarray | None = None
    ) -> np.ndarray:
        """fraction·score, (batch, kv_heads, tokens), of all tokens, not rounded yet.

        keys, after RoPE, and values (batch, kv_heads, tokens, d); `pre_rope` are the keys before RoPE, which
        triattention needs.
        """
        real = shown != 0
        found = self.method.numpy(Tokens(layer, keys, values, real, pre_rope))
        if self.shared:
            found = np.broadcast_to(found.mean(1, keepdims=True), found.shape)
        first = real & (np.cumsum(real, 1) <= self.prefix)
        found = np.clip(found, -self.largest, self.largest) * self.fraction
        return np.where(real[:, None], np.where(first[:, None], FIRST, found), PADDED)


def best(scores: np.ndarray, room: int) -> np.ndarray:
    """Which of (…, tokens) are the `room` of highest score; of equal ones the first."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order[..., :room], True, axis=-1)
    return chosen


class PrunedAttention(PackedAttention):
    """A PackedAttention (with codecs None: to tokens as they came) that sees only what `pruning` kept.

    `layer` is its index, `first` the number of its first KV head in the states that all layers share. `beside` are what
    it has to be shown of each call besides queries, keys and values: the keys before RoPE if the score is of these.
    """

    def __init__(self, *args: Any, pruning: Pruning, layer: int, first: int, beside: Sequence[ov.Output] = ()) -> None:
        super().__init__(*args)
        self.pruning, self.layer, self.first, self.beside = pruning, layer, first, tuple(beside)
        self.pre_rope: np.ndarray | None = None  # all keys before RoPE, (batch, kv_heads, tokens, d)
        self.seen: Mapping[str, np.ndarray] = {}  # states that the graph's next call finds; {}: not known

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.pre_rope = None

    def shown_beside(self, projected: np.ndarray, beams: np.ndarray) -> None:
        """Be told the next call's keys before RoPE, (batch, new, kv_heads·d), and its beams (batch,)."""
        batch, count, _ = projected.shape
        new = projected.reshape(batch, count, len(self.centre[0]), -1).swapaxes(1, 2)
        self.pre_rope = new if self.pre_rope is None else np.concatenate([self.pre_rope[beams], new], 2)

    def lossy(self, past: int) -> bool:
        """Whether a call after `past` tokens differs from the original: it reads codes, or misses tokens."""
        packed = any(self.codecs) and self.older(past) > 0
        return packed or self.older(past) > self.room

    def columns(self, states: Mapping[str, np.ndarray], rows: int) -> np.ndarray:
        """Which token each row of the states is, (batch, kv_heads, rows)."""
        if self.pruning.mode == "evict":
            numbers = states[POSITION][:, self.heads, :, 0].astype(np.int64)
            return numbers[:, :, numbers.shape[2] - rows :]
        return super().columns(states, rows)

    def rows(self, past: int, length: int) -> int:
        """With states of fixed length, those before are empty yet."""
        return min(self.older(past), self.room) if self.pruning.mode == "evict" else length

    @property
    def room(self) -> int:
        """Tokens that stay besides the recent ones."""
        return self.pruning.room

    def due(self, shown: np.ndarray) -> np.ndarray:
        """How many tokens must have been pruned of a text, (batch,); shown (batch, tokens)."""
        real = (shown[:, : self.older(shown.shape[1])] != 0).sum(1)
        return np.maximum(real - self.room, 0)

    def found(self, states: Mapping[str, np.ndarray]) -> None:
        """Where two scores are within rounding, the graph's choice is taken."""
        self.seen = states

    @property
    def heads(self) -> slice:
        """Its KV heads in the states that all layers share."""
        return slice(self.first, self.first + len(self.centre[0]))

    def alive(self, past: int, shown: np.ndarray) -> np.ndarray:
        """Which tokens the call after `past` attends to, (batch, kv_heads, past + new): its own ones all."""
        keys = (self.tokens[0] + self.centre) / self.scale
        count = self.older(past)
        values = self.tokens[1] + self.value_centre
        scores = self.pruning.scores(self.layer, keys, values, shown, self.pre_rope)[:, :, :count]
        chosen = best(np.floor(scores), self.room)
        graph = self._chosen_by_graph(scores.shape)
        if graph is not None and count > self.room:
            # where two scores are a rounding apart, either may stay: the graph's choice is taken
            edge = np.sort(scores, -1)[..., -self.room, None]
            tie = np.abs(scores - edge) <= 1 + TIE * np.abs(edge)
            chosen = np.where(tie & (scores > VISIBLE_ABOVE) & (scores < FIRST), graph, chosen)
        own = np.ones((*chosen.shape[:2], keys.shape[2] - count), bool)
        return np.concatenate([chosen, own], 2)

    def _chosen_by_graph(self, shape: tuple[int, ...]) -> np.ndarray | None:
        if not self.seen or SCORE not in self.seen:
            return None
        chosen = np.zeros(shape, bool)
        if self.pruning.mode == "evict":
            np.put_along_axis(chosen, self.columns(self.seen, min(shape[2], self.room)), True, axis=2)
        else:
            chosen[:] = self.seen[SCORE][:, self.heads, : shape[2], 0] > DROPPED
        return chosen

    def forget(
        self, keys: np.ndarray, values: np.ndarray, past: int, shown: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys, values, and which of them are visible, (batch, kv_heads, 1, tokens)."""
        alive = self.alive(past, shown)
        if self.pruning.mode == "zero":
            return keys * alive[..., None], values * alive[..., None], np.ones((1, 1, 1, 1), bool)
        return keys, values, alive[:, :, None]


def pruned(request: ov.InferRequest) -> dict[int, np.ndarray]:
    """How many tokens each full layer of a running model has pruned so far, {layer: (batch, kv_heads)}.

    Padding is not counted. Empty for a model without prune-kv, and before the first call; all 0 where the budget was
    never exceeded.
    """
    return _by_layer(request, 0)


def kept(request: ov.InferRequest) -> dict[int, np.ndarray]:
    """How many tokens each of these layers still attends to, likewise."""
    return _by_layer(request, 1)


def counted(request: ov.InferRequest) -> dict[str, list[int]] | None:
    """[pruned, kept] of each of these layers so far, of the head and sequence that lost most; None without prune-kv."""
    went, stay = pruned(request), kept(request)
    return {str(layer): [int(count.max()), int(stay[layer].min())] for layer, count in went.items()} or None


def told(counts: Mapping[str, Sequence[int]]) -> str:
    """What `counted` found, as one line."""
    if not any(went for went, _ in counts.values()):
        return f"pruning never fired: all {max(stay for _, stay in counts.values()):,} tokens are still there"
    alike: dict[tuple[int, ...], list[str]] = {}
    for layer, pair in counts.items():
        alike.setdefault(tuple(pair), []).append(layer)
    return "; ".join(
        f"{went:,} of {went + stay:,} tokens pruned, {stay:,} kept in {'layers' if layers[1:] else 'layer'} "
        + ", ".join(layers)
        for (went, stay), layers in alike.items()
    )


def _by_layer(request: ov.InferRequest, column: int) -> dict[int, np.ndarray]:
    found = {state.name: state for state in request.query_state()}
    if PRUNED not in found or not found[PRUNED].state.size:  # nothing was run yet
        return {}
    layers = layers_named(found)
    counts = np.array(found[PRUNED].state.data)[..., column]
    return dict(zip(layers, np.split(counts, len(layers), axis=1), strict=True))
