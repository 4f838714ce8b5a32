"""ovtq-calibrate: statistics of a model's queries, keys and values over a text, for `ovtq-convert --basis calibrated`.

The model runs as exported, once over the text, at f32 on a CPU; of its tensors only sums are kept. Then it reads as
much as a quarter of that besides, by which each layer is told whether the balanced basis loses less there than the
plain rotation. The file, calibration.npz, is left in MODEL_DIR, where ovtq-convert finds it.

A long run goes on where it was ended, by the same command: what it had is in calibration.npz.part until it is done.

With --sensitivity the model then reads a short text again and again, each time with the past of one full layer's keys,
or values, rounded to few bits: what that costs is what `ovtq-convert --bits auto` chooses by. That takes four calls of
192 tokens for each full layer and text, of which there are at most four.

Without --text a short text that comes with ovtq is read: English prose, dialogue, tables, code. One like what the model
will read is better; measure with another.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from ovtq import files
from ovtq.cli.command import Out, Parser, path_of, phase, positive, progress, run
from ovtq.codec.moments import NAME, PROBED, Calibration
from ovtq.errors import InputError
from ovtq.evidence import calibration
from ovtq.evidence.calibration import calibrate, calls
from ovtq.evidence.probe import NEW, PAST, TEXTS, full_layers, probe, runs, texts_in
from ovtq.evidence.unfinished import Unfinished
from ovtq.ir import io
from ovtq.runtime.runner import check_device
from ovtq.runtime.text import Tokenizer

TEXT = Path(calibration.__file__).with_name("calibration.txt")
HELD = 4  # of so many tokens one more is read to compare


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    errors = Console(stderr=True, highlight=False)
    interrupted = "interrupted; the same command goes on from there"
    return run("ovtq-calibrate", lambda: work(parser().parse_args(argv), Out(), errors), errors, interrupted, argv)


def parser() -> Parser:
    """The command line."""
    p = Parser("ovtq-calibrate", __doc__)
    p.add_argument("model_dir", type=path_of, metavar="MODEL_DIR", help="the model as exported, with its tokenizer")
    p.add_argument("--text", type=path_of, metavar="FILE", default=TEXT, help="UTF-8; <|endoftext|> between documents")
    p.add_argument("--tokens", type=positive, default=1024, metavar="N", help="(default: %(default)s)")
    p.add_argument(
        "--sensitivity",
        action="store_true",
        help="measure what each full layer loses, too, for ovtq-convert --bits auto",
    )
    p.add_argument("--device", default="CPU", help="where to run it (default: %(default)s)")
    p.add_argument("--output", type=path_of, metavar="FILE", help=f"(default: {NAME} in MODEL_DIR)")
    return p


def work(options: argparse.Namespace, console: Console, errors: Console) -> None:
    """Do what the command line asks. Raises InputError for a text that is too short."""
    output = options.output or options.model_dir / NAME
    if output.suffix != ".npz":
        raise InputError(f"{output}: name it ….npz")
    check_device(options.device)
    io.model_xml(options.model_dir)
    # the model's folder is where it is looked for; said before it takes minutes
    io.check_outputs({"--output": output}, (), [options.text])
    tokenizer = Tokenizer(options.model_dir)
    ids, held, more = texts(tokenizer, options.text, options.tokens, options.sensitivity)
    asked = f"{options.device} {tokenizer.begin} {len(ids)} {len(held)}"
    unfinished = Unfinished(output, key(options.model_dir, np.concatenate([ids, held, more]), asked))
    if unfinished.stages:
        console.print(f"going on with what {unfinished.path} keeps of an interrupted run")
    with progress(errors) as bars:
        with phase(bars, "moments", calls(len(ids), len(held))) as tick:
            found = calibrate(options.model_dir, ids, held, options.device, tick, tokenizer.begin, unfinished)
        if options.sensitivity:
            total = runs(len(full_layers(options.model_dir)), texts_in(len(more), tokenizer.begin))
            with phase(bars, "losses", total) as tick:
                found = probe(options.model_dir, found, more, options.device, tick, tokenizer.begin, unfinished)
    found.save(output)
    unfinished.forget()
    console.print(f"{found.tokens:,} tokens, {found.held:,} more to compare: {output}, sha256 {files.sha256(output)}")
    show(console, found)


def texts(tokenizer: Tokenizer, text: Path, tokens: int, probed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids to calibrate with, to compare with, and, if `probed`, to probe with.

    Raises InputError if the text has too few.
    """
    ids, held = tokenizer.documents(text), max(tokens // HELD, 1)
    needed = tokens + max(held, PAST + NEW if probed else 0)
    if len(ids) < needed:
        raise InputError(f"{text}: {len(ids):,} tokens, {needed:,} are needed; give a longer text or fewer --tokens")
    more = ids[tokens:][: TEXTS * (PAST + NEW)] if probed else ids[:0]
    return ids[:tokens], ids[tokens:][:held], more


def key(model_dir: Path, ids: np.ndarray, asked: str) -> str:
    """What tells a run of one model over one text from all others."""
    xml = io.model_xml(model_dir)
    weights = xml.with_suffix(".bin").stat()
    text = hashlib.sha256(np.ascontiguousarray(ids, np.int64).tobytes()).hexdigest()
    return f"{io.text_sha256(xml)} {weights.st_size} {weights.st_mtime_ns} {text} {asked}"


def show(console: Console, found: Calibration) -> None:
    """What the balanced basis gains in each layer, by the mean square error of 4-bit codes."""
    for which in ("key", "value"):
        gains = []
        for index, some in found.layers.items():
            plain, _, best = getattr(some, f"{which}_errors")
            stays = ("rotation stays", "rotation about the mean", "")[some.best(which)]
            gains.append(f"{index}: {plain / best:.2f}" + (f" ({stays})" if stays else ""))
        console.print(f"{which}s, error of the rotation over that of the balanced basis, by layer: {', '.join(gains)}")
    for which in ("key", "value"):
        klds = {index: getattr(some, f"{which}_kld") for index, some in found.layers.items()}
        if costs := [f"{index}: {kld[-1]:.1e}" for index, kld in klds.items() if kld.size]:
            console.print(
                f"mean KLD of {PROBED[-1]}-bit {which}s of one full layer alone, by layer: {', '.join(costs)}"
            )
