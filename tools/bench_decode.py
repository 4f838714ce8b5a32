#!/usr/bin/env python3
"""Decode and prefill time of model folders against the first one, step by step in turn, with plain OpenVINO.

usage: bench_decode.py MODEL_DIR OTHER_DIR… [--contexts 256,2048,8192] [--steps 64] [--device CPU] [--json FILE]

Every model is filled to the context in chunks, then all of them make one decode step each, in turn, `--steps` times.
Printed are medians: TPOT in ms, the ratio of each step to the first model's step beside it, the time of the whole
prefill as a ratio, and the bytes of all states. Times are of this machine; the ratios are what to read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ovtq.errors import OvtqError
from ovtq.io import model_xml
from ovtq.runner import Runner

CHUNK = 512  # tokens a prefill call


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", type=Path, metavar="MODEL_DIR")
    p.add_argument("--contexts", default="256,2048,8192", help="comma-separated (default: %(default)s)")
    p.add_argument("--steps", type=int, default=64, help="decode steps measured at each context (default: 64)")
    p.add_argument("--device", default="CPU")
    p.add_argument("--property", action="append", default=[], metavar="KEY=VALUE", help="of the plugin; repeatable")
    p.add_argument("--json", type=Path, metavar="FILE")
    options = p.parse_args()
    try:
        contexts = [int(text) for text in options.contexts.split(",")]
        properties = {"PERFORMANCE_HINT": "LATENCY", **dict(text.split("=", 1) for text in options.property)}
        runners = [Runner(model_xml(path), options.device, properties) for path in options.models]
    except (OvtqError, ValueError) as error:
        print(f"bench_decode: {error}", file=sys.stderr)
        return 2
    rows = [row for context in contexts for row in measure(runners, options.models, context, options.steps)]
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(runners: list[Runner], names: list[Path], context: int, steps: int) -> list[dict[str, object]]:
    """One row a model at one context."""
    ids = np.random.RandomState(0).randint(0, runners[0].vocabulary, (1, context + steps)).astype(np.int64)
    prefill = []
    for runner in runners:
        runner.reset()
        started = time.perf_counter()
        for start in range(0, context, CHUNK):
            runner.step(ids[:, start : min(start + CHUNK, context)])
        prefill.append(time.perf_counter() - started)
    seconds = np.empty((steps, len(runners)))
    for step in track(range(steps), f"{context} tokens", console=Console(stderr=True), transient=True):
        for turn in range(len(runners)):
            index = (step + turn) % len(runners)  # whoever follows another model finds its caches cold: take turns
            started = time.perf_counter()
            runners[index].step(ids[:, context + step : context + step + 1])
            seconds[step, index] = time.perf_counter() - started
    ratios = seconds / seconds[:, :1]
    return [
        {
            "context": context,
            "model": str(name),
            "tpot_ms": round(float(np.median(seconds[:, index])) * 1e3, 3),
            "tpot_ratio": round(float(np.median(ratios[:, index])), 3),
            "tpot_ratio_quartiles": [round(float(q), 3) for q in np.percentile(ratios[:, index], (25, 75))],
            "prefill_s": round(prefill[index], 3),
            "prefill_ratio": round(prefill[index] / prefill[0], 3),
            "state_bytes": runners[index].state_bytes(),
        }
        for index, name in enumerate(names)
    ]


def show(rows: list[dict[str, object]]) -> None:
    """The rows as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for column in ("context", "TPOT ms", "ratio", "25–75 %", "prefill s", "ratio", "state bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["tpot_ratio_quartiles"]
        table.add_row(
            str(row["model"]),
            f"{row['context']:,}",
            f"{row['tpot_ms']:.2f}",
            f"{row['tpot_ratio']:.3f}",
            f"{low:.2f}–{high:.2f}",
            f"{row['prefill_s']:.2f}",
            f"{row['prefill_ratio']:.2f}",
            f"{row['state_bytes']:,}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
