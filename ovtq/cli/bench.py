"""ovtq-bench: time and memory of a model with other caches against the same model as exported, in turn in one run.

Answers prompts (--prompt, or three by default): TTFT, TPOT, tokens a second, bytes of all states, peak memory of the
process at prefill and decode. With --contexts it measures decode steps at these lengths instead, in blocks of 8, with
--prefill a prefill of so many random tokens, in one call or in calls of --chunk, from empty states or at a --depth; or
both. Every candidate runs in a process of its own, unless --one-process; whoever's turn it is runs alone. Ratios are to
MODEL_DIR's block or run beside it, figures are medians with the quartiles. The plugin's defaults apply (on a CPU a u8
cache) but for what is given. `read` is the bandwidth of summing a large array with all cores: what memory gives at
best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import openvino as ov
from rich.console import Console

from ovtq import files, system
from ovtq.cli import report
from ovtq.cli.bench_tables import show_contexts, show_prefills, show_prompts
from ovtq.cli.command import (
    Out,
    Parser,
    listed,
    made_here,
    path_of,
    phase,
    positive,
    progress,
    properties_of,
    run,
    tell_of_others,
    tokens,
    turns,
)
from ovtq.errors import InputError
from ovtq.evidence.candidates import GRAMMAR, Candidate, parse
from ovtq.evidence.roofline_cpu import read_bandwidth
from ovtq.evidence.worker import THROUGH, InProcess, Worker
from ovtq.ir import io
from ovtq.runtime.runner import check_device
from ovtq.runtime.text import Tokenizer

PROMPTS = (
    "Explain the key differences between mixture-of-experts and dense transformer models.",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "OpenVINO의 장점을 설명해 주세요.",
)
CHUNK = 512  # tokens a prefill call of --contexts
BLOCK = 8  # decode steps whose mean is one figure: what a method does at every fourth step must be in it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    errors = Console(stderr=True, highlight=False)
    return run("ovtq-bench", lambda: bench(parser().parse_intermixed_args(argv), Out(), errors), errors, argv=argv)


def parser() -> Parser:
    """The command line."""
    p = Parser("ovtq-bench", f"{__doc__}\n{GRAMMAR}")
    p.add_argument("model_dir", type=path_of, metavar="MODEL_DIR", help="the model as exported: what ratios are to")
    p.add_argument("others", nargs="*", metavar="CANDIDATE", help="see above")
    p.add_argument(
        "--candidate", action="append", default=[], metavar="CANDIDATE", help="one more, as above; may be repeated"
    )
    p.add_argument(
        "--prompt",
        "--prompts",
        nargs="+",
        default=list(PROMPTS),
        metavar="TEXT",
        dest="prompts",
        help="texts to answer (default: three short ones)",
    )
    p.add_argument(
        "--max-new-tokens", type=positive, default=200, metavar="N", help="tokens per answer (default: %(default)s)"
    )
    p.add_argument(
        "--runs", type=positive, default=3, metavar="N", help="runs of each prompt or prefill (default: %(default)s)"
    )
    p.add_argument(
        "--contexts",
        type=listed(positive, "numbers"),
        metavar="TOKENS,…",
        help="measure decode steps behind so many tokens, such as 256,2k,8k,32k",
    )
    p.add_argument(
        "--steps", type=positive, default=64, metavar="N", help="decode steps per context, in blocks of 8 (default: 64)"
    )
    p.add_argument(
        "--fill",
        action="store_true",
        help="with --contexts: fill the states with noise instead of reading so many tokens",
    )
    p.add_argument(
        "--prefill",
        type=listed(positive, "numbers"),
        metavar="TOKENS,…",
        help="measure reading so many tokens, such as 2k,8k",
    )
    p.add_argument(
        "--depth",
        type=listed(tokens, "numbers"),
        default=[0],
        metavar="TOKENS,…",
        help="tokens of noise in the states before --prefill, such as 0,8k,32k (default: 0)",
    )
    p.add_argument(
        "--chunk", type=positive, metavar="N", help="tokens per prefill call (default: all; 512 with --contexts)"
    )
    p.add_argument(
        "--through", default="openvino", metavar="RUNTIME,…", help=f"hosts, of {', '.join(THROUGH)} (default: openvino)"
    )
    p.add_argument("--device", default="CPU", metavar="DEVICE", help="where all are run (default: %(default)s)")
    p.add_argument(
        "--property",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a property of the plugin for all of them; may be repeated",
    )
    p.add_argument(
        "--one-process", action="store_true", help="all candidates in this one, which then holds the memory of all"
    )
    p.add_argument("--one-at-a-time", action="store_true", help="load one candidate at a time; ratios are of medians")
    p.add_argument("--output", "--json", type=path_of, metavar="FILE", help="write the figures", dest="output")
    p.add_argument("--report", type=path_of, metavar="FILE", help="write a page to look at (HTML)")
    return p


def bench(options: argparse.Namespace, console: Out, errors: Console) -> None:
    """Do what the command line asks."""
    texts = ["stock", *options.others, *options.candidate]
    candidates = [parse(text, options.model_dir) for text in texts]
    through = options.through.split(",")
    _check(options, candidates, through)
    tell_of_others({item.label: item.folder for item in candidates}, options.device, errors)
    properties = properties_of(options.property)
    pairs = [(candidate, runtime) for runtime in through for candidate in candidates]
    results: dict[str, Any] = {
        **made_here("bench", options.model_dir, options.device),
        "machine": _machine(options.device),
        "properties": properties,
        "prompts": [],
        "contexts": [],
        "prefills": [],
    }
    groups = [[pair] for pair in pairs] if options.one_at_a_time else [pairs]
    kinds: dict[str, Callable[..., list[dict[str, Any]]]] = {"contexts": _contexts, "prefills": _prefills}
    asked = {"contexts": options.contexts, "prefills": options.prefill}
    kinds = {kind: measure for kind, measure in kinds.items() if asked[kind]} or {"prompts": _prompts}
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    with progress(errors) as bars:
        for group in groups:
            workers: list[Worker | InProcess] = []
            try:
                with phase(bars, "load", len(group)) as tick:
                    for candidate, runtime in group:
                        make = InProcess if options.one_process else Worker
                        workers.append(make(candidate, runtime, options.device, properties))
                        tick()
                for kind, measure in kinds.items():
                    found[kind] += measure(options, workers, bars)
            finally:
                for worker in workers:
                    worker.close()
    machine = results["machine"]
    read = f"read {machine['read'] / 1e9:.1f} GB/s"
    console.print(f"{machine['cpu']}, {machine['cores']} cores, {read}; on {options.device}")
    console.print(
        f"properties: {', '.join(f'{name}={value}' for name, value in properties.items())}; all else as it is"
    )
    shows = {"contexts": show_contexts, "prefills": show_prefills, "prompts": show_prompts}
    for kind, some in found.items():
        results[kind] = [_row(row, some) for row in some]
        shows[kind](console, results[kind])
    rows = [row for kind in found for row in results[kind]]
    for line in dict.fromkeys(where_states_turn(rows)):
        console.print(line)
    for label, reason in dict.fromkeys((row["candidate"], row["wrong"]) for row in rows if row["wrong"]):
        console.print(f"not as asked: {label}: {reason}", style="bold red")
    if options.output:
        files.write(options.output, json.dumps(results, indent=1) + "\n")
    if options.report:
        report.write(options.report, [results])
        console.print(f"report: {options.report}")


def _check(options: argparse.Namespace, candidates: Sequence[Candidate], through: Sequence[str]) -> None:
    """Raise InputError for what would only fail after minutes."""
    check_device(options.device)
    if unknown := [name for name in through if name not in THROUGH]:
        raise InputError(f"--through: no runtime {unknown[0]!r}; there are {', '.join(THROUGH)}")
    if (options.contexts or options.prefill) and through != ["openvino"]:
        raise InputError("--contexts, --prefill: measured through openvino alone; give --prompts instead")
    if options.chunk and not (options.contexts or options.prefill):
        raise InputError("--chunk: prompts are read in one call; it belongs to --contexts and --prefill")
    if any(options.depth) and not options.prefill:
        raise InputError("--depth: belongs to --prefill")
    if options.report and options.prefill and not options.contexts:
        raise InputError("--report: the page shows no prefills; give --contexts or --prompts, or --output")
    if options.one_process and options.one_at_a_time:
        raise InputError("--one-process: keeps all candidates loaded; leave --one-at-a-time out")
    if options.fill and not options.contexts:
        raise InputError("--fill: belongs to --contexts")
    if options.max_new_tokens < 2:
        raise InputError("--max-new-tokens: at least 2, the first is TTFT's")
    outputs = {"--output": options.output, "--report": options.report}
    io.check_outputs(outputs, [candidate.folder for candidate in candidates])
    if options.report:
        report.check()


def _in_turn(workers: Sequence[Worker | InProcess], turn: int) -> Sequence[int]:
    """The order of this turn: whoever follows another finds its caches cold, so all do in turn."""
    return [(turn + place) % len(workers) for place in range(len(workers))]


def _prompts(options: argparse.Namespace, workers: list[Worker | InProcess], bars: Any) -> list[dict[str, Any]]:
    """Raw figures of every prompt and worker, as lists over the runs; a run before them is not counted."""
    tokenizer = Tokenizer(options.model_dir)
    rows = []
    with phase(bars, "answer", len(options.prompts) * (options.runs + 1) * len(workers)) as tick:
        for prompt in options.prompts:
            ids = tokenizer.chat(prompt)
            runs: list[list[dict[str, Any]]] = [[] for _ in workers]
            for turn in range(options.runs + 1):
                for index in _in_turn(workers, turn):
                    runs[index].append(workers[index]("generate", ids, options.max_new_tokens))
                    tick()
            for worker, (_, *some) in zip(workers, runs, strict=True):
                rows.append(
                    _facts(worker)
                    | {
                        "prompt": prompt,
                        "prompt_tokens": len(ids),
                        "new_tokens": options.max_new_tokens,
                        "runs": options.runs,
                        "ttft": [run["ttft"] for run in some],
                        "tpot": [float(np.mean(run["steps"])) for run in some],
                        **{key: some[-1][key] for key in ("state_bytes", "pruned", "rss_prefill", "rss_decode")},
                    }
                )
    return rows


def _contexts(options: argparse.Namespace, workers: list[Worker | InProcess], bars: Any) -> list[dict[str, Any]]:
    """Raw figures of every context and worker, as lists over blocks of steps."""
    draw, rows, blocks = np.random.default_rng(0), [], math.ceil(options.steps / BLOCK)
    ids = draw.integers(0, min(worker.facts["vocabulary"] for worker in workers), max(options.contexts))
    for context in options.contexts:
        with phase(bars, f"{context:,} tokens", len(workers) + blocks + 1) as tick:
            prefill: list[dict[str, Any]] = []
            for worker in workers:
                if options.fill:
                    worker("fill", context)
                    prefill.append({"seconds": None, "rss": None})
                else:
                    prefill.append(worker("read", ids[:context], options.chunk or CHUNK))
                worker("start_peak")
                tick()
            seconds = np.empty((blocks + 1, BLOCK, len(workers)))
            for block in range(blocks + 1):
                for step in range(BLOCK):
                    for index in _in_turn(workers, step):
                        seconds[block, step, index] = workers[index]("step")
                tick()
            tpot = seconds[1:].mean(1)  # the first block compiles kernels for what is new
            for index, worker in enumerate(workers):
                rows.append(
                    _facts(worker)
                    | {
                        "context": context,
                        "filled": options.fill,
                        "tpot": tpot[:, index].tolist(),
                        "prefill_s": prefill[index]["seconds"],
                        "state_bytes": worker("state_bytes"),
                        "pruned": None if options.fill else worker("counted"),
                        "rss_prefill": prefill[index]["rss"],
                        "rss_decode": worker("peak"),
                    }
                )
    return rows


def _prefills(options: argparse.Namespace, workers: list[Worker | InProcess], bars: Any) -> list[dict[str, Any]]:
    """Raw figures of every length and worker, as lists over the runs, once a short prompt has made most kernels.

    Those for its length a prompt still makes itself, in its first run, as most prompts do.
    """
    draw, rows = np.random.default_rng(0), []
    ids = draw.integers(0, min(worker.facts["vocabulary"] for worker in workers), max(options.prefill))
    with phase(bars, "warm up", len(workers)) as tick:
        for worker in workers:
            worker("read", ids[:CHUNK], CHUNK)
            tick()
    for depth, count in itertools.product(options.depth, options.prefill):
        behind = f" behind {depth:,}" if depth else ""
        with phase(bars, f"{count:,} tokens{behind}", options.runs * len(workers)) as tick:
            runs: list[list[dict[str, Any]]] = [[] for _ in workers]
            for turn in range(options.runs):
                for index in _in_turn(workers, turn):
                    runs[index].append(workers[index]("read", ids[:count], options.chunk or count, depth))
                    tick()
        for worker, some in zip(workers, runs, strict=True):
            peaks = [run["rss"] for run in some if run["rss"] is not None]
            measured = {"depth": depth, "prefill": count, "chunk": options.chunk}
            measured["prefills_s"] = [run["seconds"] for run in some]
            rows.append(_facts(worker) | measured | {"rss_prefill": max(peaks, default=None)})
    return rows


def _facts(worker: Worker | InProcess) -> dict[str, Any]:
    names = ("cache", "computes", "wrong", "bytes_per_token", "flat_bytes")
    facts = {name: worker.facts[name] for name in names}
    return {"candidate": worker.candidate.label, "through": worker.through, **facts}


def where_states_turn(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Of each candidate with states of a fixed length: from how many tokens on its states are smaller than stock's."""
    stock = next((row for row in rows if row["candidate"] == "stock" and row["bytes_per_token"] is not None), None)
    for row in rows:
        if stock and row["bytes_per_token"] is not None and row["flat_bytes"]:
            sizes = (stock["bytes_per_token"], stock["flat_bytes"], row["bytes_per_token"], row["flat_bytes"])
            turn = turns(*sizes)
            said = f"from {turn:,} tokens on" if turn is not None else "at no length"
            yield f"{row['candidate']}: states smaller than stock's {said}"


def _row(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and quartiles of raw figures, and ratios to the stock model's in the same run or step."""
    same = ("through", "prompt", "context", "depth", "prefill")
    base = next(
        other for other in rows if other["candidate"] == "stock" and all(other.get(key) == row.get(key) for key in same)
    )
    found = {key: value for key, value in row.items() if key not in ("ttft", "tpot", "prefills_s")}
    if "prefills_s" in row:
        seconds = np.array(row["prefills_s"])
        return found | {"prefill_s": _spread(seconds), "prefill_ratio": _spread(seconds / np.array(base["prefills_s"]))}
    tpot = np.array(row["tpot"])
    found["tpot_ms"] = _spread(tpot * 1e3)
    found["tpot_ratio"] = _spread(tpot / np.array(base["tpot"]))
    if "ttft" in row:
        ttft = np.array(row["ttft"])
        latency = float(np.median(ttft + tpot * (row["new_tokens"] - 1)))
        found["ttft_ms"] = _spread(ttft * 1e3)
        found |= {"latency_s": latency, "tokens_per_s": row["new_tokens"] / latency}
    else:
        found["prefill_ratio"] = row["prefill_s"] / base["prefill_s"] if row["prefill_s"] else None
    return found


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "low": float(low), "high": float(high)}


def _machine(device: str) -> dict[str, Any]:
    core = ov.Core()
    found = {"cpu": core.get_property("CPU", "FULL_DEVICE_NAME"), "cores": os.cpu_count(), "ram": system.memory()}
    return found | {"device": core.get_property(device, "FULL_DEVICE_NAME"), "read": read_bandwidth()}
