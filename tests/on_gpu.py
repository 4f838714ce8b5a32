"""Greedy tokens of a model on the GPU, through both hosts, as JSON: run by test_gpu.py on the emulated device.

usage: tools/gpu/emulated python tests/on_gpu.py MODEL_DIR PROMPT TOKENS HOSTS [KEY=VALUE…]

HOSTS are genai, optimum, chat, or some with a comma between; chat is a conversation of genai that goes on, begins anew
with other words, and goes back, and what is said to the same prompts one by one. All are loaded by `ovtq.load`.
"""

from __future__ import annotations

import json
import sys
import tempfile

import ovtq

OTHER, ELSE = "In the year 1812 the army of Napoleon", "On the coast of Ireland there are"


def generated_by_genai(model_dir: str, prompt: str, tokens: int, properties: dict[str, str]) -> dict[str, list]:
    """Its tokens."""
    import openvino_genai as genai

    pipe = ovtq.load(model_dir, "genai", "GPU", ATTENTION_BACKEND="SDPA", **properties)
    config = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, apply_chat_template=False)
    return {"genai": list(pipe.generate(pipe.get_tokenizer().encode(prompt).input_ids, config).tokens[0])}


def chat(model_dir: str, prompt: str, tokens: int, properties: dict[str, str], device: str = "GPU") -> dict[str, list]:
    """Its answers as the histories come, and to each as a prompt of its own, each asked twice.

    Those are another pipeline's, for one that had a history takes no texts.
    """
    import openvino_genai as genai

    pipe, fresh = (ovtq.load(model_dir, "genai", device, ATTENTION_BACKEND="SDPA", **properties) for _ in range(2))
    tokenizer = pipe.get_tokenizer()
    tokenizer.set_chat_template("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    config = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
    plain = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, apply_chat_template=False)
    answers: list[str] = []
    histories = []
    for words in ([prompt], [prompt, OTHER], [prompt[: len(prompt) // 2], ELSE], [prompt]):
        history = genai.ChatHistory()
        for number, text in enumerate(words):
            if number:
                history.append({"role": "assistant", "content": answers[0]})
            history.append({"role": "user", "content": text})
        answers.append(str(pipe.generate(history, config).texts[0]))
        histories.append(history)
    prompts = [tokenizer.apply_chat_template(history, add_generation_prompt=True) for history in histories]
    alone = [[str(fresh.generate([text], plain).texts[0]) for _ in range(2)] for text in prompts]
    return {"chat": answers, "alone": alone}


def generated_by_optimum(model_dir: str, prompt: str, tokens: int, properties: dict[str, str]) -> dict[str, list]:
    """Its tokens, and, if the cache is the plugin's own, the precision that this has when compiled."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as cache:  # else the host leaves one in the model's folder
        config = {"CACHE_DIR": "" if ovtq.properties(model_dir) else cache, **properties}
        model = ovtq.load(model_dir, "optimum", "GPU", ov_config=config)
    inputs = AutoTokenizer.from_pretrained(model_dir)(prompt, return_tensors="pt")
    whole = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    ops = model.request.get_compiled_model().get_runtime_model().get_ops()
    infos = [{key: value.astype(str) for key, value in node.get_rt_info().items()} for node in ops]
    caches = sorted({info["outputPrecisions"].split(",")[0] for info in infos if info["layerType"] == "kv_cache"})
    return {"optimum": whole[0, -tokens:].tolist(), "caches": caches}


def main(model_dir: str, prompt: str, tokens: str, hosts: str, *settings: str) -> None:
    """Print what each host says."""
    properties = {"INFERENCE_PRECISION_HINT": "f16", **dict(setting.split("=", 1) for setting in settings)}
    found: dict[str, list] = {}
    for host in hosts.split(","):
        said = {"genai": generated_by_genai, "optimum": generated_by_optimum, "chat": chat}[host]
        found |= said(model_dir, prompt, int(tokens), properties)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
