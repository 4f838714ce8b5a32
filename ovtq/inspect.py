"""ovtq-inspect: what a model folder holds: its attention, its states, and the memory they take with each preset."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op
from rich.console import Console
from rich.table import Table

from ovtq import __version__, cache, io, pipeline
from ovtq.command import Out, Parser, listed, phase, positive, progress, run
from ovtq.errors import InputError, OvtqError, UnsupportedModel
from ovtq.graph import constant_of
from ovtq.models import ModelDescription, describe
from ovtq.models.attention import biased_projection
from ovtq.passes import PASSES
from ovtq.runner import EXACT_PROPERTIES, Runner

FLOAT_BYTES = {"gpu": 2, "cpu": 4}  # of a floating-point state: f16 on the GPU, as declared (f32) on the CPU
TEXT_TOKENS = 1024  # of --text that are run
NOTES = {
    "gpu": "stock u8 and u4 are not shown: a model with sinks gets no compressed cache from the GPU plugin in the "
    "stateful path, KV_CACHE_PRECISION has no effect there; only paged attention compresses it",
    "cpu": "stock u8 (the plugin's default) and u4 keep 8 bytes of scale and zero point beside a row; presets are "
    "counted with floats as declared (f32), which the default u8 compresses where the plugin fuses the attention",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 after one line on stderr that says what is wrong."""
    errors = Console(stderr=True, highlight=False)

    def work() -> None:
        options = parser().parse_args(argv)
        to_stdout = options.json == Path("-")
        if options.json and not to_stdout:
            io.check_json(options.json, options.model_dir, None)
        facts = inspect(options, errors)
        text = json.dumps(facts, indent=1) + "\n"
        if to_stdout:
            Out().out(text, end="")
            return
        for section in SECTIONS:
            section(Out(), facts)
        if options.json:
            options.json.write_text(text, encoding="utf-8")

    return run("ovtq-inspect", work, errors)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser("ovtq-inspect", __doc__)
    p.add_argument("model_dir", type=Path, help="folder with a stateful IR, exported or converted")
    p.add_argument(
        "--context",
        type=listed(positive, "tokens"),
        default=[4096, 32768, 131072],
        metavar="LIST",
        help="tokens at which memory is shown (default: 4k,32k,131k)",
    )
    p.add_argument("--target", choices=FLOAT_BYTES, help="where it runs (default: what a converted model is for, or gpu)")
    p.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help=f"run {TEXT_TOKENS:,} tokens of it on the CPU, to compare key biases with the keys (compiles the model; "
        "needs the extra genai)",
    )
    p.add_argument(
        "--json", type=Path, nargs="?", const=Path("-"), metavar="FILE", help="write it as JSON, too; alone on stdout"
    )
    p.add_argument("--version", action="version", version=f"ovtq {__version__}, openvino {ov.__version__}")
    return p


def inspect(options: argparse.Namespace, errors: Console) -> dict[str, Any]:
    """What the command shows, as plain data; bytes are whole numbers. Raises OvtqError if the folder is no model."""
    xml = io.model_xml(options.model_dir)
    model, config = io.load(options.model_dir), io.load_config(options.model_dir)
    if not model.get_variables():
        raise UnsupportedModel(f"{options.model_dir}: the model has no states; export it with-past, stateful")
    io.refuse_mismatch(xml)
    converted = _converted(xml, model)
    target = options.target or (converted and converted["target"]) or "gpu"
    facts: dict[str, Any] = {
        "ovtq": __version__,
        "model": str(options.model_dir),
        "architecture": (config.get("architectures") or [None])[0],
        "config": {key: config.get(key) for key in ("hidden_size", "vocab_size", "max_position_embeddings")},
        "weights_bytes": xml.with_suffix(".bin").stat().st_size,
        "target": target,
        "contexts": sorted(set(options.context)),
        "converted": converted,
        "consumers": _consumers(converted),
    }
    if converted:
        if options.text:
            raise InputError("--text needs the exported model: a converted one has other keys")
        facts["layers"] = converted.pop("layers")
        facts["states"] = states(model, target)
        facts["memory"] = [memory("as converted", model, facts["contexts"], target, steps=converted["passes"])]
        return facts
    description = describe(model, config)
    facts["layers"] = _layers(description)
    facts["states"] = states(model, target)
    facts["memory"] = _stock(model, facts["contexts"], target)
    with progress(errors) as bars, phase(bars, "presets", len(pipeline.PRESETS)) as tick:
        for name, preset in pipeline.PRESETS.items():
            fresh = io.load(options.model_dir)
            try:
                changed, _, steps = pipeline.run(fresh, describe(fresh, config), preset.on(target))
            except OvtqError as error:  # such as a model without what a pass needs; the others still tell
                facts["memory"].append({"cache": name, "refused": str(error)})
            else:
                done = [{"name": step.name, "facts": step.facts} for step in steps]
                facts["memory"].append(memory(name, changed, facts["contexts"], target, steps=done))
            tick()
    if options.text:
        found = key_bias_shares(model, description, _tokens(options.model_dir, options.text))
        for layer in facts["layers"]:
            layer["text"] = found.get(layer["index"])
    return facts


def _converted(xml: Path, model: ov.Model) -> dict[str, Any] | None:
    """What the IR's stamp and the record beside it say; None of an exported model."""
    stamp = io.stamp_of(model)
    if not stamp:
        return None
    path = xml.with_name(io.RECORD)
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    paged = all(step["name"] in PASSES and PASSES[step["name"]].paged_attention for step in stamp["passes"])
    return {
        **stamp,
        "record": path.name if record else None,
        "target": record.get("target"),
        "verified": record.get("verified"),
        "paged_attention": paged,
        "layers": record.get("layers", []),
    }


def _consumers(converted: dict[str, Any] | None) -> dict[str, str]:
    """Which hosts take the model, as README's table says."""
    paged = converted is None or converted["paged_attention"]
    return {
        "OVModelForCausalLM": "yes",
        "LLMPipeline, default": "yes, with paged attention" if paged else "yes: falls back to the stateful path by itself",
        'LLMPipeline, ATTENTION_BACKEND="SDPA"': "yes"
        if converted
        else "yes; but OpenVINO 2026.4.0 and 2026.4.1 do not compile it for GPUs with XMX such as Lunar Lake",
        '"PA", scheduler_config, draft models, prompt lookup': "yes" if paged else "no: throws",
    }


def _layers(description: ModelDescription) -> list[dict[str, Any]]:
    found = []
    for layer in description.layers:
        bias = None if layer.key_bias is None else np.linalg.norm(layer.key_bias, axis=-1)
        found.append(
            {name: getattr(layer, name) for name in ("index", "window", "query_heads", "kv_heads", "head_dim")}
            | {
                "sinks": layer.sinks is not None,
                "key_bias_norms": None if bias is None else [round(float(x), 4) for x in bias],  # by KV head
            }
        )
    return found


def states(model: ov.Model, target: str) -> list[dict[str, Any]]:
    """The states in groups of one form: their number, type, shape, and bytes (of all of the group) a token and flat."""
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for variable in model.get_variables():
        info = variable.info
        key = (re.sub(r"\d+", "N", info.variable_id), info.data_type.get_type_name(), str(info.data_shape))
        group = groups.setdefault(
            key, {"name": key[0], "count": 0, "dtype": key[1], "shape": key[2], "per_token": 0, "flat": 0}
        )
        group["count"] += 1
        row, grows = _row(info, FLOAT_BYTES[target])
        group["per_token" if grows else "flat"] += row
    return list(groups.values())


def _row(info: Any, float_bytes: float, row_bytes: Callable[[int], int] | None = None) -> tuple[int, bool]:
    """Bytes of a state at batch 1, of one token if it grows, and whether it does."""
    *axes, width = (length.get_length() if length.is_static else None for length in info.data_shape)
    grows, real = None in axes[1:], info.data_type.is_real()
    row = width * (float_bytes if real else info.data_type.size)
    if row_bytes and grows and real:
        row = row_bytes(width)
    return int(row * np.prod([length for length in axes if length is not None], dtype=np.int64)), grows


def memory(
    label: str,
    model: ov.Model,
    contexts: Sequence[int],
    target: str,
    precision: str | None = None,
    steps: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Bytes of all states at each context, batch 1, with what each token adds and what is there from the first on.

    `precision` is that of floating-point states which grow; None: what the model itself asks the plugin for. `steps`
    are the passes that made the model: they tell how many tokens its packed states hold (`facts["stored"]`), the
    others being in states of fixed length, and whether a sink's row lies in them.
    """
    asked = precision or cache.marked(model)
    float_bytes = {"f16": 2, "f32": 4}.get(asked, FLOAT_BYTES[target])
    native = asked in ("u8", "u4")
    rule = next((step["facts"]["stored"] for step in steps if "stored" in step["facts"]), None)
    sink = any(step["name"] == "sink-row" for step in steps)

    def total(tokens: int) -> int:
        stored = max(tokens - rule["window"], 0) // rule["multiple"] * rule["multiple"] if rule else tokens
        size = 0
        for variable in model.get_variables():
            row, grows = _row(
                variable.info, float_bytes, (lambda width: cache.row_bytes(width, asked, target)) if native else None
            )
            rows = stored + sink if variable.info.variable_id.startswith("ovtq.") else tokens
            size += row * rows if grows else row
        return size

    groups = [
        _row(variable.info, float_bytes, (lambda width: cache.row_bytes(width, asked, target)) if native else None)
        for variable in model.get_variables()
    ]
    return {
        "cache": label,
        "per_token": sum(row for row, grows in groups if grows),
        "flat": sum(row for row, grows in groups if not grows),
        "at": {str(tokens): total(tokens) for tokens in contexts},
    }


def _stock(model: ov.Model, contexts: Sequence[int], target: str) -> list[dict[str, Any]]:
    """The exported model in the caches that the plugin really keeps of it; see NOTES."""
    kinds = ("f16",) if target == "gpu" else ("f32", "f16", "u8", "u4")
    return [memory(f"as exported, {kind}", model, contexts, target, kind) for kind in kinds]


def key_bias_shares(
    model: ov.Model, description: ModelDescription, ids: np.ndarray
) -> dict[int, dict[str, Any]]:
    """By layer with a key bias: how large the bias is beside W·x, and how much of the keys is their mean; before RoPE.

    `bias_ratio` is ‖b_k‖ / rms‖W·x‖ over the tokens `ids` (1, tokens), `by_head` the same of each KV head, `mean_share`
    ‖mean key‖² / mean ‖key‖² of key = W·x + b_k. Runs the layers on the CPU at f32, without the logits.
    """
    places = {}
    for layer in description.layers:
        found = biased_projection(layer.key.source, layer.kv_heads, layer.head_dim)
        if found:
            add, bias = found
            places[layer.index] = next(x for x in add.input_values() if constant_of(x) is None), bias
    if not places:
        return {}
    outputs = [op.result(source) for source, _ in places.values()]
    part = ov.Model(outputs, model.get_sinks(), model.get_parameters(), "keys")
    runner = Runner(part, "CPU", EXACT_PROPERTIES)
    runner.step(ids)
    shares = {}
    for position, (index, (_, bias)) in enumerate(places.items()):
        product = runner.request.get_output_tensor(position).data.reshape(ids.size, *bias.shape).astype(np.float64)
        by_head = np.linalg.norm(bias, axis=-1) / np.sqrt(np.square(product).sum(-1).mean(0))
        key = product + bias
        shares[index] = {
            "tokens": int(ids.size),
            "bias_ratio": float(np.linalg.norm(bias) / np.sqrt(np.square(product).sum((1, 2)).mean())),
            "by_head": [float(x) for x in by_head],
            "mean_share": float(np.square(key.mean(0)).sum() / np.square(key).sum((1, 2)).mean()),
        }
    return shares


def _tokens(model_dir: Path, text: Path) -> np.ndarray:
    try:
        from openvino_genai import Tokenizer
    except ImportError:
        raise InputError("--text needs openvino_genai: pip install 'ovtq[genai]'") from None
    try:
        words = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{text}: not UTF-8 text") from None
    try:
        ids = np.array(Tokenizer(str(model_dir)).encode(words).input_ids.data, dtype=np.int64)
    except RuntimeError as error:
        raise InputError(f"{model_dir}: no tokenizer that openvino_genai can use ({io.last_line(error)})") from None
    if ids.size < 2:
        raise InputError(f"{text}: too short, {ids.size} tokens")
    return np.ascontiguousarray(ids[:, :TEXT_TOKENS])


def _table(*columns: str, left: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def _show_model(console: Console, facts: dict[str, Any]) -> None:
    config, layers = facts["config"], facts["layers"]
    sliding = sum(layer["window"] is not None for layer in layers)
    console.print(
        f"{facts['model']}: {facts['architecture']}, {len(layers)} layers ({sliding} sliding, {len(layers) - sliding} "
        f"full), hidden {config['hidden_size']}, vocabulary {config['vocab_size']:,}, "
        f"{config['max_position_embeddings']:,} positions, {facts['weights_bytes'] / 1e6:,.1f} MB of weights"
    )
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
        console.print("not verified" if made["record"] else f"no {io.RECORD} beside it: target and verification unknown")


def _show_layers(console: Console, facts: dict[str, Any]) -> None:
    layers = facts["layers"]
    if not layers:
        return
    biased, text = "key_bias_norms" in layers[0], any(layer.get("text") for layer in layers)
    extra = ("sinks", "‖b_k‖ by KV head") if biased else ()
    extra += ("‖b_k‖/rms‖Wx‖", "largest head", "mean key") if text else ()
    table = _table("layer", "kind", "window", "heads", "KV heads", "head_dim", *extra, left=("kind",))
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
    if text:
        tokens = next(layer["text"]["tokens"] for layer in layers if layer.get("text"))
        console.print(f"over {tokens:,} tokens, before RoPE; mean key: its share of the keys' energy")


def _show_states(console: Console, facts: dict[str, Any]) -> None:
    table = _table("states", "number", "type", "shape", "bytes a token", "flat bytes", left=("states", "type", "shape"))
    for group in facts["states"]:
        sizes = (f"{group[name]:,}" if group[name] else "" for name in ("per_token", "flat"))
        table.add_row(group["name"], str(group["count"]), group["dtype"], group["shape"], *sizes)
    console.print()
    console.print(table)
    console.print(f"floating-point states counted in {FLOAT_BYTES[facts['target']]} bytes, as on a {facts['target'].upper()}")


def _show_memory(console: Console, facts: dict[str, Any]) -> None:
    first = f"memory, {facts['target'].upper()}"
    table = _table(
        first, "bytes a token", "flat", *(f"MB at {tokens:,}" for tokens in facts["contexts"]), left=(first,)
    )
    refused = []
    for row in facts["memory"]:
        if "refused" in row:
            refused.append(f"{row['cache']}: {row['refused']}")
            continue
        at = (f"{row['at'][str(tokens)] / 1e6:,.1f}" for tokens in facts["contexts"])
        table.add_row(row["cache"], f"{row['per_token']:,}", f"{row['flat']:,}", *at)
    console.print()
    console.print(table)
    for line in refused:
        console.print(line)
    if not facts["converted"]:
        console.print(NOTES[facts["target"]])


def _show_consumers(console: Console, facts: dict[str, Any]) -> None:
    table = _table("host", "takes it", left=("host", "takes it"))
    for row in facts["consumers"].items():
        table.add_row(*row)
    console.print()
    console.print(table)


# What is printed, in this order: each prints one part of what `inspect` found.
SECTIONS: tuple[Callable[[Console, dict[str, Any]], None], ...] = (
    _show_model,
    _show_layers,
    _show_states,
    _show_memory,
    _show_consumers,
)
