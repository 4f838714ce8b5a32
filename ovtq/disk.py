"""Files of the operating system: flushed, shared, copied, read past the page cache, and those that vanish.

With `system` the only modules that know which system it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

if sys.platform == "win32":
    from ctypes import wintypes
else:
    import fcntl

# Whether a file can be read while it is written, and renamed or removed while it is mapped.
SHARES_OPEN_FILES = sys.platform != "win32"
FICLONE = 0x40049409  # linux/fs.h
NO_CLONES = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)
# Of `read_at` and `write_at`: past the page cache; 0 where there is no such thing.
DIRECT = getattr(os, "O_DIRECT", 0)
BINARY = getattr(os, "O_BINARY", 0)  # without it Windows ends a file at byte 0x1A
CACHED = getattr(os, "RWF_NOWAIT", None)  # a Python built for an old glibc lacks it


def flush(path: Path) -> None:
    """Return once a file's bytes, or a folder's names, are on the disk; raises OSError.

    Windows can't do that for a folder: NTFS keeps a log of names.
    """
    if path.is_dir():
        if sys.platform != "win32":
            with opened(path, os.O_RDONLY) as folder, _where_it_can():
                os.fsync(folder)
    else:
        with opened(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY) as file, _where_it_can():
            os.fsync(file)


@contextlib.contextmanager
def _where_it_can() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # file systems that know no such thing
            raise


def is_mount(path: Path) -> bool:
    """Whether something is mounted at a path, which then can't be renamed; a folder of the same disk (`-v`), too."""
    with contextlib.suppress(OSError):
        if os.path.ismount(path):
            return True
        for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
            name = line.split(" ")[4]
            for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                name = name.replace(code, character)
            if name == str(path):
                return True
    return False


def is_own(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether a path is of that kind (stat.S_ISREG, say), no link to such, and this user's."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if sys.platform == "win32":
        return kind(found.st_mode)
    return kind(found.st_mode) and found.st_uid == os.geteuid()


def identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a folder from any other that takes its name later; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def clone(read: int, made: int) -> bool:
    """Whether the file open as `made` now shares all blocks of `read`. Raises OSError if there is no room.

    Linux: btrfs, XFS. On Windows `copy_whole` shares blocks by itself where system and volume can, and tells no one.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(made, FICLONE, read)
    except OSError as error:
        if error.errno not in NO_CLONES:
            raise
        return False
    return True


def can_clone(source: Path, folder: Path) -> bool:
    """Whether a clone of `source` in `folder` is sure to take no room; tried with a file that is removed at once."""
    if sys.platform != "linux":
        return False
    with source.open("rb") as read, tempfile.TemporaryFile(dir=folder) as made:
        try:
            return clone(read.fileno(), made.fileno())
        except OSError:
            return False


def pages(size: int) -> mmap.mmap:
    """Memory of its own for `size` bytes that starts a page, as reading past the page cache asks."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def read_at(path: Path, view: memoryview, start: int, flag: int = 0) -> None:
    """Fill `view` with a file's bytes from `start` on. Raises OSError if they are not there."""
    with opened(path, os.O_RDONLY | flag) as file:
        if hasattr(os, "preadv"):
            done = os.preadv(file, [view], start)
        else:
            os.lseek(file, start, os.SEEK_SET)
            found = os.read(file, len(view))
            done = len(found)
            view[:done] = found
    if done != len(view):
        raise OSError(errno.EIO, "a block was cut off", str(path))


def read_cached(path: Path, view: memoryview, start: int) -> bool:
    """Whether the page cache had all these bytes: a model just exported or downloaded is there, the disk is spared."""
    if sys.platform == "win32" or CACHED is None:
        return False
    with opened(path, os.O_RDONLY) as file:
        try:
            return os.preadv(file, [view], start, CACHED) == len(view)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            return False


def write_at(path: Path, view: memoryview, start: int, flag: int = 0) -> None:
    """Write `view` into a file from `start` on. Raises OSError if it does not take all."""
    with opened(path, os.O_WRONLY | flag) as file:
        if hasattr(os, "pwrite"):
            done = os.pwrite(file, view, start)
        else:
            os.lseek(file, start, os.SEEK_SET)
            done = os.write(file, view)
    if done != len(view):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file's descriptor, for bytes as they are."""
    file = os.open(path, flags | BINARY)
    try:
        yield file
    finally:
        os.close(file)


def open_now(path: Path) -> BinaryIO:
    """A file for reading, open at once: one of which a pipe was made meanwhile would wait for someone who writes."""
    return os.fdopen(os.open(path, os.O_RDONLY | BINARY | getattr(os, "O_NONBLOCK", 0)), "rb")


def copy_whole(source: Path, target: Path, stop: threading.Event) -> None:
    """Copy a file by the system's own means (Windows), which share blocks where they can; raises OSError.

    Ends early once `stop` is set.
    """
    if sys.platform == "win32":
        number = ctypes.c_longlong
        told = ctypes.WINFUNCTYPE(
            wintypes.DWORD, number, number, number, number, wintypes.DWORD, wintypes.DWORD, *[ctypes.c_void_p] * 3
        )
        copy = ctypes.WinDLL("kernel32", use_last_error=True).CopyFileExW
        copy.argtypes = [wintypes.LPCWSTR, wintypes.LPCWSTR, told, *[ctypes.c_void_p] * 2, wintypes.DWORD]
        progress = told(lambda *_: int(stop.is_set()))  # 1: cancel
        if copy(str(source), str(target), progress, None, None, 0):
            os.chmod(target, stat.S_IWRITE)  # more is appended, whatever the original's marks
        elif not stop.is_set():
            code = ctypes.get_last_error()
            raise OSError(None, ctypes.FormatError(code).strip(), str(target), code)
    else:
        raise OSError(errno.ENOSYS, "this way to copy is Windows' own", str(target))


def temporary(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder in `folder` that vanishes; on Windows among temporary files: OpenVINO writes no long paths."""
    return tempfile.TemporaryDirectory(dir=None if sys.platform == "win32" else folder)


def scratch(folder: Path) -> IO[bytes]:
    """A file in `folder` for reading and writing that vanishes with this process, however it ends, or when closed."""
    return tempfile.TemporaryFile(dir=folder)


def scratch_or_nothing() -> IO[bytes]:
    """The same among temporary files; where there is no room for one, what is written to it is lost."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "w+b")


def scratch_name(file: IO[bytes]) -> str:
    """By what another process opens such a file (`open_scratch`) while this one has it open."""
    return str(file.name) if sys.platform == "win32" else f"/proc/{os.getpid()}/fd/{file.fileno()}"


def open_scratch(name: str) -> BinaryIO:
    """Another process's file, for reading."""
    # who opens a file that is to vanish must ask for that, too, or Windows refuses
    return os.fdopen(os.open(name, os.O_RDONLY | BINARY | getattr(os, "O_TEMPORARY", 0)), "rb")
