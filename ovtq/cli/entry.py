"""The entry points of the command line: a small process that watches over the one that does the work.

So an interruption while OpenVINO loads is one line, and so is OpenVINO's death.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback

from ovtq import child, signals, system


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


def report() -> int:
    """`ovtq-report`."""
    return run_command("report")


def run_command(module: str, interrupted: str = "interrupted", name: str | None = None) -> int:
    """Exit code of `ovtq.MODULE.main()`, run in a process of its own."""
    system.open_streams()
    prog = f"ovtq-{name or module}"
    try:
        return child.watch("ovtq.cli.entry", "work", module, prog, interrupted)
    except child.Died as error:
        if "--debug" in sys.argv:
            _say(error.native.rstrip())
        _say(f"{prog}: {error}; nothing was written" if module == "convert" else f"{prog}: {error}")
    except OSError as error:
        _say(f"{prog}: can't start a process ({system.reason(error)})")
    return 2


def work(module: str, prog: str, interrupted: str) -> int:
    """The same in this process, with signals and streams as the commands need them."""
    try:
        system.use_utf8()
        try:
            code = importlib.import_module(f"ovtq.cli.{module}").main()
        except SystemExit as end:  # --help, --version
            code = int(end.code or 0)
        if code:
            signals.ignore()
        sys.stdout.flush()
    except KeyboardInterrupt:
        signals.ignore()
        _say(f"{prog}: {interrupted}")
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
        _say(f"{prog}: can't start ({type(error).__name__}: {' '.join(str(error).split())[-500:]})")
        return 2
    return code


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # there may be nobody to tell
        print(line, file=sys.stderr, flush=True)
