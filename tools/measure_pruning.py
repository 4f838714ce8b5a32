#!/usr/bin/env python3
"""What pruning costs: every score with every budget, on a text as long as the context, on the CPU.

usage: measure_pruning.py TEXT MODEL_DIR FOLDER [--scores keydiff,…] [--budgets 128,256,512,1024] [--context 4096]
                          [--windows 2] [--modes mask,zero] [--jobs 1]

MODEL_DIR, as exported, is converted for each row into FOLDER (`--preset exact --target cpu --budget N --score S`), and
ovtq-eval compares them all: mean KLD and bits per byte over windows as long as the context, and facts found in as many
tokens. `random` is a control. --modes are measured besides, with the first of the scores. --options is passed on to
ovtq-convert, as in --options="--heads shared", what follows -- to ovtq-eval, such as -- --json FILE --trials 2.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ovtq.cli import evaluate
from ovtq.cli.command import Parser, listed, positive, run
from ovtq.cli.convert import main as convert
from ovtq.errors import InputError


def parser() -> Parser:
    p = Parser("measure_pruning", __doc__)
    p.add_argument("text", type=Path, metavar="TEXT")
    p.add_argument("model", type=Path, metavar="MODEL_DIR")
    p.add_argument("folder", type=Path, metavar="FOLDER")
    scores = "keydiff,triattention,norm-high,value-norm,random,norm-low"
    p.add_argument("--scores", type=listed(str, "names"), default=scores, metavar="S,…", help="(default: %(default)s)")
    p.add_argument("--budgets", type=listed(positive, "numbers"), default="128,256,512,1024", metavar="N,…")
    p.add_argument("--context", type=positive, default=4096, metavar="TOKENS", help="(default: %(default)s)")
    p.add_argument("--windows", type=positive, default=2, metavar="N", help="of the text (default: %(default)s)")
    p.add_argument("--modes", type=listed(str, "names"), default=[], metavar="M,…", help="besides evict")
    p.add_argument("--jobs", type=positive, default=1, metavar="N", help="rows at a time (default: %(default)s)")
    p.add_argument("--options", default="", metavar="TEXT", help="more for ovtq-convert")
    return p


def convert_one(command: list[str]) -> None:
    """Run ovtq-convert without its report. Raises InputError if it fails."""
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
        code = convert(command)
    if code:
        raise InputError(f"ovtq-convert {' '.join(command)} failed")


def measure(options: argparse.Namespace, more: list[str]) -> int:
    """Convert, then compare; returns the exit code of ovtq-eval."""
    # other modes keep all tokens, and are slow: the first to start where several run at a time
    rows = [(options.scores[0], mode, budget) for mode in options.modes for budget in options.budgets]
    rows += [(score, "evict", budget) for score in options.scores for budget in options.budgets]
    folders, commands = [], []
    for score, mode, budget in rows:
        folders.append(str(options.folder / (f"{score}-{budget}" + ("" if mode == "evict" else f"-{mode}"))))
        flags = ["--preset", "exact", "--target", "cpu", "--no-verify", "--force", *options.options.split()]
        flags += ["--budget", str(budget), "--score", score, "--mode", mode]
        commands.append([str(options.model), folders[-1], *flags])
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(convert_one, commands))
    context = str(options.context)
    windows = ["--window", context, "--windows", str(options.windows), "--lengths", context, "--greedy", "0"]
    how = [*windows, "--no-verify", "--jobs", str(options.jobs), *more]
    return evaluate.main([str(options.model), *folders, "--text", str(options.text), *how])


def main() -> int:
    own, _, more = (list(part) for part in _split(sys.argv[1:]))
    return run("measure_pruning", lambda: measure(parser().parse_args(own), more))


def _split(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    """What stands before and behind `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at : at + 1], arguments[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
