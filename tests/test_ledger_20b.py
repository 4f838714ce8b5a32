"""What GPT-OSS-20B's layers cost on a virtual Lunar Lake: the record by hand, and the tool that reads memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino as ov
import pytest
from conftest import GPU_TOOLS, MINI, ROOT
from ledgers import COUNTS, PRESETS
from ledgers_20b import RECORD, measured, synthetic
from test_ledger import on_lunar_lake

from ovtq.evidence import roofline

sys.path.insert(0, str(GPU_TOOLS))
import probe
from at_24 import EXPORTED, KERNELS, SCRATCH, at_24, kernels, needs

QUERY, KV, WIDTH = 64, 8, 64  # heads, and their width
FOUND: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
CHUNK = 1024  # new tokens of a call
MASK = 2  # f16, read once by each layer


def pair(preset: str, key: str) -> float:
    """What a sliding and a full layer more add to a figure."""
    return FOUND[preset]["4"][key] - FOUND[preset]["2"][key]


def scores(tokens: int) -> int:
    """Bytes of a tensor with one f16 for each query head and token."""
    return QUERY * tokens * 2


def packed(key_bits: int) -> tuple[float, float]:
    """Bytes that a packed layer reads and writes for a token of history.

    Keys, values and their scales are looked up; what comes out, an f16 for each field of keys and for each two codes
    of values, is read by a product. Scores are made, joined with recent ones, normalised, cut and read.
    """
    stored = KV * (WIDTH * key_bits / 8 + 2) + KV * (WIDTH * 4 / 8 + 2)
    keys = KV * WIDTH * {8: 1, 6: 1.5, 4: 1}[key_bits] * 2
    values = KV * WIDTH * 2
    return stored + keys + values + 4 * scores(1), keys + values + 4 * scores(1)


ROWS = KV * 2  # K and V of the KV heads
BY_HAND = {
    # K and V read as they lie, written for all query heads, and read again
    "rotate": (2 * (ROWS * WIDTH * 2 + 2 * QUERY * WIDTH * 2 + MASK), 2 * 2 * QUERY * WIDTH * 2),
    # rows of 80, read once as they lie
    "exact": (ROWS * 80 * 2 + MASK, 0),
    "u8": (ROWS * (80 + 2 + 1) + MASK, 0),
    "u4": (ROWS * (40 + 2 + 2) + MASK + 4, 0),
    "k8v4": packed(8),
    "k6v4": packed(6),
    "k4v4": packed(4),
    # codes of keys and values, two scales of 3 bytes, and whether a token is shown: 8 of them in two bytes
    **{f"k{bits}v4 --kernels": (KV * (WIDTH * (bits + 4) / 8 + 6) + 2 / 8, 0) for bits in (8, 6, 4)},
}


@pytest.mark.parametrize("preset", [*PRESETS, *KERNELS])
def test_bytes_of_a_layer_by_hand(preset: str) -> None:
    assert (pair(preset, "read_per_token"), pair(preset, "written_per_token")) == BY_HAND[preset]


def test_what_stands_beside_the_bytes() -> None:
    """Every cache in the nodes it should be in; kernels of 24 layers follow from 2 and 4; the exported model does not
    compile."""
    for count in ("2", "4"):
        assert "SDPATransposeFusion" in FOUND[EXPORTED][count]["refused"]
        full, both = int(count) // 2, int(count)
        for preset, nodes in {"rotate": {"f16": 2 * both}, "exact": {"f16": 2 * full},
                              "u8": {"i8": 2 * full}, "u4": {"i8": 2 * full}}.items():  # fmt: skip
            assert FOUND[preset][count]["kv_cache"] == nodes
        for preset in ("k8v4", "k6v4", "k4v4"):
            assert FOUND[preset][count]["kv_cache"] == {"i8": 2 * full, "f16": 2 * full}  # codes, scales
    assert at_24(144, 203, 6) == 203 + 9 * 59
    assert kernels(FOUND["u8"]) == kernels(FOUND["u4"])  # the same graph


@pytest.mark.parametrize("preset", [*PRESETS, *KERNELS])
def test_the_roofline_has_what_was_counted(preset: str) -> None:
    cache = roofline.CACHES["stock" if preset == "rotate" else preset]
    both = pair(preset, "read_per_token") + pair(preset, "written_per_token")
    assert cache.full == (both / 2 if preset == "rotate" else both)
    assert cache.kernels == kernels(FOUND[preset])


def row(preset: str, count: int, context: int) -> dict[str, int]:
    """The bytes recorded at a context."""
    return next(row for row in FOUND[preset][str(count)]["memory"]["rows"] if row["context"] == context)


@pytest.mark.parametrize("preset", PRESETS)
def test_states_are_those_of_the_layers(preset: str) -> None:
    """A full layer more: codes and scales of each token."""
    bytes_a_token = {"exact": 2560, "u8": 1328, "u4": 704, "k8v4": 800, "k6v4": 672, "k4v4": 544}
    more = [row(preset, count, 131072)["states"] - row(preset, count, 32768)["states"] for count in (2, 4)]
    expected = bytes_a_token.get(preset, 2 * 2048)  # with `rotate` the sliding layer keeps as much
    assert more[1] - more[0] == expected * (131072 - 32768)


@pytest.mark.parametrize("context", [8192, 32768, 131072])
def test_scratch_of_a_decode_step_by_hand(context: int) -> None:
    """`rotate` copies K and V to all query heads, into buffers that layers share, a tenth larger than need be."""
    copies = 2 * QUERY * WIDTH * 2 * context
    for count in (2, 4):
        assert copies < row("rotate", count, context)["decode_alone"] < 1.1 * copies + 20e6
    assert row("u8", 2, context)["decode_alone"] is None  # its states can't be set


def test_kernels_take_less_memory_than_the_plugins_own_cache() -> None:
    """States and the scratch of a call of 1,024 tokens: at 32,768 tokens no more, at 131,072 a GB less at the least."""
    less = {}
    for context in (32768, 131072):
        own, plugins = (needs(FOUND[preset], context) for preset in ("k6v4 --kernels", "u8"))
        less[context] = sum(plugins[name] - own[name] for name in ("states", "chunk"))
    assert less[32768] >= 0
    assert less[131072] >= 1e9
    assert own["chunk"] <= 3.5e9


def test_what_24_layers_need() -> None:
    """Weights, states and scratch, summed: where the full layers are packed it is hardly more than with `u8`."""
    found = {preset: needs(FOUND[preset], 131072) for preset in PRESETS}
    assert found["exact"]["weights"] == pytest.approx(12.6e9, rel=0.01)
    assert found["exact"]["states"] == pytest.approx(30_720 * 131072, rel=0.01)
    for preset in PRESETS:
        for column in SCRATCH:
            two, four = row(preset, 2, 131072)[column], row(preset, 4, 131072)[column]
            assert found[preset][column] is None or found[preset][column] == at_24(two, four, 4)
    assert found["k6v4"]["chunk"] < 1.3 * found["u8"]["chunk"]


@pytest.mark.parametrize("preset", ["k8v4", "k6v4", "k4v4"])
@pytest.mark.parametrize("context", [8192, 32768, 131072])
def test_what_a_prefill_leaves_in_a_packed_layer(preset: str, context: int) -> None:
    """Buffers of one KV head, with K and V looked up, decoded and joined with recent tokens, and less than four of the
    new tokens of all query heads. (K and V of all query heads would be 20 times the former.)"""
    two, four = (row(preset, count, context) for count in (2, 4))
    left = (four["decode"] - four["decode_alone"]) - (two["decode"] - two["decode_alone"])
    features = {"k8v4": 64, "k6v4": 96, "k4v4": 64}[preset] + 64
    of_a_head = (features + 4 * WIDTH) * 2 * context
    assert 0.5 * of_a_head < left < 1.5 * of_a_head + 4 * QUERY * WIDTH * 2 * CHUNK


def test_a_log_of_memory(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("M device 0x1 100\nK kernel 1,1,1/1,1,1 -> 0\nM host 0x2 50\nF 0x1\n")
    memory = probe.Memory(log)
    assert memory.follow() == {"peak": 150, "held": 50}
    with log.open("a") as file:
        file.write("M device 0x1 7\nF 0x1\nF 0x9\n")  # an address is used again; what was never seen is no matter
    assert memory.follow() == {"peak": 57, "held": 50}
    assert memory.follow() == {"peak": 50, "held": 50}


@pytest.mark.gpu
@pytest.mark.slow
@on_lunar_lake
def test_memory_of_the_bundled_model_by_hand(convert: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    command = [sys.executable, GPU_TOOLS / "memory.py", convert(MINI, "--preset", "rotate"), "--json", out]
    command += ["--contexts", "32768", "--chunk", "4096", "--whole", "4096"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    (found,) = json.loads(out.read_text(encoding="utf-8"))
    whole, long = found["rows"]
    assert found["weights"] == pytest.approx((MINI / "openvino_model.bin").stat().st_size, rel=0.05)
    assert long["states"] == 6 * 2 * 2 * WIDTH * 2 * 32768
    copies = 2 * 16 * WIDTH * 2 * 32768
    assert copies < long["decode_alone"] < 1.15 * copies
    assert long["decode_alone"] < long["decode"] < long["chunk"]
    assert whole["whole"] < long["chunk"]


@pytest.mark.gpu
@pytest.mark.slow
@on_lunar_lake
def test_the_record_is_still_right(convert: Callable[..., Path], tmp_path: Path) -> None:
    """Two layers with `exact`, made and measured again."""
    recorded = FOUND["exact"]["2"]
    if ov.__version__ != recorded["openvino"]:
        pytest.skip(f"recorded with OpenVINO {recorded['openvino']}, this is {ov.__version__}")
    found = measured(convert(synthetic(2, tmp_path / "two"), "--preset", "exact", "--no-verify"), 2)
    assert [found[key] for key in COUNTS] == [recorded[key] for key in COUNTS]
    for now, then in zip(found["memory"]["rows"], recorded["memory"]["rows"], strict=True):
        assert now.keys() == then.keys()
        for name, size in then.items():
            assert now[name] == (None if size is None else pytest.approx(size, rel=0.02))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere has no openvino_model.xml"),
        ([MINI, "--config", "f16"], "--config f16: expected KEY=VALUE"),
        ([MINI], "run "),  # where nothing is installed
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    options: list[object], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OVTQ_GPU_DIR", str(tmp_path))
    command = [str(part) for part in (sys.executable, GPU_TOOLS / "memory.py", *options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("memory: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
