"""optimum-intel's OVModelForCausalLM on the bundled model, against the unconverted model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MINI, ROOT

from ovtq.runtime.runner import EXACT_PROPERTIES

optimum = pytest.importorskip("optimum.intel", reason="needs the extra [optimum]")
transformers = pytest.importorskip("transformers")

TEXT = (ROOT / "tests" / "data" / "heldout.txt").read_text(encoding="utf-8")
SETTINGS: dict[str, dict[str, object]] = {
    "greedy": {},
    "beam search": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20},
}


PACKED = ["k6v4 --target cpu"]  # options of ovtq-convert behind --preset


@pytest.fixture
def folder(preset: str, convert: Callable[..., Path]) -> Path:
    """The bundled model, converted with the test's parameter `preset`."""
    return convert(MINI, "--preset", *preset.split())


@functools.lru_cache(maxsize=3)
def loaded(model_dir: Path) -> Any:
    return optimum.OVModelForCausalLM.from_pretrained(model_dir, device="CPU", ov_config=EXACT_PROPERTIES)


def raw(model_dir: Path, texts: list[str], **settings: Any) -> Any:
    """What `generate` of transformers returns."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    transformers.set_seed(0)
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    return loaded(model_dir).generate(**inputs, max_new_tokens=48, min_new_tokens=48, **settings)


def generate(model_dir: Path, texts: list[str], **settings: Any) -> list[list[int]]:
    return raw(model_dir, texts, **settings).tolist()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("preset", ["exact", pytest.param("rotate", marks=pytest.mark.slow)])
def test_one_sequence(preset: str, settings: str, request: pytest.FixtureRequest) -> None:
    converted = generate(request.getfixturevalue(preset), [TEXT[:3000]], **SETTINGS[settings])
    assert converted == generate(MINI, [TEXT[:3000]], **SETTINGS[settings])


@pytest.mark.parametrize("settings", ["greedy", "beam search"])
@pytest.mark.parametrize("preset", ["exact", pytest.param("rotate", marks=pytest.mark.slow)])
def test_a_batch_with_padding(preset: str, settings: str, request: pytest.FixtureRequest) -> None:
    texts = [TEXT[:2000], TEXT[4000:4300], TEXT[6000:6040]]
    converted = generate(request.getfixturevalue(preset), texts, **SETTINGS[settings])
    assert converted == generate(MINI, texts, **SETTINGS[settings])


@pytest.mark.parametrize("preset", ["exact", *PACKED])
def test_a_padded_sequence_says_what_it_says_alone(folder: Path) -> None:
    texts = [TEXT[:1200], TEXT[4000:4300]]
    together = generate(folder, texts)
    alone = generate(folder, texts[1:])
    assert together[1][-48:] == alone[0][-48:]
