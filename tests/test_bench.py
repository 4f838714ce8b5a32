"""ovtq-bench and ovtq-infer: as a user runs them; what they measure is there, no time is asserted."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MINI, ROOT

from ovtq.cli import infer
from ovtq.cli.bench import main
from ovtq.evidence.candidates import parse
from ovtq.evidence.worker import PlainOpenVINO
from ovtq.runtime.runner import Runner

pytest.importorskip("openvino_genai", reason="needs the extra [eval]")


def test_contexts(exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "bench.json"
    options = ["--contexts", "64,200", "--steps", "8", "--output", str(found)]
    assert main([str(MINI), str(exact), "host:prune128", *options]) == 0
    rows = json.loads(found.read_text())["contexts"]
    assert [(row["candidate"], row["context"]) for row in rows] == [
        (name, context) for context in (64, 200) for name in ("stock", str(exact), "host:prune128")
    ]
    for row in rows:
        assert row["tpot_ms"]["low"] <= row["tpot_ms"]["median"] <= row["tpot_ms"]["high"]
        assert row["tpot_ms"]["median"] > 0
        assert row["rss_prefill"] > 50e6
        assert row["wrong"] == ""
    assert [row["tpot_ratio"]["median"] for row in rows if row["candidate"] == "stock"] == [1, 1]
    # 16 steps after the prompt, as the device gives the states out
    runner = Runner(exact / "openvino_model.xml", "CPU")
    runner.fill(200 + 16)
    assert rows[4]["state_bytes"] == runner.state_bytes()
    assert "host:prune128" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pruned(convert: Callable[..., Path]) -> Path:
    return convert(MINI, "--preset", "exact", "--target", "cpu", "--budget", "64", "--slack", "15", "--no-verify")


def test_what_was_pruned_is_told(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By ovtq-bench and ovtq-infer; that nothing was, too."""
    found = tmp_path / "bench.json"
    assert main([str(MINI), str(pruned), "--contexts", "32,200", "--steps", "8", "--output", str(found)]) == 0
    rows = json.loads(found.read_text())["contexts"]
    assert [row["pruned"] for row in rows] == [
        *(None, {str(layer): [0, 48] for layer in (1, 3, 5)}),
        *(None, {str(layer): [144, 72] for layer in (1, 3, 5)}),
    ]
    out = capsys.readouterr().out
    assert f"{pruned} at 32 tokens: pruning never fired: all 48 tokens are still there" in out
    assert f"{pruned} at 200 tokens: 144 of 216 tokens pruned, 72 kept in layers 1, 3, 5" in out
    for prompt, told in (("The", "pruning never fired: all 4 tokens"), ("The ship " * 80, "kept in layers 1, 3, 5")):
        assert infer.main([str(pruned), "--raw", "--prompt", prompt, "--max-new-tokens", "4"]) == 0
        assert told in capsys.readouterr().err


def test_prefills_and_contexts_in_one_process(exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "bench.json"
    options = ["--prefill", "48,96", "--runs", "2", "--contexts", "64", "--fill", "--steps", "8", "--one-process"]
    options += ["--depth", "300", "--chunk", "40"]
    assert main([str(MINI), str(exact), *options, "--output", str(found)]) == 0
    results = json.loads(found.read_text())
    rows = results["prefills"]
    assert [(row["candidate"], row["prefill"]) for row in rows] == [
        (name, tokens) for tokens in (48, 96) for name in ("stock", str(exact))
    ]
    for row in rows:
        assert 0 < row["prefill_s"]["low"] <= row["prefill_s"]["median"] <= row["prefill_s"]["high"]
        assert (row["depth"], row["chunk"]) == (300, 40)
    assert [row["prefill_ratio"]["median"] for row in rows[::2]] == [1, 1]
    assert [row["filled"] for row in results["contexts"]] == [True, True]
    assert results["prompts"] == []
    assert results["machine"]["read"] > 1e8
    assert "GB/s" in capsys.readouterr().out


def test_a_prefill_stands_behind_its_depth(exact: Path) -> None:
    """The states are then those of all tokens together."""
    bare, runner = PlainOpenVINO(parse(str(exact), MINI), "CPU", {}), Runner(exact / "openvino_model.xml", "CPU")
    for depth in (300, 0):
        assert bare.read(np.arange(96) % 50, 40, depth)["seconds"] > 0
        runner.fill(depth + 96)
        assert bare.state_bytes() == runner.state_bytes()


@pytest.mark.slow
def test_prompts_through_every_runtime(exact: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.intel", reason="needs the extra [optimum]")
    found = tmp_path / "bench.json"
    options = ["--prompt", "The ship", "--max-new-tokens", "6", "--runs", "1", "--output", str(found)]
    assert main([str(MINI), str(exact), "--through", "openvino,genai,optimum", *options]) == 0
    rows = json.loads(found.read_text())["prompts"]
    assert len(rows) == 6
    for row in rows:
        assert row["new_tokens"] == 6
        assert row["ttft_ms"]["median"] > 0
        assert row["latency_s"] == pytest.approx(
            (row["ttft_ms"]["median"] + 5 * row["tpot_ms"]["median"]) / 1e3, rel=1e-6
        )
    states = {(row["candidate"], row["through"]): row["state_bytes"] for row in rows}
    for name in ("stock", str(exact)):
        assert states[name, "openvino"] == states[name, "optimum"]
        assert states[name, "genai"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["--through", "vllm"], "no runtime 'vllm'"),
        (["--through", "genai", "--contexts", "64"], "through openvino alone"),
        (["--through", "genai", "--prefill", "64"], "through openvino alone"),
        (["--prefill", "64", "--report", "x.html"], "shows no prefills"),
        (["--one-process", "--one-at-a-time"], "leave --one-at-a-time out"),
        (["host:k6v4", "--through", "genai", "--one-process"], "can change a cache as host:k6v4 does"),
        (["--fill"], "belongs to --contexts"),
        (["--depth", "64", "--contexts", "64"], "belongs to --prefill"),
        (["--chunk", "64"], "belongs to --contexts and --prefill"),
        (["--property", "X"], "write KEY=VALUE"),
        (["--output", "nowhere/x.json"], "no such folder"),
        (["host:k6v4", "--through", "genai"], "can change a cache as host:k6v4 does"),
        (["stock:KV_CACHE_PRECISION=u9", "--contexts", "64"], "CPU does not compile it"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(MINI), *options, "--runs", "1", "--max-new-tokens", "2"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_infer_writes_text_and_what_it_took(exact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for folder in (MINI, exact):
        options = ["--prompt", "The President of the United", "--max-new-tokens", "12"]
        assert infer.main([str(folder), *options, "--property", "INFERENCE_PRECISION_HINT=f32"]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert "TPOT" in err
        assert "states after" in err
    assert texts[0].strip()
    assert texts[0] == texts[1]


@pytest.mark.parametrize("ends", [0, [0, 14, 264]])
def test_infer_ends_where_hosts_do(ends: int | list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At every token that generation_config.json names; GPT-OSS has three, a tool call among them."""
    genai = pytest.importorskip("openvino_genai")
    folder = Path(shutil.copytree(MINI, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    prompt = (ROOT / "tests" / "data" / "heldout.txt").read_text(encoding="utf-8")[:1500]
    options = ["--prompt", prompt, "--raw", "--max-new-tokens", "12", "--property", "INFERENCE_PRECISION_HINT=f32"]
    assert infer.main([str(folder), *options]) == 0
    count = int(re.search(r"\+ (\d+) tokens", capsys.readouterr().err)[1])
    pipe = genai.LLMPipeline(folder, "CPU", ATTENTION_BACKEND="SDPA", INFERENCE_PRECISION_HINT="f32")
    config = pipe.get_generation_config()
    config.max_new_tokens, config.apply_chat_template = 12, False
    inputs = pipe.get_tokenizer().encode(prompt, add_special_tokens=False).input_ids
    assert count == len(pipe.generate(inputs, config).tokens[0])
    assert (count < 12) == isinstance(ends, list)


def test_infer_ends_before_a_text_that_it_is_told(exact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Be it in several tokens, of which none is shown."""
    options = [str(exact), "--raw", "--prompt", "The Treasury of the United", "--max-new-tokens", "40"]
    assert infer.main(options) == 0
    whole = capsys.readouterr().out.rstrip("\n")
    stop = whole[25:37]
    assert infer.main([*options, "--stop", stop, "--stop", "\x00"]) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"


@pytest.mark.parametrize("ends", ['"no"', "[true]", "nonsense"])
def test_infer_refuses_ends_that_are_none(ends: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(MINI, tmp_path / "model"))
    (folder / "generation_config.json").write_text('{"eos_token_id": ' + ends + "}", encoding="utf-8")
    assert infer.main([str(folder), "--prompt", "hello", "--max-new-tokens", "2"]) == 2
    assert "generation_config.json" in capsys.readouterr().err


def test_infer_reads_stdin(exact: Path) -> None:
    command = [sys.executable, "-c", "import sys; from ovtq.cli.entry import infer; sys.exit(infer())"]
    done = subprocess.run(
        [*command, str(exact), "--prompt", "-", "--max-new-tokens", "2"],
        input="The President",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cache: 6 caches" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "--prompt: empty"),
        (["--prompt", "x", "--device", "NPU9"], "device NPU9 is not there"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature: a number from 0"),
        (["--prompt", "x", "--property", "A"], "write KEY=VALUE"),
    ],
)
def test_infer_refuses_in_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer.main([str(MINI), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
