"""ovtq-eval: as a user runs it, on the bundled model, and against conversions that are silently wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from conftest import MINI, ROOT
from faults import band_off_by_one, not_undone, scales_too_large

from ovtq.cli.convert import main as convert_by
from ovtq.cli.evaluate import main
from ovtq.evidence.divergence import Reference, Text
from ovtq.evidence.needles import agreement, haystacks, right

pytest.importorskip("openvino_genai", reason="needs the extra [eval]")
from ovtq.runtime.text import Tokenizer

HELDOUT = ROOT / "tests" / "data" / "heldout.txt"
SHORT = ["--windows", "1", "--window", "300", "--trials", "0", "--greedy", "0"]


def run(*options: str | Path) -> int:
    return main([str(MINI), "--text", str(HELDOUT), *map(str, options)])


def test_the_table(exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "eval.json"
    asked = ["--lengths", "400", "--depths", "0.5", "--trials", "1", "--greedy", "1", "--greedy-tokens", "6"]
    options = [exact, "stock:KV_CACHE_PRECISION=u4", "host:prune128", *SHORT[:4], *asked, "--json", found]
    assert run(*options) == 0
    results = json.loads(found.read_text())
    reference, floor, same, u4, pruned = results["rows"]
    assert reference["mean_kld"] == 0
    assert reference["needles"] == [{"needles": 1, "length": 400, "depth": 0.5, "right": 1, "of": 1}]
    assert 0 < floor["mean_kld"] < 1e-10
    assert same["verdict"] == "equal"
    assert same["greedy"] == {"prompts": 1, "tokens": 6, "same": 6.0, "identical": 1}
    assert u4["verdict"] == "ok"
    assert 1e-3 < u4["mean_kld"] < 1e-1
    assert np.mean(u4["kld_by_position"]) == pytest.approx(u4["mean_kld"], rel=0.1)
    assert pruned["mean_kld"] > u4["mean_kld"]
    text = capsys.readouterr().out
    assert "; 12 caches u4]" in text
    assert "equals the reference to the noise floor" in text

    # what is there is kept, what is new is added; other settings are refused
    assert run(*options, "stock:KV_CACHE_PRECISION=u8", "--resume") == 0
    again = json.loads(found.read_text())
    assert again["rows"][2:5] == [same, u4, pruned]
    assert again["rows"][5]["cache"] == "12 caches u8"
    assert capsys.readouterr().out.count("(kept)") == 3
    assert run(*options, "--resume", "--chunk", "32") == 2
    assert "made with other settings" in capsys.readouterr().err


def test_logits_that_are_kept_are_read_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, found = tmp_path / "logits", tmp_path / "eval.json"
    options = ["stock:KV_CACHE_PRECISION=u8", *SHORT, "--reference", logits, "--json", found]
    assert run(*options) == 0
    assert logits.stat().st_size == 4 * 300 * 8192
    rows = json.loads(found.read_text())["rows"]

    def ran(*_: Any) -> None:
        raise RuntimeError("the reference was run again")

    monkeypatch.setattr(Reference, "__init__", ran)
    assert run(*options, "--resume") == 0
    assert json.loads(found.read_text())["rows"] == rows  # those of the reference, too
    assert run(*options[:-1], tmp_path / "other.json", "--window", "200") != 0
    assert "the reference was run again" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_at_a_time_are_the_same(convert: Callable[..., Path], tmp_path: Path) -> None:
    """--jobs changes no figure but by rounding, nor their order; what was pruned of a window is told."""
    pruned = convert(MINI, "--preset", "exact", "--target", "cpu", "--budget", "64", "--slack", "15", "--no-verify")
    asked = ["--lengths", "300", "--depths", "0.5", "--trials", "1", "--greedy", "1", "--greedy-tokens", "4"]
    found = []
    for jobs in ("1", "2"):
        path = tmp_path / f"{jobs}.json"
        assert (
            run(
                pruned, "stock:KV_CACHE_PRECISION=u8", *SHORT[:4], *asked, "--no-verify", "--jobs", jobs, "--json", path
            )
            == 0
        )
        found.append(json.loads(path.read_text())["rows"])
    for one, two in zip(*found, strict=True):
        assert one["candidate"] == two["candidate"]
        assert one["mean_kld"] == pytest.approx(two["mean_kld"], rel=1e-3, abs=1e-11)
        assert one["bits_per_byte"] == pytest.approx(two["bits_per_byte"], rel=1e-6)
        assert [one[key] for key in ("needles", "greedy", "pruned", "verdict")] == [
            two[key] for key in ("needles", "greedy", "pruned", "verdict")
        ]
    assert found[0][2]["pruned"] == {str(layer): [224, 76] for layer in (1, 3, 5)}
    assert found[0][3]["pruned"] is None


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Conversions that load, run and are wrong: a rotation not undone, a mask off by one, a codebook times 1.1."""
    folder, made = tmp_path_factory.mktemp("broken"), {}
    for harm, preset in ((not_undone, "exact"), (band_off_by_one, "exact"), (scales_too_large, "k6v4")):
        name = harm.__name__.strip("_")
        with pytest.MonkeyPatch.context() as patch:
            harm(patch)
            made[name] = folder / name
            options = ["--preset", preset, "--target", "cpu", "--no-verify"]
            assert convert_by([str(MINI), str(made[name]), *options]) == 0
    return made


def test_broken_conversions_are_caught(broken: dict[str, Path], tmp_path: Path) -> None:
    found = tmp_path / "eval.json"
    assert run(*broken.values(), *SHORT, "--json", found) == 1
    rows = json.loads(found.read_text())["rows"][2:]
    assert [row["verdict"] for row in rows] == ["wrong"] * 3
    assert "its graph is not what its recorded passes make" in rows[0]["reason"]  # the fault leaves nodes out
    assert "its results differ by" in rows[1]["reason"]
    assert "a layer that reads packed codes is" in rows[2]["reason"]  # the fault is a node within an If


def test_lossless_ones_are_caught_by_their_divergence_alone(broken: dict[str, Path], tmp_path: Path) -> None:
    found = tmp_path / "eval.json"
    _, *some = broken.values()
    assert run(*some, *SHORT, "--no-verify", "--max-kld", "0.001", "--json", found) == 1
    rows = json.loads(found.read_text())["rows"][2:]
    assert [row["verdict"] for row in rows] == ["wrong"] * 2
    assert "its passes are lossless, yet" in rows[0]["reason"]
    assert "above --max-kld 0.001" in rows[1]["reason"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to compare"),
        (["nowhere"], "nowhere: no such folder"),
        (["stock", "stock"], "stock: named twice"),
        (["stock", "--window", "1"], "at least 2 tokens"),
        (["stock", "--window", "200k"], "at least 204800 are needed"),
        (["stock", "--depths", "2"], "invalid shares value"),
        (["stock", "--device", "NPU9"], "device NPU9 is not there"),
        (["stock", "--resume"], "name the file"),
        (["stock", "--lengths", "10"], "too few for 1 facts"),
        (["stock", "--json", "nowhere/x.json"], "no such folder"),
        (["stock", "--report", "nowhere/x.html"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_another_models_conversion_is_refused(
    convert: Callable[..., Path], exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((exact / "ovtq.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for path in exact.iterdir():
        (other / path.name).symlink_to(path)
    (other / "ovtq.json").unlink()
    record["source"]["xml_sha256"] = "0" * 64
    (other / "ovtq.json").write_text(json.dumps(record))
    assert run(other, *SHORT) == 2
    assert "but of another model" in capsys.readouterr().err


class Known:
    """A model that says the same logits always."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits, self.vocabulary = logits, logits.shape[-1]

    def reset(self) -> None:
        self.past = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        self.past += ids.shape[1]
        return self.logits[None, self.past - ids.shape[1] : self.past]


def test_the_figures_by_hand() -> None:
    draw = np.random.default_rng(0)
    first, second = (draw.standard_normal((6, 5)).astype(np.float32) for _ in range(2))
    ids = draw.integers(0, 5, (1, 6))
    reference = Reference(Known(first), Text(ids, 10), 4, lambda: None)
    found = reference.compare(Known(second), 3, lambda: None, "x")
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(-1, keepdims=True) for x in (first, second))
    kld = (p * np.log(p / q)).sum(-1)
    nats = -np.log(q[np.arange(5), ids[0, 1:]]).sum()
    assert found["mean_kld"] == pytest.approx(kld.mean())
    assert found["median_kld"] == pytest.approx(np.median(kld))
    assert found["kld_by_position"] == pytest.approx(kld)
    assert found["same_top"] == pytest.approx((first.argmax(-1) == second.argmax(-1)).mean())
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / 10)
    assert found["perplexity"] == pytest.approx(np.exp(nats / 5))


def test_haystacks_hold_their_facts() -> None:
    tokenizer = Tokenizer(MINI)
    text = tokenizer.documents(HELDOUT)
    for stack in haystacks(text, tokenizer, [400, 900], [0.1, 0.9], [1, 4], 1, seed=0):
        written = tokenizer.decode(stack.ids[0])
        assert stack.ids.shape[1] == pytest.approx(stack.length, abs=8)  # a template makes new tokens where texts meet
        assert written.count("The code of the") == stack.needles
        place = written.index(stack.code) / len(written)
        assert place == pytest.approx(stack.depth, abs=0.15)
        assert stack.code not in written[written.index("Question:") :]


def test_answers_and_agreement() -> None:
    assert right(" it is 40213.\n", "40213")
    assert not right(" 402133", "40213")
    found: dict[str, Any] = agreement([[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [1, 9, 3]])
    assert found == {"prompts": 2, "tokens": 3, "same": 2.0, "identical": 1}


def test_as_hosts_load_it(exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row each at f32 and with no property, the exported model's first; each says what it was computed in."""
    found = tmp_path / "eval.json"
    options = [
        "--text",
        str(ROOT / "tests" / "data" / "heldout.txt"),
        "--windows",
        "1",
        "--window",
        "128",
        "--chunk",
        "100",
        "--trials",
        "0",
        "--greedy",
        "0",
    ]
    assert main([str(MINI), str(exact), *options, "--no-verify", "--at", "both", "--json", str(found)]) == 0
    rows = json.loads(found.read_text())["rows"]
    own = ov.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    assert [(row["role"], row["computes"].partition(",")[0]) for row in rows] == [
        ("reference", "f32"), ("floor", "f32"), ("candidate", "f32"), ("candidate", own), ("candidate", own),
    ]  # fmt: skip
    assert [row["candidate"] for row in rows[3:]] == ["stock, as hosts load it", f"{exact}, as hosts load it"]
    assert rows[3]["cache"].endswith("u8")
    assert 0 < rows[4]["mean_kld"] < 0.05
    assert f"[{own}" in capsys.readouterr().out
