"""Kills at random moments: what is there afterwards, and after the next run has tidied up."""

from __future__ import annotations

import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny-transformers-5.5"
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What a conversion does to the disk, and nothing else: names, files, flushes.
LIGHT = """import sys
from pathlib import Path
from ovtq import signals, staging
signals.interrupt()
print("ready", flush=True)
try:
    with staging.staged(Path(sys.argv[1])) as folder:
        (folder / "sub").mkdir()
        for name in ("ovtq.json", "a", "b", "sub/c"):
            (folder / name).write_text(sys.argv[2] * 2000)
except KeyboardInterrupt:
    sys.exit(2)
"""
WHOLE = "import sys; from ovtq.cli.entry import convert; sys.exit(convert())"
SLOWED = "rename,fsync,mkdir,unlink,unlinkat,rmdir,flock"

Found = tuple[collections.Counter[str], list[str]]


def light(numbers: Sequence[int]) -> Found:
    """Of the writing alone, each step of which strace delays where it is there."""
    slow = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={SLOWED}"]
    slow += ["-e", f"inject={SLOWED}:delay_exit=8000"]
    command = [*(slow if shutil.which("strace") else []), sys.executable, "-c", LIGHT]

    def make(out: Path, number: int) -> list[str]:
        return [*command, str(out), f"{number} "]

    def whole(out: Path) -> bool:
        texts = {path.read_text() for path in out.rglob("*") if path.is_file()}
        return len(texts) == 1 and len(list(out.rglob("*"))) == 5

    return _kills(numbers, make, whole, ready=True, span=0.7)


def whole(numbers: Sequence[int]) -> Found:
    """Of the command, without verification."""

    def make(out: Path, number: int) -> list[str]:
        preset = ("exact", "rotate", "u8")[number % 3]
        return [sys.executable, "-c", WHOLE, str(TINY), str(out), "--force", "--no-verify", "--preset", preset]

    def complete(out: Path) -> bool:
        names = {path.name for path in TINY.iterdir()} | {"ovtq.json"}
        sizes = [path.stat().st_size for path in out.iterdir()]
        return {path.name for path in out.iterdir()} == names and all(sizes)

    return _kills(numbers, make, complete, ready=False, span=4.0)


def _kills(
    numbers: Sequence[int],
    make: Callable[[Path, int], list[str]],
    is_whole: Callable[[Path], bool],
    ready: bool,
    span: float,
) -> Found:
    counts: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="ovtq-kills-") as base:
        out = Path(base) / "runs" / "out"
        out.parent.mkdir()
        subprocess.run(make(out, 0), check=True, capture_output=True, env=env)
        for number in numbers:
            draw = random.Random(number)
            process = subprocess.Popen(
                make(out, number), env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            if ready:
                process.stdout.readline()
            time.sleep(draw.uniform(0, span))
            kind = draw.choice(SIGNALS)
            ended = process.poll() is not None
            try:
                os.killpg(process.pid, kind)
            except ProcessLookupError:
                ended = True
            process.communicate()
            fault = _after(out, is_whole)
            counts["ended before" if ended else f"{kind.name}: " + ("a fault" if fault else "whole and tidy")] += 1
            if fault:
                faults.append(f"kill {number} ({kind.name}): {fault}")
                print(faults[-1], file=sys.stderr)
                shutil.rmtree(out.parent)
                out.parent.mkdir()
                subprocess.run(make(out, 0), check=True, capture_output=True, env=env)
    return counts, faults


def _after(out: Path, is_whole: Callable[[Path], bool]) -> str:
    """What is wrong after a kill; empty if nothing is."""
    from ovtq import staging

    if out.exists() and not is_whole(out):
        return "OUT_DIR is half a result"
    for _ in range(100):  # who was not killed itself, but lost its parent, ends by itself
        staging.tidy_up(out)
        if os.listdir(out.parent) == ["out"]:
            break
        time.sleep(0.1)
    if os.listdir(out.parent) != ["out"]:
        return f"left behind: {sorted(os.listdir(out.parent))}"
    return "" if is_whole(out) else "the result that was put back is not whole"
