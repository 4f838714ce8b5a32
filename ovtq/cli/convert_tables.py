"""What `ovtq-convert` prints of a conversion, from its record."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table

from ovtq import states
from ovtq.automatic import caution
from ovtq.cli.command import plain_table
from ovtq.conversion import CONTEXTS
from ovtq.forms.window import PAYS, SHORT_WINDOW
from ovtq.passes import OwnOperations
from ovtq.verification.closeness import STRETCH

Record = Mapping[str, Any]


def _table(columns: Mapping[str, JustifyMethod]) -> Table:
    table = plain_table()
    for column, justify in columns.items():
        table.add_column(column, justify=justify)
    return table


def show(console: Console, record: Record, precision: str | None) -> None:
    """The passes, the bytes of the states, what hosts take, and what verification found.

    `precision` is that of the plugin's own caches, if the model asks for one.
    """
    made = f"preset {record['preset']}" if record["preset"] else "these passes"
    other = "cpu" if record["target"] == "gpu" else "gpu"
    console.print(f"{made}, in the form for a {record['target'].upper()} (for the other: --target {other})")
    if record["reason"]:
        console.print(f"chosen (--preset auto): {record['reason']}")
    if line := caution(record["target"], precision):
        console.print(line)
    console.print(_passes(record))
    for step in record["passes"]:
        if bits := step["facts"].get("bits"):
            console.print(_bits_line(bits, step["facts"].get("predicted_kld")))
    for name, reason in record["skipped"].items():
        console.print(f"{name} left out: {reason}")
    for line in _window_lines(record):
        console.print(line)
    console.print(_state_bytes(record))
    for line in _host_lines(record):
        console.print(line)
    if record["verified"]:
        for line in _verified_lines(record):
            console.print(line)


def show_end(console: Console, options: argparse.Namespace, record: Record, seconds: float) -> None:
    """Where it was written, and how to load it."""
    if options.dry_run:
        console.print("dry run: nothing was written")
        return
    doubt = "" if record["verified"] else "; not verified"
    if record["config_file"]:
        if options.verify and not record["verified"]:
            doubt += ": its kernels run on a GPU alone, and there is none here (tools/gpu/emulated makes one)"
        needed = "the property CONFIG_FILE"
        if any(step["name"] == OwnOperations.name for step in record["passes"]):
            needed += " and an extension"
        console.print(
            f"a host needs {needed} for its kernels: ovtq.load(DIR) is an LLMPipeline that has it, "
            "ovtq.load(DIR, 'optimum') an OVModelForCausalLM; others: docs/kernels.md"
        )
    console.print(f"written to {options.out_dir} in {seconds:.1f} s{doubt}")


def _passes(record: Record) -> Table:
    table = _table({"pass": "left", "sites": "right", "": "left"})
    for step in record["passes"]:
        notes = [f"{key}={value}" for key, value in step["options"].items()]
        table.add_row(step["name"], str(step["sites"]), " ".join([*notes, "" if step["exact"] else "lossy"]))
    return table


def _bits_line(bits: Mapping[str, Sequence[int]], predicted: float | None) -> str:
    """Bits by layer, neighbours alike in one, and what they are predicted to lose."""
    runs = [
        (key, [index for index, _ in some])
        for key, some in itertools.groupby(bits.items(), lambda item: tuple(item[1]))
    ]
    words = [f"{these[0]}{f' to {these[-1]}' if len(these) > 1 else ''}: {key}/{value}" for (key, value), these in runs]
    line = f"bits of keys/values, by full layer: {', '.join(words)}"
    return line if predicted is None else f"{line}; predicted mean KLD {predicted:.2g}"


def _window_lines(record: Record) -> Iterator[str]:
    for step in record["passes"]:
        if record["target"] == "cpu" and step["facts"].get("window", 0) > SHORT_WINDOW:
            yield (
                f"what a window of {step['facts']['window']:,} tokens holds is copied in every step: texts of less "
                f"than some {PAYS * step['facts']['window']:,} tokens are slower than in the exported model"
            )


def _state_bytes(record: Record) -> Table:
    table = _table({f"state bytes ({record['target']})": "left", "before": "right", "after": "right"})
    before, after = record["state_bytes"]["before"], record["state_bytes"]["after"]
    rows = {"per token": "per_token", "flat": "flat", **{f"at {tokens:,}": str(tokens) for tokens in CONTEXTS}}
    room = states.capacity(record["states"])
    for label, key in rows.items():
        over = room is not None and key.isdigit() and int(key) > room
        table.add_row(label, f"{before[key]:,}", f"room for {room:,} tokens" if over else f"{after[key]:,}")
    return table


def _host_lines(record: Record) -> Iterator[str]:
    takes = (
        "taken as it is"
        if record["paged_attention"]
        else (
            "not possible: GenAI's default falls back to the stateful path with a warning, ATTENTION_BACKEND=PA, "
            "scheduler_config, draft models and prompt lookup throw"
        )
    )
    yield f"paged attention: {takes}"
    if record["target"] == "gpu" and any(step["name"] == "quantize-kv" for step in record["passes"]):
        yield (
            "a long prompt in one call takes more memory on a GPU with packed layers than with the presets u8 and u4: "
            "docs/benchmarks/20b-gpu.md"
        )


def _verified_lines(record: Record) -> Iterator[str]:
    found = record["verified"]
    every = found["layers"] == len(record["layers"])
    yield (
        f"verified on {found['device']} at f32, {'all' if every else 'the first'} {found['layers']} layers"
        f"{'' if found['experts'] else ' without their MLPs or experts'}: "
        f"largest difference {found['largest']:.3g} ({found['relative']:.2g} of the scale of "
        f"{'logits' if every and found['experts'] else 'results'}, allowed {found['tolerance']:.2g}"
        + (f", for rounding alone moves the original's by {found['rounding']:.2g}" if found["rounding"] else "")
        + f"), same top at {found['same_top']:.2%} of {found['positions']} positions"
        + (f"; {found['skipped']} behind a tie in a router left out" if found["skipped"] else "")
    )
    if found["packed"]:
        yield _packed_line(found)
    host, lost = found["host"], found["host"]["converted"]
    yield (
        f"as hosts load it, with no property ({host['precision']}, KV cache {host['cache']}), in calls of up to "
        f"{host['longest']:,} tokens, results are {lost['mean']:.2g} away from those at f32, the original's "
        f"{host['original']['mean']:.2g}; at the worst {STRETCH} positions in a row {lost['stretch']:.2g}, "
        f"the original's {host['original']['stretch']:.2g}"
    )
    if found["cache_precision"]:
        yield (
            f"the plugin's own cache: {found['cache_precision']} in the model as compiled for {found['device']} "
            "without any property"
        )


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
