"""python -m ovtq.demo: convert the bundled model, let the original and the converted one write, show what changed.

Both answer the same prompts through openvino_genai on the CPU, then the bytes of their states are counted. Ends with
exit code 1 if the answers differ.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from ovtq import files
from ovtq.cli import convert
from ovtq.cli.command import Out, Parser, path_of, run
from ovtq.cli.entry import run_command
from ovtq.errors import InputError
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

ROOT = Path(__file__).resolve().parent.parent  # of the repository: what is shown comes with it, not with the package
MODEL = ROOT / "models" / "gpt-oss-mini"
TEXT = ROOT / "tests" / "data" / "heldout.txt"
FACT = "The code of the amber is 40213."
QUESTION = "\nQuestion: what is the code of the amber?\nAnswer:"
# f32 caches and activations on both sides, so that the two texts can be compared letter by letter
PROPERTIES = {**EXACT_PROPERTIES, "ATTENTION_BACKEND": "SDPA"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run("ovtq-demo", lambda: demo(parser().parse_args(argv).out_dir, Out()), argv=argv)


def parser() -> Parser:
    """The command line."""
    p = Parser("python -m ovtq.demo", __doc__)
    p.add_argument(
        "out_dir", type=path_of, nargs="?", default=Path("demo-out"), help="where to write (default: %(default)s)"
    )
    return p


def demo(out_dir: Path, console: Out) -> int:
    """Convert into `out_dir`, and print what both models say. Raises InputError outside a clone of the repository."""
    if not MODEL.is_dir() or not TEXT.is_file():
        raise InputError(f"{MODEL}: no such folder; the demo runs in a clone of the repository, with the package of it")
    model = Path(os.path.relpath(MODEL)) if MODEL.is_relative_to(Path.cwd()) else MODEL
    asked = convert.parser().parse_args([str(model), str(out_dir), "--force", "--target", "cpu"])
    convert.convert(asked, console, Out(stderr=True))
    folders = [model, out_dir]
    story = files.read_text(TEXT)
    written = [_written(folder, story, console) for folder in folders]
    (first, text), (second, other) = written
    parted = (index for index, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1])
    same = next(parted, min(len(text), len(other)))
    console.print(f"\nthe same answer: {'yes' if first == second else 'NO'}")
    console.print(f"the same text for {same} of {len(text)} characters\n")
    console.print(_bytes(folders))
    return 0 if first == second else 1


def _written(folder: Path, story: str, console: Out) -> tuple[str, str]:
    """A model's answer about a fact hidden in the story, and how it continues the story's beginning."""
    try:
        import openvino_genai
    except ImportError as error:
        raise InputError(f"openvino_genai can't be imported ({error}); pip install '.[genai]' brings it") from None

    pipe = openvino_genai.LLMPipeline(folder, "CPU", **PROPERTIES)
    retrieve = f"{story[:2000]}\n{FACT}\n{story[2000:9000]}\n{QUESTION}"
    tokens = pipe.get_tokenizer().encode(retrieve).input_ids.shape[1]
    sampled = openvino_genai.GenerationConfig(
        max_new_tokens=60, do_sample=True, top_k=40, rng_seed=7, apply_chat_template=False
    )
    greedy = openvino_genai.GenerationConfig(max_new_tokens=6, apply_chat_template=False)
    answer = str(pipe.generate(retrieve, greedy)).strip().partition("\n")[0]
    text = str(pipe.generate(story[:400], sampled))
    console.print(f"\n{folder}", style="bold")
    console.print(f"asked for a fact {tokens:,} tokens long ago: {answer}")
    console.print(f"continues: …{text}")
    return answer, text


def _bytes(folders: Sequence[Path]) -> Table:
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
    return table


if __name__ == "__main__":
    sys.exit(run_command("demo", package="ovtq"))
