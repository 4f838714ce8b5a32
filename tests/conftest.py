"""What the tests share: the models, and converting them once a session."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from filelock import FileLock
from openvino import opset15 as op

import ovtq.verification.verify
from ovtq.cli.convert import main
from ovtq.ir import io
from ovtq.ir.graph import constant_of
from ovtq.models import ModelDescription, describe

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "models" / "gpt-oss-mini"
TINY = {version: ROOT / "tests" / "data" / f"tiny-transformers-{version}" for version in ("5.5", "4.57")}
FAMILIES = ROOT / "tests" / "data" / "families"
GPU_TOOLS = ROOT / "tools" / "gpu"
GPU_INSTALLED = Path(os.environ.get("OVTQ_GPU_DIR", Path.home() / ".cache" / "ovtq-gpu"))


# A conversion in a process of its own
COMMAND = [sys.executable, "-c", "import sys; from ovtq.cli.entry import convert; sys.exit(convert())"]

# Cases that a shorter one of the same test stands for in the default suite
SLOW = re.compile(
    r"""
    test_passes\.py::test_(logits_equal_the_original|attention_equals_numpy)\[4\.57-(?!exact|rotate\]|sink\ row\]).*
    |test_system\.py::test_nothing_is_open_at_the_swap\[options1\]
    |test_system\.py::test_nothing_is_open_when_a_failed_run_is_removed\[.*MemoryError\]
    |test_families\.py::test_the_first_layers_alone_keep_their_attentions\[(?!cohere2|gemma3|qwen3-moe|gptj|falcon).*
    |test_prune_commands\.py::test_converting_verifies_what_is_pruned\[flags3\]
    |test_quantize_kv\.py::test_attention_equals_numpy\[.*(K5V2|K3V8|keys\ alone).*\]
    |test_genai\.py::test_chat_whose_history_diverges\[k6v4.*\]
    |test_genai\.py::test_packed_greedy_in_every_host\[.*default-longer.*\]
    |test_bench\.py::test_what_was_pruned_is_told
    |test_convert\.py::test_the_same_conversion_gives_the_same_file\[k6v4\]
    |test_inspect\.py::test_the_bytes_are_those_of_a_compiled_model\[4\.57\]
    |test_optimum\.py::test_a_batch_with_padding\[.*beam.*\]
    |test_evaluate\.py::test_broken_conversions_are_caught
    |test_convert\.py::test_the_same_conversion_gives_the_same_file\[exact\]
    |test_weights\.py::test_verification_reads_the_copy_and_waits_for_it\[False\]
    |test_bench\.py::test_prefills_and_contexts_in_one_process
    |test_basis\.py::test_convert_finds_the_statistics_verifies_and_records
    |test_families\.py::test_exact_and_packed_in_short_texts\[(smollm2|mistral|granite|stablelm|phi|olmo2|qwen2|.*4\.57)\]
    |test_verify\.py::test_a_broken_packed_cache_is_refused\[(scales|tokens|sink).*cpu\]
    |test_verify_host\.py::test_what_is_wrong_as_hosts_load_it_alone_is_refused\[_masks_that_cancel_in_one_block\]
    |test_quantize_kv\.py::test_attention_equals_numpy\[cpu,\ (K2V3|K4V4|K6V4-from).*\]
    |test_text\.py::test_the_answer_to_a_pasted_text\[k6v4.*by_optimum\]
    |test_genai\.py::test_(beam_search\[exact\]|packed_greedy_in_every_host\[.*longer.*\])
    |test_text\.py::test_text_is_as_likely_as_to_the_exported_model\[(k6v4|exact)\ --target\ gpu-as\ hosts.*mini\]
    |test_text\.py::test_so_it_is_in_a_batch_with_padding\[.*--target\ gpu\]
    |test_text\.py::test_the_answer_to_a_pasted_text\[exact.*by_genai\]
    |test_genai\.py::test_greedy\[exact-(SDPA-short|default-longer\ than\ the\ window)\]
    |test_quantize_kv\.py::test_attention_equals_numpy\[cpu,\ (no\ window-(padding|beams)|K8V4-|values\ alone-).*\]
    |test_quantize_kv\.py::test_attention_equals_numpy\[gpu,\ (no\ window-(padding|beams)|K4V4).*\]
    |test_quantize_kv\.py::test_state_bytes_are_the_formula\[(cpu|gpu)-(2|5|8)\]
    |test_verify_layers\.py::test_(a_cut_model_holds_no_later_layers|the_first_layers_alone)\[4\.57-.*\]
    |test_verify\.py::test_scales_of_all_layers_that_are_mixed_up_are_refused\[scales_(of_another|joined).*\]
    |test_verify\.py::test_a_broken_packed_window_is_refused\[(window_lags|window_not_turned|padding_ignored)\]
    |test_verify_layers\.py::test_(packed_windows_of_the_first_layers_alone\[2-1\]|the_first_packed_layers_alone\[gpu\])
    |test_verify\.py::test_a_broken_packed_cache_is_refused\[(packed_in_another_order-gpu|not_causal-gpu)\]
    |test_passes\.py::test_attention_equals_numpy\[(truncate,\ slack|simplify|rotate)-(blocks|long\ prefill|grow)\]
    |test_passes\.py::test_attention_equals_numpy\[sink\ row,\ padded-(?!padded\ blocks).*\]
    |test_passes\.py::test_logits_equal_the_original\[5\.5-(truncate,\ slack|rotate\ (first|qk)|sink\ row,\ ex.*)\]
    |test_prune_commands\.py::test_converting_verifies_what_is_pruned\[flags0\]
    |test_verify\.py::test_a_single_packed_layer_is_right_and_forgets\[.*gpu\]
    |test_states\.py::test_bytes_are_the_devices_own\[exact-cpu-(evict|mask)\]
    """,
    re.VERBOSE,
)

UNSHORTENED = (
    "test_api",
    "test_prune_commands",
    "test_prune_faults",
    "test_prune_kv",
    "test_verify_host",
    "test_windows",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them, before the marker decides what is run."""
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


def fingerprint(folder: Path) -> dict[str, str]:
    """The digest of each file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in io.files_of(folder)
    }


def needs(*tools: str) -> pytest.MarkDecorator:
    """Skip where one of these ways to run the GPU plugin (`emulated`, `virtual`) is not installed."""
    missing = [tool for tool in tools if not (GPU_INSTALLED / tool / "installed").exists()]
    return pytest.mark.skipif(bool(missing), reason="run " + ", ".join(f"tools/gpu/install-{tool}" for tool in missing))


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> Path:
    """The tiny model, as two generations of exporters write it."""
    return TINY[request.param]


@pytest.fixture
def tiny_copy(tmp_path: Path) -> Path:
    """A tiny model of one's own, to break."""
    return Path(shutil.copytree(TINY["5.5"], tmp_path / "model"))


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of tests/data/families, unpacked once."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def unpacked(name: str) -> Path:
        folder = shared / "families" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                with tarfile.open(FAMILIES / f"{name}.tar.xz") as archive:
                    archive.extractall(folder, filter="data")
        return folder

    return unpacked


def widened(folder: Path, out: Path, window: int, was: int = 24) -> Path:
    """A copy of a model whose windows are of so many tokens."""
    shutil.copytree(folder, out)
    config = io.load_config(folder)
    (out / "config.json").write_text(json.dumps({**config, "sliding_window": window}))
    model = io.load(folder)
    for node in model.get_ops():
        value = constant_of(node.input_value(1)) if node.get_type_name() == "Add" else None
        if value is not None and value.size == 1 and value.reshape(-1)[0] == -was:
            node.input(1).replace_source_output(op.constant(np.full(value.shape, -window, value.dtype)).output(0))
    ov.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)
    return out


@pytest.fixture(autouse=True)
def _short_verification(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process a verification pastes 129 tokens, but where it is what lies beyond them that matters."""
    if request.module.__name__ not in UNSHORTENED:
        monkeypatch.setattr(ovtq.verification.verify, "PASTED", 129)


@pytest.fixture(scope="session")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Convert a model folder with `ovtq-convert` options, once for the same options, whichever worker asks first.

    Verified if asked for: what verification finds is the matter of a few tests, most look at what was written.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def run(model_dir: Path, *options: str, verified: bool = False) -> Path:
        if not (verified or any(option.startswith(("--verify", "--no-verify")) for option in options)):
            options = (*options, "--no-verify")
        name = hashlib.sha256(repr((model_dir, options)).encode()).hexdigest()[:16]
        out = shared / f"converted-{name}" / model_dir.name
        with FileLock(shared / f"converted-{name}.lock"):
            if not out.exists():
                out.parent.mkdir(exist_ok=True)
                assert main([str(model_dir), str(out), *options]) == 0
        return out

    return run


@pytest.fixture(scope="session")
def exact(convert: Callable[..., Path]) -> Path:
    """The bundled model, converted with the preset `exact` for a CPU."""
    return convert(MINI, "--preset", "exact", "--target", "cpu", verified=True)


@pytest.fixture(scope="session")
def rotate(convert: Callable[..., Path]) -> Path:
    """The bundled model, converted with the preset `rotate`."""
    return convert(MINI, "--preset", "rotate")


def load(model_dir: Path) -> tuple[ov.Model, ModelDescription]:
    """A folder's model with its description."""
    model = io.load(model_dir)
    return model, describe(model, io.load_config(model_dir))
