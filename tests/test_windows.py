"""ovtq on Windows: the commands in a Windows Python under Wine (tools/windows), and their results beside Linux's."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import MINI, ROOT, TINY

from ovtq.cli.evaluate import main as evaluate
from ovtq.ir import io
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

INSTALLED = Path(os.environ.get("OVTQ_WINDOWS_DIR", Path.home() / ".cache" / "ovtq-windows")) / "installed"
RUN = ROOT / "tools" / "windows" / "run"
COMMANDS = {"convert": "convert", "inspect": "inspect", "eval": "evaluate", "bench": "bench", "infer": "infer"}
COMMANDS |= {"report": "report"}

pytestmark = [
    pytest.mark.windows,
    pytest.mark.skipif(not INSTALLED.exists(), reason="run tools/windows/install"),
]


def windows(path: Path) -> str:
    """What a path of this system is called there."""
    return "Z:" + str(path).replace("/", "\\")


def arguments(command: str, *given: object) -> list[str]:
    code = f"import sys; from ovtq.cli.entry import {COMMANDS[command]} as run; sys.exit(run())"
    return [str(RUN), "-c", code, *(windows(x) if isinstance(x, Path) else str(x) for x in given)]


def ovtq(command: str, *given: object, code: int = 0, **options: object) -> subprocess.CompletedProcess[str]:
    """A command as Windows runs it. Its output is UTF-8."""
    done = subprocess.run(
        arguments(command, *given), capture_output=True, encoding="utf-8", timeout=500, check=False, **options
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def python(code: str, *given: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Some code as Windows runs it."""
    words = [windows(x) if isinstance(x, Path) else str(x) for x in given]
    done = subprocess.run(
        [RUN, "-c", code, *words], capture_output=True, encoding="utf-8", timeout=500, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def on_linux(command: str, *given: object, **options: object) -> tuple[str, str]:
    """What a command says here, on stdout and stderr."""
    _, *rest = arguments(command)
    done = subprocess.run(
        [sys.executable, *rest, *map(str, given)], capture_output=True, encoding="utf-8", check=True, **options
    )
    return done.stdout, done.stderr


def greedy(model_dir: Path, count: int) -> list[int]:
    """The likeliest tokens, one by one."""
    runner = Runner(model_dir / "openvino_model.xml", "CPU", EXACT_PROPERTIES)
    ids, written = np.arange(1, 200)[None], []
    for _ in range(count):
        written.append(int(runner.step(ids)[0, -1].argmax()))
        ids = np.array([written[-1:]])
    return written


def constants(model_dir: Path) -> dict[str, np.ndarray]:
    model = ov.Core().read_model(model_dir / "openvino_model.xml")
    return {node.get_friendly_name(): np.array(node.data) for node in model.get_ops() if "Constant" in str(node)}


def alike(ours: Path, theirs: Path, source: Path) -> None:
    """Two conversions of one model: the same files, the same graph, equal weights; what was computed to rounding."""
    assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
    for name in os.listdir(ours):
        if name not in ("openvino_model.xml", "openvino_model.bin", "README.md", io.RECORD):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    cards = [(folder / "README.md").read_text(encoding="utf-8") for folder in (ours, theirs)]
    measured = [re.sub(r"\d+(\.\d+)?(e-\d+)?", "0", card) for card in cards]  # by verification, to rounding
    assert measured[0] == measured[1]
    size = (source / "openvino_model.bin").stat().st_size
    weights = [(folder / "openvino_model.bin").read_bytes()[:size] for folder in (ours, theirs, source)]
    assert weights[0] == weights[1] == weights[2]
    lines = [sorted((folder / "openvino_model.xml").read_bytes().splitlines()) for folder in (ours, theirs)]
    same = sum(a == b for a, b in zip(*lines, strict=True))
    assert same > 0.99 * len(lines[0])  # the version of Python stands in it, and hashes of what was computed
    first, second = (constants(folder) for folder in (ours, theirs))
    assert first.keys() == second.keys()
    for name, value in first.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(value, second[name], rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(value, second[name])
    records = [json.loads((folder / io.RECORD).read_text()) for folder in (ours, theirs)]
    for key in ("preset", "layers", "target", "state_bytes", "source", "weights"):
        assert records[0][key] == records[1][key], key


def test_a_conversion_is_linuxs(convert: Callable[..., Path], tmp_path: Path) -> None:
    """Verified there, beside an old result that it replaces; read here, it says the same, token by token."""
    options = ["--preset", "k6v4", "--target", "cpu"]
    shutil.copytree(convert(TINY["5.5"], "--preset", "exact"), tmp_path / "out")
    said = ovtq("convert", TINY["5.5"], tmp_path / "out", "--force", *options).stdout
    assert "verified on CPU at f32, all 4 layers" in said
    assert f"written to {windows(tmp_path / 'out')}" in said
    assert os.listdir(tmp_path) == ["out"]
    other = convert(TINY["5.5"], *options, verified=True)
    alike(tmp_path / "out", other, TINY["5.5"])
    assert greedy(tmp_path / "out", 48) == greedy(other, 48)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_linuxs(command: str) -> None:
    env = {**os.environ, "COLUMNS": "100"}
    there = ovtq(command, "--help", env=env).stdout
    assert there.splitlines() == on_linux(command, "--help", env=env)[0].splitlines()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundled model as Windows converts it, once for a preset, for a CPU."""
    base = tmp_path_factory.mktemp("windows")

    def make(preset: str) -> Path:
        if not (base / preset).exists():
            ovtq("convert", MINI, base / preset, "--preset", preset, "--target", "cpu")
        return base / preset

    return make


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["exact", "k6v4", "u8"])
def test_presets(preset: str, made: Callable[[str], Path], convert: Callable[..., Path]) -> None:
    here = convert(MINI, "--preset", preset, "--target", "cpu", verified=True)
    alike(made(preset), here, MINI)
    assert greedy(made(preset), 64) == greedy(here, 64)


@pytest.mark.slow
def test_tokens_and_texts_are_linuxs(made: Callable[[str], Path]) -> None:
    """ovtq-infer at f32, piped, with a prompt from stdin that no code page has; LLMPipeline; ovtq-inspect."""
    prompt = "Modèle 模型 — the Treasury of the United States, as"
    asked = ["--raw", "--prompt", "-", "--max-new-tokens", "60", "--property", "INFERENCE_PRECISION_HINT=f32"]
    there = ovtq("infer", made("k6v4"), *asked, input=prompt)
    here = on_linux("infer", made("k6v4"), *asked, input=prompt)
    assert len(here[0]) > 50
    assert there.stdout == here[0]
    assert re.sub(r"TTFT.*", "", there.stderr) == re.sub(r"TTFT.*", "", here[1])

    code = """import sys, openvino_genai as g
pipe = g.LLMPipeline(sys.argv[1], "CPU", ATTENTION_BACKEND="SDPA", INFERENCE_PRECISION_HINT="f32")
text = pipe.generate("The Treasury of the United States, as", max_new_tokens=60, apply_chat_template=False)
sys.stdout.buffer.write(str(text).encode())"""
    texts = [python(code, made("k6v4")).stdout]
    texts += [subprocess.check_output([sys.executable, "-c", code, made("k6v4")], encoding="utf-8")]
    assert len(texts[0]) > 50
    assert texts[0] == texts[1]

    there = ovtq("inspect", made("k6v4"), "--context", "4k").stdout
    here, _ = on_linux("inspect", made("k6v4"), "--context", "4k")
    assert there.replace(windows(made("k6v4")), str(made("k6v4"))) == here


EVALUATION = ["--windows", "1", "--window", "256", "--trials", "0", "--greedy", "1", "--greedy-tokens", "8", "--text"]
HELDOUT = ROOT / "tests" / "data" / "heldout.txt"


@pytest.mark.slow
def test_evaluations_agree(made: Callable[[str], Path], convert: Callable[..., Path], tmp_path: Path) -> None:
    """Either system's ovtq-eval takes what the other converted, verifies it, and finds the same; %TEMP% stays empty."""
    here = Path(shutil.copytree(convert(MINI, "--preset", "k6v4", "--target", "cpu"), tmp_path / "linux"))
    there = Path(shutil.copytree(made("k6v4"), tmp_path / "windows"))
    figures, page, temp = tmp_path / "eval.json", tmp_path / "eval.html", tmp_path / "temp"
    temp.mkdir()
    env = {**os.environ, "TMP": windows(temp), "TEMP": windows(temp)}
    ovtq("eval", MINI, here, there, *EVALUATION, HELDOUT, "--report", page, "--json", figures, env=env)
    assert os.listdir(temp) == []
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    ours = tmp_path / "linux.json"
    assert evaluate([str(MINI), str(here), str(there), *EVALUATION, str(HELDOUT), "--json", str(ours)]) == 0
    rows = [json.loads(path.read_text())["rows"] for path in (figures, ours)]
    for one, two in zip(*rows, strict=True):
        assert one["verdict"] == two["verdict"]
        assert one["mean_kld"] == pytest.approx(two["mean_kld"], rel=0.02, abs=1e-9)
        assert one["same_top"] == pytest.approx(two["same_top"], abs=5e-3)
        assert one["greedy"] == two["greedy"]
        assert one["bytes_per_token"] == two["bytes_per_token"]


@pytest.mark.slow
@pytest.mark.timeout(1500)  # on a busy machine two processes at once took 8 minutes, and 3 on one half as busy
def test_an_evaluation_in_two_processes(made: Callable[[str], Path], tmp_path: Path) -> None:
    """They read the reference's logits from a file that vanishes with the process that has it."""
    process = subprocess.Popen(
        arguments("eval", MINI, made("k6v4"), *EVALUATION, HELDOUT, "--jobs", "2", "--json", tmp_path / "eval.json"),
        start_new_session=True,
    )
    try:
        assert process.wait(1200) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert [row["role"] for row in json.loads((tmp_path / "eval.json").read_text())["rows"]]


@pytest.mark.slow
def test_bench(made: Callable[[str], Path], tmp_path: Path) -> None:
    """Processes of their own, filled states, peaks of memory; figures mean nothing there."""
    asked = ["--contexts", "256", "--steps", "16", "--fill", "--property", "INFERENCE_PRECISION_HINT=f32"]
    ovtq("bench", MINI, made("k6v4"), *asked, "--output", tmp_path / "bench.json", "--report", tmp_path / "r.html")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [row["context"] for row in found["contexts"]] == [256, 256]
    assert all(row["rss_decode"] > 50e6 and row["tpot_ms"]["median"] > 0 for row in found["contexts"])
    assert found["machine"]["ram"] == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), rel=0.1)
    ovtq("report", tmp_path / "bench.json", "--output", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.slow
def test_odd_and_long_paths(tmp_path: Path) -> None:
    """Spaces, characters of no code page, and more than 260 of them; OpenVINO reads and writes there, too."""
    deep = tmp_path / "Modèle 模型 (x)" / ("long " * 30).strip() / ("and longer " * 12).strip()
    deep.mkdir(parents=True)
    model, out = Path(shutil.copytree(TINY["5.5"], deep / "model")), deep / "out"
    assert len(windows(out)) > 300
    for _ in range(2):
        ovtq("convert", model, out, "--target", "cpu", "--force")
    assert sorted(os.listdir(deep)) == ["model", "out"]
    assert "layers" in ovtq("inspect", out).stdout
    wrong = ovtq("convert", deep / "nothing", out, code=2)
    assert "nothing: no such folder" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_parent_that_cannot_be_written_to(tmp_path: Path) -> None:
    """One line, soon: names are not tried for ever, as `tempfile` would."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path / "disk"], check=False)
    if mounted.returncode:
        pytest.skip("mounting a file system that is read-only needs root")
    try:
        done = ovtq("convert", TINY["5.5"], tmp_path / "disk" / "out", "--no-verify", code=2)
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)
    assert len(done.stderr.splitlines()) == 1
    assert "can't" in done.stderr


# ------------------------------------------------------------------------------------------ interruptions


def _begun(out: Path) -> bool:
    return any(out.parent.glob(f".{out.name}.ovtq-*/openvino_model.xml"))


@pytest.mark.slow
def test_kill_and_tidy(made: Callable[[str], Path], tmp_path: Path) -> None:
    """Killed once it has begun to write: the old result stays, the next run removes what is left."""
    out = Path(shutil.copytree(made("exact"), tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    process = subprocess.Popen(
        arguments("convert", MINI, out, "--force", "--target", "cpu"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not _begun(out):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    busy = ovtq("convert", TINY["5.5"], out, "--force", "--no-verify")  # beside it; what is at work is left alone
    assert "written to" in busy.stdout
    assert _begun(out)
    shutil.rmtree(out)
    shutil.copytree(made("exact"), out)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert len(os.listdir(tmp_path)) == 3
    ovtq("convert", TINY["5.5"], out, "--force", "--no-verify")
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture
def console() -> Iterator[int]:
    """A terminal, of which Wine makes a console: no other way leads to Ctrl-C."""
    controller, terminal = os.openpty()
    yield terminal
    os.close(controller)
    os.close(terminal)


COMMAND = "from ovtq.cli.entry import convert as run"
ITS_WORK = "from ovtq import signals; from ovtq.cli.convert import main as run; signals.interrupt()"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "begin"),
    [("os.kill(0, signal.CTRL_C_EVENT)", COMMAND), ("signal.raise_signal(signal.SIGBREAK)", ITS_WORK)],
)
def test_interrupted_verification_leaves_nothing(send: str, begin: str, console: int, tmp_path: Path) -> None:
    """The model that is being verified maps the weights; sent twice, as an impatient user does.

    A Ctrl-C goes through the console, which tells the command and the process that does its work. Of Ctrl-Break Wine's
    console does not know: there it is the latter that raises it.
    """
    code = f"""import glob, os, signal, sys, threading, time
def send():
    while not glob.glob(r"{windows(tmp_path)}\\.out.ovtq-*\\openvino_tokenizer.bin"):
        time.sleep(0.05)
    time.sleep(4)
    for _ in range(2):
        {send}
        time.sleep(0.2)
threading.Thread(target=send, daemon=True).start()
{begin}
sys.exit(run())"""
    process = subprocess.Popen(
        [RUN, "-c", code, MINI, windows(tmp_path / "out"), "--target", "cpu"],
        stdin=console,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    _, said = process.communicate(timeout=200)
    assert said.split() == ["ovtq-convert:", "interrupted;", "nothing", "was", "written"]
    assert process.returncode == 2
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reader_that_leaves() -> None:
    code = """import subprocess, sys
command = [sys.executable, "-c", "import sys; from ovtq.cli.entry import inspect; sys.exit(inspect())", *sys.argv[1:]]
process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
process.stdout.close()
print(process.wait(), process.stderr.read())"""
    for given in (MINI, "--help"):
        assert python(code, given).stdout.strip() == "0 b''"


@pytest.mark.slow
def test_a_dozen_kills_leave_nothing(convert: Callable[..., Path], tmp_path: Path) -> None:
    """At random moments; after each the old result is whole, or set aside; one more run tidies up after all."""
    out = Path(shutil.copytree(convert(TINY["5.5"], "--preset", "exact", verified=True), tmp_path / "out"))
    command = arguments("convert", TINY["5.5"], out, "--force", "--target", "cpu")
    begun = time.monotonic()
    subprocess.run(command, capture_output=True, check=True)
    whole = time.monotonic() - begun  # which other work on the machine makes longer
    draw, left = np.random.default_rng(0), set()
    for _ in range(12):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(whole / 3, whole))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left |= set(os.listdir(tmp_path))
        if out.exists():
            assert json.loads((out / io.RECORD).read_text())["verified"]["layers"] == 4
    assert len(left) > 3
    ovtq("convert", TINY["5.5"], out, "--force", "--no-verify")
    assert os.listdir(tmp_path) == ["out"]
