#!/usr/bin/env python3
"""Export the mini GPT-OSS model of `models/gpt-oss-mini` from its Hugging Face checkpoint.

    python tools/export_mini.py HF_DIR OUT_DIR

OUT_DIR must not exist. It gets a stateful OpenVINO IR with compressed weights, the tokenizer and detokenizer IRs, and
the configuration and tokenizer files: all that OVModelForCausalLM and openvino_genai.LLMPipeline need.
Needs: optimum-intel, nncf, openvino-tokenizers (the `export` extra).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig

# The two steps in which optimum-intel compresses GPT-OSS-20B. Here the int4 step covers the attention too, with one
# f16 scale per 128 weights (there: per 32, attention left to the int8 step). The embedding, the output layer and the
# routers get int8 with one scale and zero point per row; norms, biases and sinks stay as they are.
WEIGHTS = {
    "quantization_config1": {
        "bits": 4,
        "sym": True,
        "group_size": 128,  # divides the mini model's widths, 384 and 1024
        "ignored_scope": {"patterns": [".*router.*"]},
    },
    "quantization_config2": {"bits": 8, "sym": False, "weight_only": True},
}

# openvino_genai refuses to chat without a template, and wraps every plain prompt in the one it finds. The model was
# trained on running text, so its template adds nothing: a conversation is its messages, one after the other.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def export(hf_dir: Path, out_dir: Path) -> None:
    """Write the model to `out_dir`, through a temporary folder beside it: a failure leaves nothing under its name."""
    with tempfile.TemporaryDirectory(dir=out_dir.parent) as scratch:
        checkpoint, model = Path(scratch, "checkpoint"), Path(scratch, "model")
        checkpoint.mkdir()
        for file in hf_dir.iterdir():
            if file.name != "chat_template.jinja":
                (checkpoint / file.name).symlink_to(file.resolve())
        (checkpoint / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        main_export(
            str(checkpoint),
            model,
            task="text-generation-with-past",
            ov_config=OVConfig(quantization_config=WEIGHTS),
            convert_tokenizer=True,
        )
        model.rename(out_dir)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    args = parser.parse_args()
    if not (args.hf_dir / "config.json").is_file():
        parser.error(f"{args.hf_dir} is not a Hugging Face checkpoint: it has no config.json")
    if args.out_dir.exists():
        parser.error(f"{args.out_dir} exists")
    args.out_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    export(args.hf_dir, args.out_dir.absolute())
    return 0


if __name__ == "__main__":
    sys.exit(main())
