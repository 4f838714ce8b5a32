"""tools/demo.ps1, which no PowerShell was to be had for: it is one, and each command in it is one that runs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "tools" / "demo.ps1"
OWN = ("Set-Location", "Join-Path", "Test-Path", "Write-Host")  # of PowerShell
# The others, with what stands for a file of Windows here; PYTHON is `& $python`, the environment's.
TEXT = """python -m venv .venv
PYTHON -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt -e .[genai]
PYTHON -m ovtq.demo"""
COMMANDS = [line.split() for line in TEXT.splitlines()]


def _commands(source: bytes) -> list[str]:
    """Each command of a script. Raises SyntaxError if it is no PowerShell."""
    tree_sitter = pytest.importorskip("tree_sitter", reason="comes with the extra [dev]")
    grammar = pytest.importorskip("tree_sitter_powershell", reason="comes with the extra [dev]")
    root = tree_sitter.Parser(tree_sitter.Language(grammar.language())).parse(source).root_node
    if root.has_error:
        raise SyntaxError("no PowerShell")
    found, todo = [], [root]
    while todo:
        node = todo.pop()
        todo += reversed(node.children)
        found += [node.text.decode()] if node.type == "command" else []
    return found


def test_it_is_powershell() -> None:
    source = SCRIPT.read_bytes()
    words = [text.replace('"', "").replace("\\", "/").split() for text in _commands(source)]
    others = [["PYTHON", *some[2:]] if some[:2] == ["&", "$python"] else some for some in words]
    assert [some for some in others if some[0] not in OWN] == COMMANDS
    for old, new in ((b"}", b""), (b'"Stop"', b'"Stop'), (b"(-not", b"-not")):
        with pytest.raises(SyntaxError, match="no PowerShell"):
            _commands(source.replace(old, new, 1))


def test_each_command_runs(tmp_path: Path) -> None:
    """The environment without pip, the installation of what is not there, the demo's help."""
    environment, install, demo = COMMANDS
    subprocess.run([sys.executable, *environment[1:-1], "--without-pip", tmp_path / environment[-1]], check=True)
    assert (tmp_path / ".venv" / "pyvenv.cfg").exists()
    if importlib.util.find_spec("pip"):
        wrong = [*install[1:-1], "./nothing"]  # what it is asked for comes last, and all else is right
        done = subprocess.run([sys.executable, *wrong], cwd=ROOT, capture_output=True, text=True, check=False)
        assert "./nothing is not a valid editable requirement" in done.stderr
    assert 'genai = ["openvino-genai' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    said = subprocess.run([sys.executable, *demo[1:], "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python -m ovtq.demo" in said.stdout
