"""The report: one page that needs nothing else, with every figure in it, whatever the names are."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from ovtq import report
from ovtq.errors import InputError

pytest.importorskip("matplotlib", reason="needs the extra [eval]")
ODD = 'dir/<b>&"quoted",KV_CACHE_PRECISION=u8'


def row(name: str, role: str, kld: float, **more: Any) -> dict[str, Any]:
    found = {"candidate": name, "role": role, "cache": "12 caches u8", "bytes_per_token": 1728, "flat_bytes": 0}
    found |= {"mean_kld": kld, "median_kld": kld / 3, "kld_p999": kld * 90, "kld_by_position": [kld, 2 * kld]}
    found |= {"same_top": 0.9951, "perplexity": 20.5, "bits_per_byte": 1.1212, "verdict": "ok", "reason": ""}
    return found | {"needles": None, "greedy": None} | more


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    cells = [{"needles": 1, "length": 4096, "depth": depth, "right": 3, "of": 4} for depth in (0.1, 0.9)]
    greedy = {"prompts": 8, "tokens": 64, "same": 41.5, "identical": 3}
    common = {"ovtq": "0.1.0", "versions": {"openvino": "2026.4.1-1", "python": "3.11"}, "date": "2026-01-02T03:04:05"}
    rows = [
        row("stock", "reference", 0.0, verdict="equal", needles=cells, greedy=greedy),
        row("stock, in chunks of 32", "floor", 9e-13, verdict="equal"),
        row(ODD, "candidate", 1.4e-4, needles=cells, greedy=greedy),
        row("exact", "candidate", 1.1e-12, verdict="equal", bytes_per_token=None, flat_bytes=None),
        row("broken", "candidate", 0.5, verdict="wrong", reason="its results differ by <3>"),
    ]
    first = {"kind": "eval", "model": "m", "device": "CPU", "text": "t.txt", "windows": 5, "window": 1024, "chunk": 64}
    first |= common | {"positions": [[0, 512], [512, 1024]], "rows": rows}
    spread = {"median": 12.34, "low": 11.0, "high": 13.0}
    one = {"candidate": ODD, "through": "openvino", "wrong": "", "state_bytes": None, "rss_prefill": None}
    one |= {"rss_decode": 2.5e9, "tpot_ms": spread, "tpot_ratio": {"median": 0.73, "low": 0.7, "high": 0.8}}
    prompt = {"prompt": "Who <are> you?", "prompt_tokens": 5, "new_tokens": 200, "runs": 3, "ttft_ms": spread}
    prompt |= {"tokens_per_s": 81.25, "latency_s": 2.4}
    contexts = [
        one | {"context": n, "filled": True, "prefill_s": None, "prefill_ratio": None, "state_bytes": 1000 * n}
        for n in (256, 8192)
    ]
    machine = {"cpu": "A CPU", "cores": 2, "ram": 8 << 30}
    second = {"kind": "bench", "model": "m", "device": "CPU", "machine": machine, "prompts": [one | prompt]}
    return [first, second | common | {"contexts": contexts}]


def test_every_figure_is_there(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    report.write(tmp_path / "r.html", runs)
    page = (tmp_path / "r.html").read_text()
    for text in (
        "1,728",
        "1.4e-04",
        "99.51%",
        "1.1212",
        "6 of 8",
        "41.5 of 64 tokens",
        "12.34",
        "0.73",
        "81.2",
        "2,500",
    ):
        assert text in page, text
    for text in (
        "2,500",
        "8,192",
        "8,192,000",
        "the noise floor",
        "WRONG: its results differ by &lt;3&gt;",
        "A CPU, 2 cores",
    ):
        assert text in page, text
    assert page.count("<figure>") == 6  # front, positions, needles; TPOT, states, memory
    assert "Who &lt;are&gt; you?" in page


def test_it_needs_nothing_else(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    report.write(tmp_path / "r.html", runs)
    page = (tmp_path / "r.html").read_text()
    named = set(re.findall(r"https?://[^\"'<> ]+", page))
    assert named <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<b>" not in page
    assert "<script" not in page
    assert "#010203" not in page
    assert "currentColor" in page


def test_equal_figures_make_equal_pages(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        report.write(tmp_path / name, runs)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_command(runs: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "eval.json", tmp_path / "bench.json"]
    for path, run in zip(files, runs, strict=True):
        path.write_text(json.dumps(run))
    assert report.main([*map(str, files), "--output", str(tmp_path / "out.html")]) == 0
    assert (tmp_path / "out.html").is_file()
    del runs[0]["rows"][0]["cache"]
    files[0].write_text(json.dumps(runs[0]))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bad.json").write_text("{")
    for options, message in (
        ([tmp_path / "bad.json"], "can't be read"),
        ([tmp_path / "list.json"], "not written by ovtq-eval or ovtq-bench"),
        ([tmp_path / "none.json"], "No such file"),
        ([files[0], "--output", tmp_path / "x.html"], "not of this version's form"),
        ([files[1], "--output", tmp_path / "nowhere" / "x.html"], "no such folder"),
    ):
        assert report.main([str(option) for option in options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


def test_short_names() -> None:
    assert report.plots.short("stock:KV_CACHE_PRECISION=u8") == "stock u8"
    assert report.plots.short("stock:VALUE_CACHE_PRECISION=u4") == "stock V u4"
    turbo = "KEY_CACHE_QUANT_ALG=TURBO,VALUE_CACHE_QUANT_ALG=TURBO,KEY_CACHE_PRECISION=u4,VALUE_CACHE_PRECISION=u4"
    assert report.plots.short(f"stock:{turbo}") == "stock TURBO u4"
    assert report.plots.short("some/where/k6v4/") == "k6v4"
    assert report.plots.short("host:prune128") == "host:prune128"
    assert report.plots.short("paged:a/rotate,KV_CACHE_PRECISION=u4") == "paged:rotate u4"


def test_no_matplotlib_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="needs matplotlib"):
        report.check(tmp_path / "r.html")
