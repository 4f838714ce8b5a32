"""The least time of a decode step: bytes it must move over a machine's bandwidth, and its kernels' launches.

A lower bound, not a forecast: t = (weights + history) / bandwidth + kernels · launch. Compute, and how near to its
bandwidth a kernel comes, are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Machine:
    """Bandwidth in bytes a second, and seconds that each kernel costs besides."""

    name: str
    bandwidth: float
    launch: float
    source: str


@dataclass(frozen=True)
class Cache:
    """Bytes that a step reads and writes for a token of history and full layer, and kernels of a step of 24 layers.

    None kernels: those of `stock` are taken.
    """

    full: float
    kernels: int | None
    sliding: bool  # whether sliding layers cost the same for all their history
    source: str


MACHINES = {
    "arc-140v": Machine(
        "arc-140v", 136e9, 5e-6, "LPDDR5X-8533 on 128 bits: 136 GB/s; 5 µs a launch is assumed, not measured"
    )
}
_STOCK_KERNELS = 673
_LEDGER = "tests/ledgers_20b.py: layers of that width on a virtual Lunar Lake"
CACHES = {
    "stock": Cache(34_818, _STOCK_KERNELS, True, f"{_LEDGER}, with `rotate`: as exported 2026.4 does not compile it"),
    "exact": Cache(2_562, 783, False, _LEDGER),
    "u8": Cache(1_330, 800, False, _LEDGER),
    "u4": Cache(710, 800, False, _LEDGER),
    "k8v4": Cache(5_920, 1_130, False, _LEDGER),
    "k6v4": Cache(6_816, 1_130, False, _LEDGER),
    "k4v4": Cache(5_664, 1_130, False, _LEDGER),
    "k8v4 --kernels": Cache(816.25, 629, False, _LEDGER),
    "k6v4 --kernels": Cache(688.25, 629, False, _LEDGER),
    "k4v4 --kernels": Cache(560.25, 629, False, _LEDGER),
    # 8 heads · (64 + 64) codes of 4 bits and 4 bytes of scale and zero point for each of two vectors
    "paged u4": Cache(8 * (64 + 8), None, True, "arithmetic: codes and scales of all layers, read once"),
}


def weight_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of weights that one token reads: attention, output layer in u8, chosen experts in 4 bits, 16 for 32."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    attention = 2 * hidden * queries + 2 * hidden * keys + hidden * config["num_local_experts"]
    experts = config["num_experts_per_tok"] * 3 * hidden * inner * (4 + 16 / 32) / 8
    return round(config["num_hidden_layers"] * (attention + experts) + config["vocab_size"] * hidden)


def table(config: Mapping[str, Any], machine: str, contexts: Sequence[int]) -> dict[str, Any]:
    """Least milliseconds of a decode step for each cache and context, and the assumptions as lines of text.

    The caches' bytes belong to 8 KV heads of 64 and 64 query heads. Raises KeyError for an unknown machine and
    ValueError for other heads.
    """
    heads = [config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")]
    if heads != [64, 8, 64]:
        raise ValueError(f"bytes per token were measured for heads 64, 8, 64, not {heads}")
    of, weights = MACHINES[machine], weight_bytes(config)
    full = sum(kind == "full_attention" for kind in config["layer_types"])
    sliding = len(config["layer_types"]) - full
    rows = []
    for name, cache in CACHES.items():
        layers = full + (sliding if cache.sliding else 0)
        launches = (cache.kernels or _STOCK_KERNELS) * of.launch
        for context in contexts:
            history = layers * cache.full * context
            rows.append(
                {
                    "cache": name,
                    "context": context,
                    "history_bytes": round(history),
                    "least_ms": 1e3 * ((weights + history) / of.bandwidth + launches),
                }
            )
    notes = [
        f"{machine}: {of.source}",
        f"{weights:,} bytes of weights a token: attention, routers and output layer in u8, "
        f"{config['num_experts_per_tok']} of {config['num_local_experts']} experts in i4 with a scale for 32",
        "a lower bound: no compute, every byte at full bandwidth; flat windows of sliding layers are left out",
        "kernels of 24 layers follow from those of 4 and 6; paged attention, not counted, is given those of `stock`",
        *(f"{name}: {cache.full:,} bytes per token and layer ({cache.source})" for name, cache in CACHES.items()),
    ]
    return {"machine": machine, "rows": rows, "assumptions": notes}
