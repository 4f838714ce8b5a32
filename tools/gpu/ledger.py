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
- ovtq's own kernels (ovtq_attend, ovtq_join; `--kernels` of ovtq-convert) have constants for shapes: of each token that
  is no longer recent they read a row of each KV head, of each recent one an entry, both once, and what is flat;
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import openvino as ov
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
SETTLE = 4  # equal steps, of which the last is read: the plugin swaps kernels in the background
BYTES = {"char": 1, "uchar": 1, "half": 2, "ushort": 2, "short": 2, "float": 4, "int": 4, "uint": 4, "long": 8}
# kernels that make an output element of one element of each input
ELEMENTWISE = re.compile(
    r"(generic_)?eltwise|activation|select|gather|strided_slice|crop|border|reorder|permute|tile|broadcast|concatenation"
)
AXES = ("BATCH_NUM", "FEATURE_NUM", "SIZE_X", "SIZE_Y", "SIZE_Z", "SIZE_W", "SIZE_U", "SIZE_V")
TENSOR = re.compile(rf"(?:(?:FUSED_OP_\d+_)?INPUT\d+|OUTPUT\d*)_(?:TYPE|{'|'.join(AXES)})")


Tensor = tuple[int, int]  # elements, bytes an element


class LedgerError(Exception):
    """Something is missing or not understood: one line for the user."""


# ------------------------------------------------------------------------------------- the sources of the kernels


@dataclass
class Source:
    """The macros that describe a kernel's tensors, from the text the plugin generated."""

    macros: dict[str, str]

    def tensors(self, kind: str, shapes: list[int], skip: str = "") -> list[Tensor]:
        """The tensors whose names match `kind`, but those of the type `skip`."""
        types = {name[: -len("_TYPE")]: value for name, value in self.macros.items() if name.endswith("_TYPE")}
        names = [name for name, value in types.items() if re.fullmatch(kind, name) and value != skip]
        names.sort(key=lambda name: (len(name), name))
        return [(prod(self.axis(name, axis, shapes) for axis in AXES), self.size(name)) for name in names]

    def size(self, name: str) -> int:
        kind = self.macros[f"{name}_TYPE"]
        if kind not in BYTES:
            raise LedgerError(f"a tensor of the unknown type {kind}")
        return BYTES[kind]

    def axis(self, name: str, axis: str, shapes: list[int]) -> int:
        """The length of an axis: a number, or an item of the launch's `shape_info`."""
        text = self.macros.get(f"{name}_{axis}", "1")
        match = re.fullmatch(r"\(?(?:(\d+)|shape_info\s*\[(\d+)\])\s*\)?", text)
        if not match or (match[2] and int(match[2]) >= len(shapes)):
            raise LedgerError(f"{name}_{axis} of a kernel is not understood: {text}")
        return int(match[1]) if match[1] else shapes[int(match[2])]


@dataclass
class Own:
    """The constants of one of ovtq's own kernels."""

    kernel: str
    constants: dict[str, int]

    def moved(self, past: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """What a decode step after `past` tokens reads and writes, where floating-point numbers have `size` bytes."""
        heads, queries, width, row, parts, record, window = (
            self.constants[name] for name in ("KV_HEADS", "QUERY_HEADS", "HEAD_DIM", "ROW", "PARTS", "RECORD", "WINDOW")
        )
        records, context = (queries * parts * record, 4), (queries * width, size)
        if self.kernel == "ovtq_join":
            return [records], [context]
        if self.kernel != "ovtq_attend":
            raise LedgerError(f"kernel {self.kernel}: it should not be launched in a decode step")
        entry = 2 * width + 1
        constants = heads * (3 * width**2 + width) + 2 * queries  # rotations, centres, sinks
        step = (queries + 2 * heads) * width + 3
        reads = [(max(past - window, 0) * heads * row, 2), (min(past, window) * heads * entry, size)]
        return [*reads, (constants + step, size)], [records, (heads * row, 2), (heads * entry, size)]


def read_sources(folder: Path) -> dict[str, Source | Own]:
    """The kernels of all programs that were built, by name."""
    found: dict[str, Source | Own] = {}
    for path in folder.glob("ok_*.cl"):
        macros: dict[str, str] = {}
        text = path.read_text(errors="replace")
        if own := re.search(r"__kernel void (ovtq_\w+)", text):
            numbers = re.findall(r"^#define ([A-Z_]+) (\d+)$", text, re.MULTILINE)
            found[own[1]] = Own(own[1], {name: int(number) for name, number in numbers})
            continue
        for line in text.splitlines():
            if line.startswith("// Kernel template"):
                macros = {}
            elif line.startswith("#define "):
                _, name, *value = line.split(maxsplit=2)
                if TENSOR.fullmatch(name):
                    macros[name] = "".join(value).strip()
                elif name == "KERNEL_ID":
                    found[value[0].strip()] = Source(macros)
    return found


# ------------------------------------------------------------------------------------- the log of the launches


@dataclass
class Buffer:
    """Where an argument points to: an allocation, an offset in it, and the bytes from there to its end."""

    base: str
    offset: int
    room: int


@dataclass
class Launch:
    """One kernel, with what it was given."""

    kernel: str
    groups: int  # in the third dimension, where oneDNN's products put the batch
    args: list[Buffer | int | None] = field(default_factory=list)
    shapes: list[int] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)
    writes: list[Tensor] = field(default_factory=list)

    @cached_property
    def family(self) -> str:
        """The kernel's name without hashes: gather_ref."""
        return re.sub(r"_+\d{9,}[\d_]*(sa)?$", "", self.kernel)


def read_launches(text: str) -> Iterator[Launch]:
    """The launches of a part of the log: K, then A (arguments), then I (integers of `shape_info`, if there are any)."""
    launch = None
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "K":
            if launch:
                yield launch
            name, sizes = rest.split()[:2]
            total, local = ([int(size) for size in part.split(",")] for part in sizes.split("/"))
            launch = Launch(name, total[2] // max(local[2], 1))
        elif kind == "A" and launch:
            launch.args = [read_argument(item) for item in rest.split()]
        elif kind == "I" and launch:
            launch.shapes = [int(item) for item in rest.split(",")]
    if launch:
        yield launch


def read_argument(item: str) -> Buffer | int | None:
    if match := re.fullmatch(r"p(\w+)\+(\d+)/(\d+)", item):
        return Buffer(match[1], int(match[2]), int(match[3]) - int(match[2]))
    return int(item[1:]) if item.startswith("s") else None


# ------------------------------------------------------------------------------------- bytes


class Accountant:
    """Fills in what launches read and write, in their order, and remembers what lies in which buffer."""

    def __init__(self, sources: dict[str, Source | Own], float_bytes: int) -> None:
        self.sources, self.float_bytes = sources, float_bytes
        self.held: dict[str, Tensor] = {}  # by allocation: what was last written there
        self.products: dict[str, Launch] = {}  # by allocation: the product whose result lies there

    def account(self, launch: Launch, past: int) -> None:
        source = self.sources.get(launch.kernel)
        if isinstance(source, Own):
            launch.reads, launch.writes = source.moved(past, self.float_bytes)
            output = [arg for arg in launch.args if isinstance(arg, Buffer)][-1]
            self.products.pop(output.base, None)
            self.held[output.base] = launch.writes[0]
        elif source:
            self.account_source(launch, source)
        elif launch.kernel == "gemm_kernel":
            self.account_product(launch)
        elif launch.kernel != "grouped_micro_gemm":
            raise LedgerError(f"kernel {launch.kernel}: its source was not seen")

    def account_source(self, launch: Launch, source: Source) -> None:
        first = 1 if launch.kernel.endswith("__sa") else 0  # after `shape_info`
        given = [arg for arg in launch.args[first:] if isinstance(arg, Buffer)]
        attention = launch.family.startswith("sdpa")  # its arguments are in an order of their own
        inputs = source.tensors(r"INPUT\d+", launch.shapes)
        fused = source.tensors(r"FUSED_OP_\d+_INPUT\d+", launch.shapes)
        outputs = source.tensors(r"OUTPUT\d*", launch.shapes)
        if attention and len(given) < len(inputs) + len(outputs):  # described, but not given: the table of beams
            inputs = source.tensors(r"INPUT\d+", launch.shapes, skip="int")
        most = outputs[0][0] if outputs and ELEMENTWISE.match(launch.family) else None
        launch.reads = [(count if most is None else min(count, most), size) for count, size in inputs + fused]
        launch.writes = list(outputs)
        if launch.family.startswith("concatenation"):
            launch.writes = [(inputs[0][0], outputs[0][1])]
        elif launch.family == "dynamic_quantize_gpu_kv_cache":  # outputs are the cache: data, scales, zero points
            new, kept = (source.axis(name, "SIZE_Y", launch.shapes) for name in ("INPUT0", "OUTPUT"))
            launch.writes = [(count * new // kept, size) for count, size in outputs]
        for place, buffer in enumerate(given):
            if place < len(inputs) and not attention:
                product = self.products.get(buffer.base)
                if product and product.writes[0][0] == inputs[place][0]:  # the type of its result is only known here
                    self.held[buffer.base] = product.writes[0] = inputs[place]
            else:
                self.products.pop(buffer.base, None)
                output = place - len(inputs)
                known = not attention and output < len(outputs)
                unknown = (buffer.room // self.float_bytes, self.float_bytes)
                self.held[buffer.base] = outputs[output] if known else unknown

    def account_product(self, launch: Launch) -> None:
        """C = A·B; arguments are A, B, C, their offsets and leading dimensions, m, n, k (oneDNN's gemm for Xe)."""
        a, b, c = launch.args[:3]
        m, n, k = launch.args[9:12]
        if not all(isinstance(item, Buffer) for item in (a, b, c)) or not all(isinstance(x, int) for x in (m, n, k)):
            raise LedgerError("the arguments of a gemm_kernel are not understood")
        for buffer, elements in ((a, m * k), (b, k * n)):
            if buffer.base not in self.held:  # nobody wrote it: a weight
                continue
            count, size = self.held[buffer.base]
            launch.reads.append((min(elements * launch.groups, count), size))
        launch.writes = [(m * n * launch.groups, self.float_bytes)]
        self.held[c.base] = launch.writes[0]
        self.products[c.base] = launch


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
