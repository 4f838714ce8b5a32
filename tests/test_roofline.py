"""The lower bound of a decode step, and the forecast for a CPU, by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import MINI, ROOT

from ovtq.cli.inspect import main
from ovtq.evidence import roofline, roofline_cpu
from ovtq.ir import io

sys.path.insert(0, str(ROOT / "tools"))
import make_synthetic as synthetic


def test_by_hand() -> None:
    config = list(synthetic.configurations("20b", None))[1]
    weights = 24 * (2 * 2880 * 4096 + 2 * 2880 * 512 + 2880 * 32 + 4 * 3 * 2880 * 2880 * 9 // 16) + 201088 * 2880
    assert roofline.weight_bytes(config) == weights
    found = roofline.table(config, "arc-140v", [0, 1000])
    least = {(row["cache"], row["context"]): row["least_ms"] for row in found["rows"]}
    assert least["exact", 0] == pytest.approx(1e3 * (weights / 136e9 + 783 * 5e-6))
    assert least["stock", 1000] - least["stock", 0] == pytest.approx(24 * 34_818 * 1000 / 136e9 * 1e3)
    assert least["u8", 1000] - least["u8", 0] == pytest.approx(12 * 1_330 * 1000 / 136e9 * 1e3)
    assert any("assumed, not measured" in line for line in found["assumptions"])


def test_other_heads_and_machines_are_refused() -> None:
    config = list(synthetic.configurations("mini", None))[1]
    with pytest.raises(ValueError, match="not \\[16, 2, 64\\]"):
        roofline.table(config, "arc-140v", [0])
    with pytest.raises(KeyError):
        roofline.table(list(synthetic.configurations("20b", None))[1], "arc-0", [0])


# ------------------------------------------------------------------------------------------- what this CPU should take


def test_a_step_is_the_sum_of_its_parts() -> None:
    work = roofline_cpu.Work(dense=2_000_000, experts=500_000, nodes=100, layers=4)
    here = roofline_cpu.Parameters(read=9e9, dense=1e9, experts=5e8, call=50e-6, node=1e-6, attention=10e-9)
    parts = work.milliseconds(here, 1000)
    expected = {"dense": 2.0, "experts": 1.0, "nodes": 0.15, "attention": 4 * 1000 * 10e-6}
    assert parts == pytest.approx(expected)


def test_bytes_of_weights_by_hand() -> None:
    """The bundled model: i4 with a scale for 128; routers and output in u8 with a scale and a zero point a row."""
    dense, experts = roofline_cpu.weights(io.load(MINI), io.load_config(MINI))
    hidden, heads, kv_heads, head = 384, 16, 2, 64
    four_bits = (4 + 16 / 128) / 8
    layer = 2 * hidden * (heads + kv_heads) * head * four_bits + 8 * (hidden + 3)
    assert sum(dense.values()) == 6 * layer + 8192 * (hidden + 3)
    assert sum(experts.values()) == 6 * 8 * 3 * hidden * hidden * four_bits


def test_what_is_cut_out_computes_what_it_should() -> None:
    """The parts' products and their bytes are those of two layers."""
    config = io.load_config(MINI)
    dense, experts = roofline_cpu.weights(io.load(MINI), config)
    part, size = roofline_cpu.dense_part(MINI)
    assert len(part.get_results()) == 2 * 4  # q, k, v, o
    assert size == sum(dense[name] for name in roofline_cpu.weights(part, config)[0])
    part, size = roofline_cpu.expert_part(MINI)
    assert len(part.get_results()) == 2
    assert size == pytest.approx(sum(experts.values()) * 2 / 6 * 2 / 8)
    assert sum(node.get_type_name() == "TopK" for node in part.get_ops()) == 2


def test_the_command(exact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer contexts take longer, by attention alone; a converted model is refused in one line."""
    assert main([str(MINI), "--roofline", "cpu", "--context", "1k,8k", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["roofline"]
    short, long = (row["parts"] for row in found["rows"])
    assert long["attention"] == pytest.approx(8 * short["attention"])
    assert all(short[part] == long[part] > 0 for part in ("dense", "experts", "nodes"))
    assert found["rows"][1]["ms"] == pytest.approx(sum(long.values()))
    assert "GB/s" in found["assumptions"][1]
    assert main([str(exact), "--roofline", "cpu"]) == 2
    assert capsys.readouterr().err == "ovtq-inspect: --roofline cpu needs the model as exported\n"
