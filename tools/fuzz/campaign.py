#!/usr/bin/env python3
"""Wrong, damaged and hostile inputs by the thousand, and kills at random moments: what becomes of each.

usage: campaign.py [--cases N] [--kills N] [--whole-kills N] [--windows-kills N] [--soak TOKENS] [--jobs N]
                   [--first NUMBER] [--save DIR] [--log FILE] [--json FILE] [--replay N]

Each case is a number: the same inputs whenever it is asked for. It must end in exit code 0, or in 2 with one line that
says what is wrong; leave the input as it was, and beside what it was to write nothing, among temporary files neither;
take no longer than a minute; and what was verified must be right, as found by arithmetic of its own (worker.py).
Anything else is a fault: it is named, and with --save its folder is kept with the command that makes it again. What
ends OpenVINO's process is run once more by the command itself, which must say so in one line.

--jobs runs as many at a time, each on a core of its own. With --log each result is a line of that file as soon as it
is known, and what the file has already is not done again. As root the processes give up the right to pass by the
rights of files.

Ends with exit code 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cases as made
import kills
from mutate import MINI, ROOT, TINY, Case

PATIENCE = 60  # seconds that a case may take, where others are run beside it twice as many
LONGEST = 1100  # characters of an error
FINE = ("refused", "written", "verified and right", "OpenVINO died: said in one line")
OUTPUTS = ("--json=", "--output=", "--report=", "--out=")
KILLS = {"kills": kills.light, "whole kills": kills.whole, "windows kills": kills.windows}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OVTQ_TELEMETRY": "off", "PYTHONDONTWRITEBYTECODE": "1"}


def bounded(core: int | None) -> Callable[[], None]:
    """What a new process does first: it keeps to a core, and the rights of files hold for root, too."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def bind() -> None:
        if core is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {core})
        if libc and os.geteuid() == 0:
            for right in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
                libc.prctl(24, right, 0, 0, 0)  # PR_CAPBSET_DROP

    return bind


class Worker:
    """A process that runs cases; another takes its place when it dies."""

    def __init__(self, temporary: Path, core: int | None = None) -> None:
        env = {**ENVIRONMENT, "TMPDIR": str(temporary)}
        script = Path(__file__).with_name("worker.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(
            [sys.executable, script], text=True, env=env, preexec_fn=bounded(core), start_new_session=True, **pipes
        )
        self.patience = PATIENCE if core is None else 2 * PATIENCE
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
            line = self.lines.get(timeout=self.patience)
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
        """End it, and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
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


def outcome(case: Case, folder: Path, before: dict[str, str], said: dict[str, object] | str, temporary: Path) -> str:
    """What became of a case: one of FINE, or a fault in words."""
    if isinstance(said, str):
        return said if said == "hangs" else _by_command(case, folder, before, temporary)
    code, lines, apart = said["code"], str(said["stderr"]).splitlines(), said["apart"]
    if code not in (0, 2):
        return f"let out: {code}"
    if code == 2 and (fault := _said(case, lines)):
        return fault
    if fault := _left(case, folder, before, code == 0) or _temporary(temporary):
        return fault
    if apart is not None:
        return "verified and right" if apart <= 1e-3 else f"verified, but wrong: {apart:.2g} of the spread"
    return "written" if code == 0 else "refused"


def _said(case: Case, lines: Sequence[str]) -> str:
    """What is wrong with the lines of an error; empty if nothing is."""
    if "--debug" in case.arguments:  # a trace, and the line below it
        lines = lines[-1:]
    if case.command == "doctor":  # which tells how far it is
        lines = [line for line in lines if not line.startswith("[")]
    if len(lines) != 1 or not lines[0].startswith(f"ovtq-{case.command}: "):
        return f"{len(lines)} lines: {lines[:2]}"
    if "failed where nothing should" in lines[0]:
        return f"unforeseen: {lines[0]}"
    if len(lines[0]) > LONGEST:
        return f"a line of {len(lines[0])} characters"
    return ""


def _left(case: Case, folder: Path, before: dict[str, str], written: bool) -> str:
    after = contents(folder)
    named = [text.partition("=")[2] for text in case.arguments if text.startswith(OUTPUTS)]
    paths = [os.path.relpath(os.path.join(folder, name), folder) for name in named if "\0" not in name]
    allowed = {*(path.partition("/")[0] for path in paths), *case.always} - {"model"}
    allowed |= {*case.made} if written else set()
    # what a killed run set aside is put back; where OUT_DIR is a link, it is where that leads
    allowed |= {"out", "nothing"} if case.kind == "outputs" else set()
    new = {name for name in after if name not in before and name.partition("/")[0] not in allowed}
    new -= {*case.made}
    if new:
        return f"left behind: {min(new)}"
    known = {name for name in before if name.partition("/")[0] not in allowed}
    if case.kind == "outputs":  # what looked like a killed run's may be tidied up
        known = {name for name in known if not name.startswith((".out", "out"))}
    lost = {name for name in known if after.get(name) != before[name]}
    return f"changed: {min(lost)}" if lost else ""


def _temporary(folder: Path) -> str:
    left = [name for name in os.listdir(folder) if not name.startswith("pymp-")]
    for name in left:
        shutil.rmtree(folder / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    return f"left among temporary files: {min(left)}" if left else ""


def _by_command(case: Case, folder: Path, before: dict[str, str], temporary: Path) -> str:
    """What the command says of a case that its work dies of."""
    shutil.rmtree(temporary)
    temporary.mkdir()
    if case.command == "library":
        return f"died: {case.arguments}"
    name = {"eval": "evaluate"}.get(case.command, case.command)
    work = f"run_command({name!r}, name={case.command!r})"
    work = {"demo": "run_command('demo', package='ovtq')", "convert": "convert()"}.get(case.command, work)
    code = f"import sys; from ovtq.cli import entry; sys.exit(entry.{work})"
    done = subprocess.run(
        [sys.executable, "-c", code, *case.arguments], capture_output=True, text=True, cwd=folder,
        env={**ENVIRONMENT, "TMPDIR": str(temporary)}, timeout=4 * PATIENCE, check=False, errors="replace",
    )  # fmt: skip
    lines = done.stderr.splitlines()
    if done.returncode != 2 or len(lines) != 1:
        return f"died: exit code {done.returncode}, {len(lines)} lines: {lines[:2]}"
    fault = _left(case, folder, before, False) or _temporary(temporary)
    return fault or (FINE[3] if " while " in lines[0] else "refused")


class Tally:
    """How many came to what, and the faults, of one kind of work; each as a line of a log as soon as it is known."""

    def __init__(self, name: str, log: Path | None = None) -> None:
        self.name, self.log, self.lock = name, log, threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.done: set[int] = set()
        for line in log.read_text(encoding="utf-8").splitlines() if log and log.exists() else ():
            with contextlib.suppress(ValueError, KeyError):  # the last may be cut off
                entry = json.loads(line)
                if entry["work"] == name:
                    self._take(entry["number"], entry["outcome"], entry["fault"])

    def add(self, number: int, found: str, fault: str = "", **more: Any) -> None:
        """One more: what it came to, in few words, and the fault in all; what else the log is to have of it."""
        with self.lock:
            self._take(number, found, fault)
            if fault:
                print(fault, file=sys.stderr)
            if self.log:
                entry = {"work": self.name, "number": number, "outcome": found, "fault": fault, **more}
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")

    def _take(self, number: int, found: str, fault: str) -> None:
        self.done.add(number)
        self.counts[found] += 1
        self.faults += [fault] if fault else []


def cases(
    numbers: Sequence[int], save: Path | None = None, jobs: int = 1, tally: Tally | None = None
) -> tuple[collections.Counter[str], list[str]]:
    """How many cases came to what, and the faults."""
    tally = tally or Tally("cases")
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in numbers:
        if number not in tally.done:
            todo.put(number)
    cores: list[int | None] = [None]
    if jobs > 1:
        every = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
        cores = [every[job % len(every)] for job in range(jobs)]
    with tempfile.TemporaryDirectory(prefix="ovtq-fuzz-") as base:
        prepared(Path(base))
        with ThreadPoolExecutor(jobs) as pool:
            given = [(Path(base), str(job), core, todo, tally, save) for job, core in enumerate(cores)]
            for run in [pool.submit(_serve, *some) for some in given]:
                run.result()
    return tally.counts, tally.faults


def _serve(
    base: Path, name: str, core: int | None, todo: queue.SimpleQueue[int], tally: Tally, save: Path | None
) -> None:
    """Cases, one after the other, until there are no more."""
    temporary, folder = base / name / "tmp", base / name / "case"
    temporary.mkdir(parents=True)
    worker = Worker(temporary, core)
    while not todo.empty():
        try:
            number = todo.get_nowait()
        except queue.Empty:
            break
        folder.mkdir()
        case = made.make(number, folder, base)
        before, started = contents(folder), time.monotonic()
        said = worker.run(case, folder)
        if isinstance(said, str):
            worker.close()
            worker = Worker(temporary, core)
        found = outcome(case, folder, before, said, temporary)
        fine = found in FINE
        fault = "" if fine else f"case {number} ({case.kind}, {case.done}): {found}"
        if fault and save:
            keep(number, case, folder, base, save)
        seconds = round(time.monotonic() - started, 2)
        tally.add(number, found if fine else found.partition(":")[0], fault, kind=case.kind, seconds=seconds)
        _remove(folder)
    worker.close()


def _remove(folder: Path) -> None:
    """A folder, whatever the rights in it are."""
    for path, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def keep(number: int, case: Case, folder: Path, base: Path, save: Path) -> None:
    """A case's folder as it was made, and what makes it again."""
    place = save / str(number)
    _remove(place)
    place.mkdir(parents=True)
    made.make(number, place, base)
    words = ["ovtq-" + case.command, *(text.replace(str(folder), str(place)) for text in case.arguments)]
    (place / "replay.json").write_text(json.dumps({"command": words, "number": number, "done": case.done}, indent=1))


def prepared(base: Path) -> Path:
    """What cases are made from: the tiny model as ovtq writes it, one with kernels, statistics of the bundled one."""
    convert = "import sys; from ovtq.cli.convert import main; sys.exit(main(sys.argv[1:]))"
    calibrate = convert.replace("convert", "calibrate")
    for code, options in (
        (convert, [TINY, base / "converted", "--preset", "exact", "--no-verify"]),
        (convert, [MINI, base / "kernels", "--preset", "k6v4", "--kernels", "--capacity", "1024", "--no-verify"]),
        (calibrate, [MINI, "--tokens", "64", "--output", base / "stats.npz"]),
    ):
        subprocess.run([sys.executable, "-c", code, *options], check=True, capture_output=True, env=ENVIRONMENT)
    return base


def killed(tally: Tally, numbers: Sequence[int], run: Callable[[Sequence[int]], kills.Found], jobs: int) -> None:
    """Kills in portions, as many of these at a time as there are jobs."""
    todo = [number for number in numbers if number not in tally.done]
    each = min(max(-(-len(todo) // jobs), 1), 25)
    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(run, [todo[at : at + each] for at in range(0, len(todo), each)]):
            for number, what, fault in found:
                tally.add(number, what, fault)


def soaked(tally: Tally, tokens: int, jobs: int) -> list[str]:
    """A request's life in one process, pipelines' in the others: what was found, in a line each."""
    others = max(jobs - 1, 1)
    shares = [("requests", tokens, 0), *(("pipeline", tokens // others, job) for job in range(1, others + 1))]

    def run(share: tuple[str, int, int]) -> str:
        words = [sys.executable, Path(__file__).with_name("soak.py"), *map(str, share)]
        done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=False)
        said = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()] or ["nothing was said"]
        what = f"{share[0]}: {'a fault' if done.returncode else 'equal'}"
        tally.add(share[2], what, said[-1] if done.returncode else "")
        return said[-1]

    with ThreadPoolExecutor(jobs) as pool:
        return [*pool.map(run, [share for share in shares if share[2] not in tally.done])]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; returns its exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=200, metavar="N", help="inputs (default: %(default)s)")
    p.add_argument("--kills", type=int, default=30, metavar="N", help="kills of what writes (default: %(default)s)")
    p.add_argument("--whole-kills", type=int, default=0, metavar="N", help="kills of whole conversions (default: 0)")
    p.add_argument("--windows-kills", type=int, default=0, metavar="N", help="kills under Wine (default: 0)")
    p.add_argument("--soak", type=int, default=0, metavar="TOKENS", help="tokens of one request's life (default: 0)")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time (default: 1)")
    p.add_argument("--first", type=int, default=0, metavar="NUMBER", help="of the first case and kill (default: 0)")
    p.add_argument("--save", type=Path, metavar="DIR", help="keep what failed there, and how to make it again")
    p.add_argument("--log", type=Path, metavar="FILE", help="results as they come; those in it are not sought again")
    p.add_argument("--json", type=Path, metavar="FILE", help="write counts and faults")
    p.add_argument("--replay", type=int, metavar="NUMBER", help="one case alone, kept in --save or ./fuzz-case")
    options = p.parse_args(argv)
    if options.replay is not None:
        options.first, options.cases, options.kills = options.replay, 1, 0
        options.save = options.save or Path("fuzz-case")
    started, said = time.monotonic(), []
    tallies = {name: Tally(name, options.log) for name in ("cases", *KILLS, "soak")}
    for name, run in KILLS.items():
        if count := getattr(options, name.replace(" ", "_")):
            killed(tallies[name], range(options.first, options.first + count), run, options.jobs)
    if options.soak:
        said = soaked(tallies["soak"], options.soak, options.jobs)
    if options.cases:
        numbers = range(options.first, options.first + options.cases)
        cases(numbers, options.save, options.jobs, tallies["cases"])
    for name, tally in tallies.items():
        for found, number in tally.counts.most_common():
            print(f"{number:6,} {name}: {found}")
    print(*said, sep="\n")
    faults = [fault for tally in tallies.values() for fault in tally.faults]
    seconds = time.monotonic() - started
    if options.json:
        facts: dict[str, Any] = {name: dict(tally.counts.most_common()) for name, tally in tallies.items()}
        facts |= {"soaked": said, "faults": faults, "seconds": round(seconds), "jobs": options.jobs}
        facts["strace"] = bool(shutil.which("strace"))
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{len(faults)} faults in {seconds:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
