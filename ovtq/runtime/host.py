"""The KV cache compressed by the host: read the states, change them in numpy, write them back.

That is how model cards of GPT-OSS for OpenVINO shrink a cache. Nothing is saved, for what is written back has the width
of what was read, and it is slow; it is here to be measured against.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np
import openvino as ov

from ovtq.codec import TurboQuantMSE
from ovtq.errors import InputError
from ovtq.runtime.runner import Runner


@dataclass(frozen=True)
class Quantize:
    """Every token but the last `residual` is put through TurboQuant's quantiser and back, once in `every` steps."""

    k_bits: int
    v_bits: int
    residual: int = 64
    every: int = 4

    def apply(self, states: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The states (batch, kv_heads, tokens, head_dim) as they are to be written back."""
        return {name: self._restored(name, state) for name, state in states.items()}

    def _restored(self, name: str, state: np.ndarray) -> np.ndarray:
        old = state.shape[2] - self.residual
        if old <= 0:
            return state
        codec = _codec(self.k_bits if name.endswith(".key") else self.v_bits, state.shape[-1])
        state = state.copy()
        state[:, :, :old] = codec.dequantize(*codec.quantize(state[:, :, :old]))
        return state


@dataclass(frozen=True)
class ZeroLowNorms:
    """Beyond `budget` tokens, keys and values of the tokens whose keys are shortest are set to zero, at every step.

    The length of a key is the mean over its KV heads; the last `recent` tokens are kept. A zeroed key still takes part
    in the softmax, with logit 0.
    """

    budget: int
    recent: int = 32
    every: int = 1

    def apply(self, states: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The states (batch, kv_heads, tokens, head_dim) as they are to be written back."""
        changed = {}
        for name in (name for name in states if name.endswith(".key")):
            keys = states[name]
            old = keys.shape[2] - self.recent
            drop = old - (self.budget - self.recent)
            if drop <= 0:
                continue
            norms = np.linalg.norm(keys[0, :, :old], axis=-1).mean(0)
            gone = np.argpartition(norms, drop - 1)[:drop]
            for which in (name, name.replace("keypresent", "valuepresent").removesuffix("key") + "value"):
                changed[which] = states[which].copy()
                changed[which][:, :, gone] = 0
        return changed


@functools.cache
def _codec(bits: int, head_dim: int) -> TurboQuantMSE:
    return TurboQuantMSE(dim=head_dim, bits=bits)


def method(text: str) -> Quantize | ZeroLowNorms:
    """`k6v4` and the like, or `prune128` and the like. Raises InputError for anything else."""
    if found := re.fullmatch(r"k([1-8])v([1-8])", text):
        return Quantize(int(found[1]), int(found[2]))
    if (found := re.fullmatch(r"prune(\d+)", text)) and int(found[1]) > ZeroLowNorms.recent:
        return ZeroLowNorms(int(found[1]))
    raise InputError(
        f"host:{text}: there are host:k6v4 (bits 1 to 8) and host:prune128 (a budget over {ZeroLowNorms.recent})"
    )


class HostRunner(Runner):
    """A Runner whose states go through a host's method, `change`, after each call."""

    change: Quantize | ZeroLowNorms
    calls = 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.calls = 0

    def step(self, ids: np.ndarray, shown: np.ndarray | None = None, beams: np.ndarray | None = None) -> np.ndarray:
        """As of a Runner; the logits are those from before the states are changed."""
        logits = super().step(ids, shown, beams).copy()
        self.calls += 1
        if self.calls % self.change.every == 0:
            found = {state.name: state for state in self.request.query_state()}
            read = {name: np.array(state.state.data) for name, state in found.items()}
            for name, value in self.change.apply(read).items():
                found[name].state = ov.Tensor(value)
        return logits
