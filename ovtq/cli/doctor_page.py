"""The page of `ovtq-doctor`, in Markdown, from its facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def page(facts: Mapping[str, Any]) -> str:
    """All of it; what was not measured yet is left out."""
    machine = facts["machine"]
    parts = [f"# ovtq doctor: {facts['model']['name']}", _machine(machine)]
    for device, rows in facts["rows"].items():
        name = machine["devices"].get(device, {}).get("FULL_DEVICE_NAME", "")
        parts += [f"## {device}: {name}".rstrip(": "), _checks(rows), _times(rows, facts["contexts"])]
        faults = [f"- {subject}: {said}" for subject, row in rows.items() for said in _said(row)]
        if faults:
            parts.append("\n".join(["What was said:", "", *faults]))
    parts.append(
        "Logits: mean distance from those of the exported model on the CPU at f32, of their length, as the device "
        "computes by default, and how often both have the same likeliest token. TTFT: random tokens from empty states "
        "in calls of up to 1,024; TPOT: median of blocks of 8 decode steps. States: as declared for the device."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine["versions"].items())
    lines = [
        f"- system: {machine['system']}, {machine['cores']} cores, {machine['memory'] / 1e9:.1f} GB",
        f"- versions: {versions}",
    ]
    for name, facts in machine["devices"].items():
        rest = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "FULL_DEVICE_NAME")
        lines.append(f"- {name}: {facts.get('FULL_DEVICE_NAME', '')} ({rest})")
    lines += [f"- OpenCL: {x['name']}, {x['vendor']}, driver {x['version']}" for x in machine["drivers"]]
    return "\n".join(_plain(line) for line in lines)


def _checks(rows: Mapping[str, Any]) -> str:
    body = []
    for subject, row in rows.items():
        verified, logits = row.get("verified"), row.get("logits")
        compiled = f"{row['compile_s']:.1f} s" if "compile_s" in row else "**no**" if "failed" in row else ""
        body.append(
            [
                subject,
                "" if verified is None else "yes" if verified["on"] else "no",
                compiled,
                row.get("precision", ""),
                row.get("kv_cache", ""),
                f"{logits['relative']:.2g}" if logits else "",
                f"{logits['same_top']:.1%}" if logits else "",
            ]
        )
    return _table(["", "verified there", "compiles", "computes in", "KV cache", "logits off by", "same top"], body)


def _times(rows: Mapping[str, Any], contexts: Sequence[int]) -> str:
    body = []
    for subject, row in rows.items():
        for found in row.get("contexts", ()):
            body.append(
                [
                    subject,
                    f"{found['context']:,}",
                    f"{found['ttft_s']:.2f}",
                    f"{found['tpot_s'] * 1e3:.1f}",
                    f"{found['state_bytes'] / 1e6:,.1f}",
                ]
            )
    body.sort(key=lambda cells: contexts.index(int(cells[1].replace(",", ""))))
    return _table(["", "tokens", "TTFT, s", "TPOT, ms", "states, MB"], body) if body else ""


def _said(row: Mapping[str, Any]) -> list[str]:
    verified = row.get("verified") or {}
    found = [f"verification: {verified['said']}"] if verified.get("said") else []
    if "failed" in row:
        found.append(row["failed"] if "compile_s" not in row else f"did not come to its end: {row['failed']}")
    return [_plain(text) for text in found]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(map(_plain, cells)) + " |" for cells in (heads, rule, *rows))


def _plain(text: str) -> str:
    """One line that breaks no table."""
    return " ".join(str(text).replace("|", "/").split())
