"""ovtq-eval: what a cache costs in quality, against the same model with an unquantised cache, over a text.

For each candidate: what its cache really is in the compiled model; mean, median and 99.9% quantile of the divergence
(KLD, nats) of its next-token distributions from the reference's; how often both have the same most likely token;
perplexity and bits per byte; facts found in a haystack; how long greedy text stays the reference's. The reference is
MODEL_DIR with everything at f32; its own row in other chunks is the noise floor. A converted folder is verified again
first, as ovtq-convert does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ovtq import files
from ovtq.cli import report
from ovtq.cli.command import Out, Parser, run, tell_of_others
from ovtq.cli.evaluate_parser import parser as options_of
from ovtq.cli.evaluate_tables import show, show_head
from ovtq.cli.evaluation import Evaluation as Evaluation
from ovtq.cli.evaluation import fingerprint, name_of
from ovtq.errors import InputError
from ovtq.evidence.candidates import GRAMMAR, Candidate, as_hosts_load, parse
from ovtq.evidence.divergence import kept_at
from ovtq.ir import io
from ovtq.runtime.runner import check_device
from ovtq.staging import RECORD
from ovtq.verification.recheck import passes_of

EXIT_CODE = "exit code: 0, 1 if a candidate is wrong (or above --max-kld), 2 if something can't be run"
# what decides what a row says
SETTINGS = "device text_sha256 windows window chunk asked greedy verified max_kld versions ovtq".split()  # noqa: SIM905


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    errors = Console(stderr=True, highlight=False)
    return run("ovtq-eval", lambda: evaluate(parser().parse_intermixed_args(argv), Out(), errors), errors, argv=argv)


def parser() -> Parser:
    """The command line."""
    return options_of(f"{__doc__}\n{GRAMMAR}\n{EXIT_CODE}")


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
    olds = [kept.get((task[0], name_of(*task), fingerprint(task[1]))) for task in todo]
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
