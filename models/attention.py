"""Finders that the descriptions of all architectures share: a layer's KV path, its mask, its biases."""

from __future__ import annotations

import numpy as np
from openvino import Node, Output

from ovtq.errors import UnsupportedModel
from ovtq.ir.graph import ancestors, constant_of, consumers, id_of, static_dim
from ovtq.models.description import KVPath

SEQUENCE_AXIS = 2


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


def projection_bias(new: Output, kv_heads: int, head_dim: int) -> np.ndarray | None:
    """The bias of the projection that makes `new`, (kv_heads, head_dim), or None: climbs to the nearest MatMul."""
    found = biased_projection(new, kv_heads, head_dim)
    return found[1] if found else None


def biased_projection(new: Output, kv_heads: int, head_dim: int) -> tuple[Node, np.ndarray] | None:
    """The node that adds the bias of the projection that makes `new`, and that bias, (kv_heads, head_dim)."""
    found = _projection(new, kv_heads, head_dim)
    return (found[0], found[1]) if found and found[1] is not None else None


def projected(new: Output, heads: int, head_dim: int) -> Output:
    """What the projection that makes `new` gives, bias included: (batch, tokens, heads·head_dim), before RoPE.

    Raises UnsupportedModel if there is none.
    """
    found = _projection(new, heads, head_dim)
    if found is None:
        raise UnsupportedModel(
            f"looked for the projection that makes {new.get_node().get_friendly_name()}, {heads * head_dim} wide, and "
            "found none"
        )
    return found[0].output(0)


def _projection(new: Output, heads: int, head_dim: int) -> tuple[Node, np.ndarray | None] | None:
    """The nearest node of that width that is a MatMul, or adds a bias, (heads, head_dim), to one."""
    width = heads * head_dim
    for node in _breadth_first(new):
        if static_dim(node.output(0), -1) != width:
            continue
        if node.get_type_name() == "MatMul":
            return node, None
        if node.get_type_name() == "Add":
            for value in node.input_values():
                bias = constant_of(value)
                if bias is not None and bias.size == width:
                    return node, np.asarray(bias, dtype=np.float32).reshape(heads, head_dim)
    return None


def _breadth_first(output: Output, limit: int = 200) -> list[Node]:
    order, seen, todo = [], set(), [output.get_node()]
    while todo and len(order) < limit:
        node = todo.pop(0)
        if id_of(node) not in seen:
            seen.add(id_of(node))
            order.append(node)
            todo.extend(value.get_node() for value in node.input_values())
    return order


def mask_window(mask: Output, attention_mask: Node, where: str) -> int | None:
    """The window of an additive attention mask, None if it is causal only.

    Reads `Select(visible, 0, very negative)`, optionally behind a Slice, where `visible` is a conjunction of
    causality (key ≤ query), at most one window (key > query − window) and padding (attention_mask).
    Raises UnsupportedModel for anything else in it.
    """
    node = mask.get_node()
    while node.get_type_name() in ("Slice", "Convert"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Select":
        raise UnsupportedModel(
            f"{where}: looked for a Select(visible, 0, -inf) mask, found {node.get_type_name()} "
            f"({node.get_friendly_name()})"
        )
    shown, hidden = constant_of(node.input_value(1)), constant_of(node.input_value(2))
    if shown is None or hidden is None or np.any(shown != 0) or np.any(hidden > -1e4):
        raise UnsupportedModel(f"{where}: expected a mask of 0 and -inf")
    causal, padding, windows = False, False, []
    for leaf in _conjunction(node.input_value(0)):
        kind = leaf.get_type_name()
        if kind == "Constant" and np.all(leaf.get_data()):
            continue
        if kind == "LessEqual":
            causal = True
        elif kind == "Greater" and (shift := _shift(leaf.input_value(1))) is not None:
            windows.append(-shift)
        elif id_of(attention_mask) in {id_of(node) for node in ancestors(leaf.output(0))}:
            padding = True
        else:
            raise UnsupportedModel(
                f"{where}: the mask contains {kind} ({leaf.get_friendly_name()}), which is neither "
                "causality nor a window nor padding"
            )
    if not causal or not padding or len(windows) > 1:
        raise UnsupportedModel(
            f"{where}: expected causality, padding and at most one window in the mask, found "
            f"causal={causal}, padding={padding}, windows={windows}"
        )
    return windows[0] if windows else None


def _conjunction(output: Output) -> list[Node]:
    node = output.get_node()
    if node.get_type_name() == "Broadcast":
        return _conjunction(node.input_value(0))
    if node.get_type_name() in ("BitwiseAnd", "LogicalAnd"):
        return _conjunction(node.input_value(0)) + _conjunction(node.input_value(1))
    return [node]


def _shift(output: Output) -> int | None:
    """c of `query + c` or −c of `query − c`; None if the output is no such sum."""
    node = output.get_node()
    if node.get_type_name() not in ("Add", "Subtract"):
        return None
    constant = constant_of(node.input_value(1))
    if constant is None or constant.size != 1:
        return None
    value = int(constant.reshape(-1)[0])
    return value if node.get_type_name() == "Add" else -value
