"""Work in a process of its own: its death is one line and leaves nothing, whoever asked for it, and however it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY

import ovtq
from ovtq import child
from ovtq.errors import InputError

COMMAND = [sys.executable, "-c", "import sys; from ovtq.cli.entry import convert; sys.exit(convert())"]
INSPECT = [sys.executable, "-c", "import sys; from ovtq.cli.entry import inspect; sys.exit(inspect())"]
# A command whose work harms itself once it is at something; given to the child by its parent's sys.path.
HARM = """import os, signal, sys
from ovtq import whereabouts
at = whereabouts.at
def harm(what):
    at(what)
    if what.startswith({when!r}):
        {how}
whereabouts.at = harm
"""


def harmed(tmp_path: Path, when: str, how: str) -> dict[str, str]:
    """The environment of a command that comes to harm: a module that every Python of it loads when it starts."""
    place = tmp_path / "site"
    place.mkdir()
    (place / "sitecustomize.py").write_text(HARM.format(when=when, how=how))
    return {**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGSEGV, "OpenVINO died of SIGSEGV"),
        (signal.SIGKILL, "killed by the system (SIGKILL; out of memory?)"),
        pytest.param(signal.SIGBUS, "OpenVINO died of SIGBUS", marks=pytest.mark.slow),
        pytest.param(signal.SIGFPE, "OpenVINO died of SIGFPE", marks=pytest.mark.slow),
    ],
)
def test_a_death_is_one_line_and_leaves_nothing(number: int, line: str, tmp_path: Path) -> None:
    """While it verifies, with an older result that stays, and without one, where folders around OUT_DIR were made."""
    (tmp_path / "runs").mkdir()
    env = harmed(tmp_path, "running the original", f"os.kill(os.getpid(), {number:d})")
    done = subprocess.run(
        [*COMMAND, TINY["5.5"], tmp_path / "runs" / "a" / "b" / "out"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"ovtq-convert: {line} while running the original; nothing was written\n"
    assert not any((tmp_path / "runs").iterdir())


def test_a_death_leaves_the_old_result(convert: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "runs" / "out"
    shutil.copytree(convert(TINY["5.5"], "--preset", "exact"), out)
    before = (out / "ovtq.json").read_bytes()
    env = harmed(tmp_path, "copying its weights", "os.abort()")
    done = subprocess.run(
        [*COMMAND, TINY["5.5"], out, "--force", "--no-verify"], capture_output=True, text=True, env=env, check=False
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert (out / "ovtq.json").read_bytes() == before
    assert os.listdir(out.parent) == ["out"]


def test_what_a_library_says_when_it_dies_is_in_the_line(tmp_path: Path) -> None:
    """And is all there with --debug; when nothing is wrong it is shown as it is."""
    how = 'os.write(2, b"terminate called\\n  what():  no memory\\n")'
    env = harmed(tmp_path, "reading", f"{how}; os.abort()")
    done = subprocess.run([*INSPECT, TINY["5.5"]], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    xml = TINY["5.5"] / "openvino_model.xml"
    assert done.stderr == f"ovtq-inspect: OpenVINO died of SIGABRT while reading {xml} (what():  no memory)\n"
    done = subprocess.run([*INSPECT, TINY["5.5"], "--debug"], capture_output=True, text=True, env=env, check=False)
    assert done.stderr.startswith("terminate called\n  what():  no memory\novtq-inspect: ")
    shutil.rmtree(tmp_path / "site")
    env = harmed(tmp_path, "reading", how)
    done = subprocess.run([*INSPECT, TINY["5.5"]], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0
    assert set(done.stderr.splitlines()) == {"terminate called", "  what():  no memory"}


def test_a_model_that_kills_openvino(tiny_copy: Path, tmp_path: Path) -> None:
    """Layers nested so deep that OpenVINO's reader runs out of stack: nothing of it is ours."""
    xml = tiny_copy / "openvino_model.xml"
    text = xml.read_text()
    xml.write_text(text.replace("<rt_info>", "<rt_info>" + "<x>" * 300_000 + "</x>" * 300_000, 1))
    done = subprocess.run([*COMMAND, tiny_copy, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["model"]


def _children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Killed, it can tell nobody; the child stops by itself and tidies up."""
    env = harmed(tmp_path, "running the original", "open('at', 'w').close()")
    process = subprocess.Popen([*COMMAND, TINY["5.5"], tmp_path / "runs" / "out"], env=env, cwd=tmp_path)
    while not (tmp_path / "at").exists():
        assert process.poll() is None
        time.sleep(0.02)
    (worker,) = _children(process)
    process.kill()
    process.wait()
    worker.wait(60)
    assert not (tmp_path / "runs").exists()


def test_a_kill_of_the_child_alone_is_said(tmp_path: Path) -> None:
    env = harmed(tmp_path, "running the original", "open('at', 'w').close()")
    process = subprocess.Popen([*COMMAND, TINY["5.5"], tmp_path / "out"], env=env, cwd=tmp_path, stderr=subprocess.PIPE)
    while not (tmp_path / "at").exists():
        assert process.poll() is None
        time.sleep(0.02)
    _children(process)[0].kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.decode().startswith("ovtq-convert: killed by the system (SIGKILL; out of memory?) while running the ")
    assert sorted(os.listdir(tmp_path)) == ["at", "site"]


def test_from_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A death is an InputError, for a caller whose own process goes on."""
    place = harmed(tmp_path, "running the original", "os.kill(os.getpid(), signal.SIGSEGV)")["PYTHONPATH"]
    monkeypatch.setenv("PYTHONPATH", place)
    heard: list[str] = []
    with pytest.raises(InputError, match=r"^OpenVINO died of SIGSEGV while running the original$"):
        ovtq.convert(TINY["5.5"], tmp_path / "out", on_progress=lambda stage, *_: heard.append(stage))
    assert list(dict.fromkeys(heard)) == ["read", "rewrite", "write", "verify"]
    assert os.listdir(tmp_path) == ["site"]


def test_arguments_that_no_other_process_knows() -> None:
    with pytest.raises(child.Unsendable):
        child.call("json", "dumps", lambda: 1)


def test_what_the_work_raises_is_raised_here() -> None:
    with pytest.raises(json.JSONDecodeError, match="Expecting value") as caught:
        child.call("json", "loads", "")
    assert "in raw_decode" in str(caught.value.__cause__)
    assert child.call("json", "loads", "[1]") == [1]


def test_nothing_is_taken_from_the_working_directory(tmp_path: Path) -> None:
    """A module of a library's name in the folder where a command is run is not run."""
    (tmp_path / "pickle.py").write_text("raise SystemExit('taken')")
    script = tmp_path / "bin" / "ovtq-convert"
    script.parent.mkdir()
    script.write_text("import sys\nfrom ovtq.cli.entry import convert\nsys.exit(convert())\n")
    done = subprocess.run(
        [sys.executable, script, "--version"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ovtq ")


def test_telemetry_is_off(tmp_path: Path) -> None:
    """OpenVINO's asks for a name's address whenever it is imported, and complains of a home it can't write to."""
    pytest.importorskip("openvino_telemetry", reason="without it OpenVINO has none")
    log = tmp_path / "log"
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    env = {**os.environ, "HOME": "/proc/nowhere"}
    command = ["strace", "-f", "-qq", "-e", "trace=socket,connect", "-o", log, *COMMAND, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "AF_INET" not in log.read_text()
