"""The entry points of the command line: light, so that an interruption while OpenVINO loads is one line too."""

from __future__ import annotations

import os
import signal
import sys


def convert() -> int:
    """`ovtq-convert`."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a pipe that takes ASCII only still gets the text
    try:
        from ovtq.convert import main

        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("ovtq-convert: interrupted; nothing was written", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
