#!/usr/bin/env python3
"""Make a GPT-OSS IR that spends its time in attention: seeded random weights, the sizes of a benchmark, not of a model.

usage: export_heavy.py OUT_DIR [LAYERS]

It has the heads of GPT-OSS-20B (64 query and 8 KV heads of 64) and its window of 128, in 4 narrow layers (or an
even number LAYERS; GPT-OSS-20B has 24), so that a decode step soon costs what its attention costs. What it says means
nothing. Needs the `export` extra.
"""

from __future__ import annotations

import sys
from pathlib import Path

from export_tiny import CONFIG, export

HEAVY = CONFIG | dict(
    num_hidden_layers=4, hidden_size=512, intermediate_size=256, head_dim=64, num_attention_heads=64,
    num_key_value_heads=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=128, vocab_size=1024,
)  # fmt: skip


def main() -> int:
    out, *layers = sys.argv[1:] or ["-"]
    if (
        out.startswith("-")
        or len(layers) > 1
        or not all(number.isdigit() and int(number) % 2 == 0 for number in layers)
    ):
        print(__doc__, file=sys.stderr)
        return 2
    export(HEAVY | {"num_hidden_layers": int(layers[0])} if layers else HEAVY, Path(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
