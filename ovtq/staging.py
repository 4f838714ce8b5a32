"""A folder that takes its place whole or not at all, whatever interrupts, the power included.

The order of it, on which everything rests:

1. a lock file, then a folder beside OUT_DIR; both names are on the disk (fsync of the parent);
2. the folder is filled; each file in it, then each folder, is on the disk;
3. an old OUT_DIR is renamed (`.old`), the new folder takes its name, and both names are on the disk;
4. the old one is renamed again (`.gone`) and removed, the lock last.

Before 3 the old OUT_DIR is as it was. Between its two renames the lock tells the next run to put the old one back. A
file system that keeps the order of names in one folder (ext4, XFS, btrfs, NTFS) never has the new name without what was
written before it.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from ovtq import disk, signals, system, whereabouts
from ovtq.errors import InputError

RECORD = "ovtq.json"
LONGEST = 150  # characters of OUT_DIR's name that the names beside it begin with; file systems allow 255 bytes

Identity = tuple[int, int, int] | None


def identity(out_dir: Path) -> Identity:
    """What OUT_DIR is now, to be given to `staged`; None if there is nothing."""
    return disk.identity(system.long_path(system.resolved(out_dir)))


@contextlib.contextmanager
def staged(out_dir: Path, before: Identity | str = "now") -> Iterator[Path]:
    """A temporary folder beside `out_dir` that takes its place when the block ends well and vanishes otherwise.

    `before` is what `out_dir` was when it was found fit to be replaced. Whatever maps its files must be gone by the end
    of the block, or Windows can't rename it. Raises InputError if the system does not let it be written, or if another
    run or program has changed `out_dir` meanwhile.
    """
    target = system.long_path(system.resolved(out_dir))
    was = disk.identity(target) if isinstance(before, str) else before
    try:
        with signals.Held() as held:
            place = _Place(target)
            try:
                place.make()
                with held.let_through():
                    yield place.folder
                    gc.collect()
                    _flush(place.folder)
                place.swap(was)
                held.done()
            except BaseException as error:
                signals.forget(error)
                raise
            finally:
                place.leave()
    except OSError as error:
        raise InputError(f"{target.parent}: can't write there ({system.reason(error)})") from None


def tidy_up(out_dir: Path) -> None:
    """What killed runs left of `out_dir` is removed; an old result that they set aside is put back.

    Nothing is touched that a run at work has, or another user.
    """
    with contextlib.suppress(OSError, ValueError):  # no such path
        _tidy_up(system.long_path(system.resolved(out_dir)))


class _Place:
    """The names beside an OUT_DIR that one run takes: a folder to write in, an old result set aside, and their lock.

    The lock file is there before the others and goes after them, so that a later run can tell what a killed one left.
    It says how many folders around OUT_DIR were made for it.
    """

    def __init__(self, target: Path, lock: Path | None = None) -> None:
        """New names; or those that belong to a lock file that is there."""
        self.target = target
        stem = lock.name.removesuffix(".lock") if lock else f"{_prefix(target)}{secrets.token_hex(4)}"
        self.folder = target.with_name(stem)
        self.old, self.gone = target.with_name(f"{stem}.old"), target.with_name(f"{stem}.gone")
        self.made = 0  # folders around
        self._lock: system.Lock | None = None

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.folder.with_name(f"{self.folder.name}.lock")

    def take(self) -> None:
        """Take the lock. Raises BlockingIOError if another run has it."""
        self._lock = system.Lock(self.lock)

    def make(self) -> None:
        """Tidy up after other runs, and make the folder. Raises OSError."""
        for parent in reversed(self.target.parents):
            if self.made or not parent.exists():
                parent.mkdir(exist_ok=True)
                self.made += 1
        _tidy_up(self.target)
        whereabouts.makes(self.target)
        self.take()
        if self.made:
            with contextlib.suppress(OSError), disk.opened(self.lock, os.O_WRONLY) as file:
                os.write(file, str(self.made).encode())  # Windows lets nobody write what is locked
        self.folder.mkdir()
        disk.flush(self.target.parent)

    def swap(self, was: Identity) -> None:
        """Put the folder in the place of OUT_DIR, which is whole under another name until the new one is there.

        Raises InputError if OUT_DIR is not what it was.
        """
        changed = InputError(f"{self.target}: changed meanwhile, by another run or program; nothing was written")
        if disk.identity(self.target) != was:
            raise changed
        if was is not None:
            system.rename(self.target, self.old)
            if disk.identity(self.old) != was:  # in between
                raise changed
        system.rename(self.folder, self.target)
        disk.flush(self.target.parent)

    def leave(self) -> None:
        """Remove what is left under these names, the lock last; an old result goes back if nothing took its place."""
        if self._lock is not None:
            if self.old.exists():
                with contextlib.suppress(OSError):
                    # a name of its own, so that no half of it can be taken for the whole
                    system.rename(self.old, self.gone if self.target.exists() else self.target)
            left = [path for path in (self.folder, self.gone) if path.exists() and not system.remove(path)]
            self._lock.release(keep=bool(left) or self.old.exists())
            self._lock = None
        for parent in self.target.parents[: self.made]:
            with contextlib.suppress(OSError):  # what has something in it stays
                parent.rmdir()

    def drop(self) -> None:
        """Give up the lock, and leave everything as it is."""
        if self._lock is not None:
            self._lock.release(keep=True)
            self._lock = None

    def trusted(self) -> bool:
        """Whether it is this user's run that left all this, as runs leave it; never to be asked of one at work."""
        for path in (self.folder, self.old, self.gone):
            if os.path.lexists(path) and not disk.is_own(path, stat.S_ISDIR):
                return False
        if not self.old.exists() or not any(self.old.iterdir()):
            return True
        return disk.is_own(self.old / RECORD, stat.S_ISREG)  # nothing else is ever set aside

    def read_lock(self) -> None:
        """Take from the lock file how many folders were made."""
        with contextlib.suppress(OSError, ValueError):
            with disk.open_now(self.lock) as file:
                text = file.read(4).decode("ascii")
            self.made = min(int(text), len(self.target.parents) - 1) if text.isdecimal() else 0


def _tidy_up(target: Path) -> None:
    for path in target.parent.glob(f"{glob.escape(_prefix(target))}*.lock"):
        known = re.fullmatch(r"[0-9a-f]{8}\.lock", path.name.removeprefix(_prefix(target)))
        if known and disk.is_own(path, stat.S_ISREG):
            place = _Place(target, path)
            with contextlib.suppress(OSError):  # it is at work
                place.read_lock()
                place.take()
                if place.trusted():
                    place.leave()
                else:
                    place.drop()


def _prefix(target: Path) -> str:
    name = target.name
    if len(os.fsencode(name)) > LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}.ovtq-"


def _flush(folder: Path) -> None:
    """Return once all that is in a folder is on the disk: files first, then the names of them."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            disk.flush(Path(path, name))
        disk.flush(Path(path))
