"""prune-kv as it is asked for: conversions with a budget, their bytes, what hosts make of them, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MINI, TINY
from scipy.special import log_softmax

from ovtq.cli.convert import main
from ovtq.errors import InputError
from ovtq.forms.pruning import pruned
from ovtq.ir import io
from ovtq.passes import PruneKv
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.verification.verify import TOLERANCE

FLAGS = ["--preset", "exact", "--target", "cpu", "--budget", "48", "--recent-window", "16", "--slack", "7"]


ON_GPU = ["--target", "gpu", "--slack", "0"]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        pytest.param(["--mode", "mask", "--score", "norm-high"], marks=pytest.mark.slow),
        ["--preset", "k6v4", "--residual-window", "16", "--protect", "last:1"],
        ["--heads", "shared", "--verify-layers", "2"],
        [*ON_GPU, "--preset", "k6v4", "--residual-window", "16", "--protect", "first:1"],
        pytest.param([*ON_GPU, "--mode", "mask", "--score", "norm-high"], marks=pytest.mark.slow),
    ],
)
def test_converting_verifies_what_is_pruned(flags: list[str], tmp_path: Path) -> None:
    assert main([str(TINY["4.57"]), str(tmp_path / "out"), *FLAGS, *flags]) == 0
    record = json.loads((tmp_path / "out" / io.RECORD).read_text())
    found = record["verified"]["packed"]
    assert found["pruned"] > 48  # a pruning that was never tried would be no proof
    assert 0 < found["relative"] <= TOLERANCE
    assert found["positions"] > 50


def test_bytes_in_the_record_are_the_bytes_on_the_device(convert: Callable[..., Path]) -> None:
    out = convert(MINI, "--preset", "exact", "--target", "cpu", "--budget", "128", "--no-verify")
    record = json.loads((out / io.RECORD).read_text())
    runner = Runner(out / "openvino_model.xml", "CPU", EXACT_PROPERTIES)
    for _ in range(4):
        runner.step(np.ones((1, 128), np.int64))
    assert runner.state_bytes() == record["state_bytes"]["after"]["4096"]
    assert record["state_bytes"]["after"]["4096"] == record["state_bytes"]["after"]["131072"]
    runner.fill(5000)
    assert runner.state_bytes() == record["state_bytes"]["after"]["4096"]


def test_at_bf16_it_is_the_same_model(convert: Callable[..., Path]) -> None:
    """In repeated calls that the Loop over blocks runs in. On some CPUs bf16 is what the plugin takes by default."""
    out = convert(MINI, "--preset", "exact", "--target", "cpu", "--budget", "128", "--no-verify")
    ids, found = np.random.RandomState(0).randint(0, 8000, (1, 384)).astype(np.int64), []
    for precision in ("f32", "bf16"):
        runner = Runner(out / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": precision})
        found.append(np.concatenate([runner.step(ids[:, start : start + 64]) for start in range(0, 384, 64)], 1)[0])
    p, q = (log_softmax(logits.astype(np.float64), -1) for logits in found)
    kld = (np.exp(p) * (p - q)).sum(-1).reshape(6, 64).mean(1)
    assert kld.max() < 0.05, kld


@pytest.mark.slow
def test_eight_thousand_tokens_take_no_more_bytes_than_promised(convert: Callable[..., Path]) -> None:
    out = convert(MINI, "--preset", "exact", "--target", "cpu", "--budget", "256", "--no-verify")
    promised = json.loads((out / io.RECORD).read_text())["state_bytes"]["after"]["131072"]
    runner = Runner(out / "openvino_model.xml", "CPU", EXACT_PROPERTIES)
    token, sizes = 5, []
    for _ in range(8000):
        token = int(runner.step(np.array([[token]]))[0, -1].argmax())
        sizes.append(runner.state_bytes())
    assert max(sizes) == sizes[-1] == promised
    assert all((count == 8000 - 256 - (8000 - 32) % 128).all() for count in pruned(runner.request).values())


@pytest.mark.parametrize(
    "options",
    [
        ["--target", "cpu", "--slack", "15"],
        pytest.param(["--target", "cpu", "--slack", "15", "--mode", "mask"], marks=pytest.mark.slow),
        pytest.param([], marks=pytest.mark.slow),  # the GPU's form
        pytest.param(["--mode", "mask"], marks=pytest.mark.slow),
    ],
)
def test_genai_resets_when_a_history_changes(options: list[str], convert: Callable[..., Path]) -> None:
    """Tokens that are gone can't be cut from an end: GenAI sees states of fixed shape, resets and prefills again.

    The answer to a history that diverged is that of the history from scratch; a text read in one call loses nothing in
    itself, and 40 tokens of answer are pruned after it.
    """
    test_genai = pytest.importorskip("test_genai", reason="needs openvino_genai")
    folder = convert(MINI, "--preset", "exact", "--budget", "96", *options, "--no-verify")
    text = test_genai.TEXT
    going, scratch = test_genai.chat(folder, [text[:800], text[3000:3300], "Question: what did Congress say?"])
    assert going == scratch
    assert all(going)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "36"}, "budget must be from 37 (the recent window, 32, the prefix, 4, and one more) to 1048576"),
        ({"slack": "-2"}, "slack must be from -1 to 4096, got -2"),
        ({"prefix": "5000"}, "prefix must be from 0 to 4096, got 5000"),
        ({"mode": "drop"}, "prune-kv: mode is one of evict, mask, zero, got 'drop'"),
        (
            {"score": "norm"},
            "prune-kv: score is one of norm-high, norm-low, keydiff, value-norm, triattention, random, got 'norm'",
        ),
        ({"centre": "bias"}, "residual-window, centre and basis are options of packed caches; give k-bits or v-bits"),
        ({"k-bits": "6", "mode": "zero", "centre": "bias"}, "mode zero needs centre none"),
        ({"protect": "middle"}, "prune-kv: protect: expected first:N, last:N or an index, got 'middle'"),
        ({"seed": "-1"}, "prune-kv: seed must be from 0 to 4294967295, got -1"),
    ],
)
def test_options_are_checked(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        PruneKv.parse(options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "mask"], "--mode has no effect without --budget"),
        (["--preset", "u8", "--budget", "99"], "--budget goes with the presets exact, k8v4, k6v4 and k4v4"),
        (["--preset", "rotate", "--budget", "99"], "--budget needs the pass decouple-length"),
        (["--budget", "60"], "prune-kv: budget must be from 69 (the recent window, 64, the prefix, 4, and one more)"),
        (["--budget", "many"], "prune-kv: budget needs int, got 'many'"),
        (["--budget", "99", "--slack", "7"], "prune-kv: slack 7: for a GPU tokens leave one by one"),
        (["--budget", "99", "--mode", "zero"], "prune-kv: mode zero needs centre none"),
        (
            ["--preset", "exact", "--target", "cpu", "--budget", "99", "--recent-window", "0", "--slack", "0"],
            "prune-kv: recent-window 0 with slack 0: a CPU's states need a row; give either 1 or more",
        ),
    ],
)
def test_the_command_refuses_in_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(TINY["5.5"]), "--dry-run", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
