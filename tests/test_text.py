"""What hosts get: held-out text with no property set, in calls of every length, through every host."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import MINI, ROOT, TINY
from scipy.special import logsumexp
from tokenizers import Tokenizer

from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

TEXT = (ROOT / "tests" / "data" / "heldout.txt").read_text(encoding="utf-8")
CALLS = (1024, 256, 65, 64, 7, 1)  # tokens of a call
SHORT = {7: 160, 1: 64}  # tokens of the text where calls are short
# nats of a token: over its own call lengths the exported model's mean differs by .004
NOISE = 0.01
LOSSY = {"k4v4": 0.01, "u4": 0.02}  # what a preset may lose besides
EVERY = ("exact", "rotate", "k8v4", "k6v4", "k4v4", "u8", "u4")
DEFAULT = ("exact --target cpu", "exact --target gpu", "k6v4 --target cpu", "k6v4 --target gpu", "u8 --target gpu")
OPTIONS = [
    option if (option := f"{preset} --target {target}") in DEFAULT else pytest.param(option, marks=pytest.mark.slow)
    for preset in EVERY
    for target in ("cpu", "gpu")
]
IN_HOSTS = [
    option if option in ("exact --target cpu", "k6v4 --target cpu") else pytest.param(option, marks=pytest.mark.slow)
    for option in (f"{preset} --target {target}" for preset in EVERY for target in ("cpu", "gpu"))
]


@functools.cache
def ids(model_dir: Path) -> np.ndarray:
    """The first 1,024 tokens, (1, tokens)."""
    tokenizer = MINI if model_dir == MINI else None
    found = Tokenizer.from_file(str(MINI / "tokenizer.json")).encode(TEXT).ids if tokenizer else list(TEXT.encode())
    return np.array(found[:1024], np.int64)[None]


def losses(runner: Runner, text: np.ndarray, count: int, shown: np.ndarray | None = None) -> np.ndarray:
    """−log p of each token but the first, (batch, tokens − 1), read in calls of `count`."""
    runner.reset()
    shown = np.ones(text.shape, np.int64) if shown is None else shown
    parts = [(text[:, a : a + count], shown[:, a : a + count]) for a in range(0, text.shape[1], count)]
    logits = np.concatenate([runner.step(*part) for part in parts], 1)[:, :-1]
    return logsumexp(logits, -1) - np.take_along_axis(logits, text[:, 1:, None], -1)[..., 0]


def read(model_dir: Path, text: np.ndarray, properties: dict[str, str]) -> dict[int, float]:
    """The mean loss by length of the calls."""
    runner = Runner(model_dir / "openvino_model.xml", "CPU", properties)
    try:
        return {n: float(losses(runner, text[:, : SHORT.get(n, 1024)], n).mean()) for n in CALLS}
    finally:
        runner.close()
        gc.collect()


@functools.cache
def as_exported(model_dir: Path, f32: bool) -> dict[int, float]:
    return read(model_dir, ids(model_dir), EXACT_PROPERTIES if f32 else {})


@pytest.mark.parametrize("model_dir", [MINI, pytest.param(TINY["5.5"], marks=pytest.mark.slow)], ids=["mini", "tiny"])
@pytest.mark.parametrize("f32", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["as hosts load it", "f32"])
@pytest.mark.parametrize("options", OPTIONS)
def test_text_is_as_likely_as_to_the_exported_model(
    options: str, f32: bool, model_dir: Path, convert: Callable[..., Path]
) -> None:
    """Whatever the length of a call."""
    folder = convert(model_dir, "--preset", *options.split(), "--no-verify")
    allowed = NOISE + LOSSY.get(options.split()[0], 0)
    expected, found = as_exported(model_dir, f32), read(folder, ids(model_dir), EXACT_PROPERTIES if f32 else {})
    for count, value in found.items():
        assert abs(value - expected[count]) <= allowed, (count, value, expected[count])


@pytest.mark.parametrize("options", OPTIONS)
def test_so_it_is_in_a_batch_with_padding(options: str, convert: Callable[..., Path]) -> None:
    """Three texts of 300, 230 and 120 tokens, padded on the left, at the device's own precision."""
    folder = convert(MINI, "--preset", *options.split(), "--no-verify")
    text = ids(MINI)[0, :900].reshape(3, 300)
    shown = (np.arange(300) >= np.array([[0], [70], [180]])).astype(np.int64)
    means = []
    for some in (MINI, folder):
        runner = Runner(some / "openvino_model.xml", "CPU")
        real = shown[:, :-1].astype(bool)
        means.append([losses(runner, text, count, shown)[real].mean() for count in (300, 65)])
        runner.close()
    assert np.abs(np.subtract(*means)).max() <= NOISE + LOSSY.get(options.split()[0], 0)


@functools.cache
def judge() -> Runner:
    return Runner(MINI / "openvino_model.xml", "CPU", EXACT_PROPERTIES)


def likely(prompt: np.ndarray, answer: list[int]) -> float:
    """How likely the exported model at f32 finds each token of an answer, as the mean of log p."""
    whole = np.concatenate([prompt, np.array([answer], np.int64)], 1)
    return float(-losses(judge(), whole, 512)[0, prompt.shape[1] - 1 :].mean())


def pasted() -> np.ndarray:
    return np.array(Tokenizer.from_file(str(MINI / "tokenizer.json")).encode(TEXT[20000:]).ids[:1500], np.int64)[None]


def by_genai(folder: Path) -> list[int]:
    genai = pytest.importorskip("openvino_genai", reason="needs the extra [genai]")
    pipe = genai.LLMPipeline(folder, "CPU", ATTENTION_BACKEND="SDPA")
    config = genai.GenerationConfig(max_new_tokens=32, ignore_eos=True, apply_chat_template=False)
    inputs = genai.TokenizedInputs(ov.Tensor(pasted()), ov.Tensor(np.ones_like(pasted())))
    return list(pipe.generate(inputs, config).tokens[0])


def by_optimum(folder: Path) -> list[int]:
    optimum = pytest.importorskip("optimum.intel", reason="needs the extra [optimum]")
    import torch

    model = optimum.OVModelForCausalLM.from_pretrained(folder, device="CPU")
    prompt = torch.from_numpy(pasted())
    said = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, min_new_tokens=32
    )
    return said[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("host", [by_genai, by_optimum])
@pytest.mark.parametrize("options", IN_HOSTS)
def test_the_answer_to_a_pasted_text(
    options: str, host: Callable[[Path], list[int]], convert: Callable[..., Path]
) -> None:
    """1,500 tokens in one call, no property: what follows is as likely as what the exported model says there."""
    folder = convert(MINI, "--preset", *options.split(), "--no-verify")
    expected, found = (likely(pasted(), host(some)) for some in (MINI, folder))
    assert found >= expected - 0.3
