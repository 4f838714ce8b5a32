"""`ovtq` as programs use it: the same as the command line does, silently, and with its own errors."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from conftest import ROOT, TINY, load

import ovtq
from ovtq import errors, states
from ovtq.api import PruningCounts
from ovtq.cli.inspect import main as inspect_main
from ovtq.evidence.calibration import calibrate
from ovtq.ir import io
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

SMALL = TINY["5.5"]
PUBLIC = [
    "Conversion",
    "PRESETS",
    "__version__",
    "codec",
    "compress",
    "convert",
    "describe",
    "errors",
    "extensions",
    "load",
    "load_state",
    "properties",
    "pruning_counts",
    "read_prompt",
    "save_state",
    "state_bytes",
    "verify",
]
# For programs, with what the command line calls the same.
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "default": ({}, []),
    "cpu": ({"preset": "exact", "target": "cpu"}, ["--preset", "exact", "--target", "cpu"]),
    "u8": ({"preset": "u8"}, ["--preset", "u8"]),
    "packed": (
        {"k_bits": 8, "v_bits": 3, "protect": "last:1", "window_bits": (8, 4), "residual_window": 32},
        ["--k-bits", "8", "--v-bits", "3", "--protect", "last:1", "--window-bits", "8,4", "--residual-window", "32"],
    ),
    "pruned": (
        {"preset": "k8v4", "target": "cpu", "budget": 101, "score": "norm-low", "slack": 7},
        ["--preset", "k8v4", "--target", "cpu", "--budget", "101", "--score", "norm-low", "--slack", "7"],
    ),
    "passes": (
        {"passes": ["decouple-length", "truncate-window:slack=3"], "settings": {"truncate-window": {"slack": 9}}},
        ["--passes", "decouple-length,truncate-window:slack=3", "--set", "truncate-window.slack=9"],
    ),
}


@pytest.fixture
def others_print() -> None:
    """For a test in which other people's code writes to the terminal."""


@pytest.fixture(autouse=True)
def silence(request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing is printed, by whatever is called in a test."""
    yield
    if "others_print" not in request.fixturenames:
        assert capfd.readouterr() == ("", "")


@pytest.fixture
def written(convert: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> Callable[..., Path]:
    """A folder that the command line made, which does print."""

    def run(*flags: str) -> Path:
        folder = convert(SMALL, *flags, verified="--no-verify" not in flags)
        capfd.readouterr()
        return folder

    return run


def names(model: ov.Model) -> list[str]:
    return sorted(f"{node.get_type_name()} {node.get_friendly_name()}" for node in model.get_ops())


def said(model: ov.Model | Path) -> list[np.ndarray]:
    """Logits of a long call, a few single tokens, and a second text."""
    runner, draw = Runner(model, "CPU", EXACT_PROPERTIES), np.random.RandomState(0)
    logits = [runner.step(draw.randint(0, 256, (1, count))) for count in (150, 1, 1)]
    runner.reset()
    return [*logits, runner.step(draw.randint(0, 256, (2, 40)))]


# ---------------------------------------------------------------------------------------------- names


def test_public_names() -> None:
    assert dir(ovtq) == PUBLIC == sorted(ovtq.__all__)
    assert all(getattr(ovtq, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match="module 'ovtq' has no attribute 'comprss'"):
        ovtq.comprss  # noqa: B018


def test_importing_is_light_and_lazy() -> None:
    """No OpenVINO at `import ovtq`, no rich for programs; a command's module does not take its function's place."""
    code = """
import sys, ovtq
assert dir(ovtq), ovtq.__version__
assert not {"openvino", "numpy", "scipy", "rich"} & {*sys.modules}, "import ovtq"
ovtq.errors, ovtq.codec
assert "openvino" not in sys.modules, "errors, codec"
ovtq.PRESETS, ovtq.convert
assert not {"rich", "optimum", "transformers", "torch"} & {*sys.modules}, "ovtq.api"
import ovtq.cli.convert, ovtq.verification.verify
from ovtq.cli.convert import main
assert all(map(callable, (ovtq.convert, ovtq.verify, main)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------------------------------------- compress


@pytest.mark.parametrize("case", CASES)
def test_compressed_in_memory_is_what_is_written(case: str, written: Callable[..., Path]) -> None:
    options, flags = CASES[case]
    folder = written(*flags, "--no-verify")
    original = io.load(SMALL)
    before = names(original)
    model = ovtq.compress(original, SMALL, **options)
    file = io.load(folder)
    assert names(model) == names(file)
    assert io.stamp_of(model) == io.stamp_of(file)
    assert io.states_of(model) == io.states_of(file)
    assert all(map(np.array_equal, said(model), said(file)))
    assert names(original) == before
    assert all(map(np.array_equal, said(original), said(SMALL / "openvino_model.xml")))


def test_configs_of_all_kinds() -> None:
    config = json.loads((SMALL / "config.json").read_text())
    made = [names(ovtq.compress(io.load(SMALL), kind)) for kind in (config, SMALL, str(SMALL / "config.json"))]
    assert made[0] == made[1] == made[2]
    assert ovtq.describe(SMALL).states == ovtq.describe(io.load(SMALL), config).states == load(SMALL)[1].states


def test_optimum_in_place(others_print: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    optimum = pytest.importorskip("optimum.intel", reason="needs the extra [optimum]")
    torch = pytest.importorskip("torch")
    how = {"device": "CPU", "ov_config": EXACT_PROPERTIES}
    model = optimum.OVModelForCausalLM.from_pretrained(SMALL, **how)
    prompt = {"input_ids": torch.arange(1, 41)[None], "attention_mask": torch.ones(1, 40, dtype=torch.int64)}
    length = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    expected = model.generate(**prompt, **length).tolist()
    assert ovtq.compress(model, preset="exact", target="cpu") is model
    assert io.stamp_of(model.model)["preset"] == "exact"
    assert model.generate(**prompt, **length).tolist() == expected
    assert {state.name for state in model.request.query_state()} > {states.WINDOW}
    with pytest.raises(errors.InputError, match="already converted"):
        ovtq.compress(model)

    model.save_pretrained(tmp_path / "saved")
    saved = io.load(tmp_path / "saved")
    stamp = io.stamp_of(saved)
    assert (stamp["target"], stamp["preset"], len(stamp["layers"])) == ("cpu", "exact", 4)
    assert io.states_of(saved) == io.states_of(model.model)
    assert ovtq.state_bytes(tmp_path / "saved", 300) == ovtq.state_bytes(model, 300)
    again = optimum.OVModelForCausalLM.from_pretrained(tmp_path / "saved", **how)
    assert again.generate(**prompt, **length).tolist() == expected
    assert ovtq.verify(SMALL, tmp_path / "saved").same_top == 1
    capfd.readouterr()
    assert inspect_main([str(tmp_path / "saved"), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["target"], [layer["window"] for layer in told["layers"]]) == ("cpu", [16, None, 16, None])


# ---------------------------------------------------------------------------------------------- convert


def test_convert_as_the_command_line_does(written: Callable[..., Path], tmp_path: Path) -> None:
    folder = written("--preset", "k6v4", "--target", "cpu")
    heard: list[tuple[str, int, int]] = []
    made = ovtq.convert(
        str(SMALL), tmp_path / "out", preset="k6v4", target="cpu", on_progress=lambda *told: heard.append(told)
    )
    record = json.loads((folder / "ovtq.json").read_text())
    for found in (made.record, json.loads((tmp_path / "out" / "ovtq.json").read_text())):
        assert json.loads(json.dumps({**found, "weights": record["weights"], "reason": None})) == record
    for name in ("openvino_model.xml", "openvino_model.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()

    assert [step.name for step in made.passes] == [step["name"] for step in record["passes"]]
    assert [layer.window for layer in made.layers] == [16, None, 16, None]
    assert made.verification is not None
    assert made.verification.relative == record["verified"]["relative"]
    assert made.verification.packed is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.target = "gpu"  # type: ignore[misc]

    stages = list(dict.fromkeys(stage for stage, _, _ in heard))
    assert stages == ["read", "rewrite", "write", "verify"]
    for stage in stages:
        done = [(count, total) for name, count, total in heard if name == stage]
        total = done[0][1]
        assert done == [(count, total) for count in range(total + 1)]
    assert len([stage for stage, _, _ in heard if stage == "rewrite"]) == 1 + len(made.passes)


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    made = ovtq.convert(SMALL, None, preset="u8")
    assert (made.record["verified"], made.verification, made.cache_precision) == (None, None, "u8")
    assert made.record["state_bytes"]["after"]["4096"] == made.state_bytes(4096)
    assert not any(tmp_path.iterdir())


def test_progress_that_raises_ends_the_conversion(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("verify", 1):
            raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        ovtq.convert(SMALL, tmp_path / "out", on_progress=stop)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"preset": "exact"}, {}, {"budget": 101}, {"preset": "f16"}], ids=str)
def test_state_bytes_are_the_devices_own(options: dict[str, Any], tmp_path: Path) -> None:
    made = ovtq.convert(SMALL, tmp_path / "out", target="cpu", verify=False, **options)
    runner = Runner(tmp_path / "out" / "openvino_model.xml", "CPU", EXACT_PROPERTIES)
    past = 0
    assert ovtq.pruning_counts(runner.request) == {}
    for tokens in (1, 64, 200, 330):
        while past < tokens:
            count = min(64, tokens - past)
            runner.step(np.ones((1, count), np.int64))
            past += count
        assert runner.state_bytes() == made.state_bytes(tokens)
        assert runner.state_bytes() == ovtq.state_bytes(tmp_path / "out", tokens)
        assert runner.state_bytes() == ovtq.state_bytes(io.load(tmp_path / "out"), tokens)
    assert ovtq.state_bytes(SMALL, 330, target="cpu") == 330 * 4 * 2 * 2 * 64 * 4
    assert 2 * ovtq.state_bytes(SMALL, 330) == ovtq.state_bytes(SMALL, 330, target="cpu")
    if options.get("budget"):
        counts = ovtq.pruning_counts(runner.request)
        assert counts.keys() == {1, 3}
        assert all(isinstance(count, PruningCounts) and count.pruned.shape == (1, 2) for count in counts.values())
        assert all((count.pruned > 0).all() and (count.kept > 0).all() for count in counts.values())
        assert all((count.pruned + count.kept <= 330).all() for count in counts.values())
    else:
        assert ovtq.pruning_counts(runner.request) == {}


# ---------------------------------------------------------------------------------------------- verify


def test_verify_folders_and_models(written: Callable[..., Path]) -> None:
    folder = written("--preset", "k6v4", "--target", "cpu")
    record = json.loads((folder / "ovtq.json").read_text())["verified"]
    assert ovtq.verify(SMALL, str(folder)).largest == record["largest"]
    original = io.load(SMALL)
    model = ovtq.compress(original, SMALL, preset="k6v4", target="cpu")
    assert ovtq.verify(original, model, SMALL).largest == record["largest"]


@pytest.mark.slow
def test_verify_a_calibrated_model_in_memory(tmp_path: Path) -> None:
    """Its statistics lie in no folder of its own: they are the original's, or named, and none but those."""
    folder = Path(shutil.copytree(SMALL, tmp_path / "model"))
    draw, path = np.random.RandomState(0), tmp_path / "elsewhere.npz"
    calibrate(SMALL, draw.randint(0, 256, 300), draw.randint(0, 256, 60)).save(path)
    original = io.load(SMALL)
    options: dict[str, Any] = {"preset": "k4v4", "target": "cpu", "basis": "calibrated"}
    model = ovtq.compress(original, SMALL, calibration=path, **options)
    with pytest.raises(errors.InputError, match=r"calibration.npz: no such file; statistics of a text are asked for"):
        ovtq.verify(original, model, SMALL)
    assert ovtq.verify(original, model, SMALL, calibration=path).packed
    shutil.copyfile(path, folder / "calibration.npz")
    assert ovtq.verify(folder, model).packed
    calibrate(SMALL, draw.randint(0, 256, 300), draw.randint(0, 256, 60)).save(folder / "calibration.npz")
    with pytest.raises(errors.InputError, match="not the statistics that the model was made with"):
        ovtq.verify(folder, model)


def test_verify_finds_what_is_wrong() -> None:
    original = io.load(SMALL)
    model = ovtq.compress(original, SMALL, target="cpu", preset="exact")
    sink = next(node for node in model.get_ops() if node.get_type_name() == "Multiply" and "ovtq" in str(node))
    sink.set_friendly_name("another")
    with pytest.raises(errors.VerificationFailed, match="its graph is not what its recorded passes make"):
        ovtq.verify(original, model, SMALL)
    with pytest.raises(errors.InputError, match="the converted model: not made by ovtq; give the original first"):
        ovtq.verify(original, original, SMALL)
    with pytest.raises(errors.InputError, match="device NPU is not there"):
        ovtq.verify(original, model, SMALL, device="NPU")


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preset": "best"}, errors.InputError, "no preset is named 'best'; there are auto, exact, "),
        ({"target": "npu"}, errors.InputError, "target is one of gpu, cpu, got 'npu'"),
        ({"preset": "u8", "passes": "check-call"}, errors.InputError, "give preset or passes, not both"),
        ({"passes": []}, errors.InputError, "passes names no pass"),
        ({"passes": [3]}, errors.InputError, "passes: 3 is no pass; there are decouple-length"),
        ({"passes": "shrink"}, errors.InputError, "no pass is named 'shrink'"),
        ({"passes": "truncate-window"}, errors.PreconditionFailed, "lengths in this model come from"),
        ({"k_bits": 7}, errors.InputError, "quantize-kv: k_bits is one of none, 2, 3, 4, 5, 6, 8, got 7"),
        ({"k_bits": True}, errors.InputError, "quantize-kv: k_bits needs str, got True"),
        ({"residual_window": 1.5}, errors.InputError, "quantize-kv: residual_window needs int, got 1.5"),
        ({"preset": "exact", "k_bits": 4}, errors.InputError, "k_bits=4: an option of quantize-kv; the passes are"),
        ({"window_bits": 8}, errors.InputError, r"window_bits: expected \(K, V\) such as \(8, 4\), got 8"),
        ({"recent_window": 8}, errors.InputError, "recent_window has no effect without budget"),
        ({"preset": "u8", "budget": 64}, errors.InputError, "^budget goes with the presets exact"),
        ({"settings": {"sink-row": {"sed": 1}}}, errors.InputError, "sink-row has no option 'sed'"),
        ({"settings": {"shrink": {"by": 1}}}, errors.InputError, "by=1: an option of shrink; the passes are"),
        ({"settings": ["a.b=1"]}, errors.InputError, "settings: expected options by pass"),
        ({"protect": "0"}, errors.PreconditionFailed, "layer 0 is no full layer; those are 1, 3"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    model = io.load(SMALL)
    before = names(model)
    with pytest.raises(error, match=message):
        ovtq.compress(model, SMALL, **options)
    assert names(model) == before
    with pytest.raises(error, match=message):
        ovtq.convert(SMALL, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_bad_models(tiny_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match="config is missing"):
        ovtq.compress(io.load(SMALL))
    with pytest.raises(errors.InputError, match=r"expected an ov.Model .*, got str"):
        ovtq.compress("model", SMALL)  # type: ignore[type-var]
    with pytest.raises(errors.InputError, match=r"config: expected a mapping, or the path .*, got int"):
        ovtq.compress(io.load(SMALL), 3)  # type: ignore[arg-type]
    with pytest.raises(errors.UnsupportedModel, match=r"config\.json has 3 layers"):
        ovtq.describe(SMALL, {"num_hidden_layers": 3})
    with pytest.raises(errors.InputError, match="no such folder"):
        ovtq.state_bytes(tmp_path / "nowhere", 1)
    for tokens in (-1, 1.5):
        with pytest.raises(errors.InputError, match="tokens must be a whole number from 0"):
            ovtq.state_bytes(SMALL, tokens)  # type: ignore[arg-type]
    with pytest.raises(errors.InputError, match="target is one of gpu, cpu, got 'npu'"):
        ovtq.state_bytes(SMALL, 1, target="npu")
    for harm, message in ((-1, "verify_seed must be from 0"), ("0", "verify_seed must be from 0")):
        with pytest.raises(errors.InputError, match=message):
            ovtq.convert(SMALL, tmp_path / "out", verify_seed=harm)  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ovtq.json").write_text("{}")
    with pytest.raises(errors.InputError, match="not empty; force replaces it"):
        ovtq.convert(SMALL, tmp_path / "out")
    ovtq.convert(SMALL, tmp_path / "out", force=True, verify=False)
    for converted in (tmp_path / "out", io.load(tmp_path / "out")):
        with pytest.raises(errors.InputError, match="already converted"):
            ovtq.describe(converted, SMALL)
    (tiny_copy / "openvino_model.bin").unlink()
    with pytest.raises(errors.InputError, match="no such file"):
        ovtq.convert(tiny_copy, tmp_path / "other")


# ---------------------------------------------------------------------------------------------- documentation


def test_the_examples_run(tmp_path: Path) -> None:
    """Every block of docs/python-api.md, one after the other, with the tiny model in the place of GPT-OSS-20B."""
    pytest.importorskip("optimum.intel", reason="needs the extra [optimum]")
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 5
    (tmp_path / "gpt-oss-20b").symlink_to(SMALL)
    code = "\n".join(blocks).replace('"GPU"', '"CPU"')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"gpt-oss-20b-u8"}
