"""One run of `ovtq-eval`: what of each candidate is measured, and what is made of it."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import signal
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ovtq import system
from ovtq.cli.command import made_here, phase, progress
from ovtq.errors import InputError, VerificationFailed
from ovtq.evidence import needles
from ovtq.evidence.candidates import Candidate, Subject, inspect_cache, open_candidate
from ovtq.evidence.divergence import Reference, cut
from ovtq.forms.pruning import counted
from ovtq.ir import io
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.runtime.text import Tokenizer
from ovtq.verification.recheck import passes_of, recheck

Task = tuple[str, Candidate, int]  # role, candidate, tokens per call
Measured = tuple[dict[str, Any], list[list[int]], list[str]]  # see Evaluation.measure
SAME = 10  # a mean KLD of so many noise floors is still none
LEAST_FLOOR = 1e-15
GREEDY_PROMPT = 256  # tokens of text that a greedy continuation begins with
READ = "device text_sha256 windows window chunk versions".split()  # noqa: SIM905  what decides the reference's logits


class Evaluation:
    """One run: the text, the questions, the reference's answers, and the rows so far, in `results`."""

    def __init__(self, options: argparse.Namespace, errors: Console) -> None:
        self.options, self.errors = options, errors
        self.tokenizer = Tokenizer(options.model_dir)
        tokens = self.tokenizer.documents(options.text)
        self.text = cut(tokens, self.tokenizer, options.windows, options.window, str(options.text))
        kinds = options.lengths, options.depths, options.needles, options.trials, options.seed
        self.stacks = needles.haystacks(tokens, self.tokenizer, *kinds)
        self.prompts = _prompts(tokens, self.tokenizer, options.greedy)
        self.written: list[list[int]] = []  # by the reference, after the prompts
        results = {
            **made_here("eval", options.model_dir, options.device),
            "text": str(options.text),
            "text_sha256": io.text_sha256(options.text),
            "windows": len(self.text.ids),
            "window": options.window,
            "chunk": options.chunk,
            "positions": self.text.bins,
            "asked": [*kinds, options.answer_tokens, options.read_chunk],
            "greedy": [options.greedy, options.greedy_tokens],
            "verified": options.verify,
            "max_kld": options.max_kld,
            "at": options.at,
            "rows": [],
        }
        self.results: dict[str, Any] = json.loads(json.dumps(results))  # as read from a file: lists, no tuples

    def read(self, reference: Candidate) -> None:
        """Run the reference over the text, unless an earlier run did."""
        options = self.options
        made = " ".join(str(self.results[key]) for key in READ) + f" {fingerprint(reference)}"
        found = Reference.read(options.reference, self.text, made) if options.reference else None
        if found is None:
            with progress(self.errors) as bars, phase(bars, "reference", self._calls(options.chunk)) as tick:
                subject = open_candidate(reference, options.device, EXACT_PROPERTIES)
                found = Reference(subject, self.text, options.chunk, tick, options.reference, made)
        self.expected = found

    def measured(self, tasks: Sequence[Task]) -> Generator[Measured, None, None]:
        """What `measure` says of each, in turn; with --jobs in processes of their own, which read the text anew."""
        if self.options.jobs == 1:
            yield from (self.measure(*task) for task in tasks)
            return
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(
            max(min(self.options.jobs, len(tasks)), 1), context, _start, (self.options, self.expected)
        )
        with progress(self.errors) as bars, phase(bars, "rows", len(tasks)) as tick:
            try:
                for found in pool.map(_measure, tasks):
                    tick()
                    yield found
            except BrokenProcessPool:
                raise InputError("--jobs: a process died; out of memory? try a smaller number") from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.kill()

    def measure(self, role: str, candidate: Candidate, chunk: int) -> Measured:
        """All figures of one candidate that need no other's, what it wrote greedily, and what is wrong with it."""
        name = name_of(role, candidate, chunk)
        row: dict[str, Any] = {"candidate": name, "role": role, "fingerprint": fingerprint(candidate)}
        with progress(self.errors) as bars:
            wrong = self._verified(candidate) if role == "candidate" else ""
            subject = open_candidate(candidate, self.options.device, self.properties, self.options.window)
            cache = inspect_cache(candidate, subject, self.options.device)
            row |= {"cache": cache.text, "computes": cache.computes}
            row |= {"bytes_per_token": cache.per_token, "flat_bytes": cache.flat}
            with phase(bars, f"{name}: text", self._calls(chunk)) as tick:
                row |= self.expected.compare(subject, chunk, tick, name)
            row |= {"pruned": counted(subject.request) if isinstance(subject, Runner) else None, "needles": None}
            written: list[list[int]] = []
            if role != "floor" and not candidate.paged:  # which has no room for other lengths
                row["needles"], written = self._asked(subject, name, bars)
        return row, written, [wrong, cache.wrong]

    def judged(
        self, candidate: Candidate, row: dict[str, Any], written: list[list[int]], reasons: list[str]
    ) -> dict[str, Any]:
        """What `measure` said of it, with how long its text stays the reference's, and the verdict."""
        self.written = self.written or written
        row |= {"greedy": needles.agreement(written, self.written) if written else None}
        return row | self._verdict(candidate, row, reasons)

    def _calls(self, chunk: int) -> int:
        return len(self.text.ids) * math.ceil(self.options.window / chunk)

    @property
    def properties(self) -> dict[str, str]:
        """Of the plugin: f32 everywhere; of several processes each has its share of the cores, and none of its own."""
        if self.options.jobs == 1:
            return EXACT_PROPERTIES
        share = max(system.processors() // self.options.jobs, 1)
        return {**EXACT_PROPERTIES, "INFERENCE_NUM_THREADS": str(share), "ENABLE_CPU_PINNING": "NO"}

    def _asked(
        self, subject: Subject, name: str, bars: Progress
    ) -> tuple[list[dict[str, float | int]] | None, list[list[int]]]:
        """Right answers, and the texts written."""
        options, answers, written = self.options, None, []
        if self.stacks:
            with phase(bars, f"{name}: needles", len(self.stacks)) as tick:
                how = self.stacks, options.answer_tokens, options.read_chunk, tick
                answers = needles.score(subject, self.tokenizer, *how)
        if self.prompts:
            with phase(bars, f"{name}: greedy", len(self.prompts)) as tick:
                greedily = options.greedy_tokens, options.chunk, self.tokenizer.end, tick
                written = [needles.write(subject, ids, *greedily) for ids in self.prompts]
        return answers, written

    def _verified(self, candidate: Candidate) -> str:
        """What is wrong with a converted folder by its own verification; empty if nothing is."""
        if not self.options.verify or not passes_of(candidate.folder):
            return ""
        try:
            recheck(self.options.model_dir, candidate.folder, self.options.device)
        except VerificationFailed as error:
            return str(error)
        return ""

    def _verdict(self, candidate: Candidate, row: dict[str, Any], reasons: list[str]) -> dict[str, str]:
        """equal (to the noise floor), ok, or wrong, and why."""
        floor = self.results["rows"][1]["mean_kld"] if row["role"] == "candidate" else 0.0
        equal = row["mean_kld"] <= SAME * max(floor, LEAST_FLOOR) or row["role"] == "floor"
        if row["role"] == "candidate" and _lossless(candidate) and not equal and not any(reasons):
            reasons.append(f"its passes are lossless, yet it is {row['mean_kld']:.1e} nats from the reference")
        if self.options.max_kld is not None and not row["mean_kld"] <= self.options.max_kld:
            reasons.append(f"above --max-kld {self.options.max_kld:g}")
        reason = "; ".join(filter(None, reasons))
        return {"verdict": "wrong" if reason else "equal" if equal else "ok", "reason": reason}


_WORK: list[Evaluation] = []  # of a process of --jobs


def _start(options: argparse.Namespace, expected: Reference) -> None:
    """Begin a process of --jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    _WORK.append(Evaluation(options, Console(quiet=True, force_terminal=False)))
    _WORK[0].expected = expected


def _measure(task: Task) -> Measured:
    return _WORK[0].measure(*task)


def _prompts(tokens: Any, tokenizer: Tokenizer, count: int) -> list[Any]:
    """Pieces of the text, evenly spread over it, as users' messages where there is a chat template."""
    if not count or len(tokens) < GREEDY_PROMPT:
        return []
    starts = [round(i * (len(tokens) - GREEDY_PROMPT) / count) for i in range(count)]
    pieces = [tokens[start : start + GREEDY_PROMPT] for start in starts]
    return [(tokenizer.chat(tokenizer.decode(ids)) if tokenizer.templated else ids)[None] for ids in pieces]


def _lossless(candidate: Candidate) -> bool:
    """Whether every pass it was made with is lossless, and nothing else was asked of the plugin."""
    passes = passes_of(candidate.folder)
    changed = candidate.properties, candidate.change, candidate.gpu_cache, candidate.as_hosts
    as_it_is = not any(changed)
    return bool(passes) and as_it_is and all(item.exact for item in passes)


def name_of(role: str, candidate: Candidate, chunk: int) -> str:
    """What a row is called."""
    return f"{candidate.label}, in chunks of {chunk}" if role == "floor" else candidate.label


def fingerprint(candidate: Candidate) -> str:
    """What tells a candidate's model from what the same folder held before."""
    weights = candidate.xml.with_suffix(".bin").stat()
    return f"{io.text_sha256(candidate.xml)}/{weights.st_size}/{weights.st_mtime_ns}"
