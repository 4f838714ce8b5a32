"""Copying a model's weights file while something else is done; what that reads of it comes first."""

from __future__ import annotations

import errno
import mmap
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Condition, Event, Thread

from ovtq import disk, system

ALIGNED = 4096  # what direct reads and writes start and end at
BLOCK = 1 << 22  # bytes copied at a time
WORKERS = 4  # blocks in flight


class Copy:
    """The bytes of `source` on their way into the file `target`, a new one, which has its length from the beginning.

    `how` is `reflink` where the file system shares blocks until they are written (btrfs, XFS: FICLONE): then all is
    there at once. Else it is `copy`, and what was not copied yet reads as zeros: `start`, then `wait`. Blocks that the
    page cache holds come from there; all are written past it, for it would have to find room for every page, and the
    others read so, too, but where that is refused. Where a file that is written can't be read (Windows), the system
    copies it in one go, and who waits for any place waits for all.
    """

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target, self.size = source, target, source.stat().st_size
        self._todo: deque[int] = deque()  # where blocks start, those in flight not among them
        self._left: set[int] = set()
        self._change = Condition()
        self._threads: list[Thread] = []
        self._error: Exception | None = None
        self._stop = Event()
        self._direct = bool(disk.DIRECT)
        with source.open("rb") as read, target.open("xb") as made:
            if disk.clone(read.fileno(), made.fileno()):
                self.how = "reflink"
                return
            self.how = "copy"
            made.truncate(self.size)
        self._todo.extend(range(0, self.size, BLOCK))
        self._left.update(self._todo)

    def start(self) -> None:
        """Begin to copy."""
        work = [self._blocks] * WORKERS if disk.SHARES_OPEN_FILES else [self._whole]
        self._threads = [Thread(target=self._told, args=(one,), daemon=True) for one in work if self._todo]
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
            while not self._change.wait_for(lambda: self._error or not wanted & self._left, system.TURN):
                pass
            if self._error:
                raise self._error

    def stop(self) -> None:
        """Copy nothing more; returns when no thread writes any longer."""
        with self._change:
            self._todo.clear()
            self._stop.set()
        for thread in self._threads:
            thread.join()

    def _told(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, whoever waits must be told
            with self._change:
                self._error = self._error or error
                self._change.notify_all()

    def _whole(self) -> None:
        disk.copy_whole(self.source, self.target, self._stop)
        with self._change:
            self._left.clear()
            self._change.notify_all()

    def _blocks(self) -> None:
        with disk.pages(BLOCK) as buffer:  # one for all blocks, or each would be zeroed
            while (block := self._next()) is not None:
                self._copy(buffer, block)
                with self._change:
                    self._left.discard(block)
                    self._change.notify_all()

    def _next(self) -> int | None:
        with self._change:
            return self._todo.popleft() if self._todo and not self._error else None

    def _copy(self, buffer: mmap.mmap, start: int) -> None:
        size, done = min(BLOCK, self.size - start), 0
        whole = size // ALIGNED * ALIGNED
        if self._direct and whole:
            try:
                self._move(buffer, start, whole, disk.DIRECT)
                done = whole
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False
        if done < size:
            self._move(buffer, start + done, size - done, 0)

    def _move(self, buffer: mmap.mmap, start: int, size: int, flag: int) -> None:
        with memoryview(buffer)[:size] as view:
            if not disk.read_cached(self.source, view, start):
                disk.read_at(self.source, view, start, flag)
            disk.write_at(self.target, view, start, flag)
