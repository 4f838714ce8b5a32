"""How far a model's next-token distributions are from a reference's, over a text."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovtq import disk, files
from ovtq.errors import InputError
from ovtq.evidence.candidates import Subject
from ovtq.runtime.text import Tokenizer

BINS = 16  # parts of a window for which the divergence is given by itself
ROWS = 2  # positions whose distributions are compared at a time


@dataclass(frozen=True)
class Text:
    """Token ids (windows, window), each window read from an empty cache, and how many bytes the scored tokens are.

    Every token of a window but the first is scored.
    """

    ids: np.ndarray
    scored_bytes: int

    @property
    def bins(self) -> list[tuple[int, int]]:
        """The parts of a window."""
        edges = np.linspace(0, self.ids.shape[1], min(BINS, self.ids.shape[1]) + 1).astype(int).tolist()
        return list(itertools.pairwise(edges))


def cut(tokens: np.ndarray, tokenizer: Tokenizer, count: int, window: int, name: str) -> Text:
    """At most `count` windows of a text's tokens (tokens,), each behind the token that begins a text, if there is one.

    Raises InputError if there is not even one.
    """
    if window < 2:
        raise InputError("--window: at least 2 tokens are needed, the first of a window is not scored")
    begin = tokenizer.begin
    each = window if begin is None else window - 1
    count = min(count, len(tokens) // each)
    if not count:
        raise InputError(f"{name}: {len(tokens)} tokens, at least {window} are needed; give a longer text or --window")
    ids = tokens[: count * each].reshape(count, each)
    if begin is not None:
        ids = np.insert(ids, 0, begin, axis=1)
    return Text(ids, sum(len(tokenizer.decode(row[1:]).encode()) for row in ids))


def chunks(subject: Subject, text: Text, chunk: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(window, first position, logits (tokens, vocabulary)) of each call."""
    for row, ids in enumerate(text.ids):
        subject.reset()
        for start in range(0, len(ids), chunk):
            yield row, start, subject.step(ids[None, start : start + chunk])[0]


class Reference:
    """The reference's logits of a text, in a file that vanishes unless it is named: those of a large vocabulary are
    gigabytes.

    Another process to which it is sent reads the same file, as long as this one lives.
    """

    def __init__(
        self,
        subject: Subject,
        text: Text,
        chunk: int,
        tick: Callable[[], None],
        keep: Path | None = None,
        made: str = "",
    ) -> None:
        """Run the reference; `keep`: leave the logits in that file, with `made`, how they were made, beside it.

        Raises InputError if the disk has no room for the logits.
        """
        folder, needed = Path(tempfile.gettempdir()), 4 * text.ids.size * subject.vocabulary
        where = keep.parent if keep else folder
        if shutil.disk_usage(where).free < needed + (64 << 20):
            advice = "name another --reference FILE" if keep else "set TMPDIR"
            raise InputError(f"{where}: no space for the reference's logits ({needed >> 20} MiB); {advice}")
        self.text, self.kept = text, keep
        if keep:  # it is ours from here on, and not whole yet
            files.write(_label(keep), json.dumps({"made": None}))
        self.file = keep.open("w+b") if keep else disk.scratch(folder)
        weakref.finalize(self, self.file.close)
        self.logits = np.memmap(self.file, np.float32, "w+", shape=(*text.ids.shape, subject.vocabulary))
        for row, start, logits in chunks(subject, text, chunk):
            self.logits[row, start : start + len(logits)] = logits
            tick()
        if keep:
            self.logits.flush()
            files.write(_label(keep), json.dumps({"made": made, "shape": self.logits.shape}))

    @classmethod
    def read(cls, path: Path, text: Text, made: str) -> Reference | None:
        """The logits of an earlier run, if `path` has some made alike. Raises InputError if it is damaged."""
        if not (path.is_file() and _label(path).is_file()):
            return None
        told = files.read_json(_label(path))
        if not isinstance(told, dict) or told.get("made") != made:
            return None
        files.check_regular(path)
        found = cls.__new__(cls)
        try:
            found.__setstate__({"text": text, "name": str(path), "kept": path, "shape": tuple(told["shape"])})
            whole = found.logits.ndim == 3 and found.logits.shape[:2] == text.ids.shape
        except (OSError, ValueError, LookupError, TypeError, OverflowError):
            whole = False
        if not whole:
            raise InputError(f"{path}: damaged logits of a reference; delete it, and {_label(path).name}")
        return found

    def __getstate__(self) -> dict[str, Any]:
        name = str(self.kept) if self.kept else disk.scratch_name(self.file)
        return {"text": self.text, "name": name, "kept": self.kept, "shape": self.logits.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.text, self.kept = state["text"], state["kept"]
        with open(state["name"], "rb") if self.kept else disk.open_scratch(state["name"]) as file:
            self.logits = np.memmap(file, np.float32, "r", shape=state["shape"])

    def compare(self, subject: Subject, chunk: int, tick: Callable[[], None], name: str) -> dict[str, Any]:
        """KLD = Σ p·(log p − log q) in nats, p the reference's distribution and q the subject's, and what goes with it.

        Mean, median and 99.9% quantile over all positions, means by part of a window, the share of positions with the
        same most likely token, perplexity per token and bits per byte of the text. Raises InputError if that can't be.
        """
        ids = self.text.ids
        kld, same, nats = np.empty(ids.shape), np.empty(ids.shape, bool), 0.0
        if subject.vocabulary != self.logits.shape[-1]:
            raise InputError(
                f"{name}: {subject.vocabulary} logits a token, the reference has {self.logits.shape[-1]}: other models"
            )
        for row, start, logits in chunks(subject, self.text, chunk):
            following = ids[row, start + 1 : start + 1 + len(logits)]
            for first in range(0, len(logits), ROWS):  # what fits into a cache: a vocabulary has up to 262,144 tokens
                these = slice(first, first + ROWS)
                at = slice(start + first, start + min(first + ROWS, len(logits)))
                p, q = log_softmax(self.logits[row, at]), log_softmax(logits[these])
                kld[row, at] = (np.exp(p) * (p - q)).sum(-1)
                same[row, at] = p.argmax(-1) == q.argmax(-1)
                nats -= float(q[np.arange(len(following[these])), following[these]].sum())
            tick()
        if not np.isfinite(kld).all():
            raise InputError(f"{name}: its logits are not finite at {int((~np.isfinite(kld)).sum())} positions")
        return {
            "mean_kld": float(kld.mean()),
            "median_kld": float(np.median(kld)),
            "kld_p999": float(np.quantile(kld, 0.999)),
            "kld_by_position": [float(kld[:, first:last].mean()) for first, last in self.text.bins],
            "same_top": float(same.mean()),
            "perplexity": math.exp(nats / (ids.size - len(ids))),
            "bits_per_byte": nats / math.log(2) / self.text.scored_bytes,
        }


def kept_at(path: Path | None) -> dict[str, Path]:
    """The files of a reference's logits that are kept, by the option that names them.

    Raises InputError if something else has the name: nothing tells that it may be lost.
    """
    if path is None:
        return {}
    if path.exists() and not _label(path).is_file():
        raise InputError(f"--reference {path}: holds no logits that ovtq-eval kept; choose another name")
    return {"--reference": path, "--reference, beside it": _label(path)}


def _label(path: Path) -> Path:
    return path.with_name(f"{path.name}.logits.json")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In f64: at f32 its own rounding is as large as the noise floor."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
