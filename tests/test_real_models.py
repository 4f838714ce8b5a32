"""A model with real weights, from its package: converted, evaluated and timed as a user would.

Needs the extra `export` and the network; minutes long.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from ovtq.cli.bench import main as bench
from ovtq.cli.convert import main as convert
from ovtq.cli.evaluate import main as evaluate
from ovtq.cli.inspect import main as inspect

pytestmark = pytest.mark.slow
MOST = {"u8": 1e-3, "k6v4": 2e-3}  # nats, the mean KLD; thrice what 4,096 tokens have


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, as tools/real_models.py makes it."""
    pytest.importorskip("gguf", reason="needs the extra export")
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    command = [sys.executable, str(ROOT / "tools" / "real_models.py"), "smollm2-135m", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "download" in done.stderr and done.returncode:
        pytest.skip("its package can't be downloaded here")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_converted_evaluated_and_timed(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect([str(smollm2), "--target", "cpu"]) == 0
    assert "recommended: u8" in capsys.readouterr().out
    made = {preset: str(tmp_path / preset) for preset in MOST}
    for preset, out in made.items():
        assert convert([str(smollm2), out, "--preset", preset, "--target", "cpu"]) == 0
    text, figures = str(ROOT / "tests" / "data" / "heldout.txt"), tmp_path / "eval.json"
    options = ["--text", text, "--windows", "2", "--window", "512", "--trials", "0", "--greedy", "0", "--no-verify"]
    assert evaluate([str(smollm2), *made.values(), *options, "--json", str(figures)]) == 0
    rows = {row["candidate"]: row for row in json.loads(figures.read_text(encoding="utf-8"))["rows"]}
    for preset, out in made.items():
        assert 0 < rows[out]["mean_kld"] < MOST[preset]
    assert bench([str(smollm2), made["u8"], "--contexts", "256", "--steps", "8"]) == 0
