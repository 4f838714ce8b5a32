"""Small helpers to read and to write OpenVINO graphs. Nodes are found by topology, never by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
import openvino as ov
from numpy.typing import ArrayLike
from openvino import Node, Output
from openvino import opset15 as op
from openvino.op.util import Variable, VariableInfo

from ovtq.states import StateSpec

ALL = 2**31 - 1  # the end of any axis
MASKED = np.float32(-65504)  # what exporters write for "not visible": the lowest finite f16


def i64(values: ArrayLike) -> Node:
    """An i64 constant, of whole numbers."""
    return op.constant(np.asarray(values, dtype=np.int64))


def i32(value: int) -> Node:
    """An i32 constant."""
    return op.constant(np.int32(value))


def f32(values: float | np.ndarray) -> Node:
    """An f32 constant."""
    return op.constant(np.ascontiguousarray(values, dtype=np.float32))


_MARKED = (
    '<net name="mark" version="11"><layers>'
    '<layer id="0" name="a" type="Parameter" version="opset1"><data shape="1" element_type="f32"/>'
    '<output><port id="0" precision="FP32"><dim>1</dim></port></output></layer>'
    '<layer id="1" name="b" type="Abs" version="opset1"><rt_info><attribute name="precise" version="0"/></rt_info>'
    '<input><port id="0" precision="FP32"><dim>1</dim></port></input>'
    '<output><port id="1" precision="FP32"><dim>1</dim></port></output></layer>'
    '<layer id="2" name="c" type="Result" version="opset1">'
    '<input><port id="0" precision="FP32"><dim>1</dim></port></input></layer></layers>'
    '<edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/>'
    '<edge from-layer="1" from-port="1" to-layer="2" to-port="0"/></edges></net>'
)


@cache
def _mark() -> tuple[object, str]:
    nodes = ov.Core().read_model(model=_MARKED.encode()).get_ops()
    info = next(node for node in nodes if node.get_type_name() == "Abs").get_rt_info()
    (key,) = info
    return info[key], key


def precise(node: Node) -> Node:
    """`node`, marked so that a plugin computes it in f32 whatever its inference precision is.

    Python can't make the mark, but hand on that of a node read from an IR.
    """
    node.set_rt_info(*_mark())
    return node


def dim(tensor: Node | Output, axis: int) -> Node:
    """Length of one axis of `tensor`, as an i64 vector of one element."""
    return op.gather(op.shape_of(tensor), i64([axis]), i64(0))


def scalar(vector: Node) -> Node:
    """A vector of one element as a scalar."""
    return op.squeeze(vector, i64([0]))


def numbers(count: Node, axis: int) -> Node:
    """0 … count − 1, i64, along one of four axes; `count` is a vector of one element."""
    line = op.range(i64(0), scalar(count), i64(1), "i64")
    return op.unsqueeze(line, i64([other for other in range(4) if other != axis]))


def joined(parts: Sequence[Node | Output], axis: int) -> Node | Output:
    """The Concat of several tensors; of one, itself."""
    return op.concat(list(parts), axis) if len(parts) > 1 else parts[0]


def slice_heads(tensor: Node | Output, count: int) -> list[Output]:
    """Axis 1 in `count` equal parts, cut out one by one.

    A Split would be one node. But of its outputs an If reads wrong ones, on both plugins; and on the GPU's so does what
    packs one of them and takes another as it is.
    """
    value = tensor.output(0) if isinstance(tensor, Node) else tensor
    return [op.slice(value, i64([a]), i64([b]), i64([1]), i64([1])).output(0) for a, b in _parts(value, count)]


def gather_heads(tensor: Node | Output, count: int) -> list[Output]:
    """The same for the CPU plugin: it makes a Split of Slices, and lays its outputs out channels last: a copy more."""
    value = tensor.output(0) if isinstance(tensor, Node) else tensor
    return [op.gather(value, i64(range(a, b)), i64(1)).output(0) for a, b in _parts(value, count)]


def _parts(value: Output, count: int) -> list[tuple[int, int]]:
    each = value.get_partial_shape()[1].get_length() // count
    return [(number * each, (number + 1) * each) for number in range(count)]


def new_variable(state: StateSpec) -> Variable:
    """The variable of a state."""
    info = VariableInfo()
    info.variable_id = state.name
    info.data_shape = ov.PartialShape(list(state.shape))
    info.data_type = state.element_type
    return Variable(info)


def consumers(output: Output) -> list[Node]:
    """The nodes that read `output`."""
    return [target.get_node() for target in output.get_target_inputs()]


def redirect(old: Output, new: Node | Output) -> None:
    """Let everything that reads `old` read `new`, which must not itself depend on `old`."""
    for target in list(old.get_target_inputs()):
        target.replace_source_output(new.output(0) if isinstance(new, Node) else new)


def insert_after(old: Output, make: Callable[[Output], Node]) -> Output:
    """Put a node between `old` and all its readers; returns what they read now."""
    targets = list(old.get_target_inputs())
    new = make(old).output(0)
    for target in targets:
        target.replace_source_output(new)
    return new


def id_of(node: Node) -> str:
    """A node's unique name in its process (Python wrappers of one node compare unequal)."""
    return node.get_name()


def ancestors(output: Output) -> Iterator[Node]:
    """The node of `output` and all nodes it depends on, each once."""
    seen, todo = set(), [output.get_node()]
    while todo:
        node = todo.pop()
        if id_of(node) not in seen:
            seen.add(id_of(node))
            yield node
            todo.extend(value.get_node() for value in node.input_values())


def descendants(output: Output) -> Iterator[Node]:
    """All nodes that depend on `output`, each once."""
    seen, todo = set(), consumers(output)
    while todo:
        node = todo.pop()
        if id_of(node) not in seen:
            seen.add(id_of(node))
            yield node
            todo.extend(step for some in node.outputs() for step in consumers(some))


def constant_of(output: Output) -> np.ndarray | None:
    """The value of a constant, also through the Convert of a compressed one; None if it is no constant."""
    node = output.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return None
    return value_of(node)


def value_of(constant: Node) -> np.ndarray:
    """The value of a Constant.

    Floating-point values come as f32, whatever they are stored in: numpy has no bf16, and reads one as f16.
    """
    return constant.get_data(dtype=np.float32) if constant.get_element_type().is_real() else constant.get_data()


def static_dim(output: Output, axis: int) -> int | None:
    """Length of an axis if it is static, else None."""
    shape = output.get_partial_shape()
    if shape.rank.is_dynamic or not -shape.rank.get_length() <= axis < shape.rank.get_length():
        return None
    return shape[axis].get_length() if shape[axis].is_static else None


def rebuild(model: ov.Model, drop: Sequence[Node] = (), add: Sequence[Node] = ()) -> ov.Model:
    """`model` with the Assigns `drop` taken out and `add` put in, validated.

    A new `ov.Model` is made: changing the sinks of the old one leaves its variables behind.
    """
    gone = {id_of(node) for node in drop}
    sinks = [node for node in model.get_sinks() if id_of(node) not in gone] + list(add)
    fresh = ov.Model(model.get_results(), sinks, model.get_parameters(), model.get_friendly_name())
    for key, value in model.get_rt_info().items():
        fresh.set_rt_info(value, [key])
    fresh.validate_nodes_and_infer_types()
    return fresh


def body(results: Sequence[Node], parameters: Sequence[Node], name: str) -> ov.Model:
    """The inside of a Loop or If. Its nodes are named by their order, so that equal conversions write equal files."""
    model = ov.Model(list(results), list(parameters), name)
    for number, node in enumerate(model.get_ordered_ops()):
        node.set_friendly_name(f"{name}/{node.get_type_name()}_{number}")
    for node in (*model.get_parameters(), *model.get_results()):  # Python gave their tensors the old names
        node.output(0).set_names({node.get_friendly_name()})
    return model


@dataclass(frozen=True)
class Tensors:
    """What enters or leaves an If or a Loop.

    A subclass is a frozen dataclass of Outputs, or of more such; None is what there is not.
    """

    def flatten(self) -> list[Output]:
        """Those that there are, in the order of the fields."""
        found: list[Output] = []
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensors):
                found += value.flatten()
            elif value is not None:
                found.append(value.output(0) if isinstance(value, Node) else value)
        return found

    def filled(self, outputs: Sequence[Output]) -> Any:
        """The same with others in their places: what `flatten` took apart. Raises ValueError for more or fewer."""
        count = len(self.flatten())
        if len(outputs) != count:
            raise ValueError(f"{type(self).__name__}: {len(outputs)} tensors for {count}")
        left, changed = list(outputs), {}
        for item in fields(self):
            value = getattr(self, item.name)
            count = len(value.flatten()) if isinstance(value, Tensors) else int(value is not None)
            some, left = left[:count], left[count:]
            if count:
                changed[item.name] = value.filled(some) if isinstance(value, Tensors) else some[0]
        return replace(self, **changed)


@dataclass(frozen=True)
class Nothing(Tensors):
    """Nothing."""


@dataclass(frozen=True)
class One(Tensors):
    """A single tensor."""

    value: Node | Output


Read = TypeVar("Read", bound=Tensors)
Other = TypeVar("Other", bound=Tensors)
Left = TypeVar("Left", bound=Tensors)
Branch = tuple[Read, Callable[[Read], Left]]  # what is read; what makes results of that


def if_else(
    condition: Output, then: Branch[Read, Left], otherwise: Branch[Other, Left], names: tuple[str, str]
) -> Left:
    """What an If leaves, as `then` does; each branch is what it reads, and what makes its results of that.

    What only one branch reads costs the other nothing: plugins copy what they hand in. `condition` is an Output: given
    a Node, If takes its own first input for it.
    """
    node = op.if_op(condition)
    left, then_reads, then_results, then_body = _branch(*then, names[0])
    _, else_reads, else_results, else_body = _branch(*otherwise, names[1])
    node.set_then_body(then_body)
    node.set_else_body(else_body)
    for source in {_key(x): x for x in (*then[0].flatten(), *otherwise[0].flatten())}.values():
        node.set_input(source, then_reads.get(_key(source)), else_reads.get(_key(source)))
    return left.filled([node.set_output(*pair) for pair in zip(then_results, else_results, strict=True)])


def _branch(
    inputs: Read, make: Callable[[Read], Left], name: str
) -> tuple[Left, dict[tuple[str, int], Node], list[Node], ov.Model]:
    """What a branch leaves in its own body; what it reads, by its sources; its results, and the body."""
    sources = inputs.flatten()
    inner = [op.parameter(x.get_partial_shape(), x.get_element_type()) for x in sources]
    left = make(inputs.filled([x.output(0) for x in inner]))
    results = [op.result(x) for x in left.flatten()]
    return left, dict(zip(map(_key, sources), inner, strict=True)), results, body(results, inner, name)


def _key(output: Output) -> tuple[str, int]:
    return id_of(output.get_node()), output.get_index()


@dataclass(frozen=True)
class Port:
    """One input of a node: a place where a tensor enters, whatever produces it."""

    node: Node
    index: int

    @property
    def source(self) -> Output:
        """What feeds this input now."""
        return self.node.input_value(self.index)

    def feed(self, source: Node | Output) -> None:
        """Feed this input from `source`."""
        self.node.input(self.index).replace_source_output(source.output(0) if isinstance(source, Node) else source)
