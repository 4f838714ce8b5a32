"""ovtq-inspect: what a model folder holds: its attention, its states, and the memory they take with each preset."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op
from rich.console import Console

from ovtq import __version__, files, pipeline, states
from ovtq.advice import Advice, advise, attention_of
from ovtq.cli.command import Out, Parser, listed, path_of, phase, positive, progress, run
from ovtq.cli.inspect_tables import SECTIONS
from ovtq.errors import InputError, OvtqError, UnsupportedModel
from ovtq.evidence import roofline, roofline_cpu
from ovtq.ir import cache, io
from ovtq.ir.graph import constant_of
from ovtq.models import ModelDescription, describe
from ovtq.models.attention import biased_projection
from ovtq.passes import PASSES
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.runtime.text import Tokenizer
from ovtq.staging import RECORD
from ovtq.states import FLOAT_BYTES, StateSpec

TEXT_TOKENS = 1024  # of --text that are run
SAME = {"hidden_size": ("n_embd",), "vocab_size": (), "max_position_embeddings": ("n_positions",)}  # of config.json
PAGE = 16  # tokens in a block of the GPU plugin's paged attention


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 after one line on stderr that says what is wrong."""
    errors = Console(stderr=True, highlight=False)

    def work() -> None:
        options = parser().parse_args(argv)
        to_stdout = options.json == Path("-")
        io.check_outputs({"--json": None if to_stdout else options.json}, [options.model_dir], [options.text])
        with _as_recorded(options.model_dir):
            facts = inspect(options, errors)
            text = json.dumps(facts, indent=1) + "\n"
            if to_stdout:
                Out().out(text, end="")
                return
            console = Out() if sys.stdout.isatty() else Out(width=160)  # a file needs no narrow columns
            for section in SECTIONS:
                section(console, facts)
        if options.json:
            files.write(options.json, text)

    return run("ovtq-inspect", work, errors, argv=argv)


@contextmanager
def _as_recorded(model_dir: Path) -> Iterator[None]:
    """Within it, what a converted folder's record or stamp lacks, or has in another form, is an InputError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if not (model_dir / RECORD).exists() and not io.stamp_of(io.load(model_dir)):
            raise
        raise InputError(
            f"{model_dir}: what {RECORD} or the model's rt_info says of its conversion is not of this version's "
            f"form ({type(error).__name__}: {io.last_line(error)}); convert the original model again"
        ) from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser("ovtq-inspect", __doc__)
    p.add_argument(
        "model_dir", type=path_of, metavar="MODEL_DIR", help="folder with a stateful IR, exported or converted"
    )
    p.add_argument(
        "--context",
        type=listed(positive, "tokens"),
        default=[4096, 32768, 131072],
        metavar="LIST",
        help="tokens at which memory is shown (default: 4k,32k,131k)",
    )
    p.add_argument(
        "--target",
        choices=FLOAT_BYTES,
        help="where it will run, by which bytes are counted (default: what a converted model is for, or gpu)",
    )
    p.add_argument(
        "--text",
        type=path_of,
        metavar="FILE",
        help=f"run {TEXT_TOKENS:,} tokens of it on the CPU, to compare key biases with the keys (compiles the model; "
        "needs the extra genai)",
    )
    p.add_argument(
        "--roofline",
        choices=[*roofline.MACHINES, "cpu"],
        help="the least time of a decode step there, from bytes and launches; cpu: what a step of the exported model "
        "should take on this machine, by what its parts cost here (compiles two layers and runs them; half a minute)",
    )
    p.add_argument(
        "--json",
        type=path_of,
        nargs="?",
        const=Path("-"),
        metavar="FILE",
        help="write all of it as JSON, too; without FILE to stdout, instead of the tables",
    )
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
        "config": {key: next((config[name] for name in (key, *SAME[key]) if name in config), None) for key in SAME},
        "weights_bytes": xml.with_suffix(".bin").stat().st_size,
        "target": target,
        "float_bytes": FLOAT_BYTES[target],
        "contexts": sorted(set(options.context)),
        "converted": converted,
        "consumers": _consumers(converted, any(_with_sinks(node) for node in model.get_ops())),
    }
    if options.roofline:
        if config.get("model_type") != "gpt_oss":
            raise InputError(f"--roofline: known of GPT-OSS alone, this is {config.get('model_type')}")
        try:
            if options.roofline == "cpu":
                facts["roofline"] = roofline_cpu.table(options.model_dir, facts["contexts"])
            else:
                facts["roofline"] = roofline.table(config, options.roofline, facts["contexts"])
        except (ValueError, KeyError) as error:
            raise InputError(f"--roofline: {error}") from None
    if converted:
        if options.text:
            raise InputError("--text needs the exported model: a converted one has other keys")
        facts["layers"] = converted.pop("layers")
        these = io.states_of(model)
        facts["states"] = groups(these, target)
        facts["memory"] = [memory("as converted", these, facts["contexts"], target, cache.marked(model))]
        return facts
    description = describe(model, config)
    ids = _tokens(options.model_dir, options.text) if options.text else None  # refused before the rest takes seconds
    facts["layers"] = _layers(description)
    facts["attention"] = attention_of(description)
    facts["states"] = groups(description.states, target)
    facts["memory"] = _stock(description, facts["contexts"], target)
    with progress(errors) as bars, phase(bars, "presets", len(pipeline.PRESETS)) as tick:
        for name, preset in pipeline.PRESETS.items():
            fresh = io.load(options.model_dir)
            try:
                found = describe(fresh, config)
                changed, made, steps = pipeline.run(fresh, found, preset.on(target, found))
            except OvtqError as error:  # such as a model without what a pass needs; the others still tell
                facts["memory"].append({"cache": name, "refused": str(error)})
            else:
                asked = cache.marked(changed)
                row = memory(name, made.states, facts["contexts"], target, asked)
                left = pipeline.told(steps)
                facts["memory"].append(row | {"skipped": left} if left else row)
            tick()
    facts["recommended"] = _recommended(advise(description, target), facts["memory"])
    if ids is not None:
        shares = key_bias_shares(model, description, ids)
        for layer in facts["layers"]:
            layer["text"] = shares.get(layer["index"])
    return facts


def _recommended(advice: Advice, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The preset and why; no preset if this model is refused that one."""
    refused = next((row["refused"] for row in rows if row["cache"] == advice.preset and "refused" in row), None)
    if refused:
        return {"preset": None, "reason": f"{advice.preset} would be right, but: {refused}"}
    return {"preset": advice.preset, "reason": advice.reason}


def _converted(xml: Path, model: ov.Model) -> dict[str, Any] | None:
    """What the IR's stamp and the record beside it say; None of an exported model."""
    stamp = io.stamp_of(model)
    if not stamp:
        return None
    record = io.record_of(xml.parent)
    paged = all(map(_keeps_paged_attention, stamp["passes"]))
    return {
        **stamp,
        "record": RECORD if record else None,
        "target": record.get("target", stamp.get("target")),
        "verified": record.get("verified"),
        "paged_attention": paged,
        "layers": record.get("layers", stamp.get("layers", [])),
    }


def _with_sinks(node: ov.Node) -> bool:
    return node.get_type_name() == "ScaledDotProductAttention" and node.get_input_size() > 5


def _keeps_paged_attention(step: dict[str, Any]) -> bool:
    """Whether a recorded pass leaves paged attention possible; of some, its options decide."""
    cls = PASSES.get(step["name"])
    decided = cls is not None and isinstance(cls.paged_attention, property)
    return bool(cls and (cls.parse(step["options"]) if decided else cls).paged_attention)


def _consumers(converted: dict[str, Any] | None, sinks: bool) -> dict[str, str]:
    """Which hosts take the model, as README's table says; "PA" stands for all that demand paged attention."""
    paged = converted is None or converted["paged_attention"]
    return {
        "OVModelForCausalLM": "yes",
        "LLMPipeline": "yes, with paged attention" if paged else "yes: falls back to the stateful path by itself",
        'LLMPipeline, "SDPA"': "yes"
        if converted or not sinks
        else "yes; but OpenVINO 2026.4.0 and 2026.4.1 do not compile it for GPUs with XMX such as Lunar Lake",
        'LLMPipeline, "PA"': "yes" if paged else "no: throws",
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


def groups(these: Sequence[StateSpec], target: str) -> list[dict[str, Any]]:
    """The states in groups of one form: their number, type, shape, and bytes (of all of the group) a token and flat."""
    found: dict[tuple[str, str, str], list[StateSpec]] = {}
    for state in these:
        shape = f"[{','.join('?' if length < 0 else str(length) for length in state.shape)}]"
        found.setdefault((re.sub(r"\d+", "N", state.name), state.type, shape), []).append(state)
    return [
        {
            "name": name, "count": len(some), "dtype": kind, "shape": shape,
            "per_token": states.per_token(some, target), "flat": states.flat(some, target),
        }
        for (name, kind, shape), some in sorted(found.items())
    ]  # fmt: skip


def memory(
    label: str, these: Sequence[StateSpec], contexts: Sequence[int], target: str, precision: str | None = None
) -> dict[str, Any]:
    """Bytes of all states at each context, batch 1, with what each token adds and what is there besides.

    `precision` is that of the plugin's own caches; None: as declared.
    """
    return {
        "cache": label,
        "per_token": states.per_token(these, target, precision),
        "flat": states.flat(these, target, precision),
        "at": {str(tokens): states.total(these, tokens, target, precision) for tokens in contexts},
    }


def _stock(description: ModelDescription, contexts: Sequence[int], target: str) -> list[dict[str, Any]]:
    """The exported model in the caches that the plugin really keeps of it; see inspect_tables.NOTES."""
    if target == "cpu":
        kinds: tuple[str, ...] = ("f32", "f16", "u8", "u4")
        return [memory(f"as exported, {kind}", description.states, contexts, target, kind) for kind in kinds]
    kinds = ("f16",) if description.sinks else ("f16", "u8")  # which a GPU keeps of a model with sinks in f16 alone
    return [memory(f"as exported, {kind}", description.states, contexts, target, kind) for kind in kinds] + [
        _paged(f"paged, {kind}", description, contexts, bits) for kind, bits in (("u8", 8), ("u4", 4))
    ]


def _paged(label: str, description: ModelDescription, contexts: Sequence[int], bits: int) -> dict[str, Any]:
    """Paged attention on a GPU, as its compiled model shows it: whole blocks of every layer, windows cut from none.

    A block holds keys as (head_dim, PAGE codes and 4 bytes), values as (PAGE, head_dim codes and 4 bytes): scale and
    zero point in f16 beside each channel of keys and each token of values.
    """
    block = sum(
        layer.kv_heads * (layer.head_dim * (PAGE * bits // 8 + 4) + PAGE * (layer.head_dim * bits // 8 + 4))
        for layer in description.layers
    )
    at = {str(tokens): -(-tokens // PAGE) * block for tokens in contexts}
    return {"cache": label, "per_token": block // PAGE, "flat": 0, "at": at}


def key_bias_shares(model: ov.Model, description: ModelDescription, ids: np.ndarray) -> dict[int, dict[str, Any]]:
    """By layer with a key bias: how large the bias is beside W·x, and how much of the keys is their mean; before RoPE.

    `bias_ratio` is ‖b_k‖ / rms‖W·x‖ over the tokens `ids` (1, tokens), `by_head` the same of each KV head, `mean_share`
    ‖mean key‖² / mean ‖key‖² of key = W·x + b_k. Runs the layers on the CPU at f32, without the logits.
    """
    places = {}
    for layer in description.layers:
        found = biased_projection(layer.key.source, layer.kv_heads, layer.head_dim)
        if found and layer.key_bias is not None:  # not one of queries, keys and values together
            add, bias = found[0], layer.key_bias
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
    ids = Tokenizer(model_dir).encode(files.read_text(text), special=True)
    if ids.size < 2:
        raise InputError(f"{text}: too short, {ids.size} tokens")
    return ids[None, :TEXT_TOKENS]
