"""What the OpenCL kernel of sliding layers and the graph that calls it share: sizes and offsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ovtq.codec.kernel_files import WIDTH, Binding, KernelSet, placed

HEADER = 6  # numbers before all others: what to do, past and new tokens, each as high and low, and one that is not read


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

    @property
    def step_rows(self) -> int:
        """Rows of head_dim pairs of numbers for a decode step, as many as there are query heads or more."""
        facts = -(-(HEADER + self.window) // self.head_dim)
        return max(self.query_heads, -(-(self.query_heads + 2 * self.kv_heads + facts) // 2))

    @property
    def facts(self) -> int:
        """Rows of head_dim numbers before a decode step's queries, key and value."""
        return 2 * self.step_rows - self.query_heads - 2 * self.kv_heads

    @property
    def write_rows(self) -> int:
        """Rows of head_dim pairs for the last tokens of a longer call: a row of numbers before them, and one behind."""
        return self.kv_heads * self.window + 1

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
            "HEADER": HEADER,
            "FACTS": self.facts,
            **self.offsets,
        }

    @property
    def bindings(self) -> tuple[Binding, ...]:
        """One kernel: a decode step has a work-group for each query head, a longer call one for each row it keeps."""
        return (Binding("GridSample", ("window_constants", "lanes", "window"), 2, "Y*128"),)
