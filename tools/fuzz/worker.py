"""Runs cases one after the other, each in a line of JSON from stdin to stdout; it may die of any."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import openvino as ov

from ovtq.cli import convert, inspect, report

COMMANDS = {"convert": convert.main, "inspect": inspect.main, "report": report.main}
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
ALLOWED = 1e-3  # of the spread of a position's logits


def main() -> None:
    """Until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for line in sys.stdin:
        case = json.loads(line)
        os.chdir(case["folder"])
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                code: int | str = COMMANDS[case["command"]](case["arguments"])
            except SystemExit as end:  # --help, --version
                code = int(end.code or 0)
            except BaseException as error:  # what a command must never let out
                code = f"{type(error).__name__}: {error}"
        apart = None
        if case["verified"] and code == 0 and Path("out").is_dir():
            apart = difference(Path("model"), Path("out"))
        answers.write(json.dumps({"code": code, "stderr": errors.getvalue(), "apart": apart}) + "\n")
        answers.flush()


def difference(original: Path, converted: Path) -> float:
    """How far apart two models' logits are, in shares of their spread: computed here alone, by nothing of ovtq's."""
    said = [_logits(folder / "openvino_model.xml") for folder in (original, converted)]
    some = np.sort(said[0], -1)
    spread = np.median(some[..., -(some.shape[-1] // 8) - 1] - some[..., some.shape[-1] // 8])
    with np.errstate(invalid="ignore"):
        apart = np.where(said[0] == said[1], 0, np.abs(said[0] - said[1]))
    apart[np.isnan(said[0]) & np.isnan(said[1])] = 0
    return float(np.nan_to_num(apart.max() / max(spread, 1e-30), nan=1e30, posinf=1e30))


def _logits(xml: Path) -> np.ndarray:
    """Of 40 random tokens, then of five more, one by one."""
    request = ov.Core().compile_model(xml, "CPU", EXACT).create_infer_request()
    names = {name for port in request.model_inputs for name in port.names}
    draw, found, past = np.random.default_rng(7), [], 0
    for count in (40, 1, 1, 1, 1, 1):
        given = {
            "input_ids": draw.integers(0, 256, (1, count)),
            "attention_mask": np.ones((1, past + count), np.int64),
            "position_ids": np.arange(past, past + count)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer({name: value for name, value in given.items() if name in names})
        found.append(np.array(request.get_output_tensor(0).data, np.float64))
        past += count
    return np.concatenate(found, 1)


if __name__ == "__main__":
    main()
