"""Greedy tokens of a model on the GPU, through both hosts, as JSON: run by test_gpu.py on the emulated device.

usage: tools/gpu/emulated python tests/on_gpu.py MODEL_DIR PROMPT TOKENS [KEY=VALUE…]
"""

from __future__ import annotations

import json
import sys
import tempfile

import openvino_genai as genai
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer


def main(model_dir: str, prompt: str, tokens: str, *settings: str) -> None:
    """Print what each host says, and, if its cache is the plugin's own, the precision that this has when compiled."""
    properties = {"INFERENCE_PRECISION_HINT": "f16", **dict(setting.split("=", 1) for setting in settings)}
    pipe = genai.LLMPipeline(model_dir, "GPU", ATTENTION_BACKEND="SDPA", **properties)
    config = genai.GenerationConfig(max_new_tokens=int(tokens), ignore_eos=True, apply_chat_template=False)
    said = pipe.generate(pipe.get_tokenizer().encode(prompt).input_ids, config).tokens[0]
    del pipe
    with tempfile.TemporaryDirectory() as cache:  # else the host leaves one in the model's folder
        model = OVModelForCausalLM.from_pretrained(
            model_dir, device="GPU", ov_config={**properties, "CACHE_DIR": cache}
        )
    inputs = AutoTokenizer.from_pretrained(model_dir)(prompt, return_tensors="pt")
    whole = model.generate(**inputs, max_new_tokens=int(tokens), min_new_tokens=int(tokens), do_sample=False)
    ops = model.request.get_compiled_model().get_runtime_model().get_ops()
    infos = [{key: value.astype(str) for key, value in node.get_rt_info().items()} for node in ops]
    caches = sorted({info["outputPrecisions"].split(",")[0] for info in infos if info["layerType"] == "kv_cache"})
    print(json.dumps({"genai": list(said), "optimum": whole[0, -int(tokens) :].tolist(), "caches": caches}))


if __name__ == "__main__":
    main(*sys.argv[1:])
