"""Runs cases one after the other, each in a line of JSON from stdin to stdout; it may die of any."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

import ovtq
from ovtq.errors import OvtqError

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
# Commands whose modules have another name
MODULES = {"eval": "ovtq.cli.evaluate", "demo": "ovtq.demo"}


def main() -> None:
    """Until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for line in sys.stdin:
        case = json.loads(line)
        os.chdir(case["folder"])
        name = case["command"]
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                work = library if name == "library" else _command(name)
                sys.argv = [f"ovtq-{name}", *case["arguments"]]
                code: int | str = work(case["arguments"])
            except SystemExit as end:  # --help, --version
                code = int(end.code or 0)
            except BaseException as error:  # what a command must never let out
                code = f"{type(error).__name__}: {error}"
        apart = None
        if case["verified"] and code == 0 and Path("out").is_dir():
            apart = difference(Path("model"), Path("out"))
        os.chdir("/")
        answers.write(json.dumps({"code": code, "stderr": errors.getvalue(), "apart": apart}) + "\n")
        answers.flush()


def _command(name: str) -> Callable[[list[str]], int]:
    """The `main` of a command."""
    found: Callable[[list[str]], int] = importlib.import_module(MODULES.get(name, f"ovtq.cli.{name}")).main
    return found


def library(arguments: list[str]) -> int:
    """A public function of ovtq, called with what JSON says: its error is told as the commands tell theirs."""
    name, text = arguments
    known: dict[str, Any] = json.loads(text)
    model, out, tokens, more = (known[key] for key in ("model", "out", "tokens", "more"))
    try:
        if name == "convert":
            ovtq.convert(model, out, **{"verify": False, **more})
        elif name == "compress":
            graph = ov.Core().read_model(Path(model) / "openvino_model.xml") if _is_model(model) else model
            ovtq.compress(graph, model, **more)
        elif name == "verify":
            ovtq.verify(model, out)
        elif name == "state_bytes":
            ovtq.state_bytes(model, tokens)
        elif name == "load_state":
            ovtq.load_state(_Running(), out, None, model)
        else:
            getattr(ovtq, name)(model)
    except OvtqError as error:
        print(f"ovtq-library: {error}", file=sys.stderr)
        return 2
    return 0


def _is_model(given: Any) -> bool:
    try:
        ov.Core().read_model(Path(given) / "openvino_model.xml")
    except (RuntimeError, TypeError, ValueError, OSError):
        return False
    return True


class _Running:
    """As a request without states."""

    def query_state(self) -> list[Any]:
        """None."""
        return []


def difference(original: Path, converted: Path) -> float:
    """How far apart two models' logits are, in shares of their spread: computed here alone, by nothing of ovtq's."""
    said = [_logits(folder / "openvino_model.xml") for folder in (original, converted)]
    some = np.sort(said[0][np.isfinite(said[0]).all(-1)], -1)  # what is no number must be none in both
    spread = np.median(some[:, -(some.shape[-1] // 8) - 1] - some[:, some.shape[-1] // 8]) if len(some) else 1.0
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
