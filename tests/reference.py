"""Attention with sinks and a window in plain numpy, from its definition: what the rewritten graphs are held to."""

from __future__ import annotations

import numpy as np


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
