"""How much of a model a verification runs: its first layers, with their experts or without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.errors import VerificationFailed
from ovtq.ir.graph import ancestors, consumers, descendants, id_of, redirect
from ovtq.ir.io import stamp_of
from ovtq.models import AttentionLayer, ModelDescription
from ovtq.states import POSITION, PRUNED, SCORE

BIG = 2 << 30  # bytes of weights; above it only the first layers are verified, without their experts: 1 GB, not 12
BIG_LAYERS = 4  # two of each kind in every known architecture
ROWS = 4096  # of an embedding, where a vocabulary is longer


@dataclass(frozen=True)
class Scope:
    """How much of the model is run: its first `layers` layers, up to the node named `end`; None: all, to the logits.

    `joins` are the names of the Adds where those layers' experts join the stream; there it goes on without them.
    """

    layers: int
    end: str | None = None
    joins: tuple[str, ...] = ()


def scope(description: ModelDescription, layers: int | None = None, experts: bool = True) -> Scope:
    """The scope of the first `layers` layers (None: all) of a model still as exported; without experts: no logits.

    Experts are most of a model's weights, and no pass touches them.
    """
    count = len(description.layers)
    # never without the first layer whose cache holds all tokens: that tells the past length
    least = 1 + next((layer.index for layer in description.layers if layer.window is None), 0)
    some = count if layers is None else min(max(layers, least), count)
    if some == count and experts:
        return Scope(count)
    last = _output_projection(description.layers[some - 1]).get_friendly_name()
    before = [] if experts else description.layers[: some - 1]
    joins = [join.get_friendly_name() for layer in before if (join := _join(layer))]
    return Scope(some, last, tuple(joins))


def default_scope(description: ModelDescription, xml: Path, layers: int | None = None) -> Scope:
    """The scope of `layers` layers of a model still as exported; by default all, of a big one the first few."""
    big = xml.with_suffix(".bin").stat().st_size > BIG
    return scope(description, layers or (BIG_LAYERS if big else None), experts=not big)


def _output_projection(layer: AttentionLayer) -> Node:
    node = consumers(layer.context)[0]
    while node.get_type_name() != "MatMul":  # Transpose, Reshape, then o_proj, which no pass touches
        node = consumers(node.output(0))[0]
    return node


def _join(layer: AttentionLayer) -> Node | None:
    """The Add of the stream behind the attention and of what an MLP or experts make of it.

    None where they stand beside the attention, not behind it (parallel residuals): then they are run, too.
    """
    node = _output_projection(layer)
    while not (len(after := consumers(node.output(0))) > 1 and node.get_type_name() == "Add"):
        if not after:
            return None
        node = after[0]  # the bias, then the stream, which the experts' norm reads, too
    found = [step for step in after if step.get_type_name() == "Add"]
    if len(found) != 1:
        return None
    seen, todo = {id_of(node)}, [found[0]]
    while todo:
        step = todo.pop()
        if step.get_type_name() == "ScaledDotProductAttention":
            return None
        if id_of(step) not in seen:
            seen.add(id_of(step))
            todo += [value.get_node() for value in step.input_values()]
    return found[0]


def cut(model: ov.Model, extent: Scope) -> ov.Model:
    """What the node `extent.end` depends on, with the states read there, and that node as the result.

    Raises VerificationFailed if that of an exported model has not one attention for each layer.
    """
    nodes = {node.get_friendly_name(): node for node in model.get_ops()}
    for name in extent.joins:
        join = nodes[name]
        sides = [value for value in join.input_values() if value.get_node().get_type_name() == "Add"]
        stream = next(value for value in sides if len(value.get_target_inputs()) > 1)
        redirect(join.output(0), stream)
    end = nodes[extent.end]
    later = {id_of(step) for step in descendants(end.output(0))}
    sinks = {sink.get_variable_id(): sink for sink in model.get_sinks()}
    kept, todo = {}, sorted(_states(end.output(0)))
    todo += [name for name in (PRUNED, POSITION) if SCORE in todo and name in sinks]  # written, but read by nothing
    while todo:
        name = todo.pop()
        kept[name] = sink = sinks[name]
        # a state that layers share is written by later ones too: let an earlier one write in their stead
        for step in list(ancestors(sink.input_value(0))):
            if step.get_type_name() == "Concat" and step.get_attributes()["axis"] in (0, 1):  # of vectors, heads
                inside = [value for value in step.input_values() if id_of(value.get_node()) not in later]
                for index, value in enumerate(step.input_values()):
                    if inside and id_of(value.get_node()) in later and _alike(value, inside[0]):
                        step.input(index).replace_source_output(inside[0])
        todo += sorted(_states(sink.input_value(0)) - {*kept, *todo})  # what it is made of
    left = [sink for name, sink in sinks.items() if name in kept]
    part = ov.Model([op.result(end.output(0))], left, model.get_parameters())
    attentions = sum(node.get_type_name() == "ScaledDotProductAttention" for node in part.get_ops())
    if not stamp_of(model) and attentions != extent.layers:
        raise VerificationFailed(
            f"the first {extent.layers} layers can't be verified alone: {attentions} attentions are left of them"
        )
    return part


def keep_initial_values(model: ov.Model) -> ov.Model:
    """`model` with the Broadcasts that one ReadValue alone reads as further results.

    The CPU plugin takes such a node into the ReadValue, and a growing state then keeps its rows at a reset. Of the GPU
    plugin's form it merges those of several layers, but the only packed layer, or the only one verified, has its own.
    """
    starts = [node.input_value(0) for node in model.get_ops() if node.get_type_name() == "ReadValue"]
    alone = [x for x in starts if x.get_node().get_type_name() == "Broadcast" and len(x.get_target_inputs()) == 1]
    return ov.Model([*model.get_results(), *map(op.result, alone)], model.get_sinks(), model.get_parameters())


def _states(output: Output) -> set[str]:
    """Names of the states that a tensor depends on."""
    return {x.get_attributes()["variable_id"] for x in ancestors(output) if x.get_type_name() == "ReadValue"}


def _alike(a: Output, b: Output) -> bool:
    """Whether both are rows of tokens, of one shape: what shapes are made of is static."""
    return a.get_partial_shape().is_dynamic and str(a.get_partial_shape()) == str(b.get_partial_shape())


def shortened(model: ov.Model, vocabulary: int) -> int:
    """Leave the first ROWS rows of the embedding in a model without an output layer; returns how many there are now.

    Of 201,088 tokens of 2,880 numbers that saves two copies of 600 MB, and no pass touches the embedding.
    """
    if vocabulary <= ROWS:
        return vocabulary
    tables = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    tables = [node for node in tables if len(shape := node.get_output_shape(0)) == 2 and shape[0] == vocabulary]
    if any(tuple(node.data.shape) != tuple(node.get_output_shape(0)) for node in tables):
        return vocabulary  # rows of less than whole bytes
    for node in tables:
        first = ov.Tensor(
            np.ascontiguousarray(node.data[:ROWS]).view(np.uint8),
            [ROWS, node.get_output_shape(0)[1]],
            node.get_element_type(),
        )
        redirect(node.output(0), op.constant(first))
    model.validate_nodes_and_infer_types()
    return ROWS
