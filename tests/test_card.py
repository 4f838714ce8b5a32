"""The model card in OUT_DIR: read by the hub, of the right model, and its code runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY

import ovtq
from ovtq import card

HUB = """---
license: apache-2.0
base_model:
- openai/gpt-oss-20b
base_model_relation: quantized
tags:
- secret
---
# gpt-oss-20b-int4-ov
"""


def metadata(text: str) -> dict:
    yaml = pytest.importorskip("yaml", reason="comes with the extra [dev]")
    return yaml.safe_load(text.split("---\n")[1])


def test_of_a_model_with_a_card(tmp_path: Path) -> None:
    source = Path(shutil.copytree(TINY["5.5"], tmp_path / "model"))
    (source / "README.md").write_text(HUB, encoding="utf-8")
    made = ovtq.convert(source, tmp_path / "out", preset="k6v4", target="cpu", verify_layers=2)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert metadata(text) == {
        "library_name": "openvino",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": ["openai/gpt-oss-20b"],
        "tags": ["openvino", "ovtq", "kv-cache"],
    }
    assert (tmp_path / "out" / "README.original.md").read_text(encoding="utf-8") == HUB
    assert (source / "README.md").read_text(encoding="utf-8") == HUB
    for step in made.passes:
        assert f"| {step.name} | " in text
    assert f"takes {made.record['state_bytes']['after']['per_token']:,} bytes per token" in text
    assert f"within {made.verification.relative:.2g} of the scale" in text
    assert "over 2 of 4 layers" in text
    assert 'ATTENTION_BACKEND="SDPA"' in text


def test_of_one_without(convert: Callable[..., Path], tmp_path: Path) -> None:
    plain = convert(TINY["5.5"], "--preset", "rotate", "--no-verify")
    text = (plain / "README.md").read_text(encoding="utf-8")
    assert metadata(text)["base_model"] == TINY["5.5"].name
    assert "license" not in metadata(text)
    assert "**Not verified**" in text
    assert "SDPA" not in text
    assert not (plain / "README.original.md").exists()
    ovtq.convert(TINY["5.5"], tmp_path / "out", preset="rotate", verify=False, card=False)
    assert not (tmp_path / "out" / "README.md").exists()


def test_base_model_is_a_name_on_the_hub_where_the_configuration_tells_one(tiny_copy: Path) -> None:
    config = tiny_copy / "config.json"
    text = config.read_text(encoding="utf-8")
    for name, expected in (("openai/gpt-oss-20b", "openai/gpt-oss-20b"), ("/home/someone/model", "model")):
        config.write_text(re.sub(r"^\{", f'{{"_name_or_path": "{name}",', text), encoding="utf-8")
        assert card.base_of(tiny_copy) == expected


def test_no_front_matter_is_none() -> None:
    assert card.front_matter("# A model\n---\nlicense: mit\n---\n") == {}
    assert card.front_matter("---\r\nlicense: mit\r\n---\r\n") == {"license": "mit"}
