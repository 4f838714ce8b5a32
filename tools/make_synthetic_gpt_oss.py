#!/usr/bin/env python3
"""Write a GPT-OSS IR of any size with seeded random weights, in the layout of the published int4 model.

usage: make_synthetic_gpt_oss.py OUT_DIR [--size 20b|mini|heavy|tiny] [--layers N] [--seed N] [--no-tokenizer]

What it says means nothing; its size, its graph and its speed are those of the real one. The graph is what optimum-intel
exports: gpt-oss-template.xml.gz (export_template.py), with its lengths replaced, its third and fourth layers repeated,
and the constants of the rotary embedding computed from the configuration. Weights are drawn like an initialiser's and
streamed to disk a few megabytes at a time (20b: 12 GB). The tokenizer is the bundled model's, with as many tokens more
as the vocabulary has; making it needs the `export` extra. OUT_DIR must not exist.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).resolve().parent / "gpt-oss-template.xml.gz"
BUNDLED = ROOT / "models" / "gpt-oss-mini"
GROUP = 32  # weights that share a scale in the experts
BLOCK = 1 << 24  # bytes drawn at a time
SIZES: dict[str, dict[str, int]] = {
    "20b": dict(
        num_hidden_layers=24, hidden_size=2880, intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8,
        num_local_experts=32, num_experts_per_tok=4, sliding_window=128, vocab_size=201088,
    ),
    "mini": dict(
        num_hidden_layers=6, hidden_size=384, intermediate_size=384, num_attention_heads=16, num_key_value_heads=2,
        num_local_experts=8, num_experts_per_tok=2, sliding_window=128, vocab_size=8192,
    ),
    "heavy": dict(  # as export_heavy.py: the heads of 20b in narrow layers
        num_hidden_layers=4, hidden_size=512, intermediate_size=256, num_attention_heads=64, num_key_value_heads=8,
        num_local_experts=4, num_experts_per_tok=2, sliding_window=128, vocab_size=1024,
    ),
    "tiny": dict(
        num_hidden_layers=6, hidden_size=96, intermediate_size=160, num_attention_heads=9, num_key_value_heads=3,
        num_local_experts=7, num_experts_per_tok=4, sliding_window=23, vocab_size=301,
    ),
}  # fmt: skip
NUMBERS = {"i32": np.int32, "i64": np.int64}
STEP_STD = {"i4": (16**2 / 12) ** 0.5, "u8": (256**2 / 12) ** 0.5}  # of uniform codes
ITEM_BITS = {"i4": 4, "u8": 8, "f16": 16, "bf16": 16, "f32": 32}


class TemplateError(Exception):
    """The template is not understood: one line for the user."""


def lengths(config: Mapping[str, Any]) -> dict[str, int]:
    """Every length that a graph of this configuration has in it, but for the head's and the group's, which stay."""
    heads, kv_heads, head = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if hidden % GROUP or inner % GROUP or heads % kv_heads:
        raise TemplateError(f"hidden and intermediate size must be multiples of {GROUP}, heads of KV heads")
    return {
        "hidden": hidden, "inner": inner, "twice inner": 2 * inner, "experts": config["num_local_experts"],
        "chosen": config["num_experts_per_tok"], "vocabulary": config["vocab_size"], "heads": heads,
        "kv heads": kv_heads, "queries": heads * head, "keys": kv_heads * head, "heads a kv head": heads // kv_heads,
        "hidden groups": hidden // GROUP, "inner groups": inner // GROUP, "window": config["sliding_window"],
    }  # fmt: skip


def yarn(config: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Inverse frequencies (head_dim / 2,) and the factor of cos and sin, by YaRN (arXiv 2309.00071)."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    base, factor, original = rope["rope_theta"], rope["factor"], rope["original_max_position_embeddings"]
    frequency = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)

    def turns_at(turns: float) -> float:  # the pair of coordinates that turns so often over the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = turns_at(rope["beta_fast"]), turns_at(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    kept = 1 - np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return (frequency / factor * (1 - kept) + frequency * kept).astype(np.float32), 0.1 * math.log(factor) + 1


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


def read_template(path: Path = TEMPLATE) -> tuple[ElementTree.Element, dict[str, Any]]:
    """The XML of a skeleton and the configuration in it."""
    root = ElementTree.fromstring(gzip.decompress(path.read_bytes()))
    config = root.find("config")
    root.remove(config)
    return root, json.loads(config.text)


def of_size(root: ElementTree.Element, template: Mapping[str, Any], config: Mapping[str, Any]) -> ElementTree.Element:
    """The graph of `config`, made from that of `template`: layers 2 and 3 repeated, all lengths replaced."""
    made = repeated(root, config["num_hidden_layers"])
    was, is_ = lengths(template), lengths(config)
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


def write(root: ElementTree.Element, config: Mapping[str, Any], folder: Path, seed: int) -> None:
    """Write the IR: weights constant by constant, then the XML with their places."""
    graph = Graph(root)
    known: dict[bytes, int] = {}  # small constants that are already there
    with (folder / "openvino_model.bin").open("wb") as file:
        for turn, (key, layer) in enumerate(graph.layers.items()):
            if layer.get("type") != "Const":
                continue
            data, start = layer.find("data"), file.tell()
            content = _small(graph, key, config)
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


def _small(graph: Graph, key: str, config: Mapping[str, Any]) -> bytes | None:
    """The bytes of a constant that the template or the configuration gives; None if it is a weight."""
    layer = graph.layers[key]
    data, shape = layer.find("data"), _shape(layer)
    readers = [graph.layers[reader] for reader in graph.readers[key]]
    if shape == [1, config["head_dim"] // 2, 1]:
        return yarn(config)[0].tobytes()
    if readers[0].get("type") == "Multiply" and "rotary_emb" in readers[0].get("name"):
        return np.float32(yarn(config)[1]).tobytes()
    if data.get("element_type") in ("i32", "i64", "boolean") or (data.get("element_type"), math.prod(shape)) == (
        "f32",
        1,
    ):
        return bytes.fromhex(data.get("value"))
    return None


def _stream(graph: Graph, key: str, draw: np.random.Generator, file: BinaryIO) -> None:
    """Draw a weight, a scale, a zero point, a bias, a norm or sinks, and write them in pieces."""
    layer = graph.layers[key]
    kind, shape, name = layer.find("data").get("element_type"), _shape(layer), layer.get("name")
    count = math.prod(shape)
    if kind not in ITEM_BITS:
        raise TemplateError(f"{name}: a weight of type {kind} is not known")
    if kind == "u8" and shape[-1] == 1:
        file.write(draw.integers(120, 137, count, np.uint8).tobytes())  # zero points
    elif kind in ("i4", "u8"):
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


def tokenizer_files(vocabulary: int, folder: Path) -> None:
    """The bundled tokenizer with further tokens up to `vocabulary`, or with its first ones only, and its two IRs."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUNDLED / name, folder / name)
    text = json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8"))
    words = text["model"]["vocab"]
    have = max(words.values()) + 1
    if vocabulary < have:
        raise TemplateError(f"the bundled tokenizer has {have} tokens, the model {vocabulary}; use --no-tokenizer")
    words.update({f"⟨{index}⟩": index for index in range(have, vocabulary)})
    (folder / "tokenizer.json").write_text(json.dumps(text, ensure_ascii=False), encoding="utf-8")
    pair = convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
    for name, model in zip(("openvino_tokenizer", "openvino_detokenizer"), pair, strict=True):
        ov.save_model(model, folder / f"{name}.xml")


def configurations(size: str, layers: int | None) -> Iterator[dict[str, Any]]:
    """The template's configuration, then that of the model to be made."""
    _, template = read_template()
    yield template
    sizes = SIZES[size] | ({"num_hidden_layers": layers} if layers else {})
    kinds = ["sliding_attention", "full_attention"] * (sizes["num_hidden_layers"] // 2)
    yield template | sizes | {"layer_types": kinds}


def make(out: Path, size: str, layers: int | None = None, seed: int = 0, tokenizer: bool = True) -> None:
    """Write the model folder `out`. Raises TemplateError; then nothing is left."""
    root, _ = read_template()
    template, config = configurations(size, layers)
    root = of_size(root, template, config)
    out.mkdir(parents=True)
    try:
        write(root, config, out, seed)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copy(BUNDLED / "generation_config.json", out)
        if tokenizer:
            tokenizer_files(config["vocab_size"], out)
    except BaseException:
        shutil.rmtree(out)
        raise


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, metavar="OUT_DIR")
    p.add_argument("--size", choices=SIZES, default="20b", help="default: %(default)s")
    p.add_argument("--layers", type=int, metavar="N", help="another, even number of layers")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument("--tokenizer", action=argparse.BooleanOptionalAction, default=True)
    options = p.parse_args()
    try:
        make(options.out, options.size, options.layers, options.seed, options.tokenizer)
    except (TemplateError, OSError, ImportError) as error:
        print(f"make_synthetic_gpt_oss: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
