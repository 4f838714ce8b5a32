"""One request's long life: many texts in calls of any length, with beams, original and converted side by side."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny-transformers-5.5"
ALLOWED = 1e-4  # of the scale of the logits, at f32
LONGEST = 4000  # tokens behind which a text ends


def soak(tokens: int, seed: int = 0) -> tuple[str, list[str]]:
    """What was found, in a line, and the faults: texts of random lengths, by calls of random lengths."""
    from ovtq.cli.convert import main
    from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

    draw, read, texts, worst = np.random.default_rng(seed), 0, 0, 0.0
    with tempfile.TemporaryDirectory(prefix="ovtq-soak-") as base:
        out = Path(base) / "out"
        if main([str(TINY), str(out), "--preset", "exact", "--target", "cpu", "--no-verify"]):
            return "soak: the conversion failed", ["soak: the conversion failed"]
        runners = [Runner(folder / "openvino_model.xml", "CPU", EXACT_PROPERTIES) for folder in (TINY, out)]
        while read < tokens:
            for runner in runners:
                runner.reset()
            batch, length, past = int(draw.choice((1, 1, 2, 3))), int(draw.integers(1, min(LONGEST, tokens) + 1)), 0
            texts += 1
            while past < length:
                count = int(draw.choice((1, 1, 2, 17, 130, 700)))
                ids, beams = draw.integers(0, 256, (batch, count)), draw.integers(0, batch, batch)
                first, second = (runner.step(ids, beams=beams) for runner in runners)
                worst = max(worst, float(np.abs(first - second).max() / np.abs(first).max()))
                past += count
                read += batch * count
    said = f"soak: {read:,} tokens in {texts} texts, logits at most {worst:.2g} of their scale apart"
    return said, [said] if not worst <= ALLOWED else []
