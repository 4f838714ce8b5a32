"""ovtq-infer: answer one prompt, written as it comes, and say what it took: tokens a second, bytes of all states.

It ends at every token that generation_config.json names as an end, as hosts do.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from ovtq.cli.command import (
    Out,
    Parser,
    made_for_another,
    path_of,
    phase,
    positive,
    progress,
    properties_of,
    run,
    turns,
)
from ovtq.errors import InputError
from ovtq.evidence.candidates import inspect_cache, open_candidate, parse
from ovtq.forms.pruning import counted, told
from ovtq.ir import io
from ovtq.runtime.runner import Runner, check_device
from ovtq.runtime.text import Tokenizer

CALL = 1024  # tokens of a long prompt that are read at once
FLOATS = {"cpu": "f32", "gpu": "f16"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    errors = Console(stderr=True, highlight=False)
    return run("ovtq-infer", lambda: infer(parser().parse_args(argv), Out(), Out(stderr=True)), errors, argv=argv)


def parser() -> Parser:
    """The command line."""
    p = Parser("ovtq-infer", __doc__)
    p.add_argument("model_dir", type=path_of, metavar="MODEL_DIR", help="a model folder, converted or not")
    p.add_argument("--prompt", required=True, metavar="TEXT", help="the text to answer; - reads it from stdin")
    p.add_argument(
        "--device", default="CPU", metavar="DEVICE", help="where to run the model, such as GPU (default: %(default)s)"
    )
    p.add_argument(
        "--max-new-tokens",
        type=positive,
        default=200,
        metavar="N",
        help="tokens of the answer, at most (default: %(default)s)",
    )
    p.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="of sampling; 0 takes the likeliest token (default: 0)",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)")
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated"
    )
    p.add_argument("--raw", action="store_true", help="continue the text as it is, without the model's chat template")
    p.add_argument(
        "--property",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a property of the plugin, such as CACHE_DIR=compiled; may be repeated",
    )
    return p


def infer(options: argparse.Namespace, console: Out, errors: Out) -> None:
    """Do what the command line asks: the text on stdout, figures on stderr."""
    check_device(options.device)
    properties = properties_of(options.property)
    if not all(options.stop):
        raise InputError("--stop: empty")
    if not 0 <= options.temperature < float("inf"):
        raise InputError("--temperature: a number from 0")
    if options.seed < 0:
        raise InputError("--seed: at least 0")
    candidate = parse(str(options.model_dir), options.model_dir)
    tokenizer = Tokenizer(options.model_dir)
    prompt = _prompt(options.prompt)
    if not prompt.strip():
        raise InputError("--prompt: empty")
    ids = tokenizer.encode(prompt) if options.raw else tokenizer.chat(prompt)
    subject = open_candidate(candidate, options.device, properties)
    if not isinstance(subject, Runner):
        raise InputError(f"{options.model_dir}: ovtq-infer runs a plain model folder")
    cache, ends = inspect_cache(candidate, subject, options.device), tokenizer.ends()
    draw, times = np.random.default_rng(options.seed), [time.perf_counter()]
    written: list[int] = []
    step, shown, text = _read(subject, ids, errors), "", ""
    while len(written) < options.max_new_tokens:
        logits = subject.step(step)[0, -1]
        written.append(_chosen(logits, options.temperature, draw))
        times.append(time.perf_counter())
        if written[-1] in ends:
            break
        text = tokenizer.decode(written)
        found = [at for at in (text.find(stop) for stop in options.stop) if at >= 0]
        if found:
            text = text[: min(found)]
            break
        safe = _safe(text, options.stop)
        console.print(safe[len(shown) :], end="")
        console.file.flush()
        shown = max(shown, safe, key=len)
        step = np.array([written[-1:]], np.int64)
    console.print(text[len(shown) :])
    took = np.diff(times)
    tpot = f", TPOT {took[1:].mean() * 1e3:.1f} ms ({1 / took[1:].mean():.1f} tokens/s)" if len(took) > 1 else ""
    errors.print(f"\n{len(ids):,} + {len(written):,} tokens: TTFT {took[0] * 1e3:.0f} ms{tpot}")
    total, past = subject.attention_mask.shape[1], _state_bytes(subject)
    exact = f"{past:,} as the device gives them out" if past is not None else "not given out by the device"
    per = f"{cache.bytes(total):,} ({cache.per_token:,} per token, {cache.flat:,} flat)"
    errors.print(f"states after {total:,} tokens: {per} bytes in memory; {exact}\ncache: {cache.text}")
    errors.print(f"computed in {cache.computes}")
    if line := advice(options.model_dir, options.device, total):
        errors.print(line)
    if counts := counted(subject.request):
        errors.print(told(counts))


def _prompt(text: str) -> str:
    """The prompt as given or from stdin. Raises InputError if it is no UTF-8."""
    try:
        text = sys.stdin.read() if text == "-" else text
        text.encode("utf-8")
    except UnicodeError:
        raise InputError("--prompt: not UTF-8 text") from None
    return text


def _read(subject: Runner, ids: np.ndarray, errors: Out) -> np.ndarray:
    """Read a prompt (tokens,) but for its end, (1, rest), which is returned: a long one in calls of CALL tokens.

    These may take minutes, and are shown.
    """
    long = len(ids) > 2 * CALL
    starts = range(0, len(ids) - CALL, CALL) if long else ()
    with progress(errors) as bars, phase(bars, "prompt", len(starts)) as tick:
        for start in starts:
            subject.step(ids[None, start : start + CALL])
            tick()
    return ids[None, len(starts) * CALL :]


def advice(model_dir: Path, device: str, tokens: int) -> str:
    """Of a converted folder: whether it is for this device, and from how many tokens on its states are the smaller."""
    record = io.record_of(model_dir)
    if not record:
        return ""
    lines, target = [], "cpu" if device.startswith("CPU") else "gpu"
    if other := made_for_another(model_dir, device):
        lines.append(other)
    before, after = (record["state_bytes"][side] for side in ("before", "after"))
    turn = turns(before["per_token"], before["flat"], after["per_token"], after["flat"])
    if turn is None:
        lines.append(f"states are never smaller than the exported model's as declared ({FLOATS[target]})")
    elif turn > tokens:
        lines.append(
            f"states are smaller than the exported model's as declared ({FLOATS[target]}) from {turn:,} tokens on"
        )
    return "\n".join(lines)


def _safe(text: str, stops: Sequence[str]) -> str:
    """What of a text can be shown: no half character, which the next token makes whole, nor what may begin a stop."""
    if text.endswith("\ufffd"):
        text = text.rstrip("\ufffd")
    begun = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    return text[: len(text) - max(begun, default=0)]


def _chosen(logits: np.ndarray, temperature: float, draw: np.random.Generator) -> int:
    if not temperature:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # next to 0 the likeliest token is as good as sure
        weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return int(draw.choice(len(weights), p=weights / weights.sum()))


def _state_bytes(runner: Runner) -> int | None:
    try:
        return runner.state_bytes()
    except RuntimeError:
        return None
