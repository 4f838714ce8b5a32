"""The consumers on layers of GPT-OSS-20B's width: four of them, with seeded random weights (2.9 GB on disk, twice)."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import make_synthetic as synthetic

from ovtq.runtime.runner import EXACT_PROPERTIES

pytestmark = pytest.mark.slow

TEXT = (ROOT / "tests" / "data" / "heldout.txt").read_text(encoding="utf-8")[:700]  # longer than the window
TOKENS = 16
PENALTY = 3.0  # random weights soon repeat one token for ever: what equal tokens show must not be that


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino_tokenizers", reason="needs the extra [genai]")
    pytest.importorskip("transformers", reason="needs the extra [optimum]")
    out = tmp_path_factory.mktemp("size") / "wide"
    synthetic.make(out, "20b", layers=4)
    return out


def by_genai(model_dir: Path, backend: str | None = None) -> list[int]:
    """Greedy tokens through LLMPipeline."""
    genai = pytest.importorskip("openvino_genai", reason="needs the extra [genai]")
    properties = EXACT_PROPERTIES | ({"ATTENTION_BACKEND": backend} if backend else {})
    pipe = genai.LLMPipeline(model_dir, "CPU", **properties)
    config = genai.GenerationConfig(max_new_tokens=TOKENS, ignore_eos=True, apply_chat_template=False)
    config.repetition_penalty = PENALTY
    return list(pipe.generate(pipe.get_tokenizer().encode(TEXT).input_ids, config).tokens[0])


def by_optimum(model_dir: Path) -> list[int]:
    """Greedy tokens through OVModelForCausalLM."""
    optimum = pytest.importorskip("optimum.intel", reason="needs the extra [optimum]")
    transformers = pytest.importorskip("transformers")
    inputs = transformers.AutoTokenizer.from_pretrained(model_dir)(TEXT, return_tensors="pt")
    model = optimum.OVModelForCausalLM.from_pretrained(model_dir, device="CPU", ov_config=EXACT_PROPERTIES)
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "repetition_penalty": PENALTY}
    whole = model.generate(**inputs, do_sample=False, **settings)
    return whole[0, -TOKENS:].tolist()


HOSTS: dict[str, Callable[[Path], list[int]]] = {
    "LLMPipeline, default": by_genai,
    "LLMPipeline, stateful": lambda folder: by_genai(folder, "SDPA"),
    "OVModelForCausalLM": by_optimum,
}


@pytest.fixture(scope="module")
def exported(wide: Path) -> Callable[[str], list[int]]:
    """What the model as exported says through a host, asked once."""
    said: dict[str, list[int]] = {}

    def ask(host: str) -> list[int]:
        if host not in said:
            said[host] = HOSTS[host](wide)
            gc.collect()  # a model takes several GB
        return said[host]

    return ask


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("preset", ["exact", "k6v4"])
def test_the_hosts_load_it_and_generate(
    preset: str, host: str, wide: Path, exported: Callable[[str], list[int]], convert: Callable[..., Path]
) -> None:
    """`exact` says the same tokens. `k6v4` reads no codes in the call that reads the text: its first token is."""
    said = HOSTS[host](convert(wide, "--preset", preset, "--target", "cpu"))
    gc.collect()
    assert len(said) == TOKENS
    assert len(set(said)) > TOKENS // 2
    assert max(said) < synthetic.GPT_OSS.sizes["20b"]["vocab_size"]
    expected = exported(host)
    assert said == expected if preset == "exact" else said[0] == expected[0]
