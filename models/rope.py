"""What a model's own rotary embedding makes of a vector, found by running that part of its graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.errors import UnsupportedModel
from ovtq.ir.graph import ancestors, redirect
from ovtq.models.attention import biased_projection, projected
from ovtq.models.description import AttentionLayer

POSITIONS = 4096  # over which a turning bias is averaged


def mean_rotated_bias(
    model: ov.Model, key: Output, kv_heads: int, head_dim: int, positions: int = POSITIONS
) -> np.ndarray | None:
    """Mean over t < positions of RoPE_t(b_k), (kv_heads, head_dim) f32; None if the projection of `key` has no bias.

    Slow turning coordinates keep their bias, those that turn many times average to nothing.
    """
    found = biased_projection(key, kv_heads, head_dim)
    if found is None:
        return None
    keys = rotated(model, key, found[0], found[1], positions)
    return keys.mean(axis=1, dtype=np.float64).astype(np.float32)


def key_centre(model: ov.Model, layer: AttentionLayer, centre: str) -> np.ndarray:
    """What is taken from all keys, (kv_heads, head_dim) f32: zero if `centre` is none, or keys have no bias."""
    mean = None
    if centre == "bias":
        mean = mean_rotated_bias(model, layer.key.source, layer.kv_heads, layer.head_dim)
    return np.zeros((layer.kv_heads, layer.head_dim), np.float32) if mean is None else mean


def frequencies(model: ov.Model, key: Output, kv_heads: int, head_dim: int) -> np.ndarray:
    """Radians by which RoPE turns the pair of coordinates (f, f + head_dim/2) from a token to the next, (head_dim/2,).

    Raises UnsupportedModel if the coordinates are paired otherwise, or turned otherwise. `key` as in `rotated`.
    """
    half, positions = head_dim // 2, POSITIONS + 1
    first = np.zeros((kv_heads, head_dim), np.float32)
    first[:, :half] = 1
    node = projected(key, kv_heads, head_dim).get_node()
    turned = rotated(model, key, node, first, positions)[0].astype(np.float64)  # (positions, head_dim)
    angle = np.arctan2(turned[:, half:], turned[:, :half])
    found, step = angle[1], 1
    while step < POSITIONS:  # what is known of ω·step says how many whole turns ω·2·step has
        step *= 2
        found = angle[step] + 2 * np.pi * np.round((2 * found - angle[step]) / (2 * np.pi))
    found = found / step
    length = np.hypot(turned[0, half:], turned[0, :half])
    expected = length * np.exp(1j * np.arange(positions)[:, None] * found)
    if np.abs(turned[:, :half] + 1j * turned[:, half:] - expected).max() > 1e-3 * length.max():
        raise UnsupportedModel("the rotary embedding does not turn coordinates f and f + head_dim/2 at a constant rate")
    return found


def rotated(
    model: ov.Model, key: Output, projection: Node, vectors: np.ndarray, positions: int = POSITIONS
) -> np.ndarray:
    """RoPE_t(vectors) for t < positions, (kv_heads, positions, head_dim) f32; vectors (kv_heads, head_dim) or (width,).

    `key` (batch, kv_heads, tokens, head_dim) is where the keys enter the attention; whatever stands between the node
    `projection` and there, RoPE and a rotation of the heads, is applied as the graph has it. `vectors` may be all that
    the projection gives, queries and values, too. Runs on the CPU; only that part of the graph does.
    """
    stand_in, result = op.parameter([1, -1, vectors.size], np.float32), op.result(key)
    stand_in.output(0).set_names({"projected"})
    redirect(projection.output(0), stand_in)  # for the time of the copy, which would be of all layers below
    try:
        part = ov.Model([result], [*model.get_parameters(), stand_in]).clone()
    finally:
        redirect(stand_in.output(0), projection)
    result = part.get_results()[0]
    needed = [node for node in ancestors(result.input_value(0)) if node.get_type_name() == "Parameter"]
    row = np.arange(positions, dtype=np.int64)[None]
    known = {"position_ids": row, "attention_mask": np.ones_like(row), "input_ids": np.ones_like(row)}
    known["projected"] = np.broadcast_to(vectors.reshape(1, 1, -1), (1, positions, vectors.size))
    feeds = []
    for node in needed:
        name = node.output(0).get_any_name()
        if name not in known:
            raise UnsupportedModel(f"the rotary embedding depends on the input {name}, expected position_ids alone")
        feeds.append(known[name])
    submodel = ov.Model([result], needed)
    compiled = ov.Core().compile_model(submodel, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([np.ascontiguousarray(feed) for feed in feeds])[0][0]


def norms(vectors: Mapping[int, np.ndarray]) -> dict[str, list[float]]:
    """The lengths of each layer's vectors, (kv_heads, head_dim), for the record of a conversion."""
    return {str(index): [round(float(x), 4) for x in np.linalg.norm(some, axis=-1)] for index, some in vectors.items()}
