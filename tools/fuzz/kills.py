"""Kills at random moments: what is there afterwards, and after the next run has tidied up."""

from __future__ import annotations

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

import psutil

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny-transformers-5.5"
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What a conversion does to the disk, and nothing else: names, files, flushes.
LIGHT = """import os, sys, time
from pathlib import Path
from ovtq import signals, staging
def slowly(work):
    def slow(*given, **more):
        try:
            return work(*given, **more)
        finally:
            time.sleep(0.008)
    return slow
if len(sys.argv) > 3:
    for name in ("rename", "fsync", "mkdir", "unlink", "rmdir"):
        setattr(os, name, slowly(getattr(os, name)))
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

Found = list[tuple[int, str, str]]  # number, what it came to, the fault in all


def light(numbers: Sequence[int]) -> Found:
    """Of the writing alone, each step of which strace delays; where it is not there, Python's functions do."""
    slow = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={SLOWED}"]
    slow += ["-e", f"inject={SLOWED}:delay_exit=8000"]
    command = [*(slow if shutil.which("strace") else []), sys.executable, "-c", LIGHT]

    def make(out: Path, number: int) -> list[str]:
        return [*command, str(out), f"{number} ", *([] if shutil.which("strace") else ["slowly"])]

    return _kills(numbers, make, _is_one_text, ready=True, span=0.4)


def whole(numbers: Sequence[int]) -> Found:
    """Of the command, of both its processes or one of them; every third one verifies what it writes."""

    def make(out: Path, number: int) -> list[str]:
        preset = ("exact", "rotate", "u8")[number % 3]
        verify = ["--verify-layers", "2", "--target", "cpu"] if number % 3 == 0 else ["--no-verify"]
        return [sys.executable, "-c", WHOLE, str(TINY), str(out), "--force", "--preset", preset, *verify]

    def complete(out: Path) -> bool:
        names = {path.name for path in TINY.iterdir()} | {"ovtq.json", "README.md"}
        sizes = [path.stat().st_size for path in out.iterdir()]
        return {path.name for path in out.iterdir()} == names and all(sizes)

    return _kills(numbers, make, complete, ready=False, span=4.0)


def windows(numbers: Sequence[int]) -> Found:
    """Of the writing alone in the Windows Python of tools/windows: each run tidies up what the killed one left.

    The last run is let be, and must leave OUT_DIR alone.
    """
    found: Found = []
    with tempfile.TemporaryDirectory(prefix="ovtq-kills-") as base:
        out = Path(base) / "runs" / "out"
        out.parent.mkdir()

        def begun(number: int) -> subprocess.Popen[bytes]:
            words = ["Z:" + str(out).replace("/", "\\"), f"{number} ", "slowly"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            return subprocess.Popen(
                [ROOT / "tools" / "windows" / "run", "-c", LIGHT, *words], start_new_session=True, **pipes
            )

        def half() -> str:
            return "OUT_DIR is half a result" if out.exists() and not _is_one_text(out) else ""

        begun(0).communicate()
        for number in numbers:
            process = begun(number)
            process.stdout.readline()
            draw = random.Random(number)
            if number % 6:  # while it writes, which is a small part of such a process; the others at any moment
                while process.poll() is None and set(os.listdir(out.parent)) <= {"out"}:
                    time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.5 if number % 6 else 3.0))
            ended = process.poll() is not None
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            beside, fault = len(os.listdir(out.parent)) - out.exists(), half()
            what = "ended before" if ended else f"SIGKILL: {'a fault' if fault else 'whole'}"
            what += f", {'something' if beside else 'nothing'} beside it"
            found.append((number, what, f"kill {number} under Wine: {fault}" if fault else ""))
        begun(0).communicate()
        left = os.listdir(out.parent)
        if left != ["out"] or half():
            found.append((-1, "a fault", f"after the last run: {sorted(left)} {half()}"))
    return found


def _is_one_text(out: Path) -> bool:
    """Whether a folder holds what one run of LIGHT writes, and all of it."""
    return len({path.read_text() for path in out.rglob("*") if path.is_file()}) == 1 and len(list(out.rglob("*"))) == 5


def _kills(
    numbers: Sequence[int],
    make: Callable[[Path, int], list[str]],
    is_whole: Callable[[Path], bool],
    ready: bool,
    span: float,
) -> Found:
    found: Found = []
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
            kind, whom = draw.choice(SIGNALS), draw.choice(("group", "group", "first", "second"))
            whom = "group" if ready else whom
            ended = process.poll() is not None
            try:
                _send(process.pid, kind, whom)
            except (ProcessLookupError, psutil.NoSuchProcess):
                ended = True
            process.communicate()
            fault = _after(out, is_whole)
            what = "ended before" if ended else f"{kind.name}: {'a fault' if fault else 'whole and tidy'}"
            found.append((number, what, f"kill {number} ({kind.name} of {whom}): {fault}" if fault else ""))
            if fault:
                shutil.rmtree(out.parent)
                out.parent.mkdir()
                subprocess.run(make(out, 0), check=True, capture_output=True, env=env)
    return found


def _send(number: int, kind: signal.Signals, whom: str) -> None:
    """To a process group, or to the process that watches, or the one that works."""
    if whom == "second" and (found := psutil.Process(number).children()):
        found[0].send_signal(kind)
    elif whom == "group":
        os.killpg(number, kind)
    else:
        os.kill(number, kind)


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
