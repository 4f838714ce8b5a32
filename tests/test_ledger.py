"""What a decode step costs on a virtual Lunar Lake: by hand where that can be done, and against the record."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino as ov
import pytest
from conftest import GPU_INSTALLED, GPU_TOOLS, MINI, needs
from ledgers import COUNTS, PRESETS, RECORD, counts, ledger

import ovtq

DEFAULT = ("k6v4", "u8")  # the others are slow
HEADS, KV_HEADS, WIDTH = 16, 2, 64  # of the bundled model

pytestmark = pytest.mark.gpu

LAYER = "fake_intel_gpu.c"


def on_lunar_lake(test: Callable[..., None]) -> Callable[..., None]:
    """Skip without a virtual chip, or without the emulated device's layer, which writes the log, as it is here."""
    built = GPU_INSTALLED / "emulated" / LAYER
    stale = built.exists() and built.read_bytes() != (GPU_TOOLS / LAYER).read_bytes()
    return needs("virtual", "emulated")(pytest.mark.skipif(stale, reason="run tools/gpu/install-emulated again")(test))


@pytest.fixture(scope="module")
def measured(convert: Callable[..., Path]) -> Callable[[str], dict[str, Any]]:
    """The ledger of the bundled model with a preset, made once."""
    done: dict[str, dict[str, Any]] = {}

    def run(preset: str) -> dict[str, Any]:
        if preset not in done:
            done[preset] = ledger(convert(MINI, "--preset", preset))
        return done[preset]

    return run


def rows(found: dict[str, Any], kernel: str) -> list[dict[str, Any]]:
    """The kernels of a name whose bytes grow, what reads most first: the plugin's order varies."""
    return sorted(
        (row for row in found["rows"] if row["kernel"].startswith(kernel)), key=lambda row: row["read"], reverse=True
    )


@on_lunar_lake
@pytest.mark.parametrize(
    "preset", [preset if preset in DEFAULT else pytest.param(preset, marks=pytest.mark.slow) for preset in PRESETS]
)
def test_no_count_has_risen(
    preset: str, measured: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Kernels, copies, waits and bytes of a decode step. They may fall: then write them down."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))[preset]
    if ov.__version__ != recorded["openvino"]:
        pytest.skip(f"recorded with OpenVINO {recorded['openvino']}, this is {ov.__version__}")
    found = counts(measured(preset))
    risen, fallen = (
        [f"{key} {recorded[key]:g} → {found[key]:g}" for key in COUNTS if sign * (found[key] - recorded[key]) > 1e-6]
        for sign in (1, -1)
    )
    update = f"python tests/ledgers.py {preset}"
    if fallen and not risen:
        with capsys.disabled():
            print(f"\n{preset}: {', '.join(fallen)}; to hold it there: {update}")
    assert not risen, f"{preset}: {', '.join(risen)}; if that is meant: {update}"


@on_lunar_lake
def test_an_f16_cache_that_is_broadcast_by_hand(measured: Callable[[str], dict[str, Any]]) -> None:
    """`rotate`: K and V of every layer are read, written for all query heads, and read again with the mask."""
    found = measured("rotate")
    (broadcast,), (attention,) = rows(found, "broadcast"), rows(found, "sdpa")
    assert (broadcast["launches"], attention["launches"]) == (2 * 6, 6)
    assert broadcast["read"] == 6 * 2 * KV_HEADS * WIDTH * 2
    assert broadcast["written"] == 6 * 2 * HEADS * WIDTH * 2
    assert attention["read"] == 6 * (2 * HEADS * WIDTH * 2 + 2)
    assert attention["written"] == 0


@on_lunar_lake
def test_an_f16_cache_that_is_read_in_place_by_hand(measured: Callable[[str], dict[str, Any]]) -> None:
    """`exact`: rows of 80, of which the last 16 are the sinks' and padding, are read once, as they lie."""
    found = measured("exact")
    assert found["layers"] == 3
    (attention,) = rows(found, "sdpa_micro")
    assert (attention["launches"], attention["written"]) == (3, 0)
    assert attention["read"] == 3 * (2 * KV_HEADS * 80 * 2 + 2)
    assert not rows(found, "broadcast")


@on_lunar_lake
def test_a_packed_cache_by_hand(measured: Callable[[str], dict[str, Any]]) -> None:
    """`k6v4`: bytes and an f16 scale a vector are read; what is looked up for them is read once by a product."""
    found = measured("k6v4")
    keys, values = rows(found, "gather")
    assert keys["read"] == 3 * KV_HEADS * (WIDTH * 6 / 8 + 2)
    assert values["read"] == 3 * KV_HEADS * (WIDTH * 4 / 8 + 2)
    assert values["written"] == 3 * KV_HEADS * WIDTH * 2
    scores, context = rows(found, "gemm")
    assert (scores["read"], scores["written"]) == (keys["written"], 3 * HEADS * 2)
    assert (context["read"], context["written"]) == (values["written"] + 3 * HEADS * 2, 0)


@on_lunar_lake
@pytest.mark.parametrize(
    ("preset", "row", "kernel"),
    # width, f16 scale and zero point: i8 at 8 bits, f16 at 4, where the table of beams is read, too
    [("u8", 80 + 2 + 1, "sdpa_micro"), pytest.param("u4", 40 + 2 + 2, "sdpa_opt", marks=pytest.mark.slow)],
)
def test_the_plugins_own_cache_by_hand(
    preset: str, row: int, kernel: str, measured: Callable[[str], dict[str, Any]]
) -> None:
    """With no property set: bytes of K and V are read once, as they lie, with the mask; nothing else of them moves."""
    found = measured(preset)
    (attention,) = rows(found, kernel)
    mask, beams = 2, 4 * (preset == "u4")
    assert (attention["launches"], attention["written"]) == (3, 0)
    assert attention["read"] == 3 * (2 * KV_HEADS * row + mask + beams)
    assert not [row["kernel"] for row in found["rows"] if row["kernel"].startswith(("broadcast", "concat", "gather"))]
    assert found["copies"] == 2  # windows: bytes, and scales


@on_lunar_lake
@pytest.mark.slow
def test_what_joins_parts_of_an_attention_reads_no_history(family: Callable[[str], Path], tmp_path: Path) -> None:
    """Without sinks a 4-bit cache is read in parts: what joins them is given keys and values, too."""
    ovtq.convert(family("llama3"), tmp_path / "u4", preset="u4", verify=False)
    found = ledger(tmp_path / "u4")
    (attend,) = rows(found, "sdpa_opt__single_reg")
    assert not [row for row in found["rows"] if "finalization" in row["kernel"]]
    assert attend["read"] <= found["read_per_token"] < 1.2 * attend["read"]


@on_lunar_lake
@pytest.mark.slow
def test_what_a_window_beside_the_plugins_own_cache_costs(
    convert: Callable[..., Path], measured: Callable[[str], dict[str, Any]]
) -> None:
    """13 kernels per layer and 19 for all; of the history no more is read, but for its masks."""
    plain, window = measured("u4"), ledger(convert(MINI, "--preset", "u4", "--set", "sink-row.window=127"))
    assert window["kernels"] - plain["kernels"] <= 3 * 13 + 19
    assert (window["copies"] - plain["copies"], window["waits"] - plain["waits"]) == (1, 4)
    (before,), (after,) = (rows(found, "sdpa_opt") for found in (plain, window))
    assert (after["launches"], after["read"], after["written"]) == (3, before["read"], 0)
    both = [found["read_per_token"] + found["written_per_token"] for found in (plain, window)]
    assert both[1] <= 1.05 * both[0]


@on_lunar_lake
@pytest.mark.slow
@pytest.mark.parametrize(("bits", "more"), [("8,8", 17), ("6,4", 30)])
def test_what_packed_windows_cost(
    bits: str, more: int, convert: Callable[..., Path], measured: Callable[[str], dict[str, Any]]
) -> None:
    """Kernels for all sliding layers together, one copy and one wait."""
    plain, packed = measured("exact"), ledger(convert(MINI, "--preset", "exact", "--window-bits", bits))
    assert packed["kernels"] - plain["kernels"] <= more
    assert (packed["copies"] - plain["copies"], packed["waits"] - plain["waits"]) == (1, 1)


@on_lunar_lake
@pytest.mark.slow
def test_kernels_of_our_own_by_hand(convert: Callable[..., Path], measured: Callable[[str], dict[str, Any]]) -> None:
    """A packed row of each KV head and whether the token is shown; nothing is copied; fewer kernels than `exact`."""
    plain = measured("exact")
    found = ledger(convert(MINI, "--preset", "k6v4", "--kernels", "--capacity", "4096", "--no-verify"))
    (attend,) = rows(found, "ovtq_attend")
    assert (attend["launches"], attend["written"]) == (3, 0)
    assert attend["read"] == 3 * (KV_HEADS * (WIDTH * (6 + 4) // 8 + 2 * 3) + 2 / 8)
    assert not rows(found, "ovtq_window")  # whose bytes do not grow
    assert found["copies"] == 0
    assert found["kernels"] < plain["kernels"]


@on_lunar_lake
@pytest.mark.slow
@pytest.mark.parametrize(("preset", "kernels"), [("exact", 363), ("k6v4", 410)])
def test_a_bounded_cache_costs_the_same_at_any_length(preset: str, kernels: int, convert: Callable[..., Path]) -> None:
    """What grows with the text is its attention mask: once as i64, and what becomes of it as i32."""
    found = ledger(convert(MINI, "--preset", preset, "--budget", "1024", "--no-verify"))
    assert found["kernels"] <= kernels
    assert found["read_per_token"] + found["written_per_token"] <= 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere has no openvino_model.xml"),
        ([MINI, "--lengths", "1024"], "--lengths 1024: expected N,M"),
        ([MINI, "--config", "f16"], "--config f16: expected KEY=VALUE"),
        ([MINI], "run "),  # where nothing is installed
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    options: list[object], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OVTQ_GPU_DIR", str(tmp_path))
    command = [sys.executable, GPU_TOOLS / "ledger.py", *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("ledger: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
