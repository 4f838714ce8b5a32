"""What `ovtq-bench` prints, from its rows."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ovtq.cli.command import Out, plain_table
from ovtq.forms.pruning import told


def _table(*columns: str) -> Table:
    table = plain_table()
    for column in columns:
        if column == "candidate":
            table.add_column(column, overflow="fold")  # the one that gives way on a narrow terminal
        else:
            table.add_column(column, justify="left" if column == "through" else "right", no_wrap=True)
    return table


def show_prompts(console: Out, rows: list[dict[str, Any]]) -> None:
    """The table of each prompt."""
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        some = [row for row in rows if row["prompt"] == prompt]
        read, written, runs = (some[0][key] for key in ("prompt_tokens", "new_tokens", "runs"))
        console.print(f"\n{prompt}\n{read} + {written} tokens, {runs} runs")
        heads = "through TTFT_ms TPOT_ms ratio 25–75% tokens/s state_bytes peak_MB".split()  # noqa: SIM905
        table = _table(*(head.replace("_", " ") for head in heads), "candidate")
        for row in some:
            table.add_row(
                row["through"],
                f"{row['ttft_ms']['median']:.1f}",
                f"{row['tpot_ms']['median']:.2f}",
                *_ratio(row["tpot_ratio"]),
                f"{row['tokens_per_s']:.1f}",
                _number(row["state_bytes"]),
                _megabytes(row["rss_decode"]),
                row["candidate"],
            )
        console.print(table)
        _show_pruned(console, some)


def show_contexts(console: Out, rows: list[dict[str, Any]]) -> None:
    """The table of decode steps."""
    heads = "tokens TPOT_ms ratio 25–75% prefill_s ratio state_bytes prefill_MB decode_MB".split()  # noqa: SIM905
    table = _table(*(head.replace("_", " ") for head in heads), "candidate")
    for row in rows:
        table.add_row(
            f"{row['context']:,}",
            f"{row['tpot_ms']['median']:.2f}",
            *_ratio(row["tpot_ratio"]),
            *("–" if row[key] is None else f"{row[key]:.2f}" for key in ("prefill_s", "prefill_ratio")),
            _number(row["state_bytes"]),
            _megabytes(row["rss_prefill"]),
            _megabytes(row["rss_decode"]),
            f"{row['candidate']}  [{row['computes']}; {row['cache']}]",
        )
    console.print(table)
    _show_pruned(console, rows)


def _show_pruned(console: Out, rows: list[dict[str, Any]]) -> None:
    """A line for each row of a model that prunes."""
    for row in rows:
        if row["pruned"]:
            at = f" at {row['context']:,} tokens" if "context" in row else ""
            console.print(f"{row['candidate']}{at}: {told(row['pruned'])}")


def show_prefills(console: Out, rows: list[dict[str, Any]]) -> None:
    """The table of prefills."""
    table = _table("depth", "tokens", "prefill s", "ratio", "25–75%", "peak MB", "candidate")
    for row in rows:
        table.add_row(
            f"{row['depth']:,}",
            f"{row['prefill']:,}",
            f"{row['prefill_s']['median']:.3f}",
            *_ratio(row["prefill_ratio"]),
            _megabytes(row["rss_prefill"]),
            f"{row['candidate']}  [{row['computes']}; {row['cache']}]",
        )
    console.print(table)


def _ratio(spread: dict[str, float]) -> tuple[str, str]:
    return f"{spread['median']:.2f}", f"{spread['low']:.2f}–{spread['high']:.2f}"


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _megabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.0f}"
