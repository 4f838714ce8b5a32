"""Wrong inputs of the commands that run, measure or report, and of the library: one line each, and nothing lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import figures
import numpy as np
import openvino as ov
import pytest
from conftest import MINI, ROOT, TINY
from test_child import harmed
from test_hostile import DEEP, _encrypted, _npy, _with, line

import ovtq
from ovtq import archives, files
from ovtq.cli import bench, calibrate, command, convert, doctor, evaluate, infer, inspect, report
from ovtq.codec import moments
from ovtq.errors import InputError, OvtqError
from ovtq.runtime.text import Tokenizer

Command = Callable[[list[str]], int]
FIGURES = figures.runs()[0]
CONVERT = "import sys; from ovtq.cli.entry import convert; sys.exit(convert())"
TEXT = ROOT / "tests" / "data" / "heldout.txt"


# ------------------------------------------------------------------------------------------ files


def test_a_file_that_becomes_a_pipe_does_not_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between the look at it and the opening; nor is it read."""
    os.mkfifo(tmp_path / "x.json")
    monkeypatch.setattr(files, "check_regular", lambda path: None)
    with pytest.raises(InputError, match=r"x.json: a pipe; a regular file is needed there"):
        files.read_json(tmp_path / "x.json")


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    archives.write(tmp_path / "x.npz", {"a": np.arange(3)})
    before = (tmp_path / "x.npz").read_bytes()
    with pytest.raises(TypeError), files.replacing(tmp_path / "x.npz") as file:
        file.write(b"half" + len)  # type: ignore[operator]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a pipe"):
        files.write(tmp_path / "pipe", "x")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ovtq-calibrate, of few tokens."""
    path = tmp_path_factory.mktemp("statistics") / "s.npz"
    assert calibrate.main([str(MINI), "--tokens", "16", "--output", str(path)]) == 0
    return path


@pytest.mark.parametrize(
    "harm",
    [
        _encrypted,
        lambda raw: _with(raw, "0.query", _npy((10**12,), "<f8")),
        lambda raw: _with(raw, "0.query", _npy((1,), "<U4", b"\0" * 16)),
        lambda raw: _with(raw, "indices", _npy((1,), "|O", b"cos\nsystem\n")),
        lambda raw: _with(raw, "indices", b"no array"),
        lambda raw: _with(raw, "tokens", _npy((2,), "<i8", b"\0" * 16)),
        lambda raw: raw[:1000],
        lambda raw: b"",
        lambda raw: DEEP.encode(),
    ],
    ids=["encrypted", "1e12 numbers", "text", "pickle", "no array", "two numbers", "cut", "empty", "brackets"],
)
def test_archives_that_are_none(harm: Callable[[bytes], bytes], statistics: Path, tmp_path: Path) -> None:
    """Statistics, and states of a prompt that were saved: read by one reader."""
    moments.load(statistics)
    (tmp_path / "s.npz").write_bytes(harm(statistics.read_bytes()))
    with pytest.raises(InputError, match=r"s.npz: (no|damaged) statistics"):
        moments.load(tmp_path / "s.npz")
    request = ov.Core().compile_model(TINY["5.5"] / "openvino_model.xml", "CPU").create_infer_request()
    with pytest.raises(InputError, match=r"s.npz: no states written by ovtq"):
        ovtq.load_state(request, tmp_path / "s.npz", model_dir=TINY["5.5"])


@pytest.mark.parametrize("name", ["tokenizer_config.json", "openvino_tokenizer.xml", "chat_template.jinja"])
@pytest.mark.parametrize("harm", ["pipe", "folder"])
def test_what_a_tokenizer_reads_is_regular(name: str, harm: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(MINI, tmp_path / "model"))
    (model / name).unlink()
    os.mkfifo(model / name) if harm == "pipe" else (model / name).mkdir()
    with pytest.raises(InputError, match=f"{name}: (no such file|a {harm})"):
        Tokenizer(model)


def test_a_tokenizer_whose_files_are_no_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = Path(shutil.copytree(MINI, tmp_path / "model"))
    (model / "tokenizer_config.json").write_bytes(b"\xff\xfe{")
    assert "its tokenizer can't be used" in line(capsys, infer.main, model, "--prompt", "a")


@pytest.mark.parametrize("harm", ["pipe", "folder", "no text"])
def test_a_text_that_is_none(harm: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text"
    {"pipe": os.mkfifo, "folder": os.mkdir, "no text": lambda path: path.write_bytes(b"\xff")}[harm](text)
    for run, options in (
        (evaluate.main, ["stock:KV_CACHE_PRECISION=u8"]),
        (calibrate.main, ["--output", tmp_path / "c.npz"]),
        (inspect.main, []),
    ):
        said = line(capsys, run, MINI, *options, "--text", text)
        assert "text: a pipe" in said or "text: a folder" in said or "text: not UTF-8" in said


# ------------------------------------------------------------------------------------------ what is written


def test_nothing_is_written_over_what_is_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text, figures, model = tmp_path / "text", tmp_path / "eval.json", tmp_path / "model"
    shutil.copyfile(TEXT, text)
    figures.write_text(json.dumps(FIGURES))
    shutil.copytree(MINI, model)
    (tmp_path / "link").symlink_to("text")
    for run, arguments, message in (
        (evaluate.main, [model, "stock:A=b", "--text", text, "--json", text], "the same file"),
        (evaluate.main, [model, "stock:A=b", "--text", text, "--report", tmp_path / "link"], "the same file"),
        (
            evaluate.main,
            [model, "stock:A=b", "--text", text, "--json", tmp_path / "x", "--report", tmp_path / "x"],
            "same",
        ),
        (evaluate.main, [model, "stock:A=b", "--text", text, "--report", model / "x"], "must not be inside"),
        (evaluate.main, [model, "stock:A=b", "--text", text, "--reference", model / "config.json"], "holds no logits"),
        (evaluate.main, [model, "stock:A=b", "--text", text, "--reference", model / "x"], "must not be inside"),
        (evaluate.main, [model, "stock:A=b", "--text", text, "--reference", tmp_path / "link"], "holds no logits"),
        (evaluate.main, [model, "stock:A=b", "--text", TEXT, "--reference", figures], "holds no logits"),
        (bench.main, [model, "--report", model / "x.html"], "must not be inside"),
        (bench.main, [model, "--report", tmp_path / "x", "--output", tmp_path / "x"], "the same file"),
        (inspect.main, [model, "--text", text, "--json", text], "the same file"),
        (report.main, [figures, "--output", figures], "the same file"),
        (calibrate.main, [model, "--text", tmp_path / "t.npz", "--output", tmp_path / "t.npz"], "the same file"),
        (doctor.main, [model, "--out", model], "must not be the model's folder"),
        (doctor.main, [model, "--out", model / "sub"], "must not be the model's folder"),
    ):
        assert message in line(capsys, run, *arguments)
    assert text.read_bytes() == TEXT.read_bytes()
    assert json.loads(figures.read_text()) == FIGURES
    assert sorted(os.listdir(model)) == sorted(os.listdir(MINI))


def test_doctor_keeps_what_is_not_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder `work`, as people have, where it writes; nor does it take modules of the working directory."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis").touch()
    (tmp_path / "numpy.py").write_text("raise SystemExit('taken')")
    monkeypatch.chdir(tmp_path)
    options = ["--out", ".", "--devices", "CPU", "--presets", "exact", "--contexts", "8", "--steps", "1", "--no-verify"]
    assert doctor.main([str(TINY["5.5"]), *options]) == 0
    assert (tmp_path / "work" / "thesis").exists()
    assert sorted(os.listdir()) == ["doctor.json", "doctor.md", "numpy.py", "work"]
    row = json.loads(Path("doctor.json").read_text())["rows"]["CPU"]["exact"]
    assert row["verified"]["written"]
    assert row["contexts"]


@pytest.mark.parametrize("text", ["[]", DEEP, "{", '{"rows": 7}', "null"])
def test_facts_of_a_doctor_that_are_none(text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "doctor.json").write_text(text)
    assert (
        "doctor.json: " in (said := line(capsys, doctor.main, TINY["5.5"], "--out", tmp_path)) or "holds a run" in said
    )
    assert (tmp_path / "doctor.json").read_text() == text


def test_figures_without_a_fact_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps({key: value for key, value in FIGURES.items() if key != "chunk"}))
    said = line(capsys, report.main, tmp_path / "e.json", "--output", tmp_path / "r.html")
    assert "e.json: the figures are not of this version's form" in said


@pytest.mark.parametrize("place", ["/proc/x/out", "/proc/out"])
def test_where_nothing_can_be_made_is_named(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And no temporary file that it was tried with."""
    said = line(capsys, convert.main, TINY["5.5"], place, "--no-verify")
    assert said == "ovtq-convert: /proc: can't be written to (No such file or directory)\n"


# What becomes of the model's folder while something is done with it.
MEANWHILE = [
    ("running the original", "os.truncate(MODEL + '/openvino_model.bin', 100)"),
    pytest.param("running the converted", "os.truncate(MODEL + '/openvino_model.bin', 100)", marks=pytest.mark.slow),
    pytest.param("rewriting", "os.remove(MODEL + '/openvino_model.bin')", marks=pytest.mark.slow),
    ("writing", "__import__('shutil').rmtree(MODEL)"),
    pytest.param("copying", "os.remove(MODEL + '/config.json')", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("when", "how"), MEANWHILE)
def test_a_folder_that_changes_meanwhile(when: str, how: str, tiny_copy: Path, tmp_path: Path) -> None:
    """It is converted all the same, or the failure is one line and leaves nothing."""
    (tmp_path / "runs").mkdir()
    env = harmed(tmp_path, when, how.replace("MODEL", repr(str(tiny_copy))))
    command = [sys.executable, "-c", CONVERT, tiny_copy, tmp_path / "runs" / "out", "--verify-layers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) in ((2, 1), (0, 0)), done.stderr
    assert os.listdir(tmp_path / "runs") == ([] if done.returncode else ["out"])


def test_writing_or_verifying_that_fails_otherwise_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As in a graph that is unlike any known."""

    def fail(*_: object) -> None:
        raise IndexError("planted")

    for module, name in ((ovtq.conversion, "verify"), (ovtq.ir.weights, "_span")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            said = line(capsys, convert.main, TINY["5.5"], tmp_path / "out")
        assert "its graph is not as ovtq knows it (IndexError: planted)" in said
        assert os.listdir(tmp_path) == []


def test_a_long_prompt_is_read_in_parts_that_are_shown() -> None:
    class Subject:
        def __init__(self) -> None:
            self.read: list[int] = []

        def step(self, ids: np.ndarray) -> None:
            self.read.append(ids.shape[1])

    subject, screen = Subject(), command.Out(stderr=True, force_terminal=True, file=io.StringIO(), width=80)
    rest = infer._read(subject, np.arange(5000), screen)  # type: ignore[arg-type]
    assert (subject.read, rest.shape) == ([1024] * 4, (1, 5000 - 4096))
    assert rest[0, 0] == 4096
    assert "prompt" in screen.file.getvalue()
    assert "4/4" in screen.file.getvalue()


# ------------------------------------------------------------------------------------------ numbers, warnings, modules


@pytest.mark.parametrize("value", ["-1", "0", "x", "", "9" * 5000, str(2**63), "16777217", "nan", "1e3"])
def test_numbers_out_of_range(value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = ["stock", "--text", TEXT]
    for run, arguments in (
        (evaluate.main, [MINI, *text, f"--jobs={value}"]),
        (bench.main, [MINI, f"--contexts={value}"]),
        (infer.main, [MINI, "--prompt", "a", f"--max-new-tokens={value}"]),
        (calibrate.main, [MINI, f"--tokens={value}", "--output", tmp_path / "c.npz"]),
        (doctor.main, [MINI, f"--steps={value}", "--out", tmp_path / "out"]),
    ):
        assert "invalid" in (said := line(capsys, run, *arguments)) or "too large" in said
    if value != "0":
        assert "--greedy" in line(capsys, evaluate.main, MINI, *text, f"--greedy={value}")


def test_a_warning_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        warnings.warn("overflow", RuntimeWarning, stacklevel=1)
        raise InputError("wrong")

    for options, count in (([], 0), (["--debug"], 1)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert command.run("ovtq-x", work, argv=options) == 2
        assert len(seen) == count
    assert "ovtq-x: wrong\n" in capsys.readouterr().err


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no safe path for processes of multiprocessing")
def test_processes_of_a_command_take_nothing_from_the_working_directory(tmp_path: Path) -> None:
    for name in ("multiprocessing", "pickle", "socket", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken')")
    code = "import sys; from ovtq.cli.entry import bench; sys.exit(bench())"
    given = [str(TINY["5.5"]), "--contexts", "8", "--steps", "8"]
    script = tmp_path / "bin" / "ovtq-bench"
    script.parent.mkdir()
    script.write_text(code)
    done = subprocess.run([sys.executable, script, *given], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("setpriv") is None or os.geteuid() != 0, reason="needs root and setpriv")
@pytest.mark.parametrize("threads", [1, 2, 4, 6])
def test_too_few_threads_are_one_line(threads: int, tmp_path: Path) -> None:
    """`ulimit -u`, of which root is free: as a user who may read everything."""
    tmp_path.chmod(0o777)
    rights = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    limited = ["bash", "-c", f'ulimit -u {threads} && exec "$@"', "bash", sys.executable, "-c", CONVERT]
    done = subprocess.run(
        ["setpriv", "--reuid=64321", "--clear-groups", *rights, *limited, TINY["5.5"], tmp_path / "out", "--no-verify"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "threads" in done.stderr or "can't start a process" in done.stderr
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------ the library


@pytest.mark.parametrize(
    "odd", [None, 7, "", "\0", b"x", [], {}, float("nan"), "x" * 5000], ids=lambda odd: repr(odd)[:9]
)
def test_the_library_raises_its_own_errors(odd: object, tmp_path: Path) -> None:
    model = TINY["5.5"]
    graph = ov.Core().read_model(model / "openvino_model.xml")
    calls: list[Callable[[], object]] = [
        lambda: ovtq.convert(odd, tmp_path / "out"),
        lambda: ovtq.convert(model, tmp_path / "out", preset="k6v4", protect=odd or 7, verify=False),
        lambda: ovtq.convert(model, tmp_path / "out", budget=odd or "", settings={"a": 1}, verify=False),
        lambda: ovtq.compress(graph, odd),
        lambda: ovtq.compress(odd, model),
        lambda: ovtq.describe(odd),
        lambda: ovtq.verify(model, odd),
        lambda: ovtq.state_bytes(model, odd),
        lambda: ovtq.state_bytes(odd, 7),
        lambda: ovtq.load_state(odd, tmp_path / "s.npz"),
        lambda: ovtq.save_state(odd, tmp_path / "s.npz", odd),
        lambda: ovtq.pruning_counts(odd),
        lambda: ovtq.read_prompt(None, odd),
    ]
    for number, call in enumerate(calls):
        if (odd, number) in ((7, 7), ({}, 3)):
            continue  # a number of tokens; a config.json in which nothing stands that this model needs
        with pytest.raises(OvtqError) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_call_that_is_none_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        ovtq.describe()  # type: ignore[call-arg]


def test_what_may_not_be_read_is_said(capsys: pytest.CaptureFixture[str], tiny_copy: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything; the campaign's processes give that up")
    for name in ("config.json", "openvino_model.xml"):
        (tiny_copy / name).chmod(0)
        assert f"{name}: can't be read" in line(capsys, inspect.main, tiny_copy)
        (tiny_copy / name).chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_statistics_that_nothing_reads_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """They would be copied unread."""
    for name in ("x.npz", "\0"):
        said = line(capsys, convert.main, TINY["5.5"], tmp_path / "out", "--calibration", name)
        assert "--calibration has no effect without --basis calibrated" in said
