#!/usr/bin/env python3
"""Make the tiny IRs of tests/data/families, one of each model family: seeded random weights, exported, packed by xz.

usage: export_families.py OUT_DIR [NAME…]

Without names, all that the installed transformers can export: optimum-intel 2.2.0 takes Gemma with transformers up to
5.0, and the 4.57 forms and Llama-4 need transformers 4.57.6 (with huggingface_hub below 1.0). Weights have four values
(±1 and ±3 times a scale), so that an archive of a model takes a fifteenth of it.
"""

from __future__ import annotations

import io
import lzma
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from optimum.exporters.openvino import main_export
from transformers import AutoConfig, AutoModelForCausalLM

FILES = ("config.json", "openvino_model.bin", "openvino_model.xml")
TOKENS = dict(vocab_size=256, bos_token_id=1, eos_token_id=2)
SIZES = dict(
    **TOKENS, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=4096, pad_token_id=0,
)  # fmt: skip
GPT = dict(**TOKENS, n_positions=2048, n_embd=128, n_layer=2, n_head=2)
FALCON = dict(
    **TOKENS, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, new_decoder_architecture=False, bias=False
)
HEAD = dict(**SIZES, head_dim=64)
MIXED = ["sliding_attention", "full_attention"]
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=1024,
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope", type="longrope", short_factor=[1.0] * 24, long_factor=[2.0] * 24, rope_theta=1e4,
    partial_rotary_factor=0.75, original_max_position_embeddings=4096,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)
# How attention differs: heads, width of a head, window, norms of queries and keys, biases, RoPE, form of the residual.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", HEAD | dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "smollm2": ("llama", SIZES | dict(hidden_size=192, num_attention_heads=3, num_key_value_heads=1)),
    "mistral": ("mistral", HEAD | dict(sliding_window=None)),
    "mistral-window": ("mistral", HEAD | dict(sliding_window=24)),
    "qwen2": ("qwen2", SIZES | dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)),
    "qwen2-window": (
        "qwen2",
        SIZES
        | dict(hidden_size=128, num_attention_heads=2, use_sliding_window=True, sliding_window=24, max_window_layers=1),
    ),
    "qwen3": ("qwen3", HEAD | dict(head_dim=128)),
    "qwen3-moe": ("qwen3_moe", HEAD | EXPERTS),
    "gemma2": ("gemma2", HEAD | dict(sliding_window=24, query_pre_attn_scalar=64, layer_types=MIXED)),
    "gemma3": (
        "gemma3_text",
        HEAD
        | dict(head_dim=256, num_key_value_heads=1, sliding_window=24, query_pre_attn_scalar=256, layer_types=MIXED),
    ),
    "phi3": ("phi3", SIZES | dict(hidden_size=192, num_attention_heads=2, sliding_window=None)),
    "phi4-mini": (
        "phi3",
        SIZES | dict(hidden_size=256, sliding_window=None, partial_rotary_factor=0.75, rope_scaling=LONGROPE),
    ),
    "phi": ("phi", SIZES | dict(hidden_size=160, num_attention_heads=2, partial_rotary_factor=0.4)),
    "smollm3": ("smollm3", HEAD | dict(no_rope_layer_interval=2)),
    "granite": ("granite", HEAD | dict(attention_multiplier=0.0625, residual_multiplier=0.5, logits_scaling=8.0)),
    "cohere2": ("cohere2", HEAD | dict(sliding_window=24, layer_types=MIXED)),
    "olmo2": ("olmo2", SIZES | dict(hidden_size=128, num_attention_heads=2)),
    "stablelm": (
        "stablelm",
        SIZES | dict(hidden_size=160, num_attention_heads=2, partial_rotary_factor=0.25, use_qkv_bias=True),
    ),
    "falcon": ("falcon", FALCON | dict(multi_query=True, parallel_attn=True, alibi=False)),
    "gpt-neox": ("gpt_neox", SIZES | dict(hidden_size=128, num_attention_heads=2, rotary_pct=0.25)),
    "gptj": ("gptj", GPT | dict(rotary_dim=8)),
    # refused, each for a reason of its own
    "falcon-alibi": ("falcon", FALCON | dict(multi_query=False, alibi=True, bias=True)),
    "lfm2": ("lfm2", SIZES | dict(layer_types=["conv", "full_attention"])),
    "llama4": (
        "llama4_text",
        HEAD
        | dict(num_local_experts=2, attention_chunk_size=24, interleave_moe_layer_step=1, intermediate_size_mlp=64),
    ),
}
# of these, also as an older exporter writes them
OLDER = ("llama3", "gemma2")


def weigh(model: torch.nn.Module) -> None:
    """Seeded weights, the same whatever order a version of transformers makes them in; norms keep their middle."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 2:
                four = 2.0 * torch.randint(0, 4, parameter.shape, generator=draw) - 3
                gain = 1.6 if any(part in name for part in ("q_proj", "k_proj", "qkv", "query_key_value")) else 1.0
                scale = 1.0 if "embed" in name or "wte" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(four / 5**0.5 * gain * scale)
            else:
                size = 0.3 if name.endswith("bias") else 0.1
                parameter.add_(size * torch.randn(parameter.shape, generator=draw))


def weighed(family: str, sizes: dict[str, Any]) -> torch.nn.Module:
    """A model of these sizes, at f32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval().float()
    weigh(model)
    return model


def export(family: str, sizes: dict[str, Any], out: Path) -> None:
    """Write the IR of a model of these sizes to `out`."""
    model = weighed(family, sizes)
    with tempfile.TemporaryDirectory() as checkpoint:
        model.save_pretrained(checkpoint)
        main_export(checkpoint, out, task="text-generation-with-past", stateful=True, convert_tokenizer=False)


def pack(folder: Path, archive: Path) -> None:
    """The files of an IR as one archive, the same bytes for the same files."""
    with (
        lzma.open(archive, "wb", preset=9 | lzma.PRESET_EXTREME) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name in FILES:
            content = (folder / name).read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    out, older = Path(arguments[0]), transformers.__version__.startswith("4.")
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in arguments[1:] or FAMILIES:
        archive = out / f"{name}{'-4.57' if older and name in OLDER else ''}.tar.xz"
        with tempfile.TemporaryDirectory() as folder:
            try:
                export(*FAMILIES[name], Path(folder))
            except (ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError) as error:
                print(f"{name}: not exported with transformers {transformers.__version__}: {error}", file=sys.stderr)
                failed += 1
                continue
            pack(Path(folder), archive)
        print(f"{archive}: {archive.stat().st_size:,} bytes")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
