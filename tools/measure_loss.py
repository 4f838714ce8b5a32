#!/usr/bin/env python3
"""Measure the loss of OpenVINO language models on a text file.

    python tools/measure_loss.py TEXT MODEL_DIR [MODEL_DIR ...]

TEXT holds documents separated by `<|endoftext|>`; each is stripped and closed by that token. The token stream is cut
into windows, every window is run from an empty cache, and every token of it but the first is scored. All arithmetic
is f32 on the CPU, so what is left is the error of the weights and of the graph.

Each MODEL_DIR holds a stateful `openvino_model.xml` and its `tokenizer.json`. One line is printed per model: mean nats
per scored token, and bits per byte of the scored tokens' UTF-8 text (a separator counts as its 13 bytes).
Needs: openvino, tokenizers.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import made
import numpy as np
import openvino as ov
from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@dataclass(frozen=True)
class Loss:
    """Cross entropy summed over the scored tokens of a text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def encode(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids of the documents in `text`, int64 of shape (tokens,), each document closed by the separator."""
    end = tokenizer.token_to_id(SEPARATOR)
    if end is None:
        raise ValueError(f"the tokenizer has no {SEPARATOR} token")
    documents = [d.strip() for d in text.split(SEPARATOR)]
    return np.array([i for d in documents if d for i in (*tokenizer.encode(d).ids, end)], dtype=np.int64)


def window_nats(request: ov.InferRequest, ids: np.ndarray) -> np.ndarray:
    """Nats of each token of a window but the first: ids of shape (n,) -> float64 of shape (n - 1,)."""
    request.reset_state()
    n = len(ids)
    inputs = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, n), dtype=np.int64),
        "position_ids": np.arange(n, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
    names = {name for port in request.model_inputs for name in port.get_names()}
    logits = request.infer({k: v for k, v in inputs.items() if k in names})["logits"][0, :-1]
    largest = logits.max(-1)
    log_total = largest + np.log(np.exp(logits - largest[:, None]).sum(-1, dtype=np.float64))
    return log_total - logits[np.arange(n - 1), ids[1:]]


def measure(text: str, model_dir: Path, window: int) -> Loss:
    """Loss of the model in `model_dir` on `text`, in windows of `window` tokens (the last one may be shorter)."""
    for name in ("openvino_model.xml", "tokenizer.json"):
        if not (model_dir / name).is_file():
            raise FileNotFoundError(f"{model_dir} has no {name}")
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    ids = encode(text, tokenizer)
    request = ov.Core().compile_model(model_dir / "openvino_model.xml", "CPU", EXACT).create_infer_request()
    nats, tokens, size = 0.0, 0, 0
    for part in (ids[i : i + window] for i in range(0, len(ids) - 1, window)):
        nats += window_nats(request, part).sum()
        tokens += len(part) - 1
        size += len(tokenizer.decode(part[1:].tolist(), skip_special_tokens=False).encode())
    if not tokens:
        raise ValueError("the text is too short to score")
    return Loss(nats, tokens, size)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("models", type=Path, metavar="MODEL_DIR", nargs="+")
    parser.add_argument("--window", type=int, default=2048, help="tokens per window (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    args = parser.parse_args()
    if args.window < 2:
        parser.error("--window must be at least 2")
    try:
        text = args.text.read_text(encoding="utf-8")
        print(f"{'nats/token':>10} {'bits/byte':>10} {'tokens':>8}  model", flush=True)
        rows = []
        for model_dir in args.models:
            loss = measure(text, model_dir, args.window)
            each = {"nats_per_token": loss.nats_per_token, "bits_per_byte": loss.bits_per_byte, "tokens": loss.tokens}
            rows.append({"model": str(model_dir), **each})
            print(f"{loss.nats_per_token:10.4f} {loss.bits_per_byte:10.4f} {loss.tokens:8d}  {model_dir}", flush=True)
        made.write(args.json, rows=rows)
    except UnicodeDecodeError:
        print(f"{parser.prog}: {args.text} is not UTF-8 text", file=sys.stderr)
        return 2
    except (OSError, ValueError, RuntimeError) as error:  # OpenVINO raises RuntimeError
        print(f"{parser.prog}: {str(error).strip()}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
