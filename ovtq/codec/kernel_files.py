"""OpenCL kernels as files beside an IR, and the XML that binds operations to them.

A kernel is called through an operation of OpenVINO's own, which a CONFIG_FILE binds to it: so a model needs that
property and nothing else. What these operations compute where they are not bound, a graph must never show: that is what
the guard is for, an operation that the GPU plugin does not know, with a name that says what is missing.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np

from ovtq import files

FOLDER = "ovtq_kernels"  # beside the IR
CONFIG = "kernels.xml"  # in it: what the property CONFIG_FILE names

LANES, WORK_GROUP = 16, 128
WIDTH = 32  # elements of a row of a state, as OpenVINO sees it
HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class Binding:
    """An operation's type and its kernel, which is `ovtq_` and the name of the last of its sources.

    `items`: how many work-items there are, by lengths of the output's axes B, F, Y, X.
    """

    kind: str
    sources: tuple[str, ...]
    inputs: int
    items: str
    local: int = WORK_GROUP

    def xml(self, kind: str = "") -> str:
        """As CONFIG_FILE has it, for its own type or another one."""
        tensors = [("input", number, number) for number in range(self.inputs)] + [("output", self.inputs, 0)]
        lines = [
            f'<CustomLayer name="{kind or self.kind}" type="SimpleGPU" version="1">',
            f' <Kernel entry="ovtq_{self.sources[-1]}">',
            *(f'  <Source filename="{name}.cl"/>' for name in self.sources),
            " </Kernel>",
            " <Buffers>",
            *(f'  <Tensor arg-index="{a}" type="{what}" port-index="{b}" format="ANY"/>' for what, a, b in tensors),
            " </Buffers>",
            f' <WorkSizes global="{self.items},1,1" local="{self.local},1,1"/>',
            "</CustomLayer>",
        ]
        return "".join(f"{line}\n" for line in lines)


GUARD = Binding("Inverse", ("guard",), 1, "1", 1)


class KernelSet(ABC):
    """The kernels of some layers: their constants, in a file of that name, and what they are bound to."""

    @property
    @abstractmethod
    def constants(self) -> tuple[str, Mapping[str, int | str]]:
        """The file's name without its ending, and each constant's value."""

    @property
    @abstractmethod
    def bindings(self) -> tuple[Binding, ...]:
        """Of all kernels but the guard."""

    @cached_property
    def texts(self) -> dict[str, str]:
        """What each file holds that the bindings name, by name."""
        name, values = self.constants
        lines = "".join(f"#define {key} {value}\n" for key, value in values.items())
        found = {f"{name}.cl": f"// Made by ovtq for the model beside this folder.\n{lines}"}
        folder = resources.files("ovtq.codec").joinpath("opencl")
        for source in dict.fromkeys(source for item in (*self.bindings, GUARD) for source in item.sources):
            if source != name:
                found[f"{source}.cl"] = folder.joinpath(f"{source}.cl").read_text(encoding="utf-8")
        return found

    @property
    def digest(self) -> str:
        """The first 16 hex digits of a SHA-256 of its files and bindings.

        In the record that an IR has of itself, it keeps a model cache from handing out a model with other kernels: of
        the files that CONFIG_FILE names, OpenVINO's key knows nothing.
        """
        text = "".join(f"{name}\n{text}" for name, text in sorted({**self.texts, CONFIG: config([self])}.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def config(sets: Sequence[KernelSet], types: Mapping[str, str] | None = None) -> str:
    """The XML that binds operations to the kernels of some sets; `types` are of operations in the place of others."""
    bindings = [*(item for some in sets for item in some.bindings), GUARD]
    return "".join(item.xml((types or {}).get(item.kind, "")) for item in bindings)


def write(sets: Sequence[KernelSet], folder: Path, types: Mapping[str, str] | None = None) -> None:
    """Write the files into the folder of a model, for operations as in `config`."""
    target = folder / FOLDER
    target.mkdir()
    texts = {name: text for some in sets for name, text in some.texts.items()}
    for name, text in {**texts, CONFIG: config(sets, types)}.items():
        files.write(target / name, text)


def placed(lengths: Mapping[str, int]) -> dict[str, int]:
    """Where in a state what begins, in elements, and at last, END, where all of it ends: each begins with a row."""
    found, at = {}, 0
    for name, length in lengths.items():
        found[name] = at
        at += -(-length // WIDTH) * WIDTH
    return {**found, "END": at}


def in_two(values: np.ndarray) -> np.ndarray:
    """(…) → (…, 2) f32 whose sum is nearly exact where each is kept in f16."""
    high = values.astype(np.float16).astype(np.float32)
    return np.stack([high, (values - high).astype(np.float32)], -1)
