#!/usr/bin/env python3
"""What a model allocates on a GPU at long contexts: its weights, its states, and the scratch of a call beside them.

usage: memory.py MODEL_DIR… [--chip lnl] [--config KEY=VALUE…] [--contexts 8192,32768] [--chunk 1024] [--whole 8192]
                 [--json FILE]

Runs OpenVINO's GPU plugin on a virtual chip (needs `install-virtual` and `install-emulated`) and adds up what it
allocates and frees through OpenCL: nothing executes there, but the allocations are those that a real chip would get.
The text is read in calls of --chunk tokens, up to each context; then come three decode steps. Bytes are

- weights: what is held once the model is compiled;
- states: by arithmetic, of the tokens read so far (floats are f16 there); room that the plugin reserves is scratch;
- chunk: the most that is held in the call which ends at the context, less weights and states: its scratch. So are
- decode: in the last of the steps then, with all that the calls before have left behind, and
- decode alone: in a step with states that were set, nothing else having been run ("–": the plugin takes none);
- whole: in a prefill of so many tokens in one call, as GenAI's stateful pipeline makes it, to empty states.

Logits are computed of each call's last token only, as in GenAI. A condition of an If is given by the host
(`probe.py --branch-by-length`). Not counted: what the driver keeps for itself (kernels, command buffers), and the
host's own memory. A step in which a cache outgrows its buffer holds the old and the new one for a while.

Exit code 2, and one line, for whatever is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ledger import LedgerError, configuration, run_probe
from rich.console import Console
from rich.table import Table

from ovtq.cli.command import listed, positive
from ovtq.errors import OvtqError
from ovtq.ir import io
from ovtq.ir.cache import marked
from ovtq.states import total

AS_A_HOST = ("--branch-by-length", "--last-logits")
COLUMNS = ("context", "states", "chunk", "decode", "decode_alone", "whole")


def state_bytes(model_dir: Path, contexts: list[int]) -> dict[int, int]:
    """Bytes of all states after so many tokens, as `ovtq-inspect` tells them for a GPU."""
    model = io.load(model_dir)
    these, asked = io.states_of(model), marked(model)
    return {tokens: total(these, tokens, "gpu", asked) for tokens in contexts}


def chunked(contexts: list[int], chunk: int) -> list[int]:
    """Tokens of the calls that read up to each context and then decode three tokens."""
    calls: list[int] = []
    for context in contexts:
        left = context - sum(calls)
        calls += [chunk] * (left // chunk) + [left % chunk] * (left % chunk > 0) + [1, 1, 1]
    return calls


def peaks(
    model_dir: Path, options: argparse.Namespace, config: dict[str, str], steps: str
) -> tuple[int, list[dict[str, Any]]]:
    """Bytes held once the model is compiled, and the reports of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        report = run_probe(model_dir, options.chip, config, steps, Path(folder), *AS_A_HOST)
    if not report["held"]:
        raise LedgerError("the launch log has no allocations: run install-emulated again")
    return report["held"], report["steps"]


def measure(model_dir: Path, options: argparse.Namespace, config: dict[str, str]) -> dict[str, Any]:
    """The memory of one model: bytes, those of a context in a row."""
    contexts, wholes = sorted(options.contexts), sorted(options.whole)
    calls = chunked(contexts, options.chunk)
    states = state_bytes(model_dir, sorted({*contexts, *wholes}))
    weights, steps = peaks(model_dir, options, config, ",".join(map(str, calls)))
    _, trial = peaks(model_dir, options, config, "1,=64,1")
    settable = trial[1]["tokens"] == 1  # else probe.py has read the text instead
    rows = []
    for context in contexts:
        last = next(i for i, step in enumerate(steps) if step["past"] + step["tokens"] >= context)
        row = {"context": context, "states": states[context]}
        row |= {"chunk": steps[last]["peak"], "decode": steps[last + 3]["peak"]}
        row |= {"decode_alone": None, "whole": None}
        if settable:
            held, alone = peaks(model_dir, options, config, f"1,={context},1,1,1")
            row["decode_alone"] = alone[-1]["peak"] - held + weights
        rows.append(row)
    for whole in wholes:
        held, steps = peaks(model_dir, options, config, str(whole))
        row = next((row for row in rows if row["context"] == whole), None)
        if row is None:
            row = dict.fromkeys(COLUMNS) | {"context": whole, "states": states[whole]}
            rows.append(row)
        row["whole"] = steps[0]["peak"] - held + weights
    for row in rows:
        for name in COLUMNS[2:]:
            row[name] = None if row[name] is None else row[name] - weights - row["states"]
    rows.sort(key=lambda row: row["context"])
    return {
        "model": str(model_dir),
        "chip": options.chip,
        "config": config,
        "chunk": options.chunk,
        "weights": weights,
        "rows": rows,
    }


def show(memory: dict[str, Any]) -> Table:
    title = f"{memory['model']} ({memory['chip']}): weights {memory['weights']:,}; states and scratch, MB"
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name.replace("_", " "), justify="right")
    for row in memory["rows"]:
        sizes = ("–" if row[name] is None else f"{row[name] / 1e6:,.1f}" for name in COLUMNS[1:])
        table.add_row(f"{row['context']:,}", *sizes)
    return table


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", type=Path, metavar="MODEL_DIR")
    p.add_argument("--chip", default="lnl", help="what VIRTUAL_GPU may be (default: %(default)s)")
    p.add_argument(
        "--config", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="of the plugin; INFERENCE_PRECISION_HINT=f16 unless said otherwise",
    )  # fmt: skip
    p.add_argument("--contexts", type=listed(positive, "tokens"), default=[8192, 32768, 131072], metavar="LIST")
    p.add_argument("--chunk", type=positive, default=1024, metavar="TOKENS", help="(default: %(default)s)")
    p.add_argument("--whole", type=listed(positive, "tokens"), default=[8192], metavar="LIST")
    p.add_argument("--json", type=Path, metavar="FILE")
    return p.parse_args()


def main() -> int:
    args = parse_args()
    try:
        config = configuration(args)
        found = [measure(path, args, config) for path in args.models]
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except (LedgerError, OvtqError, OSError) as error:
        print(f"memory: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 160)
    for memory in found:
        console.print(show(memory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
