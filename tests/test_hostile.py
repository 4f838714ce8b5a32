"""What others made: files that are not what they should be, names that were planted, links, disks. One line each."""

from __future__ import annotations

import io as streams
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import COMMAND, MINI, ROOT, TINY

from ovtq import disk, files
from ovtq.cli.convert import main
from ovtq.cli.infer import _chosen
from ovtq.cli.infer import main as infer
from ovtq.cli.inspect import main as inspect
from ovtq.errors import InputError
from ovtq.forms import triattention
from ovtq.ir import cache, io

XML = "openvino_model.xml"
DEEP = "[" * 100_000
INSPECT = [sys.executable, "-c", "import sys; from ovtq.cli.entry import inspect; sys.exit(inspect())"]


def line(capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], int], *args: object) -> str:
    """The one line on stderr of a run that must fail with exit code 2."""
    assert command([str(arg) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    return captured.err


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", DEEP, "config.json: can't be read (nested too deep)"),
        ("config.json", "\xff", "config.json: can't be read ("),
        ("config.json", '{"a": ' + "9" * 5000 + "}", "config.json: can't be read ("),
        (XML, '<?xml version="1.0" encoding="latin-1"?><net name="\xe9"/>', "not an OpenVINO IR (not UTF-8 text)"),
        (XML, "<net><data offset='1' size='x'/></net>", "not an OpenVINO IR ("),
    ],
    ids=["deep", "latin-1", "digits", "xml latin-1", "xml size"],
)
def test_files_that_are_not_what_they_should_be(
    name: str, text: str, message: str, capsys: pytest.CaptureFixture[str], tiny_copy: Path, tmp_path: Path
) -> None:
    (tiny_copy / name).write_bytes(text.encode("latin-1"))
    assert message in line(capsys, main, tiny_copy, tmp_path / "out", "--no-verify")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("command", [main, inspect])
def test_a_constant_without_a_type(
    command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], tiny_copy: Path, tmp_path: Path
) -> None:
    """OpenVINO reads it, and fails at whatever asks for its bytes."""
    xml = (tiny_copy / XML).read_text("utf-8")
    place = xml.index('name="self.model.layers.3.self_attn.o_proj.weight" type="Const"')
    end = xml.index("</layer>", place)
    (tiny_copy / XML).write_text(
        xml[:place] + re.sub(r'element_type="\w+"', 'element_type="dynamic"', xml[place:end]) + xml[end:], "utf-8"
    )
    rest = (tmp_path / "out", "--no-verify") if command is main else ()
    said = line(capsys, command, tiny_copy, *rest)
    assert "has no element type; export it again" in said or "OpenVINO can't read it" in said


@pytest.mark.parametrize("name", ["config.json", XML, "openvino_model.bin", "--stats", "--json"])
def test_a_pipe_does_not_hang(name: str, capsys: pytest.CaptureFixture[str], tiny_copy: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe" if name.startswith("--") else tiny_copy / name
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    options = [name, pipe] if name.startswith("--") else []
    options += ["--budget", "100", "--score", "triattention"] if name == "--stats" else []
    said = line(capsys, main, tiny_copy, tmp_path / "out", "--no-verify", *options)
    assert pipe.name in said
    assert "a pipe" in said or "no such file" in said or "no openvino_model" in said
    assert not (tmp_path / "out").exists()


def test_a_long_attribute_is_read_in_a_moment(tiny_copy: Path) -> None:
    """30 MB in one attribute: read in pieces, each piece would begin at its start anew."""
    xml = tiny_copy / XML
    xml.write_text(xml.read_text().replace("<rt_info>", f'<rt_info><x y="{"a" * 30_000_000}"/>', 1))
    started = time.process_time()
    io.model_xml(tiny_copy)
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["ovtq"], "1", "rt_info 'ovtq' was not written by ovtq"),
        (["ovtq", "passes"], "nonsense", "rt_info 'ovtq': can't be read"),
        (["ovtq", "passes"], DEEP, "rt_info 'ovtq': can't be read (nested too deep)"),
        (["ovtq", "passes"], "[{}]", "rt_info 'ovtq' tells of no passes"),
        (["ovtq", "passes"], "1", "rt_info 'ovtq' tells of no passes"),
        (["ovtq", "passes", "deeper"], "[]", "rt_info 'ovtq': can't be read"),
        (["ovtq", "versions"], "[]", "rt_info 'ovtq' tells of no passes"),
    ],
)
@pytest.mark.parametrize("command", [main, inspect])
def test_a_stamp_that_is_not_ours(
    path: list[str], value: str, message: str, command: Callable[[list[str]], int],
    capsys: pytest.CaptureFixture[str], tiny_copy: Path, tmp_path: Path,
) -> None:  # fmt: skip
    model = ov.Core().read_model(TINY["5.5"] / XML)
    model.set_rt_info(value, path)
    (tiny_copy / XML).unlink()
    (tiny_copy / "openvino_model.bin").unlink()
    ov.save_model(model, tiny_copy / XML)
    assert message in line(capsys, command, tiny_copy, *([tmp_path / "out"] if command is main else []))


@pytest.mark.parametrize(("key", "value"), [("verified", {"a": 1}), ("verified", 7), ("layers", True), ("target", 7)])
def test_a_record_of_another_form(
    key: str, value: object, convert: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(convert(TINY["5.5"], "--preset", "exact", "--no-verify"), tmp_path / "model"))
    record = json.loads((folder / "ovtq.json").read_text())
    (folder / "ovtq.json").write_text(json.dumps({**record, key: value}))
    capsys.readouterr()
    assert inspect([str(folder), "--context", "4k"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "is not of this version's form" in said


def test_runtime_options_that_are_a_text() -> None:
    model = ov.Core().read_model(TINY["5.5"] / XML)
    model.set_rt_info("1", ["runtime_options"])
    assert cache.marked(model) is None


def _encrypted(raw: bytes) -> bytes:
    """With the mark that says so on every member."""
    data = bytearray(raw)
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for found in re.finditer(re.escape(signature), raw):
            data[found.start() + place] |= 1
    return bytes(data)


def _with(raw: bytes, name: str, array: bytes) -> bytes:
    made = streams.BytesIO()
    with zipfile.ZipFile(streams.BytesIO(raw)) as old, zipfile.ZipFile(made, "w") as new:
        for item in old.namelist():
            new.writestr(item, array if item == f"{name}.npy" else old.read(item))
    return made.getvalue()


def _npy(shape: tuple[int, ...], kind: str, data: bytes = b"") -> bytes:
    made = streams.BytesIO()
    np.lib.format.write_array_header_1_0(made, {"descr": kind, "fortran_order": False, "shape": shape})
    return made.getvalue() + data


@pytest.mark.parametrize(
    "harm",
    [
        _encrypted,
        lambda raw: _with(raw, "mean_query", _npy((10**12,), "<f8")),
        lambda raw: _with(raw, "mean_query", _npy((3, 16, 32), "<U4", b"\0" * 3 * 16 * 32 * 16)),
        lambda raw: _with(raw, "score_mean", _npy((3, 16), "<c8", b"\0" * 3 * 16 * 8)),
        lambda raw: _with(raw, "layers", _npy((3,), "|O", b"cos\nsystem\n")),
        lambda raw: _with(raw, "layers", b"no array"),
        lambda raw: raw[:1000],
        lambda raw: b"",
        lambda raw: DEEP.encode(),
    ],
    ids=["encrypted", "1e12 numbers", "text", "complex", "pickle", "no array", "cut", "empty", "brackets"],
)
def test_statistics_that_are_none(harm: Callable[[bytes], bytes], tmp_path: Path) -> None:
    raw = (MINI / triattention.NAME).read_bytes()
    triattention.load(MINI / triattention.NAME)
    (tmp_path / "s.npz").write_bytes(harm(raw))
    with pytest.raises(InputError, match=r"s.npz: (no|damaged) statistics"):
        triattention.load(tmp_path / "s.npz")


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="over 256 MiB"):
        io.load_config(tmp_path)


# ------------------------------------------------------------------------------------------ links and rights


def test_links_out_of_the_folder_are_refused(
    capsys: pytest.CaptureFixture[str], tiny_copy: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    for end in (secret, Path("/dev/zero"), Path("/etc"), Path("..") / "secret"):
        (tiny_copy / "tokenizer.json").unlink(missing_ok=True)
        (tiny_copy / "tokenizer.json").symlink_to(end)
        said = line(capsys, main, tiny_copy, tmp_path / "out", "--no-verify")
        assert "tokenizer.json: a link to " in said
        assert "outside the model's folder" in said
    assert sorted(os.listdir(tmp_path)) == ["model", "secret"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.symlink_to("nothing"), "a link that leads nowhere"),
        (lambda path: path.symlink_to(path.name), "a link that leads nowhere"),
        (lambda path: os.mkfifo(path), "a pipe, which can't be copied"),
    ],
    ids=["dangling", "circle", "pipe"],
)
def test_what_cannot_be_copied_is_named_first(
    harm: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str], tiny_copy: Path, tmp_path: Path
) -> None:
    harm(tiny_copy / "extra")
    assert f"{tiny_copy / 'extra'}: {message}" in line(capsys, main, tiny_copy, tmp_path / "out", "--no-verify")


def test_a_download_cache_is_taken(tmp_path: Path) -> None:
    """Whose files are links to blobs beside; and a folder of links to a model elsewhere."""
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(TINY["5.5"].iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert main([str(snapshot), str(tmp_path / "out"), "--no-verify"]) == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    farm = tmp_path / "farm"
    farm.mkdir()
    for path in TINY["5.5"].iterdir():
        (farm / path.name).symlink_to(path)
    assert main([str(farm), str(tmp_path / "other"), "--no-verify"]) == 0


def test_rights_are_copied_but_none_of_another_user(tiny_copy: Path, tmp_path: Path) -> None:
    (tiny_copy / "run").write_text("#!/bin/sh")
    (tiny_copy / "run").chmod(0o6755)
    os.utime(tiny_copy / "run", (10**9, 10**9))
    assert main([str(tiny_copy), str(tmp_path / "out"), "--no-verify"]) == 0
    found = (tmp_path / "out" / "run").stat()
    assert stat.S_IMODE(found.st_mode) == 0o755
    assert found.st_mtime == 10**9


def test_a_record_replaces_no_other_name_of_its_file(tiny_copy: Path, tmp_path: Path) -> None:
    """--json on a hard link to the model's config.json."""
    before = (tiny_copy / "config.json").read_bytes()
    os.link(tiny_copy / "config.json", tmp_path / "record.json")
    assert main([str(tiny_copy), "--dry-run", "--json", str(tmp_path / "record.json")]) == 0
    assert (tiny_copy / "config.json").read_bytes() == before
    assert json.loads((tmp_path / "record.json").read_text())["schema"]
    assert sorted(os.listdir(tmp_path)) == ["model", "record.json"]


# ------------------------------------------------------------------------------------------ streams and the system


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_output(tmp_path: Path) -> None:
    """Of a conversion it changes nothing; of a command that only shows something it is the failure."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, TINY["5.5"], tmp_path / "out", "--no-verify"], stdout=full, stderr=subprocess.PIPE, check=False
        )
        assert done.returncode == 0
        said = f"written to {tmp_path / 'out'}, but standard output can't be written to (no space left)"
        assert done.stderr.decode().splitlines() == [said]
        assert (tmp_path / "out" / "ovtq.json").exists()
        done = subprocess.run([*INSPECT, TINY["5.5"]], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr == b"ovtq-inspect: standard output can't be written to (no space left)\n"


def test_closed_streams(tmp_path: Path) -> None:
    for number, closed in enumerate((">&-", "2>&-", "<&-", ">&- 2>&- <&-")):
        script = f'"$@" {closed}'
        out = tmp_path / str(number)
        done = subprocess.run(
            ["sh", "-c", script, "sh", *COMMAND, TINY["5.5"], out, "--no-verify"], capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert (out / "ovtq.json").exists()


def test_little_memory_is_one_line(tmp_path: Path) -> None:
    for kilobytes in (100_000, 300_000, 500_000):
        script = f'ulimit -v {kilobytes} && exec "$@"'
        done = subprocess.run(
            ["bash", "-c", script, "bash", *COMMAND, TINY["5.5"], tmp_path / "out", "--no-verify"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert os.listdir(tmp_path) == []


def test_whatever_is_raised_is_one_line_and_debug_shows_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("planted\r\n" + "x" * 100_000)

    monkeypatch.setattr(io, "check_output", fail)
    said = line(capsys, main, TINY["5.5"], tmp_path / "out")
    assert said.startswith("ovtq-convert: failed where nothing should, please report it: ZeroDivisionError: ")
    assert len(said) < 1100
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--debug"]) == 2
    captured = capsys.readouterr().err
    assert "Traceback (most recent call last)" in captured
    assert "in fail" in captured


def test_odd_paths_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("a\rb\nc", "x" * 5000, "a\0b", "\udcff"):
        assert line(capsys, main, tmp_path / name, tmp_path / "out")
        assert line(
            capsys, main, TINY["5.5"], tmp_path / "out", "--budget", 99, "--score", "triattention", "--stats", name
        )
        assert line(capsys, main, TINY["5.5"], tmp_path / "out", "--basis", "calibrated", "--calibration", name)


def test_a_circle_of_links(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "a" in line(capsys, main, tmp_path / "a", tmp_path / "out")
    assert line(capsys, main, TINY["5.5"], tmp_path / "a")
    assert line(capsys, main, TINY["5.5"], tmp_path / "a" / "out")
    assert line(capsys, main, TINY["5.5"], "--dry-run", "--json", tmp_path / "a")


def test_wrong_numbers_of_infer(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--seed", "-1"], "--seed: at least 0"),
        (["--temperature", "nan"], "--temperature: a number from 0"),
        (["--temperature", "inf"], "--temperature: a number from 0"),
        (["--prompt", "\udcff"], "--prompt: not UTF-8 text"),
    ):
        assert message in line(capsys, infer, MINI, "--prompt", "a", *options)


def test_the_coldest_temperature_is_the_likeliest_token() -> None:
    draw = np.random.default_rng(0)
    logits = draw.standard_normal(50).astype(np.float32)
    for temperature in (1e-320, 1e-30, 1e-3):
        assert _chosen(logits, temperature, draw) == logits.argmax()


def test_a_text_is_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=r"x.json: can't be written \(no space left\)"):
        files.write(tmp_path / "x.json", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_mounts_are_known_by_their_place() -> None:
    assert disk.is_mount(Path("/proc"))
    assert not disk.is_mount(ROOT / "ovtq")
