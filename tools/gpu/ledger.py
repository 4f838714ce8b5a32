#!/usr/bin/env python3
"""What a decode step of a model costs on a GPU: kernels, copies, waits, and the bytes that each history token adds.

usage: ledger.py MODEL_DIR… [--chip lnl] [--config KEY=VALUE…] [--lengths 1024,2048] [--json FILE]

Runs OpenVINO's GPU plugin on a virtual chip (needs `install-virtual` and `install-emulated`) and reads what it launched
in a decode step of one token, batch 1, after N and after M tokens. Nothing is timed, and nothing is taken from the
model's graph. The log has the kernel of every launch, its buffers and the shapes it was given; the kernel's source,
which the plugin generates, says of how many elements of which type each input and output then is. So

- a launch reads each input and writes each output once, whole: inputs that it broadcasts at their real size, padding
  and reserved room not. What several work-groups read is in a cache by then, or is not: that is not modelled;
- one that makes an output element of one element of each input (eltwise, gather, slice, …) reads no more of an input
  than it has outputs. A concatenation writes as much as it reads, a quantising append one row for each new token: what
  is appended in place moves no history;
- what the plugin optimised out is not launched and moves nothing. A copy reads and writes its bytes;
- oneDNN's products have no source. Operands are m·k, k·n and m·n elements for each of the batch, of the types of the
  kernels that wrote or read the same buffer, and not more than was written there;
- ovtq's own kernels (ovtq_attend, ovtq_join, ovtq_window; `--kernels` of ovtq-convert) have constants for shapes: of
  each token that is no longer recent they read a row of each KV head, of each recent one, or one in a sliding window,
  its key and value, all once, of every token whether it is shown, and what is flat;
- not counted: weights of products, the matrices of a mixture of experts (`grouped_micro_gemm`) and the scratch of
  attention, none of which grows with the history; what the host does; a step now and then in which a cache is moved to
  a larger buffer.

Bytes per token are the difference of the two steps divided by M − N; flat bytes are what is left at 0 tokens. A row of
the table is a kernel whose bytes grow: how often it is launched, elements · bytes an element that each input and output
of one launch has for a token, and bytes for a token of all its launches. "/layer" divides by the layers with a state
that grows, and has masks in it that all layers share.

Exit code 2, and one line, for whatever is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import openvino as ov
from launches import Accountant, Launch, LedgerError, Tensor, read_launches, read_sources
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
SETTLE = 4  # equal steps, of which the last is read: the plugin swaps kernels in the background


def account_step(accountant: Accountant, log: bytes, step: dict[str, Any]) -> list[Launch]:
    start, stop = step["log"]
    launches = list(read_launches(log[start:stop].decode(errors="replace")))
    for launch in launches:
        accountant.account(launch, step["past"])
    return launches


def moved(launches: list[Launch]) -> tuple[int, int]:
    """Bytes read and written."""
    return (
        sum(count * size for launch in launches for count, size in launch.reads),
        sum(count * size for launch in launches for count, size in launch.writes),
    )


# ------------------------------------------------------------------------------------- the ledger of a model


def in_turn(launches: list[Launch]) -> dict[tuple[str, int], Launch]:
    """By family and how many of it came before."""
    seen: Counter[str] = Counter()
    found = {}
    for launch in launches:
        found[launch.family, seen[launch.family]] = launch
        seen[launch.family] += 1
    return found


def growth(before: list[Tensor], after: list[Tensor], tokens: int) -> tuple[tuple[float, int], ...]:
    """(elements a token, bytes an element) of the tensors that grow."""
    pairs = zip(before, after, strict=True)
    return tuple(((b[0] - a[0]) / tokens, b[1]) for a, b in pairs if b[0] != a[0])


def growing_rows(before: list[Launch], after: list[Launch], tokens: int) -> list[dict[str, Any]]:
    """Kernels whose bytes grow with the history, equal ones counted together, in the order they come."""
    rows: dict[tuple[Any, ...], int] = {}
    later = in_turn(after)
    for key, launch in in_turn(before).items():
        if key not in later:
            continue
        other = later[key]
        if (len(launch.reads), len(launch.writes)) != (len(other.reads), len(other.writes)):
            raise LedgerError(f"{launch.family} has other operands at the other length")
        reads, writes = growth(launch.reads, other.reads, tokens), growth(launch.writes, other.writes, tokens)
        if reads or writes:
            row = (launch.family, reads, writes)
            rows[row] = rows.get(row, 0) + 1
    return [
        {
            "kernel": family,
            "launches": count,
            "read": count * sum(elements * size for elements, size in reads),
            "written": count * sum(elements * size for elements, size in writes),
            "reads": reads,
            "writes": writes,
        }
        for (family, reads, writes), count in rows.items()
    ]


def growing_layers(model_dir: Path) -> int:
    """Layers that have a state which grows, or that kernels fill: the first number in the names of such states."""
    infos = [variable.info for variable in ov.Core().read_model(model_dir / "openvino_model.xml").get_variables()]
    names = [
        info.variable_id
        for info in infos
        if len(info.data_shape) > 2 and (info.data_shape[2].is_dynamic or info.variable_id.endswith(".packed"))
    ]
    return len({(re.findall(r"\d+", name) or [""])[0] for name in names})


def run_probe(
    model_dir: Path, chip: str, config: dict[str, str], steps: str, scratch: Path, *options: str
) -> dict[str, Any]:
    """The report of probe.py on the virtual chip; the log and the sources of the kernels are left in `scratch`."""
    environment = os.environ | {
        "VIRTUAL_GPU": chip,
        "FAKE_GPU_ARGS": "1",
        "FAKE_GPU_RUNLOG": str(scratch / "launches.log"),
        "FAKE_GPU_DUMP": str(scratch),
    }
    command = [HERE / "virtual", sys.executable, HERE / "probe.py", model_dir, "--launches", "--steps", steps, *options]
    settings = [f"{key}={value}" for key, value in config.items()]
    command = [str(part) for part in command] + (["--config", *settings] if settings else [])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{HERE / 'virtual'} ended with {done.returncode}"]
        raise LedgerError(f"{model_dir} on {chip}: {lines[-1]}")
    return json.loads(done.stdout)


def measure(model_dir: Path, chip: str, config: dict[str, str], lengths: tuple[int, int]) -> dict[str, Any]:
    """The ledger of one model; `lengths` are tokens before the step that is read."""
    first, second = lengths
    ones = ",1" * SETTLE
    steps = f"1,1,={first - SETTLE + 1}{ones},={second - SETTLE + 1}{ones}"
    own = ["--branch-by-length"] if (model_dir / "ovtq_kernels").is_dir() else []
    with tempfile.TemporaryDirectory() as folder:
        report = run_probe(model_dir, chip, config, steps, Path(folder), *own)
        log = (Path(folder) / "launches.log").read_bytes()
        sources = read_sources(Path(folder))
    if b"\nA " not in log:
        raise LedgerError(f"the launch log has no arguments: run {HERE / 'install-emulated'} again")
    accountant = Accountant(sources, 4 if config.get("INFERENCE_PRECISION_HINT") == "f32" else 2)
    singles = {step["past"]: step for step in report["steps"]}
    launches = []
    for length in lengths:  # the step before it only tells which buffers are written
        for past in (length - 1, length):
            step = account_step(accountant, log, singles[past])
        launches.append(step)
    one, two = singles[first], singles[second]
    tokens, layers = second - first, growing_layers(model_dir)
    rows = growing_rows(*launches, tokens)
    if one["bytes"] != two["bytes"]:
        grown = (two["bytes"] - one["bytes"]) / tokens
        rows.append({"kernel": "copies", "launches": two["copies"], "read": grown, "written": grown})
    (read, written), (read_later, written_later) = (moved(step) for step in launches)
    read, written = read + one["bytes"], written + one["bytes"]
    read_slope = (read_later + two["bytes"] - read) / tokens
    written_slope = (written_later + two["bytes"] - written) / tokens
    left = [read_slope - sum(row["read"] for row in rows), written_slope - sum(row["written"] for row in rows)]
    if any(abs(number) > 1e-6 for number in left):
        name = "launched at one length only"
        rows.append({"kernel": name, "launches": two["kernels"] - one["kernels"], "read": left[0], "written": left[1]})
    return {
        "model": str(model_dir),
        "chip": chip,
        "openvino": report["openvino"],
        "config": config,
        "lengths": list(lengths),
        "kv_cache": dict(Counter(node["dtype"] for node in report["graph"]["kv_cache"])),
        "kernels": two["kernels"],
        "copies": two["copies"],
        "waits": two["waits"],
        "layers": layers,
        "read_per_token": read_slope,
        "written_per_token": written_slope,
        "flat_read": round(read - read_slope * first),
        "flat_written": round(written - written_slope * first),
        "rows": rows,
    }


# ------------------------------------------------------------------------------------- what is printed


def elements(tensors: tuple[tuple[float, int], ...]) -> str:
    return " + ".join(f"{count:,g}·{size}" for count, size in tensors)


def show_rows(ledger: dict[str, Any]) -> Table:
    table = Table(title=f"{ledger['model']}: bytes of a decode step for each token of history", title_justify="left")
    for name in ("kernel", "launches", "elements read", "elements written", "read", "written"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for row in ledger["rows"]:
        shown = (elements(row.get("reads", ())), elements(row.get("writes", ())))
        table.add_row(row["kernel"], str(row["launches"]), *shown, f"{row['read']:,.0f}", f"{row['written']:,.0f}")
    totals = f"{ledger['read_per_token']:,.0f}", f"{ledger['written_per_token']:,.0f}"
    table.add_section()
    table.add_row("all", "", "", "", *totals)
    return table


def show_totals(ledgers: list[dict[str, Any]]) -> Table:
    names = ("model", "kv_cache", "kernels", "copies", "waits", "layers", "read/token", "written/token", "both/layer")
    table = Table(title="a decode step", title_justify="left")
    for name in (*names, "flat read", "flat written"):
        table.add_column(name, justify="left" if name in ("model", "kv_cache") else "right")
    for ledger in ledgers:
        both = ledger["read_per_token"] + ledger["written_per_token"]
        table.add_row(
            f"{ledger['model']} ({ledger['chip']})",
            ", ".join(f"{count} {dtype}" for dtype, count in ledger["kv_cache"].items()),
            *(str(ledger[key]) for key in ("kernels", "copies", "waits", "layers")),
            *(f"{ledger[key]:,.0f}" for key in ("read_per_token", "written_per_token")),
            f"{both / max(ledger['layers'], 1):,.0f}",
            *(f"{ledger[key]:,}" for key in ("flat_read", "flat_written")),
        )
    return table


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", type=Path, metavar="MODEL_DIR")
    p.add_argument("--chip", default="lnl", help="what VIRTUAL_GPU may be (default: %(default)s)")
    p.add_argument(
        "--config", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="of the plugin; INFERENCE_PRECISION_HINT=f16 unless said otherwise",
    )  # fmt: skip
    p.add_argument("--lengths", default="1024,2048", help="tokens before the two steps (default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE")
    return p.parse_args()


def checked(args: argparse.Namespace) -> tuple[dict[str, str], tuple[int, int]]:
    """The plugin's configuration and the two lengths."""
    config = configuration(args)
    match = re.fullmatch(r"(\d+),(\d+)", args.lengths)
    first, second = (int(part) for part in match.groups()) if match else (0, 0)
    if first < 2 * SETTLE or second < first + SETTLE:
        least = f"N at least {2 * SETTLE} and M at least {SETTLE} more"
        raise LedgerError(f"--lengths {args.lengths}: expected N,M with {least}")
    return config, (first, second)


def configuration(args: argparse.Namespace) -> dict[str, str]:
    """That of the plugin; refuses a folder without a model, too."""
    if bad := [path for path in args.models if not (path / "openvino_model.xml").is_file()]:
        raise LedgerError(f"{bad[0]} has no openvino_model.xml")
    if bad := [item for item in args.config if "=" not in item]:
        raise LedgerError(f"--config {bad[0]}: expected KEY=VALUE")
    return {"INFERENCE_PRECISION_HINT": "f16", **dict(item.split("=", 1) for item in args.config)}


def main() -> int:
    args = parse_args()
    try:
        config, lengths = checked(args)
        ledgers = [measure(path, args.chip, config, lengths) for path in args.models]
        if args.json:
            args.json.write_text(json.dumps(ledgers, indent=1) + "\n", encoding="utf-8")
    except (LedgerError, OSError) as error:
        print(f"ledger: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 160)
    for ledger in ledgers:
        console.print(show_rows(ledger))
    console.print(show_totals(ledgers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
