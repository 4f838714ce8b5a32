"""Models on a GPU through one model cache, as JSON: run by test_kernels_on_gpu.py on the emulated device.

usage: tools/gpu/emulated python tests/cached_on_gpu.py CACHE_DIR MODEL_DIR…

For each, in turn: whether it came from the cache, and some logits of the last of 40 tokens, which reads packed ones.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import openvino as ov

from ovtq.runtime.loading import properties

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}


def asked(cache: str, model_dir: str) -> dict[str, object]:
    """What one says."""
    core = ov.Core()
    given = {**SETTINGS, **properties(model_dir), "CACHE_DIR": cache}
    compiled = core.compile_model(f"{model_dir}/openvino_model.xml", "GPU", given)
    request = compiled.create_infer_request()
    names = {port.any_name for port in compiled.inputs}
    ids = np.random.RandomState(0).randint(0, 100, (1, 40)).astype(np.int64)
    for new in (slice(0, 38), slice(38, 39), slice(39, 40)):
        step = {
            "input_ids": ids[:, new],
            "attention_mask": np.ones((1, new.stop), np.int64),
            "position_ids": np.arange(new.start, new.stop)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits = request.infer({name: some for name, some in step.items() if name in names})[0]
    cached = bool(compiled.get_property("LOADED_FROM_CACHE"))
    return {"from_cache": cached, "logits": logits[0, -1, :64].astype(float).tolist()}


if __name__ == "__main__":
    print(json.dumps([asked(sys.argv[1], model_dir) for model_dir in sys.argv[2:]]))
