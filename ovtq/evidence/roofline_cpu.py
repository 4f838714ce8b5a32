"""How long a decode step of an exported model should take on this CPU, by what its parts cost here, measured alone.

t = call + dense bytes / dense rate + experts' bytes / experts' rate + nodes · node + layers · context · attention

A forecast, not a bound: on a CPU a step does not wait for memory alone. Weights of 4 and 8 bits are unpacked on the
way, attention is computed. So a rate is what the plugin's own kernel gets through with one row: measured on the
products of the model's first two layers, and on their chosen experts, cut out; attention by two lengths of history in
those layers; a node by a chain of small ones. Nothing is taken from a step of the whole model.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import Node
from openvino import opset15 as op

from ovtq.errors import UnsupportedModel
from ovtq.ir import io
from ovtq.ir.graph import ancestors, id_of, redirect
from ovtq.models import describe
from ovtq.runtime.runner import Runner
from ovtq.verification.extent import cut, scope

PROPERTIES = {"PERFORMANCE_HINT": "LATENCY"}  # else the plugin's defaults, as in ovtq-bench
LAYERS = 2  # that are cut out: one of each kind
LENGTHS = (2048, 8192)  # tokens of history between which attention is measured
CHAIN = 200  # nodes of the chain
ROUNDS, WARM = 40, 8  # calls that are measured, after some that are not
FREE = ("Const", "Input", "Output", "MemoryInput", "MemoryOutput", "Reshape", "FullyConnected")  # or counted elsewhere


@dataclass(frozen=True)
class Parameters:
    """Bytes a second: of reading memory (not used, to compare), of dense products, of experts. Seconds: of a call with
    nothing in it, of a node, of attention for one token of history in one layer."""

    read: float
    dense: float
    experts: float
    call: float
    node: float
    attention: float


@dataclass(frozen=True)
class Work:
    """What a decode step has to do: bytes of weights, nodes that are no products, layers with a history."""

    dense: int
    experts: float
    nodes: float
    layers: int

    def milliseconds(self, of: Parameters, context: int) -> dict[str, float]:
        """The parts of a step after `context` tokens."""
        seconds = {
            "dense": self.dense / of.dense,
            "experts": self.experts / of.experts,
            "nodes": of.call + self.nodes * of.node,
            "attention": self.layers * context * of.attention,
        }
        return {part: 1e3 * value for part, value in seconds.items()}


def table(folder: Path, contexts: Sequence[int]) -> dict[str, Any]:
    """Milliseconds of a decode step at each context with their parts, and the parameters as lines of text.

    Raises UnsupportedModel for a converted model: its attention can't be cut out.
    """
    model, config = io.load(folder), io.load_config(folder)
    if io.stamp_of(model):
        raise UnsupportedModel("--roofline cpu needs the model as exported")
    share = config["num_experts_per_tok"] / config["num_local_experts"]
    dense, experts = (sum(found.values()) for found in weights(model, config))
    two, four = (count_nodes(first_layers(folder, count)) for count in (LAYERS, 2 * LAYERS))
    layers = config["num_hidden_layers"]
    work = Work(dense, experts * share, two + (layers / LAYERS - 1) * (four - two), layers)
    found = measure(folder)
    rows = []
    for context in contexts:
        parts = work.milliseconds(found, context)
        rows.append({"cache": "as exported", "context": context, "ms": sum(parts.values()), "parts": parts})
    notes = [
        "a forecast by parts that were measured alone, now; the plugin's defaults, one row, medians",
        f"{os.cpu_count()} cores read {found.read / 1e9:.1f} GB/s; unpacking, dense products get through "
        f"{found.dense / 1e9:.2f} GB/s of weights, chosen experts {found.experts / 1e9:.2f}",
        f"{work.dense:,} bytes of dense weights and {work.experts:,.0f} of experts a token, {work.layers} layers, "
        f"{work.nodes:,.0f} nodes besides",
        f"{found.call * 1e6:.0f} µs a call, {found.node * 1e6:.2f} µs a node, "
        f"{found.attention * 1e9:.1f} ns of attention for a token and layer",
    ]
    return {"machine": "cpu", "rows": rows, "assumptions": notes}


def measure(folder: Path) -> Parameters:
    """The parameters of this machine with this model's kinds of weights and heads."""
    short, long = (median_seconds(chain(count)) for count in (2, CHAIN + 2))
    node = (long - short) / CHAIN
    call = max(short - 2 * node, 0.0)
    parts = dense_part(folder), expert_part(folder)
    dense, experts = (size / max(median_seconds(part) - call, 1e-9) for part, size in parts)
    return Parameters(read_bandwidth(), dense, experts, call, node, attention_seconds(folder))


def read_bandwidth(gib: int = 1) -> float:
    """Bytes a second of summing `gib` GiB with all cores at once: the best of several times."""
    cores = os.cpu_count() or 1
    parts = np.array_split(np.ones((gib << 30) // 8, np.uint64), cores)
    with ThreadPoolExecutor(cores) as pool:
        return (gib << 30) / min(seconds_of(lambda: list(pool.map(np.sum, parts)), 7))


def chain(count: int) -> ov.Model:
    """A chain of `count` nodes that have next to nothing to compute, and that the plugin does not join."""
    start = op.parameter([1, 1, 64], ov.Type.f32)
    node: Node = start
    for _ in range(count):
        node = op.softmax(node, 2)
    return ov.Model([op.result(node.output(0))], [start])


def first_layers(folder: Path, count: int) -> ov.Model:
    """The first layers of a model without their experts, up to the last one's output projection."""
    model = io.load(folder)
    return cut(model, scope(describe(model, io.load_config(folder)), count, experts=False))


def weights(model: ov.Model, config: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the weights of each product, scales and all, by the product's name: dense ones, and all experts."""
    dense: dict[str, int] = {}
    experts: dict[str, int] = {}
    for node in model.get_ops():
        if node.get_type_name() == "MatMul":
            above = list(ancestors(node.input_value(1)))
            if not any(step.get_type_name() in ("Parameter", "ReadValue") for step in above):
                shape = node.input_value(1).get_partial_shape()
                kind = experts if len(shape) == 3 and shape[0] == config["num_local_experts"] else dense
                kind[node.get_friendly_name()] = sum(
                    step.get_byte_size()
                    for step in above
                    if step.get_type_name() == "Constant" and step.get_element_type() != ov.Type.i64  # a shape
                )
    return dense, experts


def dense_part(folder: Path) -> tuple[ov.Model, int]:
    """The dense products of the first layers, each with an input of its own; bytes of their weights."""
    part = first_layers(folder, LAYERS)
    found, _ = weights(part, io.load_config(folder))
    inputs, results = [], []
    for node in part.get_ops():
        if node.get_friendly_name() in found:
            inputs.append(op.parameter(node.input_value(0).get_partial_shape(), ov.Type.f32))
            node.input(0).replace_source_output(inputs[-1].output(0))
            results.append(op.result(node.output(0)))
    return ov.Model(results, inputs), sum(found.values())


def expert_part(folder: Path) -> tuple[ov.Model, float]:
    """The experts of the first layers with their norms and routers, each with an input; bytes that a token reads."""
    model, config = io.load(folder), io.load_config(folder)
    joins = scope(describe(model, config), LAYERS + 1, experts=False).joins
    nodes = {node.get_friendly_name(): node for node in model.get_ops()}
    inputs, results = [], []
    for name in joins:
        stream, made = nodes[name].input_values()
        if id_of(stream.get_node()) not in {id_of(node) for node in ancestors(made)}:
            stream, made = made, stream
        inputs.append(op.parameter(stream.get_partial_shape(), ov.Type.f32))
        results.append(op.result(made))
        redirect(stream, inputs[-1])
    own = [node for node in model.get_parameters() if any(reads(result, node) for result in results)]
    part = ov.Model(results, [*inputs, *own])
    part.validate_nodes_and_infer_types()
    _, found = weights(part, config)
    return part, sum(found.values()) * config["num_experts_per_tok"] / config["num_local_experts"]


def reads(result: Node, parameter: Node) -> bool:
    """Whether a result depends on a parameter."""
    return id_of(parameter) in {id_of(node) for node in ancestors(result.output(0))}


def count_nodes(model: ov.Model) -> int:
    """The nodes that the CPU plugin makes of a model, but for those in FREE."""
    compiled = ov.Core().compile_model(model, "CPU", PROPERTIES)
    kinds = (node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops())
    return sum(kind not in FREE for kind in kinds)


def attention_seconds(folder: Path) -> float:
    """Seconds of attention for a token of history in a layer."""
    runner = Runner(first_layers(folder, LAYERS), "CPU", PROPERTIES)
    spent = []
    for length in LENGTHS:
        runner.fill(length)
        times = seconds_of(lambda: runner.step(np.zeros((1, 1), np.int64)), WARM + ROUNDS)
        spent.append(float(np.median(times[WARM:])))
    return max(spent[1] - spent[0], 0.0) / (LENGTHS[1] - LENGTHS[0]) / LAYERS


def median_seconds(model: ov.Model) -> float:
    """Seconds of a call with one row, of other numbers each time: other experts."""
    request = ov.Core().compile_model(model, "CPU", PROPERTIES).create_infer_request()
    shapes = [[1 if dim.is_dynamic else dim.get_length() for dim in port.partial_shape] for port in model.inputs]
    draw = np.random.default_rng(0)
    times = []
    for _ in range(WARM + ROUNDS):
        values = [draw.standard_normal(shape, np.float32) for shape in shapes]
        times += seconds_of(functools.partial(request.infer, values, share_inputs=True), 1)
    return float(np.median(times[WARM:]))


def seconds_of(work: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` calls."""
    found = []
    for _ in range(count):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return found
