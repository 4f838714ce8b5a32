"""What forms with kernels share: a guard that refuses what they can't do, states, how a kernel is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from openvino import Node, Output
from openvino import opset15 as op
from openvino.utils.node_factory import NodeFactory

from ovtq.codec.kernel_files import WIDTH, in_two
from ovtq.ir.graph import ancestors, consumers, dim, f32, i64, id_of, redirect
from ovtq.models.description import AttentionLayer, ModelDescription

GUARD = (
    "ovtq's kernels, which run on a GPU with the property CONFIG_FILE = the path of the file ovtq_kernels/kernels.xml "
    "in the model's folder; it is missing, or this is no GPU, and without it"
)  # the name of an operation, before what a plugin says of it: it is not supported
LEAST = 64  # rows that new or past tokens are brought to, at the least; then a power of two
NEEDED = "for a GPU with the property CONFIG_FILE"  # before the names of what only that runs: a CPU quotes one


def refusal(capacity: int | None) -> str:
    """The name of the node that refuses, which plugins quote."""
    most = f"and {capacity} tokens at most, past and new (--capacity of ovtq-convert), " if capacity else ""
    return (
        f"ovtq refuses this call: this model takes one sequence at a time (batch 1), {most}on a GPU with the property "
        "CONFIG_FILE = the path of the file ovtq_kernels/kernels.xml in the model's folder"
    )


def refuse_others(description: ModelDescription, capacity: int | None = None) -> Node:
    """Let the model's tokens pass through a node that refuses a call for which kernels have no right result.

    Returns how many past tokens there are, (1,) i64; raises ValueError for a model whose states tell it still.
    The GPU plugin computes it once whether the kernels are there, and compares lengths on the host.
    """
    ids, past = description.input_ids, description.past
    if past is None:
        raise ValueError("lengths come from a state still; decouple-length comes first")
    for node in consumers(ids.output(0)):
        if node.get_friendly_name() == refusal(None):  # another form's, which this one stands for
            redirect(node.output(0), ids)
    batch, new = (dim(ids, axis) for axis in (0, 1))
    guard = carrier("opset14", "Inverse", [f32(np.full((1, 1, 1), 2))], adjoint=False)
    guard.set_friendly_name(GUARD)
    missing = op.convert(op.less(op.reshape(guard, i64([1]), False), f32(np.array([0.75]))), "i64")
    over = [i64([0]), missing, op.subtract(batch, i64([1]))]
    if capacity:
        over.append(op.subtract(op.add(past, new), i64([capacity])))
    taken = op.variadic_split(ids, i64(1), op.add(new, op.reduce_max(op.concat(over, 0), i64([0]), True)))
    taken.set_friendly_name(refusal(capacity))
    earlier = {id_of(node) for node in ancestors(taken.output(0))}
    for reader in list(ids.output(0).get_target_inputs()):
        if id_of(reader.get_node()) not in earlier:
            reader.replace_source_output(taken.output(0))
    return past


def start(batch: Node, layer: AttentionLayer, shape: Sequence[int], values: Mapping[int, np.ndarray]) -> Node:
    """What a layer's state begins with, (batch, *shape): `values` at their places, and zeros.

    One of its own for each layer, for states that begin with one node's result are copied in each step: the layer's
    number is at the beginning.
    """
    size = int(np.prod(shape))
    head = filled(-(-max(place + some.size for place, some in values.items()) // WIDTH) * WIDTH, values)
    head[0] = layer.index
    rest = op.concat([batch, i64([size - head.size])], 0)
    first = op.broadcast(f32(head), op.concat([batch, i64([head.size])], 0))
    return op.reshape(op.concat([first, op.broadcast(f32(0), rest)], 1), i64([-1, *shape]), False)


def filled(size: int, values: Mapping[int, np.ndarray]) -> np.ndarray:
    """(size,) f32: `values` at their places, and zeros."""
    found = np.zeros(size, np.float32)
    for place, some in values.items():
        found[place:][: some.size] = some.reshape(-1)
    return found


def of_all_kernels(layer: AttentionLayer, offsets: Mapping[str, int]) -> dict[int, np.ndarray]:
    """What every kernel finds of a layer in its state."""
    scale, sinks = in_two(np.array(layer.scale)), in_two(layer.sink_logits.reshape(-1))
    return {offsets["SCALE"]: scale, offsets["SINKS"]: sinks}


def carrier(opset: str, kind: str, inputs: Sequence[Node | Output], **attributes: object) -> Node:
    """An operation of OpenVINO's, by its name."""
    ports = [x.output(0) if isinstance(x, Node) else x for x in inputs]
    return NodeFactory(opset).create(kind, ports, attributes)


def halves(count: Node | Output) -> list[Node]:
    """1024·high + low, exact in f16: (1,) i64 each."""
    high = op.divide(count, i64([1024]))
    return [high, op.subtract(count, op.multiply(high, i64([1024])))]


def first_of(x: Node) -> Node:
    """Its first number, (1, 1, 1, 1)."""
    return op.slice(x, i64([0] * 4), i64([1] * 4), i64([1] * 4))


def brought(count: Node | Output, most: int) -> Node:
    """LEAST, or the power of two above it that is not below `count`: few lengths, for a kernel is built for each."""
    steps = [LEAST]
    while steps[-1] < most:
        steps.append(2 * steps[-1])
    # by sums and products of whole numbers, which the plugin computes on the host
    over = op.minimum(op.maximum(op.subtract(count, i64([0, *steps[:-1]])), i64([0])), i64([1]))
    return op.maximum(op.reduce_max(op.multiply(over, i64(steps)), i64([0]), True), i64([LEAST]))
