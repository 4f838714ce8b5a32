"""ovtq-report: one page to look at, of what ovtq-eval and ovtq-bench measured; needs no network and no script."""

from __future__ import annotations

import argparse
import hashlib
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ovtq import files
from ovtq.cli import report_page
from ovtq.cli.command import Out, Parser, path_of, run
from ovtq.cli.report_page import POLICY, STYLE, joined, picture, render
from ovtq.errors import InputError
from ovtq.evidence import plots
from ovtq.ir import io

if TYPE_CHECKING:
    from markupsafe import Markup

KINDS = ("eval", "bench")
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
FONT = "system-ui, sans-serif"
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

Cell = Callable[[Mapping[str, Any]], Any]
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
        "results",
        nargs="+",
        type=path_of,
        metavar="RESULT.json",
        help="what ovtq eval --json or ovtq bench --output wrote",
    )
    p.add_argument(
        "--output",
        type=path_of,
        default=Path("report.html"),
        metavar="FILE",
        help="the page to write (default: %(default)s)",
    )
    return p


def _main(options: argparse.Namespace, console: Out) -> None:
    io.check_outputs({"--output": options.output}, (), options.results)
    check()
    write(options.output, [_read(path) for path in options.results], options.results)
    console.print(f"report: {options.output}")


def _read(path: Path) -> dict[str, Any]:
    found = files.read_json(path)
    if not isinstance(found, dict) or found.get("kind") not in KINDS:
        raise InputError(f"{path}: not written by ovtq-eval or ovtq-bench")
    return found


def check() -> None:
    """Raise InputError if what makes a report is not installed."""
    plots.check()
    report_page.check()


def write(path: Path, runs: Sequence[Mapping[str, Any]], sources: Sequence[Path] = ()) -> None:
    """The page of some runs, whole or not at all. Raises InputError, naming its source, for a run of another form."""
    page = _page([_clean(run) for run in runs], sources or [path] * len(runs))
    files.write(path, page)


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
            models.append(str(found["model"]))
    looks = plots.looks(labels)  # the same for a candidate in every picture
    parts = []
    for found, source in zip(runs, sources, strict=True):
        with _known_form(source):
            parts.append(_evaluation(found, looks) if found["kind"] == "eval" else _benchmark(found, looks))
    title = ", ".join(dict.fromkeys(models))
    return render("page", policy=POLICY, style=picture(STYLE), title=title, parts=parts)


def _evaluation(run: Mapping[str, Any], looks: Looks) -> Markup:
    rows, total = run["rows"], run["windows"] * run["window"]
    columns: list[Column] = [
        ("candidate", "text name", _name),
        ("cache, as the compiled model shows it", "text cache", lambda row: row["cache"]),
        ("bytes per token", "", lambda row: _whole(row["bytes_per_token"])),
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
    return joined(
        [
            render("evaluation", run=run, made=_made(run), total=f"{total:,}", window=f"{run['window']:,}"),
            _table(columns, rows, lambda row: row["role"]),
            _figure(plots.front(rows, looks), FRONT),
            _figure(plots.by_position(run, looks), POSITION),
            _figure(plots.needles(rows, looks), NEEDLES),
        ]
    )


def _benchmark(run: Mapping[str, Any], looks: Looks) -> Markup:
    machine = run["machine"]
    parts = [
        render("benchmark", run=run, made=_made(run), machine=machine, ram=f"{machine['ram'] / 2**30:,.0f}"),
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
    name: Column = ("candidate", "text name", _name)
    if run["prompts"]:
        parts.append(render("prompts"))
    for prompt in dict.fromkeys(row["prompt"] for row in run["prompts"]):
        rows = [row for row in run["prompts"] if row["prompt"] == prompt]
        read, new, runs = (rows[0][key] for key in ("prompt_tokens", "new_tokens", "runs"))
        parts.append(render("prompt", prompt=prompt, read=read, new=new, runs=runs))
        columns = [
            name,
            ("through", "text", lambda row: row["through"]),
            ("TTFT ms", "", lambda row: f"{row['ttft_ms']['median']:.1f}"),
            *shared,
            ("tokens/s", "", lambda row: f"{row['tokens_per_s']:.1f}"),
            *memory,
        ]
        parts.append(_table(columns, rows))
    if run["contexts"]:
        rows = run["contexts"]
        filled = "filled with noise" if rows[0]["filled"] else "prefilled"
        parts.append(render("contexts", filled=filled))
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
    return joined(parts)


def _table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], kind: Cell | None = None) -> Markup:
    heads = [(title, css) for title, css, _ in columns]
    body = [(kind(row) if kind else "", [(css, cell(row)) for _, css, cell in columns]) for row in rows]
    return render("table", heads=heads, rows=body)


def _figure(svg: str, caption: str) -> Markup:
    if not svg:
        return joined([])
    root = _inline(svg)
    root.set("role", "img")
    root.set("aria-label", caption)
    return render("figure", picture=picture(ElementTree.tostring(root, encoding="unicode")), caption=caption)


def _inline(svg: str) -> ElementTree.Element:
    """A picture fit for a page that has others: ids of its own, the page's ink and fonts, no style sheet."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root, own = ElementTree.fromstring(svg), "f" + hashlib.sha256(svg.encode()).hexdigest()[:10]
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.endswith(("}style", "}metadata"))]:
            parent.remove(child)  # a style sheet in a picture would be one for the whole page
    root.set("stroke-linejoin", "round")
    root.set("stroke-linecap", "butt")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    for element in root.iter():
        _unstyle(element)
        for key, value in list(element.attrib.items()):
            if key == "id" and value not in used:
                del element.attrib[key]
                continue
            value = f"{own}-{value}" if key == "id" else value
            value = value.replace("#", f"#{own}-", 1) if key == f"{{{XLINK}}}href" else value
            value = value.replace("url(#", f"url(#{own}-").replace(plots.INK, "currentColor")
            element.set(key, value.replace("'DejaVu Sans'", FONT))
    return root


def _unstyle(element: ElementTree.Element) -> None:
    """A `style` as attributes, each of which means the same: a page that may run nothing takes no style from them."""
    for rule in element.attrib.pop("style", "").split(";"):
        name, colon, value = (part.strip() for part in rule.partition(":"))
        if name == "font" and (found := re.fullmatch(r"(?:(\d+|bold) )?([\d.]+px) (.+)", value)):
            element.set("font-size", found[2])
            element.set("font-family", found[3])
            if found[1]:
                element.set("font-weight", found[1])
        elif colon:
            element.set(name, value)


def _made(run: Mapping[str, Any]) -> str:
    versions = run["versions"]
    made = f"ovtq {run['ovtq']}, openvino {versions['openvino'].split('-')[0]}, python {versions['python']}"
    return f"{run['date'][:10]}, {made}"


def _name(row: Mapping[str, Any]) -> Markup:
    """A candidate's name, which may break after what separates its words, and what is wrong with it."""
    reason = row.get("reason") or row.get("wrong")
    word = "WRONG" if row.get("verdict") == "wrong" else "not as asked"
    note = {"reference": " (the reference)", "floor": " (the noise floor)"}.get(row.get("role", ""), "")
    parts = re.split(r"(?<=[,:=/_])", row["candidate"])
    return render("name", parts=parts, note=note, reason=reason, word=word)


def _verdict(row: Mapping[str, Any]) -> Markup:
    return render("verdict", wrong=row["verdict"] == "wrong", verdict=row["verdict"])


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
