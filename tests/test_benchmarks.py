"""The tables of docs/benchmarks are those of the figures beside them, which say how they were measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MINI, ROOT

sys.path.insert(0, str(ROOT / "tools"))
import benchmark_tables

FOLDER = ROOT / "docs" / "benchmarks"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.stem != "README")  # which is a list of them
FIGURES = sorted(FOLDER.glob("*.json"))


def tables(path: Path) -> dict[str, dict[str, Any]]:
    """Those of a file, by name; none of a run of ovtq-bench."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found.get("tables") or found.get("runs") or {}


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_of_a_page_is_made_of_figures(page: Path) -> None:
    """`tests/test_docs.py` holds them to be current."""
    text = page.read_text(encoding="utf-8")
    assert benchmark_tables.PART.search(text)
    assert not re.search(r"^\|", benchmark_tables.PART.sub("", text), re.M), "a table without figures beside it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_figure_that_was_changed_in_a_page_alone_is_seen(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in benchmark_tables.PART.finditer(text):
        *_, last = re.finditer(r"\d", part[4])
        at = part.start(4) + last.start()
        changed = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        assert benchmark_tables.filled(changed) == text != changed


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.name)
def test_figures_are_used_and_say_how_they_were_measured(path: Path) -> None:
    """Command, commit, date and machine; the page beside them names command and commit, too."""
    used = {
        (part[3], part[2]): page for page in PAGES for part in benchmark_tables.PART.finditer(page.read_text("utf-8"))
    }
    assert path.name in {name for name, _ in used}
    found = json.loads(path.read_text(encoding="utf-8"))
    whole = {name: found for file, name in used if file == path.name and "about" in found}  # of one command
    for name, table in (tables(path) or whole).items():
        about = table["about"]
        assert about.keys() == {"command", "commit", "date", "machine"}
        assert all(about.values())
        assert re.fullmatch(r"2\d{3}-\d\d-\d\d", about["date"])
        text = flat(used[path.name, name].read_text(encoding="utf-8"))
        for word in about["command"]:
            assert _said(word, text), word
        for commit in about["commit"].split(" and "):
            assert commit in text


def _said(command: str, text: str) -> bool:
    """Whether a page has a command: as it is, or "the same without" a flag of it."""
    return flat(command).split(" --")[0] in text


def test_a_cell_is_written_as_its_column_says() -> None:
    assert benchmark_tables.cell([1.03, 1.0, 1.046], "{.2f} ({.1f}–{.2f})") == "1.03 (1.0–1.05)"
    assert benchmark_tables.cell(12_582_912, "{,}") == "12,582,912"
    assert benchmark_tables.cell(1.12e-4, "{.2e}") == "1.12e-4"
    assert benchmark_tables.cell(2.5e10, "{.1e}") == "2.5e10"
    assert benchmark_tables.cell({"form": "{.1f} GB", "values": [3.2]}, "{} MB") == "3.2 GB"
    assert benchmark_tables.cell("–", "{.2f}") == "–"
    with pytest.raises(ValueError, match="too many numbers"):
        benchmark_tables.cell([1, 2], "{}")


def test_a_tools_figures_say_how_they_were_made(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("The sea was calm, and the harbour lay still in the sun.")
    command = [sys.executable, ROOT / "tools" / "measure_loss.py", text, MINI, "--json", out]
    printed = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["about"].keys() == {"command", "commit", "date", "machine", "versions"}
    assert found["about"]["command"] == f"measure_loss.py {text} {MINI} --json {out}"
    (row,) = found["rows"]
    assert f"{row['nats_per_token']:.4f} " in printed
    assert 0 < row["nats_per_token"] < 10
