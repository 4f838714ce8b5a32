"""ovtq on Windows: beside other programs, and the demo."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_windows import INSTALLED, RUN, python, windows

pytestmark = [
    pytest.mark.windows,
    pytest.mark.skipif(not INSTALLED.exists(), reason="run tools/windows/install"),
]


@pytest.mark.slow
def test_what_other_programs_have_open(tmp_path: Path) -> None:
    """A folder held open for half a second is waited for; for longer it is said, and nothing is lost or left."""
    code = """import ctypes, os, stat, sys, threading
from pathlib import Path
from ovtq import staging, system
from ovtq.errors import InputError
windows = ctypes.WinDLL("kernel32")
windows.CreateFileW.restype = ctypes.c_void_p
base = Path(sys.argv[1])
def hold(path):
    handle = windows.CreateFileW(str(path), 0x80000000, 1, None, 3, 0x02000000, None)  # shared with readers
    assert handle not in (None, ctypes.c_void_p(-1).value)
    return lambda: windows.CloseHandle(ctypes.c_void_p(handle))
def convert():
    with staging.staged(base / "out") as folder:
        (folder / "new").touch()
convert()
(base / "out" / "new").rename(base / "out" / "old")
release = hold(base / "out")
try:
    convert()
except InputError as error:
    print(error)
print(os.listdir(base), os.listdir(base / "out"))
threading.Timer(0.5, release).start()
convert()
print(os.listdir(base), os.listdir(base / "out"))
(base / "gone" / "sub").mkdir(parents=True)
(base / "gone" / "sub" / "file").touch()
os.chmod(base / "gone" / "sub" / "file", stat.S_IREAD)
release = hold(base / "gone" / "sub" / "file")
print(system.remove(base / "gone"))
release()
print(system.remove(base / "gone"), os.listdir(base))"""
    said = python(code, tmp_path).stdout.splitlines()
    assert re.fullmatch(r"Z:.*: can't write there \(in use by another program, or not allowed; close .*\)", said[0])
    assert said[1:] == ["['out'] ['old']", "['out'] ['new']", "False", "True ['out']"]


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """Both models write the same text, and it is the text that they write on Linux."""
    (tmp_path / "here").mkdir()
    done = subprocess.run([RUN, "-m", "ovtq.demo", windows(tmp_path / "there")], capture_output=True, check=False)
    there = done.stdout.decode()
    here = subprocess.check_output([sys.executable, "-m", "ovtq.demo", tmp_path / "here"], encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, there + done.stderr.decode()
    for begin in ("asked for a fact", "continues:", "the same", "after "):
        lines = [[line for line in text.splitlines() if line.startswith(begin)] for text in (here, there)]
        assert lines[0]
        assert [line.split() for line in lines[0]] == [line.split() for line in lines[1]]
