#!/usr/bin/env python3
"""How far models with other caches are from a reference with an f32 cache, over a text, on the CPU.

    python tools/measure_kld.py TEXT REFERENCE_DIR CANDIDATE_DIR[,KEY=VALUE]… …

Feeds windows of 1,024 tokens in chunks of 64 and prints, for each candidate, the mean Kullback-Leibler divergence of
its next-token distribution from the reference's, in nats, and how often both have the same most likely token. The
properties are the plugin's, such as KV_CACHE_PRECISION=u8. Needs openvino-tokenizers (the `eval` extra).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_tokenizers  # noqa: F401  (registers the tokenizer's operations)

from ovtq.errors import InputError, OvtqError
from ovtq.io import model_xml
from ovtq.runner import EXACT_PROPERTIES, Runner

WINDOW, CHUNK, WINDOWS = 1024, 64, 5


def log_probabilities(candidate: str, windows: np.ndarray, chunk: int = CHUNK) -> np.ndarray:
    """(tokens, vocabulary), f32, of `DIR[,KEY=VALUE]…` over windows (count, tokens)."""
    folder, *settings = candidate.split(",")
    if any("=" not in setting for setting in settings):
        raise InputError(f"{candidate}: write DIR,KEY=VALUE,…")
    properties = EXACT_PROPERTIES | dict(setting.split("=", 1) for setting in settings)
    if any(name.endswith("_CACHE_PRECISION") and name != "KV_CACHE_PRECISION" for name in properties):
        del properties["KV_CACHE_PRECISION"]  # it would override the separate ones of keys and values
    runner, rows = Runner(model_xml(Path(folder)), "CPU", properties), []
    for window in windows:
        runner.reset()
        rows += [np.array(runner.step(window[None, i : i + chunk])[0]) for i in range(0, len(window), chunk)]
    logits = np.concatenate(rows)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def main() -> int:
    if len(sys.argv) < 4:
        print(__doc__, file=sys.stderr)
        return 2
    text, reference, *candidates = sys.argv[1:]
    try:
        tokenizer = ov.Core().compile_model(model_xml(Path(reference)).with_name("openvino_tokenizer.xml"), "CPU")
        ids = tokenizer([Path(text).read_text(encoding="utf-8")])["input_ids"][0]
        count = min(WINDOWS, len(ids) // WINDOW)
        if not count:
            raise InputError(f"{text}: {len(ids)} tokens, at least {WINDOW} are needed")
        windows = ids[: count * WINDOW].reshape(count, WINDOW)
        expected = log_probabilities(reference, windows)
        print(f"{count * WINDOW} tokens; mean KLD in nats, same top token")
        for name in (reference, *candidates):
            chunk = CHUNK // 2 if name == reference else CHUNK  # the reference in other chunks: the noise floor
            got = log_probabilities(name, windows, chunk)
            kld = float((np.exp(expected, dtype=np.float64) * (expected - got)).sum(-1).mean())
            same = float((expected.argmax(-1) == got.argmax(-1)).mean())
            print(f"{kld:11.2e} {same:8.2%}  {name}{' (in other chunks)' if name == reference else ''}", flush=True)
    except (OvtqError, OSError, RuntimeError) as error:
        print(f"measure_kld: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
