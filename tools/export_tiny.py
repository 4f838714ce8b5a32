#!/usr/bin/env python3
"""Make the tiny GPT-OSS IR that the tests run on: seeded random weights, exported by the optimum-intel installed.

usage: export_tiny.py OUT_DIR

tests/data/tiny-transformers-5.5 comes from optimum-intel 2.2.0 with transformers 5.5.4, and
tests/data/tiny-transformers-4.57 from optimum-intel 1.27.0 with transformers 4.57.6, whose masks have another form.
Both from the same seed, so that they are the same model. Biases and sinks are random: an exporter drops zero ones.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from optimum.exporters.openvino import main_export
from transformers import GptOssConfig, GptOssForCausalLM

CONFIG = dict(
    num_hidden_layers=4, hidden_size=64, intermediate_size=64, head_dim=64, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, vocab_size=256,
    max_position_embeddings=131072, attention_bias=True, tie_word_embeddings=False,
    bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip


def export(config: dict[str, Any], out: Path, dtype: str = "float32", ov_config: Any = None) -> None:
    """Write the IR of a model of these sizes to `out`, without a tokenizer, from a checkpoint of type `dtype`."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**config)).float()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):  # by name: the order of creation differs by version
            scale = {"norm": 0.1, "sinks": 1.5, "bias": 0.3, "embed": 1.0}
            kind = next((kind for kind in scale if kind in name.rsplit(".", 2)[-2] + name.rsplit(".", 1)[-1]), None)
            noise = torch.randn(parameter.shape, generator=draw)
            fan_in = parameter.shape[-2] if "experts" in name else parameter.shape[-1]
            parameter.copy_(noise * (scale[kind] if kind else fan_in**-0.5) + (1.0 if kind == "norm" else 0.0))
    with tempfile.TemporaryDirectory() as checkpoint:
        model.to(getattr(torch, dtype)).save_pretrained(checkpoint)
        main_export(
            checkpoint,
            out,
            task="text-generation-with-past",
            stateful=True,
            ov_config=ov_config,
            convert_tokenizer=False,
        )
    for extra in out.glob("*tokenizer*"):
        shutil.rmtree(extra) if extra.is_dir() else extra.unlink()


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    export(CONFIG, Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
