#!/usr/bin/env python3
"""Statistics of a model's queries for `ovtq-convert --score triattention`, from a text, on the CPU at f32.

usage: calibrate_triattention.py MODEL_DIR TEXT OUT.npz [--windows 32] [--window 2048] [--seed 0]

MODEL_DIR is the model as exported, TEXT the like of what it will read (`<|endoftext|>` between documents), but not
a text that pruning is then measured on. Whole documents are drawn in an order that --seed decides, joined, and cut into
windows, each run from an empty cache. Named triattention.npz in MODEL_DIR, ovtq-convert finds the file by itself.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from ovtq.cli.command import Out, Parser, phase, positive, progress, run
from ovtq.errors import InputError
from ovtq.evidence.calibrate import calibrate
from ovtq.files import sha256
from ovtq.runtime.text import SEPARATOR, Tokenizer


def parser() -> Parser:
    p = Parser("calibrate_triattention", __doc__)
    p.add_argument("model", type=Path, metavar="MODEL_DIR")
    p.add_argument("text", type=Path, metavar="TEXT")
    p.add_argument("out", type=Path, metavar="OUT.npz")
    p.add_argument("--windows", type=positive, default=32, metavar="N", help="(default: %(default)s)")
    p.add_argument("--window", type=positive, default=2048, metavar="TOKENS", help="(default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    return p


def windows(options: argparse.Namespace) -> np.ndarray:
    """Token ids (windows, window). Raises InputError if the text is too short."""
    tokenizer, needed = Tokenizer(options.model), options.windows * options.window
    try:
        texts = [text.strip() for text in options.text.read_text(encoding="utf-8").split(SEPARATOR) if text.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{options.text}: not UTF-8 text") from None
    random.Random(options.seed).shuffle(texts)
    parts: list[np.ndarray] = []
    found = 0
    for text in texts:
        if found >= needed:
            break
        parts.append(np.append(tokenizer.encode(text), tokenizer.end))
        found += len(parts[-1])
    if found < needed:
        raise InputError(f"{options.text}: {found} tokens, {needed} are needed; give a longer text or fewer --windows")
    return np.concatenate(parts)[:needed].reshape(options.windows, options.window)


def main() -> int:
    errors = Console(stderr=True, highlight=False)

    def work() -> None:
        options = parser().parse_args()
        if options.out.suffix != ".npz":
            raise InputError(f"{options.out}: name it ….npz")
        ids = windows(options)
        with progress(errors) as bars, phase(bars, "windows", len(ids)) as tick:
            found = calibrate(options.model, ids, tick)
        found.save(options.out)
        layers = ", ".join(map(str, found.layers))
        Out().print(f"{ids.size:,} tokens, layers {layers}: {options.out}, sha256 {sha256(options.out)}")

    return run("calibrate_triattention", work, errors)


if __name__ == "__main__":
    sys.exit(main())
