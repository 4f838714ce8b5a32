#!/usr/bin/env python3
"""Decode and prefill time of model folders against the first one, step by step in turn, with plain OpenVINO.

usage: bench_decode.py MODEL_DIR OTHER_DIR… [--contexts 256,2048,8192] [--steps 64] [--fill]
       bench_decode.py MODEL_DIR OTHER_DIR… --prefill N [--repeat 5]
       either with [--device CPU] [--property KEY=VALUE]… [--json FILE]

Every model is prefilled to the context in chunks, then all of them make one decode step each, in turn, `--steps` times.
Printed are medians: TPOT in ms, the ratio of each step to the first model's step beside it, the time of the whole
prefill as a ratio, and the bytes of all states. With --fill the states are filled with noise instead, so that long
contexts take seconds. With --prefill, one prefill of N tokens in a single call is measured, in turn, `--repeat` times.
Times are of this machine; the ratios are what to read.
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

from ovtq.errors import InputError, OvtqError
from ovtq.io import model_xml
from ovtq.runner import Runner

CHUNK = 512  # tokens a prefill call


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", type=Path, metavar="MODEL_DIR")
    p.add_argument("--contexts", default="256,2048,8192", help="comma-separated (default: %(default)s)")
    p.add_argument("--steps", type=int, default=64, help="decode steps measured at each context (default: 64)")
    p.add_argument("--fill", action="store_true", help="set the states to noise instead of prefilling them")
    p.add_argument("--prefill", type=int, metavar="N", help="measure a prefill of N tokens in one call, no steps")
    p.add_argument("--repeat", type=int, default=5, help="prefills measured with --prefill (default: 5)")
    p.add_argument("--device", default="CPU")
    p.add_argument("--property", action="append", default=[], metavar="KEY=VALUE", help="of the plugin; repeatable")
    p.add_argument("--json", type=Path, metavar="FILE")
    options = p.parse_args()
    try:
        contexts = [int(text) for text in options.contexts.split(",")]
        numbers = (*contexts, options.steps, options.repeat, 1 if options.prefill is None else options.prefill)
        if min(numbers) < 1:
            raise InputError("--contexts, --steps, --prefill and --repeat must be at least 1")
        properties = {"PERFORMANCE_HINT": "LATENCY", **dict(text.split("=", 1) for text in options.property)}
        runners = [Runner(model_xml(path), options.device, properties) for path in options.models]
        if options.prefill:
            rows = measure_prefill(runners, options.models, options.prefill, options.repeat)
        else:
            rows = [
                row
                for context in contexts
                for row in measure(runners, options.models, context, options.steps, options.fill)
            ]
        (show_prefill if options.prefill else show)(rows)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    except (OvtqError, ValueError, OSError) as error:
        print(f"bench_decode: {error}", file=sys.stderr)
        return 2
    return 0


def measure(
    runners: list[Runner], names: list[Path], context: int, steps: int, fill: bool = False
) -> list[dict[str, object]]:
    """One row a model at one context."""
    ids = np.random.RandomState(0).randint(0, runners[0].vocabulary, (1, context + steps)).astype(np.int64)
    prefill = []
    for runner in runners:
        runner.reset()
        if fill:
            runner.fill(context)
            continue
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
            "prefill_s": round(prefill[index], 3) if prefill else None,
            "prefill_ratio": round(prefill[index] / prefill[0], 3) if prefill else None,
            "state_bytes": _state_bytes(runners[index]),
        }
        for index, name in enumerate(names)
    ]


def _state_bytes(runner: Runner) -> int | None:
    try:
        return runner.state_bytes()
    except RuntimeError:  # the CPU plugin does not give out a TURBO cache
        return None


def measure_prefill(runners: list[Runner], names: list[Path], tokens: int, repeat: int) -> list[dict[str, object]]:
    """One row a model: a prefill of `tokens` in one call, from empty states."""
    ids = np.random.RandomState(0).randint(0, runners[0].vocabulary, (1, tokens)).astype(np.int64)
    seconds = np.empty((repeat + 1, len(runners)))
    for turn in track(range(repeat + 1), f"{tokens} tokens", console=Console(stderr=True), transient=True):
        for place in range(len(runners)):
            index = (turn + place) % len(runners)
            runners[index].reset()
            started = time.perf_counter()
            runners[index].step(ids)
            seconds[turn, index] = time.perf_counter() - started
    seconds = seconds[1:]  # the first call makes kernels and buffers for this length
    ratios = seconds / seconds[:, :1]
    return [
        {
            "model": str(name),
            "prefill": tokens,
            "prefill_s": round(float(np.median(seconds[:, index])), 4),
            "prefill_ratio": round(float(np.median(ratios[:, index])), 3),
            "prefill_ratio_quartiles": [round(float(q), 3) for q in np.percentile(ratios[:, index], (25, 75))],
        }
        for index, name in enumerate(names)
    ]


def show_prefill(rows: list[dict[str, object]]) -> None:
    """The rows of `measure_prefill` as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for column in ("tokens", "prefill s", "ratio", "25–75 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["prefill_ratio_quartiles"]
        numbers = f"{row['prefill']:,}", f"{row['prefill_s']:.3f}", f"{row['prefill_ratio']:.3f}"
        table.add_row(str(row["model"]), *numbers, f"{low:.2f}–{high:.2f}")
    Console().print(table)


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
            *("–" if row[key] is None else f"{row[key]:.2f}" for key in ("prefill_s", "prefill_ratio")),
            "–" if row["state_bytes"] is None else f"{row['state_bytes']:,}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
