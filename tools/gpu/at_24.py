"""What GPT-OSS-20B's 24 layers take on a virtual Lunar Lake, from the record of models of 2, 4 and 6 of them.

The record, `tests/data/ledger_20b.json`, has for each preset and number of layers what tools/gpu/ledger.py and
tools/gpu/memory.py tell; half of the layers are full ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LAYERS = (2, 4, 6)
MEMORY = LAYERS[:2]  # of which memory is recorded
EXPORTED = "stock"  # not converted; does not compile
KERNELS = ("k8v4 --kernels", "k6v4 --kernels", "k4v4 --kernels")
SCRATCH = ("chunk", "decode", "decode_alone", "whole")  # what tools/gpu/memory.py tells


def at_24(fewer: float, more: float, layers: int) -> float:
    """A figure of the 24-layer model, from that of `layers` layers and of two fewer."""
    return more + (24 - layers) // 2 * (more - fewer)


def kernels(found: Mapping[str, Any]) -> float:
    """Those of a decode step of 24 layers with a preset."""
    return at_24(*(found[str(count)]["kernels"] for count in LAYERS[1:]), LAYERS[-1])


def needs(found: Mapping[str, Any], context: int) -> dict[str, float | None]:
    """Bytes that 24 layers take with a preset at a context: weights, states, and each kind of scratch."""
    memory = [found[str(count)]["memory"] for count in MEMORY]
    two, four = (next(row for row in one["rows"] if row["context"] == context) for one in memory)
    columns = {name: None if two[name] is None else at_24(two[name], four[name], 4) for name in ("states", *SCRATCH)}
    return {"weights": at_24(*(one["weights"] for one in memory), 4), **columns}


def of_a_full_layer(preset: str, found: Mapping[str, Any]) -> float:
    """Bytes that a decode step reads and writes for a token of history in one full layer."""
    two, four = (found[str(count)] for count in MEMORY)
    pair = sum(four[key] - two[key] for key in ("read_per_token", "written_per_token"))
    return pair / 2 if preset == "rotate" else pair  # there the sliding layer keeps as much
