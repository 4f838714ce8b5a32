"""One model on one device, in a process of its own, for ovtq-doctor (`python -m ovtq.evidence.trial FOLDER DEVICE`).

Every fact is a line of JSON on stdout as soon as it is known, so that a driver that brings the process down takes
nothing with it that was measured before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ovtq import archives
from ovtq.errors import InputError
from ovtq.ir import cache, io
from ovtq.runtime.runner import Runner
from ovtq.states import StateSpec, total

CHECKED = (200, 1, 1, 1, 1, 40)  # tokens of the calls whose logits are compared
BLOCK = 8  # decode steps whose mean is one figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trial; exit code 2 where the device does not compile or run the model, with the reason as a line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("folder", type=Path)
    p.add_argument("device")
    p.add_argument("--target", default="gpu")
    p.add_argument("--contexts", default="", help="tokens, comma-separated, rising")
    p.add_argument("--steps", type=int, default=16)
    p.add_argument("--chunk", type=int, default=1024)
    p.add_argument("--logits", type=Path, help="write those of the checked calls")
    p.add_argument("--property", action="append", default=[])
    options = p.parse_args(argv)
    try:
        trial(options)
    except (InputError, RuntimeError) as error:
        tell(failed=io.last_line(error))
        return 2
    return 0


def tell(**facts: Any) -> None:
    """One line on stdout."""
    print(json.dumps(facts), flush=True)


def trial(options: argparse.Namespace) -> None:
    """Compile, compare, measure. Raises InputError or RuntimeError."""
    properties = {"PERFORMANCE_HINT": "LATENCY", **dict(text.split("=", 1) for text in options.property)}
    model = io.load(options.folder)
    states, asked = io.states_of(model), cache.marked(model)
    del model
    start = time.perf_counter()
    runner = Runner(io.model_xml(options.folder), options.device, properties)
    precision, kept = runner.precisions()
    tell(compile_s=time.perf_counter() - start, precision=precision, kv_cache=kept)
    draw = np.random.default_rng(0)
    if options.logits:
        archives.write(options.logits, {"logits": np.concatenate([_last(runner, ids) for ids in _calls(draw, runner)])})
        tell(checked=len(CHECKED))
        runner.reset()
    for context in map(int, filter(None, options.contexts.split(","))):
        tell(**_measured(runner, context, options, draw, states, asked))


def _calls(draw: np.random.Generator, runner: Runner) -> list[np.ndarray]:
    return [draw.integers(0, runner.vocabulary, (1, count)) for count in CHECKED]


def _last(runner: Runner, ids: np.ndarray) -> np.ndarray:
    """Logits of a call's last 20 tokens, (tokens, vocabulary)."""
    return np.array(runner.step(ids)[0, -20:], np.float32)


def _measured(
    runner: Runner,
    context: int,
    options: argparse.Namespace,
    draw: np.random.Generator,
    states: Sequence[StateSpec],
    asked: str | None,
) -> dict[str, Any]:
    """From empty states: a prompt of `context` random tokens in calls of `chunk`, then decode steps."""
    runner.reset()
    ids = draw.integers(0, runner.vocabulary, (1, context))
    start = time.perf_counter()
    for begin in range(0, context, options.chunk):
        runner.step(ids[:, begin : begin + options.chunk])
    ttft, steps = time.perf_counter() - start, []
    for _ in range(options.steps + BLOCK):  # the first block compiles what is new
        start = time.perf_counter()
        runner.step(ids[:, :1])
        steps.append(time.perf_counter() - start)
    blocks = [float(np.mean(steps[at : at + BLOCK])) for at in range(BLOCK, len(steps), BLOCK)]
    return {
        "context": context,
        "ttft_s": ttft,
        "tpot_s": float(np.median(blocks)),
        "state_bytes": total(states, context, options.target, asked),
    }


if __name__ == "__main__":
    sys.exit(main())
