"""A model with real weights, from its package: converted, verified, calibrated, evaluated and timed as a user would.

Needs the extra `export` and the network; minutes long. Others of tools/real_models.py are tried if OVTQ_REAL_MODELS
names them: their licences are for whoever asks for them to accept.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

from ovtq.cli.bench import main as bench
from ovtq.cli.calibrate import main as calibrate
from ovtq.cli.convert import main as convert
from ovtq.cli.evaluate import main as evaluate
from ovtq.cli.inspect import main as inspect

MOST = {"u8": 1e-3, "k6v4": 2e-3}  # nats, the mean KLD; more than twice what any of these models has
NAMES = ["smollm2-135m", *os.environ.get("OVTQ_REAL_MODELS", "").split()]


def tool() -> ModuleType:
    """tools/real_models.py."""
    spec = importlib.util.spec_from_file_location("real_models", ROOT / "tools" / "real_models.py")
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=NAMES)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model, as tools/real_models.py makes it."""
    pytest.importorskip("gguf", reason="needs the extra export")
    folder = tmp_path_factory.mktemp("real") / request.param
    command = [sys.executable, str(ROOT / "tools" / "real_models.py"), request.param, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and ("download" in done.stderr or "needs transformers" in done.stderr):
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.slow
def test_converted_evaluated_and_timed(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default is verified, and loses less than the exported model in the same cache; calibrated, less again."""
    assert inspect([str(real), "--target", "cpu"]) == 0
    assert "recommended: u8" in capsys.readouterr().out
    made = {preset: str(tmp_path / preset) for preset in (*MOST, "text")}
    assert convert([str(real), made["u8"], "--target", "cpu"]) == 0
    record = json.loads((tmp_path / "u8" / "ovtq.json").read_text(encoding="utf-8"))
    assert record["verified"]["relative"] <= record["verified"]["tolerance"] < 1e-2
    assert convert([str(real), made["k6v4"], "--target", "cpu", "--preset", "k6v4", "--no-verify"]) == 0
    assert calibrate([str(real)]) == 0
    assert convert([str(real), made["text"], "--target", "cpu", "--no-verify"]) == 0
    assert "calibration.npz" in capsys.readouterr().out
    text, figures = str(ROOT / "tests" / "data" / "heldout.txt"), tmp_path / "eval.json"
    options = ["--text", text, "--windows", "2", "--window", "512", "--trials", "0", "--greedy", "0", "--no-verify"]
    exported = "stock:KV_CACHE_PRECISION=u8"
    assert evaluate([str(real), exported, *made.values(), *options, "--json", str(figures)]) == 0
    rows = {row["candidate"]: row for row in json.loads(figures.read_text(encoding="utf-8"))["rows"]}
    assert all(0 < rows[made[preset]]["mean_kld"] < most for preset, most in MOST.items())
    assert rows[made["text"]]["mean_kld"] < rows[made["u8"]]["mean_kld"] < rows[exported]["mean_kld"]
    assert rows[made["u8"]]["bytes_per_token"] == rows[exported]["bytes_per_token"]
    assert bench([str(real), made["u8"], "--contexts", "256", "--steps", "8"]) == 0


def test_text_is_cut_by_the_scores_of_its_pieces() -> None:
    """SentencePiece's BPE: the whole that scores best is joined first; what has no piece is bytes."""
    pytest.importorskip("tokenizers", reason="needs the extra optimum")
    pieces = ["<bos>", "<unk>", "a", "b", "c", "▁", "ab", "bc", "▁ab", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [3, 3, *[1] * 7, *[6] * 256]
    told = {"tokens": pieces, "token_type": kinds, "scores": [0.0] * len(pieces), "unknown_token_id": 1}
    for best, cut in (("ab", ["▁ab", "c"]), ("bc", ["▁", "a", "bc"])):
        told["scores"][pieces.index("▁ab")] = -3.0
        for piece in ("ab", "bc"):
            told["scores"][pieces.index(piece)] = -1.0 if piece == best else -2.0
        made = tool().sentence_piece(told)
        assert made.encode(" abc").tokens == cut
        assert made.encode("é").tokens == ["<0xC3>", "<0xA9>"]
        assert made.decode(made.encode(" abcé").ids) == " abcé"
