#!/usr/bin/env python3
"""What pruning costs: every score with every budget, on a text as long as the context, on the CPU.

usage: measure_pruning.py TEXT MODEL_DIR [--scores norm-low,…] [--budgets 128,256,512,1024] [--context 4096]

MODEL_DIR, as exported, is converted for each row (`--preset exact --target cpu --budget N --score S …`) into a
temporary folder. Printed are, against the model as exported at f32: mean KLD in nats and bits a byte over windows of
TEXT as long as the context, read in chunks of 64 tokens (measure_kld.py; early positions, before which nothing is
pruned, count too), and how many facts (5 depths, --trials each) hidden in as many tokens are found (measure_needles.py,
read in calls of --chunk tokens). `full` is the model as exported, `random` a control. --options is passed on to
ovtq-convert, as in --options="--mode zero".
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure_kld import EXACT_PROPERTIES, compare, open_candidate, positive, read_tokens, run, steps
from measure_kld import Parser as OneLine
from measure_needles import answer, haystack, right

from ovtq.convert import main as convert
from ovtq.errors import InputError
from ovtq.io import check_json
from ovtq.runner import Runner

DEPTHS, KLD_CHUNK = (0.1, 0.3, 0.5, 0.7, 0.9), 64


def measure(options: argparse.Namespace) -> None:
    """One row for the model as exported, one for every score and budget."""
    if options.json:
        check_json(options.json, options.model, None)
    ids, tokenizer = read_tokens(options.text, options.model)
    count = min(options.windows, len(ids) // options.context)
    if not count:
        raise InputError(f"{options.text}: {len(ids)} tokens, at least {options.context} are needed")
    windows = ids[: count * options.context].reshape(count, -1)
    text_bytes = sum(len(tokenizer.decode(row[1:].tolist(), skip_special_tokens=False).encode()) for row in windows)
    asked = [
        haystack(ids, tokenizer, options.context, depth, 1, random.Random(f"0/{options.context}/{depth}/{trial}"))
        for depth in DEPTHS
        for trial in range(options.trials)
    ]
    rows: list[dict[str, Any]] = []

    def show(name: str, budget: int | None, runner: Runner) -> None:
        row = compare(expected, windows, text_bytes, runner, name, KLD_CHUNK)
        row["found"] = sum(right(answer(runner, tokenizer, h.ids, options.chunk), h.code) for h in asked)
        rows.append(row | {"score": name, "budget": budget, "of": len(asked)})
        print(
            f"{name:>13} {budget or '':>6} {row['mean_kld']:10.2e} {row['same_top']:9.2%} {row['bits_per_byte']:10.4f} "
            f"{row['found']:4} of {len(asked)}",
            flush=True,
        )

    reference = open_candidate(str(options.model))
    expected = np.empty((*windows.shape, reference.vocabulary), np.float32)
    for row, start, logits in steps(reference, windows, KLD_CHUNK, "full"):
        expected[row, start : start + len(logits)] = logits
    print(f"{windows.size:,} tokens in windows of {options.context:,}")
    print(f"{'score':>13} {'budget':>6} {'mean KLD':>10} {'same top':>9} {'bits/byte':>10} {'facts':>10}")
    show("full", None, reference)
    del reference
    for budget in options.budgets:
        for score in options.scores:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                flags = ["--preset", "exact", "--target", "cpu", "--no-verify", "--json", str(Path(folder) / "record")]
                command = [*flags, "--budget", str(budget), "--score", score, *options.options.split()]
                if _quietly([str(options.model), str(out), *command]):
                    raise InputError(f"ovtq-convert {' '.join(command)} failed")
                show(score, budget, Runner(out / "openvino_model.xml", "CPU", EXACT_PROPERTIES))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _quietly(command: list[str]) -> int:
    out, sys.stdout = sys.stdout, open("/dev/null", "w", encoding="utf-8")  # noqa: SIM115
    try:
        return convert(command)
    finally:
        sys.stdout.close()
        sys.stdout = out


def names(text: str) -> list[str]:
    """Comma-separated scores."""
    return text.split(",")


def numbers(text: str) -> list[int]:
    """Comma-separated whole numbers of at least 1."""
    return [positive(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    p = OneLine(prog="measure_pruning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("text", type=Path, metavar="TEXT")
    p.add_argument("model", type=Path, metavar="MODEL_DIR")
    p.add_argument("--scores", type=names, default="norm-low,norm-high,keydiff,value-norm,random", metavar="NAME,…")
    p.add_argument("--budgets", type=numbers, default="128,256,512,1024", metavar="N,…")
    p.add_argument("--context", type=positive, default=4096, metavar="TOKENS", help="(default: %(default)s)")
    p.add_argument("--windows", type=positive, default=3, metavar="N", help="of the text, at most (default: 3)")
    p.add_argument("--chunk", type=positive, default=256, metavar="N", help="tokens a call with facts (default: 256)")
    p.add_argument("--trials", type=positive, default=4, metavar="N", help="facts at each depth (default: 4)")
    p.add_argument("--options", default="", metavar="TEXT", help="more for ovtq-convert")
    p.add_argument("--json", type=Path, metavar="FILE")
    return run(p, argv, measure)


if __name__ == "__main__":
    sys.exit(main())
