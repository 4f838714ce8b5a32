"""Work in a process of its own, whose death is one line and leaves nothing behind.

OpenVINO runs a model as a program: what is wrong in it, or with its file, can end the process (SIGSEGV, SIGBUS,
SIGFPE), and so can the system when memory is short (SIGKILL). Whoever asks for the work is another, small process that
outlives it. The child ends when that one does.

Both are joined by two pipes. The child tells what it is at, and what came of it; a byte of the parent's answers each
step of progress, and the end of the parent's pipe tells the child to stop. None but these two can read or write them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from ovtq import disk, signals, staging, system, whereabouts
from ovtq.errors import InputError, OvtqError, scarcity

PATIENCE = 60  # seconds that a child has to stop in
TOLD = 300  # characters of what a dying process said itself
BOOT = "import sys; sys.path[:] = {path!r}; from ovtq import child; child.{entry}()"
# See ovtq/__init__.py; and no module of the working directory, in processes that this one starts, either.
ENVIRONMENT = {"OVTQ_TELEMETRY": "off", "PYTHONSAFEPATH": "1"}
# Of Windows, which has no signals: exit codes of a process that died.
DEATHS = {0xC0000005: "an access violation", 0xC0000094: "a division by zero", 0xC00000FD: "a stack overflow"}
DEATHS |= {0xC0000017: "a lack of memory", 0xC0000409: "an abort"}

Heard = Callable[[tuple[Any, ...]], None]


class Unsendable(Exception):
    """The arguments can't be handed to another process, such as a class of a script."""


class Died(Exception):
    """The child died; its text says of what and while doing what, `native` what it wrote to stderr by itself."""

    def __init__(self, text: str, native: str = "") -> None:
        super().__init__(text)
        self.native = native


# ------------------------------------------------------------------------------------------ the parent


class _Child:
    """Another Python, what it told last, and what it writes to stderr by other means than Python's."""

    def __init__(self, entry: str, stdin: int | None) -> None:
        self.native = disk.scratch_or_nothing()
        code = BOOT.format(path=[part or os.getcwd() for part in sys.path], entry=entry)
        environment = {**os.environ, **ENVIRONMENT}
        self.process, self.hear, self.say = system.start_python(code, self.native, stdin, environment)
        self.at = "starting"
        self.made: list[Path] = []

    def messages(self, heard: Heard) -> None:
        """Take all messages until there are no more."""
        while True:
            try:
                message = pickle.load(self.hear)
            except (EOFError, pickle.UnpicklingError, OSError):
                return
            if message[0] == "at":
                self.at = message[1]
            elif message[0] == "makes":
                self.made.append(message[1])
            else:
                heard(message)

    def answer(self, value: bytes = b"\0") -> None:
        """Let it go on."""
        with contextlib.suppress(OSError):
            self.say.write(value)
            self.say.flush()

    def end(self) -> None:
        """Tell it to stop, and return once it is gone and has left nothing."""
        with contextlib.suppress(OSError):
            self.say.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.tidy()

    def close(self) -> None:
        """Let go of what was shared with it, once it is gone."""
        for file in (self.hear, self.say, self.native):
            with contextlib.suppress(OSError):
                file.close()

    def tidy(self) -> None:
        """Remove what it left."""
        for target in self.made:
            with contextlib.suppress(OSError):
                staging.tidy_up(target)

    def wrote(self) -> str:
        """What it wrote to stderr itself."""
        self.native.seek(0)
        return self.native.read().decode("utf-8", "replace")

    def death(self) -> Died:
        """How it died."""
        native = self.wrote()
        last = next((line.strip() for line in reversed(native.splitlines()) if line.strip()), "")
        said = f" ({last[:TOLD]})" if last else ""
        return Died(f"{_cause(self.process.wait())} while {self.at}{said}", native)


def _cause(code: int) -> str:
    if code == -getattr(signal, "SIGKILL", 0) != 0:
        return "killed by the system (SIGKILL; out of memory?)"
    if code < 0:
        try:
            return f"OpenVINO died of {signal.Signals(-code).name}"
        except ValueError:
            return f"OpenVINO died of signal {-code}"
    if code & 0xFFFFFFFF in DEATHS:
        return f"OpenVINO died of {DEATHS[code & 0xFFFFFFFF]}"
    return f"the process ended by itself (exit code {code})"


def call(module: str, function: str, *arguments: Any, on_progress: Callable[..., None] | None = None) -> Any:
    """What a function of ours returns, run in a child; what it raises is raised here.

    `on_progress`, if there is one, is a keyword argument of the function, called here. Raises InputError if the child
    dies, Unsendable if the arguments or the result can't be handed over.
    """
    try:
        work = pickle.dumps((module, function, arguments, on_progress is not None))
    except Exception as error:  # pickle raises whatever a class raises
        raise Unsendable(str(error)) from None
    try:
        child = _Child("serve_call", subprocess.DEVNULL)
    except OSError as error:
        raise InputError(f"can't start a process ({system.reason(error)})") from None
    results: list[tuple[Any, ...]] = []

    def heard(message: tuple[Any, ...]) -> None:
        if message[0] == "progress":
            assert on_progress
            on_progress(*message[1])
            child.answer()
        else:
            results.append(message)

    try:
        child.answer(len(work).to_bytes(8, "little") + work)
        child.messages(heard)
    finally:
        child.end()
        death = None if results else child.death()
        child.close()
    if death:
        raise InputError(str(death)) from None
    kind, value, *more = results[-1]
    if kind == "raised":
        if more:
            value.__cause__ = _Elsewhere(more[0])
        raise value
    if kind == "unsendable":
        raise Unsendable(value)
    return value


class _Elsewhere(Exception):
    """Where in the child an error was raised."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def watch(module: str, function: str, *arguments: Any) -> int:
    """The exit code that a function of ours returns, run in a child that has this process's terminal and arguments.

    Signals that end a command are the child's to deal with. Raises Died if it dies, OSError if it can't be started,
    InputError if it can't begin.
    """
    came: list[int] = []
    children: list[_Child] = []

    def forward(number: int, frame: FrameType | None = None) -> None:
        came.append(number)
        if children and not system.WINDOWS:  # there a console tells all that it has
            with contextlib.suppress(OSError):
                children[0].process.send_signal(number)

    for number in signals.ENDING:
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    child = _Child("serve_command", None)
    children.append(child)
    for number in [*came]:
        forward(number)
    codes: list[int] = []
    work = pickle.dumps((module, function, arguments, sys.argv))
    child.answer(len(work).to_bytes(8, "little") + work)

    raised: list[InputError] = []

    def heard(message: tuple[Any, ...]) -> None:
        if message[0] == "raised":
            raised.append(message[1])
            return
        codes.append(message[1])
        child.say.close()  # its thread that listens ends, too: Windows lets no process end before

    child.messages(heard)
    child.process.wait()
    child.tidy()
    if raised:
        raise raised[0]
    if not codes:
        raise child.death()
    if codes[0] == 0 and (native := child.wrote()):
        with contextlib.suppress(OSError):
            sys.stderr.write(native)
    return codes[0]


# ------------------------------------------------------------------------------------------ the child


class _Link:
    """The child's ends of the pipes."""

    def __init__(self) -> None:
        self.hear, self.say = system.join_parent()
        self._lock, self._answers = threading.Lock(), threading.Semaphore(0)

    def work(self) -> Any:
        """What there is to do."""
        size = int.from_bytes(self.hear.read(8), "little")
        return pickle.loads(self.hear.read(size))

    def listen(self) -> None:
        """From now on take answers, and stop when the parent is gone or wants no more."""

        def listen() -> None:
            while self.hear.read(1):
                self._answers.release()
            self._answers.release()
            system.interrupt_main()

        try:
            threading.Thread(target=listen, daemon=True).start()
        except RuntimeError as error:
            raise InputError(scarcity(str(error)) or str(error)) from None

    def tell(self, message: tuple[Any, ...]) -> None:
        """Send a message."""
        data = pickle.dumps(message)
        with self._lock, contextlib.suppress(OSError):  # who is gone need not know
            self.say.write(data)
            self.say.flush()

    def progress(self, *step: Any) -> None:
        """Tell a step, and go on when the parent has taken it."""
        self.tell(("progress", step))
        while not self._answers.acquire(timeout=system.TURN):
            pass


def serve_call() -> None:
    """The child of `call`."""
    link = _Link()
    signals.ignore()  # the parent decides
    try:
        module, function, arguments, progress = link.work()
        work = getattr(importlib.import_module(module), function)
    except Exception as error:  # pickle raises whatever a class raises
        link.tell(("unsendable", str(error)))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    whereabouts.watched(link.tell)
    try:
        link.listen()
        result = work(*arguments, **({"on_progress": link.progress} if progress else {}))
    except OvtqError as error:
        message: tuple[Any, ...] = ("raised", error)
    except KeyboardInterrupt:
        message = ("raised", InputError("interrupted"))
    except Exception as error:
        message = ("raised", _portable(error), traceback.format_exc())
    else:
        message = ("done", result)
    signals.ignore()
    link.tell(message)


def serve_command() -> None:
    """The child of `watch`."""
    link = _Link()
    module, function, arguments, sys.argv = link.work()
    signals.interrupt()
    try:
        link.listen()
    except InputError as error:
        link.tell(("raised", error))
        return
    whereabouts.watched(link.tell)
    code = getattr(importlib.import_module(module), function)(*arguments)
    signals.ignore()
    link.tell(("done", code))
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.exit(code)


def _portable(error: Exception) -> Exception:
    """The error, or one that can be sent in its place."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickle raises whatever a class raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
