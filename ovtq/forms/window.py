"""Attention to a window: which keys of its block a query sees.

Sliding layers run in blocks of queries that each read their own keys. On the GPU, where one graph of few kernels serves
all lengths, every call is blocks. On the CPU a decode step has a shorter way: there it is the number of nodes that
costs, and what they copy.
"""

from __future__ import annotations

import numpy as np

# What a CPU keeps of a window it copies in every step, where without sinks its own 8-bit cache is read in place. What
# that costs is measured in docs/benchmarks/large-windows.md.
SHORT_WINDOW = 256  # tokens; up to here `exact` cuts: GPT-OSS is no slower for it, without sinks a short text is by 19%
LONG_WINDOW = 1024  # beyond, all scores of a long prompt take more memory than its cache does
PAYS = 8  # windows that a text must be long for a larger one to cost less cut than whole; at 3 to 6 it cost more


def seen(queries: int, keys: int, window: int) -> np.ndarray:
    """Which keys of its block each query sees, (queries, keys): key rows i … i + window − 1 the i-th."""
    query, key = np.arange(queries)[:, None], np.arange(keys)[None]
    return (query <= key) & (key < query + window)
