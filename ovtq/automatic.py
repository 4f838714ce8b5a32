"""The preset that is taken where none is named: what `ovtq.advice` says, as far as options and versions allow it."""

from __future__ import annotations

import re

import openvino as ov

from ovtq.advice import Advice, advise
from ovtq.models import ModelDescription

AUTO = "auto"
MARK_SINCE = (2026, 3)  # the first OpenVINO whose GPU plugin knows the mark of u8 and u4 on chips with XMX (P25)
MARKED = ("u8", "u4")
PACKED = Advice("k6v4", "the options given are those of a packed or pruned cache")
UNMARKED = Advice(
    "k6v4",
    f"this OpenVINO is older than {MARK_SINCE[0]}.{MARK_SINCE[1]}, the first whose GPU plugin knows the mark of u8; "
    "packed codes are small with every version",
)


def choose(description: ModelDescription, target: str, packs: bool = False, version: str | None = None) -> Advice:
    """What to take for a model on a target, gpu or cpu; `packs`: options of a packed cache were asked for.

    `version` is OpenVINO's (None: the one that is there).
    """
    if packs:
        return PACKED
    found = advise(description, target)
    return UNMARKED if target == "gpu" and found.preset in MARKED and version_of(version) < MARK_SINCE else found


def caution(target: str, precision: str | None, version: str | None = None) -> str | None:
    """What to do where this OpenVINO ignores that a model asks for its cache's precision; None where it does not."""
    if target != "gpu" or precision is None or version_of(version) >= MARK_SINCE:
        return None
    major, minor = MARK_SINCE
    return (
        f"OpenVINO before {major}.{minor}, as here, ignores the file's mark on GPUs with XMX and keeps the cache in "
        f"f16: pass KV_CACHE_PRECISION={precision} when loading, or take the preset k6v4"
    )


def version_of(text: str | None = None) -> tuple[int, int]:
    """Year and number of OpenVINO's version."""
    found = re.match(r"(\d+)\.(\d+)", text or ov.__version__)
    return (int(found[1]), int(found[2])) if found else MARK_SINCE
