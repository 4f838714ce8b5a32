"""The preset that is taken where none is named: one table, by target and model, of what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import openvino as ov

AUTO = "auto"
MARK_SINCE = (2026, 3)  # the first OpenVINO whose GPU plugin knows the mark of u8 and u4 on chips with XMX (P25)


@dataclass(frozen=True)
class Choice:
    """A preset for a target, the reason in one line, and what it holds for.

    `model_type` is config.json's (None: any), `since` the first version of OpenVINO.
    """

    target: str
    preset: str
    reason: str
    model_type: str | None = None
    since: tuple[int, int] = (0, 0)


# The first that fits. Figures: docs/presets.md, docs/evidence.md, docs/benchmarks.
CHOICES = (
    Choice(
        "gpu",
        "u8",
        "the plugin's own 8-bit cache, read in place by its fused kernels: of all presets but u4 it moves the fewest "
        "bytes, and it loses the least; nothing lost: exact",
        since=MARK_SINCE,
    ),
    Choice(
        "gpu",
        "k6v4",
        f"this OpenVINO is older than {MARK_SINCE[0]}.{MARK_SINCE[1]}, whose GPU plugin knows the mark of u8; packed "
        "codes are small with every version",
    ),
    Choice(
        "cpu",
        "k6v4",
        "8,192 tokens are read in 0.42 of the time (exact: 0.72), states take a tenth of the bytes; a decode step "
        "at 200 tokens takes 1.09; fastest decoding: exact",
        model_type="gpt_oss",
    ),
    Choice("cpu", "exact", "lossless; packed caches were measured on a CPU with GPT-OSS alone"),
)
PACKED = Choice("", "k6v4", "the options given are those of a packed or pruned cache")


def choose(target: str, config: Mapping[str, Any], packed: bool = False, version: str | None = None) -> Choice:
    """What to take for a target, gpu or cpu, and a model's config.json; `packed`: its options were asked for.

    `version` is OpenVINO's (None: the one that is there).
    """
    if packed:
        return PACKED
    known = version_of(version)
    fits = (
        choice
        for choice in CHOICES
        if choice.target == target and choice.model_type in (None, config.get("model_type")) and choice.since <= known
    )
    return next(fits)


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
