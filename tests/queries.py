"""Statistics of a tiny model's queries, made once a session."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
from conftest import TINY

from ovtq.evidence.calibrate import calibrate
from ovtq.forms.triattention import NAME, Statistics, load


def ids(windows: int = 3, window: int = 400) -> np.ndarray:
    """Random tokens, (windows, window)."""
    return np.random.RandomState(7).randint(0, 256, (windows, window)).astype(np.int64)


@functools.cache
def folder(version: str = "5.5") -> Path:
    """Where the statistics of a tiny model lie, under the name that is looked for."""
    made = tempfile.TemporaryDirectory(prefix="ovtq-statistics-")
    _KEPT.append(made)
    calibrate(TINY[version], ids()).save(Path(made.name) / NAME)
    return Path(made.name)


def of(version: str = "5.5") -> Statistics:
    return load(folder(version) / NAME)


_KEPT: list[tempfile.TemporaryDirectory] = []  # removed when the session ends
