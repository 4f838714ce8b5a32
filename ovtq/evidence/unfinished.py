"""What a long run has found so far, in a file beside its result, so that it goes on where it was ended."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from ovtq import archives
from ovtq.archives import Arrays
from ovtq.codec.moments import PART
from ovtq.errors import InputError

SECONDS = 20.0  # that may be lost
FORM = 1


class Unfinished:
    """Arrays of each stage of a run, written every SECONDS; without a path they are kept nowhere.

    `key` tells the run from all others. What a run of another key left is not taken, and is written over. Raises
    InputError if something else has the file's name.
    """

    def __init__(self, result: Path | None = None, key: str = "") -> None:
        self.path, self.key = (result.with_name(result.name + PART) if result else None), key
        self.stages: dict[str, Arrays] = {}
        self.last = time.monotonic()
        if self.path and self.path.exists():
            self.stages = archives.read(self.path, "unfinished statistics of ovtq-calibrate", "", self._mine)

    def _mine(self, file: Arrays) -> dict[str, Arrays]:
        if int(file["unfinished"]) != FORM:
            raise InputError(f"{self.path}: of another version of ovtq; delete it")
        stages: dict[str, Arrays] = {}
        if str(file["key"]) == self.key:
            for name in file:
                stage, dot, rest = name.partition(".")
                if dot:
                    stages.setdefault(stage, {})[rest] = file[name]
        return stages

    def taken(self, stage: str) -> Arrays | None:
        """What an earlier run, or this one, kept of a stage; None if nothing."""
        return self.stages.get(stage)

    def keep(self, stage: str, arrays: dict[str, Any], now: bool = False) -> None:
        """Have a stage's arrays, to be written in a while, or `now`; they may change once this returns."""
        if self.path is None or not (now or time.monotonic() - self.last >= SECONDS):
            return
        self.stages[stage] = {name: np.array(some) for name, some in arrays.items()}
        named = {
            f"{name}.{inner}": some for name, some_stage in self.stages.items() for inner, some in some_stage.items()
        }
        archives.write(self.path, {"unfinished": FORM, "key": self.key, **named})
        self.last = time.monotonic()

    def forget(self) -> None:
        """Once the result is there."""
        if self.path:
            self.path.unlink(missing_ok=True)
