"""tools/measure_paged.py: paged attention in plain OpenVINO, against the stateful model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MINI, ROOT, TINY

from ovtq.errors import InputError
from ovtq.runner import EXACT_PROPERTIES, Runner
from ovtq.verify import TOLERANCE

pytest.importorskip("tokenizers", reason="needs the extra [eval]")
CALLS = (40, 1, 1, 7, 23)  # past the tiny model's window of 16, and over the ends of blocks


@pytest.fixture
def paged(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import measure_paged

    return measure_paged


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
    paged: Any, options: list[str], tiny: Path, convert: Callable[..., Path]
) -> None:
    folder = convert(tiny, *options) if options else tiny
    expected = logits(Runner(tiny / "openvino_model.xml", "CPU", EXACT_PROPERTIES))
    found = logits(paged.PagedRunner(folder, EXACT_PROPERTIES, sum(CALLS)))
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(
    ("properties", "form"),
    [
        ("KV_CACHE_PRECISION=f32", "[K f32, V f32: 1024 bytes]"),
        ("KV_CACHE_PRECISION=u8", "[K u8 by channel, V u8 by token: 304 bytes]"),
        ("KV_CACHE_PRECISION=u4", "[K u4 by channel, V u4 by token: 176 bytes]"),
        ("KV_CACHE_PRECISION=u4,KEY_CACHE_QUANT_MODE=BY_TOKEN", "[K u4 by token, V u4 by token: 160 bytes]"),
        (
            "KV_CACHE_PRECISION=u4,KEY_CACHE_QUANT_MODE=BY_TOKEN,KEY_CACHE_GROUP_SIZE=32",
            "[K u4 by token in groups of 32, V u4 by token: 176 bytes]",
        ),
    ],
)
def test_the_cache_is_read_off_the_compiled_model(paged: Any, properties: str, form: str) -> None:
    assert paged.open_paged(f"{MINI},{properties}", 1).form == form


def test_what_has_no_paged_attention_is_refused(paged: Any, convert: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="no paged attention"):
        paged.PagedRunner(convert(TINY["5.5"], "--preset", "exact"), EXACT_PROPERTIES, 1)
