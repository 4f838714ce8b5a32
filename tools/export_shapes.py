#!/usr/bin/env python3
"""Make the IR of a model with the attention of a known one, few layers, little else, and seeded random weights.

usage: export_shapes.py NAME OUT_DIR [LAYERS]

names: llama3-8b    32 query heads on 8 KV heads of 128
       qwen2.5-7b   28 query heads on 4 KV heads of 128, biases
       gemma3-1b    4 query heads on 1 KV head of 256, five of six layers with a window of 512; needs transformers 5.0

For tools/gpu/ledger.py: what a decode step reads of the history, and how many kernels it is, by layer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from export_families import LLAMA3, SIZES, export

LARGE: dict[str, Any] = SIZES | dict(max_position_embeddings=65536, intermediate_size=512)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-8b": (
        "llama",
        LARGE
        | dict(
            hidden_size=512, num_attention_heads=32, num_key_value_heads=8, head_dim=128, rope_parameters=LLAMA3,
        ),
    ),
    "qwen2.5-7b": ("qwen2", LARGE | dict(hidden_size=28 * 128, num_attention_heads=28, num_key_value_heads=4)),
    "gemma3-1b": (
        "gemma3_text",
        LARGE | dict(
            hidden_size=512, num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512,
            query_pre_attn_scalar=256,
        ),
    ),
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if len(arguments) not in (2, 3) or arguments[0] not in SHAPES:
        print(__doc__, file=sys.stderr)
        return 2
    kind, sizes = SHAPES[arguments[0]]
    layers = int(arguments[2]) if len(arguments) > 2 else 4
    sizes = sizes | dict(num_hidden_layers=layers)
    if "sliding_window" in sizes:
        sizes |= dict(layer_types=[("full" if at % 6 == 5 else "sliding") + "_attention" for at in range(layers)])
    export(kind, sizes, Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
