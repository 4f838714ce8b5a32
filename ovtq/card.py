"""The model card of a converted folder: what it is, of which model, what was done and shown, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovtq import files, states, system
from ovtq.errors import InputError
from ovtq.ir import io
from ovtq.staging import RECORD

NAME, ORIGINAL = "README.md", "README.original.md"
FIELDS = ("base_model", "license", "license_name", "license_link", "language", "pipeline_tag")  # kept of the original's


def leave(model_dir: Path, folder: Path, record: Mapping[str, Any]) -> None:
    """Write the card into a converted folder; the original's own card, if it was copied there, gets another name."""
    own = folder / NAME
    facts = front_matter(files.read(own).decode("utf-8", "replace")) if own.is_file() else {}
    if own.is_file():
        own.replace(folder / ORIGINAL)
    facts.setdefault("base_model", base_of(model_dir))
    files.write(own, card(facts, record))


def front_matter(text: str) -> dict[str, str]:
    """The known fields of a card's metadata, each as the lines that stand there."""
    found = re.match(r"---\n(.*?)\n---\n", text.replace("\r\n", "\n"), re.DOTALL)
    fields: dict[str, str] = {}
    name = ""
    for line in found[1].split("\n") if found else ():
        key = re.match(r"([a-z_]+):(.*)", line)
        if key:
            name = key[1] if key[1] in FIELDS else ""
            if name:
                fields[name] = key[2].strip()
        elif name and line.strip():
            fields[name] = f"{fields[name]}\n{line}"
    return {key: value for key, value in fields.items() if value}


def base_of(model_dir: Path) -> str:
    """The model's name on the hub if config.json tells it; else the folder's."""
    try:
        name = str(io.load_config(model_dir).get("_name_or_path") or "")
    except InputError:
        name = ""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else system.resolved(model_dir).name


def card(facts: Mapping[str, str], record: Mapping[str, Any]) -> str:
    """The card's text."""
    known = {"library_name": "openvino", "pipeline_tag": "text-generation", **facts}
    meta = [f"{key}:{'' if value.startswith(chr(10)) else ' '}{value}" for key, value in known.items()]
    meta += ["tags:", "- openvino", "- ovtq", "- kv-cache"]
    preset, target = record["preset"] or "a list of passes", record["target"].upper()
    before, after = record["state_bytes"]["before"], record["state_bytes"]["after"]
    size, capacity = f"{after['per_token']:,} bytes per token", states.capacity(record["states"])
    if capacity:
        size = f"{after['flat']:,} bytes, with room for {capacity:,} tokens"
    parts = [
        "---\n" + "\n".join(meta) + "\n---",
        f"# KV cache of {size}: {preset}, for a {target}",
        f"The OpenVINO IR of {known['base_model'].strip()}, its graph rewritten by ovtq {record['ovtq']} so that its "
        f"KV cache takes {size}, as exported {before['per_token']:,} bytes per token. "
        f"`{RECORD}` holds the whole record.",
        _passes(record),
        _verified(record),
        _snippets(target, record["paged_attention"], record["config_file"]),
    ]
    return "\n\n".join(parts) + "\n"


def _passes(record: Mapping[str, Any]) -> str:
    rows = ["| pass | options | lossless |", "| --- | --- | --- |"]
    for step in record["passes"]:
        options = ", ".join(f"{key}={value}" for key, value in step["options"].items() if value != "")
        rows.append(f"| {step['name']} | {options.replace('|', '/')} | {'yes' if step['exact'] else 'no'} |")
    return "\n".join(rows)


def _verified(record: Mapping[str, Any]) -> str:
    found = record["verified"]
    if not found:
        return "**Not verified**: it was converted with `--no-verify`."
    text = (
        f"Verified beside the original on {found['device']} at f32, over {found['layers']} of {len(record['layers'])} "
        f"layers: within {found['relative']:.2g} of the scale of the results (allowed {found['tolerance']:.2g}), the "
        f"same top at {found['same_top']:.2%} of {found['positions']} positions"
    )
    packed = found["packed"]
    if packed:
        text += (
            f", where no token that is read was quantised; elsewhere each of {packed['layers']} packed layers is "
            f"within {packed['relative']:.2g} of the same attention in numpy"
        )
    return f"{text}. OpenVINO {record['versions']['openvino']}."


def _snippets(device: str, paged: bool, config_file: str | None) -> str:
    if config_file:
        return f"""```python
import ovtq

pipe = ovtq.load("FOLDER")  # openvino_genai.LLMPipeline
print(pipe.generate("What is a KV cache?", max_new_tokens=200))
model = ovtq.load("FOLDER", "optimum")  # optimum.intel.OVModelForCausalLM
```

Its kernels need a GPU, and the property `CONFIG_FILE` = the path of `{config_file}`, which `ovtq.load` sets."""
    backend = "" if paged else ', ATTENTION_BACKEND="SDPA"'
    limits = (
        "Paged attention takes it as it is."
        if paged
        else '`ATTENTION_BACKEND="PA"`, `scheduler_config`, draft models and prompt lookup do not take it.'
    )
    return f"""```python
import openvino_genai

pipe = openvino_genai.LLMPipeline("FOLDER", "{device}"{backend})
print(pipe.generate("What is a KV cache?", max_new_tokens=200))
```

```python
from optimum.intel import OVModelForCausalLM

model = OVModelForCausalLM.from_pretrained("FOLDER", device="{device}")
```

{limits}"""
