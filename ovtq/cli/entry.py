"""The entry points of the command line: light, so that an interruption while OpenVINO loads is one line too."""

from __future__ import annotations

import importlib
import os
import sys

from ovtq import __version__, signals, system

# By the name behind `ovtq` and behind `ovtq-`: the module whose `main` it is, and what it does.
COMMANDS = {
    "convert": ("convert", "rewrite a model folder so that its KV cache is smaller, and verify the result"),
    "infer": ("infer", "answer one prompt, and say what it took"),
    "inspect": ("inspect", "what a model folder holds, and its memory with each preset"),
    "eval": ("evaluate", "what a cache costs in quality"),
    "bench": ("bench", "time and memory beside the model as exported"),
    "doctor": ("doctor", "what works on this machine, and how fast: a page to send with a report"),
    "report": ("report", "one page of figures of eval and bench"),
}
USAGE = """usage: ovtq COMMAND ARGUMENT…

{commands}

ovtq COMMAND --help tells more; `ovtq convert` and `ovtq-convert` are the same command.
first steps: ovtq convert MODEL_DIR OUT_DIR && ovtq infer OUT_DIR --prompt "What is a KV cache?"
"""


def main() -> int:
    """`ovtq COMMAND …`, which is `ovtq-COMMAND …`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
        return {"convert": convert, "doctor": doctor}.get(name, lambda: run_command(COMMANDS[name][0], name=name))()
    system.use_utf8()
    if name in ("--help", "-h"):
        sys.stdout.write(USAGE.format(commands="\n".join(f"  {key:<9}{about}" for key, (_, about) in COMMANDS.items())))
        return 0
    if name == "--version":
        print(f"ovtq {__version__}")
        return 0
    print(f"ovtq: no command {name!r}; there are {', '.join(COMMANDS)} (ovtq --help)", file=sys.stderr)
    return 2


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


def doctor() -> int:
    """`ovtq-doctor`."""
    return run_command("doctor", "interrupted; the same command goes on")


def report() -> int:
    """`ovtq-report`."""
    return run_command("report")


def run_command(
    module: str, interrupted: str = "interrupted", name: str | None = None, package: str = "ovtq.cli"
) -> int:
    """Exit code of `PACKAGE.MODULE.main()`, with signals and streams as the commands need them."""
    signals.interrupt()
    if sys.stdout is None:  # closed, as by >&-
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    system.use_utf8()
    try:
        try:
            code = importlib.import_module(f"{package}.{module}").main()
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
