"""GPT-OSS (GptOssForCausalLM), as optimum-intel exports it with transformers 4.57 to 5.x.

Alternating sliding-window and full attention, grouped queries, biases on q/k/v/o, one learned sink logit per query
head: SDPA has six inputs (Q, K, V, mask, scale, sinks). Of this architecture config.json is known, and must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import openvino as ov

from ovtq.errors import UnsupportedModel
from ovtq.models import decoder
from ovtq.models.description import AttentionLayer, ModelDescription

LAYER_TYPES = ("sliding_attention", "full_attention")


def describe(model: ov.Model, config: Mapping[str, Any]) -> ModelDescription:
    """Describe a GPT-OSS model from its graph; config.json must agree with what the graph shows.

    Raises UnsupportedModel, naming what was looked for and not found.
    """
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or not kinds or any(kind not in LAYER_TYPES for kind in kinds):
        raise UnsupportedModel(
            f"config.json: layer_types must be a list of {' and '.join(LAYER_TYPES)}, found {str(kinds)[:80]}"
        )
    description = decoder.describe(model, {**config, "num_hidden_layers": len(kinds)})
    for layer, kind in zip(description.layers, kinds, strict=True):
        _agree(layer, kind, config)
    return description


def _agree(layer: AttentionLayer, kind: str, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel where config.json says another thing of a layer."""
    where = f"layer {layer.index}"
    if layer.sinks is None:
        raise UnsupportedModel(f"{where}: looked for attention with sinks (six inputs), found none")
    seen = {"num_attention_heads": layer.query_heads, "num_key_value_heads": layer.kv_heads, "head_dim": layer.head_dim}
    for name, found in seen.items():
        if config.get(name, found) != found:
            raise UnsupportedModel(f"{where}: config.json has {name} {config.get(name)}, the graph has {found}")
    expected = config.get("sliding_window") if kind == "sliding_attention" else None
    if layer.window != expected:
        raise UnsupportedModel(
            f"{where}: config.json says window {expected} ({kind}), the mask in the graph has {layer.window}"
        )
