"""tools/gpu/versions.py: what is refused, and how its tables are put together; what it finds takes many minutes."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

TOOL = ROOT / "tools" / "gpu" / "versions.py"


@pytest.fixture
def tool() -> dict[str, Any]:
    return runpy.run_path(str(TOOL), run_name="versions")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--versions", "newest"], "'newest' is no version like"),
        (["--presets", "exact,nothing"], "no preset is named 'nothing'"),
        (["no/such/folder"], "no/such/folder"),
        (["--json", "no/such/folder/file"], "no such folder"),
        ([], "emulated is not installed in"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tool: dict[str, Any],
) -> None:
    monkeypatch.setenv("OVTQ_GPU_DIR", str(tmp_path))
    assert tool["main"](arguments) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


def test_versions_of_which_the_same_is_true_share_a_row(tool: dict[str, Any]) -> None:
    versions = ["1.0.0", "1.1.0", "1.2.0", "1.3.0"]
    cells = {"1.0.0": ["yes"], "1.1.0": ["no"], "1.2.0": ["no"], "1.3.0": ["yes"]}
    assert tool["table"](("", "OpenVINO", "runs"), {"model": cells}, versions).splitlines()[2:] == [
        "| model | 1.0.0, 1.3.0 | yes |",
        "| model | 1.1.0–1.2.0 | no |",
    ]
