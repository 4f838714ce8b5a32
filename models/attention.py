"""Finders: a layer's KV path, the projections that make its queries, keys and values, and their biases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from openvino import Node, Output

from ovtq.errors import UnsupportedModel
from ovtq.ir.graph import ancestors, constant_of, consumers, id_of, static_dim
from ovtq.models.description import KVPath

SEQUENCE_AXIS = 2
NORMS = ("ReduceMean", "MVN", "RMS", "ReduceL2")


def kv_path(layer: int, what: str, sdpa_input: Output, beam_idx: Node) -> KVPath:
    """Climb from an SDPA input to the state: [Reshape ← Broadcast ← Unsqueeze ←] Concat ← Gather ← ReadValue."""
    where = f"layer {layer}: {what} path"
    node = sdpa_input.get_node()
    for step in ("Reshape", "Broadcast", "Unsqueeze"):  # kv_heads to query heads; absent when they are equal
        if node.get_type_name() == step:
            node = node.input_value(0).get_node()
    append = _expect(node, "Concat", where)
    if append.get_input_size() != 2 or append.get_attributes()["axis"] not in (SEQUENCE_AXIS, SEQUENCE_AXIS - 4):
        raise UnsupportedModel(f"{where}: the Concat that appends new tokens must have two inputs and axis 2")
    beam_gather = _expect(append.input_value(0).get_node(), "Gather", where)
    if id_of(beam_idx) not in {id_of(node) for node in ancestors(beam_gather.input_value(1))}:
        raise UnsupportedModel(f"{where}: the past tokens are not gathered by the input beam_idx")
    read = _expect(beam_gather.input_value(0).get_node(), "ReadValue", where)
    assigns = [node for node in consumers(append.output(0)) if node.get_type_name() == "Assign"]
    if len(assigns) != 1 or assigns[0].get_variable_id() != read.get_attributes()["variable_id"]:
        raise UnsupportedModel(
            f"{where}: expected one Assign of the appended tokens to the state read, found {len(assigns)}"
        )
    return KVPath(read, beam_gather, append, assigns[0])


def _expect(node: Node, type_name: str, where: str) -> Node:
    if node.get_type_name() != type_name:
        raise UnsupportedModel(
            f"{where}: looked for {type_name}, found {node.get_type_name()} ({node.get_friendly_name()})"
        )
    return node


def projection_bias(new: Output, heads: int, head_dim: int) -> np.ndarray | None:
    """The bias of the projection that makes `new`, (heads, head_dim); None if it has none, or makes more than `new`."""
    found = biased_projection(new, heads, head_dim)
    return found[1].reshape(heads, head_dim) if found and found[1].size == heads * head_dim else None


def biased_projection(new: Output, heads: int, head_dim: int) -> tuple[Node, np.ndarray] | None:
    """The node that adds the bias of the projection that makes `new`, and that bias, whole, (width,) f32.

    None if it has none, and where a norm stands behind it: then `new` does not move by the bias.
    """
    found = _projection(new, heads, head_dim)
    return (found.node, found.bias) if found and found.bias is not None and not found.normed else None


def projected(new: Output, heads: int, head_dim: int) -> Output:
    """What the projection that makes `new` gives, bias included: (batch, tokens, heads·head_dim), before RoPE.

    Raises UnsupportedModel if there is none, or if it makes more than `new` (queries, keys and values in one product).
    """
    found = _projection(new, heads, head_dim)
    if found is None or found.width != heads * head_dim:
        raise UnsupportedModel(
            f"looked for the projection that makes {new.get_node().get_friendly_name()}, {heads * head_dim} wide, and "
            + ("found none" if found is None else f"found one of {found.width}, which makes more than that")
        )
    return found.node.output(0)


@dataclass(frozen=True)
class _Projection:
    node: Node  # a MatMul, or what adds its bias
    width: int
    bias: np.ndarray | None  # (width,) f32
    normed: bool  # whether a norm stands between it and what it makes


def _projection(new: Output, heads: int, head_dim: int) -> _Projection | None:
    """The nearest MatMul of hidden states that is wide enough for all heads; RoPE's own and rotations are not."""
    normed = False
    for node in _breadth_first(new):
        kind, width = node.get_type_name(), static_dim(node.output(0), -1)
        normed = normed or kind in NORMS
        rank = node.get_output_partial_shape(0).rank
        if kind != "MatMul" or width is None or width % head_dim or width < heads * head_dim or rank.get_length() > 3:
            continue
        for after in consumers(node.output(0)):
            for value in after.input_values() if after.get_type_name() == "Add" else ():
                bias = constant_of(value)
                if bias is not None and bias.size == width:
                    return _Projection(after, width, np.asarray(bias, np.float32).reshape(-1), normed)
        return _Projection(node, width, None, normed)
    return None


def _breadth_first(output: Output, limit: int = 200) -> list[Node]:
    order: list[Node] = []
    seen, todo = set(), [output.get_node()]
    while todo and len(order) < limit:
        node = todo.pop(0)
        if id_of(node) not in seen:
            seen.add(id_of(node))
            order.append(node)
            if node.get_type_name() != "ShapeOf":
                todo.extend(value.get_node() for value in node.input_values())
    return order
