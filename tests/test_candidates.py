"""What is compared: how candidates are written, what their caches really are, and the host's method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MINI, TINY

from ovtq.cli.command import tokens
from ovtq.errors import InputError
from ovtq.evidence.candidates import Cache, inspect_cache, open_candidate, parse
from ovtq.runtime.host import Quantize, ZeroLowNorms
from ovtq.runtime.paged import PagedRunner
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.verification.verify import TOLERANCE

TURBO = "KEY_CACHE_QUANT_ALG=TURBO,VALUE_CACHE_QUANT_ALG=TURBO"
CALLS = (40, 1, 1, 7, 23)  # past the tiny model's window of 16, and over the ends of blocks


def seen(text: str, reference: Path = MINI) -> Cache:
    """What the cache of a candidate is."""
    candidate = parse(text, reference)
    return inspect_cache(candidate, open_candidate(candidate, "CPU", EXACT_PROPERTIES), "CPU")


@pytest.mark.parametrize(
    ("text", "cache", "per_token"),
    [
        ("stock", "12 caches f32", 6 * 2 * 2 * 64 * 4),
        ("stock:KV_CACHE_PRECISION=u8", "12 caches u8", 6 * 2 * 2 * (64 + 8)),
        ("stock:KV_CACHE_PRECISION=u4", "12 caches u4", 6 * 2 * 2 * (32 + 8)),
        ("stock:VALUE_CACHE_PRECISION=u4", "K u8, V u4", 6 * 2 * (64 + 8 + 32 + 8)),
        (
            f"stock:{TURBO},KEY_CACHE_PRECISION=u4,VALUE_CACHE_PRECISION=u4",
            "12 caches TURBO u4",
            6 * 2 * 2 * (32 + 4),
        ),
        ("host:k6v4", "12 caches f32 + changed by the host", 6 * 2 * 2 * 64 * 4),
        ("paged:stock,KV_CACHE_PRECISION=u8", "paged, [K u8 by channel, V u8 by token: 304 bytes]", 6 * 304),
        ("paged:stock,KV_CACHE_PRECISION=u4", "paged, [K u4 by channel, V u4 by token: 176 bytes]", 6 * 176),
    ],
)
def test_the_cache_is_read_off_the_running_model(text: str, cache: str, per_token: int) -> None:
    found = seen(text)
    assert (found.text, found.per_token, found.flat, found.wrong) == (cache, per_token, 0, "")


def test_a_converted_models_cache(convert: Callable[..., Path]) -> None:
    packed = convert(MINI, "--preset", "k6v4", "--target", "cpu")
    found = seen(str(packed))
    assert found.text == "3 f32 states + 1 i32 state + 6 i8 states"  # window, recent, scale; the past length
    assert found.per_token == 3 * 2 * (48 + 4 + 32 + 4)
    runner = Runner(packed / "openvino_model.xml", "CPU", EXACT_PROPERTIES)
    runner.step(np.zeros((1, 1), np.int64))  # too young to be packed
    assert found.flat == runner.state_bytes()
    assert "the properties change nothing" in seen(f"{packed},KV_CACHE_PRECISION=u8").wrong


def test_a_pruned_models_cache_is_bounded(convert: Callable[..., Path]) -> None:
    pruned = convert(MINI, "--preset", "exact", "--target", "cpu", "--budget", "64", "--no-verify")
    found = seen(str(pruned))
    runner = Runner(pruned / "openvino_model.xml", "CPU", EXACT_PROPERTIES)
    runner.step(np.zeros((1, 400), np.int64))
    assert found.per_token == 0
    assert runner.state_bytes() <= found.flat < runner.state_bytes() * 1.1


def test_what_the_model_asks_for_is_left_to_it(convert: Callable[..., Path]) -> None:
    marked = convert(MINI, "--preset", "u8", "--target", "cpu")
    assert seen(str(marked)).text.startswith("6 caches u8")
    assert seen(f"{marked},KV_CACHE_PRECISION=u4").text.startswith("6 caches u4")


def test_a_property_that_is_accepted_and_not_obeyed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = parse("stock:KV_CACHE_PRECISION=u8", MINI)
    other = Runner(MINI / "openvino_model.xml", "CPU", EXACT_PROPERTIES)  # a cache of f32
    assert inspect_cache(candidate, other, "CPU").wrong == (
        "keys are kept in f32, not in u8; values are kept in f32, not in u8"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("stock:KV_CACHE_PRECISION", "write DIR,KEY=VALUE"),
        ("host:k9v4", "there are host:k6v4"),
        ("host:prune8", "there are host:k6v4"),
        ("paged:nowhere", "nowhere: no such folder"),
    ],
)
def test_what_can_not_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(text, MINI)


def test_a_paged_model_has_no_other_device() -> None:
    with pytest.raises(InputError, match="on the CPU only"):
        open_candidate(parse("paged:stock", MINI), "GPU", EXACT_PROPERTIES)


def logits(runner: Any) -> np.ndarray:
    """Of every token of CALLS, seeded and random, twice, so that the second time starts from an emptied cache."""
    for _ in range(2):
        runner.reset()
        draw = np.random.default_rng(0)
        found = np.concatenate(
            [runner.step(draw.integers(0, runner.vocabulary, (1, count)))[0].copy() for count in CALLS]
        )
    return found


@pytest.mark.parametrize(
    "options", [[], ["--preset", "rotate"], ["--preset", "rotate", "--set", "rotate-heads.tensors=v"]]
)
def test_paged_attention_equals_the_stateful_model(
    options: list[str], tiny: Path, convert: Callable[..., Path]
) -> None:
    folder = convert(tiny, *options) if options else tiny
    expected = logits(Runner(tiny / "openvino_model.xml", "CPU", EXACT_PROPERTIES))
    found = logits(PagedRunner(folder, EXACT_PROPERTIES, sum(CALLS)))
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_what_has_no_paged_attention_is_refused(convert: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="no paged attention"):
        PagedRunner(convert(TINY["5.5"], "--preset", "exact"), EXACT_PROPERTIES, 1)


def states(tokens_: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    names = "past_key_values.0.keypresent.0.key", "past_key_values.0.valuepresent.0.value"
    return {name: draw.standard_normal((1, 2, tokens_, 64)).astype(np.float32) for name in names}


def test_the_host_quantises_all_but_the_last_tokens() -> None:
    before = states(100)
    after = Quantize(6, 4).apply(before)
    errors = {}
    for name, old in before.items():
        assert np.array_equal(after[name][:, :, 36:], old[:, :, 36:])
        difference = after[name][:, :, :36] - old[:, :, :36]
        errors[name.rsplit(".", 1)[1]] = (difference**2).mean() / (old[:, :, :36] ** 2).mean()
    # Lloyd-Max at 6 and at 4 bits, of a coordinate of unit variance
    assert errors["key"] == pytest.approx(0.0006, rel=0.15)
    assert errors["value"] == pytest.approx(0.0091, rel=0.15)


def test_the_host_zeroes_the_shortest_keys() -> None:
    before = states(200)
    after = ZeroLowNorms(128).apply(before)
    key, value = (next(name for name in before if name.endswith(end)) for end in (".key", ".value"))
    norms = np.linalg.norm(before[key][0, :, :168], axis=-1).mean(0)
    gone = set(np.argsort(norms)[:72])
    for name in (key, value):
        zero = ~after[name][0].any((0, 2))
        assert set(np.flatnonzero(zero)) == gone
        assert np.array_equal(after[name][:, :, ~zero], before[name][:, :, ~zero])
    assert ZeroLowNorms(128).apply(states(128)) == {}


def test_a_hosts_changes_reach_the_model() -> None:
    same, changed = (open_candidate(parse(text, MINI), "CPU", EXACT_PROPERTIES) for text in ("stock", "host:prune128"))
    ids = np.random.default_rng(0).integers(0, same.vocabulary, (1, 300))
    assert np.array_equal(same.step(ids), changed.step(ids))
    assert not np.allclose(same.step(ids[:, :1]), changed.step(ids[:, :1]), rtol=1e-3)


@pytest.mark.parametrize(
    ("text", "number"),
    [("300", 300), ("2k", 2048), ("8K", 8192), ("131k", 131072), ("128k", 131072), ("10k", 10240), ("33k", 33792)],
)
def test_numbers_of_tokens(text: str, number: int) -> None:
    assert tokens(text) == number
