"""Cases of a campaign: each number makes one, the same whenever it is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import mutate
import others
import places
from mutate import Case, Given

# How many of a hundred, or so, and what makes one.
KINDS: dict[str, tuple[int, Callable[[Given], Case]]] = {
    "xml": (14, mutate.xml),
    "xml bytes": (6, mutate.xml_bytes),
    "graph": (16, mutate.graph),
    "constants": (5, mutate.constants),
    "weights": (4, mutate.weights),
    "config": (8, mutate.config),
    "record": (6, mutate.record),
    "statistics": (2, mutate.statistics),
    "archives": (4, others.archives),
    "kernels": (2, others.kernels),
    "figures": (4, mutate.figures),
    "options": (8, places.options),
    "links": (5, places.links),
    "outputs": (4, places.outputs),
    "names": (5, places.names),
    "rights": (2, places.rights),
    "any options": (7, others.any_options),
    "any files": (4, others.any_files),
    "any places": (4, others.any_places),
    "begun": (2, others.begun),
    "demo": (1, others.demo),
    "library": (8, others.library),
}


def make(number: int, folder: Path, base: Path) -> Case:
    """The case of a number, its files in `folder`, which is empty; `base` holds what `campaign.prepared` made."""
    draw = random.Random(number)
    kind = draw.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    return KINDS[kind][1](Given(number, kind, draw, folder, base))
