"""The tables of docs/benchmarks, from the figures in the JSON beside them.

In a page, what stands between `<!-- table NAME of FILE -->` and `<!-- end -->` is made from FILE, which is one of

- a page's own figures: {"tables": {NAME: {"about": …, "columns": …, "rows": …}}}. A column has a head and a form, such
  as "{.2f} ({.2f}–{.2f})", for the numbers of its cells; a cell is a number, a list of them, a text, or, where
  its form is another, {"form": …, "values": …}.
- what tools/measure_text.py --json writes: {"runs": {NAME: {"about": …, "measured": …}}}, rows by model and hint.
- what tools/measure_real_models.py --json writes: "quality" by cache and basis, "hosts", with no property, and
  "needles", answers that are right.
- what ovtq-bench --output writes: "tpot" are the ratios of decode steps, by context and candidate.
- tests/data/ledger_20b.json (tests/ledgers_20b.py): "step", "memory" and "bound"; of kernels beside others, "kernels".
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovtq.evidence import roofline

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools" / "gpu"))
from at_24 import EXPORTED, KERNELS, kernels, needs, of_a_full_layer  # noqa: E402

FOLDER = ROOT / "docs" / "benchmarks"
PART = re.compile(r"(<!-- table (\S+) of (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
PLACE = re.compile(r"\{([,.\w]*)\}")  # of a number in a form
ORDER = ("rotate", "exact", "u8", "u4", "k8v4", "k6v4", "k4v4")
SHAPE = {  # of GPT-OSS-20B
    "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 24, "vocab_size": 201_088,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}  # fmt: skip


def filled(text: str, folder: Path = FOLDER) -> str:
    """A page whose tables are made anew. Raises LookupError for a table that is not there."""
    return PART.sub(lambda part: f"{part[1]}{made(folder / part[3], part[2])}\n{part[5]}", text)


def made(path: Path, name: str) -> str:
    """The table of that name, from a file of figures."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if "tables" in found:
        return of_page(found["tables"][name])
    if "runs" in found:
        return of_texts(found["runs"][name])
    if found.get("kind") == "bench":
        return {"tpot": of_bench}[name](found)
    if found.get("kind") == "eval":
        return {"quality": of_quality, "hosts": of_hosts, "needles": of_needles}[name](found)
    kinds: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "step": of_step, "memory": of_memory, "bound": of_bound, "kernels": of_kernels,
    }  # fmt: skip
    return kinds[name](found)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """A table; the columns of these numbers stand right."""
    rule = ["---:" if at in right else "---" for at in range(len(heads))]
    return "\n".join("|" + "|".join(f" {x} " if x else " " for x in row) + "|" for row in (heads, rule, *rows))


def numbers(heads: Sequence[str], rows: Sequence[Sequence[str]], first: int = 0) -> str:
    """A table of numbers from the `first` column on."""
    return markdown(heads, rows, range(first, len(heads)))


def number(value: float, form: str) -> str:
    """As `format` does; exponents are short: 1.2e-4."""
    return re.sub(r"e([+-])0*(\d)", lambda found: f"e{found[1].removeprefix('+')}{found[2]}", format(value, form))


def cell(value: Any, form: str) -> str:
    """One cell of a page's own figures."""
    if isinstance(value, Mapping):
        return cell(value["values"], value["form"])
    if value is None or isinstance(value, str):
        return value or ""
    numbers = iter(value if isinstance(value, list) else [value])
    text = PLACE.sub(lambda place: number(next(numbers), place[1]), form)
    if next(numbers, None) is not None:
        raise ValueError(f"{value}: too many numbers for {form!r}")
    return text


# ---------------------------------------------------------------------------------------------------- kinds of figures


def of_page(table: Mapping[str, Any]) -> str:
    """A page's own figures."""
    columns = table["columns"]
    rows = [[cell(x, column["form"]) for x, column in zip(row, columns, strict=True)] for row in table["rows"]]
    right = {at for at, column in enumerate(columns) if column.get("right")}
    return markdown([column["head"] for column in columns], rows, right)


def of_texts(run: Mapping[str, Any]) -> str:
    """Perplexities by model, a column for each measured file and hint, lengths of calls one after the other."""
    measured, columns = run["measured"], run["columns"]
    names = list(dict.fromkeys(row["model"] for row in measured[0]["rows"]))
    rows = []
    for name in names:
        found = []
        for column in columns:
            rows_of = (row for row in measured[column["of"]]["rows"] if row["model"] == name)
            values = next(row["perplexity"] for row in rows_of if row["hint"] == column["hint"])
            found.append(" · ".join(f"{value:.2f}" for value in values))
        preset, _, target = name.partition(" ")
        rows.append([name if name == "as exported" else f"`{preset}` {target}", *found])
    return markdown(["", *(column["head"] for column in columns)], rows)


def of_bench(found: Mapping[str, Any]) -> str:
    """Medians of the ratios of a decode step, a row for each context; copies of the exported model are left out."""
    rows = found["contexts"]
    names = [name for name in dict.fromkeys(row["candidate"] for row in rows) if _preset(name)]
    ratio = {(row["context"], row["candidate"]): row["tpot_ratio"]["median"] for row in rows}
    contexts = dict.fromkeys(row["context"] for row in rows)
    lines = [[f"{context:,}", *(f"{ratio[context, name]:.2f}" for name in names)] for context in contexts]
    return numbers(["tokens", *(f"`{_preset(name)}`" for name in names)], lines)


def _preset(name: str) -> str:
    """Of a candidate whose folder is named after it; empty if it is the exported model."""
    return next((preset for preset in ORDER if Path(name).name.endswith(preset)), "")


WAYS = {"": "", "paged": ", paged attention", "GPU": ", as a GPU stores it"}  # in which a cache is measured
BASES = ("rotation", "weights", "calibrated")
HEADS = ["as exported", "rotated", "basis of weights", "calibrated"]


def of_quality(found: Mapping[str, Any]) -> str:
    """Mean KLD, its 99.9% quantile and how often the most likely token is the same, by cache and by basis."""
    return _by_basis(found, _loss, sized=True)


def of_needles(found: Mapping[str, Any]) -> str:
    """Answers that are right, of how many, by cache and by basis."""
    return _by_basis(found, _right, sized=False)


def _by_basis(found: Mapping[str, Any], shown: Callable[[Mapping[str, Any] | None], str], sized: bool) -> str:
    """A line for each cache, in it a cell for the exported model and for each basis; none and no column without any."""
    rows = {row["candidate"]: row for row in found["rows"] if row["role"] == "candidate"}
    caches = dict.fromkeys(name.rpartition(", ")[0] for name in rows if not name.startswith("as hosts"))
    lines = []
    for cache in sorted((name for name in caches if "as exported" not in name), key=_place):
        way, colon, kind = cache.rpartition(": ")
        exported = rows.get(f"{way}{colon}as exported, {kind}")
        ours = [rows.get(f"{cache}, {basis}") for basis in BASES]
        size = next(row for row in (*ours, exported) if row)
        flat = f" and {size['flat_bytes'] / 1e6:.1f} MB" if size["flat_bytes"] > 1e5 else ""
        bits, _, more = kind.partition(" ")
        name = f"`{bits}`{f' {more}' if more else ''}{WAYS[way]}"
        lines.append([name, f"{size['bytes_per_token']:,}{flat}", *map(shown, (exported, *ours))])
    lines = [line for line in lines if any(line[2:])]
    kept = [at for at in range(len(HEADS) + 2) if at == 0 or (sized and at == 1) or (at > 1 and _any(lines, at))]
    heads = ["cache", "bytes per token", *HEADS]
    return numbers([heads[at] for at in kept], [[line[at] for at in kept] for line in lines], 1)


def _any(lines: Sequence[Sequence[str]], at: int) -> bool:
    return any(line[at] for line in lines)


def _place(cache: str) -> tuple[int, int, str]:
    """By way; more bits first."""
    order = ("u8", "u4", "k8v4", "k6v4", "k4v4", "k4v3", "k3v3")
    way, _, kind = cache.rpartition(": ")
    bits, _, more = kind.partition(" ")
    return [*WAYS].index(way), order.index(bits), more


def _loss(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    mean, most = number(row["mean_kld"], ".2e"), number(row["kld_p999"], ".1e")
    return f"{mean} ({most}, {row['same_top']:.2%})"


def _right(row: Mapping[str, Any] | None) -> str:
    cells = (row or {}).get("needles") or []
    return f"{sum(cell['right'] for cell in cells)} of {sum(cell['of'] for cell in cells)}" if cells else ""


def of_hosts(found: Mapping[str, Any]) -> str:
    """The same, loaded as hosts do, beside the exported model at f32; which cache that was."""
    lines = []
    for row in found["rows"]:
        name = row["candidate"].removeprefix("as hosts load it: ")
        if name != row["candidate"]:
            kind, _, basis = name.partition(", ")
            label = name if not basis else f"`{kind}`, {'rotated' if basis == 'rotation' else basis}"
            bits = f"{row['bits_per_byte']:.4f}"
            lines.append([label, f"{row['bytes_per_token']:,}", row["computes"], _loss(row), bits])
    return markdown(["", "bytes per token", "computes in", "mean KLD", "bits per byte"], lines, (1, 3, 4))


def of_step(record: Mapping[str, Any]) -> str:
    """What a decode step moves and launches, by preset."""
    rows = {
        "bytes": [of_a_full_layer(preset, record[preset]) for preset in ORDER],
        "kernels per step": [kernels(record[preset]) for preset in ORDER],
        "copies per step": [record[preset]["4"]["copies"] for preset in ORDER],
    }
    lines = [[name, *(f"{value:,.0f}" for value in values)] for name, values in rows.items()]
    return numbers(["", *(f"`{preset}`" for preset in ORDER)], lines, 1)


def of_memory(record: Mapping[str, Any]) -> str:
    """What 24 layers need, in GB: weights and states, and scratch in a prefill call and in the steps after."""
    contexts = [row["context"] for row in record[ORDER[0]]["2"]["memory"]["rows"]]
    lines = []
    for preset in ORDER:
        line, sums = [f"`{preset}`"], {context: needs(record[preset], context) for context in contexts}
        for found in sums.values():
            held, chunk, decode = (
                (found["weights"] + found["states"]) / 1e9,
                found["chunk"] / 1e9,
                found["decode"] / 1e9,
            )
            line.append(f"{held:.1f} + {chunk:.1f} / {decode:.1f}")
        first = sums[contexts[0]]
        lines.append([*line, f"{(first['weights'] + first['states'] + first['whole']) / 1e9:.1f}"])
    heads = [f"{contexts[0]:,} tokens", *(f"{context:,}" for context in contexts[1:])]
    return numbers(["", *heads, f"{contexts[0]:,} in one call"], lines, 1)


def of_kernels(record: Mapping[str, Any]) -> str:
    """A decode step and the memory of 24 layers, with kernels and without: bytes of a full layer, GB, milliseconds."""
    contexts, long = (32768, 131072), 131072
    found = roofline.table(SHAPE, "arc-140v", [long])
    least = {row["cache"]: row["least_ms"] for row in found["rows"]}
    lines = []
    for preset in (*KERNELS, "k6v4", "u8", "u4", "exact"):
        of = record[preset]
        line = [f"`{preset}`", f"{of_a_full_layer(preset, of):,.0f}", f"{kernels(of):,.0f}", f"{of['4']['copies']:,}"]
        for context in contexts:
            need = needs(of, context)
            line.append(" + ".join(f"{need[name] / 1e9:.2f}" for name in ("states", "chunk")))
        lines.append([*line, f"{least[preset]:.1f}"])
    paged = "paged u4"
    lines.append([paged, f"{roofline.CACHES[paged].full:,}, all layers", *[""] * 4, f"{least[paged]:.1f}"])
    memory = (f"GB at {context:,}" for context in contexts)
    heads = ["", "bytes", "kernels per step", "copies", *memory, f"ms at {long:,}"]
    return numbers(heads, lines, 1)


def of_bound(_: Mapping[str, Any]) -> str:
    """The least time of a step on Arc 140V, which has the record's figures (`ovtq.evidence.roofline`)."""
    contexts = (200, 8192, 32768, 131072)
    found = roofline.table(SHAPE, "arc-140v", contexts)
    least = {(row["cache"], row["context"]): row["least_ms"] for row in found["rows"]}
    names = [EXPORTED, *ORDER[1:], "paged u4"]
    lines = []
    for context in contexts:
        values = [least[name, context] for name in names]
        lines.append([f"{context:,}", *(f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in values)])
    return numbers(["tokens", *(name if " " in name else f"`{name}`" for name in names)], lines)
