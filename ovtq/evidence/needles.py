"""Needle in a haystack: does a model still find a fact hidden in a text? And greedy text, token by token."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ovtq.errors import InputError
from ovtq.evidence.candidates import Subject
from ovtq.runtime.text import Tokenizer

# The question names the fact's key, the answer is in the fact alone.
FACT = "The code of the {key} is {code}."
QUESTION = "\n\nQuestion: what is the code of the {key}?\nAnswer:"
NOUNS = """
amber anchor apple arrow atlas badge basin beacon birch blade bloom bolt brick bridge brook cabin canal candle castle
cedar chain cliff cloud comet copper coral crane crown delta desert dune eagle ember falcon fern field flame flint
""".split()  # noqa: SIM905
DIGITS = 5


@dataclass(frozen=True)
class Haystack:
    """A prompt, ids (1, tokens), of about `length` tokens with `needles` facts in it, and the code it asks for."""

    length: int
    depth: float  # 0: at the beginning, 1: right before the question
    needles: int
    ids: np.ndarray
    code: str


def haystack(
    text: np.ndarray, tokenizer: Tokenizer, length: int, depth: float, needles: int, draw: random.Random
) -> Haystack:
    """`needles` facts in a piece of `text` (tokens,), the one asked for at `depth`.

    Raises InputError if the text is too short.

    It goes through the chat template where there is one, as a user's message.
    """
    keys = draw.sample(NOUNS, needles)
    codes = [f"{number:0{DIGITS}d}" for number in draw.sample(range(10**DIGITS), needles)]
    # a line end is a token of its own only if text follows it
    facts = [
        tokenizer.encode(f"\n{FACT.format(key=key, code=code)}\nx")[:-1] for key, code in zip(keys, codes, strict=True)
    ]
    question = QUESTION.format(key=keys[0])
    room = length - len(tokenizer.encode(question)) - sum(map(len, facts))
    if room < 1:
        raise InputError(f"--lengths: {length} tokens are too few for {needles} facts and a question")
    if room > len(text):
        raise InputError(f"--text: {len(text)} tokens, {room} are needed for haystacks of {length}; see --lengths")
    first = draw.randrange(len(text) - room + 1)
    places = [round(depth * room), *(draw.randint(0, room) for _ in facts[1:])]
    parts, past = [], 0
    for place, index in sorted(zip(places, range(needles), strict=True)):
        parts += [text[first + past : first + place], facts[index]]
        past = place
    parts.append(text[first + past : first + room])
    ids = np.concatenate([*parts, tokenizer.encode(question)])
    if tokenizer.templated:
        ids = tokenizer.chat(tokenizer.decode(ids))
    return Haystack(length, depth, needles, ids[None], codes[0])


def haystacks(
    text: np.ndarray,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    depths: Sequence[float],
    needles: Sequence[int],
    trials: int,
    seed: int,
) -> list[Haystack]:
    """`trials` haystacks of each kind; one does not depend on which others there are."""
    return [
        # a string seeds a Random alike everywhere
        haystack(text, tokenizer, length, depth, count, random.Random(f"{seed}/{length}/{depth}/{count}/{trial}"))
        for count in needles
        for length in lengths
        for depth in depths
        for trial in range(trials)
    ]


def write(
    subject: Subject, ids: np.ndarray, tokens: int, chunk: int, end: int, tick: Callable[[], None] = lambda: None
) -> list[int]:
    """What a model writes greedily after `ids` (1, tokens), read in calls of `chunk`; stops at the token `end`.

    In calls, since one call reads its own tokens before they are compressed.
    """
    subject.reset()
    for start in range(0, ids.shape[1], chunk):
        logits = subject.step(ids[:, start : start + chunk])
    written = [int(logits[0, -1].argmax())]
    while len(written) < tokens and written[-1] != end:
        written.append(int(subject.step(np.array([written[-1:]], np.int64))[0, -1].argmax()))
    tick()
    return written


def ask(subject: Subject, tokenizer: Tokenizer, asked: Haystack, tokens: int, chunk: int) -> str:
    """What the model answers."""
    return tokenizer.decode(write(subject, asked.ids, tokens, chunk, tokenizer.end))


def right(answer: str, code: str) -> bool:
    """Whether the code is one of the numbers in an answer (a model that thinks aloud may say others before)."""
    return code in re.findall(r"\d+", answer)


def score(
    subject: Subject,
    tokenizer: Tokenizer,
    asked: Sequence[Haystack],
    tokens: int,
    chunk: int,
    tick: Callable[[], None],
) -> list[dict[str, float | int]]:
    """How many answers are right, by number of needles, length and depth."""
    cells: dict[tuple[int, int, float], list[bool]] = {}
    for stack in asked:
        answer = ask(subject, tokenizer, stack, tokens, chunk)
        cells.setdefault((stack.needles, stack.length, stack.depth), []).append(right(answer, stack.code))
        tick()
    return [
        {"needles": needles, "length": length, "depth": depth, "right": sum(hits), "of": len(hits)}
        for (needles, length, depth), hits in cells.items()
    ]


def agreement(mine: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> dict[str, float | int]:
    """How long texts stay those of the reference: mean tokens until they part, and how many never do."""
    same = [
        next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
        for a, b in zip(mine, reference, strict=True)
    ]
    return {
        "prompts": len(same),
        "tokens": max(map(len, reference)),
        "same": float(np.mean(same)),
        "identical": sum(list(a) == list(b) for a, b in zip(mine, reference, strict=True)),
    }
