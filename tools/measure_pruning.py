#!/usr/bin/env python3
"""What pruning costs: every score with every budget, on a text as long as the context, on the CPU.

usage: measure_pruning.py TEXT MODEL_DIR FOLDER [--scores keydiff,…] [--budgets 128,256,512,1024] [--context 4096]

MODEL_DIR, as exported, is converted for each row into FOLDER (`--preset exact --target cpu --budget N --score S`), and
ovtq-eval compares them all: mean KLD and bits a byte over windows as long as the context, and facts found in as many
tokens. `random` is a control. --options is passed on to ovtq-convert, as in --options="--mode zero", what follows -- to
ovtq-eval, such as -- --report pruning.html --trials 2.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from ovtq import evaluate
from ovtq.command import Parser, listed, positive, run
from ovtq.convert import main as convert
from ovtq.errors import InputError


def parser() -> Parser:
    p = Parser("measure_pruning", __doc__)
    p.add_argument("text", type=Path, metavar="TEXT")
    p.add_argument("model", type=Path, metavar="MODEL_DIR")
    p.add_argument("folder", type=Path, metavar="FOLDER")
    p.add_argument("--scores", type=listed(str, "names"), default="keydiff,norm-high,value-norm,random,norm-low")
    p.add_argument("--budgets", type=listed(positive, "numbers"), default="128,256,512,1024", metavar="N,…")
    p.add_argument("--context", type=positive, default=4096, metavar="TOKENS", help="(default: %(default)s)")
    p.add_argument("--options", default="", metavar="TEXT", help="more for ovtq-convert")
    return p


def measure(options: argparse.Namespace, more: list[str]) -> int:
    """Convert, then compare; returns the exit code of ovtq-eval."""
    folders = []
    for budget in options.budgets:
        for score in options.scores:
            folders.append(options.folder / f"{score}-{budget}")
            flags = ["--preset", "exact", "--target", "cpu", "--no-verify", "--force"]
            command = [*flags, "--budget", str(budget), "--score", score, *options.options.split()]
            with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
                code = convert([str(options.model), str(folders[-1]), *command])
            if code:
                raise InputError(f"ovtq-convert {' '.join(command)} failed")
    context = str(options.context)
    windows = ["--window", context, "--windows", "2", "--lengths", context, "--greedy", "0", "--no-verify"]
    return evaluate.main([str(options.model), *map(str, folders), "--text", str(options.text), *windows, *more])


def main() -> int:
    own, _, more = (list(part) for part in _split(sys.argv[1:]))
    return run("measure_pruning", lambda: measure(parser().parse_args(own), more))


def _split(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    """What stands before and behind `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at : at + 1], arguments[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
