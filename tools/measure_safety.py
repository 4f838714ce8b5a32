#!/usr/bin/env python3
"""What it costs to convert so that nothing is lost: a process of its own for the work, and files flushed to the disk.

usage: measure_safety.py [--model DIR] [--runs N] [--megabytes N] [--folder DIR] [--json FILE] [OPTION…]

Converts a model in turn as ovtq-convert does, without flushing, and without flushing in one process; medians and
quartiles of the seconds, by the clock and of all processors, and ratios to the last way. OPTIONs are ovtq-convert's.
Then a file of N megabytes is written and flushed in the same folder: what the disk takes, from which the flushing of
any model follows.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import made

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 4 << 20
UNFLUSHED = "from ovtq import disk; import os; disk.flush = lambda path: None; os.fsync = lambda number: None\n"
ONE = "import sys\n{before}from ovtq.cli.convert import main\nsys.exit(main())"
# the process that works imports what `sitecustomize` in its path changes
TWO = "import sys\nfrom ovtq.cli.entry import convert\nsys.exit(convert())"


def variants(place: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Code and environment of each way."""
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(UNFLUSHED)
    plain = {**os.environ, "PYTHONPATH": str(ROOT)}
    without = {**os.environ, "PYTHONPATH": f"{place / 'site'}{os.pathsep}{ROOT}"}
    return {
        "as it is": (TWO, plain),
        "without flushing": (TWO, without),
        "without flushing, in one process": (ONE.format(before=UNFLUSHED), plain),
    }


def timed(code: str, environment: dict[str, str], model: Path, out: Path, options: list[str]) -> tuple[float, float]:
    """Seconds of one conversion, and those of all its processors, which other work beside it hardly changes."""
    shutil.rmtree(out, ignore_errors=True)
    started, before = time.perf_counter(), _processors()
    subprocess.run([sys.executable, "-c", code, model, out, *options], env=environment, check=True, capture_output=True)
    return time.perf_counter() - started, _processors() - before


def _processors() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def disk(folder: Path, megabytes: int) -> tuple[float, float]:
    """Seconds of writing a file of random bytes, and of flushing it then."""
    path, block = folder / "large", os.urandom(BLOCK)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range((megabytes << 20) // BLOCK):
            file.write(block)
        file.flush()
        written = time.perf_counter()
        os.fsync(file.fileno())
    flushed = time.perf_counter()
    path.unlink()
    return written - started, flushed - written


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=ROOT / "models" / "gpt-oss-mini", help="(default: the bundled one)")
    p.add_argument("--runs", type=int, default=7, metavar="N", help="of each (default: %(default)s)")
    p.add_argument("--megabytes", type=int, default=1024, metavar="N", help="(default: %(default)s)")
    p.add_argument("--folder", type=Path, default=Path(), help="where to write (default: here)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    options, more = p.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it wrote goes, too
    with tempfile.TemporaryDirectory(prefix="ovtq-", dir=options.folder) as place:
        ways = variants(Path(place))
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(options.runs + 1):  # the first finds the caches cold
            for name, (code, environment) in ways.items():
                taken[name].append(timed(code, environment, options.model, Path(place) / "out", more))
        least, rows = None, {}
        for name, all_of_them in reversed(taken.items()):
            said, middles = [], []
            for what, numbers in zip(("s", "processor seconds"), zip(*all_of_them[1:], strict=True), strict=True):
                low, middle, high = statistics.quantiles(numbers, n=4)
                middles.append(middle)
                ratio = middle / (least or middles)[len(middles) - 1]
                said.append(f"{middle:.2f} {what} ({low:.2f}-{high:.2f}), {ratio:.2f}")
            least = least or middles
            print(f"{name}: {'; '.join(said)}")
            rows[name] = [{"seconds": wall, "processors": used} for wall, used in all_of_them[1:]]
        if options.megabytes:
            write, flush = disk(Path(place), options.megabytes)
            rate = options.megabytes / 1024 / (write + flush)
            print(
                f"{options.megabytes} MiB: written in {write:.2f} s, flushed in {flush:.2f} s, {rate:.2f} GiB/s in all"
            )
            rows["disk"] = {"megabytes": options.megabytes, "written_s": write, "flushed_s": flush}
        made.write(options.json, **rows)


if __name__ == "__main__":
    main()
