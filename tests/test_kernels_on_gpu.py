"""The form with OpenCL kernels on a GPU that is none: what it computes, builds, launches and holds; what hosts say."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GPU_TOOLS, MINI, ROOT, TINY
from test_gpu import SLOW, emulated, probe, report, virtual
from test_kernels import PACKED_TINY

import ovtq
from ovtq.codec.kernel_layout import KernelLayout
from ovtq.errors import InputError
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

STATEFUL = {**EXACT_PROPERTIES, "ATTENTION_BACKEND": "SDPA"}
ALL = ["8,4", "6,4", "4,4", "5,3", "3,6", "2,2", "8,8", "6,4,128"]
GROUPS = ["6,4,64,1,2", "6,4,64,5,2", "6,4,64,9,2", "6,4,64,16,2", "6,4,128,5,2", "6,4,128,9,2", "6,4,128,16,2"]
MANY = "37,1x300,20,1,5,1,1/1,70,1,1"


def run(tool: str, script: str, *options: object) -> dict:
    command = [GPU_TOOLS / tool, sys.executable, ROOT / "tests" / script, *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def on_gpu(folder: Path, precision: str, texts: str, *layers: str) -> dict:
    return run("emulated", "kernels_on_gpu.py", folder, precision, texts, *layers)


@emulated
def test_a_decode_step_is_that_of_numpy(tmp_path: Path) -> None:
    """Across the window's edge, where tokens are read as packed."""
    assert on_gpu(tmp_path, "f32", "1x40", "6,4")["6,4"] < 1e-5


@emulated
@SLOW
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("precision", "layer", "allowed"),
    [("f32", "6,4", 1e-5), ("f32", "window", 1e-5), ("f16", "6,4", 8e-3), ("f16", "window", 1e-3)],
)
def test_every_call_is_that_of_numpy(precision: str, layer: str, allowed: float, tmp_path: Path) -> None:
    """Calls of many tokens and of one, padding, tokens that are hidden later, a reset; 300 steps.

    Of several tokens packed layers at f16 have the error of the plugin's own attention.
    """
    assert on_gpu(tmp_path, precision, MANY, layer)[layer] < allowed


@emulated
@SLOW
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layer", ["6,4", "6,4,64,8,2"])
@pytest.mark.parametrize("precision", ["f16", "f16+xmx"])
def test_steps_at_f16_are_those_of_numpy(precision: str, layer: str, tmp_path: Path) -> None:
    """Of two bytes are then what a layer is given and gives, codes' constants and, with XMX, its operands."""
    assert on_gpu(tmp_path, precision, "1x300", layer)[layer] < 1e-3


@emulated
@SLOW
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layer", ["window,128"])
def test_a_window_of_wider_heads(layer: str, tmp_path: Path) -> None:
    assert on_gpu(tmp_path, "f32", "37,1x20,20,1", layer)[layer] < 1e-5


@emulated
@SLOW
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bits", ALL)
def test_any_bits(bits: str, tmp_path: Path) -> None:
    assert on_gpu(tmp_path, "f32", "1x40,20,1", bits)[bits] < (1e-5 if "8,8" not in bits else 1e-3)


@emulated
@SLOW
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layer", GROUPS)
def test_any_number_of_query_heads(layer: str, tmp_path: Path) -> None:
    """Those of a KV head are split among sub-groups; one work-group has all of the history, round by round."""
    assert on_gpu(tmp_path, "f32", "150,1x40", layer)[layer] < 1e-5


@emulated
@SLOW
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layer", [*GROUPS, *ALL])
def test_the_form_for_xmx_is_that_of_numpy(layer: str, tmp_path: Path) -> None:
    """Its arithmetic, with what stands in for the built-in: of f16 are its operands alone."""
    assert on_gpu(tmp_path, "f32+xmx", "1x60", layer)[layer] < 2e-3


@emulated
@SLOW
@pytest.mark.timeout(1800)
def test_calls_of_the_form_for_xmx_are_those_of_numpy_at_f16(tmp_path: Path) -> None:
    assert on_gpu(tmp_path, "f16+xmx", MANY, "6,4")["6,4"] < 8e-3


@virtual
@SLOW
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("chip", "xmx"), [("lnl", True), ("ptl", True), ("dg2", False), ("arl", False), ("mtl", False)]
)
def test_chips_with_xmx_for_16_lanes_take_it(chip: str, xmx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the compiled program says of itself; and there nothing spills. Where states are f32, none does."""
    monkeypatch.setenv("VIRTUAL_GPU", chip)
    heads = [f"attend,half,{bits},64,8" for bits in ("6,4", "8,8", "5,3", "2,2")]
    heads += [f"attend,half,6,4,{shape}" for shape in ("64,1", "64,4", "64,16", "128,4", "128,7", "128,16")]
    exact = "attend,float,6,4,64,8"
    built = run("virtual", "builds_on_gpu.py", *heads, exact)
    assert not built.pop(exact)["dpas"]
    assert {layer: found["dpas"] for layer, found in built.items()} == dict.fromkeys(heads, xmx)
    assert not xmx or not [found for found in built.values() if found["spilled"]]


@virtual
@SLOW
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("precision", "xmx"), [("f16", True), ("f32", False)])
def test_the_plugin_builds_the_form_for_xmx(
    precision: str, xmx: bool, convert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For Lunar Lake: by what the driver's cache has of the model's kernels once a step was taken."""
    monkeypatch.setenv("NEO_CACHE_DIR", str(tmp_path))
    model = convert(TINY["5.5"], *PACKED_TINY, "--kernels", "--capacity", "1024")
    options = ["--branch-by-length", "--steps", "1,1", "--config", f"INFERENCE_PRECISION_HINT={precision}"]
    report(probe("virtual", model, *options))
    programs = [path.read_bytes() for path in tmp_path.rglob("*.cl_cache")]
    forms = {b"has_dpas" in program for program in programs if b"ovtq_attend" in program}
    assert forms == {xmx}


@emulated
@SLOW
@pytest.mark.timeout(900)
def test_a_text_may_begin_with_a_single_token(convert: Callable[..., Path], tmp_path: Path) -> None:
    """At f16 it says what it says at f32, in the first steps and behind a longer call."""
    model = convert(TINY["5.5"], *PACKED_TINY, "--kernels", "--capacity", "1024")
    said = []
    for precision in ("f32", "f16"):
        out, steps = tmp_path / f"{precision}.npz", ("--seed", "3", "--steps", "1,1,1,40,1")
        report(probe("emulated", model, *steps, "--out", out, "--config", f"INFERENCE_PRECISION_HINT={precision}"))
        said.append(np.load(out)["logits"])
    assert np.abs(said[1] - said[0]).max() < 0.02 * np.abs(said[0]).max()


@emulated
@SLOW
@pytest.mark.timeout(900)
def test_operations_of_our_own_compute_the_same(convert: Callable[..., Path], tmp_path: Path) -> None:
    """To the bit, behind a call of 38 tokens and two of one."""
    said = []
    for number, options in enumerate(((), ("--extension",))):
        model = convert(TINY["5.5"], *PACKED_TINY, "--kernels", "--capacity", "1024", *options)
        out, steps = tmp_path / f"{number}.npz", ("--steps", "38,1,1")
        report(probe("emulated", model, *steps, "--out", out, "--config", "INFERENCE_PRECISION_HINT=f32"))
        said.append(np.load(out)["logits"])
    np.testing.assert_array_equal(*said)


@virtual
def test_steps_build_and_copy_nothing_and_a_state_is_there_once(
    convert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Behind the first: kernels are built for lengths, which are few; states are written in place.

    Their memory: what all layers start with is held beside them once, of one layer.
    """
    layers, capacity = 6, 65536
    model = tmp_path / "model"
    made = [sys.executable, ROOT / "tools" / "make_synthetic.py", model, "--size", "heavy", "--layers", layers]
    subprocess.run([*map(str, made), "--no-tokenizer"], check=True, capture_output=True)
    folder = convert(model, "--preset", "k6v4", "--kernels", "--capacity", str(capacity))
    monkeypatch.setenv("FAKE_GPU_RUNLOG", str(tmp_path / "launches"))
    options = ["--branch-by-length", "--launches", "--steps", "38,1,1,1,20,1,38,1"]
    found = report(probe("virtual", folder, *options, "--config", "INFERENCE_PRECISION_HINT=f16"))
    text, *steps = found["steps"]
    own = [{name for name in step["built"] if name.startswith("ovtq_")} for step in (text, *steps)]
    assert own[:2] == [{"ovtq_attend", "ovtq_append", "ovtq_window"}, {"ovtq_attend", "ovtq_join", "ovtq_window"}]
    assert own[2:5] == [set()] * 3
    assert own[5] | own[6] | own[7] <= {"ovtq_attend"}  # to read more rows of the past
    assert [step["copies"] for step in steps[1:3]] == [0, 0]
    state = math.prod(KernelLayout(8, 8, 64, (6, 4), 64, capacity).shape) * 2
    assert max(step["bytes"] for step in steps) < state / 100
    assert text["held"] - found["held"] < (layers / 2 + 2) * state  # as many full layers, one for all, and the rest


@emulated
@SLOW
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", [(), ("--extension",)])
def test_hosts_write_what_they_write_with_packed_layers_on_a_cpu(
    options: tuple[str, ...], convert: Callable[..., Path]
) -> None:
    """The bundled model, at f16: a prompt in one call, then tokens one by one; and a chat that goes other ways."""
    pytest.importorskip("optimum.intel", reason="needs the extra [optimum]")
    genai = pytest.importorskip("openvino_genai", reason="needs the extra [genai]")
    prompt = "The President of the United States said that"
    pipe = genai.LLMPipeline(convert(MINI, "--preset", "k6v4"), "CPU", **STATEFUL)
    config = genai.GenerationConfig(max_new_tokens=24, ignore_eos=True, apply_chat_template=False)
    expected = pipe.generate(pipe.get_tokenizer().encode(prompt).input_ids, config).tokens[0]
    model = convert(MINI, "--preset", "k6v4", "--kernels", "--capacity", "1024", *options)
    command = [GPU_TOOLS / "emulated", sys.executable, ROOT / "tests" / "on_gpu.py", model, prompt, "24"]
    command.append("genai,optimum" if options else "genai,optimum,chat")
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["genai"] == said["optimum"] == list(expected)
    if options:
        return
    assert [[answer, answer] for answer in said["chat"]] == said["alone"]
    assert len({*said["chat"]}) == 3  # the last is the first again


@emulated
@SLOW
@pytest.mark.timeout(1800)
def test_converting_verifies_kernels_on_the_gpu(tmp_path: Path) -> None:
    """The whole schedule at f32 but for batches, and as hosts load it."""
    entry = "import sys; from ovtq.cli.entry import convert; sys.exit(convert())"
    command = [GPU_TOOLS / "emulated", sys.executable, "-c", entry, TINY["5.5"], tmp_path / "out", "--preset", "k6v4"]
    command += ["--kernels", "--capacity", "2048", "--residual-window", "16", "--verify-device", "GPU"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verified on GPU at f32, all 4 layers" in done.stdout


@emulated
@SLOW
@pytest.mark.timeout(900)
def test_calls_without_a_right_result_are_refused(tmp_path: Path) -> None:
    said = on_gpu(tmp_path, "f32", "-")
    assert "CONFIG_FILE" in said["no property"]
    assert "not supported" in said["no property"]
    assert "CONFIG_FILE" in said["CPU"]
    assert "one sequence at a time" in said["batch"]
    assert "1024 tokens" in said["capacity"]
    assert said["full"] == ""
    assert said["after"] == ""


@emulated
@SLOW
@pytest.mark.timeout(1800)
def test_requests_of_one_model_keep_apart(tmp_path: Path) -> None:
    """Two, call by call in turn, with other texts: each writes into buffers of its own."""
    said = on_gpu(tmp_path, "f32", "+", "6,4", "window")
    assert max(said.values()) < 1e-5


@emulated
@SLOW
@pytest.mark.timeout(3600)
def test_a_model_cache_does_not_mix_up_kernels(convert: Callable[..., Path], tmp_path: Path) -> None:
    """Of two whose graphs are the same but for what the stamp says of their kernels, and neither the other's.

    Neither is loaded from the cache: that ends the process on the emulated device.
    """
    options = [*PACKED_TINY, "--kernels", "--capacity", "1024"]
    models = [convert(TINY["5.5"], *options, "--k-bits", k, "--v-bits", v) for k, v in (("6", "4"), ("4", "6"))]
    command = [GPU_TOOLS / "emulated", sys.executable, ROOT / "tests" / "cached_on_gpu.py", tmp_path, *models]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert (first["from_cache"], second["from_cache"]) == (False, False)
    assert first["logits"] != pytest.approx(second["logits"], rel=1e-2, abs=1e-2)
    runner = Runner(convert(TINY["5.5"], *PACKED_TINY) / "openvino_model.xml", "CPU", EXACT_PROPERTIES)
    ids = np.random.RandomState(0).randint(0, 100, (1, 40)).astype(np.int64)
    for new in (slice(0, 38), slice(38, 39), slice(39, 40)):
        on_a_cpu = runner.step(ids[:, new])[0, -1, :64]
    assert first["logits"] == pytest.approx(on_a_cpu.tolist(), rel=1e-3, abs=1e-3)


@emulated
@SLOW
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", ["2026.3.0", "2026.4.0"])
def test_other_versions_of_openvino_say_the_same(version: str, convert: Callable[..., Path], tmp_path: Path) -> None:
    """To the bit, behind a call of 38 tokens and two of one, which write in place and read packed ones."""
    tool = runpy.run_path(str(GPU_TOOLS / "versions.py"), run_name="versions")
    try:
        pythons = [tool["environment"](tool["installed"](), version), sys.executable]
    except InputError as error:  # as without a network
        pytest.skip(str(error))
    model = convert(TINY["5.5"], *PACKED_TINY, "--kernels", "--capacity", "1024")
    config = ["INFERENCE_PRECISION_HINT=f32", *(f"{k}={v}" for k, v in ovtq.properties(model).items() if v)]
    said = []
    for number, python in enumerate(pythons):
        out = tmp_path / f"{number}.npz"
        command = [GPU_TOOLS / "emulated", python, GPU_TOOLS / "probe.py", model, "--steps", "38,1,1", "--out", out]
        done = subprocess.run([*map(str, command), "--config", *config], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(np.load(out)["logits"])
    np.testing.assert_array_equal(*said)
