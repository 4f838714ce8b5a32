"""Synthetic models of any size: node for node what is exported at that size, sane numbers, and streamed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import ROOT, load

sys.path.insert(0, str(ROOT / "tools"))
import make_synthetic as synthetic
from synthetic_graph import Graph, read_template
from synthetic_weights import given

from ovtq.cli.convert import main
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

FAMILIES = {"tiny": ("gpt-oss", synthetic.GPT_OSS), "llama3-tiny": ("llama", synthetic.LLAMA)}


def check(size: str) -> Path:
    """What is exported at that size (tools/export_template.py FAMILY check)."""
    return ROOT / "tests" / "data" / f"check-{FAMILIES[size][0]}-int4.xml.gz"


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / request.param
    synthetic.make(out, request.param, seed=1, tokenizer=False)
    return out


def pairs(a: Graph, b: Graph) -> Iterator[tuple[str, str]]:
    """The layers of two graphs that correspond, walked up from the result and from the Assign of each state.

    Asserts that the correspondence is one to one and leaves no layer out.
    """
    ends = [
        {layer.find("data").get("variable_id") if layer.get("type") == "Assign" else "result": key
         for key, layer in graph.layers.items() if layer.get("type") in ("Assign", "Result")}
        for graph in (a, b)
    ]  # fmt: skip
    assert ends[0].keys() == ends[1].keys()
    todo, seen = [(ends[0][name], ends[1][name]) for name in ends[0]], {}
    while todo:
        one, two = todo.pop()
        if one in seen:
            assert seen[one] == two
            continue
        seen[one] = two
        yield one, two
        assert a.inputs[one].keys() == b.inputs[two].keys()
        for port, (source, source_port) in a.inputs[one].items():
            other, other_port = b.inputs[two][port]
            assert source_port == other_port
            todo.append((source, other))
    assert len(set(seen.values())) == len(seen)
    for graph, keys in ((a, seen), (b, set(seen.values()))):
        assert {graph.layers[key].get("type") for key in graph.layers if key not in keys} <= {"Parameter"}


def facts(layer: ElementTree.Element) -> tuple[object, ...]:
    """A layer's type, version, attributes, and the type and lengths of its ports."""
    data = layer.find("data")
    attributes = {} if data is None else {k: v.replace(" ", "") for k, v in data.attrib.items()}
    if layer.get("type") == "Const":
        attributes.pop("offset")
        attributes.pop("value", None)
    ports = [(port.get("precision"), *(d.text for d in port.iter("dim"))) for port in layer.iter("port")]
    return layer.get("type"), layer.get("version"), attributes, ports


def test_is_node_for_node_what_is_exported(tiny: Path) -> None:
    """At a size that shares no length with the template, and with more layers than it."""
    root, config = read_template(check(tiny.name))
    rotary = synthetic.family_of(tiny.name).rotary(config)
    made, exported = ElementTree.parse(tiny / "openvino_model.xml").getroot(), root
    assert json.loads((tiny / "config.json").read_text()) == config
    a, b = Graph(made), Graph(exported)
    weights = (tiny / "openvino_model.bin").read_bytes()
    compared = 0
    for one, two in pairs(a, b):
        assert facts(a.layers[one]) == facts(b.layers[two])
        data, told = a.layers[one].find("data"), b.layers[two].find("data")
        if told is not None and "value" in told.attrib and given(b, two, rotary) is not None:
            start = int(data.get("offset"))
            value = weights[start : start + int(data.get("size"))]
            kind = np.float32 if data.get("element_type") == "f32" else np.uint8
            got, expected = np.frombuffer(value, kind), np.frombuffer(bytes.fromhex(told.get("value")), kind)
            np.testing.assert_allclose(got, expected, rtol=1e-6 if kind == np.float32 else 0)
            compared += 1
    assert compared > 300
    names = [layer.get("name") for layer in a.layers.values()]
    assert len(set(names)) == len(names)
    assert "\n".join(ElementTree.tostringlist(made.find("rt_info"), "unicode")) == "\n".join(
        ElementTree.tostringlist(exported.find("rt_info"), "unicode")
    )


def test_lengths_written_are_those_that_openvino_infers(tiny: Path) -> None:
    graph = Graph(ElementTree.parse(tiny / "openvino_model.xml").getroot())
    told = {
        layer.get("name"): [[int(d.text) for d in port.iter("dim")] for port in layer.iterfind("output/port")]
        for layer in graph.layers.values()
    }
    model = ov.Core().read_model(tiny / "openvino_model.xml")
    assert len(model.get_ops()) == len(told)
    for node in model.get_ops():
        shapes = [[-1 if d.is_dynamic else d.get_length() for d in o.get_partial_shape()] for o in node.outputs()]
        if node.get_type_name() not in ("Result", "Assign"):
            assert told[node.get_friendly_name()] == shapes


def frequencies(model_dir: Path, head: int) -> np.ndarray:
    """Those of the rotary embedding in a model that was exported."""
    exported = ov.Core().read_model(model_dir / "openvino_model.xml")
    constants = [node for node in exported.get_ops() if node.get_type_name() == "Constant"]
    return next(node.get_data() for node in constants if list(node.get_output_shape(0)) == [1, head // 2, 1]).ravel()


def test_the_rotary_embedding_is_that_of_its_configuration(family: Callable[[str], Path]) -> None:
    """Against the exporter's, which is in other models' graphs; and YaRN's differs for another context and factor."""
    config = list(synthetic.configurations("tiny", None))[1]
    frequency, factor = synthetic.yarn(config)
    theirs = frequencies(ROOT / "tests" / "data" / "tiny-transformers-5.5", 64)
    np.testing.assert_allclose(frequency, theirs, rtol=1e-6)
    assert math.isclose(factor, 1.3465735902799727)
    other = config | {"rope_parameters": config["rope_parameters"] | {"factor": 8.0}}
    assert np.abs(synthetic.yarn(other)[0] / frequency - 1).max() > 1
    config = json.loads((family("smollm2") / "config.json").read_text())
    frequency, factor = synthetic.plain(config)
    np.testing.assert_allclose(frequency, frequencies(family("smollm2"), 64), rtol=1e-6)
    assert factor == 1


def test_says_finite_numbers_of_a_model_s_size_and_converts(tiny: Path, tmp_path: Path) -> None:
    runner = Runner(tiny / "openvino_model.xml", "CPU", EXACT_PROPERTIES)
    ids = np.random.RandomState(0).randint(0, runner.vocabulary, (1, 60)).astype(np.int64)
    logits = np.concatenate([runner.step(ids), runner.step(ids[:, :1])], axis=1)
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 3
    assert np.abs(np.diff(logits, axis=1)).max() > 0.1  # not the same everywhere
    assert main([str(tiny), str(tmp_path / "out"), "--preset", "exact"]) == 0
    assert len(load(tiny)[1].layers) == 6


def test_the_seed_decides_and_refusals(tiny: Path, tmp_path: Path) -> None:
    synthetic.make(tmp_path / "again", tiny.name, seed=1, tokenizer=False)
    synthetic.make(tmp_path / "other", tiny.name, seed=2, tokenizer=False)
    files = [(folder / "openvino_model.bin").read_bytes() for folder in (tiny, tmp_path / "again", tmp_path / "other")]
    assert files[0] == files[1] != files[2]
    tool = ROOT / "tools" / "make_synthetic.py"
    command = [sys.executable, tool, tmp_path / "bad", "--size", tiny.name, "--layers", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected an even number" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["template", "check"])
@pytest.mark.parametrize("size", FAMILIES)
def test_what_is_stored_is_what_the_exporter_writes(size: str, name: str, tmp_path: Path) -> None:
    """Two minutes each; needs the extra [export]."""
    pytest.importorskip("nncf", reason="needs the extra [export]")
    tool, (exported, family) = ROOT / "tools" / "export_template.py", FAMILIES[size]
    subprocess.run([sys.executable, tool, exported, name, tmp_path / "x.gz"], check=True, capture_output=True)
    stored = family.template if name == "template" else check(size)
    graphs = [Graph(read_template(path)[0]) for path in (stored, tmp_path / "x.gz")]
    for one, two in pairs(*graphs):
        assert facts(graphs[0].layers[one]) == facts(graphs[1].layers[two])
