"""Conversions that are interrupted, killed, or run twice at once: nothing is lost, nothing is left."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import COMMAND, MINI, TINY, fingerprint

from ovtq import staging
from ovtq.cli.convert import main
from ovtq.errors import InputError


def _interrupted(out: Path, number: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Start a conversion and send it a signal once it has begun to write.

    As in the background of a script, where SIGINT is ignored, but for that signal itself.
    """
    how = signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN
    process = subprocess.Popen(
        [*COMMAND, MINI, out, *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, how),
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not any(out.parent.glob(f".{out.name}.ovtq-*/openvino_model.xml")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if number == signal.SIGKILL:  # of both its processes: one alone would be tidied up after
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_interruption_leaves_nothing(number: int, tmp_path: Path) -> None:
    done = _interrupted(tmp_path / "out", number)
    assert done.returncode == 2
    assert done.stderr == "ovtq-convert: interrupted; nothing was written\n"
    assert not any(tmp_path.iterdir())


def test_a_folder_of_a_like_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.ovtq-backup").mkdir()
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--no-verify"]) == 0
    assert sorted(os.listdir(tmp_path)) == [".out.ovtq-backup", "out"]


@pytest.mark.parametrize("options", [[], ["--force"]])
def test_of_two_runs_at_once_one_says_that_it_wrote(options: list[str], tmp_path: Path) -> None:
    """What the first to end has written stays; the other one says so, whether it may replace what was there or not."""
    before = None
    if options:
        assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--no-verify", "--preset", "exact"]) == 0
        before = staging.identity(tmp_path / "out")

    def second() -> None:
        with staging.staged(tmp_path / "out") as folder:
            assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--no-verify", "--preset", "k6v4", *options]) == 0
            assert folder.is_dir()

    with pytest.raises(InputError, match="changed meanwhile, by another run"):
        second()
    assert json.loads((tmp_path / "out" / "ovtq.json").read_text())["preset"] == "k6v4"
    assert staging.identity(tmp_path / "out") != before
    assert os.listdir(tmp_path) == ["out"]


def test_odd_names_and_a_reader_that_leaves(tmp_path: Path) -> None:
    out = tmp_path / "out[/x] [red]"
    script = f"{shlex.join(map(str, [*COMMAND, TINY['5.5'], out, '--no-verify']))} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((out / "ovtq.json").read_text())["preset"] == "u8"
    assert main([str(TINY["5.5"]), str(out), "--no-verify", "--force"]) == 0


def test_kill_leaves_no_half_result_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(TINY["5.5"]), str(out)]) == 0
    before = fingerprint(out)
    assert _interrupted(out, signal.SIGKILL, "--force").returncode == -signal.SIGKILL
    assert fingerprint(out) == before
    assert len(os.listdir(tmp_path)) == 3  # the killed run's temporary folder and its lock
    assert main([str(TINY["5.5"]), str(out), "--force", "--preset", "rotate"]) == 0
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_killed_between_its_renames_is_repaired(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(TINY["5.5"]), str(out)]) == 0
    before = fingerprint(out)
    out.rename(tmp_path / ".out.ovtq-0123cdef.old")
    (tmp_path / ".out.ovtq-0123cdef.lock").touch()
    with pytest.raises(KeyboardInterrupt), staging.staged(out):
        raise KeyboardInterrupt
    assert fingerprint(out) == before
    assert os.listdir(tmp_path) == ["out"]
