#!/usr/bin/env python3
"""Time to the first token with a prefix that is read, and with one that is loaded (ovtq.save_state, ovtq.load_state).

usage: measure_prefix.py MODEL_DIR [--tokens 4096] [--new 16] [--runs 5] [--preset k6v4] [--json FILE]

Through plain OpenVINO and OVModelForCausalLM, on a CPU, in turn, from empty states, in calls of 512 tokens. Prints a
table of medians.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import made
import numpy as np
import torch
from optimum.intel import OVModelForCausalLM

import ovtq
from ovtq.runtime.runner import Runner

CHUNK = 512


def main() -> None:
    """Measure, and print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model_dir", type=Path)
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--new", type=int, default=16)
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--preset", default="k6v4")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    options = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = Path(scratch) / "model", Path(scratch) / "prefix.npz"
        ovtq.convert(options.model_dir, folder, preset=options.preset, target="cpu", verify=False)
        rows = measured(folder, file, options)
        size = file.stat().st_size
    print("| | read | loaded | |\n| --- | ---: | ---: | ---: |")
    for name, (read, loaded) in rows.items():
        print(f"| {name} | {read * 1e3:,.0f} ms | {loaded * 1e3:,.0f} ms | {loaded / read:.3f} |")
    print(f"\nthe file: {size:,} bytes")
    rows_of = [{"through": name, "read_s": read, "loaded_s": loaded} for name, (read, loaded) in rows.items()]
    made.write(options.json, rows=rows_of, file_bytes=size)


def measured(folder: Path, file: Path, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Seconds to the first token, read and loaded, by host."""
    runner = Runner(folder / "openvino_model.xml", "CPU")
    ids = np.random.default_rng(0).integers(0, runner.vocabulary, (1, options.tokens + options.new))
    prefix = ids[:, : options.tokens]

    def read() -> None:
        runner.reset()
        for start in range(0, options.tokens, CHUNK):
            runner.step(prefix[:, start : start + CHUNK])

    def load() -> None:
        runner.reset()
        ovtq.load_state(runner.request, file, ids, folder)
        runner.mask = np.ones_like(prefix)

    read()
    ovtq.save_state(runner.request, file, prefix, folder)
    first = [
        timed(lambda way=way: (way(), runner.step(ids[:, options.tokens :]))) for way in turns(read, load, options)
    ]
    runner.close()
    model, prompt = OVModelForCausalLM.from_pretrained(folder, device="CPU"), torch.from_numpy(ids)

    def generate(past: object) -> None:
        model.generate(prompt, past_key_values=past, max_new_tokens=1, do_sample=False)

    def read_host() -> None:
        generate(ovtq.read_prompt(model, prompt[:, : options.tokens + 1], CHUNK))

    def load_host() -> None:
        generate(ovtq.load_state(model, file, prompt))

    other = [timed(way) for way in turns(read_host, load_host, options)]
    return {
        name: (median(some[2::2]), median(some[3::2]))  # the first of each compiles what is new
        for name, some in (("openvino", first), ("OVModelForCausalLM", other))
    }


def turns(read: object, load: object, options: argparse.Namespace) -> list:
    """One and the other, in turn."""
    return [read, load] * (options.runs + 1)


def timed(work: object) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
