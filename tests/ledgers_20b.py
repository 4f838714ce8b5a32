"""Writes tests/data/ledger_20b.json: what GPT-OSS-20B's layers cost on a virtual Lunar Lake, at full width.

usage: python tests/ledgers_20b.py [--show] [--layers 2,4,6] [PRESET…]

Models of 2, 4 and 6 layers (tools/make_synthetic.py), of which half are full layers, are converted with every preset;
tools/gpu/ledger.py reads off each what a decode step does, tools/gpu/memory.py off the first two what is allocated:
with kernels, whose states have a capacity, in a model for each context, of room for it and a call more. What 24 layers
take follows from the last two of each: a pair of layers more is their difference. (The first pair is no measure of
kernels: what joins states of several sliding layers is not in it.) Prints that as tables, too; with --show it does
nothing else. Half an hour and 12 GB of disk for all.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from conftest import GPU_TOOLS, ROOT
from ledgers import PRESETS, counts

sys.path.insert(0, str(GPU_TOOLS))
from at_24 import EXPORTED, KERNELS, LAYERS, MEMORY, kernels, needs

RECORD = ROOT / "tests" / "data" / "ledger_20b.json"
CONTEXTS = 8192, 32768, 131072  # those of tools/gpu/memory.py
CALL = 1024  # tokens
IN_ONE = 8192  # of a prompt in one call


def tool(name: str, model_dir: Path, *options: object) -> dict[str, Any]:
    """What a tool says of the one model; raises RuntimeError with its reason."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [str(part) for part in (sys.executable, GPU_TOOLS / name, model_dir, "--json", out, *options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().removeprefix(f"{Path(name).stem}: {model_dir} on lnl: "))
        return json.loads(out.read_text(encoding="utf-8"))[0]


def synthetic(layers: int, out: Path) -> Path:
    """Write the model of so many layers at full width."""
    command = [sys.executable, ROOT / "tools" / "make_synthetic.py", out, "--layers", layers, "--no-tokenizer"]
    subprocess.run([str(part) for part in command], check=True)
    return out


def converted(exported: Path, out: Path, preset: str) -> Path:
    """Convert a model with a preset, and what stands behind its name; raises RuntimeError if that fails."""
    from ovtq.cli.convert import main as convert

    if convert([str(exported), str(out), "--preset", *shlex.split(preset), "--no-verify"]):
        raise RuntimeError(f"{exported} was not converted with {preset}")
    return out


def memory_with_kernels(exported: Path, preset: str) -> dict[str, Any]:
    """What tools/gpu/memory.py tells of a model for each context."""
    found: list[dict[str, Any]] = []
    for context in CONTEXTS:
        with tempfile.TemporaryDirectory(dir=exported.parent) as folder:
            out = converted(exported, Path(folder) / "out", f"{preset} --capacity {context + CALL}")
            options = ("--contexts", context, "--chunk", CALL, "--whole", IN_ONE if context == IN_ONE else CALL)
            found.append(tool("memory.py", out, *options))
    rows = [next(row for row in one["rows"] if row["context"] in CONTEXTS) for one in found]
    return {**found[0], "rows": rows}


def measured(model_dir: Path, layers: int, memory: Callable[[], dict[str, Any]] | None = None) -> dict[str, Any]:
    """What is recorded of one model."""
    ledger = tool("ledger.py", model_dir)
    rows = [{key: row[key] for key in ("kernel", "launches", "read", "written")} for row in ledger["rows"]]
    found = {
        "kv_cache": ledger["kv_cache"],
        **counts(ledger),
        "rows": sorted(rows, key=lambda row: (row["kernel"], row["read"])),  # the plugin's order varies
    }
    if layers in MEMORY:
        taken = memory() if memory else tool("memory.py", model_dir)
        found["memory"] = {key: taken[key] for key in ("weights", "chunk", "rows")}
    return found


def measure(presets: list[str], sizes: list[int]) -> None:
    """Measure and write."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for layers in sizes:
            exported = synthetic(layers, Path(scratch) / str(layers))
            for preset in presets:
                entry = record.setdefault(preset, {})
                if preset == EXPORTED:
                    try:
                        entry[str(layers)] = measured(exported, layers)
                    except RuntimeError as error:
                        entry[str(layers)] = {"refused": str(error)}
                    continue
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    out = converted(exported, Path(folder) / "out", preset)
                    own = partial(memory_with_kernels, exported, preset) if preset in KERNELS else None
                    entry[str(layers)] = measured(out, layers, own)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def show() -> None:
    """The record as tables."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    print("24 layers: kernels per step; bytes per token and pair of layers read, written; GB of memory")
    for preset, found in record.items():
        if preset == EXPORTED:
            continue
        two, four = (found[str(count)] for count in MEMORY)
        more = [four[key] - two[key] for key in ("read_per_token", "written_per_token")]
        print(f"{preset:14} {kernels(found):5,.0f} kernels", *(f"{growth:,.0f}" for growth in more))
        for context in (row["context"] for row in two["memory"]["rows"]):
            sizes = needs(found, context).items()
            print(f"{context:9,}", *(f"{key} {'–' if size is None else f'{size / 1e9:.2f}'}" for key, size in sizes))


def main() -> int:
    """What the command line asks."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("presets", nargs="*", metavar="PRESET", default=[EXPORTED, *PRESETS, *KERNELS])
    p.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",")], default=list(LAYERS))
    p.add_argument("--show", action="store_true")
    options = p.parse_args()
    if not options.show:
        measure(options.presets, options.layers)
    show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
