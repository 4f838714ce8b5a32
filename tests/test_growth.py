"""Calls longer than all before them, for which a plugin makes room: they say what they say once there is room."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import ROOT
from openvino import opset15 as op

sys.path.insert(0, str(ROOT / "tools"))
import make_synthetic as synthetic

import ovtq.forms.gpu.full as gpu_full
from ovtq.cli.convert import main
from ovtq.ir.graph import i64
from ovtq.models import AttentionLayer
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

CALLS = (20, 65, 1, 130, 131, 300, 1)  # tokens of each, of one text
# What experts hold is more than all else, as in GPT-OSS-20B; with narrow ones the plugin happens to lay nothing over
# what an If gives.
WIDE_EXPERTS = dict(
    num_hidden_layers=4, hidden_size=64, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=4,
    num_local_experts=4, num_experts_per_tok=4, sliding_window=128, vocab_size=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with such experts, 2 MB."""
    out = tmp_path_factory.mktemp("synthetic") / "wide"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synthetic.GPT_OSS.sizes, "wide", WIDE_EXPERTS)
        synthetic.make(out, "wide", tokenizer=False)
    return out


def twice(xml: Path, batch: int, properties: Mapping[str, str]) -> list[list[np.ndarray]]:
    """What a model says of a text, and, after a reset, of the same text again."""
    runner, random = Runner(xml, "CPU", properties), np.random.RandomState(0)
    text = [random.randint(0, WIDE_EXPERTS["vocab_size"], (batch, tokens)) for tokens in CALLS]
    said = []
    for _ in range(2):
        runner.reset()
        said.append([runner.step(ids) for ids in text])
    return said


@pytest.mark.parametrize(
    "options",
    [
        "k6v4 --target gpu",
        pytest.param("k6v4 --target cpu", marks=pytest.mark.slow),
        *(
            pytest.param(f"{preset} --target {target}", marks=pytest.mark.slow)
            for preset in ("exact", "u8", "k6v4 --budget 128", "exact --budget 128")
            for target in ("cpu", "gpu")
        ),
    ],
)
def test_a_call_longer_than_all_before_is_right(options: str, wide: Path, convert: Callable[..., Path]) -> None:
    """To the last bit, at f32 and as hosts load it, of one sequence and of two."""
    xml = convert(wide, "--preset", *options.split()) / "openvino_model.xml"
    for batch, properties in ((1, EXACT_PROPERTIES), (2, EXACT_PROPERTIES), (1, {}), (2, {})):
        first, again = twice(xml, batch, properties)
        for call, tokens in enumerate(CALLS):
            np.testing.assert_array_equal(first[call], again[call], f"call {call} of {tokens} tokens, batch {batch}")


def test_what_only_fixed_patterns_read_is_lost(wide: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Why the form has another Reshape behind its If. If this fails, the plugin has been mended."""

    def whole(self: gpu_full.GpuFull, layer: AttentionLayer, context: ov.Output) -> ov.Node:
        return op.reshape(context, i64([0, layer.query_heads, -1, layer.head_dim]), True)

    monkeypatch.setattr(gpu_full.GpuFull, "_whole", whole)
    assert main([str(wide), str(tmp_path / "out"), "--preset", "k6v4", "--target", "gpu", "--no-verify"]) == 0
    first, again = twice(tmp_path / "out" / "openvino_model.xml", 1, EXACT_PROPERTIES)
    assert not all(map(np.array_equal, first, again))
