"""What the OpenCL kernels of packed layers and the graph that calls them share: sizes and offsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ovtq.codec import FLOOR, STEPS
from ovtq.codec.kernel_files import WIDTH, WORK_GROUP, Binding, KernelSet, placed

GROUPS = 128  # work-groups of a decode step, about: what fills the largest GPUs twice
WORD = 8  # tokens that a number tells of, exact in f16: whether they are shown
PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (4, 4)}  # bits of a code, the high ones first
MOST_HEADS = 16  # query heads that share a KV head: each takes registers


@dataclass(frozen=True)
class KernelLayout(KernelSet):
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
    def codes(self) -> int:
        """Elements of two bytes that the codes of a token of a KV head take."""
        return self.head_dim * sum(self.bits) // 16

    @property
    def row(self) -> int:
        """Elements of two bytes that a token of a KV head takes: its codes, and two scales of 24 bits."""
        return self.codes + 3

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
        before = placed(
            {
                "SCALE": 2,
                "SINKS": 2 * self.query_heads,
                **dict.fromkeys(("KEY_CENTRES", "VALUE_CENTRES"), self.kv_heads * self.head_dim),
                **dict.fromkeys(("QUERY_BASES", "KEY_BASES", "VALUE_BASES", "KEY_RETURNS", "VALUE_RETURNS"), matrices),
            }
        )
        first, tokens = before.pop("END"), self.kv_heads * self.capacity
        after = placed(
            {
                "CODES": tokens * self.codes,
                "HIGH_SCALES": tokens * 2,
                "LOW_SCALES": tokens,
                "RING": self.kv_heads * (self.window + 1) * 4 * self.head_dim,
            }
        )
        return {**before, **{name: first + at for name, at in after.items()}}

    @property
    def given(self) -> int:
        """Elements of the constants, which a state holds from the first call of a text on."""
        return self.offsets["CODES"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a state, without the batch."""
        return 1, self.offsets["END"] // WIDTH, WIDTH

    @property
    def words(self) -> int:
        """Numbers that tell of WORD tokens each whether they are shown."""
        return -(-self.capacity // WORD)

    @property
    def columns(self) -> int:
        """Rows of head_dim numbers that tell of all tokens: how many are past, as high and low, and which are shown."""
        return -(-(2 + self.words) // self.head_dim)

    @property
    def step(self) -> int:
        """Numbers that `attend` is given beside the constants: queries, key and value, and the columns."""
        return (self.query_heads + 2 * self.kv_heads + self.columns) * self.head_dim

    @property
    def cells(self) -> int:
        """So that as many times such a step holds all records, of floats, in f16, too."""
        return -(-self.query_heads * self.parts * self.record * 2 // self.step)

    @property
    def given_cells(self) -> int:
        """Runs of so many cells that hold the constants."""
        return -(-self.given // self.cells)

    @property
    def given_fives(self) -> int:
        """Fives of numbers that hold them."""
        return -(-self.given // 5)

    @property
    def fives(self) -> int:
        """Fives of numbers that `append` is given of a token: key, value, and padding, a number at the least."""
        return -(-(2 * self.kv_heads * self.head_dim + 1) // 5)

    @property
    def constants(self) -> tuple[str, Mapping[str, int | str]]:
        """The kernels' constants, those of the codec from where it is defined."""
        numbers: dict[str, int | str] = {
            "REAL": "INPUT0_TYPE",
            "HEAD_DIM": self.head_dim,
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "QUERY_HEADS": self.query_heads,
            "WINDOW": self.window,
            "CAPACITY": self.capacity,
            "CODES_ROW": self.codes,
            "PARTS": self.parts,
            "RECORD": self.record,
            "GIVEN_FIVES": self.given_fives,
            "TOKEN_FIVES": self.fives,
            "FLOOR": f"{FLOOR!r}f",
            **self.offsets,
        }
        for name, bits in zip(("KEY", "VALUE"), self.bits, strict=True):
            peak, spread = STEPS[bits]
            numbers |= {f"{name}_FIRST": PLANES[bits][0], f"{name}_SECOND": PLANES[bits][1]}
            numbers |= {f"{name}_MIDDLE": f"{(2**bits - 1) / 2!r}f", f"{name}_PEAK": f"{peak!r}f"}
            numbers[f"{name}_SPREAD"] = f"{spread!r}f"
        return "constants", numbers

    @property
    def bindings(self) -> tuple[Binding, ...]:
        """Operations whose outputs can be as large as a kernel needs."""
        shared, token = ("constants", "lanes", "common"), f"(B-{1 + self.given_fives})/{self.fives}*{self.kv_heads}*16"
        attend = f"{self.kv_heads * self.parts * WORK_GROUP}"
        return (
            Binding("ExperimentalDetectronPriorGridGenerator", (*shared, "read", "xmx", "attend"), 3, attend),
            Binding("ROIPooling", (*shared, "join"), 2, "B*16", 16),
            Binding("PSROIPooling", (*shared, "append"), 2, token),
        )
