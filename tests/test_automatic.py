"""The preset that is taken where none is named, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import TINY, load

import ovtq
from ovtq import automatic, pipeline
from ovtq.advice import advise
from ovtq.automatic import caution, choose
from ovtq.cli.convert import main
from ovtq.ir import io
from ovtq.models import ModelDescription
from ovtq.options import Options


def gpt_oss() -> ModelDescription:
    return load(TINY["5.5"])[1]


@pytest.mark.parametrize(
    ("target", "version", "preset"),
    [
        ("gpu", "2026.4.1-22982-releases/2026/4", "u8"),
        ("gpu", "2026.3.0", "u8"),
        ("gpu", "2026.2.1", "k6v4"),
        ("gpu", "2027.0.0", "u8"),
        ("cpu", "2026.1.0", "exact"),
    ],
)
def test_by_target_and_version(target: str, version: str, preset: str) -> None:
    assert choose(gpt_oss(), target, version=version).preset == preset


def test_it_is_the_one_advice_there_is() -> None:
    """What ovtq-inspect recommends is what ovtq-convert takes."""
    for target in ("gpu", "cpu"):
        assert choose(gpt_oss(), target) == advise(gpt_oss(), target)
        assert Options(target=target).settled(gpt_oss())[0].preset == advise(gpt_oss(), target).preset


@pytest.mark.parametrize(
    "options",
    [{"k_bits": 5}, {"budget": 99}, {"settings": {"quantize-kv": {"v-bits": "3"}}}, {"protect": "last:1"}],
    ids=str,
)
@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_options_of_packed_caches_decide(options: dict, target: str) -> None:
    settled, advice = Options(target=target, **options).settled(gpt_oss())
    assert settled.preset == "k6v4"
    assert settled.chosen()
    assert advice is automatic.PACKED


def test_statistics_beside_a_model_are_used_where_they_were_measured_to_gain() -> None:
    """Of a model without sinks whose cache is quantised; not where another basis is asked for."""
    oss = gpt_oss()
    plain = oss.with_layers({layer.index: dataclasses.replace(layer, sinks=None) for layer in oss.layers})
    taken, advice = Options().settled(plain, calibrated=True)
    assert (taken.preset, taken.basis) == ("u8", "calibrated")
    assert advice is not None
    assert "calibration.npz" in advice.reason
    assert Options().settled(plain)[0].basis is None
    assert Options(basis="rotation").settled(plain, calibrated=True)[0].basis == "rotation"
    assert Options(preset="u8").settled(plain, calibrated=True)[0].basis is None
    assert Options(target="cpu").settled(plain, calibrated=True)[0].basis == "calibrated"
    assert Options().settled(oss, calibrated=True)[0].basis is None


def test_weights_are_followed_where_every_key_has_a_bias() -> None:
    """Of a model without sinks whose own cache is quantised, if they tell anything, and no text does."""
    oss = gpt_oss()  # its keys have biases
    plain = oss.with_layers({layer.index: dataclasses.replace(layer, sinks=None) for layer in oss.layers})
    taken, advice = Options().settled(plain, tell=lambda: True)
    assert (taken.preset, taken.basis) == ("u8", "weights")
    assert advice is not None
    assert "biases" in advice.reason
    assert Options().settled(plain, tell=lambda: False)[0].basis is None
    assert Options().settled(plain, True, lambda: True)[0].basis == "calibrated"
    assert Options(basis="rotation").settled(plain, tell=lambda: True)[0].basis == "rotation"
    assert Options(preset="u8").settled(plain, tell=lambda: True)[0].basis is None
    assert Options(k_bits=4).settled(plain, tell=lambda: True)[0].basis is None
    assert Options().settled(oss, tell=lambda: True)[0].basis is None
    bare = plain.with_layers({plain.layers[-1].index: dataclasses.replace(plain.layers[-1], key_bias=None)})
    assert Options().settled(bare, tell=lambda: True)[0].basis is None


def test_what_is_named_is_taken() -> None:
    for preset in (*pipeline.PRESETS, *pipeline.ALIASES):
        asked = Options(preset=preset)
        assert asked.settled(gpt_oss()) == (asked, None)
        assert asked.named == pipeline.ALIASES.get(preset, preset)
    assert Options(preset="f16").chosen() == Options(preset="exact").chosen()
    assert Options(passes="rotate-heads").settled(gpt_oss())[1] is None


def test_a_version_that_ignores_the_mark_is_told() -> None:
    assert "KV_CACHE_PRECISION=u4" in caution("gpu", "u4", "2026.2.0")
    for told in (caution("gpu", "u8", "2026.3.0"), caution("cpu", "u8", "2026.1.0"), caution("gpu", None, "2026.1.0")):
        assert told is None


@pytest.mark.parametrize(("target", "preset"), [("gpu", "u8"), ("cpu", "exact")])
def test_the_reason_is_said_and_recorded(
    target: str, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    assert main([str(TINY["5.5"]), "--dry-run", "--target", target, "--json", str(record)]) == 0
    said, found = capsys.readouterr().out, json.loads(record.read_text(encoding="utf-8"))
    assert (found["preset"], found["reason"]) == (preset, choose(gpt_oss(), target).reason)
    assert f"preset {preset}, in the form for a {target.upper()}" in said
    assert f"chosen (--preset auto): {found['reason']}" in said
    model = ovtq.compress(io.load(TINY["5.5"]), TINY["5.5"], preset="auto", target=target)
    assert io.stamp_of(model)["preset"] == preset
