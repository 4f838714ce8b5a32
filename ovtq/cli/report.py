"""ovtq-report: one page to look at, of what ovtq-eval and ovtq-bench measured; needs no network and no script."""

from __future__ import annotations

import argparse
import hashlib
import html
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ovtq import files
from ovtq.cli.command import Out, Parser, path_of, run
from ovtq.errors import InputError
from ovtq.evidence import plots

KINDS = ("eval", "bench")
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
FONT = "system-ui, sans-serif"
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
td { white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } th.text, td.text { text-align: left; }
td.name { white-space: normal; min-width: 13rem; overflow-wrap: anywhere; font-weight: 600; }
th.name, td.name { position: sticky; left: 0; background: var(--paper); }
td.cache { white-space: normal; min-width: 10rem; color: var(--soft); }
tr.reference td, tr.floor td { color: var(--soft); font-weight: 400; }
.wrong { color: var(--bad); font-weight: 600; white-space: normal; }
figure { margin: 1rem 0 0; overflow-x: auto; } figure svg { max-width: 100%; height: auto; min-width: 34rem; }
section + section { margin-top: 3.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
@media (max-width: 40rem) { td.name { min-width: 8.5rem; } body { padding: 1.25rem .75rem 3rem; } }
@media print {
  body { max-width: none; padding: 0; } .scroll, figure { overflow: visible; } figure svg { min-width: 0; }
  table { font-size: 6.5pt; } td.name, td.cache { min-width: 0; } th.name, td.name { position: static; }
  tr, figure { break-inside: avoid; } }
"""

FRONT = (
    "Quality for its size: the further down and left, the better. The line joins those that no other beats in both. "
    "Hollow: equal to the reference, drawn at a tenth of the least loss; wrong ones are left out."
)
POSITION = (
    "Divergence over the position in the window: the further on, the more is read from the compressed cache. What is "
    "under a hundred-thousandth of the largest is cut off; dashed: wrong."
)
NEEDLES = "Facts found, by the depth at which they were hidden (0: at the beginning) and the length of the text."
TPOT = "Time of a decode step; the line at 1 is the exported model, below it is faster."
STATES = (
    "Bytes of all states, as the device gives them out (the CPU plugin converts a compressed cache of its own to f32 "
    "for it)."
)
PEAK = "Peak memory of the process while it decodes."

Cell = Callable[[Mapping[str, Any]], str]
Looks = Mapping[str, plots.Look]
Column = tuple[str, str, Cell]  # title, CSS classes, text of a row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    errors = Console(stderr=True, highlight=False)
    return run("ovtq-report", lambda: _main(parser().parse_args(argv), Out()), errors, argv=argv)


def parser() -> Parser:
    """The command line."""
    p = Parser("ovtq-report", __doc__)
    p.add_argument(
        "results", nargs="+", type=path_of, metavar="RESULT.json", help="of ovtq-eval --json, ovtq-bench --output"
    )
    p.add_argument("--output", type=path_of, default=Path("report.html"), metavar="FILE", help="(default: %(default)s)")
    return p


def _main(options: argparse.Namespace, console: Out) -> None:
    check(options.output, "--output")
    write(options.output, [_read(path) for path in options.results], options.results)
    console.print(f"report: {options.output}")


def _read(path: Path) -> dict[str, Any]:
    found = files.read_json(path)
    if not isinstance(found, dict) or found.get("kind") not in KINDS:
        raise InputError(f"{path}: not written by ovtq-eval or ovtq-bench")
    return found


def check(path: Path, option: str = "--report") -> None:
    """Raise InputError if a report can't be written to `path`, which `option` names."""
    plots.check()
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise InputError(f"{option} {path}: no such folder, or not a file that can be written")


def write(path: Path, runs: Sequence[Mapping[str, Any]], sources: Sequence[Path] = ()) -> None:
    """The page of some runs, whole or not at all. Raises InputError, naming its source, for a run of another form."""
    page = _page([_clean(run) for run in runs], sources or [path] * len(runs))
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(page, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def _known_form(source: Path) -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(f"{source}: the figures are not of this version's form ({error!r})") from None


def _clean(value: Any) -> Any:
    """The same with what no page can hold in its strings (control characters, lone surrogates) made visible."""
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    if not isinstance(value, str):
        return value
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in value)


def _page(runs: Sequence[Mapping[str, Any]], sources: Sequence[Path]) -> str:
    models: list[str] = []
    labels: list[str] = []
    for found, source in zip(runs, sources, strict=True):
        with _known_form(source):
            rows = found["rows"] if found["kind"] == "eval" else [*found["prompts"], *found["contexts"]]
            labels += [row["candidate"] for row in rows if row.get("role") != "floor"]
            models.append(_text(found["model"]))
    looks = plots.looks(labels)  # the same for a candidate in every picture
    parts = []
    for found, source in zip(runs, sources, strict=True):
        with _known_form(source):
            text = _evaluation(found, looks) if found["kind"] == "eval" else _benchmark(found, looks)
        parts.append(f"<section>{text}</section>")
    title = ", ".join(dict.fromkeys(models))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ovtq: {title}</title><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _evaluation(run: Mapping[str, Any], looks: Looks) -> str:
    rows, total = run["rows"], run["windows"] * run["window"]
    columns: list[Column] = [
        ("candidate", "text name", lambda row: _name(row["candidate"]) + _why(row)),
        ("cache, as the compiled model shows it", "text cache", lambda row: _text(row["cache"])),
        ("bytes a token", "", lambda row: _whole(row["bytes_per_token"])),
        ("flat bytes", "", lambda row: _whole(row["flat_bytes"])),
        ("mean KLD", "", lambda row: _nats(row["mean_kld"])),
        ("median", "", lambda row: _nats(row["median_kld"])),
        ("99.9%", "", lambda row: _nats(row["kld_p999"])),
        ("same top", "", lambda row: f"{row['same_top']:.2%}"),
        ("bits/byte", "", lambda row: f"{row['bits_per_byte']:.4f}"),
        ("facts found", "", _found),
        ("greedy text the same", "", _greedy),
        ("verdict", "text", _verdict),
    ]
    return "".join(
        [
            f'<p class="soft">{_made(run)}: quality on {_text(run["device"])}</p><h2>Quality</h2>',
            f"<p>{total:,} tokens of {_text(run['text'])} in windows of {run['window']:,}, read {run['chunk']} at ",
            "a time. KLD is the divergence of the next-token distribution from that of the model as exported with a ",
            "cache of f32, in nats; lower is better. The noise floor is the same model read in other chunks: nothing ",
            "below it is a difference. Greedy text: how many tokens it stays the reference's, on average, and how ",
            "many texts are so to their end.</p>",
            _table(columns, rows, lambda row: row["role"]),
            _figure(plots.front(rows, looks), FRONT),
            _figure(plots.by_position(run, looks), POSITION),
            _figure(plots.needles(rows, looks), NEEDLES),
        ]
    )


def _benchmark(run: Mapping[str, Any], looks: Looks) -> str:
    machine = run["machine"]
    parts = [
        f'<p class="soft">{_made(run)}: time and memory on {_text(run["device"])}, {_text(machine["cpu"])}, '
        f"{machine['cores']} cores, {machine['ram'] / 2**30:,.0f} GiB</p>"
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
    name: Column = ("candidate", "text name", lambda row: _name(row["candidate"]) + _why(row))
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
            _figure(plots.over_context(rows, "tpot_ratio", looks), TPOT),
            _figure(plots.over_context(rows, "state_bytes", looks), STATES),
            _figure(plots.over_context(rows, "rss_decode", looks), PEAK),
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
    root = _inline(svg)
    root.set("role", "img")
    root.set("aria-label", caption)
    picture = ElementTree.tostring(root, encoding="unicode")
    return f"<figure>{picture}<figcaption>{_text(caption)}</figcaption></figure>"


def _inline(svg: str) -> ElementTree.Element:
    """A picture fit for a page that has others: ids of its own, the page's ink and fonts, no style sheet."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root, own = ElementTree.fromstring(svg), "f" + hashlib.sha256(svg.encode()).hexdigest()[:10]
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.endswith(("}style", "}metadata"))]:
            parent.remove(child)  # a style sheet in a picture would be one for the whole page
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id" and value not in used:
                del element.attrib[key]
                continue
            value = f"{own}-{value}" if key == "id" else value
            value = value.replace("#", f"#{own}-", 1) if key == f"{{{XLINK}}}href" else value
            value = value.replace("url(#", f"url(#{own}-").replace(plots.INK, "currentColor")
            element.set(key, value.replace("'DejaVu Sans'", FONT))
    return root


def _made(run: Mapping[str, Any]) -> str:
    versions = run["versions"]
    made = f"ovtq {run['ovtq']}, openvino {versions['openvino'].split('-')[0]}, python {versions['python']}"
    return _text(f"{run['date'][:10]}, {made}")


def _why(row: Mapping[str, Any]) -> str:
    reason = row.get("reason") or row.get("wrong")
    word = "WRONG" if row.get("verdict") == "wrong" else "not as asked"
    note = {"reference": " (the reference)", "floor": " (the noise floor)"}.get(row.get("role", ""), "")
    return f'{note}<div class="wrong">{word}: {_text(reason)}</div>' if reason else note


def _verdict(row: Mapping[str, Any]) -> str:
    wrong = row["verdict"] == "wrong"
    return '<span class="wrong">wrong</span>' if wrong else _text(row["verdict"])


def _name(label: str) -> str:
    """A candidate's name that may break after what separates its words."""
    return "<wbr>".join(_text(part) for part in re.split(r"(?<=[,:=/_])", label))


def _nats(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _found(row: Mapping[str, Any]) -> str:
    cells = row.get("needles")
    return f"{sum(c['right'] for c in cells)} of {sum(c['of'] for c in cells)}" if cells else "–"


def _greedy(row: Mapping[str, Any]) -> str:
    greedy = row.get("greedy")
    if not greedy:
        return "–"
    return f"{greedy['same']:.1f} of {greedy['tokens']} tokens, {greedy['identical']} of {greedy['prompts']} texts"


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _mega(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.0f}"


def _text(value: Any) -> str:
    return html.escape(str(value))
