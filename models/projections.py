"""What a layer's weights say of its queries, keys and values, without a text.

The input of the projections is γ⊙n behind an RMS norm. With n white, E[nnᵀ] = 1, a projection's result x = W(γ⊙n) + b
has mean b and covariance W·diag(γ²)·Wᵀ. RoPE turns pairs z_f = x_f + i·x_(f + d/2) to z_f·u_f(t); over positions

    E[z_f z̄_g] = E[x_f x̄_g]·mean_t u_f ū_g,        E[z_f z_g] = E[x_f x_g]·mean_t u_f u_g,

which leaves of a covariance what turns together, and of a mean what does not turn (`ovtq.models.rope`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec.moments import Moments
from ovtq.errors import UnsupportedModel
from ovtq.ir.graph import constant_of, consumers, static_dim
from ovtq.models.attention import projected
from ovtq.models.description import AttentionLayer
from ovtq.models.rope import POSITIONS, rotated

STEPS = 8  # nodes between a layer's context and its output projection, at most
NONE = np.zeros(0)


def moments(model: ov.Model, layer: AttentionLayer) -> Moments:
    """A layer's moments from its weights; no errors, for they are of no text.

    Raises UnsupportedModel where the projections are not found, or RoPE does not turn coordinates f and f + d/2 of each
    head, as where a norm stands before it.
    """
    H, d = layer.kv_heads, layer.head_dim
    turn = _turn(model, layer)
    queries, keys, values = (
        _projection(projected(port.source, heads, d).get_node(), heads, d)
        for port, heads in ((layer.query, H * layer.group), (layer.key, H), (layer.value, H))
    )
    query_mean, query = _turned(*queries, turn)
    second = query + query_mean[:, :, None] * query_mean[:, None, :]
    key_mean, key = _turned(*keys, turn)
    output = gram(layer)
    query = second.reshape(H, layer.group, d, d).mean(1)
    return Moments(key_mean, key, *values, query, output, NONE, NONE)


def tell(model: ov.Model, layers: Sequence[AttentionLayer]) -> bool:
    """Whether the weights of such layers say what their heads hold; asked of the first and the last."""
    try:
        for layer in (layers[0], layers[-1]):
            moments(model, layer)
    except UnsupportedModel:
        return False
    return True


def output_rows(layer: AttentionLayer) -> np.ndarray:
    """The rows of the output projection that a layer's context meets, (kv_heads, group, head_dim, hidden) f64.

    Raises UnsupportedModel if it is not found.
    """
    width, at = layer.query_heads * layer.head_dim, layer.context
    for _ in range(STEPS):
        readers = consumers(at)
        if len(readers) != 1:
            break
        (node,) = readers
        if node.get_type_name() == "MatMul" and static_dim(node.input_value(0), -1) == width:
            weights = _weights(node)
            return weights.T.reshape(layer.kv_heads, layer.group, layer.head_dim, -1)
        at = node.output(0)
    raise UnsupportedModel(f"layer {layer.index}: looked for the projection of {width} results, and found none")


def gram(layer: AttentionLayer) -> np.ndarray:
    """W·Wᵀ of those rows, summed over the query heads that share a KV head, (kv_heads, head_dim, head_dim) f64."""
    rows = output_rows(layer)
    return np.einsum("hgdo,hgeo->hde", rows, rows, optimize=True)


def _projection(node: Node, heads: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (heads, d) and covariance (heads, d, d) of what a projection gives, before RoPE."""
    bias = np.zeros((heads, head_dim))
    if node.get_type_name() == "Add":
        constants = [constant_of(value) for value in node.input_values()]
        bias = next(x for x in constants if x is not None).astype(np.float64).reshape(heads, head_dim)
        node = next(v for v, x in zip(node.input_values(), constants, strict=True) if x is None).get_node()
    if node.get_type_name() != "MatMul":
        raise UnsupportedModel(f"looked for a projection's MatMul, found {node.get_type_name()}")
    weights = _weights(node) * _norm_weight(node.input_value(0))
    rows = weights.reshape(heads, head_dim, -1)
    return bias, rows @ rows.swapaxes(1, 2)


def _weights(node: Node) -> np.ndarray:
    """A MatMul's weights, decompressed, (out, in) f64."""
    part = ov.Model([op.result(node.input_value(1))], []).clone()
    found = ov.Core().compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])[0].astype(np.float64)
    return found if node.get_attributes()["transpose_b"] else found.T


def _norm_weight(source: Output) -> np.ndarray:
    """γ of the norm that a projection reads, or 1."""
    node, width = source.get_node(), static_dim(source, -1)
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Multiply":
        for value in node.input_values():
            weight = constant_of(value)
            if weight is not None and weight.size == width:
                return weight.astype(np.float64).reshape(-1)
    return np.ones(1)


def _turn(model: ov.Model, layer: AttentionLayer) -> np.ndarray:
    """u, (positions, head_dim/2) complex: what RoPE multiplies each pair of coordinates with."""
    H, d = layer.kv_heads, layer.head_dim
    half, node = d // 2, projected(layer.key.source, H, d).get_node()
    vectors = np.repeat([(1, 0), (0, 1), (2, 0)], half, axis=1).astype(np.float32)
    turned: list[np.ndarray] = []
    while len(turned) < len(vectors):  # as many at a time as there are heads, which all turn alike
        some = vectors[len(turned) :][:H]
        found = rotated(model, layer.key.source, node, np.resize(some, (H, d))).astype(np.float64)
        if layer.key_taken is not None:  # behind RoPE
            found += layer.key_taken[:, None]
        turned += [*(found[: len(some), :, :half] + 1j * found[: len(some), :, half:])]
    u, other, double = turned
    if np.abs(other - 1j * u).max() > 1e-3 * np.abs(u).max() or np.abs(double - 2 * u).max() > 1e-3 * np.abs(u).max():
        raise UnsupportedModel(
            f"layer {layer.index}: what stands between the projection of keys and the attention does not turn pairs of "
            "coordinates f and f + head_dim/2; calibrate with a text instead"
        )
    assert len(u) == POSITIONS
    return u


def _turned(mean: np.ndarray, covariance: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance over positions behind RoPE, of those before it; (heads, d) and (heads, d, d)."""
    half = mean.shape[1] // 2
    first = turn.mean(0)
    second = covariance + mean[:, :, None] * mean[:, None, :]
    a, b, c, e = second[:, :half, :half], second[:, :half, half:], second[:, half:, :half], second[:, half:, half:]
    straight = (a + e + 1j * (c - b)) * (turn.T @ turn.conj() / len(turn))  # E[z z̄ᵀ]
    crossed = (a - e + 1j * (c + b)) * (turn.T @ turn / len(turn))  # E[z zᵀ]
    real, imaginary = (straight + crossed) / 2, (straight - crossed) / 2
    rows = np.concatenate([real.real, -imaginary.imag], 2), np.concatenate([real.imag, imaginary.real], 2)
    pairs = (mean[:, :half] + 1j * mean[:, half:]) * first
    moved = np.concatenate([pairs.real, pairs.imag], 1)
    return moved, np.concatenate(rows, 1) - moved[:, :, None] * moved[:, None, :]
