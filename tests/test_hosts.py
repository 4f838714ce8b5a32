"""What docs/hosts.md says of openvino_genai's paged features, of other hosts, of servers' configurations, of NNCF."""

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


# ------------------------------------------------------------------------------------------ other hosts

INPUTS = {"input_ids": (1, 1), "attention_mask": (1, 256), "position_ids": (1, 1), "beam_idx": (1,)}


def benchmarked(model: Path, inputs: Path | None) -> subprocess.CompletedProcess[str]:
    """benchmark_app for 64 steps, with its own random inputs or with files."""
    shapes = ",".join(f"{name}[{','.join(map(str, shape))}]" for name, shape in INPUTS.items())
    command = [sys.executable, "-c", "from openvino.tools.benchmark.main import main; main()"]
    command += ["-m", str(model / "openvino_model.xml"), "-data_shape", shapes, "-niter", "64", "-api", "sync"]
    if inputs:
        command += ["-i", *(f"{name}:{inputs / name}.npy" for name in INPUTS)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_benchmark_app_comes_to_its_end(exact: Path, tmp_path: Path) -> None:
    """With a mask for all steps, and one sequence; its random beam_idx no model takes, exported or converted."""
    for name, shape in INPUTS.items():
        np.save(tmp_path / name, np.zeros(shape, np.int32) if name == "beam_idx" else np.ones(shape, np.int64))
    done = benchmarked(exact, tmp_path)
    assert done.returncode == 0, done.stdout
    assert re.search(r"Count: +64 iterations", done.stdout)
    for model, said in ((MINI, "is outside of the allowed interval"), (exact, "ovtq refuses this call")):
        refused = benchmarked(model, None)
        assert refused.returncode != 0
        assert said in refused.stdout + refused.stderr


@pytest.mark.slow
def test_assisted_generation_is_not_of_optimums_models(exact: Path) -> None:
    """Exported or converted: it cuts a cache that these hosts keep in the model."""
    optimum = pytest.importorskip("optimum.intel", reason="needs the extra [optimum]")
    torch = pytest.importorskip("torch")
    for folder in (MINI, exact):
        model = optimum.OVModelForCausalLM.from_pretrained(folder, device="CPU")
        for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}):
            with pytest.raises(AttributeError, match="no attribute 'crop'"):
                model.generate(torch.tensor([[1, 2, 3, 1, 2]]), max_new_tokens=8, do_sample=False, **how)


@pytest.mark.slow
def test_langchain_writes_what_optimum_does(convert: Callable[..., Path]) -> None:
    langchain = pytest.importorskip("langchain_huggingface", reason="pip install langchain-huggingface")
    optimum = pytest.importorskip("optimum.intel", reason="needs the extra [optimum]")
    folder = str(convert(MINI, "--preset", "k6v4", "--target", "cpu"))
    llm = langchain.HuggingFacePipeline.from_model_id(
        model_id=folder, task="text-generation", backend="openvino", model_kwargs={"device": "CPU"},
        pipeline_kwargs={"max_new_tokens": 12, "do_sample": False},
    )  # fmt: skip
    prompt, read = "What is a KV cache?", llm.pipeline.tokenizer
    model = optimum.OVModelForCausalLM.from_pretrained(folder, device="CPU")
    ids = model.generate(**read(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert llm.invoke(prompt) == read.decode(ids[0], skip_special_tokens=True) != prompt


@pytest.mark.slow
def test_llama_index_writes_what_genai_does(convert: Callable[..., Path]) -> None:
    name = "llama_index.llms.openvino_genai"
    llama = pytest.importorskip(name, reason="pip install llama-index-llms-openvino-genai")
    genai = pytest.importorskip("openvino_genai", reason="needs the extra [genai]")
    folder = str(convert(MINI, "--preset", "k6v4", "--target", "cpu"))
    llm = llama.OpenVINOGenAILLM(model_path=folder, device="CPU")
    llm.config.max_new_tokens = 12
    prompt = "What is a KV cache?"
    whole = llm.complete(prompt).text
    streamed = "".join(part.delta for part in llm.stream_complete(prompt))
    pipe = genai.LLMPipeline(folder, "CPU")
    assert whole == streamed == str(pipe.generate(prompt, llm.config)) != ""
