"""A text form of a graph that is the same for the same graph: for reading, for diffs, for golden tests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import openvino as ov
from openvino import Node, Output

from ovtq.ir.graph import id_of, value_of

SHOWN = 8  # constants of at most so many elements are written out, larger ones hashed


def dump(model: ov.Model, roots: Sequence[Node] = ()) -> str:
    """One line per node: `%n = Type{attributes}(operands) : type[shape]`, operands before their users, then the states.

    With `roots`, only what they depend on.

    Nodes are numbered by a depth-first walk from the results and the sorted Assigns, so that names and the order of
    construction do not matter; constants show their values or the start of their SHA-256.
    """
    numbers: dict[str, int] = {}
    lines: list[str] = []
    sinks = sorted(model.get_sinks(), key=lambda node: str(node.get_variable_id()))
    for root in roots or [*model.get_results(), *sinks]:
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, done = stack.pop()
            if id_of(node) in numbers or node.get_type_name() == "Constant":
                continue
            if done:
                numbers[id_of(node)] = len(lines)
                lines.append(_line(node, numbers))
            else:
                stack.append((node, True))
                stack.extend((value.get_node(), False) for value in reversed(node.input_values()))
    states = sorted(
        f"state {info.variable_id} : {info.data_type.get_type_name()}{info.data_shape}"
        for info in (variable.get_info() for variable in model.get_variables())
    )
    return "\n".join([*lines, *states]) + "\n"


def _line(node: Node, numbers: dict[str, int]) -> str:
    attributes = {
        key: value
        for key, value in sorted(node.get_attributes().items())
        if key not in ("variable_shape", "variable_type", "output_names")
    }
    name = node.get_type_name()
    if name == "Parameter":
        attributes = {"name": sorted(node.output(0).get_names())}
    operands = ", ".join(_operand(value, numbers) for value in node.input_values())
    outputs = ", ".join(
        f"{output.get_element_type().get_type_name()}{output.get_partial_shape()}" for output in node.outputs()
    )
    return f"%{numbers[id_of(node)]} = {name}{attributes or ''}({operands}) : {outputs}"


def _operand(output: Output, numbers: dict[str, int]) -> str:
    node = output.get_node()
    if node.get_type_name() != "Constant":
        index = f".{output.get_index()}" if node.get_output_size() > 1 else ""
        return f"%{numbers[id_of(node)]}{index}"
    kind = f"{output.get_element_type().get_type_name()}{list(output.get_shape())}"
    if np.prod(output.get_shape()) <= SHOWN:
        return f"{kind}{value_of(node).tolist()}"
    return f"{kind}#{hashlib.sha256(node.get_data().tobytes()).hexdigest()[:8]}"
