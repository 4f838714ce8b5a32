"""What operating systems do each in their own way: streams, locks, files that are open, memory, processors.

Nothing else in the package asks which system it runs on. Linux and Windows are known; elsewhere what is missing is done
without.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, BinaryIO

from ovtq import disk

if sys.platform == "win32":
    import msvcrt
else:
    pass

WINDOWS = sys.platform == "win32"
TRIES, PAUSE = 10, 0.1  # of what another program may hold up for a moment: scanners and indexers open what is new
HELD = (5, 32, 33)  # Windows' error codes: access denied, sharing violation, lock violation
LONG = 120  # characters of a folder's path from which files in it may pass Windows' limit of 260


# ------------------------------------------------------------------------------------------ streams


STDOUT = "standard output"  # in place of a file's name in an OSError


class _Piped(io.TextIOWrapper):
    """Standard output, named in its errors; BrokenPipeError where Windows says that an argument is invalid."""

    def write(self, text: str) -> int:
        with self._told():
            return super().write(text)

    def flush(self) -> None:
        with self._told():
            super().flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, BrokenPipeError) or (WINDOWS and error.errno == errno.EINVAL):
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None
            raise OSError(error.errno, error.strerror, STDOUT) from None


def use_utf8() -> None:
    """Let the standard streams take every character: UTF-8 on Windows, elsewhere the locale's, with ? for the rest."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            continue
        kind = "utf-8" if WINDOWS else stream.encoding
        if name == "stdout" and not stream.isatty():
            sys.stdout = _Piped(stream.detach(), kind, "replace")
        elif WINDOWS and not stream.isatty():
            sys.stderr = io.TextIOWrapper(stream.detach(), kind, "replace", line_buffering=True)
        else:
            stream.reconfigure(errors="replace")
    if WINDOWS and isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")  # PowerShell may begin with a mark


def open_streams() -> None:
    """Let standard streams that are closed lead nowhere, or the next file to be opened would be taken for them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            made = os.open(os.devnull, os.O_RDWR)
            if made != number:
                os.dup2(made, number)
                os.close(made)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def drop_output() -> None:
    """Let what is still to be written to standard output go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# ------------------------------------------------------------------------------------------ processes

TURN = 0.2  # seconds after which who waits looks up: on Windows no signal wakes a thread that waits for another


def start_python(
    code: str, stderr: IO[bytes], stdin: int | None, environment: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], BinaryIO, BinaryIO]:
    """Another Python that runs `code`, and a pipe from and a pipe to what `join_parent` returns there.

    What it writes to standard error by other means than Python's goes to the file `stderr`. Raises OSError.
    """
    sys.stderr.flush()
    ends = [os.pipe(), os.pipe()]
    (hear, theirs_to), (theirs_from, say) = ends
    shown = os.dup(2)
    given = [theirs_from, theirs_to, shown]
    numbers, passed = given, given
    try:
        if sys.platform == "win32":
            numbers = [msvcrt.get_osfhandle(number) for number in given]
            for number in numbers:
                os.set_handle_inheritable(number, True)
            passed = []
        command = [sys.executable, "-c", code, *map(str, numbers)]
        process = subprocess.Popen(
            command, stdin=stdin, stderr=stderr, env=environment, close_fds=bool(passed), pass_fds=passed
        )
    except OSError:
        os.close(hear)
        os.close(say)
        raise
    finally:
        for number in given:
            os.close(number)
    return process, os.fdopen(hear, "rb"), os.fdopen(say, "wb")


def join_parent() -> tuple[BinaryIO, BinaryIO]:
    """In a process of `start_python`: the pipe from the parent, and that to it. Python's stderr is the parent's."""
    numbers = [int(text) for text in sys.argv[1:4]]
    if sys.platform == "win32":
        flags = (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)
        numbers = [
            msvcrt.open_osfhandle(number, flag | disk.BINARY) for number, flag in zip(numbers, flags, strict=True)
        ]
    for number in numbers:
        os.set_inheritable(number, False)
    hear, say, shown = numbers
    kind = sys.stderr.encoding if sys.stderr else "utf-8"
    sys.stderr = os.fdopen(shown, "w", encoding=kind, errors="backslashreplace", buffering=1)
    return os.fdopen(hear, "rb"), os.fdopen(say, "wb")


def told_natively() -> str:
    """In a process of `start_python`: what was written to its standard error by other means than Python's."""
    with contextlib.suppress(OSError):
        size = os.fstat(2).st_size
        if sys.platform != "win32":
            return os.pread(2, size, 0).decode("utf-8", "replace")
        here = os.lseek(2, 0, os.SEEK_CUR)
        os.lseek(2, 0, os.SEEK_SET)
        said = os.read(2, size)
        os.lseek(2, here, os.SEEK_SET)
        return said.decode("utf-8", "replace")
    return ""


def interrupt_main() -> None:
    """What SIGTERM does, in the main thread, from another one."""
    main = threading.main_thread().ident
    if main is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main, signal.SIGTERM)  # wakes it, if it waits
    else:
        _thread.interrupt_main(signal.SIGTERM)


# ------------------------------------------------------------------------------------------ locks and folders


class Lock:
    """A lock file, held by one process, which gives it up however it ends."""

    def __init__(self, path: Path) -> None:
        """Take it, making the file. Raises BlockingIOError if another process has it, OSError if that can't be."""
        import filelock  # here, as psutil below: the process that only watches another needs neither

        self.path = path
        self._lock = filelock.FileLock(path, timeout=0)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise BlockingIOError(errno.EAGAIN, "another process holds it", str(path)) from None
        except NotImplementedError:
            raise OSError(errno.ENOSYS, "the file system knows no locks", str(path)) from None
        if not path.exists():  # removed between opening and locking by one that had it before
            self._lock.release()
            raise BlockingIOError(errno.EAGAIN, "another process removed it", str(path))

    def release(self, keep: bool) -> None:
        """Give it up, leaving the file only if told to."""
        if not keep and not WINDOWS:  # while it is held, lest someone else takes a file that has no name any more
            self.path.unlink(missing_ok=True)
        self._lock.release()
        with contextlib.suppress(OSError):
            if keep:  # filelock itself removes it on Windows
                self.path.touch()
            else:
                self.path.unlink(missing_ok=True)


def rename(path: Path, target: Path) -> Path:
    """As Path.rename; on Windows tried again for a second while another program has something in it open."""
    for left in reversed(range(TRIES if WINDOWS else 1)):
        try:
            return path.rename(target)
        except PermissionError:
            if not left:
                raise
            time.sleep(PAUSE)
    raise AssertionError


def remove(path: Path) -> bool:
    """Whether a folder with all in it is gone now; on Windows tried again for a second."""

    def writable(function: Callable[[str], object], name: str, _: object) -> None:
        with contextlib.suppress(OSError):  # what is marked read-only can't be removed there
            os.chmod(name, stat.S_IWRITE)
            function(name)

    for left in reversed(range(TRIES if WINDOWS else 1)):
        if WINDOWS:
            shutil.rmtree(path, onerror=writable)
        else:
            shutil.rmtree(path, ignore_errors=True)
        if not os.path.lexists(path):
            return True
        if left:
            time.sleep(PAUSE)
    return False


def reason(error: OSError) -> str:
    """Why the system refused something, in words that hold for all systems."""
    if error.errno == errno.ENOSPC:
        return "no space left"
    if getattr(error, "winerror", None) in HELD:
        return "in use by another program, or not allowed; close what has it open and try again"
    return error.strerror or str(error)


def resolved(path: Path) -> Path:
    """As Path.resolve; where that fails, as for long paths on Windows or links in a circle, without following links."""
    if not WINDOWS:
        try:
            return path.resolve()
        except (OSError, RuntimeError, ValueError):  # a circle of links, before Python 3.13 the second; a zero byte
            return Path(os.path.abspath(path))
    try:
        found = str(long_path(path).resolve())
    except (OSError, ValueError):
        found = os.path.abspath(path)
    return Path(f"\\\\{found[8:]}" if found.startswith("\\\\?\\UNC\\") else found.removeprefix("\\\\?\\"))


def long_path(path: Path) -> Path:
    r"""The path as Windows takes it at any length (\\?\C:\…), if it may become too long; elsewhere as it is."""
    if not WINDOWS or len(whole := os.path.abspath(path)) < LONG or whole.startswith("\\\\?\\"):
        return path
    return Path(f"\\\\?\\UNC\\{whole[2:]}" if whole.startswith("\\\\") else f"\\\\?\\{whole}")


# ------------------------------------------------------------------------------------------ processors and memory


def processors() -> int:
    """How many cores this process may use."""
    import psutil

    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1


def memory() -> int:
    """Bytes of the machine's memory."""
    import psutil

    return int(psutil.virtual_memory().total)


_PEAK_BEFORE = [0]  # Windows can't forget it


def reset_peak() -> None:
    """Begin to measure this process's peak of resident memory."""
    if WINDOWS:
        import psutil

        _PEAK_BEFORE[0] = psutil.Process().memory_info().peak_wset
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak() -> int | None:
    """That peak, in bytes; None where it can't be told.

    On Windows, which keeps that of the whole life alone, it is exact if it is the highest yet, otherwise what is
    resident now.
    """
    if WINDOWS:
        import psutil

        now = psutil.Process().memory_info()
        return int(now.peak_wset if now.peak_wset > _PEAK_BEFORE[0] else now.rss)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def trim_memory() -> None:
    """Give freed memory back where the C library (glibc) can."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)
