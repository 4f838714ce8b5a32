"""The entry points of the command line: a small process that watches over the one that does the work.

So an interruption while OpenVINO loads is one line, and so is OpenVINO's death.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback

from ovtq import __version__, child, signals, system
from ovtq.errors import InputError, scarcity

# By the name behind `ovtq` and behind `ovtq-`: the module whose `main` it is, and what it does.
COMMANDS = {
    "convert": ("convert", "rewrite a model folder so that its KV cache is smaller, and verify the result"),
    "infer": ("infer", "answer one prompt, and say what it took"),
    "inspect": ("inspect", "what a model folder holds, and its memory with each preset"),
    "eval": ("evaluate", "what a cache costs in quality"),
    "bench": ("bench", "time and memory beside the model as exported"),
    "calibrate": ("calibrate", "statistics of a text, for heads that lose less: convert --basis calibrated"),
    "doctor": ("doctor", "what works on this machine, and how fast: a page to send with a report"),
    "report": ("report", "one page of figures of eval and bench"),
}
USAGE = """usage: ovtq COMMAND ARGUMENT…

{commands}

ovtq COMMAND --help tells more, ovtq --version the versions; `ovtq convert` and `ovtq-convert` are the same command.
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
        sys.stdout.write(
            USAGE.format(commands="\n".join(f"  {key:<11}{about}" for key, (_, about) in COMMANDS.items()))
        )
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


def calibrate() -> int:
    """`ovtq-calibrate`."""
    return run_command("calibrate")


def doctor() -> int:
    """`ovtq-doctor`."""
    return run_command("doctor", "interrupted; the same command goes on")


def report() -> int:
    """`ovtq-report`."""
    return run_command("report")


def run_command(
    module: str, interrupted: str = "interrupted", name: str | None = None, package: str = "ovtq.cli"
) -> int:
    """Exit code of `PACKAGE.MODULE.main()`, run in a process of its own."""
    system.open_streams()
    prog = f"ovtq-{name or module}"
    try:
        return child.watch("ovtq.cli.entry", "work", f"{package}.{module}", prog, interrupted)
    except child.Died as error:
        if "--debug" in sys.argv:
            _say(error.native.rstrip())
        _say(f"{prog}: {error}; nothing was written" if module == "convert" else f"{prog}: {error}")
    except OSError as error:
        _say(f"{prog}: can't start a process ({system.reason(error)})")
    except InputError as error:
        _say(f"{prog}: {error}")
    return 2


def work(module: str, prog: str, interrupted: str) -> int:
    """The same in this process, with signals and streams as the commands need them."""
    try:
        system.use_utf8()
        try:
            code = importlib.import_module(module).main()
        except SystemExit as end:  # --help, --version
            code = int(end.code or 0)
        if code:
            signals.ignore()
        sys.stdout.flush()
    except KeyboardInterrupt:
        signals.ignore()
        # numpy's OpenBLAS sends itself a SIGINT where it gets no threads
        _say(f"{prog}: {scarcity(system.told_natively()) or interrupted}")
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        system.drop_output()
        return 0
    except OSError as error:
        system.drop_output()
        _say(f"{prog}: standard output can't be written to ({system.reason(error)})")
        return 2
    except Exception as error:  # OpenVINO can't be loaded, say
        if "--debug" in sys.argv:
            _say(traceback.format_exc().rstrip())
        if lack := scarcity(str(error)):
            _say(f"{prog}: {lack}")
            return 2
        _say(f"{prog}: can't start ({type(error).__name__}: {' '.join(str(error).split())[-500:]})")
        return 2
    return code


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # there may be nobody to tell
        print(line, file=sys.stderr, flush=True)
