"""The states that are recorded: their bytes are the device's; records of other models and older ones."""

from __future__ import annotations

import json
import lzma
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from conftest import ROOT, TINY, load

from ovtq import pipeline, states
from ovtq.cli.inspect import main
from ovtq.errors import InputError, VerificationFailed
from ovtq.ir import io
from ovtq.ir.cache import marked
from ovtq.ir.graph import Tensors
from ovtq.passes import DecoupleLength, TruncateWindow
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.states import PRUNED, Fixed, Growing, StateSpec
from ovtq.verification.recheck import recheck

OLD = ROOT / "tests" / "data" / "made-by-0.1.0"
TOKENS = (1, 63, 64, 192, 330)
OPTIONS: dict[str, tuple[list[str], list[str]]] = {  # settings; those of prune-kv
    "plain": ([], []),
    "window-bits": (["truncate-window.k-bits=6", "truncate-window.v-bits=4"], []),
    "protect": (["quantize-kv.protect=first:1"], []),
    "values alone": (["quantize-kv.k-bits=none"], []),
    "evict": ([], ["prune-kv.budget=101"]),
    "mask": ([], ["prune-kv.budget=101", "prune-kv.mode=mask"]),
}


def cases() -> list[Any]:
    """Every preset and target with every option that it has; those with the same form as another's are slow ones."""
    found = []
    for preset in pipeline.PRESETS:
        for target in states.FLOAT_BYTES:
            names = {item.name for item in pipeline.PRESETS[preset].on(target)}
            for option, (settings, pruning) in OPTIONS.items():
                if any(setting.partition(".")[0] not in names for setting in settings):
                    continue
                if pruning and preset not in ("exact", "k8v4", "k6v4", "k4v4"):
                    continue
                again = preset in ("k8v4", "k4v4", "u4")
                found.append(pytest.param(preset, target, option, marks=pytest.mark.slow if again else ()))
    return found


def passes_of(preset: str, target: str, option: str) -> tuple:
    settings, pruning = OPTIONS[option]
    passes = pipeline.with_settings(pipeline.PRESETS[preset].on(target, pruned=bool(pruning)), settings)
    return pipeline.with_settings(pipeline.with_pruning(passes, target), pruning) if pruning else passes


def bytes_on(runner: Runner, these: tuple[StateSpec, ...], target: str) -> int:
    """What the device's states take, floating-point numbers in as many bytes as a target's."""
    real = {state.name for state in these if state.real}
    found = {state.name: state.state for state in runner.request.query_state()}
    assert found.keys() == {state.name for state in these}
    return sum(
        tensor.size * states.FLOAT_BYTES[target] if name in real else tensor.byte_size for name, tensor in found.items()
    )


@pytest.mark.parametrize(("preset", "target", "option"), cases())
def test_bytes_are_the_devices_own(preset: str, target: str, option: str) -> None:
    """State by state, after calls of 64 tokens and fewer."""
    model, description, _ = pipeline.run(*load(TINY["5.5"]), passes_of(preset, target, option))
    these, asked = description.states, marked(model)
    model.set_rt_info("", ["runtime_options", "KV_CACHE_PRECISION"])  # the states as they are declared
    runner = Runner(model, "CPU", EXACT_PROPERTIES)
    specs, past = {state.name: state for state in these}, 0
    for tokens in TOKENS:
        while past < tokens:
            count = min(64, tokens - past)
            runner.step(np.ones((1, count), np.int64))
            past += count
        for state in runner.request.query_state():
            spec = specs[state.name]
            size = spec.bytes(tokens, "cpu")
            assert state.state.byte_size == size, (state.name, tokens)
        assert states.total(these, tokens, target) == bytes_on(runner, these, target)
    assert states.flat(these, target) + 330 * states.per_token(these, target) >= states.total(these, 330, target)
    if asked:
        assert states.total(these, 330, target, asked) < states.total(these, 330, target)
    if pruned := [state for state in these if state.name == PRUNED]:
        assert states.layers_named(specs) == [*pruned[0].layers] == [1, 3]


@pytest.mark.parametrize(
    ("preset", "target", "option"), [case for case in cases() if case.values[2] in ("evict", "protect")]
)
def test_inspect_and_the_record_say_the_same(
    preset: str, target: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, description, _ = pipeline.run(*load(TINY["5.5"]), passes_of(preset, target, option))
    facts = {"ovtq": "x", "schema": states.SCHEMA, "preset": preset, "passes": [], "versions": {}}
    io.stamp(model, facts | {"states": [state.told() for state in description.states]})
    shutil.copytree(TINY["5.5"], tmp_path / "out")
    ov.save_model(model, tmp_path / "out" / "openvino_model.xml", compress_to_fp16=False)
    assert io.states_of(io.load(tmp_path / "out")) == description.states
    assert main([str(tmp_path / "out"), "--json", "--target", target, "--context", "1,330,128k"]) == 0
    found = json.loads(capsys.readouterr().out)["memory"][0]["at"]
    assert found == {str(count): states.total(description.states, count, target) for count in (1, 330, 131072)}
    if option == "evict":
        assert found["131072"] < 1e6


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        (Growing(), [0, 1, 40, 330]),
        (Growing(extra=1), [0, 2, 41, 331]),
        (Growing(16, 128), [0, 0, 0, 256]),
        (Growing(16, 8, most=32), [0, 0, 24, 32]),
        (Fixed(7), [7, 7, 7, 7]),
    ],
)
def test_rows(rule: Fixed | Growing, rows: list[int]) -> None:
    assert [rule.rows(tokens) for tokens in (0, 1, 40, 330)] == rows


def test_a_pass_that_leaves_other_states_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, description = load(TINY["5.5"])
    fixed = StateSpec.fixed
    monkeypatch.setattr(StateSpec, "fixed", lambda name, kind, shape, *rest: fixed(f"{name}x", kind, shape, *rest))
    once = DecoupleLength().apply(model, description)
    item = TruncateWindow()
    made = item.run(once.model, once.description)
    told = tuple(StateSpec.read(state.told() | {"type": "f16"}) for state in made.description.states)
    wrong = type(made)(made.model, type(made.description)(**vars(made.description) | {"states": told}), 2)
    monkeypatch.setattr(TruncateWindow, "run", lambda self, model, description: wrong)
    with pytest.raises(
        VerificationFailed, match=r"truncate-window: expected a state past_key_values.1.*f16.*found f32"
    ):
        item.apply(once.model, once.description)


def test_tensors_are_taken_apart_and_put_together() -> None:
    """By name, what there is not left out, those inside others too."""
    a, b, c, d = (ov.opset15.parameter([size], np.float32).output(0) for size in (1, 2, 3, 4))
    call = Outer(a, Inner(b, None), c)
    assert [x.get_shape()[0] for x in call.flatten()] == [1, 2, 3]
    other = call.filled([d, c, b])
    assert [x.get_shape()[0] for x in (other.first, other.inner.one, other.last)] == [4, 3, 2]
    assert other.inner.two is None
    with pytest.raises(ValueError, match="2 tensors for 3"):
        call.filled([a, b])


@dataclass(frozen=True)
class Inner(Tensors):
    one: ov.Output
    two: ov.Output | None


@dataclass(frozen=True)
class Outer(Tensors):
    first: ov.Output
    inner: Inner
    last: ov.Output


# ------------------------------------------------------------------------------------------ records


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder that ovtq 0.1.0 converted: --preset k6v4 --target cpu --residual-window 16 --budget 64."""
    folder = tmp_path / "old"
    folder.mkdir()
    weights = (TINY["5.5"] / "openvino_model.bin").read_bytes()
    (folder / "openvino_model.bin").write_bytes(
        weights + lzma.decompress((OLD / "openvino_model.bin.tail.xz").read_bytes())
    )
    (folder / "openvino_model.xml").write_bytes(lzma.decompress((OLD / "openvino_model.xml.xz").read_bytes()))
    for path in (OLD / "ovtq.json", TINY["5.5"] / "config.json"):
        shutil.copy(path, folder)
    return folder


def test_a_record_without_a_schema_is_read(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(old), "--json", "--context", "1,330,128k"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["converted"]["ovtq"] == "0.1.0"
    runner = Runner(old / "openvino_model.xml", "CPU", EXACT_PROPERTIES)
    for size in (1, 64, 64, 64, 64, 73):
        runner.step(np.ones((1, size), np.int64))
        if size == 1:
            assert found["memory"][0]["at"]["1"] == runner.state_bytes()
    assert found["memory"][0]["at"]["330"] == found["memory"][0]["at"]["131072"] == runner.state_bytes()
    runner.fill(5000)
    assert runner.state_bytes() == found["memory"][0]["at"]["131072"]


def test_a_folder_of_0_1_0_is_not_verified_as_if_made_today(old: Path) -> None:
    said = (
        r"its graph is not what its recorded passes make .*; made by an earlier ovtq: convert the original model again"
    )
    with pytest.raises(VerificationFailed, match=said):
        recheck(TINY["5.5"], old, "CPU")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 99}, "whose records (schema 99) this ovtq can't read; convert the original model with this one"),
        ({"states": [{"name": "x"}]}, "its stamp tells of no states"),
        ({"states": []}, "its states are not those in its stamp (found a state "),
    ],
)
def test_stamps_that_are_not_the_models(change: dict, said: str) -> None:
    model, description, _ = pipeline.run(*load(TINY["5.5"]), pipeline.PRESETS["exact"].on("cpu"))
    told = {"ovtq": "9.9", "schema": states.SCHEMA, "states": [state.told() for state in description.states]}
    io.stamp(model, told | change)
    with pytest.raises(InputError) as error:
        io.states_of(model)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
