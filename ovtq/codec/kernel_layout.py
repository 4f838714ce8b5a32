"""What the OpenCL kernels of `ovtq/codec/opencl` and the graph that calls them share: sizes, offsets, the files.

A kernel is called through an operation of OpenVINO's own, which a CONFIG_FILE binds to it (`CARRIERS`): so a model
needs that property and nothing else. What these operations compute where they are not bound, a graph must never show:
that is what the guard is for, an operation that the GPU plugin does not know, with a name that says what is missing.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np

from ovtq import files
from ovtq.codec import FLOOR, STEPS

FOLDER = "ovtq_kernels"  # beside the IR
CONFIG = "kernels.xml"  # in it: what the property CONFIG_FILE names
CONSTANTS = "constants.cl"

LANES, WORK_GROUP = 16, 128
GROUPS = 128  # work-groups of a decode step, about: what fills the largest GPUs twice
WIDTH = 32  # elements of a row of the state, as OpenVINO sees it
READ_ROWS = 64  # that a work-group reads of the past
PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (4, 4)}  # bits of a code, the high ones first
HEAD_DIMS = (64, 128)
MOST_HEADS = 16  # query heads that share a KV head: each takes registers

# An operation's type: the kernel, how many inputs there are, how many work-groups' items for B of its output's rows.
CARRIERS = {
    "PSROIPooling": ("attend", 2, "B/{share}*128"),
    "ROIPooling": ("join", 2, "B*16"),
    "DeformablePSROIPooling": ("append", 2, "(B-1)/{fives}*{heads}*16"),
    "ROIAlign": ("read", 3, "B*128"),
    "Inverse": ("guard", 1, "1"),
}
LOCAL = {"join": LANES, "guard": 1}


@dataclass(frozen=True)
class KernelLayout:
    """Sizes of a layer's state and of what its kernels hand on; all layers have the same.

    `bits` are those of keys and of values, `capacity` how many tokens a state has room for.
    """

    kv_heads: int
    group: int
    head_dim: int
    bits: tuple[int, int]
    window: int
    capacity: int

    @property
    def query_heads(self) -> int:
        """Of a layer."""
        return self.kv_heads * self.group

    @property
    def row(self) -> int:
        """Elements of two bytes that a token of a KV head takes: its codes, and two scales."""
        return self.head_dim * sum(self.bits) // 16 + 2

    @property
    def parts(self) -> int:
        """Work-groups that share the history of a KV head, and one for the rest."""
        return min(max(GROUPS // self.kv_heads, 2), 32)

    @property
    def record(self) -> int:
        """Floats that one of them gives of a query head: its context, the largest score, the sum of weights."""
        return self.head_dim + 2

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where in a state what begins, in elements."""
        matrices = self.kv_heads * self.head_dim**2
        lengths = {
            "SCALE": 2,
            "SINKS": 2 * self.query_heads,
            **dict.fromkeys(("KEY_CENTRES", "VALUE_CENTRES"), self.kv_heads * self.head_dim),
            **dict.fromkeys(("QUERY_BASES", "KEY_BASES", "VALUE_BASES", "KEY_RETURNS", "VALUE_RETURNS"), matrices),
        }
        found, at = {}, 0
        for name, length in lengths.items():
            found[name] = at
            at += -(-length // WIDTH) * WIDTH
        found["ROWS"] = at
        found["RING"] = at + self.kv_heads * self.capacity * self.row
        return found

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a state, without the batch."""
        ring = self.kv_heads * (self.window + 1) * (2 * self.head_dim + 2)
        return 1, -(-(self.offsets["RING"] + ring) // WIDTH), WIDTH

    @cached_property
    def share(self) -> int:
        """Fives of numbers that `attend` is given for each of its work-groups, so that rows of head_dim remain."""
        needed = (self.query_heads + 2 * self.kv_heads + 1) * self.head_dim
        groups = self.kv_heads * self.parts
        count = -(-needed // (5 * groups))
        while 5 * groups * count % self.head_dim:
            count += 1
        return count

    @property
    def step_rows(self) -> int:
        """Rows of head_dim numbers that `attend` is given."""
        return 5 * self.kv_heads * self.parts * self.share // self.head_dim

    @property
    def side(self) -> int:
        """So that side² numbers for each five that `attend` is given hold all records, of floats, in f16, too."""
        numbers = self.query_heads * self.parts * self.record * 2
        return math.isqrt(-(-numbers // (self.kv_heads * self.parts * self.share)) - 1) + 1

    @property
    def fives(self) -> int:
        """Fives of numbers that `append` is given of a token: key, value, whether it is shown, and padding."""
        return -(-(2 * self.kv_heads * self.head_dim + 1) // 5)

    def constants(self) -> str:
        """The kernels' constants, those of the codec from where it is defined."""
        numbers: dict[str, int | str] = {
            "REAL": "INPUT0_TYPE",
            "HEAD_DIM": self.head_dim,
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "QUERY_HEADS": self.query_heads,
            "WINDOW": self.window,
            "CAPACITY": self.capacity,
            "ROW": self.row,
            "PARTS": self.parts,
            "RECORD": self.record,
            "READ_ROWS": READ_ROWS,
            "TOKEN_FIVES": self.fives,
            "FLOOR": f"{FLOOR!r}f",
            **self.offsets,
        }
        for name, bits in zip(("KEY", "VALUE"), self.bits, strict=True):
            peak, spread = STEPS[bits]
            numbers |= {f"{name}_FIRST": PLANES[bits][0], f"{name}_SECOND": PLANES[bits][1]}
            numbers |= {f"{name}_MIDDLE": f"{(2**bits - 1) / 2!r}f", f"{name}_PEAK": f"{peak!r}f"}
            numbers[f"{name}_SPREAD"] = f"{spread!r}f"
        lines = "".join(f"#define {name} {value}\n" for name, value in numbers.items())
        return f"// Made by ovtq for the model beside this folder.\n{lines}"

    def config(self) -> str:
        """The XML that binds operations to kernels."""
        values = {"share": self.share, "fives": self.fives, "heads": self.kv_heads}
        return "".join(
            _binding(kind, kernel, inputs, items.format(**values)) for kind, (kernel, inputs, items) in CARRIERS.items()
        )

    @cached_property
    def texts(self) -> dict[str, str]:
        """What each file holds, by name."""
        found = {CONFIG: self.config(), CONSTANTS: self.constants()}
        for source in resources.files("ovtq.codec").joinpath("opencl").iterdir():
            if source.name.endswith(".cl"):
                found[source.name] = source.read_text(encoding="utf-8")
        return found

    @property
    def digest(self) -> str:
        """The first 16 hex digits of a SHA-256 of all files.

        In the record that an IR has of itself, it keeps a model cache from handing out a model with other kernels: of
        the files that CONFIG_FILE names, OpenVINO's key knows nothing.
        """
        text = "".join(f"{name}\n{text}" for name, text in sorted(self.texts.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Write the files into the folder of a model."""
        target = folder / FOLDER
        target.mkdir()
        for name, text in self.texts.items():
            files.write(target / name, text)


def _binding(kind: str, kernel: str, inputs: int, items: str) -> str:
    sources = [f"{kernel}.cl"] if kernel == "guard" else [CONSTANTS, "common.cl", f"{kernel}.cl"]
    tensors = [("input", number, number) for number in range(inputs)] + [("output", inputs, 0)]
    local = LOCAL.get(kernel, WORK_GROUP)
    lines = [
        f'<CustomLayer name="{kind}" type="SimpleGPU" version="1">',
        f' <Kernel entry="ovtq_{kernel}">',
        *(f'  <Source filename="{name}"/>' for name in sources),
        " </Kernel>",
        " <Buffers>",
        *(f'  <Tensor arg-index="{a}" type="{what}" port-index="{b}" format="ANY"/>' for what, a, b in tensors),
        " </Buffers>",
        f' <WorkSizes global="{items},1,1" local="{local},1,1"/>',
        "</CustomLayer>",
    ]
    return "".join(f"{line}\n" for line in lines)


def in_two(values: np.ndarray) -> np.ndarray:
    """(…) → (…, 2) f32 whose sum is nearly exact where each is kept in f16."""
    high = values.astype(np.float16).astype(np.float32)
    return np.stack([high, (values - high).astype(np.float32)], -1)
