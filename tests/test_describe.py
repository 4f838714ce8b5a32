"""models.describe: what it finds, and what it refuses with which words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import MINI, TINY, load
from openvino import opset15 as op

from ovtq.errors import UnsupportedModel
from ovtq.ir import io
from ovtq.ir.graph import constant_of, f32, i64
from ovtq.models import describe


def test_finds_every_layer_of_both_exports(tiny: Path) -> None:
    _, description = load(tiny)
    assert [layer.window for layer in description.layers] == [16, None, 16, None]
    for index, layer in enumerate(description.layers):
        assert (layer.index, layer.query_heads, layer.kv_heads, layer.head_dim) == (index, 4, 2, 64)
        assert layer.scale == 0.125
        assert layer.cache.key.variable_id == f"past_key_values.{index}.keypresent.{index}.key"
        assert layer.cache.value.variable_id == f"past_key_values.{index}.valuepresent.{index}.value"
        assert layer.sinks.shape == (4,)
        assert layer.key_bias.shape == layer.value_bias.shape == (2, 64)


def test_both_exports_describe_the_same_model() -> None:
    new, old = (load(path)[1] for path in TINY.values())
    for a, b in zip(new.layers, old.layers, strict=True):
        for name in ("sinks", "key_bias", "value_bias"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_finds_biases_and_sinks_behind_compressed_weights() -> None:
    _, description = load(MINI)
    assert [layer.window for layer in description.layers] == [128, None] * 3
    assert all(np.abs(layer.key_bias).max() > 0 and np.abs(layer.sinks).max() > 0 for layer in description.layers)


@pytest.mark.parametrize("stored", [ov.Type.f32, ov.Type.f16, ov.Type.bf16])
def test_constants_are_read_in_any_float_type(stored: ov.Type) -> None:
    """The bundled model's biases are bf16, as in the checkpoint; read as f16 they would be plausible and wrong."""
    values = np.array([1.5, -0.34375, 3e-5, 40], np.float32)
    constant = op.constant(values, dtype=stored)
    node = op.convert(constant, ov.Type.f32)
    x = op.parameter([4], np.float32)
    device = ov.Core().compile_model(ov.Model([op.add(x, node)], [x]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_array_equal(constant_of(node.output(0)), device([np.zeros(4, np.float32)])[0])
    np.testing.assert_allclose(constant_of(constant.output(0)), values, rtol=2**-8, atol=2**-24)


def _without_sinks(model: ov.Model) -> None:
    for node in _sdpas(model):
        five = op.scaled_dot_product_attention(*(node.input_value(i) for i in range(5)))
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(five.output(0))


def _wider_mask(model: ov.Model) -> None:
    shifts = [
        node
        for node in model.get_ops()
        if node.get_type_name() == "Add"
        and (value := constant_of(node.input_value(1))) is not None
        and value.reshape(-1)[0] == -16
    ]
    assert shifts
    for node in shifts:
        node.input(1).replace_source_output(i64(-17).output(0))


def _soft_mask(model: ov.Model) -> None:
    for node in _sdpas(model):
        node.input(3).replace_source_output(op.multiply(node.input_value(3), f32(1e-4)).output(0))


def _dynamic_scale(model: ov.Model) -> None:
    for node in _sdpas(model):
        total = op.convert(op.reduce_sum(op.shape_of(node.input_value(0)), i64(0)), ov.Type.f32)
        node.input(4).replace_source_output(total.output(0))


def _scaled_keys(model: ov.Model) -> None:
    for node in _sdpas(model):
        node.input(1).replace_source_output(op.multiply(node.input_value(1), f32(1.0)).output(0))


def _sdpas(model: ov.Model) -> list[ov.Node]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_sinks, "layer 0: looked for attention with sinks (six inputs), found none"),
        (_wider_mask, "layer 0: config.json says window 16 (sliding_attention), the mask in the graph has 17"),
        (_soft_mask, "layer 0: mask: it adds -6.55 to a score"),
        (_dynamic_scale, "layer 0: expected a constant scale"),
        (_scaled_keys, "layer 0: key path: looked for Concat, found Multiply"),
    ],
)
def test_refuses_a_graph_of_another_form(change: Callable[[ov.Model], None], message: str) -> None:
    model = io.load(TINY["5.5"])
    change(model)
    with pytest.raises(UnsupportedModel, match=re.escape(message)):
        describe(model, io.load_config(TINY["5.5"]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "num_hidden_layers": 3}, "config.json has 3 layers, the graph has 4"),
        ({"layer_types": ["full_attention"] * 4}, "layer 0: config.json says window None (full_attention)"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "2 layers, the graph has 4"),
        ({"layer_types": ["mamba"] * 4}, "layer_types must be a list of sliding_attention and full_attention"),
        ({"sliding_window": 32}, "config.json says window 32 (sliding_attention), the mask in the graph has 16"),
        ({"num_key_value_heads": 4}, "config.json has num_key_value_heads 4, the graph has 2"),
        ({"head_dim": 32}, "config.json has head_dim 32, the graph has 64"),
    ],
)
def test_refuses_a_config_that_contradicts_the_graph(config: dict[str, object], message: str) -> None:
    model = io.load(TINY["5.5"])
    truth = json.loads((TINY["5.5"] / "config.json").read_text())
    with pytest.raises(UnsupportedModel, match=re.escape(message)):
        describe(model, {**truth, **config})
