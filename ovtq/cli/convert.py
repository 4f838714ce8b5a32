"""ovtq-convert: rewrite a model folder's IR so that its KV cache is smaller, and prove that it still says the same."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import openvino as ov
from rich.console import Console
from rich.progress import Progress

from ovtq import conversion, pipeline, system
from ovtq.cli.command import Out, Parser, entries, path_of, progress, run
from ovtq.cli.convert_tables import show, show_end
from ovtq.errors import InputError
from ovtq.ir.dump import dump
from ovtq.options import BASIS, Asked, Checks, Options, among, grouped, meaning
from ovtq.passes import PASSES, Pass, PruneKv, QuantizeKv, TruncateWindow
from ovtq.wording import COMMAND_LINE

EXAMPLES = """examples:
  ovtq convert gpt-oss-20b gpt-oss-20b-kv                 for a GPU, the preset that was measured to be best
  ovtq convert gpt-oss-20b gpt-oss-20b-cpu --target cpu   for a CPU
  ovtq convert gpt-oss-20b --dry-run --preset k6v4        what would be done, and the bytes"""
WORDS = {
    "full layer": "one that attends to all tokens; a sliding one attends to the last few, its window",
    "head, KV head": "a layer's keys and values are stored by KV head; several heads of queries may read one",
    "per token, flat": "bytes that each token adds; bytes that are there however long the text is",
    "packed": "tokens kept as codes of a few bits; the most recent ones, the residual window, as they are",
    "rotated": "keys and values stored in another basis, in which rounding loses less; queries are turned likewise",
    "centre": "what is taken from a key before it is coded, because all keys share it",
    "slack": "tokens that a pruned or sliding layer may hold beyond its number, so that it is cut less often",
    "sinks": "a logit per head that takes a share of the attention and gives nothing; GPT-OSS has them",
    "lossless, exact": "the graph computes what the exported one does, to rounding",
    "KLD": "how far the next token's distribution is from the exported model's: mean divergence, in nats",
}


class _Print(argparse.Action):
    """Prints a text and leaves, as --help does."""

    def __init__(self, option_strings: Sequence[str], dest: str, text: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)
        self.text = text

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        sys.stdout.write(self.text)
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 after one line on stderr that says what is wrong."""
    errors = Console(stderr=True, highlight=False)

    def work() -> None:
        options = parser().parse_args(argv)
        convert(options, Out(stderr=options.dump_after != []), errors)

    return run("ovtq-convert", work, errors, "interrupted; nothing was written", argv)


def parser() -> argparse.ArgumentParser:
    """The command line; presets, passes and their options come from the code that runs them."""
    presets = "\n".join(
        f"  {name:<16} {_names(preset.passes)}"
        + (f"\n{'':<19}with --target cpu: {_names(preset.cpu)}" if preset.cpu else "")
        + "".join(
            f"\n{'':<19}in a model without sinks, with --target {target}: {_names(some)}"
            for target, some in (preset.plain or {}).items()
        )
        for name, preset in pipeline.PRESETS.items()
    )
    passes = "\n".join(
        f"  {name:<16} {(cls.__doc__ or '').partition(chr(10))[0]}"
        + "".join(f"\n{'':<19}{option}: {text}" for option, text in cls.option_help().items())
        for name, cls in PASSES.items()
    )
    purposes = entries({name: preset.purpose for name, preset in pipeline.PRESETS.items()})
    p = Parser("ovtq-convert", f"{__doc__}\n\n{EXAMPLES}", epilog=f"presets:\n{purposes}\n\nwords:\n{entries(WORDS)}")
    p.add_argument(
        "--help-passes",
        action=_Print,
        text=f"passes and their options:\n{passes}\n\n"
        f"the passes of each preset (one with nothing to do in a model is left out):\n{presets}\n",
        help="print all passes, their options and which preset runs which, and leave",
    )
    p.add_argument(
        "model_dir", type=path_of, metavar="MODEL_DIR",
        help="folder with a stateful IR: openvino_model.xml/.bin, config.json",
    )  # fmt: skip
    p.add_argument(
        "out_dir", type=path_of, nargs="?", metavar="OUT_DIR", help="folder to write; not needed with --dry-run"
    )
    what = p.add_mutually_exclusive_group()
    _add(what, Options, "preset")
    _add(what, Options, "passes", type=pipeline.parse_passes, metavar="LIST")
    _add(p, Options, "settings", "--set", metavar="PASS.OPTION=VALUE", action="append")
    _add(p, Options, "target")
    packed = p.add_argument_group("packed caches (short for --set quantize-kv.…, --set truncate-window.…)")
    _add_of_pass(packed, QuantizeKv.name)
    _add(packed, Options, "extension", action="store_const", const=True)
    _add(packed, Options, "window_bits", type=_window_bits, metavar="K,V")
    bases = p.add_argument_group("what heads are stored in (short for --set of every pass that has these options)")
    _add_of_pass(bases, BASIS)
    pruning = p.add_argument_group("pruning, which is lossy (short for --set prune-kv.…)")
    _add_of_pass(pruning, PruneKv.name)
    _add(p, Checks, "verify", action=argparse.BooleanOptionalAction)
    _add(p, Checks, "verify_device", metavar="DEVICE")
    _add(p, Checks, "verify_seed", type=int, metavar="N")
    _add(p, Checks, "verify_layers", type=int, metavar="N")
    p.add_argument("--dry-run", action="store_true", help="say what would be done; write nothing")
    p.add_argument(
        "--dump-after",
        choices=PASSES,
        action="append",
        default=[],
        metavar="PASS",
        help="print the graph after a pass as text on stdout; may be repeated",
    )
    p.add_argument("--force", action="store_true", help="replace OUT_DIR if ovtq made it")
    p.add_argument(
        "--card",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave a model card, README.md, in OUT_DIR; the original's becomes README.original.md (default: on)",
    )
    p.add_argument("--json", type=path_of, metavar="FILE", help="also write the record to FILE")
    return p


def _add(to: argparse._ActionsContainer, kind: type[Asked], name: str, flag: str | None = None, **how: Any) -> None:
    """The flag of an option, with its default, choices and meaning; `how` it is read besides."""
    facts = kind.__dataclass_fields__[name]
    choices = facts.metadata.get("choices") or None
    how |= {"choices": choices} if choices else {}
    text = meaning(kind, name)
    to.add_argument(flag or COMMAND_LINE.option(name), dest=name, default=facts.default, help=text, **how)


def _add_of_pass(to: argparse._ActionsContainer, group: str) -> None:
    """The flags of all options of a group, read as the pass reads them."""
    for name in grouped(group):
        kind = Options.__dataclass_fields__[name].metadata["pass"]
        if isinstance(kind.__dataclass_fields__[name].default, bool):
            _add(to, Options, name, action="store_true")
        else:
            _add(to, Options, name, type=_value_of(kind, name), metavar=name.rpartition("_")[2].upper())


def convert(options: argparse.Namespace, console: Console, errors: Console) -> None:
    """Do what the command line asks. Raises OvtqError; leaves the input untouched, and OUT_DIR whole or as it was."""
    given = {**vars(options), "settings": pipeline.parse_settings(options.settings or ())}
    asked, checks = among(Options, given), among(Checks, given)
    if options.out_dir is None and not options.dry_run:
        raise InputError("OUT_DIR is missing (only --dry-run does without)")

    def after(item: Pass, result: ov.Model) -> None:
        if item.name in options.dump_after:
            sys.stdout.write(f"# after {item.name}\n{dump(result)}")

    started = time.perf_counter()
    with progress(errors) as bars:
        made = conversion.convert(
            options.model_dir,
            None if options.dry_run else options.out_dir,
            asked,
            checks,
            force=options.force,
            card=options.card,
            record_to=options.json,
            on_progress=_shown(bars),
            after=after,
            wording=COMMAND_LINE,
        )
    try:
        show(console, made.record, made.cache_precision)
        show_end(console, options, made.record, time.perf_counter() - started)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if options.dry_run:
            raise
        system.drop_output()  # what was asked for is there
        errors.print(
            f"written to {options.out_dir}, but standard output can't be written to ({system.reason(error)})",
            markup=False,
            soft_wrap=True,
        )


def _shown(bars: Progress) -> conversion.OnProgress:
    """A bar for each stage."""
    tasks: dict[str, Any] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done)

    return show


def _value_of(cls: type[Pass], name: str) -> Callable[[str], Any]:
    """The parser of a flag that is an option of a pass; nothing at all is no value."""
    return lambda text: cls.values({name.replace("_", "-"): text})[name] if text else None


def _window_bits(text: str) -> tuple[Any, ...] | None:
    if not text:
        return None
    bits = text.split(",")
    if len(bits) != 2:
        raise InputError(f"--window-bits: expected K,V such as 8,4, got {text!r}")
    found = TruncateWindow.values({"k-bits": bits[0], "v-bits": bits[1]})
    return found["k_bits"], found["v_bits"]


def _names(passes: Sequence[Pass]) -> str:
    return ", ".join(item.name for item in passes)
