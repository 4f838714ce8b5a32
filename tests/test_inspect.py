"""ovtq-inspect: its numbers against compiled models, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MINI, TINY, load

from ovtq import pipeline
from ovtq.cli.inspect import key_bias_shares, main
from ovtq.ir.io import model_xml
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner


def facts(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def held(model_dir: Path, tokens: int) -> int:
    """Bytes that a compiled model's states hold at f32, the text read in calls of 50 tokens."""
    runner = Runner(model_xml(model_dir), "CPU", EXACT_PROPERTIES)
    ids = np.random.default_rng(0).integers(0, runner.vocabulary, (1, tokens))
    for start in range(0, tokens, 50):
        runner.step(ids[:, start : start + 50])
    return runner.state_bytes()


def test_the_bytes_are_those_of_a_compiled_model(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, tiny, "--target", "cpu", "--context", "1,230")
    assert found["architecture"] == "GptOssForCausalLM"
    assert [layer["window"] for layer in found["layers"]] == [16, None, 16, None]
    stock = next(row for row in found["memory"] if row["cache"] == "as exported, f32")
    assert stock["at"]["230"] == held(tiny, 230) == 230 * sum(group["per_token"] for group in found["states"])


@pytest.mark.parametrize(
    ("preset", "target"),
    [
        ("k6v4", "cpu"),
        ("exact", "gpu"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("exact", "cpu"), ("k6v4", "gpu"), ("rotate", "gpu"))
        ),
    ],
)
def test_a_converted_models_bytes_and_those_foretold(
    convert: Callable[..., Path], preset: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = convert(TINY["5.5"], "--preset", preset, "--target", target, "--no-verify")
    capsys.readouterr()
    at = ("--context", "40,330")
    found = facts(capsys, out, "--target", "cpu", *at)
    assert found["converted"]["preset"] == preset
    assert found["converted"]["target"] == target
    assert found["converted"]["verified"] is None
    assert found["memory"][0]["at"] == {tokens: held(out, int(tokens)) for tokens in ("40", "330")}
    own = facts(capsys, out, *at)  # counted for what it was made for
    assert own["target"] == target
    foretold = next(
        row for row in facts(capsys, TINY["5.5"], "--target", target, *at)["memory"] if row["cache"] == preset
    )
    assert foretold | {"cache": ""} == own["memory"][0] | {"cache": ""}
    assert own["consumers"]['LLMPipeline, "PA"'] == ("yes" if preset == "rotate" else "no: throws")


def test_what_is_printed(convert: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    exact = convert(TINY["5.5"], "--preset", "exact", verified=True)
    capsys.readouterr()
    assert main([str(MINI), "--context", "4k", "--json", str(tmp_path / "facts.json")]) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    memory = {row["cache"]: row for row in found["memory"]}
    assert set(pipeline.PRESETS) < set(memory)
    assert not any("refused" in row for row in memory.values())
    # GPT-OSS-20B's 49,152 : 30,720 : 8,064, at 6 layers of 2 KV heads; 84 and 148 bytes a head are what the GPU plugin
    # shows of its paged cache's blocks: (64, 12), (16, 36) and (64, 20), (16, 68)
    sizes = {
        name: memory[name]["per_token"] for name in ("as exported, f16", "exact", "k6v4", "paged, u4", "paged, u8")
    }
    assert sizes == dict(zip(sizes, (3072, 1920, 504, 84 * 12, 148 * 12), strict=True))
    assert memory["exact"]["at"]["4096"] == 8_061_312  # docs/benchmarks/mini.md
    for row in memory.values():
        assert f"{row['per_token']:,}" in text
    assert "not converted" in text
    assert main([str(exact)]) == 0
    text = capsys.readouterr().out
    assert "preset exact, target gpu" in text
    assert "verified on CPU, 4 layers" in text
    assert "truncate-window" in text


def test_key_bias_beside_the_keys() -> None:
    model, description = load(TINY["5.5"])
    ids = np.random.default_rng(1).integers(0, 256, (60, 1))
    found = key_bias_shares(model, description, ids)
    # The reference: 60 sequences of one token. At position 0 RoPE turns nothing, YaRN's factor alone is on the keys
    # that the state of the whole model holds.
    runner = Runner(model_xml(TINY["5.5"]), "CPU", EXACT_PROPERTIES)
    runner.step(ids)
    held = {state.name: state.state.data for state in runner.request.query_state()}
    for layer in load(TINY["5.5"])[1].layers:
        key = held[layer.cache.key.variable_id][:, :, 0].astype(np.float64) / (0.1 * np.log(32) + 1)
        product, bias = key - layer.key_bias, layer.key_bias.astype(np.float64)
        rms = np.sqrt(np.square(product).sum(-1).mean(0))
        whole = np.sqrt(np.square(bias).sum() / np.square(product).sum((1, 2)).mean())
        share = np.square(key.mean(0)).sum() / np.square(key).sum((1, 2)).mean()
        assert found[layer.index]["by_head"] == pytest.approx(np.linalg.norm(bias, axis=-1) / rms, rel=1e-4)
        assert found[layer.index]["bias_ratio"] == pytest.approx(whole, rel=1e-4)
        assert found[layer.index]["mean_share"] == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "nowhere: no such folder"),
        ((".",), "no openvino_model.xml in it"),
        ((MINI, "--context", "many"), "invalid tokens value"),
        ((MINI, "--context", "0"), "invalid tokens value"),
        ((MINI, "--text", "nowhere.txt"), "nowhere.txt: no such file"),
        ((TINY["5.5"], "--text", __file__), "openvino_tokenizer.xml: no such file; convert_tokenizer"),
        ((MINI, "--json", "no/where.json"), "--json no/where.json"),
        ((MINI, "--target", "npu"), "--target"),
    ],
)
def test_refusals(
    arguments: tuple, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(list(map(str, arguments))) == 2
    out, err = capsys.readouterr()
    assert not out
    assert said in err
    assert err.count("\n") == 1


def test_a_record_of_another_model_is_refused(
    convert: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = convert(TINY["5.5"], "--preset", "rotate", "--no-verify")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in out.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    record = json.loads((copy / "ovtq.json").read_text(encoding="utf-8"))
    (copy / "ovtq.json").write_text(json.dumps(record | {"passes": []}), encoding="utf-8")
    capsys.readouterr()
    assert main([str(copy)]) == 2
    assert "tells of another conversion" in capsys.readouterr().err
    (copy / "ovtq.json").unlink()
    assert main([str(copy)]) == 0
    assert "no ovtq.json beside it" in capsys.readouterr().out
