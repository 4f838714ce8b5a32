"""`ovtq COMMAND`, and what a newcomer types first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MINI

from ovtq import __version__
from ovtq.cli import entry as cli
from ovtq.cli.inspect import main


def ovtq(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ovtq", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_every_command_is_behind_the_one_name() -> None:
    done = ovtq()
    assert done.returncode == 0
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout
        said = ovtq(name, "--help")
        assert (said.returncode, f"usage: ovtq-{name} " in said.stdout) == (0, True), said.stderr
    assert ovtq("--version").stdout == f"ovtq {__version__}\n"


def test_the_same_command_by_both_names() -> None:
    one = ovtq("inspect", MINI, "--json")
    code = "import sys; from ovtq.cli.entry import inspect; sys.exit(inspect())"
    other = subprocess.run([sys.executable, "-c", code, MINI, "--json"], capture_output=True, text=True, check=False)
    assert (one.returncode, one.stdout) == (0, other.stdout)
    wrong = ovtq("convert", "nowhere")
    assert (wrong.returncode, wrong.stderr) == (2, "ovtq-convert: OUT_DIR is missing (only --dry-run does without)\n")


def test_a_command_that_is_not_there() -> None:
    done = ovtq("convrt", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no command 'convrt'; there are convert, infer," in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="closes a descriptor as a shell on Linux does")
def test_a_closed_stdout_is_no_fault() -> None:
    done = subprocess.run(
        f"exec {sys.executable} -m ovtq inspect {MINI} --context 1k >&-",
        shell=True, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("OpenVINO/gpt-oss-20b-int4-ov", "hf download OpenVINO/gpt-oss-20b-int4-ov --local-dir gpt-oss-20b-int4-ov"),
        ("openai/gpt-oss-20b", "optimum-cli export openvino --model openai/gpt-oss-20b --weight-format int4 "),
    ],
)
def test_a_name_on_the_hub_says_how_to_get_it(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([name]) == 2
    assert said in capsys.readouterr().err
    (tmp_path / name).parent.mkdir()  # then it is a path with a slip in it
    assert main([name]) == 2
    assert capsys.readouterr().err == f"ovtq-inspect: {name}: no such folder\n"
