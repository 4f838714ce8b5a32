"""What this process is at, told to the one that watches over it (`ovtq.child`), which says so if it dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

_tell: list[Callable[[tuple[str, Any]], None]] = []


def watched(tell: Callable[[tuple[str, Any]], None]) -> None:
    """From now on somebody watches, who is told by `tell`."""
    _tell[:] = [tell]


def at(what: str) -> None:
    """What is done now, as in "it died while …"."""
    for tell in _tell:
        tell(("at", what))


def makes(target: Path) -> None:
    """That names beside the folder `target` are taken, which would be left if this process died."""
    for tell in _tell:
        tell(("makes", target))
