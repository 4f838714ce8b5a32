#!/usr/bin/env python3
"""How far models with other caches are from a reference with an f32 cache, over a text, on the CPU.

usage: measure_kld.py TEXT REFERENCE_DIR CANDIDATE_DIR[,KEY=VALUE]… … [--windows 5] [--window 1024] [--chunk 64]

Feeds windows of the text, each from an empty cache, in chunks, and prints for each candidate:
  * mean, median and 99.9% quantile of KLD = Σ p·(log p − log q) over its next-token distributions q, p being the
    reference's, in nats;
  * how often both have the same most likely token;
  * bits per byte of the text, as measure_loss.py counts it: every token of a window but the first is scored.
The reference's own row, in other chunks, is the noise floor. Everything is f32 but what KEY=VALUE, properties of the
CPU plugin, say otherwise: KV_CACHE_PRECISION=u8, or KEY_CACHE_… and VALUE_CACHE_…, which are the plugin's defaults (u8)
where only one of them is given. GPU_CACHE=u8 or u4 is the cache of a model with sink rows as the GPU plugin would keep
it, by that plugin's arithmetic (gpu_cache.py). Needs tokenizers (the `eval` extra) and REFERENCE_DIR/tokenizer.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from measure_loss import encode
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer

from ovtq.errors import InputError, OvtqError
from ovtq.gpu_cache import as_gpu_stores
from ovtq.io import check_json, last_line, load, model_xml
from ovtq.runner import EXACT_PROPERTIES, Runner

SAME = 10  # a mean KLD of so many noise floors is still none


class Feedable(Protocol):
    """What a text can be fed to, call by call: a Runner, or whatever does the same."""

    def reset(self) -> None: ...

    def step(self, ids: np.ndarray) -> np.ndarray: ...


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage and line."""
        raise InputError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "number"  # argparse: "invalid number value: '0'"


def parse(candidate: str) -> tuple[Path, dict[str, str]]:
    """The folder and the plugin's properties of `DIR[,KEY=VALUE]…`, f32 where it names none. Raises InputError."""
    folder, *settings = candidate.split(",")
    if any("=" not in setting for setting in settings):
        raise InputError(f"{candidate}: write DIR,KEY=VALUE,…")
    given = dict(setting.split("=", 1) for setting in settings)
    properties = EXACT_PROPERTIES | given
    if "KV_CACHE_PRECISION" not in given and any(key.startswith(("KEY_CACHE_", "VALUE_CACHE_")) for key in given):
        del properties["KV_CACHE_PRECISION"]  # it would speak for both
    return Path(folder), properties


def open_candidate(candidate: str) -> Runner:
    """The model of `DIR[,KEY=VALUE]…` on the CPU."""
    folder, properties = parse(candidate)
    precision = properties.pop("GPU_CACHE", None)
    if precision is None:
        return Runner(model_xml(folder), "CPU", properties)
    model = load(folder)
    as_gpu_stores(model, precision)
    return Runner(model, "CPU", properties)


def check(candidates: Sequence[str], record: Path | None) -> list[Path]:
    """The candidates' folders. Raises InputError for what is wrong with them before minutes are spent on the first."""
    folders = [parse(candidate)[0] for candidate in candidates]
    for folder in folders:
        model_xml(folder)
        if record:
            check_json(record, folder, None)
    return folders


def read_tokens(text: Path, folder: Path) -> tuple[np.ndarray, Tokenizer]:
    """Token ids of a text's documents, end to end, and the tokenizer of a model folder. Raises InputError."""
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{text}: not UTF-8 text") from None
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return encode(content, tokenizer), tokenizer
    except Exception as error:  # tokenizers raises no narrower type
        raise InputError(f"{folder / 'tokenizer.json'}: can't be used ({last_line(error)})") from None


def steps(runner: Feedable, windows: np.ndarray, chunk: int, name: str) -> Iterator[tuple[int, int, np.ndarray]]:
    """(window, first position, logits (tokens, vocabulary)) of every chunk, each window from an empty cache."""
    places = [(row, start) for row in range(len(windows)) for start in range(0, windows.shape[1], chunk)]
    console = Console(stderr=True)
    for row, start in track(places, name, console=console, transient=True, disable=not console.is_terminal):
        if start == 0:
            runner.reset()
        yield row, start, runner.step(windows[row : row + 1, start : start + chunk])[0]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In f64: at f32 its own rounding is as large as the noise floor."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare(
    expected: np.ndarray, windows: np.ndarray, text_bytes: int, runner: Feedable, candidate: str, chunk: int
) -> dict[str, Any]:
    """What the candidate's row says; `expected` are the reference's logits (windows, window, vocabulary)."""
    kld, same = np.empty(windows.shape), np.empty(windows.shape, bool)
    nats = 0.0
    for row, start, logits in steps(runner, windows, chunk, candidate):
        part = slice(start, start + len(logits))
        if logits.shape[-1] != expected.shape[-1]:
            raise InputError(f"{candidate}: {logits.shape[-1]} logits a token, the reference has {expected.shape[-1]}")
        p, q = log_softmax(expected[row, part]), log_softmax(logits)
        kld[row, part] = (np.exp(p) * (p - q)).sum(-1)
        same[row, part] = p.argmax(-1) == q.argmax(-1)
        following = windows[row, start + 1 : start + 1 + len(logits)]
        nats -= float(q[np.arange(len(following)), following].sum())
    return {
        "candidate": candidate,
        "chunk": chunk,
        "mean_kld": float(kld.mean()),
        "median_kld": float(np.median(kld)),
        "kld_p999": float(np.quantile(kld, 0.999)),
        "same_top": float(same.mean()),
        "bits_per_byte": nats / math.log(2) / text_bytes,
    }


def measure(
    options: argparse.Namespace,
    open_one: Callable[[str], Feedable] = open_candidate,
    describe: Callable[[Feedable], str] = lambda runner: "",
) -> None:
    """The table; candidates are opened by `open_one`, and `describe` says more of each."""
    reference, window, chunk = options.reference, options.window, options.chunk
    if window < 2:
        raise InputError("--window: at least 2 tokens are needed, the first of a window is not scored")
    ids, tokenizer = read_tokens(options.text, check((reference, *options.candidates), options.json)[0])
    count = min(options.windows, len(ids) // window)
    if not count:
        raise InputError(f"{options.text}: {len(ids)} tokens, at least {window} are needed")
    windows = ids[: count * window].reshape(count, window)
    text_bytes = sum(len(tokenizer.decode(row[1:].tolist(), skip_special_tokens=False).encode()) for row in windows)

    runner = open_candidate(reference)
    expected = np.empty((*windows.shape, runner.vocabulary), np.float32)
    for row, start, logits in steps(runner, windows, chunk, reference):
        expected[row, start : start + len(logits)] = logits
    del runner
    other = min(chunk, window) // 2 or 2
    print(f"{windows.size:,} tokens in windows of {window:,}, in chunks of {chunk}; KLD in nats")
    print(f"{'mean KLD':>10} {'median':>10} {'99.9%':>10} {'same top':>9} {'bits/byte':>10}", flush=True)
    rows: list[dict[str, Any]] = []
    for name in (reference, *options.candidates):
        runner = open_one(name) if rows else open_candidate(name)
        row = compare(expected, windows, text_bytes, runner, name, chunk if rows else other)
        floor = rows[0]["mean_kld"] if rows else row["mean_kld"]
        row["equals_reference"] = row["mean_kld"] <= SAME * max(floor, 1e-15)
        note = f"  (in chunks of {other}: the noise floor)"
        if rows:
            why = ": no property changed anything" if "," in name else ""
            note = f"  (equals the reference to the noise floor{why})" if row["equals_reference"] else ""
            row["cache"] = describe(runner)
            note = f"{'  ' * bool(row['cache'])}{row['cache']}{note}"
        print(
            f"{row['mean_kld']:10.2e} {row['median_kld']:10.2e} {row['kld_p999']:10.2e} {row['same_top']:9.2%} "
            f"{row['bits_per_byte']:10.4f}  {name}{note}",
            flush=True,
        )
        rows.append(row)
    if options.json:
        record = {"text": str(options.text), "windows": count, "window": window, "chunk": chunk, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def arguments(prog: str, description: str | None) -> Parser:
    """The command line of a tool that calls `measure`."""
    p = Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("text", type=Path, metavar="TEXT")
    p.add_argument("reference", metavar="REFERENCE_DIR")
    p.add_argument("candidates", nargs="+", metavar="CANDIDATE_DIR[,KEY=VALUE]…")
    p.add_argument("--windows", type=positive, default=5, metavar="N", help="at most (default: %(default)s)")
    p.add_argument("--window", type=positive, default=1024, metavar="TOKENS", help="(default: %(default)s)")
    p.add_argument("--chunk", type=positive, default=64, metavar="TOKENS", help="tokens a call (default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    return run(arguments("measure_kld", __doc__), argv, measure)


def run(parser: Parser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], None]) -> int:
    """Exit code of `work(options)`: 0, or 2 after one line on stderr that says what is wrong."""
    try:
        work(parser.parse_args(argv))
    except OSError as error:
        return _fail(parser, f"{error.filename or 'system'}: {error.strerror or error}")
    except (OvtqError, RuntimeError) as error:
        return _fail(parser, str(error) if isinstance(error, OvtqError) else last_line(error))
    except KeyboardInterrupt:
        return _fail(parser, "interrupted")
    return 0


def _fail(parser: Parser, line: str) -> int:
    print(f"{parser.prog}: {' '.join(line.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
