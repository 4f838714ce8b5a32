"""ovtq-doctor on a CPU: it comes to its end, goes on where it was stopped, and what fails is a line of its page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY

from ovtq.cli import doctor, doctor_page
from ovtq.evidence import trial
from ovtq.ir import io
from ovtq.runtime.runner import Runner

ASKED = ["--devices", "CPU", "--presets", "exact", "--contexts", "40,90", "--steps", "8", "--no-verify"]


def done(out: Path, *options: str) -> dict[str, Any]:
    assert doctor.main([str(TINY["5.5"]), "--out", str(out), *ASKED, *options]) == 0
    assert {path.name for path in out.iterdir()} == {"doctor.md", "doctor.json"}
    return json.loads((out / "doctor.json").read_text(encoding="utf-8"))


def test_to_its_end_and_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = done(tmp_path / "out")
    rows = facts["rows"]["CPU"]
    assert list(rows) == ["as exported", "exact"]
    for row in rows.values():
        assert [found["context"] for found in row["contexts"]] == [40, 90]
        assert all(found["tpot_s"] > 0 < found["ttft_s"] for found in row["contexts"])
        assert 0 <= row["logits"]["relative"] < 0.2
    assert rows["as exported"]["contexts"][1]["state_bytes"] == 90 * 4 * 2 * 2 * 64 * 4
    page, said = (tmp_path / "out" / "doctor.md").read_text(encoding="utf-8"), capsys.readouterr().out
    assert said.startswith("# ovtq doctor: tiny-transformers-5.5")
    assert page == doctor_page.page(facts) == said.removesuffix("\n")
    assert str(TINY["5.5"].parent) not in page + json.dumps(facts)

    del rows["exact"]  # as if it had been stopped before
    (tmp_path / "out" / "doctor.json").write_text(json.dumps(facts), encoding="utf-8")
    capsys.readouterr()
    again = done(tmp_path / "out")["rows"]["CPU"]
    assert again["as exported"] == rows["as exported"]
    assert again["exact"]["logits"]["relative"] > 0
    assert "[1/2]" not in (err := capsys.readouterr().err)
    assert "[2/2] CPU: exact" in err
    assert doctor.main([str(TINY["5.5"]), "--out", str(tmp_path / "out"), *ASKED, "--steps", "16"]) == 2
    assert "another steps; --fresh begins anew" in capsys.readouterr().err


def test_the_logits_are_compared_with_the_exported_models(tmp_path: Path) -> None:
    expected, other = np.random.default_rng(0).standard_normal((2, 5, 9))
    np.savez(tmp_path / "a", logits=expected)
    np.savez(tmp_path / "b", logits=other)
    found = doctor._compared(tmp_path / "a.npz", tmp_path / "b.npz")
    distances = [np.sqrt(((x - y) ** 2).sum() / (x**2).sum()) for x, y in zip(expected, other, strict=True)]
    assert found["relative"] == pytest.approx(np.mean(distances))
    assert found["same_top"] == np.mean([x.argmax() == y.argmax() for x, y in zip(expected, other, strict=True)])


def test_what_takes_too_long_or_falls_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = done(tmp_path / "late", "--limit", "1")["rows"]["CPU"]
    assert rows["exact"]["verified"] == {"written": False, "on": None, "said": "stopped after 1 s (--limit)"}
    page = (tmp_path / "late" / "doctor.md").read_text(encoding="utf-8")
    assert "- exact: verification: stopped after 1 s (--limit)" in page
    assert [doctor.cut_short(rows["exact"], limit) for limit in (1, 2)] == [False, True]  # then it is done again
    assert not doctor.cut_short({"failed": "crashed with exit code -9"}, 900)
    assert not doctor.cut_short({"verified": {"written": True, "said": ""}}, 900)

    (tmp_path / "fall.py").write_text("import os; print('{\"compile_s\": 1.0}', flush=True); os.abort()")
    monkeypatch.syspath_prepend(str(tmp_path))
    options = doctor.parser().parse_args([str(TINY["5.5"])])
    code, out, said = doctor._run(options, ["fall"])
    assert (code < 0 or code > 2, out) == (True, '{"compile_s": 1.0}\n')
    assert said.startswith("crashed with exit code ")


def test_bad_input_is_one_line(
    convert: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = convert(TINY["5.5"], "--preset", "exact", "--target", "cpu", "--no-verify")
    for arguments, said in (
        (["nowhere"], "nowhere: no such folder"),
        ([converted], "a converted model; give the exported one"),
        ([TINY["5.5"], "--presets", "best"], "no preset is named 'best'"),
        ([TINY["5.5"], "--devices", "NPU.7"], "device NPU.7 is not there"),
    ):
        capsys.readouterr()
        assert doctor.main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        assert said in (err := capsys.readouterr().err)
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_table_is_not_broken_by_what_a_driver_says() -> None:
    assert doctor_page._table(["", "a"], [["x|y", "two\nlines"]]).splitlines()[2:] == ["| x/y | two lines |"]


def test_logits_of_a_trial_are_those_of_its_calls(tmp_path: Path) -> None:
    out, f32 = tmp_path / "logits.npz", "INFERENCE_PRECISION_HINT=f32"
    assert trial.main([str(TINY["5.5"]), "CPU", "--logits", str(out), "--property", f32]) == 0
    runner = Runner(io.model_xml(TINY["5.5"]), "CPU", dict([f32.split("=")]))
    draw = np.random.default_rng(0)
    expected = [runner.step(draw.integers(0, 256, (1, count)))[0, -20:] for count in trial.CHECKED]
    assert np.allclose(np.load(out)["logits"], np.concatenate(expected), rtol=0, atol=1e-5)
