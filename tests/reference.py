"""Attention with sinks and a window in plain numpy, from its definition: what the rewritten graphs are held to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ovtq.codec import AdaptiveUniform


def attention(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    shown: np.ndarray,
    sinks: np.ndarray,
    scale: float,
    window: int | None,
) -> np.ndarray:
    """Σ_k p_k v_k with p = softmax over the visible keys and one more logit, the sink, in f64.

    query (batch, query_heads, new, d); keys, values (batch, kv_heads, past + new, d); shown (batch, past + new),
    0 where a token is padding; sinks (query_heads,). The query at position t sees k ≤ t and, with a window, k > t − w.
    """
    batch, heads, new, _ = query.shape
    group, total = heads // keys.shape[1], keys.shape[2]
    out = np.zeros(query.shape)
    for b in range(batch):
        for h in range(heads):
            for i in range(new):
                t = total - new + i
                first = 0 if window is None else max(0, t - window + 1)
                visible = [k for k in range(first, t + 1) if shown[b, k]]
                scores = np.array([query[b, h, i] @ keys[b, h // group, k] * scale for k in visible], np.float64)
                top = max([sinks[h], *scores])
                weights = np.exp(scores - top)
                total_weight = weights.sum() + np.exp(float(sinks[h]) - top)
                out[b, h, i] = weights @ values[b, h // group, visible] / total_weight
    return out


class PackedLayer:
    """A layer's attention over a packed cache, by its definition, in f64, all tokens kept as they came.

    A key k is stored as RᵀQ(R(scale·k − centre)), Q being the codec's rounding; a value without scale and centre. The
    tokens before past − window, in whole flushes, are read as stored, the others as they came. `codecs` are the key's
    and the value's, or None.
    """

    def __init__(
        self,
        codecs: tuple[AdaptiveUniform | None, AdaptiveUniform | None],
        rotation: np.ndarray,
        centre: np.ndarray,
        sinks: np.ndarray,
        scale: float,
        window: int,
        flush: int = 1,
    ) -> None:
        self.codecs, self.rotation, self.centre = codecs, rotation.astype(np.float64), centre[None, :, None]
        self.sinks, self.scale, self.window, self.flush = sinks, scale, window, flush
        self.tokens: tuple[np.ndarray, np.ndarray] | None = None  # keys and values, all as they came

    def stored(self, which: int, x: np.ndarray) -> np.ndarray:
        """What keys (0) or values (1) become in the store."""
        codec = self.codecs[which]
        if codec is None:
            return x
        return codec.decode(*codec.encode(x @ self.rotation)).astype(np.float64) @ self.rotation.T

    def step(
        self,
        query: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        shown: np.ndarray,
        beams: np.ndarray,
        stored: Callable[[int, np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """query (batch, query_heads, new, d), k and v (batch, kv_heads, new, d), shown (batch, past + new).

        `stored` is this object's, or says what a graph has stored instead.
        """
        new = self.scale * k.astype(np.float64) - self.centre, v.astype(np.float64)
        old = tuple(x[beams] for x in self.tokens) if self.tokens else tuple(x[:, :, :0] for x in new)
        self.tokens = tuple(np.concatenate(pair, 2) for pair in zip(old, new, strict=True))
        past, count = old[0].shape[2], k.shape[2]
        older = max(past - self.window, 0) // self.flush * self.flush
        is_old = (np.arange(past + count) < older)[:, None]
        keys, values = (np.where(is_old, stored(i, self.tokens[i]), self.tokens[i]) for i in (0, 1))
        group = query.shape[1] // k.shape[1]
        keys, values, centre = (np.repeat(x, group, 1) for x in (keys, values, self.centre))
        query = query.astype(np.float64)
        scores = np.einsum("bhqd,bhkd->bhqk", query, keys)
        causal = np.arange(past + count) <= past + np.arange(count)[:, None]
        scores = np.where(causal & (shown != 0)[:, None, None], scores, -np.inf)
        sink = self.sinks[None, :, None, None] - (query * centre).sum(-1, keepdims=True)
        scores = np.concatenate([scores, sink], -1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("bhqk,bhkd->bhqd", weights[..., :-1], values)
