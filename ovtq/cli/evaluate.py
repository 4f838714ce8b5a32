"""ovtq-eval: what a cache costs in quality, against the same model with an unquantised cache, over a text.

For each candidate: what its cache really is in the compiled model; mean, median and 99.9% quantile of the divergence
(KLD, nats) of its next-token distributions from the reference's; how often both have the same most likely token;
perplexity and bits a byte; facts found in a haystack; how long greedy text stays the reference's. The reference is
MODEL_DIR with everything at f32; its own row in other chunks is the noise floor. A converted folder is verified again
first, as ovtq-convert does.

candidates:
  DIR[,KEY=VALUE]…            a model folder, with properties of the plugin
  stock[:KEY=VALUE,…]         MODEL_DIR with properties, such as stock:KV_CACHE_PRECISION=u8
  host:k6v4, host:prune128    MODEL_DIR, its states changed by the host in numpy, as model cards do
  paged:DIR[,KEY=VALUE]…      under paged attention (CPU); DIR may be stock

exit code: 0, 1 if a candidate is wrong (or above --max-kld), 2 if something can't be run
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import multiprocessing
import platform
import signal
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import openvino as ov
from rich.console import Console
from rich.progress import Progress

from ovtq import __version__, files, system
from ovtq.cli import report
from ovtq.cli.command import Out, Parser, phase, progress, run, tell_of_others
from ovtq.cli.evaluate_parser import parser as options_of
from ovtq.cli.evaluate_tables import show, show_head
from ovtq.errors import InputError, VerificationFailed
from ovtq.evidence import needles
from ovtq.evidence.candidates import Candidate, Subject, as_hosts_load, look, open_candidate, parse
from ovtq.evidence.divergence import Reference, cut, kept_at
from ovtq.forms.pruning import counted
from ovtq.ir import io
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner, check_device
from ovtq.runtime.text import Tokenizer
from ovtq.staging import RECORD
from ovtq.verification.recheck import passes_of, recheck

Task = tuple[str, Candidate, int]  # role, candidate, tokens a call
Measured = tuple[dict[str, Any], list[list[int]], list[str]]  # see Evaluation.measure
SAME = 10  # a mean KLD of so many noise floors is still none
LEAST_FLOOR = 1e-15
GREEDY_PROMPT = 256  # tokens of text that a greedy continuation begins with
# what decides the reference's logits, and what a row says
READ = "device text_sha256 windows window chunk versions".split()  # noqa: SIM905
SETTINGS = "device text_sha256 windows window chunk asked greedy verified max_kld versions ovtq".split()  # noqa: SIM905


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    errors = Console(stderr=True, highlight=False)
    return run("ovtq-eval", lambda: evaluate(parser().parse_intermixed_args(argv), Out(), errors), errors, argv=argv)


def parser() -> Parser:
    """The command line."""
    return options_of(__doc__)


def evaluate(options: argparse.Namespace, console: Out, errors: Console) -> int:
    """Do what the command line asks; returns the exit code."""
    candidates = [parse(text, options.model_dir) for text in (*options.others, *options.candidate)]
    _check(options, candidates)
    candidates = _at(options, candidates)
    tell_of_others({item.label: item.folder for item in candidates}, options.device, errors)
    work = Evaluation(options, errors)
    kept = _kept(options, work.results)
    reference = parse("stock", options.model_dir)
    work.read(reference)
    show_head(console, work.results, work.text.scored_bytes)
    other = max(min(options.chunk, options.window) // 2, 2)
    rows = work.results["rows"]
    todo = [("reference", reference, options.chunk), ("floor", reference, other)]
    todo += [("candidate", candidate, options.chunk) for candidate in candidates]
    olds = [kept.get((task[0], _name(*task), _fingerprint(task[1]))) for task in todo]
    new = [task for task, old in zip(todo, olds, strict=True) if not old]
    with contextlib.closing(work.measured(new)) as found:
        for (_, candidate, _), old in zip(todo, olds, strict=True):
            rows.append(old or work.judged(candidate, *next(found)))
            show(console, rows[-1], resumed=old is not None)
            if options.json:
                files.write(options.json, json.dumps(work.results, indent=1) + "\n")
    if options.report:
        report.write(options.report, [work.results])
        console.print(f"report: {options.report}")
    return 1 if any(row["verdict"] == "wrong" for row in rows) else 0


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
            "kind": "eval",
            "ovtq": __version__,
            "versions": {"openvino": ov.__version__, "python": platform.python_version()},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "model": str(options.model_dir),
            "device": options.device,
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
        made = " ".join(str(self.results[key]) for key in READ) + f" {_fingerprint(reference)}"
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
        name = _name(role, candidate, chunk)
        row: dict[str, Any] = {"candidate": name, "role": role, "fingerprint": _fingerprint(candidate)}
        with progress(self.errors) as bars:
            wrong = self._verified(candidate) if role == "candidate" else ""
            subject = open_candidate(candidate, self.options.device, self.properties, self.options.window)
            cache = look(candidate, subject, self.options.device)
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
            return str(error).removesuffix("; nothing was written")
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


def _at(options: argparse.Namespace, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates at each precision that is asked for; as hosts load them, the exported model first."""
    if options.at == "f32":
        return list(candidates)
    stock = parse("stock", options.model_dir)
    hosts = [as_hosts_load(item) for item in (stock, *(some for some in candidates if some.label != "stock"))]
    return hosts if options.at == "hosts" else [*candidates, *hosts]


def _check(options: argparse.Namespace, candidates: Sequence[Candidate]) -> None:
    """Raise InputError for what would only fail after minutes."""
    check_device(options.device)
    if not candidates:
        raise InputError("nothing to compare; name a folder or a --candidate such as stock:KV_CACHE_PRECISION=u8")
    labels = [candidate.label for candidate in candidates]
    if len(set(labels)) < len(labels):
        raise InputError(f"{next(label for label in labels if labels.count(label) > 1)}: named twice")
    if options.resume and not options.json:
        raise InputError("--resume takes up what --json FILE holds; name the file")
    if options.jobs > 1 and not options.device.startswith("CPU"):
        raise InputError("--jobs: several rows at a time share the cores of a CPU; leave it out for other devices")
    folders = [options.model_dir, *(candidate.folder for candidate in candidates)]
    outputs = {"--json": options.json, "--report": options.report, **kept_at(options.reference)}
    io.check_outputs(outputs, folders, [options.text])
    if options.report:
        report.check()
    for candidate in candidates:
        record = candidate.folder / RECORD
        if record.is_file() and passes_of(candidate.folder):
            source = io.record_of(candidate.folder).get("source")
            told = source.get("xml_sha256") if isinstance(source, dict) else None
            if told not in (None, io.text_sha256(io.model_xml(options.model_dir))):
                raise InputError(f"{candidate.folder}: not made of {options.model_dir} but of another model")


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


def _name(role: str, candidate: Candidate, chunk: int) -> str:
    return f"{candidate.label}, in chunks of {chunk}" if role == "floor" else candidate.label


def _fingerprint(candidate: Candidate) -> str:
    weights = candidate.xml.with_suffix(".bin").stat()
    return f"{io.text_sha256(candidate.xml)}/{weights.st_size}/{weights.st_mtime_ns}"


def _kept(options: argparse.Namespace, results: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Rows of an earlier run made with the same settings; the reference's only if nothing that it wrote is needed.

    Raises InputError if the file holds something else.
    """
    if not options.resume or not options.json.is_file():
        return {}
    try:
        old = files.read_json(options.json)
        if any(old[key] != results[key] for key in SETTINGS):
            raise InputError(f"{options.json}: made with other settings, text or versions; name another --json FILE")
        roles = ("candidate",) if options.greedy else ("candidate", "reference", "floor")
        rows = [row for row in old["rows"] if row["role"] in roles]
        return {(row["role"], row["candidate"], row["fingerprint"]): row for row in rows}
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{options.json}: no figures of ovtq-eval") from None
