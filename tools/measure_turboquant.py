#!/usr/bin/env python3
"""The cache of the package turboquant (0.2.0, Apache-2.0, for transformers) beside the presets here, in one table.

usage: measure_turboquant.py [MODEL_DIR] [--text FILE] [--windows 4] [--window 1024] [--runs 9] [--json FILE]

Its `TurboQuantLayer` keeps the last 128 tokens as they are and the others as codes, and hands out all of them decoded.
Here it stands between the states of the model as exported and their next call: what it hands out is written back, so
that the model attends to what it would be given in transformers. The divergence is that of `ovtq eval`, all arithmetic
at f32; bytes are those that the layers say they hold after the last window; the time is that of its `update` of all
layers with one token, in torch on a CPU, beside a decode step of the model itself with its own cache at no property, in
turn, medians. Needs `pip install turboquant==0.2.0` and torch.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import made
import numpy as np
import openvino as ov
import torch

from ovtq.evidence.divergence import Reference, Text, cut
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.runtime.text import Tokenizer

if not hasattr(np, "trapz"):  # gone from numpy 2.4; the package calls it
    np.trapz = np.trapezoid  # type: ignore[attr-defined]

from turboquant.cache import TurboQuantLayer

ROOT = Path(__file__).resolve().parent.parent
BITS = (8, 6, 4, 3)
CHUNK = 64  # tokens per call: what is read in a call is at full precision until the next


class Beside(Runner):
    """A Runner whose states go through the package's layers after each call."""

    bits = 4

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.layers: dict[str, Any] = {}

    def step(self, ids: np.ndarray, shown: np.ndarray | None = None, beams: np.ndarray | None = None) -> np.ndarray:
        """As of a Runner; the logits are those from before the states are changed."""
        logits = super().step(ids, shown, beams).copy()
        states = {state.name: state for state in self.request.query_state()}
        for name in [name for name in states if name.endswith(".key")]:
            value = name.replace("keypresent", "valuepresent").removesuffix("key") + "value"
            layer = self.layers.setdefault(name, TurboQuantLayer(bits=self.bits))
            new = [torch.tensor(np.array(states[one].state.data[:, :, -ids.shape[1] :])) for one in (name, value)]
            for one, restored in zip((name, value), layer.update(*new), strict=True):
                states[one].state = ov.Tensor(restored.contiguous().numpy())
        return logits

    @property
    def held(self) -> int:
        """Bytes of all layers."""
        return sum(layer.memory_usage_bytes()["total_bytes"] for layer in self.layers.values())


def main() -> None:
    """Measure, and print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model_dir", type=Path, nargs="?", default=ROOT / "models" / "gpt-oss-mini")
    p.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "heldout.txt")
    p.add_argument("--windows", type=int, default=4)
    p.add_argument("--window", type=int, default=1024)
    p.add_argument("--runs", type=int, default=9)
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    options = p.parse_args()
    xml, tokenizer = options.model_dir / "openvino_model.xml", Tokenizer(options.model_dir)
    text = cut(tokenizer.encode(options.text.read_text("utf-8")), tokenizer, options.windows, options.window, "text")
    reference = Reference(Runner(xml, "CPU", EXACT_PROPERTIES), text, CHUNK, lambda: None)
    print("| bits | mean KLD | 99.9% | same top | bytes per token, beyond the last 128 |")
    print("| --- | ---: | ---: | ---: | ---: |")
    rows, times = [], []
    for bits in BITS:
        runner = Beside(xml, "CPU", EXACT_PROPERTIES)
        runner.bits = bits
        found = reference.compare(runner, CHUNK, lambda: None, f"turboquant, {bits} bits")
        each = (runner.held - held_by(runner, 128)) / (text.ids.shape[1] - 128)
        rows.append({"bits": bits, "bytes_per_token": each, **found})
        print(f"| {bits} | {found['mean_kld']:.2g} | {found['kld_p999']:.2g} | {found['same_top']:.2%} | {each:,.0f} |")
    for tokens in (256, 2048):
        update, step = timed(xml, text, tokens, options.runs)
        times.append({"tokens": tokens, "update_s": update, "step_s": step})
        print(f"\n{tokens:,} tokens: update {update * 1e3:.2f} ms, a step {step * 1e3:.2f} ms: {1 + update / step:.2f}")
    made.write(options.json, rows=rows, times=times)


def held_by(runner: Beside, tokens: int) -> int:
    """Bytes of as many tokens that are kept as they are."""
    return sum(
        2 * tokens * layer._residual_keys.shape[1] * layer._residual_keys.shape[3] * 4
        for layer in runner.layers.values()
    )


def timed(xml: Path, text: Text, tokens: int, runs: int) -> tuple[float, float]:
    """Seconds of one token behind as many: of the package's layers, and of a step of the model as hosts load it."""
    runner, one = Runner(xml, "CPU"), text.ids[:1, :1]
    runner.reset()
    for _ in range(tokens // 256):
        runner.step(text.ids[:1, :256])
    random = np.random.default_rng(0)
    shapes = [state.state.shape for state in runner.request.query_state() if state.name.endswith(".key")]
    layers = [TurboQuantLayer(bits=4) for _ in shapes]
    rows = [[torch.tensor(random.standard_normal((1, s[1], tokens, s[3]), np.float32)) for _ in "kv"] for s in shapes]
    for layer, (k, v) in zip(layers, rows, strict=True):
        layer.update(k, v)
    updates, steps = [], []
    for _ in range(runs):
        for seconds, call in (
            (updates, lambda: [x.update(k[:, :, :1], v[:, :, :1]) for x, (k, v) in zip(layers, rows, strict=True)]),
            (steps, lambda: runner.step(one)),
        ):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return median(updates), median(steps)


if __name__ == "__main__":
    main()
