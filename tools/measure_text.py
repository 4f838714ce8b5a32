"""Perplexity of held-out text as hosts load a model, by preset, target, precision and length of the calls.

usage: python tools/measure_text.py MODEL_DIR [--presets exact,k6v4,…] [--targets cpu,gpu] [--tokens 1024]
                                    [--calls 1024,256,65,64,7] [--hints none,bf16,f16,f32] [--batch] [--json FILE]

Every model runs on the CPU, in plain OpenVINO, with no property but the one that `--hints` names. `--batch` reads three
texts of 300, 230 and 120 tokens, padded on the left, in calls of 300 and 65 instead. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import made
import numpy as np
import openvino as ov
from scipy.special import logsumexp

from ovtq.cli.convert import main as convert
from ovtq.errors import InputError
from ovtq.pipeline import PRESETS
from ovtq.runtime.runner import Runner

ROOT = Path(__file__).resolve().parent.parent


def tokens(model_dir: Path, count: int) -> np.ndarray:
    """The first tokens of the held-out text, (1, count): by the model's tokenizer, or its bytes."""
    text = (ROOT / "tests" / "data" / "heldout.txt").read_text(encoding="utf-8")
    if (model_dir / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        return np.array(Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(text).ids[:count], np.int64)[None]
    return np.frombuffer(text.encode()[:count], np.uint8).astype(np.int64)[None]


def losses(runner: Runner, text: np.ndarray, shown: np.ndarray, count: int) -> np.ndarray:
    """−log p of every token but the first, (batch, tokens − 1), read in calls of `count`."""
    runner.reset()
    parts = [(text[:, a : a + count], shown[:, a : a + count]) for a in range(0, text.shape[1], count)]
    logits = np.concatenate([runner.step(*part) for part in parts], 1)[:, :-1]
    return logsumexp(logits, -1) - np.take_along_axis(logits, text[:, 1:, None], -1)[..., 0]


def perplexities(folder: Path, hint: str, text: np.ndarray, shown: np.ndarray, calls: list[int]) -> list[float]:
    """Of the tokens that are shown, by length of the calls; an empty list if the device does not take the hint."""
    properties = {} if hint == "none" else {"INFERENCE_PRECISION_HINT": hint}
    try:
        runner = Runner(folder / "openvino_model.xml", "CPU", properties)
    except InputError as error:
        print(f"{folder}: {hint}: {error}", file=sys.stderr)
        return []
    real = shown[:, :-1].astype(bool)
    found = [float(np.exp(losses(runner, text, shown, count)[real].mean())) for count in calls]
    runner.close()
    return found


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model_dir", type=Path)
    p.add_argument("--presets", default=",".join(PRESETS))
    p.add_argument("--targets", default="cpu,gpu")
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--calls", default="")
    p.add_argument("--hints", default="none,bf16,f16,f32")
    p.add_argument("--batch", action="store_true")
    p.add_argument("--json", type=Path)
    options = p.parse_args()
    calls = [int(x) for x in (options.calls or ("300,65" if options.batch else "1024,256,65,64,7")).split(",")]
    text = tokens(options.model_dir, 900 if options.batch else options.tokens)
    shown = np.ones_like(text)
    if options.batch:
        text = text.reshape(3, 300)
        shown = (np.arange(300) >= np.array([[0], [70], [180]])).astype(np.int64)
    names = ["as exported", *(f"{a} {b}" for a in options.presets.split(",") for b in options.targets.split(","))]
    rows = []
    own = ov.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    facts = {"own_precision": own, "calls": calls, "tokens": int(shown.sum())}
    print(json.dumps(made.made() | facts))
    print(f"| model, target | hint | {' | '.join(f'{count:,}' for count in calls)} |")
    print(f"| --- | --- | {' | '.join('---:' for _ in calls)} |")
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.model_dir
            if name != "as exported":
                preset, target = name.split()
                folder = Path(scratch) / "out"
                command = [str(options.model_dir), str(folder), "--preset", preset, "--target", target, "--no-verify"]
                with contextlib.redirect_stdout(io.StringIO()):
                    failed = convert(command)
                if failed:
                    return 2
            for hint in options.hints.split(","):
                found = perplexities(folder, hint, text, shown, calls)
                rows.append({"model": name, "hint": hint, "perplexity": found})
                print(f"| {name} | {hint} | {' | '.join(f'{x:.2f}' for x in found)} |", flush=True)
    made.write(options.json, **facts, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
