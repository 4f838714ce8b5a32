#!/usr/bin/env python3
"""Write the data of the lm-evaluation-harness tasks beside this file, from tests/data/heldout.txt.

    python tools/lm_eval/make_data.py

heldout.jsonl: 24 pieces of about 1,500 characters, cut between paragraphs, evenly over the text. continuation.jsonl: 40
questions, each a context of about 900 characters and four continuations of 12 words: the true one and those of three
other questions. The order of the choices comes from a fixed seed. Equal input writes equal files.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent.parent / "tests" / "data" / "heldout.txt"
PIECES, PIECE = 24, 1500
QUESTIONS, CONTEXT, WORDS, CHOICES = 40, 900, 12, 4


def pieces(text: str) -> list[str]:
    """Consecutive paragraphs joined up to at least PIECE characters; PIECES of them, evenly spread."""
    found, some = [], ""
    for paragraph in text.split("\n\n"):
        some = f"{some}\n\n{paragraph}".strip()
        if len(some) >= PIECE:
            found.append(some[: some.rindex(" ", 0, PIECE + 1)])
            some = ""
    return [found[i * len(found) // PIECES] for i in range(PIECES)]


def questions(text: str) -> list[dict[str, object]]:
    """Contexts that end between words, with the true continuation among those of other contexts."""
    starts = [i * (len(text) - 2 * CONTEXT) // QUESTIONS for i in range(QUESTIONS)]
    cut = []
    for start in starts:
        words = text[start : start + 2 * CONTEXT].split()[1:]
        length = next(n for n in range(len(words)) if len(" ".join(words[:n])) >= CONTEXT)
        cut.append((" ".join(words[:length]), " ".join(words[length : length + WORDS])))
    draw = random.Random(0)
    found = []
    for index, (context, true) in enumerate(cut):
        others = draw.sample([end for i, (_, end) in enumerate(cut) if i != index], CHOICES - 1)
        choices = [true, *others]
        draw.shuffle(choices)
        found.append({"context": context, "choices": choices, "answer": choices.index(true)})
    return found


def main() -> None:
    text = "\n\n".join(part.strip() for part in TEXT.read_text(encoding="utf-8").split("<|endoftext|>"))
    for name, rows in (("heldout", [{"text": piece} for piece in pieces(text)]), ("continuation", questions(text))):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
