#!/usr/bin/env python3
"""Let two model folders answer the same prompts through openvino_genai, and count the bytes of their states.

usage: demo.py ORIGINAL CONVERTED
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openvino_genai
from rich.console import Console
from rich.table import Table

from ovtq.runner import EXACT_PROPERTIES, Runner

FACT = "The code of the amber is 40213."
QUESTION = "\nQuestion: what is the code of the amber?\nAnswer:"
TEXT = Path(__file__).resolve().parent.parent / "tests" / "data" / "heldout.txt"
# f32 caches and activations on both sides, so that the two texts can be compared letter by letter
PROPERTIES = {**EXACT_PROPERTIES, "ATTENTION_BACKEND": "SDPA"}


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    console = Console(highlight=False)
    story = TEXT.read_text(encoding="utf-8")
    retrieve = f"{story[:2000]}\n{FACT}\n{story[2000:9000]}\n{QUESTION}"
    folders = [Path(arg) for arg in sys.argv[1:]]
    tokens, written = 0, []
    for folder in folders:
        pipe = openvino_genai.LLMPipeline(folder, "CPU", **PROPERTIES)
        tokens = pipe.get_tokenizer().encode(retrieve).input_ids.shape[1]
        sampled = openvino_genai.GenerationConfig(
            max_new_tokens=60, do_sample=True, top_k=40, rng_seed=7, apply_chat_template=False
        )
        greedy = openvino_genai.GenerationConfig(max_new_tokens=6, apply_chat_template=False)
        answer = str(pipe.generate(retrieve, greedy)).strip().partition("\n")[0]
        written.append((answer, str(pipe.generate(story[:400], sampled))))
        console.print(f"\n[bold]{folder}[/bold]")
        console.print(f"asked for a fact {tokens:,} tokens long ago: {answer}", markup=False)
        console.print(f"continues: …{written[-1][1]}", markup=False)
        del pipe
    (first, text), (second, other) = written
    parted = (index for index, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1])
    same = next(parted, min(len(text), len(other)))
    console.print(f"\nthe same answer: {'yes' if first == second else 'NO'}")
    console.print(f"the same text for {same} of {len(text)} characters\n")

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("bytes of all states (f32)")
    for folder in folders:
        table.add_column(str(folder), justify="right")
    runners = [Runner(folder / "openvino_model.xml", "CPU", EXACT_PROPERTIES) for folder in folders]
    past = 0
    for context in (256, 1024, 4096):
        for runner in runners:
            for start in range(past, context, 512):
                runner.step(np.ones((1, min(512, context - start)), np.int64))
        past = context
        table.add_row(f"after {context:,} tokens", *(f"{runner.state_bytes():,}" for runner in runners))
    console.print(table)
    return 0 if first == second else 1


if __name__ == "__main__":
    sys.exit(main())
