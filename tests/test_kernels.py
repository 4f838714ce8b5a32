"""The form with OpenCL kernels: its files, its operations and its refusals; test_kernels_on_gpu.py runs it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import openvino as ov
import pytest
from conftest import TINY
from openvino.passes import ConstantFolding

import ovtq
from ovtq.codec.kernel_files import config
from ovtq.codec.kernel_layout import KernelLayout
from ovtq.codec.window_layout import WindowLayout
from ovtq.errors import InputError, PreconditionFailed
from ovtq.ir.operations import TYPES, core
from ovtq.passes.own_operations import bodies

AT_20B = KernelLayout(8, 8, 64, (6, 4), 64, 32768)
PACKED_TINY = ["--preset", "k6v4", "--residual-window", "16", "--no-verify"]


@pytest.mark.parametrize(("bits", "bytes_"), [((6, 4), 688), ((8, 4), 816), ((4, 4), 560)])
def test_a_token_takes_its_codes_and_two_scales(bits: tuple[int, int], bytes_: int) -> None:
    layout = KernelLayout(8, 8, 64, bits, 64, 32768)
    assert layout.kv_heads * layout.row * 2 == bytes_
    assert layout.offsets["RING"] - layout.offsets["CODES"] == 32768 * bytes_ // 2


@pytest.mark.parametrize("heads", [(8, 8, 64), (2, 8, 64), (2, 2, 64), (1, 16, 128), (4, 6, 128)])
def test_what_a_kernel_is_given_has_room_for_what_it_gives(heads: tuple[int, int, int]) -> None:
    layout = KernelLayout(*heads, (6, 4), 64, 4096)
    needed = layout.query_heads * layout.parts * layout.record * 4  # floats
    assert layout.step * layout.cells * 2 >= needed  # in f16
    assert layout.step % 4 == 0
    assert layout.columns * layout.head_dim >= layout.capacity / 8 + 2
    assert layout.given_cells * layout.cells >= layout.given
    assert 5 * layout.given_fives >= layout.given
    assert 5 * layout.fives > 2 * layout.kv_heads * layout.head_dim


HEADS = [(8, 8, 64), (2, 8, 64), (2, 1, 64), (1, 16, 128), (4, 6, 128), (3, 3, 64), (2, 5, 64)]


@pytest.mark.parametrize("heads", HEADS)
def test_what_the_windows_kernel_is_given_comes_apart_evenly(heads: tuple[int, int, int]) -> None:
    layout = WindowLayout(*heads, 128)
    assert layout.numbers >= layout.used == (layout.query_heads + 2 * layout.kv_heads) * layout.head_dim
    parts, rest = divmod(layout.numbers, layout.step)
    assert rest == 0
    assert parts * layout.side**2 == layout.query_heads * layout.head_dim  # a context, and nothing else


def test_the_files_of_other_kernels_have_another_digest() -> None:
    """For a model cache keys a model by its graph, which may be the same: here a token takes as much."""
    other = KernelLayout(8, 8, 64, (5, 5), 64, 32768)
    assert other.shape == AT_20B.shape
    assert other.digest != AT_20B.digest
    assert WindowLayout(8, 8, 64, 128).digest != WindowLayout(8, 4, 64, 128).digest


def test_every_operation_is_bound_once_and_every_source_is_there() -> None:
    sets = [AT_20B, WindowLayout(8, 8, 64, 128)]
    text = config(sets)
    kinds = re.findall(r'<CustomLayer name="(\w+)"', text)
    assert len(kinds) == len({*kinds}) == 5
    assert {*re.findall(r'filename="(.+?)"', text)} == {name for some in sets for name in some.texts}


def test_a_conversion_writes_what_the_property_names(convert: Callable[..., Path]) -> None:
    out = convert(TINY["5.5"], "--preset", "k6v4", "--kernels", "--capacity", "2048")
    (name, path), *more = ovtq.properties(out).items()
    assert (name, more) == ("CONFIG_FILE", [("CACHE_DIR", "")])
    text = Path(path).read_text()
    kernels = ("attend", "xmx", "join", "append", "read", "window", "guard")
    for source in (*kernels, "common", "lanes", "constants", "window_constants"):
        assert f'"{source}.cl"' in text
        assert (Path(path).parent / f"{source}.cl").is_file()
    record = json.loads((out / "ovtq.json").read_text())
    assert record["config_file"] == "ovtq_kernels/kernels.xml"
    packed = [state for state in record["states"] if state["holds"] == "packed"]
    assert len(packed) == 2
    windows = [state for state in record["states"] if state["name"].endswith(".window")]
    assert [state["rows"]["count"] for state in windows] == [16, 16]
    assert {state["name"] for state in record["states"]} == {state["name"] for state in (*packed, *windows)}
    assert record["state_bytes"]["after"]["per_token"] == 0  # all of it is there from the start
    assert not ovtq.properties(TINY["5.5"])


def test_a_cpu_refuses_them_by_the_propertys_name(convert: Callable[..., Path]) -> None:
    out = convert(TINY["5.5"], "--preset", "k6v4", "--kernels", "--capacity", "2048")
    with pytest.raises(RuntimeError, match="CONFIG_FILE"):
        infer(ov.Core().compile_model(out / "openvino_model.xml", "CPU"))


def test_operations_of_our_own_are_read_with_their_extension_alone(convert: Callable[..., Path]) -> None:
    """In all bodies, kernels bound to them; what is missing is named; nothing else of the graph differs."""
    options = [*PACKED_TINY, "--kernels", "--capacity", "1024"]
    own, standard = convert(TINY["5.5"], *options, "--extension"), convert(TINY["5.5"], *options)
    xml = own / "openvino_model.xml"
    with pytest.raises(RuntimeError, match=r"extension that ovtq\.load gives .* from unsupported opset"):
        ov.Core().read_model(xml)
    assert not ovtq.extensions(standard)
    extended = ov.Core()
    for kind in ovtq.extensions(own):
        extended.add_extension(kind)
    with pytest.raises(RuntimeError, match="CONFIG_FILE"):
        infer(extended.compile_model(xml, "CPU"))

    types, others = ([node.get_type_name() for body in bodies(core().read_model(folder / "openvino_model.xml"))
                      for node in body.get_ordered_ops()] for folder in (own, standard))  # fmt: skip
    assert sorted(TYPES.get(kind, kind) for kind in others) == sorted(types)
    folded = core().read_model(xml)
    ConstantFolding().run_on_model(folded)
    assert "OvtqGuard" in {node.get_type_name() for node in folded.get_ops()}  # nobody has computed it
    assert not {*TYPES} & {*types}
    for folder, names in ((own, TYPES.values()), (standard, TYPES)):
        text = Path(ovtq.properties(folder)["CONFIG_FILE"]).read_text()
        assert set(re.findall(r'CustomLayer name="(\w+)"', text)) == {*names}
    assert ovtq.state_bytes(own, 100) == ovtq.state_bytes(standard, 100)  # a reader of ours


def test_what_load_refuses(convert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernels = convert(TINY["5.5"], *PACKED_TINY, "--kernels", "--capacity", "1024")
    cache = {"CACHE_DIR": str(tmp_path)}
    with pytest.raises(InputError, match=r"has no openvino_model\.xml"):
        ovtq.load(tmp_path)
    with pytest.raises(InputError, match="host is one of genai, optimum"):
        ovtq.load(kernels, "ollama")
    for given in ({"host": "genai", **cache}, {"host": "optimum", "ov_config": cache}):
        with pytest.raises(InputError, match="can't be loaded from a model cache"):
            ovtq.load(kernels, **given)
    with pytest.raises(InputError, match="kernels run on a GPU, not on CPU"):
        ovtq.load(kernels, device="CPU")
    for host, package in (("genai", "openvino_genai"), ("optimum", "optimum.intel")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=rf"pip install 'ovtq\[{host}\]'"):
            ovtq.load(kernels, host)


def infer(compiled: ov.CompiledModel) -> None:
    given = {"input_ids": [[1, 2]], "attention_mask": [[1, 1]], "position_ids": [[0, 1]], "beam_idx": [0]}
    request = compiled.create_infer_request()
    request.infer({port.any_name: given[port.any_name] for port in compiled.inputs})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "cpu"}, "kernels are for a GPU"),
        ({"v_bits": "none"}, "kernels read packed keys and values alone"),
        ({"budget": 512}, "don't go together"),
        ({"capacity": 100}, "capacity must be from 1024"),
        ({"kernels": None, "capacity": 2048}, "has no effect without kernels"),
        ({"kernels": None, "extension": True}, "has no effect without kernels"),
        ({"preset": "u8"}, "quantize-kv"),
    ],
)
def test_what_does_not_go_with_them_is_refused(options: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises((InputError, PreconditionFailed), match=said):
        ovtq.convert(TINY["5.5"], tmp_path / "out", **{"preset": "k6v4", "kernels": True, **options})


def test_a_model_in_memory_is_refused() -> None:
    with pytest.raises(InputError, match=r"use ovtq\.convert"):
        ovtq.compress(ov.Core().read_model(TINY["5.5"] / "openvino_model.xml"), TINY["5.5"], kernels=True)
