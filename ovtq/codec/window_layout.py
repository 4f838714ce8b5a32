"""What the OpenCL kernel of sliding layers and the graph that calls it share: sizes and offsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ovtq.codec.kernel_files import WIDTH, WORK_GROUP, Binding, KernelSet, placed


@dataclass(frozen=True)
class WindowLayout(KernelSet):
    """Sizes of a sliding layer's state and of what its kernel is given; all layers have the same.

    `window` is how many tokens a query sees, its own included.
    """

    kv_heads: int
    group: int
    head_dim: int
    window: int

    @property
    def query_heads(self) -> int:
        """Of a layer."""
        return self.kv_heads * self.group

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where in a state what begins, in elements."""
        return placed({"LAYER": 1, "SCALE": 2, "SINKS": 2 * self.query_heads, "RING": self.ring})

    @property
    def ring(self) -> int:
        """Elements of keys and values, (2·kv_heads, window, head_dim): token t lies in place t modulo window."""
        return 2 * self.kv_heads * self.window * self.head_dim

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a state, without the batch."""
        return 1, self.offsets["END"] // WIDTH, WIDTH

    @cached_property
    def side(self) -> int:
        """So that side² numbers for each of some equal parts of what it is given for a token are a context."""
        return next((side for side in (8, 4, 2) if self.head_dim % side**2 == 0 and 2 * side**2 % self.group == 0), 1)

    @property
    def padding(self) -> int:
        """Rows of head_dim numbers behind a token's queries, key and value without which no parts are equal."""
        return -2 * self.kv_heads % self.query_heads if self.side == 1 else 0

    @property
    def used(self) -> int:
        """Numbers of a token: queries, key and value."""
        return (self.query_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def numbers(self) -> int:
        """Numbers that the kernel is given for each row: those of a token, and padding."""
        return self.used + self.padding * self.head_dim

    @property
    def step(self) -> int:
        """Numbers of a part of what it is given to attend."""
        return self.numbers * self.side**2 // (self.query_heads * self.head_dim)

    @property
    def constants(self) -> tuple[str, Mapping[str, int | str]]:
        """The kernel's."""
        return "window_constants", {
            "REAL": "INPUT0_TYPE",
            "HEAD_DIM": self.head_dim,
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "QUERY_HEADS": self.query_heads,
            "WINDOW": self.window,
            **self.offsets,
        }

    @property
    def bindings(self) -> tuple[Binding, ...]:
        """One kernel: a work-group for each query head and token."""
        items = f"B*{self.side**2}/{self.head_dim}*{WORK_GROUP}"
        return (Binding("DeformablePSROIPooling", ("window_constants", "lanes", "window"), 3, items),)
