"""The long life of a request, or of an LLMPipeline: many texts, original and converted model side by side.

usage: soak.py requests|pipeline TOKENS SEED

Prints what was found in a line. Exit code 1: they differ.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny-transformers-5.5"
MINI = ROOT / "models" / "gpt-oss-mini"
ALLOWED = 1e-4  # of the scale of the logits, at f32
LONGEST = 4000  # tokens behind which a text ends
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def soak(tokens: int, seed: int = 0) -> tuple[str, list[str]]:
    """What was found, in a line, and the faults: texts of random lengths, by calls of random lengths, with beams."""
    from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

    draw, read, texts, worst = np.random.default_rng(seed), 0, 0, 0.0
    with tempfile.TemporaryDirectory(prefix="ovtq-soak-") as base:
        out = _converted(TINY, Path(base))
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


def pipeline(tokens: int, seed: int = 0) -> tuple[str, list[str]]:
    """The same of openvino_genai: pieces of a text, some in a chat, go on greedily; both must write the same."""
    import openvino_genai as genai

    warnings.simplefilter("ignore", DeprecationWarning)  # of start_chat, which hosts still call
    draw, read, texts, other = np.random.default_rng(seed), 0, 0, 0
    story = (ROOT / "tests" / "data" / "heldout.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="ovtq-soak-") as base:
        folders = (MINI, _converted(MINI, Path(base)))
        pipes = [genai.LLMPipeline(folder, "CPU", ATTENTION_BACKEND="SDPA", **EXACT) for folder in folders]
        while read < tokens:
            start = int(draw.integers(0, len(story) - 9000))
            prompt = story[start : start + min(int(draw.choice((1, 30, 300, 3000, 9000))), 4 * tokens)]
            new, chat = int(draw.choice((1, 8, 40))), draw.random() < 0.3
            config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, apply_chat_template=False)
            said = []
            for pipe in pipes:
                if chat:
                    pipe.start_chat()
                    pipe.generate(prompt[:500], config)
                said.append(pipe.generate([prompt], config))
                if chat:
                    pipe.finish_chat()
            read += said[0].perf_metrics.get_num_input_tokens() + said[0].perf_metrics.get_num_generated_tokens()
            texts += 1
            other += said[0].texts != said[1].texts
    told = f"soak: LLMPipeline, {read:,} tokens in {texts} texts, {other} of them written otherwise"
    return told, [told] if other else []


def _converted(model: Path, base: Path) -> Path:
    from ovtq.cli.convert import main

    options = [str(model), str(base / "out"), "--preset", "exact", "--target", "cpu", "--no-verify"]
    with contextlib.redirect_stdout(io.StringIO()):
        if main(options):
            raise SystemExit("soak: the conversion failed")
    return base / "out"


if __name__ == "__main__":
    line, faults = {"requests": soak, "pipeline": pipeline}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
    print(line)
    sys.exit(bool(faults))
