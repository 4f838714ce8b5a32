#!/usr/bin/env python3
"""Wrong, damaged and hostile inputs by the thousand, and kills at random moments: what becomes of each.

usage: campaign.py [--cases N] [--kills N] [--whole-kills N] [--soak TOKENS] [--first NUMBER] [--save DIR] [--replay N]

Each case is a number: the same inputs whenever it is asked for. It must end in exit code 0, or in 2 with one line that
says what is wrong; leave the input as it was, and beside OUT_DIR nothing; take no longer than a minute; and what was
verified must be right, as found by arithmetic of its own (worker.py). Anything else is a fault: it is named, and with
--save its folder is kept with the command that makes it again. What ends OpenVINO's process is run once more by the
command itself, which must say so in one line.

Ends with exit code 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import kills
import mutate
import soak
from mutate import ROOT, TINY, Case

PATIENCE = 60  # seconds that a case may take, on a machine that does something else besides
LONGEST = 1100  # characters of an error
FINE = ("refused", "written", "verified and right", "OpenVINO died: said in one line")


class Worker:
    """A process that runs cases; another takes its place when it dies."""

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OVTQ_TELEMETRY": "off"}
        script = Path(__file__).with_name("worker.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, script], text=True, env=env, **pipes)
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def run(self, case: Case, folder: Path) -> dict[str, object] | str:
        """What came of a case: its exit code and all that; or how the process ended."""
        asked = {"folder": str(folder), **dataclasses.asdict(case)}
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=PATIENCE)
        except queue.Empty:
            self.close()
            return "hangs"
        except OSError:
            line = ""
        if line:
            return json.loads(line)
        self.process.wait()
        return f"died ({self.process.returncode})"

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def contents(folder: Path) -> dict[str, str]:
    """Each name below a folder with what it is: links are not followed."""
    found = {}
    for path, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            one = Path(path, name)
            if one.is_symlink():
                what = os.readlink(one)
            elif one.is_file():
                what = hashlib.sha256(one.read_bytes()).hexdigest()
            else:
                what = "folder" if one.is_dir() else "special"
            found[str(one.relative_to(folder))] = what
    return found


def outcome(case: Case, folder: Path, before: dict[str, str], said: dict[str, object] | str) -> str:
    """What became of a case: one of FINE, or a fault in words."""
    if isinstance(said, str):
        return said if said == "hangs" else _by_command(case, folder, before)
    code, lines, apart = said["code"], str(said["stderr"]).splitlines(), said["apart"]
    if code not in (0, 2):
        return f"let out: {code}"
    if code == 2:
        if len(lines) != 1 or not lines[0].startswith(f"ovtq-{case.command}: "):
            return f"{len(lines)} lines: {lines[:2]}"
        if "failed where nothing should" in lines[0]:
            return f"unforeseen: {lines[0]}"
        if len(lines[0]) > LONGEST:
            return f"a line of {len(lines[0])} characters"
    if fault := _left(case, folder, before, code == 0):
        return fault
    if apart is not None:
        return "verified and right" if apart <= 1e-3 else f"verified, but wrong: {apart:.2g} of the spread"
    return "written" if code == 0 else "refused"


def _left(case: Case, folder: Path, before: dict[str, str], written: bool) -> str:
    after = contents(folder)
    asked = [text.removeprefix("--json=") for text in case.arguments if text.startswith("--json=")]
    allowed = {"r.html", *asked} | ({"out"} if written else set())
    # what a killed run set aside is put back; where OUT_DIR is a link, it is where that leads
    allowed |= {"out", "nothing"} if case.kind == "outputs" else set()
    new = {name for name in after if name not in before and name.partition("/")[0] not in allowed}
    if new:
        return f"left behind: {min(new)}"
    known = {name for name in before if not name.startswith(("out", ".out")) or not written}
    if case.kind == "outputs":  # what looked like a killed run's may be tidied up
        known = {name for name in known if not name.startswith((".out", "out"))}
    lost = {name for name in known if after.get(name) != before[name] and name not in asked}
    return f"changed: {min(lost)}" if lost else ""


def _by_command(case: Case, folder: Path, before: dict[str, str]) -> str:
    """What the command says of a case that its work dies of."""
    code = f"import sys; from ovtq.cli.entry import {case.command}; sys.exit({case.command}())"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *case.arguments], capture_output=True, text=True, cwd=folder, env=env,
        timeout=4 * PATIENCE, check=False, errors="replace",
    )  # fmt: skip
    lines = done.stderr.splitlines()
    if done.returncode != 2 or len(lines) != 1:
        return f"died: exit code {done.returncode}, {len(lines)} lines: {lines[:2]}"
    fault = _left(case, folder, before, False)
    return fault or (FINE[3] if " while " in lines[0] else "refused")


def cases(numbers: Sequence[int], save: Path | None = None) -> tuple[collections.Counter[str], list[str]]:
    """How many cases came to what, and the faults."""
    counts: collections.Counter[str] = collections.Counter()
    faults, worker = [], Worker()
    with tempfile.TemporaryDirectory(prefix="ovtq-fuzz-") as base:
        converted = prepared(Path(base))
        for number in numbers:
            folder = Path(base) / "case"
            folder.mkdir()
            case = mutate.make(number, folder, converted)
            before = contents(folder)
            said = worker.run(case, folder)
            if isinstance(said, str):
                worker.close()
                worker = Worker()
            found = outcome(case, folder, before, said)
            counts[found if found in FINE else found.partition(":")[0]] += 1
            if found not in FINE:
                faults.append(f"case {number} ({case.kind}, {case.done}): {found}")
                print(faults[-1], file=sys.stderr)
                if save:
                    keep(number, case, folder, converted, save)
            shutil.rmtree(folder, ignore_errors=True)
    worker.close()
    return counts, faults


def keep(number: int, case: Case, folder: Path, converted: Path, save: Path) -> None:
    """A case's folder as it was made, and what makes it again."""
    place = save / str(number)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    mutate.make(number, place, converted)
    words = ["ovtq-" + case.command, *(text.replace(str(folder), str(place)) for text in case.arguments)]
    (place / "replay.json").write_text(json.dumps({"command": words, "number": number, "done": case.done}, indent=1))


def prepared(base: Path) -> Path:
    """The tiny model as ovtq writes it."""
    code = "import sys; from ovtq.cli.convert import main; sys.exit(main(sys.argv[1:]))"
    options = [str(TINY), str(base / "converted"), "--preset", "exact", "--no-verify"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, *options], check=True, capture_output=True, env=env)
    return base / "converted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; returns its exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=200, metavar="N", help="inputs (default: %(default)s)")
    p.add_argument("--kills", type=int, default=30, metavar="N", help="kills of what writes (default: %(default)s)")
    p.add_argument("--whole-kills", type=int, default=0, metavar="N", help="kills of whole conversions (default: 0)")
    p.add_argument("--soak", type=int, default=0, metavar="TOKENS", help="tokens of one request's life (default: 0)")
    p.add_argument("--first", type=int, default=0, metavar="NUMBER", help="of the first case and kill (default: 0)")
    p.add_argument("--save", type=Path, metavar="DIR", help="keep what failed there, and how to make it again")
    p.add_argument("--replay", type=int, metavar="NUMBER", help="one case alone, kept in --save or ./fuzz-case")
    options = p.parse_args(argv)
    if options.replay is not None:
        options.first, options.cases, options.kills, options.save = (
            options.replay,
            1,
            0,
            options.save or Path("fuzz-case"),
        )
    started = time.monotonic()
    counts, faults = cases(range(options.first, options.first + options.cases), options.save)
    for name, number in counts.most_common():
        print(f"{number:6,} cases: {name}")
    for label, count, run in (("kills", options.kills, kills.light), ("whole kills", options.whole_kills, kills.whole)):
        if count:
            found, wrong = run(range(options.first, options.first + count))
            faults += wrong
            for name, number in found.most_common():
                print(f"{number:6,} {label}: {name}")
    if options.soak:
        said, wrong = soak.soak(options.soak)
        faults += wrong
        print(said)
    print(f"{len(faults)} faults in {time.monotonic() - started:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
