"""Any stateful decoder whose attention is ScaledDotProductAttention over a cache of keys and values, by its graph.

Q (batch, query_heads, new tokens, head_dim), K and V of cached and new tokens, a mask, then, if there are any, a scale
and one sink logit per query head: four to six inputs. Keys and values are those of one head, of groups or of all heads,
repeated or not; what makes them (one projection or three, biases, norms, RoPE or none) is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
from openvino import Node

from ovtq.errors import UnsupportedModel
from ovtq.ir.graph import Port, constant_of, static_dim
from ovtq.models.attention import kv_path, projection_bias
from ovtq.models.description import AttentionLayer, Exported, KVPath, ModelDescription
from ovtq.models.mask import windows
from ovtq.states import Growing, StateSpec

INPUTS = ("input_ids", "attention_mask", "beam_idx")
KV = ("key", "value")
STATELESS = "export it as a stateful model (task text-generation-with-past)"


def describe(model: ov.Model, config: Mapping[str, Any]) -> ModelDescription:
    """Describe a model from its graph; config.json must not contradict it in the number of layers.

    Every state is that of a layer's keys or values. Raises UnsupportedModel, naming what was looked for and not found.
    """
    inputs = {name: node for node in model.get_parameters() for name in node.output(0).get_names()}
    missing = [name for name in INPUTS if name not in inputs]
    if missing:
        raise UnsupportedModel(f"the model has no input {', '.join(missing)}; {STATELESS}")
    if not model.get_variables():
        raise UnsupportedModel(f"the model has no states; {STATELESS}")
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    if not found:
        raise UnsupportedModel(
            "the graph has no ScaledDotProductAttention; ovtq rewrites the caches of that, whatever other states hold"
        )
    paths = [_paths(index, sdpa, inputs["beam_idx"]) for index, sdpa in enumerate(found)]
    _explain(model, paths)
    count = config.get("num_hidden_layers", len(found))
    if count != len(found):
        raise UnsupportedModel(
            f"config.json has {count} layers, the graph has {len(found)} ScaledDotProductAttention nodes"
        )
    kept = windows([sdpa.input_value(3) for sdpa in found], paths, config.get("sliding_window"))
    layers = tuple(_layer(*parts) for parts in zip(range(len(found)), found, paths, kept, strict=True))
    states = tuple(_state(layer, what, path) for layer in layers for what, path in zip(KV, layer.paths, strict=True))
    ids, mask, beams = (inputs[name] for name in INPUTS)
    return ModelDescription(str(config.get("model_type")), ids, mask, beams, layers, states)


def _paths(index: int, sdpa: Node, beam_idx: Node) -> tuple[KVPath, KVPath]:
    if sdpa.get_attributes().get("causal"):
        raise UnsupportedModel(f"layer {index}: the attention is causal by a flag, not by a mask")
    if sdpa.get_input_size() < 4:
        raise UnsupportedModel(f"layer {index}: the attention has no mask")
    return kv_path(index, "key", sdpa.input_value(1), beam_idx), kv_path(index, "value", sdpa.input_value(2), beam_idx)


def _explain(model: ov.Model, paths: list[tuple[KVPath, KVPath]]) -> None:
    """Raise UnsupportedModel if a state is no layer's keys or values, or those of more than one."""
    owners: dict[str, int] = {}
    for index, pair in enumerate(paths):
        for path in pair:
            other = owners.setdefault(path.variable_id, index)
            if other != index:
                raise UnsupportedModel(f"layers {other} and {index} share the state {path.variable_id}")
    rest = sorted({variable.get_info().variable_id for variable in model.get_variables()} - {*owners})
    if rest:
        raise UnsupportedModel(
            f"{len(rest)} of {len(rest) + len(owners)} states are no attention's keys or values, such as {rest[0]}: "
            "convolutions, recurrent layers and other caches are not known here"
        )


def _state(layer: AttentionLayer, what: str, path: KVPath) -> StateSpec:
    kind = path.read.get_element_type().get_type_name()
    heads, width, these = layer.kv_heads, layer.head_dim, [layer.index]
    return StateSpec.growing(path.variable_id, kind, heads, width, Growing(), what, these, native=True)


def _layer(index: int, sdpa: Node, paths: tuple[KVPath, KVPath], window: int | None) -> AttentionLayer:
    where, (key_path, value_path) = f"layer {index}", paths
    query_heads, kv_heads = static_dim(sdpa.input_value(0), 1), static_dim(key_path.appended, 1)
    widths = [static_dim(tensor, 3) for tensor in (sdpa.input_value(0), key_path.appended, value_path.appended)]
    head_dim = widths[1] or widths[0]
    if not query_heads or not kv_heads or not head_dim:
        raise UnsupportedModel(f"{where}: heads and their width are not static: {query_heads}, {kv_heads}, {head_dim}")
    if any(width != head_dim for width in widths if width is not None) or widths[2] is None:
        raise UnsupportedModel(
            f"{where}: queries, keys and values of {', '.join(map(str, widths))} numbers per head; they must be equal, "
            "which those of latent attention (MLA) are not"
        )
    if query_heads % kv_heads:
        raise UnsupportedModel(f"{where}: {query_heads} query heads do not share {kv_heads} KV heads evenly")
    inputs = sdpa.get_input_size()
    scale = constant_of(sdpa.input_value(4)) if inputs > 4 else np.array([head_dim**-0.5])
    sinks = constant_of(sdpa.input_value(5)) if inputs > 5 else None
    if scale is None or scale.size != 1 or (inputs > 5 and (sinks is None or sinks.size != query_heads)):
        raise UnsupportedModel(
            f"{where}: expected a constant scale and, if any, one constant sink logit per query head"
        )
    key, value = Port(key_path.append, 1), Port(value_path.append, 1)
    return AttentionLayer(
        index=index,
        window=window,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=float(scale.reshape(-1)[0]),
        sinks=None if sinks is None else np.asarray(sinks, dtype=np.float32).reshape(query_heads),
        key_bias=projection_bias(key.source, kv_heads, head_dim),
        value_bias=projection_bias(value.source, kv_heads, head_dim),
        query=Port(sdpa, 0),
        key=key,
        value=value,
        context=sdpa.output(0),
        cache=Exported(key_path, value_path, Port(sdpa, 3)),
    )
