"""A small campaign of wrong inputs and of kills (tools/fuzz/campaign.py runs large ones), and that it finds faults."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT, TINY

FUZZ = ROOT / "tools" / "fuzz"
NAMES = ("campaign", "cases", "kills", "mutate", "worker", "soak")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the campaign by name."""
    monkeypatch.syspath_prepend(str(FUZZ))
    return {name: importlib.import_module(name) for name in NAMES}


@pytest.mark.parametrize("many", [80, pytest.param(200, marks=pytest.mark.slow)])
def test_some_of_the_campaigns_cases(many: int, tool: dict[str, ModuleType], tmp_path: Path) -> None:
    counts, faults = tool["campaign"].cases(range(many), tmp_path)
    assert faults == []
    assert counts["refused"] > many / 2
    assert counts["written"] > many / 20
    assert counts.total() == many


def test_thirty_kills(tool: dict[str, ModuleType]) -> None:
    found = tool["kills"].light(range(30))
    assert [fault for _, _, fault in found if fault] == []
    assert sum(what.startswith("SIG") for _, what, _ in found) > 4  # the others came too late


@pytest.mark.slow
def test_whole_conversions_killed(tool: dict[str, ModuleType]) -> None:
    found = tool["kills"].whole(range(20))
    assert [fault for _, _, fault in found if fault] == []
    assert [number for number, _, _ in found] == [*range(20)]


def test_a_case_is_the_same_whenever_it_is_made(tool: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base, campaign = tool["campaign"].prepared(tmp_path / "base"), tool["campaign"]
    for number, (kind, (_, make)) in enumerate(tool["cases"].KINDS.items()):
        made = []
        for name in ("a", "b"):
            folder = tmp_path / name / str(number)
            folder.mkdir(parents=True)
            case = make(tool["mutate"].Given(number, kind, random.Random(number), folder, base))
            words = [text.replace(str(folder), "") for text in case.arguments]
            made.append((case.kind, case.done, words, campaign.contents(folder)))
            campaign._remove(folder)
        assert made[0] == made[1]
        assert made[0][0] == kind


def test_faults_are_found_and_kept(
    tool: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker that lets an error out, writes two lines, leaves a file, changes the input, hangs or is wrong."""
    campaign = tool["campaign"]
    fine = {"code": 2, "stderr": "ovtq-convert: no\n", "apart": None}

    class Planted:
        def __init__(self, temporary: Path, core: int | None) -> None:
            self.temporary = temporary

        def run(self, case: object, folder: Path) -> object:
            number = case.number  # type: ignore[attr-defined]
            if number == 3:
                (folder / "left").touch()
            if number == 4:
                (folder / "model" / "config.json").write_text("{}")
            if number == 8:
                (self.temporary / "left").touch()
            return [
                {**fine, "code": "KeyError: 'x'"}, {**fine, "stderr": "a\nb\n"}, "hangs", fine, fine,
                {**fine, "stderr": "ovtq-convert: failed where nothing should, please"}, {**fine, "stderr": ""},
                {"code": 0, "stderr": "", "apart": 0.5}, fine, fine,
            ][number]  # fmt: skip

        def close(self) -> None:
            pass

    monkeypatch.setattr(campaign, "Worker", Planted)

    def make(number: int, folder: Path, base: Path) -> object:
        shutil.copytree(TINY["5.5"], folder / "model")
        return tool["mutate"].Case(number, "config", "convert", [], "nothing")

    monkeypatch.setattr(campaign.made, "make", make)
    monkeypatch.setattr(campaign, "prepared", lambda base: base)
    tally = campaign.Tally("cases", tmp_path / "log")
    counts, faults = campaign.cases(range(10), tmp_path, tally=tally)
    assert [text.split(": ", 1)[1].partition(":")[0] for text in faults] == [
        "let out", "2 lines", "hangs", "left behind", "changed", "unforeseen", "0 lines", "verified, but wrong",
        "left among temporary files",
    ]  # fmt: skip
    assert counts["refused"] == 1
    again = campaign.Tally("cases", tmp_path / "log")  # what is in the log is not done again
    assert campaign.cases(range(10), tally=again) == (counts, faults)
    assert json.loads((tmp_path / "4" / "replay.json").read_text())["number"] == 4
    assert (tmp_path / "4" / "model" / "config.json").read_bytes() == (TINY["5.5"] / "config.json").read_bytes()


def test_its_own_arithmetic_tells_right_from_wrong(
    tool: dict[str, ModuleType], convert: Callable[..., Path], tmp_path: Path
) -> None:
    import openvino as ov
    from openvino import opset15 as op

    difference = tool["worker"].difference
    assert difference(TINY["5.5"], convert(TINY["5.5"], "--preset", "exact", "--target", "cpu")) < 1e-4
    model = ov.Core().read_model(TINY["5.5"] / "openvino_model.xml")
    for node in model.get_ops():
        if node.get_type_name() == "LessEqual":  # each query sees one token ahead
            later = op.add(
                node.input_value(1), op.constant(np.array(1, node.input_value(1).get_element_type().to_dtype()))
            )
            node.input(1).replace_source_output(later.output(0))
    model.validate_nodes_and_infer_types()
    (tmp_path / "wrong").mkdir()
    ov.save_model(model, tmp_path / "wrong" / "openvino_model.xml")
    assert difference(TINY["5.5"], tmp_path / "wrong") > 1e-2


def test_a_soak_by_the_command(tmp_path: Path) -> None:
    command = [sys.executable, FUZZ / "campaign.py", "--cases", "0", "--kills", "0", "--soak", "300", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokens in " in done.stdout
    assert "LLMPipeline" in done.stdout
    assert "0 faults" in done.stdout
