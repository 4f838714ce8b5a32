"""ovtq-convert: rewrite a model folder's IR so that its KV cache is smaller, and prove that it still says the same."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openvino as ov
from rich.console import Console, JustifyMethod
from rich.progress import Progress
from rich.table import Table

from ovtq import conversion, pipeline, states, system
from ovtq.automatic import AUTO, caution
from ovtq.cli.command import Out, Parser, path_of, progress, run
from ovtq.conversion import CONTEXTS
from ovtq.errors import InputError
from ovtq.forms.window import PAYS, SHORT_WINDOW
from ovtq.ir.dump import dump
from ovtq.options import Checks, Options
from ovtq.passes import PASSES, Pass, PruneKv, QuantizeKv, TruncateWindow
from ovtq.verification.closeness import STRETCH
from ovtq.verification.extent import BIG, BIG_LAYERS
from ovtq.wording import COMMAND_LINE

# Of quantize-kv, with flags of their own.
PACKED_OPTIONS = ("k-bits", "v-bits", "residual-window", "protect", "centre", "capacity")
BASIS_OPTIONS = ("basis", "calibration")  # of all passes that have them
PRUNING_OPTIONS = ("recent-window", "prefix", "score", "stats", "mode", "slack", "heads")  # of prune-kv, likewise


EXAMPLES = """examples:
  ovtq convert gpt-oss-20b gpt-oss-20b-kv                 for a GPU, the preset that was measured to be best
  ovtq convert gpt-oss-20b gpt-oss-20b-cpu --target cpu   for a CPU
  ovtq convert gpt-oss-20b --dry-run --preset k6v4        what would be done, and the bytes"""
WORDS = """words:
  full layer       one that attends to all tokens; sliding: to the last few, its window
  per token, flat  bytes that each token adds; bytes that are there however long the text is
  packed           tokens kept as codes of a few bits; the most recent ones, the residual window, as they are
  centre           what is taken from a key before it is coded, because all keys share it
  slack            tokens that a pruned or sliding layer may hold beyond its number, so that it is cut less often
  lossless, exact  the graph computes what the exported one does, to rounding"""


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
    helps = QuantizeKv.option_help()
    presets = "\n".join(
        f"  {name:<16} {preset.purpose}\n{'':<19}= {_names(preset.passes)}"
        + (f"\n{'':<19}with --target cpu = {_names(preset.cpu)}" if preset.cpu else "")
        + "".join(
            f"\n{'':<19}in a model without sinks, with --target {target} = {_names(some)}"
            for target, some in (preset.plain or {}).items()
        )
        for name, preset in pipeline.PRESETS.items()
    )
    passes = "\n".join(
        f"  {name:<16} {(cls.__doc__ or '').partition(chr(10))[0]}"
        + "".join(f"\n{'':<19}{option}: {text}" for option, text in cls.option_help().items())
        for name, cls in PASSES.items()
    )
    head = "presets (a pass with nothing to do in a model is left out):"
    p = Parser("ovtq-convert", f"{__doc__}\n\n{EXAMPLES}", epilog=f"{head}\n{presets}\n\n{WORDS}")
    p.add_argument(
        "--help-passes", action=_Print, text=f"passes and their options:\n{passes}\n", help="print all passes and leave"
    )
    p.add_argument("model_dir", type=path_of, help="folder with a stateful IR: openvino_model.xml/.bin, config.json")
    p.add_argument("out_dir", type=path_of, nargs="?", help="folder to write; not needed with --dry-run")
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--preset",
        choices=(AUTO, *pipeline.PRESETS, *pipeline.ALIASES),
        default=None,
        help="auto (the default) takes what was measured to be best for target and model, and says why",
    )
    what.add_argument(
        "--passes", type=pipeline.parse_passes, metavar="LIST", help="passes in order, NAME[:OPTION=VALUE]…,NAME…"
    )
    p.add_argument(
        "--set",
        metavar="PASS.OPTION=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="change an option of a pass; may be repeated",
    )
    p.add_argument(
        "--target",
        choices=states.FLOAT_BYTES,
        default="gpu",
        help="where the model will run: chooses the form of packed caches that is fast there, and counts bytes at f16 "
        "(gpu) or f32 (cpu); each form is for its own device alone: packed layers of gpu's "
        "can be wrong on a CPU, cpu's do not run on a GPU "
        "(default: %(default)s)",
    )
    packed = p.add_argument_group("packed caches (short for --set quantize-kv.…, --set truncate-window.…)")
    for option in PACKED_OPTIONS:
        packed.add_argument(
            f"--{option}",
            type=_value_of(QuantizeKv, option),
            metavar=option.rpartition("-")[2].upper(),
            help=helps[option.replace("-", "_")],
        )
    packed.add_argument("--kernels", action="store_true", default=None, help=helps["kernels"])
    packed.add_argument(
        "--window-bits",
        type=_window_bits,
        metavar="K,V",
        help="pack what sliding layers keep, too: bits of a key's and of a value's coordinate (default none,none)",
    )
    bases = p.add_argument_group("what heads are stored in (short for --set of every pass that has these options)")
    for option in BASIS_OPTIONS:
        bases.add_argument(
            f"--{option}", type=_value_of(QuantizeKv, option), metavar=option.upper(), help=helps[option]
        )
    pruning = p.add_argument_group("pruning, which is lossy (short for --set prune-kv.…)")
    pruning.add_argument(
        "--budget",
        type=_value_of(PruneKv, "budget"),
        metavar="N",
        help="keep N tokens in each full layer (default: all)",
    )
    helps = PruneKv.option_help()
    for option in PRUNING_OPTIONS:
        pruning.add_argument(
            f"--{option}",
            type=_value_of(PruneKv, option),
            metavar=option.rpartition("-")[2].upper(),
            help=helps[option.replace("-", "_")],
        )
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run original and converted side by side, and refuse to write if they differ (default: on)",
    )
    p.add_argument("--verify-device", default="CPU", metavar="DEVICE", help="where to run them (default: CPU)")
    p.add_argument("--verify-seed", type=int, default=0, metavar="N", help="of the random prompts (default: 0)")
    p.add_argument(
        "--verify-layers",
        type=int,
        metavar="N",
        help=f"run the first N layers only (default: all, or {BIG_LAYERS} of a model over {BIG >> 30} GiB)",
    )
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


def convert(options: argparse.Namespace, console: Console, errors: Console) -> None:
    """Do what the command line asks. Raises OvtqError; leaves the input untouched, and OUT_DIR whole or as it was."""
    given = dict(vars(options), settings=pipeline.parse_settings(options.settings))
    asked = Options(**{field.name: given[field.name] for field in dataclasses.fields(Options)})
    checks = Checks(**{field.name: given[field.name] for field in dataclasses.fields(Checks)})
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
        _report(console, options, made.record, made.cache_precision, time.perf_counter() - started)
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


def _value_of(cls: type[Pass], option: str) -> Callable[[str], Any]:
    """The parser of a flag that is an option of a pass; nothing at all is no value."""
    return lambda text: cls.values({option: text})[option.replace("-", "_")] if text else None


def _window_bits(text: str) -> tuple[Any, ...] | None:
    if not text:
        return None
    bits = text.split(",")
    if len(bits) != 2:
        raise InputError(f"--window-bits: expected K,V such as 8,4, got {text!r}")
    found = TruncateWindow.values({"k-bits": bits[0], "v-bits": bits[1]})
    return found["k_bits"], found["v_bits"]


def _packed_line(found: Mapping[str, Any]) -> str:
    packed = found["packed"]
    line = (
        f"that is where no token read was quantised{' and none pruned' if packed['pruned'] else ''}; elsewhere each of "
        f"{packed['layers']} {'pruned' if packed['pruned'] else 'packed'} layers is within "
        f"{packed['relative']:.2g} of the same attention in numpy"
    )
    if packed["pruned"]:
        line += f" (up to {packed['pruned']:,} tokens pruned, as the model itself counts)"
    if packed["kld"] is None:
        return line
    return (
        f"{line}, and over {packed['positions']} positions of random tokens the logits' mean KLD is "
        f"{packed['kld']:.2g}, with the same top at {packed['same_top']:.2%}"
    )


def _names(passes: Sequence[Pass]) -> str:
    return ", ".join(item.name for item in passes)


def _report(
    console: Console, options: argparse.Namespace, record: Mapping[str, Any], precision: str | None, seconds: float
) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns: tuple[tuple[str, JustifyMethod], ...] = (("pass", "left"), ("sites", "right"), ("", "left"))
    for column, justify in columns:
        table.add_column(column, justify=justify)
    for step in record["passes"]:
        notes = [f"{key}={value}" for key, value in step["options"].items()]
        table.add_row(step["name"], str(step["sites"]), " ".join([*notes, "" if step["exact"] else "lossy"]))
    made = f"preset {record['preset']}" if record["preset"] else "these passes"
    other = "cpu" if record["target"] == "gpu" else "gpu"
    console.print(f"{made}, in the form for a {record['target'].upper()} (for the other: --target {other})")
    if record["reason"]:
        console.print(f"chosen (--preset auto): {record['reason']}")
    if line := caution(record["target"], precision):
        console.print(line)
    console.print(table)
    for name, reason in record["skipped"].items():
        console.print(f"{name} left out: {reason}")

    for step in record["passes"]:
        if record["target"] == "cpu" and step["facts"].get("window", 0) > SHORT_WINDOW:
            console.print(
                f"what a window of {step['facts']['window']:,} tokens holds is copied in every step: texts of less "
                f"than some {PAYS * step['facts']['window']:,} tokens are slower than in the exported model"
            )

    table = Table(box=None, pad_edge=False, header_style="bold")
    before, after = record["state_bytes"]["before"], record["state_bytes"]["after"]
    for column in (f"state bytes ({options.target})", "before", "after"):
        table.add_column(column, justify="left" if column[0] == "s" else "right")
    rows = {"per token": "per_token", "flat": "flat", **{f"at {tokens:,}": str(tokens) for tokens in CONTEXTS}}
    for label, key in rows.items():
        table.add_row(label, f"{before[key]:,}", f"{after[key]:,}")
    console.print(table)

    takes = (
        "taken as it is"
        if record["paged_attention"]
        else (
            "not possible: GenAI's default falls back to the stateful path with a warning, ATTENTION_BACKEND=PA, "
            "scheduler_config, draft models and prompt lookup throw"
        )
    )
    console.print(f"paged attention: {takes}")
    if record["target"] == "gpu" and any(step["name"] == "quantize-kv" for step in record["passes"]):
        console.print(
            "a long prompt in one call takes memory on a GPU with packed layers: 18 GB in all for 8,192 tokens of "
            "GPT-OSS-20B, with the presets u8 and u4 15 GB"
        )
    if record["verified"]:
        found = record["verified"]
        every = found["layers"] == len(record["layers"])
        console.print(
            f"verified on {found['device']} at f32, {'all' if every else 'the first'} {found['layers']} layers"
            f"{'' if found['experts'] else ' without their experts'}: "
            f"largest difference {found['largest']:.3g} ({found['relative']:.2g} of the scale of "
            f"{'logits' if every and found['experts'] else 'results'}, allowed {found['tolerance']:.2g}"
            + (f", for rounding alone moves the original's by {found['rounding']:.2g}" if found["rounding"] else "")
            + "), same top at "
            f"{found['same_top']:.2%} of {found['positions']} positions"
            + (f"; {found['skipped']} behind a tie in a router left out" if found["skipped"] else ""),
        )
        if found["packed"]:
            console.print(_packed_line(found))
        host, lost = found["host"], found["host"]["converted"]
        console.print(
            f"as hosts load it, with no property ({host['precision']}, KV cache {host['cache']}), in calls of up to "
            f"{host['longest']:,} tokens, results are {lost['mean']:.2g} away from those at f32, the original's "
            f"{host['original']['mean']:.2g}; at the worst {STRETCH} positions in a row {lost['stretch']:.2g}, "
            f"the original's {host['original']['stretch']:.2g}",
        )
        if found["cache_precision"]:
            console.print(
                f"the plugin's own cache: {found['cache_precision']} in the model as compiled for {found['device']} "
                "without any property",
            )
    if options.dry_run:
        console.print("dry run: nothing was written")
    else:
        doubt = "" if record["verified"] else "; not verified"
        if record["config_file"]:
            if options.verify and not record["verified"]:
                doubt += ": its kernels run on a GPU alone, and there is none here (tools/gpu/emulated makes one)"
            console.print(
                "its kernels are loaded by the property CONFIG_FILE: LLMPipeline(DIR, 'GPU', **ovtq.properties(DIR)), "
                "OVModelForCausalLM.from_pretrained(DIR, device='GPU', ov_config=ovtq.properties(DIR))"
            )
        console.print(f"written to {options.out_dir} in {seconds:.1f} s{doubt}")
