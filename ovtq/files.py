"""Reading files that others wrote, and writing ours so that each is there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ovtq import disk, system
from ovtq.errors import InputError

MOST = 256 << 20  # bytes of a file that is read whole
BLOCK = 1 << 20  # bytes that are copied at once


def check_regular(path: Path) -> None:
    """Raise InputError if there is something at `path`, behind links, that is no regular file, such as a pipe."""
    with contextlib.suppress(FileNotFoundError):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            raise
        except OSError as error:
            raise InputError(f"{path}: can't be read ({system.reason(error)})") from None
        except ValueError:  # a zero byte
            raise InputError(f"{str(path)!r}: no path") from None
        if not stat.S_ISREG(mode):
            raise InputError(f"{path}: {kind(mode)}; a regular file is needed there")


def kind(mode: int) -> str:
    """What is not a regular file, in words."""
    for test, words in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return words
    return "no regular file"


@contextmanager
def opened(path: Path, missing: str = "") -> Iterator[BinaryIO]:
    """A regular file, open for reading. Raises InputError if it is none, or can't be read, within the block, too.

    `missing` is what to do about a file that is not there.
    """
    check_regular(path)
    try:
        with disk.open_now(path) as file:
            if not stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode):  # it became something else meanwhile
                raise InputError(f"{path}: {kind(mode)}; a regular file is needed there")
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{f'; {missing}' if missing else ''}") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({system.reason(error)})") from None


def read(path: Path, missing: str = "", most: int = MOST) -> bytes:
    """A whole file. Raises InputError if it is none, can't be read, or is longer than `most` bytes.

    `missing` is what to do about a file that is not there.
    """
    try:
        with opened(path, missing) as file:
            found = file.read(most + 1)
    except MemoryError:
        raise InputError(f"{path}: can't be read (out of memory)") from None
    if len(found) > most:
        raise InputError(f"{path}: over {most >> 20} MiB; no such file is that long")
    return found


def read_text(path: Path, missing: str = "") -> str:
    """A text in UTF-8. Raises InputError if it is none."""
    try:
        return read(path, missing).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None


def read_json(path: Path, missing: str = "") -> Any:
    """What a JSON file holds. Raises InputError if it can't be read."""
    return parse_json(read(path, missing), path)


def parse_json(text: bytes | str, where: object) -> Any:
    """What a JSON text holds. Raises InputError, naming `where` it stands, for one that can't be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where}: can't be read (nested too deep)") from None
    except (ValueError, MemoryError) as error:
        raise InputError(f"{where}: can't be read ({error})") from None


def check_writable(path: Path, option: str) -> None:
    """Raise InputError, naming `option`, if a file can't be written to `path`: it replaces a regular one or none."""
    target = system.resolved(path)
    if not target.parent.is_dir() or target.is_dir() or not os.access(target.parent, os.W_OK):
        raise InputError(f"{option} {path}: no such folder, or not a file that can be written")
    try:
        check_regular(target)
    except InputError as error:
        raise InputError(f"{option} {error}") from None


def write(path: Path, text: str) -> None:
    """Write a text to `path`, in UTF-8, as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))


def copy(source: Path, target: Path) -> None:
    """Copy a regular file's bytes, and nothing else of it, as `replacing` does."""
    with opened(source) as read, replacing(target) as made:
        shutil.copyfileobj(read, made, BLOCK)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex digits. Raises InputError if it can't be read."""
    return hashlib.sha256(read(path)).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """What is written to within the block takes the place of `path`, or of what it links to, when that ends well.

    It is written beside it first, and on the disk before it gets its name, so that it is whole or not at all. What else
    has its name (a hard link) keeps what it had. Raises InputError if it can't be written, or if what has the name is
    no regular file.
    """
    check_regular(path)
    target = system.long_path(system.resolved(path))
    new = target.with_name(f".ovtq-{secrets.token_hex(8)}.new")
    try:
        try:
            with new.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                new.chmod(stat.S_IMODE(target.stat().st_mode) & 0o777)
            new.replace(target)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({system.reason(error)})") from None
