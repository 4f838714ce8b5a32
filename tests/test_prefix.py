"""A prompt's beginning read once: to the bit in OpenVINO and OVModelForCausalLM; another's is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY

import ovtq
from ovtq.errors import InputError
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

IDS = np.random.RandomState(0).randint(0, 256, (2, 230)).astype(np.int64)
OPTIONS = ("k6v4 --target cpu --window-bits 6,4", "exact --target cpu", "k6v4 --target cpu --budget 101")


def converted(convert: Callable[..., Path], options: str) -> Path:
    return convert(TINY["5.5"], "--preset", *options.split(), "--no-verify")


def running(folder: Path, properties: dict[str, str] = EXACT_PROPERTIES) -> Runner:
    return Runner(folder / "openvino_model.xml", "CPU", properties)


def goes_on(runner: Runner, past: int) -> np.ndarray:
    """Logits of what follows `past` tokens, in calls of several lengths."""
    runner.mask = np.ones((2, past), np.int64)
    parts = np.split(IDS[:, past:], [1, 2, 9], axis=1)
    return np.concatenate([runner.step(part) for part in parts], 1)


@pytest.mark.parametrize("options", OPTIONS)
def test_what_follows_is_equal_to_the_bit(options: str, convert: Callable[..., Path], tmp_path: Path) -> None:
    folder, file = converted(convert, options), tmp_path / "prefix.npz"
    first = running(folder)
    for part in np.split(IDS[:, :200], [150, 151], axis=1):
        first.step(part)
    ovtq.save_state(first.request, file, IDS[:, :200], folder)
    expected = goes_on(first, 200)
    second = running(folder)
    past = ovtq.load_state(second.request, file, IDS, folder)
    assert past.get_seq_length() == 200
    assert np.array_equal(past.tokens, IDS[:, :200])
    assert np.array_equal(goes_on(second, 200), expected)
    again = ovtq.load_state(second.request, file, model_dir=folder)  # over what came since, and without a prompt
    assert np.array_equal(goes_on(second, again.get_seq_length()), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["prefix.npz"]


def test_with_the_plugins_u8_cache_within_its_rounding(convert: Callable[..., Path], tmp_path: Path) -> None:
    """The CPU plugin gives its own u8 cache out as f32, and rounds it again."""
    folder, file = converted(convert, "exact --target cpu"), tmp_path / "prefix.npz"
    properties = {**EXACT_PROPERTIES, "KV_CACHE_PRECISION": "u8"}
    first, second = running(folder, properties), running(folder, properties)
    first.step(IDS[:, :200])
    ovtq.save_state(first.request, file, IDS[:, :200], folder)
    expected = goes_on(first, 200)
    ovtq.load_state(second.request, file, IDS, folder)
    assert np.abs(goes_on(second, 200) - expected).max() < 0.02 * np.abs(expected).max()


@pytest.fixture(scope="module")
def saved(convert: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder, and a file of 100 tokens of one sequence."""
    folder = converted(convert, OPTIONS[0])
    file = tmp_path_factory.mktemp("prefix") / "prefix.npz"
    runner = running(folder)
    runner.step(IDS[:1, :100])
    ovtq.save_state(runner.request, file, IDS[0, :100].tolist(), folder)
    return folder, file


def refused(saved: tuple[Path, Path], folder: Path, ids: Any = None) -> str:
    """What is said; the states are as they were."""
    runner = running(folder)
    runner.step(IDS[:1, :50])
    before = [np.array(state.state.data) for state in runner.request.query_state()]
    with pytest.raises(InputError) as error:
        ovtq.load_state(runner.request, saved[1], ids, folder)
    after = [state.state.data for state in runner.request.query_state()]
    assert all(map(np.array_equal, before, after))
    return str(error.value)


def test_another_prompt_is_refused(saved: tuple[Path, Path]) -> None:
    other = IDS[:1].copy()
    other[0, 77] += 1
    assert "differs from what was read at token 77" in refused(saved, saved[0], other)
    assert "100 tokens were read, the prompt has 100" in refused(saved, saved[0], IDS[:1, :100])
    assert "1 sequences, the prompt has 2" in refused(saved, saved[0], IDS)
    assert "expected whole numbers (batch, tokens)" in refused(saved, saved[0], [[0.5]])


def test_another_model_or_conversion_is_refused(
    saved: tuple[Path, Path], convert: Callable[..., Path], tmp_path: Path
) -> None:
    said = refused(saved, converted(convert, "exact --target cpu"), IDS[:1])
    assert "of a model with the preset k6v4, this one is exact" in said
    assert "its graph differ" in refused(saved, converted(convert, "k6v4 --target cpu --budget 101"), IDS[:1])
    assert "this one is not converted" in refused(saved, TINY["5.5"], IDS[:1])
    other = Path(shutil.copytree(saved[0], tmp_path / "tuned"))
    weights = bytearray((other / "openvino_model.bin").read_bytes())
    weights[len(weights) // 2] ^= 1  # as in a model tuned further
    (other / "openvino_model.bin").write_bytes(weights)
    assert "its weights differ" in refused(saved, other, IDS[:1])


def test_what_is_no_such_file_is_refused(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder, request = saved[0], running(saved[0]).request
    (tmp_path / "text").write_text("no archive", encoding="utf-8")
    np.savez(tmp_path / "other.npz", tokens=IDS)
    for name, said in (
        ("nowhere", "no such file"),
        ("text", "no states written by"),
        ("other.npz", "no states written"),
    ):
        with pytest.raises(InputError, match=said):
            ovtq.load_state(request, tmp_path / name, IDS, folder)
    with pytest.raises(InputError, match="can't be written"):
        ovtq.save_state(request, tmp_path / "no" / "folder", IDS[:1, :3], folder)
    with pytest.raises(InputError, match="model_dir is missing"):
        ovtq.save_state(request, tmp_path / "file", IDS[:1, :3])
    with pytest.raises(InputError, match="got str"):
        ovtq.save_state("model", tmp_path / "file", IDS[:1, :3], folder)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_through_optimum(settings: dict[str, int], convert: Callable[..., Path], tmp_path: Path) -> None:
    """Read in chunks, saved, loaded by another, which says what the first says of the whole prompt."""
    torch = pytest.importorskip("torch", reason="needs the extra [optimum]")
    optimum = pytest.importorskip("optimum.intel", reason="needs the extra [optimum]")
    folder, file = converted(convert, OPTIONS[1]), tmp_path / "prefix.npz"
    first, second = (
        optimum.OVModelForCausalLM.from_pretrained(folder, device="CPU", ov_config=EXACT_PROPERTIES) for _ in range(2)
    )
    ids = torch.from_numpy(IDS[:1])
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, **settings}
    ovtq.read_prompt(first, ids[:, :201], chunk=64)
    ovtq.save_state(first, file, ids[:, :200])
    expected = first.generate(ids, past_key_values=ovtq.load_state(first, file, ids), **settings)
    said = second.generate(ids, past_key_values=ovtq.load_state(second, file, ids), **settings)
    assert said.tolist() == expected.tolist()
    read = second.generate(ids, past_key_values=ovtq.read_prompt(second, ids, chunk=230), **settings)
    assert read.tolist() == second.generate(ids, **settings).tolist() == expected.tolist()
    with pytest.raises(InputError, match="has read 249 tokens, 200 ids were given"):
        ovtq.save_state(second, file, ids[:, :200])
    with pytest.raises(InputError, match="chunk must be"):
        ovtq.read_prompt(second, ids, chunk=0)
