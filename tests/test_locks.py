"""Locks beside a result, and what a run that was killed leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import COMMAND, TINY

from ovtq import staging, system
from ovtq.cli.convert import main
from ovtq.ir import io


def _lock_and_die(path: Path) -> None:
    code = f"import os; from pathlib import Path; from ovtq.system import Lock; Lock(Path({str(path)!r})); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    _lock_and_die(path)
    assert path.exists()
    held = system.Lock(path)
    code = f"from pathlib import Path; from ovtq.system import Lock; Lock(Path({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "BlockingIOError" in done.stderr
    held.release(keep=True)
    assert path.exists()
    system.Lock(path).release(keep=False)
    assert not path.exists()


def test_only_what_has_a_lock_file_is_tidied(tmp_path: Path) -> None:
    """Folders of such names, without one or with one that is held, are left alone."""
    out = tmp_path / "out"
    for name in (".out.ovtq-00000001", ".out.ovtq-00000002", ".out.ovtq-00000002.gone", ".out.ovtq-00000003.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    _lock_and_die(tmp_path / ".out.ovtq-00000002.lock")
    (tmp_path / ".out.ovtq-x.lock").touch()
    held = system.Lock(tmp_path / ".out.ovtq-00000004.lock")
    (tmp_path / ".out.ovtq-00000004").mkdir()
    with staging.staged(out):
        pass
    left = {".out.ovtq-00000001", ".out.ovtq-00000003.old", ".out.ovtq-00000004", ".out.ovtq-00000004.lock"}
    assert set(os.listdir(tmp_path)) == {*left, ".out.ovtq-x.lock", "out"}
    held.release(keep=False)


def test_long_names(tmp_path: Path) -> None:
    """The names beside it are longer than OUT_DIR's, which may have all that the file system allows."""
    for name in ("é" * 127, "o" * 255):
        with staging.staged(tmp_path / name) as folder:
            (folder / "file").touch()
        assert os.listdir(tmp_path / name) == ["file"]
    assert len(os.listdir(tmp_path)) == 2


def _killed(out: Path, after: float) -> None:
    process = subprocess.Popen(
        [*COMMAND, TINY["5.5"], out, "--force"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_fifty_kills_leave_nothing(tmp_path: Path) -> None:
    """At random moments; the old result is whole after each, and one more run tidies up after all."""
    out, draw = tmp_path / "out", np.random.default_rng(0)
    started = time.monotonic()
    assert main([str(TINY["5.5"]), str(out)]) == 0
    length = 1.5 * (time.monotonic() - started) + 2  # and what starting Python takes
    left = set()
    for _ in range(50):
        _killed(out, draw.uniform(0.1, length))
        left |= set(os.listdir(tmp_path))
        if out.exists():  # otherwise it is set aside, and the next run puts it back
            assert json.loads((out / io.RECORD).read_text())["verified"]["layers"] == 4
    assert len(left) > 10
    assert main([str(TINY["5.5"]), str(out), "--force", "--no-verify"]) == 0
    assert os.listdir(tmp_path) == ["out"]
