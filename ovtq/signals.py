"""Signals that end a command, on every system: they interrupt it, but not where half of something would be left."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

# Ctrl-C; the request to end; a terminal that went away; Ctrl-Break and a closed window on Windows.
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))
AGAIN = 2.0  # seconds in which a further signal says what the first one said


def interrupt() -> None:
    """Let Ctrl-C, Ctrl-Break, a closed window and the request to end raise KeyboardInterrupt.

    SIGINT and SIGHUP stay ignored where they are, as in the background of a script and under nohup. What follows within
    two seconds is taken for the same: it must not end the tidying up.
    """
    last = -AGAIN

    def act(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= AGAIN:
            raise KeyboardInterrupt

    for number in ENDING:
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, act)


def ignore() -> None:
    """From here on a signal changes nothing: all that is left is to leave."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


class Held:
    """Within the block, signals that end the process are noted only; when it ends, they are dealt with.

    Handlers of Python run in the main thread whichever thread the system chose, so this holds with other threads about,
    as a mask of one thread would not. In another thread than the main one nothing happens, for no handler runs there.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._came: list[int] = []
        self._done = False

    def __enter__(self) -> Held:
        try:
            self._hold()
        except BaseException:
            self._let()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._let()

    @contextlib.contextmanager
    def let_through(self) -> Iterator[None]:
        """Within this block they do what they do outside, those that came before at once."""
        self._let()
        try:
            yield
        finally:
            self._hold()

    def done(self) -> None:
        """What came and what comes within the block is too late to stop anything, and dropped."""
        self._done = True

    def _hold(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in ENDING:
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_IGN, self._note):
                self._before[number] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)

    def _let(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
        came, self._came = dict.fromkeys(() if self._done else self._came), []
        for number in came:
            signal.raise_signal(number)


def forget(error: BaseException) -> None:
    """Drop what the frames hold through which an error came: models map files, which Windows then can't remove."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            todo += [one.__context__, one.__cause__]
    gc.collect()
