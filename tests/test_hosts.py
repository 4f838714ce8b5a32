"""What docs/hosts.md says of openvino_genai's paged features, of servers' configurations, and of NNCF."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import MINI, ROOT, TINY

from ovtq.ir import io
from ovtq.pipeline import LEAD

# Fields of LLMCalculatorOptions in OpenVINO Model Server's src/llm/llm_calculator.proto (06fa25b) that are of use here.
STRINGS, TYPES = {"models_path", "device", "plugin_config"}, {"LM", "VLM", "LM_CB", "VLM_CB", "AUTO"}


@pytest.fixture(scope="module")
def refused(exact: Path) -> Callable[..., str]:
    """What openvino_genai says when a converted model is asked to do something."""
    genai = pytest.importorskip("openvino_genai", reason="needs the extra [genai]")

    def ask(how: str) -> None:
        if how == "prompt lookup":
            genai.LLMPipeline(exact, "CPU", prompt_lookup=True)
        elif how == "draft":
            genai.LLMPipeline(exact, "CPU", draft_model=genai.draft_model(MINI, "CPU"))
        elif how == "as a draft":
            genai.LLMPipeline(MINI, "CPU", draft_model=genai.draft_model(exact, "CPU"))
        elif how == "continuous batching":
            genai.ContinuousBatchingPipeline(exact, genai.SchedulerConfig(), "CPU")
        else:
            config = genai.GenerationConfig(max_new_tokens=4, apply_chat_template=False, echo=True)
            genai.LLMPipeline(exact, "CPU", ATTENTION_BACKEND="SDPA").generate("The", config)

    def said(how: str) -> str:
        with pytest.raises(RuntimeError) as error:
            ask(how)
        return str(error.value)

    return said


@pytest.mark.parametrize("how", ["prompt lookup", "draft", "as a draft", "continuous batching"])
def test_the_paged_paths_error_says_what_to_pass(how: str, refused: Callable[..., str]) -> None:
    assert LEAD in refused(how)


def test_echo_is_not_of_the_stateful_path(refused: Callable[..., str]) -> None:
    assert "Echo is not supported in the stateful pipeline" in refused("echo")


def graph(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "ovms_graph.py"), str(folder), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_graph_for_model_server(exact: Path, rotate: Path) -> None:
    for folder, kind in ((exact, "LM"), (rotate, "LM_CB"), (MINI, "LM_CB")):
        text = graph(folder, "--device", "CPU").stdout
        assert text.count("{") == text.count("}")
        inside = re.search(r"LLMCalculatorOptions\]: \{(.*?)\n    \}", text, re.DOTALL)[1]
        fields = dict(re.findall(r"(\w+): (\"[^\"]*\"|'[^']*'|\w+),?\n?", inside))
        assert fields.pop("pipeline_type") == kind
        assert kind in TYPES
        assert fields.keys() <= STRINGS
        assert all(value[0] in "\"'" for value in fields.values())
        config = json.loads(fields.get("plugin_config", "'{}'").strip("'"))
        assert config == ({"ATTENTION_BACKEND": "SDPA"} if kind == "LM" else {})
    assert graph(Path("nowhere")).stderr == "ovms_graph: nowhere: no such folder\n"


@pytest.mark.slow
def test_nncf_leaves_alone_what_is_ours_if_told_so(convert: Callable[..., Path]) -> None:
    nncf = pytest.importorskip("nncf", reason="needs the extra [export]")
    folder = convert(TINY["5.5"], "--preset", "k6v4", "--target", "cpu", "--no-verify")

    def ours(model: ov.Model) -> dict[str, np.ndarray]:
        constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
        return {x.get_friendly_name(): x.data for x in constants if x.get_friendly_name().startswith("ovtq/")}

    before = ours(io.load(folder))
    scope = nncf.IgnoredScope(patterns=["ovtq/.*"], validate=False)
    after = ours(nncf.compress_weights(io.load(folder), mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=scope))
    assert len(before) > 20
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
