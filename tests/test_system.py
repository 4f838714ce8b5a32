"""What systems do each in their own way: signals, locks, files that are mapped or open; and the gates for it."""

from __future__ import annotations

import ast
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import MINI, ROOT, TINY

from ovtq import pipeline, signals, staging, system
from ovtq.cli.convert import main
from ovtq.ir import io, weights
from ovtq.runtime.runner import Runner

SOURCES = [path for folder in ("ovtq", "passes", "models") for path in sorted((ROOT / folder).rglob("*.py"))]


# ------------------------------------------------------------------------------------------ gates


def _attribute_errors(system_name: str, *paths: Path) -> set[str]:
    options = ["--ignore-missing-imports", "--follow-imports=silent", "--no-error-summary", "--hide-error-context"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--platform", system_name, *options, *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return {line for line in done.stdout.splitlines() if line.endswith("[attr-defined]")}


def test_nothing_is_used_that_windows_lacks(tmp_path: Path) -> None:
    """By the standard library's types on either system; of a file that does use such things, each is found."""
    pytest.importorskip("mypy", reason="needs the extra [dev]")
    planted = tmp_path / "planted.py"
    planted.write_text("import os\nimport fcntl\nimport signal\nos.sysconf(1), fcntl.flock(0, 1), signal.SIGHUP\n")
    windows, linux = (_attribute_errors(name, *SOURCES, planted) for name in ("win32", "linux"))
    only = windows - linux
    assert {line for line in only if "planted.py" not in line} == set()
    assert sorted(re.findall('attribute "(.*?)"', " ".join(only))) == ["SIGHUP", "flock", "sysconf"]


def _says(path: Path) -> str:
    """A module's imports and attributes and what it has in strings, without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    notes = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"import {node.module}", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            found.append(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in notes:
            found.append(node.value)
    return "\n".join(found)


def test_one_module_asks_for_the_system() -> None:
    own = (
        r"import (fcntl|msvcrt|ctypes|resource|psutil|filelock)\b|\b(sysconf|pthread_\w+|O_DIRECT|CDLL|preadv)\b|/proc/"
    )
    asking = {path.name for path in SOURCES if re.search(own, _says(path))}
    # drivers asks OpenCL for its devices, errors knows what libraries say when the system gives them no thread
    assert asking == {"system.py", "disk.py", "drivers.py", "errors.py"}
    assert {path.name for path in SOURCES if re.search(r"\b(platform)\b", _says(path))} <= {
        "system.py",
        "disk.py",
        "conversion.py",  # the version of Python, for the record
        "doctor.py",
        "command.py",  # the same, for figures
    }


# ------------------------------------------------------------------------------------------ what is open, and when


def _open_in(folder: Path) -> set[str]:
    """Files under `folder` that this process maps or has open."""
    gc.freeze()  # what is garbage now may not go because a test looks
    names = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    for entry in Path("/proc/self/fd").iterdir():
        try:
            names.append(os.readlink(entry))
        except FileNotFoundError:  # the listing's own
            continue
    gc.unfreeze()
    return {name for name in names if name.startswith(f"{folder}/")}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, set[str]]]:
    """Every renaming and removing of folders: which, of what, and what in it was mapped or open then."""
    seen: list[tuple[str, str, set[str]]] = []
    rename, remove = system.rename, system.remove
    monkeypatch.setattr(
        system, "rename", lambda path, to: (seen.append(("rename", path.name, _open_in(path))), rename(path, to))[1]
    )
    monkeypatch.setattr(
        system, "remove", lambda path: (seen.append(("remove", path.name, _open_in(path))), remove(path))[1]
    )
    return seen


def _kinds(seen: list[tuple[str, str, set[str]]]) -> list[tuple[str, str]]:
    return [(what, re.sub("[0-9a-f]{8}", "*", name)) for what, name, _ in seen]


@pytest.mark.parametrize("options", [["--preset", "k6v4", "--target", "cpu"], ["--preset", "u8"], ["--no-verify"]])
def test_nothing_is_open_at_the_swap(
    options: list[str], watched: list[tuple[str, str, set[str]]], tmp_path: Path
) -> None:
    """As Windows demands, which neither renames nor removes what is mapped or open."""
    for _ in range(2):
        assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--force", *options]) == 0
    assert _kinds(watched) == [
        ("rename", ".out.ovtq-*"),
        ("rename", "out"),
        ("rename", ".out.ovtq-*"),
        ("rename", ".out.ovtq-*.old"),
        ("remove", ".out.ovtq-*.gone"),
    ]
    assert [held for *_, held in watched] == [set()] * 5
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["step", "caches"])
def test_nothing_is_open_when_a_failed_run_is_removed(
    error: type[BaseException],
    where: str,
    watched: list[tuple[str, str, set[str]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """An error's frames hold the model that maps the weights; they are let go before its folder is removed."""
    at_error: list[set[str]] = []

    def fail() -> None:
        (folder,) = (path for path in tmp_path.glob(".out.ovtq-*") if path.is_dir())
        at_error.append(_open_in(folder))
        raise error("planted")

    step, mapped = Runner.step, []

    def failing_step(self: Runner, *args: object) -> np.ndarray:
        if ".out.ovtq-" in Path("/proc/self/maps").read_text():
            mapped.append(True)
        if len(mapped) == 3:
            fail()
        return step(self, *args)

    if where == "step":
        monkeypatch.setattr(Runner, "step", failing_step)
    else:
        monkeypatch.setattr(sys.modules["ovtq.verification.verify"], "compiled_precisions", lambda *_: fail())
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--preset", "u8"]) == 2
    assert at_error
    assert at_error[0]
    assert _kinds(watched) == [("remove", ".out.ovtq-*")]
    assert watched[0][2] == set()
    assert os.listdir(tmp_path) == []


def test_the_lock_goes_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that can't be removed yet keeps its lock file, by which the next run finds it."""
    remove = system.remove
    monkeypatch.setattr(system, "remove", lambda path: False)
    with pytest.raises(ValueError, match="planted"), staging.staged(tmp_path / "out"):
        raise ValueError("planted")
    folder, lock = sorted(os.listdir(tmp_path))
    assert lock == f"{folder}.lock"
    monkeypatch.setattr(system, "remove", remove)
    with staging.staged(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------ signals


@pytest.fixture
def handlers() -> Iterator[None]:
    """The commands' handlers, and those there were afterwards; beside a thread that takes signals, as OpenVINO's do."""
    before = {number: signal.getsignal(number) for number in signals.ENDING}
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    signals.interrupt()
    yield
    end.set()
    thread.join()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", signals.ENDING)
@pytest.mark.parametrize("through", ["process", "thread"])
def test_a_signal_between_the_renames_comes_too_late(
    number: int,
    through: str,
    convert: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Whichever thread takes it: the new result is in its place, and nothing of the old one is left."""
    shutil.copytree(convert(TINY["5.5"], "--preset", "exact"), tmp_path / "out")
    rename, sent = system.rename, []
    other = next(thread for thread in threading.enumerate() if thread is not threading.main_thread())

    def renames(path: Path, target: Path) -> Path:
        done = rename(path, target)
        if not (tmp_path / "out").exists():
            sent.append(number)
            if through == "process":
                os.kill(os.getpid(), number)
            else:
                signal.pthread_kill(other.ident, number)
            for _ in range(1000):  # any bytecode may be where a handler runs
                time.sleep(1e-5)
        return done

    monkeypatch.setattr(system, "rename", renames)
    assert main([str(TINY["5.5"]), str(tmp_path / "out"), "--preset", "rotate", "--no-verify", "--force"]) == 0
    assert sent == [number]
    assert "written to" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / io.RECORD).read_text())["preset"] == "rotate"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("handlers")
def test_signals_wait_for_the_end_of_the_block_and_no_longer() -> None:
    for number in signals.ENDING:
        went: list[str] = []

        def send(went: list[str] = went, number: int = number) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            went.append("on")

        with pytest.raises(KeyboardInterrupt), signals.Held():
            send()
        assert went == ["on"]
        time.sleep(signals.AGAIN)
        with pytest.raises(KeyboardInterrupt), signals.Held() as held, held.let_through():
            send()
        assert went == ["on"]
        send()  # at once after it: the same
        assert went == ["on", "on"]
        time.sleep(signals.AGAIN)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_two_signals_leave_nothing_and_say_it_once(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from ovtq.cli.entry import convert; sys.exit(convert())"]
    process = subprocess.Popen([*command, MINI, tmp_path / "out"], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not any(tmp_path.glob(".out.ovtq-*/openvino_model.xml")):
        assert process.poll() is None
        time.sleep(0.01)
    for _ in range(2):
        process.send_signal(number)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (2, b"ovtq-convert: interrupted; nothing was written\n")
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ weights and texts


@pytest.mark.parametrize("model_dir", [MINI, *TINY.values()])
def test_where_the_weights_lie_is_where_the_system_maps_them(model_dir: Path) -> None:
    model, path = io.load(model_dir), model_dir / "openvino_model.bin"
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    first = min(
        int(span.split("-")[0], 16) - int(offset, 16) for span, _, offset, *_, name in maps if name == str(path)
    )
    for passes in ((), pipeline.PRESETS["exact"].on("cpu")):
        if passes:
            model = pipeline.run(model, _described(model, model_dir), passes)[0]
        assert weights._read_span(model, path) == range(first, first + path.stat().st_size)


def _described(model: object, model_dir: Path) -> object:
    from ovtq.models import describe

    return describe(model, io.load_config(model_dir))


def test_weights_that_are_not_the_files_are_not_taken_for_its(tmp_path: Path) -> None:
    """The file beside another XML, offsets that most constants contradict, a file changed meanwhile."""
    folder = Path(shutil.copytree(TINY["5.5"], tmp_path / "model"))
    model, path = io.load(TINY["5.5"]), folder / "openvino_model.bin"
    assert weights._read_span(model, path) is not None  # the same bytes: as good as the original
    data = bytearray(path.read_bytes())
    span = weights._span(model, path)
    big = max((node for node in model.get_ops() if node.get_type_name() == "Constant"), key=lambda n: n.get_byte_size())
    data[weights._place(big, span)] ^= 1
    path.write_bytes(data)
    assert weights._read_span(model, path) is None
    xml = folder / "openvino_model.xml"
    count = iter(range(1 << 20))
    moved = re.sub(r'offset="(\d+)"', lambda found: f'offset="{int(found[1]) + 64 * next(count)}"', xml.read_text())
    xml.write_text(moved)
    assert weights._span(model, path) is None


def test_a_model_with_the_line_ends_of_windows_is_the_same_model(convert: Callable[..., Path], tmp_path: Path) -> None:
    """Equal hashes in the record, equal files; what was made of one is accepted beside the other."""
    folder = Path(shutil.copytree(TINY["5.5"], tmp_path / "model"))
    xml = folder / "openvino_model.xml"
    xml.write_bytes(xml.read_bytes().replace(b"\n", b"\r\n"))
    assert main([str(folder), str(tmp_path / "out"), "--preset", "exact"]) == 0
    other = convert(TINY["5.5"], "--preset", "exact")
    for name in ("openvino_model.xml", "openvino_model.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (other / name).read_bytes()
    records = [json.loads((where / io.RECORD).read_text())["source"] for where in (tmp_path / "out", other)]
    assert records[0] == records[1]
    assert records[0]["xml_sha256"] == io.text_sha256(TINY["5.5"] / "openvino_model.xml")


def test_options_with_colons_of_their_own() -> None:
    (item,) = pipeline.parse_passes(r"prune-kv:score=triattention:stats=C:\a b\x.npz:budget=64")
    assert (item.stats, item.budget) == (r"C:\a b\x.npz", 64)
    (item,) = pipeline.parse_passes("quantize-kv:protect=first:1,:k-bits=4".replace(",", ""))
    assert (item.protect, item.k_bits) == ("first:1", "4")
