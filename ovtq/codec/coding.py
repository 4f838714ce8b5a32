"""How keys and values are packed: what the passes that do so share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ovtq.codec import STEPS, AdaptiveUniform
from ovtq.codec.packing import Layout, layout, packed_bytes
from ovtq.codec.rotation import digest, orthogonal

BITS = ("none", *map(str, STEPS))  # what the options k-bits and v-bits may be
# A scale may be kept as the whole number n = ⌊UNIT·√scale + ½⌋: for scales from 1e-4 to 255 every n is finite in f16,
# too, and the scale is off by at most 1/n, 2% to 0.002%; at 3e-3, that of a short value in 8 bits, 0.4%.
UNIT = 4096


@dataclass(frozen=True, eq=False)
class Codecs:
    """Codecs of keys and values; None: kept as they are."""

    key: AdaptiveUniform | None
    value: AdaptiveUniform | None

    @cached_property
    def layouts(self) -> tuple[Layout | None, Layout | None]:
        """Of keys and values."""
        key, value = (None if x is None else layout(x.bits, x.head_dim) for x in (self.key, self.value))
        return key, value

    @property
    def pairs(self) -> list[tuple[AdaptiveUniform, Layout]]:
        """Codec and layout of keys and of values. Raises ValueError if either are kept as they are."""
        if self.key is None or self.value is None:
            raise ValueError("keys and values are both to be packed")
        return [(x, layout(x.bits, x.head_dim)) for x in (self.key, self.value)]

    @property
    def digests(self) -> dict[str, Any]:
        """What tells these codecs from all others, for the record of a conversion."""
        codecs = {"key": self.key, "value": self.value}
        return {"quantizer_sha256": {what: codec.digest for what, codec in codecs.items() if codec}}


@dataclass(frozen=True, eq=False)
class Coding(Codecs):
    """The same with the rotation before both, (head_dim, head_dim)."""

    rotation: np.ndarray

    @property
    def digests(self) -> dict[str, Any]:
        """What tells this coding from all others."""
        return {**super().digests, "rotation_sha256": digest(self.rotation)}


def codecs(bits: Sequence[str], head_dim: int) -> tuple[AdaptiveUniform | None, AdaptiveUniform | None]:
    """Those of keys and values in `bits`, each one of BITS."""
    key, value = (None if text == "none" else AdaptiveUniform(int(text), head_dim) for text in bits)
    return key, value


def coding(bits: Sequence[str], head_dim: int, seed: int) -> Coding:
    """The coding of keys and values in `bits`, each one of BITS, with an orthogonal matrix of that seed."""
    return Coding(*codecs(bits, head_dim), orthogonal(head_dim, seed))


def whole_scale(scale: np.ndarray, stored: np.ndarray | None = None) -> np.ndarray:
    """What a scale is once it was kept as a whole number; where rounding decides, as `stored` (such scales) has it."""
    root = UNIT * np.sqrt(scale.astype(np.float64))
    number = np.floor(root + 0.5)
    if stored is not None:
        other = np.round(UNIT * np.sqrt(stored.astype(np.float64)))
        number = np.where(np.abs(other - root) <= 0.5 + 1e-3, other, number)
    return ((number / UNIT) ** 2).astype(np.float32)


def unfit(bits: Sequence[str], head_dim: int) -> str | None:
    """Why vectors of `head_dim` can't be packed in `bits`; None if they can."""
    for text in sorted({*bits} - {"none"}):
        try:
            packed_bytes(int(text), head_dim)
        except ValueError as error:
            return f"can't be packed: {error}"
    return None
