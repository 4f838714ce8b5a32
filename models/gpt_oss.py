"""GPT-OSS (GptOssForCausalLM), as optimum-intel exports it with transformers 4.57 to 5.x.

Alternating sliding-window and full attention, grouped queries, biases on q/k/v/o, one learned sink logit per query
head: SDPA has six inputs (Q, K, V, mask, scale, sinks).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
from openvino import Node

from ovtq.errors import UnsupportedModel
from ovtq.ir.graph import Port, constant_of, static_dim
from ovtq.models.attention import kv_path, mask_window, projection_bias
from ovtq.models.description import AttentionLayer, Exported, KVPath, ModelDescription
from ovtq.states import Growing, StateSpec

INPUTS = ("input_ids", "attention_mask", "beam_idx")
KV = ("key", "value")
LAYER_TYPES = ("sliding_attention", "full_attention")


def describe(model: ov.Model, config: Mapping[str, Any]) -> ModelDescription:
    """Describe a GPT-OSS model from its graph; config.json must agree with what the graph shows.

    Raises UnsupportedModel, naming what was looked for and not found.
    """
    inputs = {name: node for node in model.get_parameters() for name in node.output(0).get_names()}
    missing = [name for name in INPUTS if name not in inputs]
    if missing:
        raise UnsupportedModel(
            f"the model has no input {', '.join(missing)}; export it as a stateful model "
            "(task text-generation-with-past)"
        )
    if not model.get_variables():
        raise UnsupportedModel(
            "the model has no states; export it as a stateful model (task text-generation-with-past)"
        )
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    kinds = _layer_types(config)
    if len(found) != len(kinds):
        raise UnsupportedModel(
            f"config.json has {len(kinds)} layers, the graph has {len(found)} ScaledDotProductAttention nodes"
        )
    layers = tuple(
        _layer(index, sdpa, kind, inputs["attention_mask"], inputs["beam_idx"], config)
        for index, (sdpa, kind) in enumerate(zip(found, kinds, strict=True))
    )
    states = tuple(_state(layer, what, path) for layer in layers for what, path in zip(KV, layer.paths, strict=True))
    if len(states) != len(model.get_variables()):
        raise UnsupportedModel(
            f"the model has {len(model.get_variables())} states, its attention layers explain {len(states)}"
        )
    found = (inputs[name] for name in INPUTS)
    return ModelDescription("gpt_oss", *found, layers, states)


def _state(layer: AttentionLayer, what: str, path: KVPath) -> StateSpec:
    kind = path.read.get_element_type().get_type_name()
    heads, width, these = layer.kv_heads, layer.head_dim, [layer.index]
    return StateSpec.growing(path.variable_id, kind, heads, width, Growing(), what, these, native=True)


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or not kinds or any(kind not in LAYER_TYPES for kind in kinds):
        raise UnsupportedModel(
            f"config.json: layer_types must be a list of {' and '.join(LAYER_TYPES)}, found {str(kinds)[:80]}"
        )
    return kinds


def _layer(
    index: int, sdpa: Node, kind: str, attention_mask: Node, beam_idx: Node, config: Mapping[str, Any]
) -> AttentionLayer:
    where = f"layer {index}"
    if sdpa.get_input_size() != 6:
        raise UnsupportedModel(
            f"{where}: looked for attention with sinks (six inputs), found "
            f"{sdpa.get_input_size()} inputs ({sdpa.get_friendly_name()})"
        )
    key_path = kv_path(index, "key", sdpa.input_value(1), beam_idx)
    value_path = kv_path(index, "value", sdpa.input_value(2), beam_idx)
    query_heads, head_dim = static_dim(sdpa.input_value(0), 1), static_dim(sdpa.input_value(0), 3)
    kv_heads = static_dim(key_path.appended, 1)
    for name, seen in (("num_attention_heads", query_heads), ("num_key_value_heads", kv_heads), ("head_dim", head_dim)):
        if seen is None or config.get(name, seen) != seen:
            raise UnsupportedModel(f"{where}: config.json has {name} {config.get(name)}, the graph has {seen}")
    window = mask_window(sdpa.input_value(3), attention_mask, f"{where}: mask")
    expected = config.get("sliding_window") if kind == "sliding_attention" else None
    if window != expected:
        raise UnsupportedModel(
            f"{where}: config.json says window {expected} ({kind}), the mask in the graph has {window}"
        )
    scale, sinks = constant_of(sdpa.input_value(4)), constant_of(sdpa.input_value(5))
    if scale is None or sinks is None or sinks.size != query_heads:
        raise UnsupportedModel(f"{where}: expected a constant scale and one constant sink logit per query head")
    key, value = Port(key_path.append, 1), Port(value_path.append, 1)
    return AttentionLayer(
        index=index,
        window=window,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=float(scale.reshape(-1)[0]),
        sinks=np.asarray(sinks, dtype=np.float32).reshape(query_heads),
        key_bias=projection_bias(key.source, kv_heads, head_dim),
        value_bias=projection_bias(value.source, kv_heads, head_dim),
        query=Port(sdpa, 0),
        key=key,
        value=value,
        context=sdpa.output(0),
        cache=Exported(key_path, value_path, Port(sdpa, 3)),
    )
