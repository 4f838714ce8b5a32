#!/usr/bin/env python3
"""Export the graph of GPT-OSS at an odd small size, in the layout of the published int4 model, without its weights.

usage: export_template.py template OUT.xml.gz    what make_synthetic_gpt_oss.py makes models of other sizes from
       export_template.py check OUT.xml.gz       another size, which tests hold such a model to

The file is the IR's XML; constants of up to 64 bytes have their bytes beside offset and size (`value`, hexadecimal),
the others are only shapes. It is exported from random weights in bfloat16 by optimum-intel's own recipe for
openai/gpt-oss-20b: experts in i4, symmetric, a scale for 32 weights; attention, routers, embedding and output layer in
u8 with scale and zero point for a row. All lengths of the template differ from each other and from every number with
another meaning in the graph, so that a number in it says which length it is. Needs the `export` extra.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from export_tiny import CONFIG, export
from optimum.intel import OVConfig
from optimum.intel.openvino.configuration import _DEFAULT_4BIT_WQ_CONFIGS

INLINE = 64  # bytes
RECIPE = _DEFAULT_4BIT_WQ_CONFIGS["openai/gpt-oss-20b"]
SIZES = {
    "template": CONFIG | dict(
        num_hidden_layers=4, hidden_size=352, intermediate_size=416, num_attention_heads=70, num_key_value_heads=10,
        num_local_experts=17, num_experts_per_tok=9, sliding_window=29, vocab_size=509,
    ),
    "check": CONFIG | dict(
        num_hidden_layers=6, hidden_size=96, intermediate_size=160, num_attention_heads=9, num_key_value_heads=3,
        num_local_experts=7, num_experts_per_tok=4, sliding_window=23, vocab_size=301,
    ),
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


def export_size(name: str, out: Path) -> None:
    """The IR of one of the SIZES, whole."""
    export(SIZES[name], out, dtype="bfloat16", ov_config=OVConfig(quantization_config=RECIPE))


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in SIZES:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        export_size(sys.argv[1], Path(folder, "ir"))
        Path(sys.argv[2]).write_bytes(gzip.compress(skeleton(Path(folder, "ir")), 9, mtime=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
