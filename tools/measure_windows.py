#!/usr/bin/env python3
"""What a window costs on a CPU: decode steps and prefills of a model as exported, with `exact`, and with it cut.

usage: measure_windows.py NAME WINDOW [TOKENS,… [TOKENS,…]] [KEY=VALUE…]

names: heavy  4 sliding layers, 512 wide, 16 query heads on 8 KV heads of 128: attention is most of it
       gemma  8 layers, one of them full, 640 wide, 4 query heads on 1 KV head of 256, as of Gemma-3-270M

The models are made here, with seeded random weights. First the lengths at which steps are measured, then those of
prefills in one call; then properties of the plugin. Figures are CPU time of the process, which other work on the
machine does not add to; the models take turns, and ratios are medians of those of one turn, to the exported model's. A
second copy of that model says how far apart equals are.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from export_families import HEAD, export

import ovtq
from ovtq.runtime.runner import Runner

LARGE: dict[str, Any] = HEAD | dict(max_position_embeddings=65536, vocab_size=1024)
KINDS = ["sliding_attention"] * 5 + ["full_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "heavy": (
        "mistral",
        LARGE
        | dict(
            hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8,
            head_dim=128,
        ),
    ),
    "gemma": (
        "cohere2",
        LARGE
        | dict(
            hidden_size=640, intermediate_size=2048, num_hidden_layers=8, num_key_value_heads=1, head_dim=256,
            layer_types=[*KINDS, *KINDS[:2]],
        ),
    ),
}  # fmt: skip
CUT = {"truncate-window": {"up_to": 0}}
CHUNK, TURNS, STEPS = 512, 6, 4


def seconds(runner: Runner, tokens: int) -> float:
    """CPU time of a call of so many random tokens."""
    ids = np.random.RandomState(tokens).randint(0, 1000, (1, tokens))
    start = time.process_time()
    runner.step(ids)
    return time.process_time() - start


def show(what: str, names: list[str], turns: list[list[float]]) -> None:
    """A line of medians, without the first turn."""
    taken = np.array(turns[1:])
    ratios = np.median(taken / taken[:, :1], 0)
    figures = zip(names, np.median(taken, 0), ratios, strict=True)
    print(what, *(f"{name} {1e3 * some:.1f} ms {ratio:.2f}" for name, some, ratio in figures), sep=" | ", flush=True)


def main(arguments: list[str]) -> int:
    properties = dict(text.split("=", 1) for text in arguments if "=" in text)
    given = [text for text in arguments if "=" not in text]
    if len(given) < 2 or given[0] not in MODELS:
        print(__doc__, file=sys.stderr)
        return 2
    family, sizes = MODELS[given[0]]
    steps, prefills = ([int(x) for x in text.split(",") if x] for text in (*given[2:4], "", "")[:2])
    with tempfile.TemporaryDirectory() as base:
        stock = Path(base) / "stock"
        export(family, sizes | dict(sliding_window=int(given[1])), stock)
        ovtq.convert(stock, Path(base) / "exact", preset="exact", target="cpu", verify=False)
        ovtq.convert(stock, Path(base) / "cut", preset="exact", target="cpu", settings=CUT, verify=False)
        names = ["stock", "stock", "exact", "cut"]
        runners = [Runner(Path(base) / name / "openvino_model.xml", "CPU", properties) for name in names]
        text = 0
        for length in steps:
            while text < length:
                some = min(CHUNK, length - text)
                for runner in runners:
                    seconds(runner, some)
                text += some
            show(
                f"step at {length:,}",
                names,
                [[np.mean([seconds(r, 1) for _ in range(STEPS)]) for r in runners] for _ in range(TURNS)],
            )
            text += TURNS * STEPS
        for length in prefills:
            turns = []
            for _ in range(TURNS - 2):
                for runner in runners:
                    runner.reset()
                turns.append([seconds(runner, length) for runner in runners])
            show(f"prefill of {length:,}", names, turns)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
