#!/usr/bin/env python3
"""Measure what each cache costs a model in quality: as exported, under paged attention, with each preset and basis.

usage: measure_real_models.py MODEL_DIR --json FILE [options]        (then again, until it says that all rows are there)
       measure_real_models.py --table FILE…

What ovtq-eval says of each row, on a CPU, all of it in one file, which is written after each row and taken up again.
A row's model is converted into a temporary folder (TMPDIR), not verified, and removed. MODEL_DIR needs its tokenizer
and, for --basis calibrated, calibration.npz (ovtq-calibrate). tools/real_models.py makes such folders. With --jobs N so
many rows are measured at a time, each by a process of its own on its share of the cores; they need --reference.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import benchmark_tables
import made
from rich.console import Console

import ovtq
from ovtq import files
from ovtq.cli.evaluate import parser
from ovtq.cli.evaluation import Evaluation
from ovtq.errors import OvtqError
from ovtq.evidence.candidates import Candidate, as_hosts_load, parse

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "tests" / "data" / "heldout.txt"
BITS = ("k8v4", "k6v4", "k4v4", "k4v3", "k3v3")
BASES = ("rotation", "weights", "calibrated")


@dataclass(frozen=True)
class Row:
    """What is measured: a conversion by `options` (None: the model as exported), loaded with `properties`."""

    label: str
    options: dict[str, Any] | None = None
    properties: str = ""
    paged: bool = False
    hosts: bool = False
    target: str = "cpu"


def packed(bits: str, basis: str) -> Row:
    """A packed preset in a basis."""
    options = {"preset": "k6v4", "k_bits": bits[1], "v_bits": bits[3], "basis": basis}
    return Row(f"{bits}, {basis}", options)


def native(bits: str, basis: str) -> Row:
    """The plugin's own cache, of a model that was made for it."""
    return Row(f"{bits}, {basis}", {"preset": bits, "basis": basis})


def rows() -> Iterator[Row]:
    """All of them, those first that decide which preset to take."""
    yield Row("as exported, u8", properties="KV_CACHE_PRECISION=u8")
    yield native("u8", "rotation")
    yield native("u8", "calibrated")
    for bits in ("k4v4", "k6v4"):
        yield from (packed(bits, basis) for basis in ("calibrated", "rotation"))
    yield replace(Row("as exported"), paged=True, properties="KV_CACHE_PRECISION=u8", label="paged: as exported, u8")
    for basis in ("rotation", "calibrated"):
        yield replace(native("u8", basis), paged=True, properties="KV_CACHE_PRECISION=u8", label=f"paged: u8, {basis}")
    yield Row("as exported, u4", properties="KV_CACHE_PRECISION=u4")
    yield from (native("u4", basis) for basis in ("rotation", "calibrated"))
    for bits in BITS:
        yield from (packed(bits, basis) for basis in BASES if bits not in ("k4v4", "k6v4") or basis == "weights")
    yield native("u8", "weights")
    yield replace(Row("as exported"), paged=True, properties="KV_CACHE_PRECISION=u4", label="paged: as exported, u4")
    for basis in ("rotation", "calibrated"):
        yield replace(native("u4", basis), paged=True, properties="KV_CACHE_PRECISION=u4", label=f"paged: u4, {basis}")
    yield from as_a_gpu_stores()
    yield replace(Row("as exported"), hosts=True, label="as hosts load it: as exported")
    for row in (native("u8", "rotation"), packed("k6v4", "calibrated"), packed("k4v4", "calibrated")):
        yield replace(row, hosts=True, label=f"as hosts load it: {row.label}")


def as_a_gpu_stores() -> Iterator[Row]:
    """The plugin's caches with what a GPU's would hold, computed on a CPU."""
    for bits in ("u8", "u4"):
        properties = f"GPU_CACHE={bits}"
        yield Row(f"GPU: as exported, {bits}", properties=properties)
        for basis in ("rotation", "calibrated"):
            yield Row(f"GPU: {bits}, {basis}", {"preset": bits, "basis": basis}, properties, target="gpu")
        options = {"preset": bits, "residual_window": 127}  # which goes with the rotation
        yield Row(f"GPU: {bits} and 127 exact, rotation", options, properties, target="gpu")


def measure(work: Evaluation, model_dir: Path, row: Row, chunk: int) -> dict[str, Any]:
    """One row's figures; of a model that can't be converted so, why."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_dir
        try:
            if row.options is not None:
                folder = Path(scratch) / "model"
                ovtq.convert(model_dir, folder, target=row.target, verify=False, card=False, **row.options)
            settings = f",{row.properties}" if row.properties else ""
            candidate: Candidate = parse(f"{'paged:' if row.paged else ''}{folder}{settings}", model_dir)
            if row.hosts:
                candidate = as_hosts_load(candidate)
            found = work.judged(candidate, *work.measure("candidate", candidate, chunk))
        except OvtqError as error:
            return {"candidate": row.label, "role": "refused", "reason": str(error).replace(scratch, "…")}
    return found | {"candidate": row.label}


def table(found: dict[str, Any]) -> str:
    """The figures as tables in Markdown, and what was refused."""
    refused = [f"{row['candidate']}: {row['reason']}" for row in found["rows"] if row["role"] == "refused"]
    parts = [benchmark_tables.of_quality(found)]
    parts += [benchmark_tables.of_hosts(found)] if any("as hosts" in row["candidate"] for row in found["rows"]) else []
    parts += [benchmark_tables.of_needles(found)] if any(row.get("needles") for row in found["rows"]) else []
    return "\n\n".join([*parts, *(["refused:\n" + "\n".join(refused)] if refused else [])])


def main() -> int:
    """Run the command; returns its exit code: 0 once all rows are there, else 3."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model_dir", type=Path, nargs="?")
    p.add_argument("--json", type=Path)
    p.add_argument("--text", type=Path, default=TEXT)
    p.add_argument("--windows", default="8")
    p.add_argument("--window", default="1024")
    p.add_argument("--chunk", default="128")
    p.add_argument("--trials", default="0", help="as of ovtq-eval: haystacks of each length and depth (default: none)")
    p.add_argument("--lengths", default="1k", help="as of ovtq-eval: tokens of a haystack")
    p.add_argument("--rows", type=int, default=1000, metavar="N", help="measure no more than N rows in this run")
    p.add_argument("--only", default="", metavar="TEXT", help="those alone whose name has TEXT in it")
    p.add_argument("--reference", metavar="FILE", help="as of ovtq-eval: keep the reference's logits for the next run")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="rows at a time")
    p.add_argument("--part", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)  # one of --jobs' processes
    p.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print such files as tables")
    given = p.parse_args()
    if given.table:
        print("\n\n".join(f"{path}\n\n{table(files.read_json(path))}" for path in given.table))
        return 0
    if not given.model_dir or not given.json:
        p.error("MODEL_DIR and --json are needed")
    if given.jobs > 1 and not given.reference:
        p.error("--jobs needs --reference FILE, which all of them read")
    return all_rows(given) if given.jobs == 1 else at_once(given)


def all_rows(given: argparse.Namespace) -> int:
    """Measure what is not there yet, one row after the other; returns the exit code."""
    options = [str(given.model_dir), "stock", "--text", str(given.text), "--no-verify", "--greedy", "0"]
    for name in ("windows", "window", "chunk", "trials", "lengths"):
        options += [f"--{name}", getattr(given, name)]
    options += ["--reference", given.reference] if given.reference else []
    options += ["--jobs", str(given.part[1])]  # what a process then takes of the cores
    asked = parser().parse_args(options)
    work = Evaluation(asked, Console(stderr=True, quiet=True))
    old = files.read_json(given.json) if given.json.is_file() else {"rows": []}
    work.results["rows"] = old["rows"]
    done = {row["candidate"] for row in old["rows"]}
    which, parts = given.part
    todo = [row for row in rows() if row.label not in done and given.only in row.label][which::parts]
    reference = parse("stock", given.model_dir)
    work.read(reference)
    if not done:
        for role, chunk in (("reference", asked.chunk), ("floor", asked.chunk // 2)):
            work.results["rows"].append(work.judged(reference, *work.measure(role, reference, chunk)))
        files.write(given.json, json.dumps({"about": made.made(), **work.results}, indent=1) + "\n")
    for row in todo[: given.rows]:
        work.results["rows"].append(measure(work, given.model_dir, row, asked.chunk))
        files.write(given.json, json.dumps({"about": made.made(), **work.results}, indent=1) + "\n")
        last = work.results["rows"][-1]
        print(f"{row.label}: {last.get('mean_kld', last.get('reason'))}", flush=True)
    left = len(todo) - given.rows
    print(f"{left} rows are left" if left > 0 else "all rows are there", flush=True)
    return 3 if left > 0 else 0


def at_once(given: argparse.Namespace) -> int:
    """Run --jobs processes of this command, each on its share of the cores and of the rows; join what they found."""
    first = subprocess.run([*command(given), "--rows", "0"], check=False).returncode  # the reference, with all cores
    if first not in (0, 3):
        return first
    running = []
    for part in range(given.jobs):
        path = given.json.with_name(f"{given.json.name}.{part}")
        if not path.is_file():
            path.write_bytes(given.json.read_bytes())
        asked = [*command(given, path), "--part", str(part), str(given.jobs), "--rows", str(given.rows)]
        running.append((subprocess.Popen(asked), path))
    codes = [process.wait() for process, _ in running]
    found = files.read_json(given.json)
    known = {row["candidate"]: row for _, path in running for row in files.read_json(path)["rows"]}
    order = [*(row["candidate"] for row in found["rows"]), *(row.label for row in rows())]
    kept = [row for row in found["rows"] if row["role"] in ("reference", "floor")]
    labels = dict.fromkeys(order[len(kept) :])
    found["rows"] = kept + [known[label] for label in labels if label in known]
    files.write(given.json, json.dumps(found, indent=1) + "\n")
    for _, path in running:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    return max(codes)


def command(given: argparse.Namespace, path: Path | None = None) -> list[str]:
    """This command again, for one process, its figures in `path`."""
    asked = [sys.executable, __file__, str(given.model_dir), "--json", str(path or given.json)]
    for name in ("text", "windows", "window", "chunk", "trials", "lengths", "only", "reference"):
        asked += [f"--{name}", str(getattr(given, name))]
    return asked


if __name__ == "__main__":
    sys.exit(main())
