#!/usr/bin/env python3
"""Export the graph of a model at an odd small size, in the layout of an int4 model, without its weights.

usage: export_template.py gpt-oss|llama template OUT.xml.gz    what make_synthetic.py makes models of other sizes from
       export_template.py gpt-oss|llama check OUT.xml.gz       another size, which tests hold such a model to

The file is the IR's XML; constants of up to 64 bytes have their bytes beside offset and size (`value`, hexadecimal),
the others are only shapes. It is exported from random weights in bfloat16 by optimum-intel's own recipes. GPT-OSS: that
for openai/gpt-oss-20b, experts in i4, symmetric, a scale for 32 weights; attention, routers, embedding and output layer
in u8 with scale and zero point for a row. Llama: that of --weight-format int4 for a model without a recipe of its name,
u4 with a scale and a zero point for 128 weights; embedding and output layer in u8 as before. All lengths of a template
differ from each other and from every number with another meaning in the graph, so that a number in it says which length
it is. Needs the `export` extra.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import export_families
import export_tiny
import torch
from optimum.intel import OVConfig
from optimum.intel.openvino.configuration import _DEFAULT_4BIT_WQ_CONFIGS

INLINE = 64  # bytes
GPT_OSS = _DEFAULT_4BIT_WQ_CONFIGS["openai/gpt-oss-20b"]
LLAMA = dict(
    head_dim=128, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=False,
    rope_parameters=dict(rope_type="default", rope_theta=5e5), bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "gpt-oss": {
        "template": export_tiny.CONFIG | dict(
            num_hidden_layers=4, hidden_size=352, intermediate_size=416, num_attention_heads=70,
            num_key_value_heads=10, num_local_experts=17, num_experts_per_tok=9, sliding_window=29, vocab_size=509,
        ),
        "check": export_tiny.CONFIG | dict(
            num_hidden_layers=6, hidden_size=96, intermediate_size=160, num_attention_heads=9,
            num_key_value_heads=3, num_local_experts=7, num_experts_per_tok=4, sliding_window=23, vocab_size=301,
        ),
    },
    "llama": {
        "template": LLAMA | dict(
            num_hidden_layers=4, hidden_size=1152, intermediate_size=896, num_attention_heads=48,
            num_key_value_heads=6, vocab_size=509,
        ),
        "check": LLAMA | dict(
            num_hidden_layers=6, hidden_size=384, intermediate_size=640, num_attention_heads=6,
            num_key_value_heads=2, vocab_size=301,
        ),
    },
}  # fmt: skip


def skeleton(model_dir: Path) -> bytes:
    """The XML of an IR, with config.json in it and the bytes of its small constants."""
    tree = ElementTree.parse(model_dir / "openvino_model.xml")
    weights = (model_dir / "openvino_model.bin").read_bytes()
    for data in tree.iter("data"):
        if "offset" in data.attrib and int(data.get("size")) <= INLINE:
            start = int(data.get("offset"))
            data.set("value", weights[start : start + int(data.get("size"))].hex())
    config = ElementTree.SubElement(tree.getroot(), "config")
    config.text = json.dumps(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
    return ElementTree.tostring(tree.getroot())


def export_size(family: str, name: str, out: Path) -> None:
    """The IR of one of the SIZES, whole."""
    sizes = SIZES[family][name]
    if family == "gpt-oss":
        export_tiny.export(sizes, out, dtype="bfloat16", ov_config=OVConfig(quantization_config=GPT_OSS))
        return
    with tempfile.TemporaryDirectory() as checkpoint:
        export_families.weighed(family, sizes).to(torch.bfloat16).save_pretrained(checkpoint)
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", checkpoint]
        command += ["--task", "text-generation-with-past", "--weight-format", "int4", "--disable-convert-tokenizer"]
        subprocess.run([*command, str(out)], check=True)


def main() -> int:
    if len(sys.argv) != 4 or sys.argv[1] not in SIZES or sys.argv[2] not in SIZES[sys.argv[1]]:
        print(__doc__, file=sys.stderr)
        return 2
    family, name, out = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        export_size(family, name, Path(folder, "ir"))
        Path(out).write_bytes(gzip.compress(skeleton(Path(folder, "ir")), 9, mtime=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
