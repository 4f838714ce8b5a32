"""ovtq-calibrate: statistics of a model's queries, keys and values over a text, for `ovtq-convert --basis calibrated`.

The model runs as exported, once over the text, at f32 on a CPU; of its tensors only sums are kept. Then it reads as
much as a quarter of that besides, by which each layer is told whether the balanced basis loses less there than the
plain rotation. The file, calibration.npz, is left in MODEL_DIR, where ovtq-convert finds it.

Without --text a short text that comes with ovtq is read: English prose, dialogue, tables, code. One like what the model
will read is better; measure with another.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from ovtq import files
from ovtq.cli.command import Out, Parser, path_of, phase, positive, progress, run
from ovtq.codec.moments import NAME, Calibration
from ovtq.errors import InputError
from ovtq.evidence import calibration
from ovtq.evidence.calibration import calibrate, calls
from ovtq.ir import io
from ovtq.runtime.runner import check_device
from ovtq.runtime.text import Tokenizer

TEXT = Path(calibration.__file__).with_name("calibration.txt")
HELD = 4  # of so many tokens one more is read to compare


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    errors = Console(stderr=True, highlight=False)
    return run("ovtq-calibrate", lambda: work(parser().parse_args(argv), Out(), errors), errors)


def parser() -> Parser:
    """The command line."""
    p = Parser("ovtq-calibrate", __doc__)
    p.add_argument("model_dir", type=path_of, metavar="MODEL_DIR", help="the model as exported, with its tokenizer")
    p.add_argument(
        "--text",
        type=path_of,
        metavar="FILE",
        default=TEXT,
        help="the text to read, UTF-8; <|endoftext|> between documents",
    )
    p.add_argument(
        "--tokens", type=positive, default=1024, metavar="N", help="tokens of it to read (default: %(default)s)"
    )
    p.add_argument("--device", default="CPU", metavar="DEVICE", help="where to run the model (default: %(default)s)")
    p.add_argument("--output", type=path_of, metavar="FILE", help=f"the file to write (default: {NAME} in MODEL_DIR)")
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
    ids, held = texts(options.model_dir, options.text, options.tokens)
    with progress(errors) as bars, phase(bars, "calls", calls(len(ids), len(held))) as tick:
        found = calibrate(options.model_dir, ids, held, options.device, tick, Tokenizer(options.model_dir).begin)
    found.save(output)
    console.print(f"{found.tokens:,} tokens, {found.held:,} more to compare: {output}, sha256 {files.sha256(output)}")
    show(console, found)


def texts(model_dir: Path, text: Path, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids to calibrate with, and to compare with. Raises InputError if the text has too few."""
    ids, needed = Tokenizer(model_dir).documents(text), tokens + max(tokens // HELD, 1)
    if len(ids) < needed:
        raise InputError(f"{text}: {len(ids):,} tokens, {needed:,} are needed; give a longer text or fewer --tokens")
    return ids[:tokens], ids[tokens:needed]


def show(console: Console, found: Calibration) -> None:
    """What the balanced basis gains in each layer, by the mean square error of 4-bit codes."""
    for which in ("key", "value"):
        gains = []
        for index, some in found.layers.items():
            plain, _, best = getattr(some, f"{which}_errors")
            stays = ("rotation stays", "rotation about the mean", "")[some.best(which)]
            gains.append(f"{index}: {plain / best:.2f}" + (f" ({stays})" if stays else ""))
        console.print(f"{which}s, error of the rotation over that of the balanced basis, by layer: {', '.join(gains)}")
