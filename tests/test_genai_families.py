"""GenAI on every model family: what its converted folder writes is what the exported one does (slow)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from conftest import MINI, ROOT, widened
from openvino import opset15 as op
from test_families import GRAPHS

import ovtq
from ovtq.errors import PreconditionFailed
from ovtq.ir import io
from ovtq.runtime.runner import EXACT_PROPERTIES

genai = pytest.importorskip("openvino_genai", reason="needs the extra [genai]")

TEXT = (ROOT / "tests" / "data" / "heldout.txt").read_text(encoding="utf-8")
VOCABULARY = 256
TOKENIZER = [path.name for path in MINI.iterdir() if "token" in path.name]
pytestmark = pytest.mark.slow


def hosted(folder: Path, out: Path) -> Path:
    """A copy with the bundled model's tokenizer, whose tokens it takes modulo its own vocabulary."""
    shutil.copytree(folder, out)
    for name in TOKENIZER:
        shutil.copy(MINI / name, out)
    model = io.load(folder)
    tables = [node for node in model.get_ops() if node.get_type_name() == "Gather" and _is_embedding(node)]
    assert len(tables) == 1
    index = tables[0].input_value(1)
    modulo = op.floor_mod(index, op.constant(np.array(VOCABULARY, index.get_element_type().to_dtype())))
    tables[0].input(1).replace_source_output(modulo.output(0))
    ov.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)
    return out


def _is_embedding(node: ov.Node) -> bool:
    shape = node.input_value(0).get_partial_shape()
    return len(shape) == 2 and shape.is_static and shape[0].get_length() == VOCABULARY


def written(folder: Path, backend: str) -> list[int]:
    """Greedily, behind a text."""
    pipe = genai.LLMPipeline(folder, "CPU", **EXACT_PROPERTIES, ATTENTION_BACKEND=backend)
    config = genai.GenerationConfig(max_new_tokens=40, ignore_eos=True, apply_chat_template=False)
    ids = pipe.get_tokenizer().encode(TEXT[:600]).input_ids
    return [int(token) for token in pipe.generate(ids, config).tokens[0]]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize("preset", ["exact", "rotate"])
@pytest.mark.parametrize("name", GRAPHS)
def test_greedy_is_the_exported_models(
    name: str, preset: str, target: str, family: Callable[[str], Path], tmp_path: Path
) -> None:
    """Exact presets, on the stateful path; what keeps the exported form under paged attention, too."""
    try:
        made = ovtq.convert(family(name), tmp_path / "made", preset=preset, target=target, verify=False)
    except PreconditionFailed as error:
        pytest.skip(str(error))
    ours, theirs = hosted(tmp_path / "made", tmp_path / "ours"), hosted(family(name), tmp_path / "theirs")
    assert written(ours, "SDPA") == written(theirs, "SDPA")
    if made.record["paged_attention"]:
        try:
            expected = written(theirs, "PA")
        except RuntimeError as error:
            pytest.skip(f"as exported not under paged attention: {error}")
        assert written(ours, "PA") == expected


TEMPLATE = (
    "{% for m in messages %}{{ m['content'][-400:] if m['role'] == 'assistant' else m['content'] }}\n{% endfor %}"
)


def chat(folder: Path, turns: list[str]) -> list[str]:
    """Answers to histories of which each shares only its beginning with the one before."""
    pipe: Any = genai.LLMPipeline(folder, "CPU", **EXACT_PROPERTIES, ATTENTION_BACKEND="SDPA")
    pipe.get_tokenizer().set_chat_template(TEMPLATE)
    answers = []
    for turn in turns:
        history = genai.ChatHistory()
        history.append({"role": "user", "content": turn})
        answers.append(pipe.generate(history, genai.GenerationConfig(max_new_tokens=24, ignore_eos=True)).texts[0])
    return answers


@pytest.mark.parametrize("name", ["gemma3", "mistral-window"])
def test_states_that_grow_until_full_are_not_cut_by_a_chat(
    name: str, family: Callable[[str], Path], tmp_path: Path
) -> None:
    """GenAI cuts tokens off the end of states that grow; of one that has lost its first rows that would be wrong."""
    folder = widened(family(name), tmp_path / "model", 300)
    settings = {"truncate-window": {"up_to": 0}}
    ovtq.convert(folder, tmp_path / "made", preset="exact", target="cpu", settings=settings, verify=False)
    turns = [TEXT[:2600], TEXT[:1500] + TEXT[8000:8400], TEXT[:2600], TEXT[:60]]
    answers = [chat(hosted(path, tmp_path / f"{path.name}-hosted"), turns) for path in (tmp_path / "made", folder)]
    assert answers[0] == answers[1]
    assert answers[0][0] == answers[0][2]
