"""Bits of each layer's keys and values: named one by one, or as few as a loss allows.

What codes of b bits lose in all, as the mean KLD of the logits, is of second order in their error, so a tensor's share
is its sensitivity times the distortion α(b) of the codes, and shares of several tensors add up, for their errors have
nothing to do with each other. α falls ever more slowly in bits, so to take bits where a byte gains most, one step after
the other, is best but for the last step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ovtq.codec.coding import unfit
from ovtq.codec.turboquant import STEPS, distortion

AUTO = "auto"
Bits = tuple[int, int]  # of a key's and of a value's coordinate


@dataclass(frozen=True)
class Allotment:
    """Bits of each layer by its index, and the mean KLD in nats that is predicted of the whole model."""

    bits: Mapping[int, Bits]
    predicted: float


def named(text: str) -> dict[int, Bits]:
    """Bits by layer from LAYER:K/V,… such as 0:6/4,3:4/3; none from `auto`. Raises ValueError for anything else."""
    found: dict[int, Bits] = {}
    for part in () if text == AUTO else filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+):(\d)/(\d)", part.strip())
        if not match or not {int(match[2]), int(match[3])} <= {*STEPS} or int(match[1]) in found:
            raise ValueError(
                f"bits: expected {AUTO}, or LAYER:K/V,… such as 0:6/4,3:4/3, each layer once, with bits of "
                f"{', '.join(map(str, STEPS))}, got {part!r}"
            )
        found[int(match[1])] = int(match[2]), int(match[3])
    return found


def told(bits: Mapping[int, Bits]) -> str:
    """The text that `named` reads."""
    return ",".join(f"{index}:{key}/{value}" for index, (key, value) in bits.items())


def allot(sensitivities: Mapping[int, tuple[float, float]], head_dim: int, budget: float) -> Allotment:
    """The fewest bits whose predicted mean KLD is at most `budget` nats.

    `sensitivities` are those of each layer's keys and values: nats to a unit of distortion. Raises ValueError, saying
    what the least is, if no bits do.
    """
    widths = [bits for bits in sorted(STEPS) if not unfit([str(bits)], head_dim)]
    losses = [distortion(bits, head_dim) for bits in widths]
    rows = [(index, which, some) for index, pair in sensitivities.items() for which, some in enumerate(pair)]
    taken = [0] * len(rows)

    def total() -> float:
        return sum(some * losses[at] for (*_, some), at in zip(rows, taken, strict=True))

    if (least := losses[-1] * sum(some for *_, some in rows)) > budget:
        raise ValueError(
            f"budget-kld {budget:.3g}: with {widths[-1]} bits everywhere a mean KLD of {least:.2g} is predicted; give "
            "at least that"
        )
    while total() > budget:
        gains = [
            some * (losses[at] - losses[at + 1]) / (widths[at + 1] - widths[at]) if at + 1 < len(widths) else -1.0
            for (*_, some), at in zip(rows, taken, strict=True)
        ]
        taken[gains.index(max(gains))] += 1
    for row, (*_, some) in enumerate(rows):  # the last step may have been a large one, which frees others
        while taken[row] and total() + some * (losses[taken[row] - 1] - losses[taken[row]]) <= budget:
            taken[row] -= 1
    bits = {row[:2]: widths[at] for row, at in zip(rows, taken, strict=True)}
    return Allotment({index: (bits[index, 0], bits[index, 1]) for index in sensitivities}, total())
