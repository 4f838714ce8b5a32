"""The weights of a synthetic model: drawn like an initialiser's, streamed to disk a few megabytes at a time."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from synthetic_graph import Graph, TemplateError

BLOCK = 1 << 24  # bytes drawn at a time
STEP_STD = {"i4": (16**2 / 12) ** 0.5, "u4": (16**2 / 12) ** 0.5, "u8": (256**2 / 12) ** 0.5}  # of uniform codes
ITEM_BITS = {"i4": 4, "u4": 4, "u8": 8, "f16": 16, "bf16": 16, "f32": 32}


class Rotary(NamedTuple):
    """Inverse frequencies (head_dim / 2,) of a rotary embedding, and the factor of its cos and sin."""

    frequencies: np.ndarray
    factor: float


def write(root: ElementTree.Element, rotary: Rotary, folder: Path, seed: int) -> None:
    """Write the IR: weights constant by constant, then the XML with their places."""
    graph = Graph(root)
    known: dict[bytes, int] = {}  # small constants that are already there
    with (folder / "openvino_model.bin").open("wb") as file:
        for turn, (key, layer) in enumerate(graph.layers.items()):
            if layer.get("type") != "Const":
                continue
            data, start = layer.find("data"), file.tell()
            content = given(graph, key, rotary)
            if content is None:
                _stream(graph, key, np.random.Generator(np.random.SFC64([seed, turn])), file)
            elif content in known:
                start = known[content]
            else:
                known[content] = start
                file.write(content)
            data.attrib.pop("value", None)
            data.set("offset", str(start))
            data.set("size", str(len(content) if content is not None else file.tell() - start))
    ElementTree.ElementTree(root).write(folder / "openvino_model.xml", encoding="utf-8", xml_declaration=True)


def _shape(layer: ElementTree.Element) -> list[int]:
    return [int(item) for item in layer.find("data").get("shape").split(",") if item.strip()]


def given(graph: Graph, key: str, rotary: Rotary) -> bytes | None:
    """The bytes of a constant that the template or the configuration gives; None if it is a weight."""
    layer = graph.layers[key]
    data, shape = layer.find("data"), _shape(layer)
    readers = [graph.layers[reader] for reader in graph.readers[key]]
    if shape == [1, len(rotary.frequencies), 1]:
        return rotary.frequencies.tobytes()
    if readers[0].get("type") == "Multiply" and "rotary_emb" in readers[0].get("name"):
        return np.float32(rotary.factor).tobytes()
    kind = data.get("element_type")
    if kind in ("i32", "i64", "boolean") or (kind == "f32" and math.prod(shape) == 1):
        return bytes.fromhex(data.get("value"))
    return None


def _stream(graph: Graph, key: str, draw: np.random.Generator, file: BinaryIO) -> None:
    """Draw a weight, a scale, a zero point, a bias, a norm or sinks, and write them in pieces."""
    layer = graph.layers[key]
    kind, shape, name = layer.find("data").get("element_type"), _shape(layer), layer.get("name")
    count = math.prod(shape)
    if kind not in ITEM_BITS:
        raise TemplateError(f"{name}: a weight of type {kind} is not known")
    if kind == "u8" and shape[-1] == 1:  # zero points
        file.write(draw.integers(120, 137, count, np.uint8).tobytes())
    elif kind == "u4" and shape[-1] == 1:  # two in a byte
        low, high = draw.integers(6, 10, (2, (count + 1) // 2), np.uint8)
        file.write((low | high << 4).tobytes())
    elif kind in STEP_STD:
        for start in range(0, count * ITEM_BITS[kind] // 8, BLOCK):
            file.write(draw.bytes(min(BLOCK, count * ITEM_BITS[kind] // 8 - start)))
    else:
        mean, spread = _moments(graph, key, shape, kind)
        for start in range(0, count, BLOCK):
            some = draw.standard_normal(min(BLOCK, count - start), np.float32) * np.float32(spread) + np.float32(mean)
            file.write(_as(kind, some).tobytes())


def _moments(graph: Graph, key: str, shape: list[int], kind: str) -> tuple[float, float]:
    """Mean and standard deviation of a float constant; a scale's mean makes weights of variance 1 / fan-in."""
    reader = graph.layers[graph.readers[key][0]]
    if kind == "f16":  # a scale
        ports = graph.inputs[reader.get("id")]
        codes = next(k for s, _ in ports.values() for k in graph.above(s) if _is_codes(graph.layers[k]))
        fan_in = math.prod(_shape(graph.layers[codes])[2 if shape[-2:] == [shape[-2], 1] and len(shape) == 4 else 1 :])
        weight = 1.0 if "embed_tokens" in graph.layers[codes].get("name") else fan_in**-0.5
        mean = weight / STEP_STD[graph.layers[codes].find("data").get("element_type")]
        return mean, 0.1 * mean
    if shape[0] == 1 and len(shape) == 4:
        return 0.0, 1.5  # sinks
    return (1.0, 0.1) if reader.get("type") == "Multiply" else (0.0, 0.3)  # norms; biases


def _is_codes(layer: ElementTree.Element) -> bool:
    return layer.get("type") == "Const" and layer.find("data").get("element_type") in STEP_STD and _shape(layer)[-1] > 1


def _as(kind: str, values: np.ndarray) -> np.ndarray:
    """f32 values as f32, f16 or, numpy having none, the upper half of f32: bf16, rounded to nearest."""
    if kind == "bf16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype({"f16": np.float16, "f32": np.float32}[kind])
