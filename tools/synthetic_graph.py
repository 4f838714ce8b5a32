"""A skeleton that export_template.py wrote, and the graph of another size that is made of it."""

from __future__ import annotations

import copy
import gzip
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

NUMBERS = {"i32": np.int32, "i64": np.int64}


class TemplateError(Exception):
    """The template is not understood: one line for the user."""


class Graph:
    """An IR's XML as layers and edges."""

    def __init__(self, root: ElementTree.Element) -> None:
        self.layers = {layer.get("id"): layer for layer in root.find("layers")}
        self.inputs: dict[str, dict[str, tuple[str, str]]] = {key: {} for key in self.layers}  # port: (layer, port)
        for edge in root.find("edges"):
            source = edge.get("from-layer"), edge.get("from-port")
            self.inputs[edge.get("to-layer")][edge.get("to-port")] = source
        self.readers: dict[str, list[str]] = {key: [] for key in self.layers}
        for key, ports in self.inputs.items():
            for source, _ in ports.values():
                self.readers[source].append(key)

    def named(self, name: str) -> str:
        """The layer of that name."""
        found = [key for key, layer in self.layers.items() if layer.get("name") == name]
        if len(found) != 1:
            raise TemplateError(f"the template has {len(found)} layers named {name}, expected 1")
        return found[0]

    def above(self, key: str) -> set[str]:
        """A layer, all it depends on, and the Assigns of states that are made there."""
        seen, todo = set(), [key]
        while todo:
            if (step := todo.pop()) not in seen:
                seen.add(step)
                todo.extend(source for source, _ in self.inputs[step].values())
        return seen | {r for k in seen for r in self.readers[k] if self.layers[r].get("type") == "Assign"}


def read_template(path: Path) -> tuple[ElementTree.Element, dict[str, Any]]:
    """The XML of a skeleton and the configuration in it."""
    root = ElementTree.fromstring(gzip.decompress(path.read_bytes()))
    config = root.find("config")
    root.remove(config)
    return root, json.loads(config.text)


def of_size(
    root: ElementTree.Element, layers: int, was: Mapping[str, int], is_: Mapping[str, int]
) -> ElementTree.Element:
    """The graph with so many layers, its third and fourth repeated, and with the lengths `is_` where it has `was`."""
    made = repeated(root, layers)
    table = {number: is_[name] for name, number in was.items()}
    if len(table) < len(was):
        raise TemplateError("two lengths of the template are equal")
    for layer in made.find("layers"):
        for element in layer.iter("dim"):
            element.text = str(table.get(int(element.text), element.text))
        data = layer.find("data")
        for name in ("shape", "variable_shape") if data is not None else ():
            if name in data.attrib:
                items = [item.strip() for item in data.get(name).split(",")]
                data.set(name, ", ".join(str(table.get(int(i), i)) if i.lstrip("-").isdigit() else i for i in items))
        if layer.get("type") == "Const":
            kind = data.get("element_type")
            if kind in NUMBERS and "value" in data.attrib:
                values = np.frombuffer(bytes.fromhex(data.get("value")), NUMBERS[kind])
                mapped = [np.sign(v) * table.get(abs(int(v)), abs(int(v))) for v in values]
                data.set("value", np.array(mapped, NUMBERS[kind]).tobytes().hex())
    return made


def repeated(root: ElementTree.Element, count: int) -> ElementTree.Element:
    """The graph with `count` layers: the third and fourth, which own no shared part, stand for all that follow them."""
    if count < 2 or count % 2:
        raise TemplateError(f"{count} layers: expected an even number, at least 2")
    graph = Graph(root)
    ends = [graph.named(f"__module.model.layers.{index}/aten::add/Add_1") for index in (1, 3)]
    first = graph.above(ends[0])
    pair = [key for key in graph.layers if key in graph.above(ends[1]) - first]
    rest = [key for key in graph.layers if key not in first and key not in set(pair)]
    made = ElementTree.Element(root.tag, root.attrib)
    layers, edges = ElementTree.SubElement(made, "layers"), ElementTree.SubElement(made, "edges")
    number: dict[tuple[str, int], int] = {}  # the new id of a layer in a copy of the pair; copy 0: not in the pair

    def place(keys: list[str], turn: int, end: int) -> None:
        """Add layers; `end` is the copy whose result stands where the template has that of its second layer."""
        for key in keys:
            layer = copy.deepcopy(graph.layers[key])
            number[key, turn] = len(number)
            layer.set("id", str(number[key, turn]))
            if turn > 1:
                _rename(layer, turn)
            layers.append(layer)
        for key in keys:
            for port, (source, source_port) in graph.inputs[key].items():
                if source == ends[0] and end:
                    origin = (ends[1], end)
                elif source == ends[1] and not turn:
                    origin = (ends[1], end) if end else (ends[0], 0)
                else:
                    origin = (source, turn if (source, turn) in number else 0)
                todo.append((origin, source_port, (key, turn), port))

    todo: list[tuple[tuple[str, int], str, tuple[str, int], str]] = []
    copies = (count - 2) // 2
    place([key for key in graph.layers if key in first], 0, 0)
    for turn in range(1, copies + 1):
        place(pair, turn, turn - 1)
    place(rest, 0, copies)
    for origin, source_port, target, port in todo:
        ElementTree.SubElement(
            edges,
            "edge",
            {
                "from-layer": str(number[origin]), "from-port": source_port,
                "to-layer": str(number[target]), "to-port": port,
            },
        )  # fmt: skip
    made.append(root.find("rt_info"))
    return made


def _rename(layer: ElementTree.Element, turn: int) -> None:
    """Give a layer of a further copy of the pair names of its own."""
    name, shift = layer.get("name"), 2 * (turn - 1)
    for index in (2, 3):
        name = name.replace(f"model.layers.{index}.", f"model.layers.{index + shift}.")
        name = name.replace(f"model.layers.{index}/", f"model.layers.{index + shift}/")
        name = name.replace(f".{index}.key", f".{index + shift}.key").replace(f".{index}.val", f".{index + shift}.val")
    layer.set("name", name if name != layer.get("name") else f"{name}_{2 * turn}")
    for port in layer.iter("port"):
        if "names" in port.attrib:
            port.set("names", ",".join(f"{item}_{2 * turn}" for item in port.get("names").split(",")))
    data = layer.find("data")
    if data is not None and "variable_id" in data.attrib:
        which, index = data.get("variable_id").rsplit(".", 1)[1], int(data.get("variable_id").split(".")[1]) + shift
        data.set("variable_id", f"past_key_values.{index}.{which}present.{index}.{which}")
