#!/usr/bin/env python3
"""Write an IR of any size with seeded random weights, in the layout of a published or exported int4 model.

usage: make_synthetic.py OUT_DIR [--size SIZE] [--layers N] [--seed N] [--no-tokenizer]

sizes: 20b, mini, heavy, tiny       GPT-OSS, as the published int4 model
       llama3-8b, llama3-tiny       Llama-3, as optimum-intel exports it with --weight-format int4

What it says means nothing; its size, its graph and its speed are those of the real one. The graph is what optimum-intel
exports: a template (export_template.py) with its lengths replaced, its third and fourth layers repeated, and the
constants of the rotary embedding computed from the configuration. Weights are drawn like an initialiser's and streamed
to disk a few megabytes at a time (20b: 12.6 GB, llama3-8b: 4.7 GB). The tokenizer is the bundled model's, with as many
tokens more as the vocabulary has; making it needs the `export` extra. OUT_DIR must not exist.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from synthetic_graph import TemplateError, of_size, read_template
from synthetic_weights import Rotary, write

TOOLS = Path(__file__).resolve().parent
BUNDLED = TOOLS.parent / "models" / "gpt-oss-mini"


def _frequencies(base: float, dim: int) -> np.ndarray:
    return base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def plain(config: Mapping[str, Any]) -> Rotary:
    """The rotary embedding as it is, not scaled for longer texts."""
    frequency = _frequencies(config["rope_parameters"]["rope_theta"], config["head_dim"])
    return Rotary(frequency.astype(np.float32), 1.0)


def yarn(config: Mapping[str, Any]) -> Rotary:
    """The rotary embedding scaled by YaRN (arXiv 2309.00071)."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    base, factor, original = rope["rope_theta"], rope["factor"], rope["original_max_position_embeddings"]
    frequency = _frequencies(base, dim)

    def turns_at(turns: float) -> float:  # the pair of coordinates that turns so often over the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = turns_at(rope["beta_fast"]), turns_at(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    kept = 1 - np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    scaled = frequency / factor * (1 - kept) + frequency * kept
    return Rotary(scaled.astype(np.float32), 0.1 * math.log(factor) + 1)


@dataclass(frozen=True)
class Family:
    """Models of one template: `group` weights share a scale, a head's width is the template's."""

    template: Path
    group: int
    rotary: Callable[[Mapping[str, Any]], Rotary]
    own: Mapping[str, str]  # lengths that others have not, and their names in the configuration
    sizes: dict[str, dict[str, int]]

    def lengths(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Every length that a graph of this configuration has in it, but for the head's and the group's, which stay."""
        heads, kv_heads, head = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        if hidden % self.group or inner % self.group or heads % kv_heads:
            raise TemplateError(f"hidden and intermediate size must be multiples of {self.group}, heads of KV heads")
        return {
            "hidden": hidden, "inner": inner, "twice inner": 2 * inner, "vocabulary": config["vocab_size"],
            "heads": heads, "kv heads": kv_heads, "heads a kv head": heads // kv_heads,
            "queries": heads * head, "keys": kv_heads * head,
            "hidden groups": hidden // self.group, "inner groups": inner // self.group,
        } | {name: config[key] for name, key in self.own.items()}  # fmt: skip


GPT_OSS = Family(
    TOOLS / "gpt-oss-template.xml.gz", 32, yarn,
    {"experts": "num_local_experts", "chosen": "num_experts_per_tok", "window": "sliding_window"},
    {
        "20b": dict(
            num_hidden_layers=24, hidden_size=2880, intermediate_size=2880, num_attention_heads=64,
            num_key_value_heads=8, num_local_experts=32, num_experts_per_tok=4, sliding_window=128, vocab_size=201088,
        ),
        "mini": dict(
            num_hidden_layers=6, hidden_size=384, intermediate_size=384, num_attention_heads=16,
            num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, sliding_window=128, vocab_size=8192,
        ),
        "heavy": dict(  # as export_heavy.py: the heads of 20b in narrow layers
            num_hidden_layers=4, hidden_size=512, intermediate_size=256, num_attention_heads=64,
            num_key_value_heads=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=128, vocab_size=1024,
        ),
        "tiny": dict(
            num_hidden_layers=6, hidden_size=96, intermediate_size=160, num_attention_heads=9,
            num_key_value_heads=3, num_local_experts=7, num_experts_per_tok=4, sliding_window=23, vocab_size=301,
        ),
    },
)  # fmt: skip
# A group is as wide as a head: so the groups of the output projection are as many as heads.
LLAMA = Family(
    TOOLS / "llama-template.xml.gz", 128, plain, {},
    {
        "llama3-8b": dict(
            num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128256,
        ),
        "llama3-tiny": dict(
            num_hidden_layers=6, hidden_size=384, intermediate_size=640, num_attention_heads=6,
            num_key_value_heads=2, vocab_size=301,
        ),
    },
)  # fmt: skip
FAMILIES = (GPT_OSS, LLAMA)


def tokenizer_files(vocabulary: int, folder: Path) -> None:
    """The bundled tokenizer with further tokens up to `vocabulary`, or with its first ones only, and its two IRs."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUNDLED / name, folder / name)
    text = json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8"))
    words = text["model"]["vocab"]
    have = max(words.values()) + 1
    if vocabulary < have:
        raise TemplateError(f"the bundled tokenizer has {have} tokens, the model {vocabulary}; use --no-tokenizer")
    words.update({f"⟨{index}⟩": index for index in range(have, vocabulary)})
    (folder / "tokenizer.json").write_text(json.dumps(text, ensure_ascii=False), encoding="utf-8")
    pair = convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
    for name, model in zip(("openvino_tokenizer", "openvino_detokenizer"), pair, strict=True):
        ov.save_model(model, folder / f"{name}.xml")


def family_of(size: str) -> Family:
    """The family that has a size of this name."""
    return next(family for family in FAMILIES if size in family.sizes)


def configurations(size: str, layers: int | None) -> Iterator[dict[str, Any]]:
    """The template's configuration, then that of the model to be made."""
    family = family_of(size)
    _, template = read_template(family.template)
    yield template
    config = template | family.sizes[size] | ({"num_hidden_layers": layers} if layers else {})
    if "layer_types" in template:
        config["layer_types"] = template["layer_types"][:2] * (config["num_hidden_layers"] // 2)
    yield config


def make(out: Path, size: str, layers: int | None = None, seed: int = 0, tokenizer: bool = True) -> None:
    """Write the model folder `out`. Raises TemplateError; then nothing is left."""
    family = family_of(size)
    root, _ = read_template(family.template)
    template, config = configurations(size, layers)
    root = of_size(root, config["num_hidden_layers"], family.lengths(template), family.lengths(config))
    out.mkdir(parents=True)
    try:
        write(root, family.rotary(config), out, seed)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copy(BUNDLED / "generation_config.json", out)
        if tokenizer:
            tokenizer_files(config["vocab_size"], out)
    except BaseException:
        shutil.rmtree(out)
        raise


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, metavar="OUT_DIR")
    sizes = [size for family in FAMILIES for size in family.sizes]
    p.add_argument("--size", choices=sizes, default="20b", help="default: %(default)s")
    p.add_argument("--layers", type=int, metavar="N", help="another, even number of layers")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument("--tokenizer", action=argparse.BooleanOptionalAction, default=True)
    options = p.parse_args()
    try:
        make(options.out, options.size, options.layers, options.seed, options.tokenizer)
    except (TemplateError, OSError, ImportError) as error:
        print(f"make_synthetic: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
