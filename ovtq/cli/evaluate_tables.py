"""What `ovtq-eval` prints, row by row as each is done."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ovtq.cli.command import Out, plain_table
from ovtq.forms.pruning import told

COLUMNS = (("mean KLD", 9), ("median", 9), ("99.9%", 9), ("same top", 8), ("bits/byte", 9), ("bytes/token", 11))
MORE = (("needles", 7), ("greedy", 11))


def show_head(console: Out, results: dict[str, Any], scored: int) -> None:
    """What was asked, and the heads of the columns."""
    total = results["windows"] * results["window"]
    console.print(
        f"{total:,} tokens ({scored:,} bytes scored) of {results['text']}, in windows of {results['window']:,} and "
        f"chunks of {results['chunk']}, on {results['device']}, against the exported model at f32; KLD in nats; "
        "greedy: tokens until it parts; in brackets what it was computed in, and the cache"
    )
    console.print("  ".join(f"{name:>{width}}" for name, width in (*COLUMNS, *MORE)))


def show(console: Out, row: dict[str, Any], resumed: bool) -> None:
    """One candidate's row; `resumed`: it is of an earlier run."""
    hits, of = (sum(cell[key] for cell in row.get("needles") or []) for key in ("right", "of"))
    greedy = row.get("greedy")
    cells = (
        f"{row['mean_kld']:.2e}",
        f"{row['median_kld']:.2e}",
        f"{row['kld_p999']:.2e}",
        f"{row['same_top']:.2%}",
        f"{row['bits_per_byte']:.4f}",
        "–" if row["bytes_per_token"] is None else f"{row['bytes_per_token']:,}",
        f"{hits}/{of}" if of else "–",
        f"{greedy['same']:.1f} of {greedy['tokens']}" if greedy else "–",
    )
    note = {"reference": "  the reference", "floor": "  the noise floor"}.get(row["role"], "")
    if row["role"] == "candidate" and row["verdict"] == "equal":
        note = "  equals the reference to the noise floor"
    line = "  ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, (*COLUMNS, *MORE), strict=True))
    console.print(
        f"{line}  {row['candidate']}  [{row['computes']}; {row['cache']}]{note}{'  (kept)' if resumed else ''}"
    )
    if row.get("pruned"):
        console.print(f"  after a window: {told(row['pruned'])}")
    if row["verdict"] == "wrong":
        console.print(f"  WRONG: {row['reason']}", style="bold red")
    cells_by = {(cell["needles"], cell["length"]) for cell in row.get("needles") or []}
    if len(cells_by) > 1 or hits < of:
        console.print(_needle_table(row["needles"]))


def _needle_table(cells: list[dict[str, Any]]) -> Table:
    """Right answers by needles and length (rows) and depth (columns)."""
    table = plain_table(padding=(0, 2, 0, 0))
    depths = sorted({cell["depth"] for cell in cells})
    for name in ("  needles", "tokens", *(f"at {depth:g}" for depth in depths)):
        table.add_column(name, justify="right")
    for count, length in sorted({(cell["needles"], cell["length"]) for cell in cells}):
        found = {cell["depth"]: f"{cell['right']}/{cell['of']}" for cell in cells if _of(cell, count, length)}
        table.add_row(str(count), f"{length:,}", *(found.get(depth, "–") for depth in depths))
    return table


def _of(cell: dict[str, Any], needles_: int, length: int) -> bool:
    return (cell["needles"], cell["length"]) == (needles_, length)
