"""Copying a model's weights file while something else is done; what that reads of it comes first."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Thread

FICLONE = 0x40049409  # linux/fs.h
ALIGNED = 4096  # what direct reads and writes start and end at
BLOCK = 1 << 22  # bytes copied at a time
WORKERS = 4  # blocks in flight
CACHED = getattr(os, "RWF_NOWAIT", None)  # a Python built for an old glibc lacks it
MEMORY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
NO_CLONES = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)


class Copy:
    """The bytes of `source` on their way into the file `target`, a new one, which has its length from the beginning.

    `how` is `reflink` where the file system shares blocks until they are written (btrfs, XFS: FICLONE): then all is
    there at once. Else it is `copy`, and what was not copied yet reads as zeros: `start`, then `wait`. Blocks that the
    page cache holds come from there; all are written past it, for it would have to find room for every page, and the
    others read so, too, but where that is refused.
    """

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target, self.size = source, target, source.stat().st_size
        self._todo: deque[int] = deque()  # where blocks start, those in flight not among them
        self._left: set[int] = set()
        self._change, self._error, self._threads = Condition(), None, []
        with source.open("rb") as read, target.open("xb") as made:
            if _share(read.fileno(), made.fileno()):
                self.how = "reflink"
                return
            self.how = "copy"
            made.truncate(self.size)
        self._todo.extend(range(0, self.size, BLOCK))
        self._left.update(self._todo)
        self._direct = True

    def start(self) -> None:
        """Begin to copy."""
        self._threads = [Thread(target=self._work, daemon=True) for _ in range(WORKERS if self._todo else 0)]
        for thread in self._threads:
            thread.start()

    def wait(self, places: Iterable[tuple[int, int]] | None = None) -> None:
        """Until the bytes at `places`, (offset, size), are there, which come next; all of them by default.

        Raises OSError if they can't be copied.
        """
        with self._change:
            wanted = set(self._left)
            if places is not None:
                touched = {
                    block for offset, size in places for block in range(offset // BLOCK * BLOCK, offset + size, BLOCK)
                }
                wanted &= touched
                self._todo = deque(sorted(self._todo, key=lambda block: (block not in wanted, block)))
            self._change.wait_for(lambda: self._error or not wanted & self._left)
            if self._error:
                raise self._error

    def stop(self) -> None:
        """Copy nothing more; returns when no thread writes any longer."""
        with self._change:
            self._todo.clear()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        try:
            with mmap.mmap(-1, BLOCK, MEMORY) as buffer:  # starts a page; one for all blocks, or each would be zeroed
                while (block := self._next()) is not None:
                    self._copy(buffer, block)
                    with self._change:
                        self._left.discard(block)
                        self._change.notify_all()
        except Exception as error:  # whatever it is, whoever waits must be told
            with self._change:
                self._error = self._error or error
                self._change.notify_all()

    def _next(self) -> int | None:
        with self._change:
            return self._todo.popleft() if self._todo and not self._error else None

    def _copy(self, buffer: mmap.mmap, start: int) -> None:
        size, done = min(BLOCK, self.size - start), 0
        whole = size // ALIGNED * ALIGNED
        if self._direct and whole:
            try:
                self._move(buffer, start, whole, os.O_DIRECT)
                done = whole
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False
        if done < size:
            self._move(buffer, start + done, size - done, 0)

    def _move(self, buffer: mmap.mmap, start: int, size: int, flag: int) -> None:
        with memoryview(buffer)[:size] as view:
            if not self._cached(view, start):
                with _opened(self.source, os.O_RDONLY | flag) as read:
                    if os.preadv(read, [view], start) != size:
                        raise OSError(errno.EIO, "a block was cut off", str(self.source))
            with _opened(self.target, os.O_WRONLY | flag) as made:
                if os.pwrite(made, view, start) != size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.target))

    def _cached(self, view: memoryview, start: int) -> bool:
        """Whether the page cache had it all: a model just exported or downloaded is there, and the disk is spared."""
        if CACHED is None:
            return False
        with _opened(self.source, os.O_RDONLY) as read:
            try:
                return os.preadv(read, [view], start, CACHED) == len(view)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                return False


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags)
    try:
        yield file
    finally:
        os.close(file)


def can_reflink(source: Path, folder: Path) -> bool:
    """Whether a clone of `source` in `folder` takes no room; tried with a file that is removed at once."""
    with source.open("rb") as read, tempfile.TemporaryFile(dir=folder) as made:
        try:
            return _share(read.fileno(), made.fileno())
        except OSError:
            return False


def _share(read: int, made: int) -> bool:
    """Whether the file `made` now is a clone of `read`."""
    try:
        fcntl.ioctl(made, FICLONE, read)
    except OSError as error:
        if error.errno not in NO_CLONES:
            raise
        return False
    return True
