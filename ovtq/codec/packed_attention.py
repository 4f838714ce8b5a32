"""Attention over a packed cache in numpy, by its definition: what the graphs are held to once they read codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ovtq.codec import AdaptiveUniform
from ovtq.codec.basis import HeadBasis
from ovtq.codec.coding import UNIT, whole_scale
from ovtq.states import scale_name


class StateSlice(NamedTuple):
    """Where a layer's packed keys or values are in the states: codes in one, scales in another, or in `….scale`."""

    state: str
    heads: slice = slice(None)
    row: slice = slice(None)
    scale_heads: slice = slice(None)
    scale_state: str = ""

    @property
    def states(self) -> tuple[str, str]:
        """The names of that with the codes and of that with the scales."""
        return self.state, self.scale_state or scale_name(self.state)

    def read(self, states: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Bytes (batch, kv_heads, tokens, ·) i8 and scales (batch, kv_heads, tokens, 1)."""
        codes, scales = (states[name] for name in self.states)
        codes, scales = codes[:, self.heads, :, self.row], scales[:, self.scale_heads]
        if np.issubdtype(scales.dtype, np.integer):
            scales = ((scales / UNIT) ** 2).astype(np.float32)
        return codes, scales


class PackedAttention:
    """A layer's attention over a packed cache in f64, all tokens kept as they came.

    A key k is stored as Q((scale·k − c)·A)·A⁻¹, Q being the codec's rounding, a value without scale; A and c are those
    of `bases`, of scaled keys and of values. The tokens before past − window, in whole flushes, are read as stored, the
    others as they came. `codecs` are the key's and the value's, or None; `sinks` is (query_heads,). A query, times
    `query_scale`, sees its own token and `reach` − 1 before it, or all. `whole` says that scales are kept as whole
    numbers.
    """

    def __init__(
        self,
        codecs: tuple[AdaptiveUniform | None, AdaptiveUniform | None],
        bases: tuple[HeadBasis, HeadBasis],
        sinks: np.ndarray,
        scale: float,
        window: int,
        flush: int = 1,
        reach: int | None = None,
        query_scale: float = 1,
        whole: bool = False,
    ) -> None:
        self.codecs, self.bases = codecs, bases
        self.centre, self.value_centre = (basis.centre[None, :, None] for basis in bases)
        self.sinks, self.scale, self.window, self.flush = sinks, scale, window, flush
        self.reach, self.query_scale, self.whole = reach, query_scale, whole
        self.tokens: tuple[np.ndarray, ...] = ()  # keys and values, all as they came; before the first call none
        self.beside: tuple[Any, ...] = ()  # graph's outputs; what else it has to be shown of each call

    def reset(self) -> None:
        """Forget everything."""
        self.tokens = ()

    def older(self, past: int) -> int:
        """How many of `past` tokens are read as stored."""
        return max(past - self.window, 0) // self.flush * self.flush

    def lossy(self, past: int) -> bool:
        """Whether a call after `past` tokens reads anything as stored."""
        return self.older(past) > 0

    def columns(self, states: Mapping[str, np.ndarray], rows: int) -> np.ndarray:
        """Which token each of the `rows` first rows of the states is, to be broadcast to (batch, kv_heads, rows)."""
        return np.arange(rows)[None, None]

    def rows(self, past: int, length: int) -> int:
        """How many of the `length` rows of its states, the last ones, hold tokens after `past` of them."""
        return min(past, length) if self.reach else length

    def found(self, states: Mapping[str, np.ndarray]) -> None:
        """Be told the states that the graph's next call finds; {} if they are not to be had."""

    def forget(
        self, keys: np.ndarray, values: np.ndarray, past: int, shown: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys and values as they are, and that all are visible: nothing is forgotten here."""
        return keys, values, np.ones((1, 1, 1, 1), bool)

    def stored(self, which: int, x: np.ndarray) -> np.ndarray:
        """What keys (0) or values (1), (batch, kv_heads, tokens, d), become in the store."""
        codec = self.codecs[which]
        if codec is None:
            return x
        codes, scale = codec.encode(self.bases[which].into(x))
        return self.restored(which, codes, whole_scale(scale) if self.whole else scale)

    def restored(self, which: int, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The vectors of some codes, turned back."""
        codec = self.codecs[which]
        if codec is None:
            raise ValueError(f"{('keys', 'values')[which]} are not packed here")
        return self.bases[which].back(codec.decode(codes, scale))

    def remember(self, k: np.ndarray, v: np.ndarray, beams: np.ndarray) -> int:
        """Take in a call's keys and values, (batch, kv_heads, new, d); returns how many tokens there were before."""
        new = self.scale * k.astype(np.float64) - self.centre, v.astype(np.float64) - self.value_centre
        old = tuple(x[beams] for x in self.tokens) if self.tokens else tuple(x[:, :, :0] for x in new)
        self.tokens = tuple(np.concatenate(pair, 2) for pair in zip(old, new, strict=True))
        return old[0].shape[2]

    def step(
        self,
        query: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        shown: np.ndarray,
        beams: np.ndarray,
        stored: Callable[[int, np.ndarray], np.ndarray] | None = None,
    ) -> np.ndarray:
        """Σ_k p_k v_k, p the softmax over the visible keys and the sink: (batch, query_heads, new, d).

        query (batch, query_heads, new, d), k and v (batch, kv_heads, new, d), shown (batch, past + new), beams
        (batch,). `stored` may say what a graph has stored of the older ones at least, in place of this object's.
        """
        past, count = self.remember(k, v, beams), k.shape[2]
        keys, values = (self._read(i, past, stored or self.stored) for i in (0, 1))
        keys, values, kept = self.forget(keys, values, past, shown)
        batch, kv_heads, total, d = keys.shape
        rows = query.reshape(batch, kv_heads, -1, d)  # query heads that share a KV head as rows
        behind = past + np.arange(count)[:, None] - np.arange(total)  # how far each key is behind each query
        seen = (behind >= 0) & (behind < (self.reach or total))
        visible = np.tile(seen, (rows.shape[2] // count, 1)) & (shown != 0)[:, None]
        kept = np.broadcast_to(kept, (batch, kv_heads, 1, total))
        sinks = np.repeat(self.sinks.astype(np.float64).reshape(kv_heads, -1), count, 1)
        result = np.empty(rows.shape)
        for head in range(kv_heads):  # one by one: the scores of all would take more memory than the model
            some = self.query_scale * rows[:, head].astype(np.float64)
            sink = (sinks[head] - (some * self.centre[:, head]).sum(-1))[..., None]
            scores = some @ keys[:, head].swapaxes(1, 2)
            scores[~(visible & kept[:, head])] = -np.inf
            top = np.maximum(scores.max(-1, keepdims=True), sink)
            weights = np.exp(scores - top)
            total_weight = weights.sum(-1, keepdims=True)
            context = weights @ values[:, head] + total_weight * self.value_centre[:, head]
            result[:, head] = context / (total_weight + np.exp(sink - top))
        return result.reshape(batch, -1, count, d)

    def _read(self, which: int, past: int, stored: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
        """Keys (0) or values (1) of all tokens as the call after `past` of them reads them."""
        tokens, older = self.tokens[which], self.older(past)
        return np.concatenate([stored(which, tokens)[:, :, :older], tokens[:, :, older:]], 2)
