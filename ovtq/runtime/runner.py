"""A compiled model, fed call by call with plain OpenVINO: what verification and benchmarks run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openvino as ov

from ovtq.errors import InputError
from ovtq.ir.cache import precisions
from ovtq.ir.io import REFUSALS, last_line, refuse_mismatch, states_of
from ovtq.ir.operations import core

# f32 everywhere, so that what remains is rounding: no f16 inference, no compressed cache, no quantised activations.
EXACT_PROPERTIES = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}

DYNAMIC = "DYNAMIC_QUANTIZATION_GROUP_SIZE"  # of activations, where weights are compressed


def check_device(device: str) -> None:
    """Raise InputError if this machine has no such device; `GPU` stands for `GPU.0`, `GPU.1`, …"""
    present = ov.Core().available_devices
    if device not in present and device not in {name.split(".")[0] for name in present}:
        raise InputError(f"device {device} is not there; available: {', '.join(present) or 'none'}")


def computes_in(compiled: ov.CompiledModel) -> str:
    """The precision that a model was compiled for, and whether activations meet compressed weights as integers."""
    known = set(compiled.get_property("SUPPORTED_PROPERTIES"))
    found = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    group = compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") if DYNAMIC in known else 0
    return found + (f", dynamic quantisation in groups of {group}" if 0 < int(group) < 2**31 else "")


class Runner:
    """A compiled model fed call by call, the attention mask always as long as the logical past.

    Raises InputError if the device is not there or does not compile the model, or if a converted model's record is
    not that of its IR.
    """

    def __init__(self, model: Path | ov.Model, device: str, properties: Mapping[str, str] | None = None) -> None:
        check_device(device)
        if isinstance(model, Path):
            refuse_mismatch(model)
        try:
            self.request = core().compile_model(model, device, dict(properties or {})).create_infer_request()
        except REFUSALS as error:
            name = model.get_friendly_name() if isinstance(model, ov.Model) else model
            raise InputError(f"{name}: {device} does not compile it ({last_line(error)})") from None
        self.model, self.device = model, device
        self.names = {name for port in self.request.model_inputs for name in port.names}
        self.mask: np.ndarray | None = None
        self.more: dict[str, np.ndarray] = {}  # inputs that only this model has

    @property
    def vocabulary(self) -> int:
        """Length of the logits' last axis."""
        return int(self.request.model_outputs[0].partial_shape[2].get_length())

    @property
    def attention_mask(self) -> np.ndarray:
        """That of the last call, (batch, past and new tokens). Raises RuntimeError if none was made since a reset."""
        if self.mask is None:
            raise RuntimeError("no call was made yet")
        return self.mask

    def precisions(self) -> tuple[str, str]:
        """What the device computes in, and what it keeps the caches of attention in that it knows."""
        compiled = self.request.get_compiled_model()
        return computes_in(compiled), compiled.get_property("KV_CACHE_PRECISION").to_string()

    def caches(self) -> list[str]:
        """The precision of each K and V cache that the device keeps."""
        return precisions(self.request.get_compiled_model())

    def reset(self) -> None:
        """Forget everything."""
        self.request.reset_state()
        self.mask = None

    def close(self) -> None:
        """Free what the model took; nothing can be run any more.

        A CPU model that just goes leaves the tensors between its nodes behind, 90 MB of four layers of GPT-OSS-20B.
        """
        compiled = self.request.get_compiled_model()
        del self.request
        if self.device == "CPU":
            compiled.release_memory()

    def step(self, ids: np.ndarray, shown: np.ndarray | None = None, beams: np.ndarray | None = None) -> np.ndarray:
        """Logits (batch, tokens, vocabulary) of `ids` (batch, tokens); `shown` is 0 where `ids` is padding.

        `beams[i]` is the sequence whose past sequence i continues.
        """
        batch = ids.shape[0]
        beams = np.arange(batch, dtype=np.int32) if beams is None else np.asarray(beams, dtype=np.int32)
        shown = np.ones(ids.shape, np.int64) if shown is None else shown
        self.mask = shown if self.mask is None else np.concatenate([self.mask[beams], shown], axis=1)
        positions = np.maximum(np.cumsum(self.mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
        inputs = {
            "input_ids": ids,
            "attention_mask": self.mask,
            "position_ids": positions,
            "beam_idx": beams,
            **self.more,
        }
        try:
            inputs = {name: value for name, value in inputs.items() if name in self.names}
            self.request.infer(inputs, share_outputs=True)  # not copied: there may be more than logits
        except RuntimeError as error:
            raise InputError(f"a step of {ids.shape[1]} tokens failed ({last_line(error)})") from None
        return np.array(self.request.get_output_tensor(0).data)

    def fill(self, tokens: int, seed: int = 0) -> None:
        """Make the states look as after `tokens` tokens, batch 1, without running any: for timing, the text is noise.

        A state whose sequence axis is dynamic, (1, heads, rows, d), gets as many rows as it then has, one of fixed
        length keeps it. Floats are 0.3·N(0, 1), scales uniform in 0.01…0.1, or whole numbers for such; other integers
        are random bytes. Raises InputError if a state has another dynamic axis, or if the device does not take
        states (the CPU's TURBO cache does not, its 4-bit cache breaks).
        """
        if tokens < 1:
            raise InputError(f"fill: {tokens} tokens; at least 1 is needed")
        if "u4" in self._cache_precisions():
            raise InputError(
                "fill: the CPU plugin corrupts its memory when the state of a 4-bit cache is set; prefill it"
            )
        model = self.model if isinstance(self.model, ov.Model) else core().read_model(self.model)
        specs = {state.name: state for state in states_of(model)}
        draw = np.random.default_rng(seed)
        self.reset()
        for state in sorted(self.request.query_state(), key=lambda state: state.name):  # the plugin's order varies
            spec = specs[state.name]
            kind, usual = spec.element_type.to_dtype(), {0: 1, 2: spec.rows(tokens)}
            sizes = [usual.get(axis, -1) if length < 0 else length for axis, length in enumerate(spec.shape)]
            if -1 in sizes or kind not in (np.float32, np.float16, np.int8, np.uint8, np.int32):
                raise InputError(f"fill: state {state.name} is {spec.shape} {kind}; only axes 0 and 2 may be dynamic")
            value: np.ndarray
            if kind in (np.int8, np.uint8):
                value = np.frombuffer(draw.bytes(int(np.prod(sizes))), kind).reshape(sizes)
            elif spec.holds == "past":
                value = np.full(sizes, tokens, kind)
            elif kind == np.int32:
                value = draw.integers(400, 1300, sizes, kind)
            elif spec.holds == "scale":
                value = draw.uniform(0.01, 0.1, sizes).astype(kind)
            else:
                value = (draw.standard_normal(sizes, np.float32) * np.float32(0.3)).astype(kind)
            try:
                state.state = ov.Tensor(value)
            except RuntimeError as error:
                raise InputError(f"fill: state {state.name} can't be set ({last_line(error)})") from None
        self.mask = np.ones((1, tokens), np.int64)

    def _cache_precisions(self) -> set[str]:
        """Those of keys and of values that the CPU plugin was asked for; none on other devices."""
        compiled = self.request.get_compiled_model()
        names = {"KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION"} & set(compiled.get_property("SUPPORTED_PROPERTIES"))
        return {compiled.get_property(name).to_string() for name in names}

    def state_bytes(self) -> int:
        """Bytes of all states as the device gives them out (the CPU plugin converts compressed ones to f32 for it)."""
        return sum(state.state.byte_size for state in self.request.query_state())
