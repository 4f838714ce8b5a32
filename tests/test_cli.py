"""`ovtq COMMAND`, and what a newcomer types first."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MINI, TINY

from ovtq import __version__
from ovtq.cli import entry as cli
from ovtq.cli.bench import where_states_turn
from ovtq.cli.command import made_for_another, turns
from ovtq.cli.infer import advice
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
    one = ovtq("inspect", TINY["5.5"], "--json")
    code = "import sys; from ovtq.cli.entry import inspect; sys.exit(inspect())"
    other = subprocess.run(
        [sys.executable, "-c", code, TINY["5.5"], "--json"], capture_output=True, text=True, check=False
    )
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["infer", MINI, "--prompt", "x", "--k-bits", "4"], "bits are chosen when a model is converted: ovtq convert"),
        (["bench", MINI, "--compress-every", "4"], "the graph itself packs tokens"),
        (["infer", "--model-dir", MINI, "--prompt", "x"], "the model's folder is the first argument"),
        (["inspect", MINI, "--preset", "u8"], "an option of ovtq convert"),
    ],
)
def test_a_flag_of_another_place_says_where(arguments: list[object], said: str) -> None:
    done = ovtq(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_where_states_turn_by_hand() -> None:
    """At 9 tokens both take 90 bytes, at 10 the other is the smaller."""
    assert turns(10, 0, 5, 45) == 10
    assert [turns(10, 0, 5, 0), turns(10, 0, 10, 5), turns(10, 9, 10, 5), turns(5, 0, 10, 0)] == [1, None, 0, None]
    stock, other = (
        {"candidate": n, "bytes_per_token": a, "flat_bytes": b} for n, a, b in (("stock", 9, 0), ("x", 5, 40))
    )
    assert list(where_states_turn([stock, other])) == ["x: states smaller than stock's from 11 tokens on"]
    assert list(where_states_turn([stock, other | {"bytes_per_token": None}])) == []


def test_infer_says_from_where_on_a_packed_cache_pays(convert: Callable[..., Path]) -> None:
    folder = convert(TINY["5.5"], "--preset", "k6v4", "--target", "cpu", "--no-verify")
    sizes = json.loads((folder / "ovtq.json").read_text(encoding="utf-8"))["state_bytes"]
    before, after = sizes["before"], sizes["after"]
    tokens = next(n for n in range(9999) if after["flat"] + n * after["per_token"] < n * before["per_token"])
    assert advice(folder, "CPU", 3).endswith(f"as declared (f32) from {tokens:,} tokens on")
    assert advice(folder, "CPU", tokens) == ""
    assert advice(folder, "GPU", tokens) == "made for a CPU, run on GPU: convert with --target gpu"
    assert advice(TINY["5.5"], "CPU", 3) == ""


def test_what_was_made_for_another_device_is_told(convert: Callable[..., Path]) -> None:
    """By infer, eval and bench, in one line; the passes of `rotate` are for all devices."""
    packed = convert(TINY["5.5"], "--preset", "k6v4", "--no-verify")
    assert made_for_another(packed, "GPU.1") == made_for_another(TINY["5.5"], "CPU") == ""
    assert made_for_another(convert(TINY["5.5"], "--preset", "rotate", "--no-verify"), "CPU") == ""
    assert made_for_another(packed, "CPU") == "made for a GPU, run on CPU: convert with --target cpu"


@pytest.mark.slow
def test_bench_tells_it(convert: Callable[..., Path]) -> None:
    packed = convert(TINY["5.5"], "--preset", "k6v4", "--no-verify")
    done = ovtq("bench", TINY["5.5"], packed, "--prefill", "8", "--runs", "1")
    line = "made for a GPU, run on CPU: convert with --target cpu"
    assert (done.returncode, done.stderr) == (0, f"{packed}: {line}\n")


def test_help_has_examples_and_words_and_fits_on_two_screens() -> None:
    said = ovtq("convert", "--help").stdout
    assert said.startswith("usage: ovtq-convert [OPTION…] MODEL_DIR [OUT_DIR]\n\novtq-convert: ")
    assert max(map(len, said.splitlines())) <= 120
    assert len(said.splitlines()) <= 140
    assert "decouple-length" not in said
    assert said.index("examples:") < said.index("options:") < said.index("presets:") < said.index("words:")
    assert "centre" in said
    passes = ovtq("convert", "--help-passes")
    assert (passes.returncode, passes.stdout.startswith("passes and their options:")) == (0, True)
    assert "\n  k8v4             decouple-length, truncate-window, " in passes.stdout
    assert all(
        ovtq(name, "--version").stdout.startswith(f"ovtq {__version__}, openvino ") for name in ("eval", "infer")
    )
