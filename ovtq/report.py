"""ovtq-report: one page to look at, of what ovtq-eval and ovtq-bench measured; needs no network and no script."""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ovtq import plots
from ovtq.command import Out, Parser, run
from ovtq.errors import InputError

KINDS = ("eval", "bench")
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --soft: #667; --line: #d8dce0; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181b; --ink: #e4e7ea; --soft: #9aa3ab; --line: #343a40; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 88rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.75rem 0 .25rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .25rem 0 1rem; max-width: 60rem; } .soft, figcaption { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th, td { white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } th.text, td.text { text-align: left; }
td.name { white-space: normal; min-width: 15rem; overflow-wrap: anywhere; font-weight: 600; }
td.cache { white-space: normal; min-width: 11rem; color: var(--soft); }
tr.reference td, tr.floor td { color: var(--soft); font-weight: 400; }
.wrong { color: var(--bad); font-weight: 600; white-space: normal; }
figure { margin: 1rem 0 0; overflow-x: auto; } figure svg { max-width: 100%; height: auto; min-width: 34rem; }
@media print { body { max-width: none; } figure svg { min-width: 0; } }
"""

FRONT = (
    "Quality for its size. The line joins those that no other beats in both; lossless ones stand at the bottom, at a "
    "tenth of the least loss."
)
POSITION = "Divergence over the position in the window: the further on, the more is read from the compressed cache."
NEEDLES = "Facts found, by the depth at which they were hidden (0: at the beginning) and the length of the text."
TPOT = "Time of a decode step; the line at 1 is the exported model."
STATES = (
    "Bytes of all states, as the device gives them out (the CPU plugin converts a compressed cache of its own to f32 "
    "for it)."
)
PEAK = "Peak memory of the process while it decodes."

Cell = Callable[[Mapping[str, Any]], str]
Column = tuple[str, str, Cell]  # title, CSS classes, text of a row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    errors = Console(stderr=True, highlight=False)
    return run("ovtq-report", lambda: _main(parser().parse_args(argv), Out()), errors)


def parser() -> Parser:
    """The command line."""
    p = Parser("ovtq-report", __doc__)
    p.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT.json", help="of ovtq-eval --json, ovtq-bench --output"
    )
    p.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="(default: %(default)s)")
    return p


def _main(options: argparse.Namespace, console: Out) -> None:
    check(options.output)
    write(options.output, [_read(path) for path in options.results])
    console.print(f"report: {options.output}")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    if not isinstance(found, dict) or found.get("kind") not in KINDS:
        raise InputError(f"{path}: not written by ovtq-eval or ovtq-bench")
    return found


def check(path: Path) -> None:
    """Raise InputError if a report can't be written to `path`."""
    plots.check()
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise InputError(f"--report {path}: no such folder, or not a file that can be written")


def write(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """The page of some runs, whole or not at all. Raises InputError if a run is not of the known form."""
    try:
        page = _page(runs)
    except (LookupError, TypeError) as error:
        raise InputError(f"{path}: the figures are not of this version's form ({error!r})") from None
    new = path.with_name(f".{path.name}.new")
    new.write_text(page, encoding="utf-8")
    new.replace(path)


def _page(runs: Sequence[Mapping[str, Any]]) -> str:
    models = ", ".join(dict.fromkeys(_text(run["model"]) for run in runs))
    parts = [_evaluation(run) if run["kind"] == "eval" else _benchmark(run) for run in runs]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ovtq: {models}</title><style>{STYLE}</style></head>\n<body><h1>{models}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _evaluation(run: Mapping[str, Any]) -> str:
    rows, total = run["rows"], run["windows"] * run["window"]
    columns: list[Column] = [
        ("candidate", "text name", lambda row: _text(row["candidate"]) + _why(row)),
        ("cache, as the compiled model shows it", "text cache", lambda row: _text(row["cache"])),
        ("bytes a token", "", lambda row: _whole(row["bytes_per_token"])),
        ("flat bytes", "", lambda row: _whole(row["flat_bytes"])),
        ("mean KLD", "", lambda row: f"{row['mean_kld']:.1e}"),
        ("median", "", lambda row: f"{row['median_kld']:.1e}"),
        ("99.9%", "", lambda row: f"{row['kld_p999']:.1e}"),
        ("same top", "", lambda row: f"{row['same_top']:.2%}"),
        ("bits/byte", "", lambda row: f"{row['bits_per_byte']:.4f}"),
        ("facts found", "", _found),
        ("greedy text the same", "", _greedy),
    ]
    return "".join(
        [
            f'<p class="soft">{_made(run)}: quality on {_text(run["device"])}</p><h2>Quality</h2>',
            f"<p>{total:,} tokens of {_text(run['text'])} in windows of {run['window']:,}, read {run['chunk']} at ",
            "a time. KLD is the divergence of the next-token distribution from that of the model as exported with a ",
            "cache of f32, in nats; lower is better. The noise floor is the same model read in other chunks: nothing ",
            "below it is a difference.</p>",
            _table(columns, rows, lambda row: row["role"]),
            _figure(plots.front(rows), FRONT),
            _figure(plots.by_position(run), POSITION),
            _figure(plots.needles(rows), NEEDLES),
        ]
    )


def _benchmark(run: Mapping[str, Any]) -> str:
    machine = run["machine"]
    parts = [
        f'<p class="soft">{_made(run)}: time and memory on {_text(run["device"])}, {_text(machine["cpu"])}, '
        f"{machine['cores']} cores</p>"
    ]
    shared: list[Column] = [
        ("TPOT ms", "", lambda row: f"{row['tpot_ms']['median']:.2f}"),
        ("ratio", "", lambda row: f"{row['tpot_ratio']['median']:.2f}"),
        ("25–75%", "", lambda row: f"{row['tpot_ratio']['low']:.2f}–{row['tpot_ratio']['high']:.2f}"),
    ]
    memory: list[Column] = [
        ("bytes of states", "", lambda row: _whole(row["state_bytes"])),
        ("peak MB, prefill", "", lambda row: _mega(row["rss_prefill"])),
        ("peak MB, decode", "", lambda row: _mega(row["rss_decode"])),
    ]
    name: Column = ("candidate", "text name", lambda row: _text(row["candidate"]) + _why(row))
    if run["prompts"]:
        parts.append("<h2>Prompts</h2><p>Medians; ratios are to the exported model's run beside it.</p>")
    for prompt in dict.fromkeys(row["prompt"] for row in run["prompts"]):
        rows = [row for row in run["prompts"] if row["prompt"] == prompt]
        read, new, runs = (rows[0][key] for key in ("prompt_tokens", "new_tokens", "runs"))
        parts.append(f'<h3>{_text(prompt)}</h3><p class="soft">{read} + {new} tokens, {runs} runs</p>')
        columns = [
            name,
            ("through", "text", lambda row: _text(row["through"])),
            ("TTFT ms", "", lambda row: f"{row['ttft_ms']['median']:.1f}"),
            *shared,
            ("tokens/s", "", lambda row: f"{row['tokens_per_s']:.1f}"),
            *memory,
        ]
        parts.append(_table(columns, rows))
    if run["contexts"]:
        rows = run["contexts"]
        filled = "filled with noise" if rows[0]["filled"] else "prefilled"
        parts.append(
            f"<h2>Over the context</h2><p>One decode step after so many tokens ({filled}). Ratios are medians over "
            "blocks of steps, each to the exported model's block beside it: below 1 is faster.</p>"
        )
        columns = [
            name,
            ("tokens", "", lambda row: f"{row['context']:,}"),
            *shared,
            ("prefill s", "", lambda row: "–" if row["prefill_s"] is None else f"{row['prefill_s']:.2f}"),
            ("ratio", "", lambda row: "–" if row["prefill_ratio"] is None else f"{row['prefill_ratio']:.2f}"),
            *memory,
        ]
        parts += [
            _figure(plots.over_context(rows, "tpot_ratio"), TPOT),
            _figure(plots.over_context(rows, "state_bytes"), STATES),
            _figure(plots.over_context(rows, "rss_decode"), PEAK),
            _table(columns, rows),
        ]
    return "".join(parts)


def _table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], kind: Cell | None = None) -> str:
    head = "".join(f'<th class="{css}">{_text(title)}</th>' for title, css, _ in columns)
    body = "".join(
        f'<tr class="{_text(kind(row)) if kind else ""}">'
        + "".join(f'<td class="{css}">{cell(row)}</td>' for _, css, cell in columns)
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(svg: str, caption: str) -> str:
    if not svg:
        return ""
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{_text(caption)}" ', 1)
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _made(run: Mapping[str, Any]) -> str:
    return _text(f"{run['date'][:10]}, ovtq {run['ovtq']}, openvino {run['versions']['openvino'].split('-')[0]}")


def _why(row: Mapping[str, Any]) -> str:
    reason = row.get("reason") or row.get("wrong")
    word = "WRONG" if row.get("verdict") == "wrong" else "not as asked"
    note = {"reference": " (the reference)", "floor": " (the noise floor)"}.get(row.get("role", ""), "")
    return f'{note}<div class="wrong">{word}: {_text(reason)}</div>' if reason else note


def _found(row: Mapping[str, Any]) -> str:
    cells = row.get("needles")
    return f"{sum(c['right'] for c in cells)} of {sum(c['of'] for c in cells)}" if cells else "–"


def _greedy(row: Mapping[str, Any]) -> str:
    greedy = row.get("greedy")
    return f"{greedy['same']:.1f} of {greedy['tokens']} tokens" if greedy else "–"


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _mega(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.0f}"


def _text(value: Any) -> str:
    return html.escape(str(value))
