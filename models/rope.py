"""What a model's own rotary embedding makes of a vector, found by running that part of its graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino as ov
from openvino import Output
from openvino import opset15 as op

from ovtq.errors import UnsupportedModel
from ovtq.graph import ancestors, redirect
from ovtq.models.attention import biased_projection

POSITIONS = 4096  # over which a turning bias is averaged


def mean_rotated_bias(
    model: ov.Model, key: Output, kv_heads: int, head_dim: int, positions: int = POSITIONS
) -> np.ndarray | None:
    """Mean over t < positions of RoPE_t(b_k), (kv_heads, head_dim) f32; None if the projection of `key` has no bias.

    `key` (batch, kv_heads, tokens, head_dim) is where the keys enter the attention; whatever stands between the
    projection and there, RoPE and a rotation of the heads, is applied as the graph has it. Slow turning coordinates
    keep their bias, those that turn many times average to nothing. Runs on the CPU; only that part of the graph does.
    """
    found = biased_projection(key, kv_heads, head_dim)
    if found is None:
        return None
    add, bias = found
    part = ov.Model([op.result(key)], model.get_parameters()).clone()
    copy = next(node for node in part.get_ops() if node.get_friendly_name() == add.get_friendly_name())
    stand_in = op.parameter([1, -1, kv_heads * head_dim], np.float32)
    redirect(copy.output(0), stand_in)
    result = part.get_results()[0]
    needed = [node for node in ancestors(result.input_value(0)) if node.get_type_name() == "Parameter"]
    row = np.arange(positions, dtype=np.int64)[None]
    known = {"position_ids": row, "attention_mask": np.ones_like(row), "input_ids": np.ones_like(row)}
    feeds = []
    for node in needed:
        name = next(iter(node.output(0).get_names()), None)
        if name is not None and name not in known:
            raise UnsupportedModel(f"the rotary embedding depends on the input {name}, expected position_ids alone")
        feeds.append(known[name] if name else np.broadcast_to(bias.reshape(1, 1, -1), (1, positions, bias.size)))
    submodel = ov.Model([result], needed)
    compiled = ov.Core().compile_model(submodel, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    keys = compiled([np.ascontiguousarray(feed) for feed in feeds])[0]  # (1, kv_heads, positions, head_dim)
    return keys[0].mean(axis=1, dtype=np.float64).astype(np.float32)


def norms(vectors: Mapping[int, np.ndarray]) -> dict[str, list[float]]:
    """The lengths of each layer's vectors, (kv_heads, head_dim), for the record of a conversion."""
    return {str(index): [round(float(x), 4) for x in np.linalg.norm(some, axis=-1)] for index, some in vectors.items()}
