"""The entry points of the command line: light, so that an interruption while OpenVINO loads is one line too."""

from __future__ import annotations

import importlib
import os
import sys

from ovtq import signals, system


def convert() -> int:
    """`ovtq-convert`."""
    return run_command("convert", "interrupted; nothing was written")


def inspect() -> int:
    """`ovtq-inspect`."""
    return run_command("inspect")


def evaluate() -> int:
    """`ovtq-eval`."""
    return run_command("evaluate", name="eval")


def bench() -> int:
    """`ovtq-bench`."""
    return run_command("bench")


def infer() -> int:
    """`ovtq-infer`."""
    return run_command("infer")


def calibrate() -> int:
    """`ovtq-calibrate`."""
    return run_command("calibrate")


def report() -> int:
    """`ovtq-report`."""
    return run_command("report")


def run_command(module: str, interrupted: str = "interrupted", name: str | None = None) -> int:
    """Exit code of `ovtq.cli.MODULE.main()`, with signals and streams as the commands need them."""
    signals.interrupt()
    system.use_utf8()
    try:
        try:
            code = importlib.import_module(f"ovtq.cli.{module}").main()
        except SystemExit as end:  # --help, --version
            code = int(end.code or 0)
        if code:
            signals.ignore()
        sys.stdout.flush()
    except KeyboardInterrupt:
        signals.ignore()
        print(f"ovtq-{name or module}: {interrupted}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
