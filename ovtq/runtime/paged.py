"""A stateful model under paged attention, in plain OpenVINO on the CPU: GenAI's default, without GenAI."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import openvino as ov
from openvino._offline_transformations import paged_attention_transformation

from ovtq.errors import InputError
from ovtq.ir.io import last_line, load

BLOCK = 32  # tokens, on the CPU


class PagedRunner:
    """A stateful model turned to paged attention on the CPU, fed one sequence call by call.

    Raises InputError if the model can't be transformed or compiled, or if the plugin's caches are not understood.
    """

    def __init__(self, folder: Path, properties: dict[str, str], capacity: int) -> None:
        """Room for `capacity` tokens."""
        model = load(folder)
        try:
            paged_attention_transformation(model)
            self.request = ov.Core().compile_model(model, "CPU", properties).create_infer_request()
        except RuntimeError as error:
            raise InputError(f"{folder}: no paged attention ({last_line(error)})") from None
        attention = next(node for node in model.get_ordered_ops() if node.get_type_name().startswith("PagedAttention"))
        self.blocks, self.past = math.ceil(capacity / BLOCK), 0
        self.caches: dict[str, tuple[str, float]] = {}  # by name: form, bytes per token
        self.names = {port.any_name for port in self.request.model_inputs}
        for port in self.request.model_inputs:
            name, kind = port.any_name, port.element_type
            if name.startswith(("key_cache.", "value_cache.")):
                heads, rows, width = (axis.get_length() for axis in list(port.partial_shape)[1:])
                size = attention.input_value(1 if name[0] == "k" else 2).get_partial_shape()[1].get_length() // heads
                self.caches[name] = (_form(kind, rows, width, size), heads * rows * width * kind.bitwidth / 8 / BLOCK)
                self.request.set_tensor(name, ov.Tensor(kind, [self.blocks, heads, rows, width]))

    @property
    def vocabulary(self) -> int:
        """Length of the logits' last axis."""
        return int(self.request.model_outputs[0].partial_shape[2].get_length())

    @property
    def form(self) -> str:
        """The caches and their bytes per token of one layer. Raises InputError if the layers differ."""
        found = []
        for kind in ("key", "value"):
            forms = {form for name, form in self.caches.items() if name.startswith(kind)}
            if len(forms) != 1:
                raise InputError(f"the layers' {kind} caches differ: {sorted(forms)}")
            found.append(forms.pop())
        (key, key_bytes), (value, value_bytes) = found
        return f"[K {key}, V {value}: {key_bytes + value_bytes:g} bytes]"

    def reset(self) -> None:
        """Forget everything."""
        self.past = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits (1, tokens, vocabulary) of `ids` (1, tokens)."""
        tokens = ids.shape[1]
        total = self.past + tokens
        used = math.ceil(total / BLOCK)
        inputs = {
            "input_ids": ids[0],
            "position_ids": np.arange(self.past, total, dtype=np.int64),
            "max_context_len": np.array(total, np.int32),
            "past_lens": np.array([self.past], np.int32),
            "subsequence_begins": np.array([0, tokens], np.int32),
            "block_indices": np.arange(used, dtype=np.int32),
            "block_indices_begins": np.array([0, used], np.int32),
        }
        if unknown := self.names - set(inputs) - set(self.caches):
            raise InputError(f"inputs that can't be filled: {', '.join(sorted(unknown))}")
        for name, value in inputs.items():
            self.request.set_tensor(name, ov.Tensor(value.copy()))
        try:
            self.request.infer()
        except RuntimeError as error:
            raise InputError(f"a step of {tokens} tokens failed under paged attention ({last_line(error)})") from None
        self.past = total
        return self.request.get_output_tensor(0).data.reshape(1, tokens, -1).copy()


def _form(kind: ov.Type, rows: int, width: int, head_size: int) -> str:
    """What a block (heads, rows, width) of a cache holds: scales and zeros lie in rows or columns of their own."""
    name = kind.get_type_name()
    if (rows, width) == (BLOCK, head_size):
        return name
    if width == head_size and rows > BLOCK:
        return f"{name} by channel"
    if rows == BLOCK and width > head_size:
        groups = (width - head_size) * kind.bitwidth // 64  # a scale and a zero of 32 bits each
        return f"{name} by token" + (f" in groups of {head_size // groups}" if groups > 1 else "")
    raise InputError(f"a cache of blocks {rows} × {width} for heads of {head_size} is not understood")
