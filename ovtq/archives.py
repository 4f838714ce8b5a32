"""NumPy archives (.npz): no pickles, nothing larger than the file says it is, whole or not at all."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from ovtq import files
from ovtq.errors import InputError, OvtqError

T = TypeVar("T")
Arrays = dict[str, np.ndarray]


def read(path: Path, what: str, missing: str, made: Callable[[Arrays], T]) -> T:
    """What `made` makes of the arrays of an archive, by name.

    Raises InputError if there is none (`missing`: what to do about it), or if it is not
    `what` it should be: if it can't be read, or `made` can't make anything of it.
    """
    with files.opened(path, missing) as file:
        try:
            _check_sizes(file)
            with np.load(file, allow_pickle=False) as whole:
                return made({name: whole[name] for name in whole.files})
        except OvtqError:
            raise
        except Exception:  # numpy and zipfile raise of everything, for a file that says of itself what to read
            raise InputError(f"{path}: no {what}") from None


def write(path: Path, arrays: dict[str, Any]) -> None:
    """Write an archive; equal arrays make equal files. Raises InputError if it can't be written."""
    with files.replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def _check_sizes(file: BinaryIO) -> None:
    """Raise ValueError if what is in an archive is not of the size that it says: before room is made for it."""
    most = max(files.MOST, os.fstat(file.fileno()).st_size)
    with zipfile.ZipFile(file) as whole:
        members = whole.infolist()
        if sum(member.file_size for member in members) > most or any(m.flag_bits & 1 for m in members):
            raise ValueError("too large, or encrypted")
        for member in members:
            with whole.open(member) as one:
                version = np.lib.format.read_magic(one)
                form = np.lib.format
                read_header = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
                shape, _, kind = read_header(one)
                if math.prod(shape) * kind.itemsize > member.file_size:
                    raise ValueError("cut off")
    file.seek(0)
