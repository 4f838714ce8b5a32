"""What `ovtq-inspect` prints, part by part, from the plain data that `ovtq.cli.inspect.inspect` gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ovtq.cli.command import plain_table
from ovtq.staging import RECORD

NOTES = {
    "gpu": "as exported: in the stateful path the GPU plugin compresses no cache of a model with sinks, whatever "
    "KV_CACHE_PRECISION says; paged attention does (keys by channel, in blocks of 16 tokens)",
    "cpu": "as exported: u8 is the plugin's default; beside a row it keeps 8 bytes of scale and zero point. Presets: "
    "floats as declared (f32), which the default u8 compresses where the plugin fuses the attention; u8 and u4 ask "
    "for it themselves",
    "gpu, no sinks": "as exported: the precision is what KV_CACHE_PRECISION says, with 4 bytes of scale and zero point "
    "beside a row; paged attention keeps keys by channel, in blocks of 16 tokens",
    "cpu, no sinks": "as exported: u8 is the plugin's default; beside a row it keeps 8 bytes of scale and zero point. "
    "Presets: floats as declared (f32), which the default u8 compresses where the plugin fuses the attention",
}


def _table(*columns: str, left: Sequence[str] = ()) -> Table:
    table = plain_table()
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    return table


def _short(tokens: int) -> str:
    """131072 as 128k: exact, or in full."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"


def _known(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _model(console: Console, facts: dict[str, Any]) -> None:
    config, layers = facts["config"], facts["layers"]
    sliding = sum(layer["window"] is not None for layer in layers)
    console.print(
        f"{facts['model']}: {facts['architecture']}, {len(layers)} layers ({sliding} sliding, {len(layers) - sliding} "
        f"full), hidden {_known(config['hidden_size'])}, vocabulary {_known(config['vocab_size'])}, "
        f"{_known(config['max_position_embeddings'])} positions, {facts['weights_bytes'] / 1e6:,.1f} MB of weights"
    )
    if "attention" in facts:
        console.print(facts["attention"])
    made = facts["converted"]
    if made is None:
        console.print("not converted")
        return
    console.print(
        f"converted by ovtq {made['ovtq']} with openvino {made['versions'].get('openvino')}: preset "
        f"{made['preset'] or 'none, a pass list'}, target {made['target'] or 'unknown'}"
    )
    table = _table("pass", "sites", "options", left=("pass", "options"))
    for step in made["passes"]:
        options = " ".join(f"{key}={value}" for key, value in step["options"].items())
        table.add_row(step["name"], str(step["sites"]), options + ("" if step["exact"] else "  lossy"))
    console.print(table)
    found = made["verified"]
    if found:
        console.print(
            f"verified on {found['device']}, {found['layers']} layers: within {found['relative']:.2g} of the largest "
            f"result (allowed {found['tolerance']:.2g})"
        )
    else:
        unknown = "verification" if made["target"] else "target and verification"
        console.print("not verified" if made["record"] else f"no {RECORD} beside it: {unknown} unknown")


def _layers(console: Console, facts: dict[str, Any]) -> None:
    layers = facts["layers"]
    if not layers:
        return
    biased, text = "key_bias_norms" in layers[0], any(layer.get("text") for layer in layers)
    extra: tuple[str, ...] = ("sinks", "‖b_k‖") if biased else ()
    extra += ("‖b_k‖/‖Wx‖", "largest", "mean key") if text else ()
    table = _table("layer", "kind", "window", "heads", "KV", "dim", *extra, left=("kind",))
    for layer in layers:
        norms, seen = layer.get("key_bias_norms"), layer.get("text")
        row = [str(layer["index"]), "full" if layer["window"] is None else "sliding", str(layer["window"] or "all")]
        row += [str(layer[name]) for name in ("query_heads", "kv_heads", "head_dim")]
        if biased:
            row += ["yes" if layer["sinks"] else "no", f"{min(norms):.2f}–{max(norms):.2f}" if norms else "none"]
        if text and seen:
            head = int(np.argmax(seen["by_head"]))
            row += [f"{seen['bias_ratio']:.2f}", f"{seen['by_head'][head]:.2f} ({head})", f"{seen['mean_share']:.0%}"]
        table.add_row(*row)
    console.print()
    console.print(table)
    if biased:
        console.print("‖b_k‖: length of the key bias, smallest and largest KV head")
    if text:
        tokens = next(layer["text"]["tokens"] for layer in layers if layer.get("text"))
        console.print(
            f"over {tokens:,} tokens, before RoPE: ‖b_k‖ to the root mean square of ‖Wx‖, all heads and "
            "the largest (its number); mean key: the share of ‖mean key‖² in the mean ‖key‖²"
        )


def _states(console: Console, facts: dict[str, Any]) -> None:
    table = _table("states", "n", "type", "shape", "bytes per token", "flat", left=("states", "type", "shape"))
    for group in facts["states"]:
        sizes = (f"{group[name]:,}" if group[name] else "" for name in ("per_token", "flat"))
        table.add_row(group["name"], str(group["count"]), group["dtype"], group["shape"], *sizes)
    console.print()
    console.print(table)
    console.print(f"floating-point states counted in {facts['float_bytes']} bytes, as on a {facts['target'].upper()}")


def _memory(console: Console, facts: dict[str, Any]) -> None:
    first = f"memory, {facts['target'].upper()}"
    table = _table(
        first,
        "bytes per token",
        "flat bytes",
        *(f"MB at {_short(tokens)}" for tokens in facts["contexts"]),
        left=(first,),
    )
    refused: list[str] = []
    left: dict[str, list[str]] = {}
    for row in facts["memory"]:
        if "refused" in row:
            refused.append(f"{row['cache']}: {row['refused']}")
            continue
        if row.get("skipped"):
            left.setdefault(row["skipped"], []).append(row["cache"])
        at = (f"{row['at'][str(tokens)] / 1e6:,.1f}" for tokens in facts["contexts"])
        table.add_row(row["cache"], f"{row['per_token']:,}", f"{row['flat']:,}", *at)
    console.print()
    console.print(table)
    for line in refused:
        console.print(line)
    for reason, presets in left.items():
        console.print(f"{', '.join(presets)} without {reason}")
    if not facts["converted"]:
        sinks = any(layer["sinks"] for layer in facts["layers"])
        console.print(NOTES[facts["target"] if sinks else f"{facts['target']}, no sinks"])
        found = facts["recommended"]
        console.print(f"recommended: {found['preset'] or 'no preset'}: {found['reason']}")


def _consumers(console: Console, facts: dict[str, Any]) -> None:
    table = _table("host", "takes it", left=("host", "takes it"))
    for row in facts["consumers"].items():
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print('"SDPA", "PA": ATTENTION_BACKEND; as "PA": scheduler_config, draft models, prompt lookup')


# What is printed, in this order: each prints one part of what `inspect` found.
def _roofline(console: Console, facts: dict[str, Any]) -> None:
    found = facts.get("roofline")
    if not found:
        return
    contexts = facts["contexts"]
    bound, key = ("least ms", "least_ms") if "least_ms" in found["rows"][0] else ("ms forecast", "ms")
    first = f"{bound} a token, {found['machine']}"
    table = _table(first, *map(_short, contexts), left=(first,))
    for name in dict.fromkeys(row["cache"] for row in found["rows"]):
        rows = {row["context"]: row for row in found["rows"] if row["cache"] == name}
        table.add_row(name, *(f"{rows[context][key]:.1f}" for context in contexts))
        for part in rows[contexts[0]].get("parts", ()):
            table.add_row(f"  {part}", *(f"{rows[context]['parts'][part]:.1f}" for context in contexts))
    console.print(table)
    for line in found["assumptions"]:
        console.print(f"  {line}")
    console.print()


SECTIONS: tuple[Callable[[Console, dict[str, Any]], None], ...] = (
    _model,
    _layers,
    _states,
    _memory,
    _roofline,
    _consumers,
)
