#!/usr/bin/env python3
"""Time to first token, decode time, memory and bandwidth of model folders of real size, each step in turn.

usage: bench_at_size.py MODEL_DIR OTHER_DIR… [--prefill 200,2048] [--contexts 200,2048,8192,32768] [--steps 24]
                        [--repeat 3] [--device CPU] [--property KEY=VALUE]… [--json FILE]

All models are compiled in one process, and take their turns step by step (bench_decode.py); states of a context are
filled with noise, those of --prefill are made by one call from empty states. `rss` is what compiling a model and its
first step added to this process, its mapped weights among it. `read` is the bandwidth of summing a large array with as
many threads as there are cores: what the machine gives a decode step at best.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from bench_decode import measure, measure_prefill, show, show_prefill

from ovtq.errors import OvtqError
from ovtq.io import model_xml
from ovtq.runner import Runner


def read_bandwidth(gib: int = 2, repeat: int = 7) -> float:
    """Bytes a second of summing `gib` GiB of u64 in every core at once: the best of `repeat`."""
    cores = os.cpu_count() or 1
    parts = np.array_split(np.ones((gib << 30) // 8, np.uint64), cores)
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(repeat):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, (gib << 30) / (time.perf_counter() - started))
    return best


def rss() -> int:
    """Bytes resident of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", type=Path, metavar="MODEL_DIR")
    p.add_argument("--prefill", type=numbers, default=[200, 2048], metavar="LIST")
    p.add_argument("--contexts", type=numbers, default=[200, 2048, 8192, 32768], metavar="LIST")
    p.add_argument("--steps", type=int, default=24)
    p.add_argument("--repeat", type=int, default=3, help="prefills measured of each length (default: %(default)s)")
    p.add_argument("--device", default="CPU")
    p.add_argument("--property", action="append", default=[], metavar="KEY=VALUE")
    p.add_argument("--json", type=Path, metavar="FILE")
    options = p.parse_args()
    result = {"read": read_bandwidth(), "cores": os.cpu_count(), "models": [], "decode": [], "prefill": []}
    print(f"{result['cores']} cores, read {result['read'] / 1e9:.1f} GB/s", flush=True)
    try:
        properties = {"PERFORMANCE_HINT": "LATENCY", **dict(text.split("=", 1) for text in options.property)}
        runners = []
        for path in options.models:
            before, started = rss(), time.perf_counter()
            runners.append(Runner(model_xml(path), options.device, properties))
            seconds = time.perf_counter() - started
            runners[-1].step(np.zeros((1, 1), np.int64))
            result["models"].append({"model": str(path), "compile_s": seconds, "rss": rss() - before})
            print(f"{path}: compiled in {seconds:.0f} s, rss +{(rss() - before) / 1e9:.1f} GB", flush=True)
        for context in options.contexts:
            rows = measure(runners, options.models, context, options.steps, fill=True)
            result["decode"] += rows
            show(rows)
            sys.stdout.flush()
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for tokens in options.prefill:
            rows = measure_prefill(runners, options.models, tokens, options.repeat)
            result["prefill"] += rows
            show_prefill(rows)
            sys.stdout.flush()
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except (OvtqError, ValueError, OSError) as error:
        print(f"bench_at_size: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
