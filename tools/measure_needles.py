#!/usr/bin/env python3
"""Needle in a haystack: do models with other caches still find a fact hidden in a text? On the CPU.

usage: measure_needles.py TEXT MODEL_DIR[,KEY=VALUE]… … [--lengths 1024,2048,4096] [--depths 0.1,…] [--trials 4]

A haystack is TEXT with "The code of the amber is 40213." at a depth (0: at its beginning, 1: right before the
question) and "Question: what is the code of the amber?", as the bundled model was trained to answer it, at its end. It
is prefilled in calls of --chunk tokens, since one call reads its own tokens before they are compressed, and answered
greedily; right is the code itself. All models get the same seeded haystacks.
Prints how many answers are right by length and depth, and how many are those of the first model. With --needles N,
N codes are hidden, one at the depth, the others anywhere, and that one is asked for. Properties are the CPU plugin's,
everything else is f32, as in measure_kld.py. Needs tokenizers (the `eval` extra) and the first MODEL_DIR's
tokenizer.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure_kld import Parser, check, open_candidate, positive, read_tokens, run
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer

from ovtq.errors import InputError
from ovtq.runner import Runner

# of train_mini.py, which can't be imported without torch: its first wording, and nouns of its list
FACT = "The code of the {key} is {code}."
QUESTION = "\n\nQuestion: what is the code of the {key}?\nAnswer:"
NOUNS = """
amber anchor apple arrow atlas badge basin beacon birch blade bloom bolt brick bridge brook cabin canal candle castle
cedar chain cliff cloud comet copper coral crane crown delta desert dune eagle ember falcon fern field flame flint
""".split()  # noqa: SIM905
DIGITS = 5
ANSWER_TOKENS = 8  # the code is 5 or 6 of them


@dataclass(frozen=True)
class Haystack:
    """A prompt of `length` tokens, ids (1, length), and the code it asks for."""

    length: int
    depth: float
    ids: np.ndarray
    code: str


def haystack(
    text: np.ndarray, tokenizer: Tokenizer, length: int, depth: float, needles: int, draw: random.Random
) -> Haystack:
    """`needles` facts in a piece of `text`, the one asked for at `depth`. Raises InputError if they don't fit."""
    keys = draw.sample(NOUNS, needles)
    codes = [f"{number:0{DIGITS}d}" for number in draw.sample(range(10**DIGITS), needles)]
    # a line end is a token of its own only if text follows it
    facts = [
        tokenizer.encode(f"\n{FACT.format(key=key, code=code)}\nx").ids[:-1]
        for key, code in zip(keys, codes, strict=True)
    ]
    question = tokenizer.encode(QUESTION.format(key=keys[0])).ids
    room = length - len(question) - sum(map(len, facts))
    if room < 1:
        raise InputError(f"--lengths: {length} tokens are too few for {needles} facts and a question")
    if room > len(text):
        raise InputError(f"TEXT: {len(text)} tokens, {room} are needed for a length of {length}")
    first = draw.randrange(len(text) - room + 1)
    places = [round(depth * room), *(draw.randint(0, room) for _ in facts[1:])]
    ids: list[int] = []
    past = 0
    for place, fact in sorted(zip(places, facts, strict=True)):
        ids += [*text[first + past : first + place].tolist(), *fact]
        past = place
    ids += [*text[first + past : first + room].tolist(), *question]
    return Haystack(length, depth, np.array([ids], np.int64), codes[0])


def answer(runner: Runner, tokenizer: Tokenizer, ids: np.ndarray, chunk: int) -> str:
    """What the model writes greedily after `ids`, read in chunks, up to the end of the line."""
    runner.reset()
    written: list[int] = []
    *before, step = (ids[:, i : i + chunk] for i in range(0, ids.shape[1], chunk))
    for part in before:
        runner.step(part)
    while len(written) < ANSWER_TOKENS:
        written.append(int(runner.step(step)[0, -1].argmax()))
        if "\n" in (text := tokenizer.decode(written)).lstrip():
            break
        step = np.array([written[-1:]], np.int64)
    return text.strip().partition("\n")[0]


def right(said: str, code: str) -> bool:
    """Whether the first number of an answer is the code."""
    number = re.search(r"\d+", said)
    return number is not None and number.group() == code


def table(haystacks: Sequence[Haystack], hits: Sequence[bool]) -> Table:
    """Right answers by length (rows) and depth (columns)."""
    lengths, depths = ([*dict.fromkeys(getattr(h, name) for h in haystacks)] for name in ("length", "depth"))
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("tokens", *(f"at {depth:g}" for depth in depths), "all"):
        shown.add_column(name, justify="right", no_wrap=True)

    def share(length: int | None, depth: float | None) -> str:
        some = [
            hit
            for h, hit in zip(haystacks, hits, strict=True)
            if length in (None, h.length) and depth in (None, h.depth)
        ]
        return f"{np.mean(some):.1%}"

    for length in (*lengths, None):
        name = f"{length:,}" if length else "all"
        shown.add_row(name, *(share(length, depth) for depth in (*depths, None)))
    return shown


def measure(options: argparse.Namespace) -> None:
    folder = check(options.models, options.json)[0]
    if options.needles > len(NOUNS):
        raise InputError(f"--needles: at most {len(NOUNS)}, one a noun")
    text, tokenizer = read_tokens(options.text, folder)
    haystacks = [
        # a string seeds a Random alike everywhere, and one haystack does not depend on which others there are
        haystack(text, tokenizer, length, depth, options.needles, random.Random(f"{options.seed}/{length}/{depth}/{i}"))
        for length in options.lengths
        for depth in options.depths
        for i in range(options.trials)
    ]
    out, errors = Console(highlight=False), Console(stderr=True)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        runner = open_candidate(name)
        todo: Iterable[Haystack] = track(
            haystacks, name, console=errors, transient=True, disable=not errors.is_terminal
        )
        said = [answer(runner, tokenizer, h.ids, options.chunk) for h in todo]
        del runner
        hits = [right(text, h.code) for text, h in zip(said, haystacks, strict=True)]
        row = {"model": name, "right": sum(hits), "of": len(hits), "answers": said}
        line = f"{sum(hits)} of {len(hits)} right ({np.mean(hits):.1%})"
        if rows:
            row["as_first"] = sum(a == b for a, b in zip(said, rows[0]["answers"], strict=True))
            line += f", {row['as_first']} of {len(hits)} answers equal the first model's"
        rows.append(row)
        out.print(f"{name}\n{line}", markup=False, soft_wrap=True)
        out.print(table(haystacks, hits), "")
    if options.json:
        asked = [{"length": h.length, "depth": h.depth, "code": h.code} for h in haystacks]
        record = {"text": str(options.text), "seed": options.seed, "needles": options.needles, "asked": asked}
        options.json.write_text(json.dumps(record | {"models": rows}, indent=1) + "\n", encoding="utf-8")


def lengths(text: str) -> list[int]:
    """Comma-separated numbers of tokens."""
    return [positive(part) for part in text.split(",")]


def depths(text: str) -> list[float]:
    """Comma-separated numbers from 0 to 1."""
    values = [float(part) for part in text.split(",")]
    if not all(0 <= value <= 1 for value in values):
        raise ValueError
    return values


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="measure_needles", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("text", type=Path, metavar="TEXT")
    p.add_argument("models", nargs="+", metavar="MODEL_DIR[,KEY=VALUE]…")
    p.add_argument(
        "--lengths", type=lengths, default="1024,2048,4096", metavar="TOKENS,…", help="(default: %(default)s)"
    )
    p.add_argument(
        "--depths", type=depths, default="0.1,0.3,0.5,0.7,0.9", metavar="0…1,…", help="(default: %(default)s)"
    )
    p.add_argument("--trials", type=positive, default=4, metavar="N", help="of each length and depth (default: 4)")
    p.add_argument("--needles", type=positive, default=1, metavar="N", help="facts in a haystack (default: 1)")
    p.add_argument("--chunk", type=positive, default=256, metavar="N", help="tokens a prefill call (default: 256)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the haystacks (default: 0)")
    p.add_argument("--json", type=Path, metavar="FILE")
    return run(p, argv, measure)


if __name__ == "__main__":
    sys.exit(main())
