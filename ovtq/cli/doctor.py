"""ovtq-doctor: what works on this machine, and how fast: one page to look at and to send with a report.

On each device, for the model as exported and converted with each preset: does the device compile it, is it verified
there, how far are its logits from those of the exported model on the CPU at f32, and TTFT, TPOT and state bytes at
each context. Every step runs in a process of its own with a time limit, so that a driver's crash is a line of the page;
what was done is kept in OUT_DIR, and the same command goes on where an earlier one ended; with a higher --limit it does
again what a lower one stopped. Minutes for the bundled model. The page names no user, host or path.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from rich.console import Console

from ovtq import __version__, archives, files, pipeline, system
from ovtq.cli.command import Out, Parser, listed, path_of, positive, run
from ovtq.cli.doctor_page import page
from ovtq.errors import InputError
from ovtq.ir import io
from ovtq.runtime.drivers import drivers
from ovtq.runtime.runner import EXACT_PROPERTIES, check_device

BUNDLED = Path(__file__).resolve().parent.parent.parent / "models" / "gpt-oss-mini"
STOCK = "as exported"
# As `python -m`, but without modules of the working directory.
MODULE = "import sys; sys.path[:] = {path!r}; import runpy; runpy.run_module(sys.argv.pop(1), None, '__main__', True)"
STOPPED = "stopped after {} s (--limit)"
SCHEMA = 1
PAGE, FACTS, SCRATCH = "doctor.md", "doctor.json", ".ovtq-work"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 also where a device failed, which is what the page is for."""
    errors = Console(stderr=True, highlight=False)
    return run("ovtq-doctor", lambda: doctor(parser().parse_args(argv), Out(), Out(stderr=True)), errors)


def parser() -> Parser:
    """The command line."""
    p = Parser("ovtq-doctor", __doc__)
    p.add_argument(
        "model_dir",
        type=path_of,
        nargs="?",
        default=BUNDLED,
        metavar="MODEL_DIR",
        help="an exported model (default: the one that is in a clone)",
    )
    p.add_argument(
        "--out",
        type=path_of,
        default=Path("ovtq-doctor"),
        metavar="OUT_DIR",
        help="where the page and the facts go (default: %(default)s)",
    )
    p.add_argument("--devices", metavar="LIST", help="devices, such as CPU,GPU (default: the CPU and all GPUs)")
    p.add_argument("--presets", metavar="LIST", help="presets to try, such as u8,exact (default: all)")
    p.add_argument(
        "--contexts", type=listed(positive, "numbers"), default=[200, 2048, 8192, 32768], metavar="TOKENS,…",
        help="lengths at which times are taken (default: 200,2k,8k,32k)",
    )  # fmt: skip
    p.add_argument("--steps", type=positive, default=16, metavar="N", help="decode steps per length (default: 16)")
    p.add_argument(
        "--limit",
        type=positive,
        default=900,
        metavar="SECONDS",
        help="the most that one part may take: a conversion, a trial (default: 900)",
    )
    p.add_argument("--no-verify", action="store_true", help="leave out the verification on each device")
    p.add_argument("--fresh", action="store_true", help="begin anew, whatever OUT_DIR holds")
    return p


def doctor(options: argparse.Namespace, console: Out, errors: Out) -> None:
    """Do what the command line asks. Raises InputError for what can't be begun; all else is on the page."""
    xml = io.model_xml(options.model_dir)
    if io.stamp_of(io.load(options.model_dir)):
        raise InputError(f"{options.model_dir}: a converted model; give the exported one")
    source, target = system.resolved(options.model_dir), system.resolved(options.out)
    if source in (target, *target.parents):
        raise InputError(f"--out {options.out}: must not be the model's folder or inside it; choose another")
    devices = options.devices.split(",") if options.devices else _devices()
    for device in devices:
        check_device(device)
    presets = options.presets.split(",") if options.presets else [*pipeline.PRESETS]
    if unknown := [name for name in presets if name not in pipeline.PRESETS]:
        raise InputError(f"--presets: no preset is named {unknown[0]!r}; there are {', '.join(pipeline.PRESETS)}")
    asked = {
        "schema": SCHEMA, "model": {"name": options.model_dir.name, "xml_sha256": io.text_sha256(xml)},
        "contexts": sorted(set(options.contexts)), "steps": options.steps, "machine": machine(),
    }  # fmt: skip
    facts = _begun(options.out, asked, options.fresh)
    todo = [(device, subject) for device in devices for subject in (STOCK, *presets)]
    try:
        for number, (device, subject) in enumerate(todo, 1):
            rows = facts["rows"].setdefault(device, {})
            if subject not in rows or cut_short(rows[subject], options.limit):
                errors.print(f"[{number}/{len(todo)}] {device}: {subject}")
                rows[subject] = _examined(options, device, subject)
                _write(options.out, facts)
    finally:
        shutil.rmtree(options.out / SCRATCH, ignore_errors=True)
    _write(options.out, facts)
    console.print(page(facts))
    errors.print(f"written to {options.out / PAGE} and {options.out / FACTS}")


def machine() -> dict[str, Any]:
    """What a report of a fault needs: systems, versions, devices and their drivers, memory."""
    core = ov.Core()
    versions = {"ovtq": __version__, "openvino": ov.__version__, "python": platform.python_version()}
    for name in ("openvino_genai", "optimum.intel", "transformers"):
        versions[name] = _version(name)
    devices = {}
    for name in core.available_devices:
        known = set(core.get_property(name, "SUPPORTED_PROPERTIES"))
        wanted = ("FULL_DEVICE_NAME", "DEVICE_ARCHITECTURE", "GPU_DEVICE_TOTAL_MEM_SIZE", "OPTIMIZATION_CAPABILITIES")
        devices[name] = {key: str(core.get_property(name, key)) for key in wanted if key in known}
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory": system.memory(),
        "versions": versions,
        "devices": devices,
        "drivers": [driver._asdict() for driver in drivers()],
    }


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name.replace("optimum.intel", "optimum-intel").replace("_", "-"))
    except metadata.PackageNotFoundError:
        return None


def cut_short(row: Mapping[str, Any], limit: int) -> bool:
    """Whether a part of the row was stopped by a --limit below this one, so that it is worth another try."""
    said = [row.get("failed"), (row.get("verified") or {}).get("said")]
    stopped = [re.fullmatch(re.escape(STOPPED).replace(r"\{\}", r"(\d+)"), text) for text in said if text]
    return any(int(found[1]) < limit for found in stopped if found)


def _devices() -> list[str]:
    return [name for name in ov.Core().available_devices if name.split(".")[0] in ("CPU", "GPU")]


def _begun(out: Path, asked: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """What an earlier run of the same left, or nothing yet. Raises InputError if it was another."""
    path = out / FACTS
    if path.exists() and not fresh:
        facts = files.read_json(path)
        if not isinstance(facts, dict):
            raise InputError(f"{path}: not written by ovtq-doctor; --fresh begins anew, or --out")
        other = [key for key, value in asked.items() if facts.get(key) != json.loads(json.dumps(value))]
        if other:
            raise InputError(f"{out}: holds a run with another {' and '.join(other)}; --fresh begins anew, or --out")
        try:
            page(facts)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: damaged ({io.last_line(error)}); --fresh begins anew, or --out") from None
        return dict(facts)
    out.mkdir(parents=True, exist_ok=True)
    return {**asked, "rows": {}}


def _write(out: Path, facts: dict[str, Any]) -> None:
    for name, text in ((FACTS, json.dumps(facts, indent=1) + "\n"), (PAGE, page(facts))):
        files.write(out / name, text)


def _examined(options: argparse.Namespace, device: str, subject: str) -> dict[str, Any]:
    """One row: conversion, compilation, logits beside the reference's, times."""
    work, target = options.out / SCRATCH, "cpu" if device == "CPU" else "gpu"
    work.mkdir(exist_ok=True)
    row: dict[str, Any] = {"target": target}
    folder = options.model_dir
    if subject != STOCK:
        folder = work / "model"
        row["verified"] = _converted(options, folder, subject, target, device)
        if not row["verified"]["written"]:
            return row
    reference, logits = work / "reference.npz", work / "logits.npz"
    if not reference.exists():
        settings = [f"--property={key}={value}" for key, value in EXACT_PROPERTIES.items()]
        list(_trial(options, [options.model_dir, "CPU", "--logits", reference, *settings]))
    logits.unlink(missing_ok=True)
    contexts = ",".join(map(str, sorted(set(options.contexts))))
    for told in _trial(
        options,
        [folder, device, "--target", target, "--contexts", contexts, "--steps", options.steps, "--logits", logits],
    ):
        if "context" in told:
            row.setdefault("contexts", []).append(told)
        elif "checked" in told:
            row["logits"] = _compared(reference, logits)
        else:
            row |= told
    if folder != options.model_dir:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def _converted(options: argparse.Namespace, folder: Path, preset: str, target: str, device: str) -> dict[str, Any]:
    """What ovtq-convert says: verified on the device, or on the CPU where the device does not take the exported one."""
    shutil.rmtree(folder, ignore_errors=True)
    command = ["ovtq", "convert", options.model_dir, folder, "--preset", preset, "--target", target]
    said = "not asked for"
    if not options.no_verify:
        code, _, text = _run(options, [*command, "--verify-device", device])
        if code == 0:
            return {"written": True, "on": device, "said": ""}
        said = text
    code, _, text = _run(options, [*command, "--no-verify"])
    return {"written": code == 0, "on": None, "said": said if code == 0 else text}


def _compared(reference: Path, logits: Path) -> dict[str, float] | None:
    """How far the logits are from the reference's, of their length, and how often both have the same top."""
    if not reference.exists():
        return None
    expected, found = (
        archives.read(path, "logits of a trial", "", lambda file: file["logits"].astype(np.float64))
        for path in (reference, logits)
    )
    length = np.linalg.norm(expected, axis=-1)
    return {
        "relative": float((np.linalg.norm(found - expected, axis=-1) / length).mean()),
        "same_top": float((found.argmax(-1) == expected.argmax(-1)).mean()),
    }


def _trial(options: argparse.Namespace, arguments: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """What `ovtq.evidence.trial` tells, and `failed` with the reason if it did not come to its end."""
    code, out, text = _run(options, ["ovtq.evidence.trial", *arguments])
    told = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    yield from told
    if code and not any("failed" in facts for facts in told):
        yield {"failed": text}


def _run(options: argparse.Namespace, arguments: Sequence[Any]) -> tuple[int, str, str]:
    """Exit code, output, and in one line why it failed, of a module of ours in a process of its own."""
    path = [part or os.getcwd() for part in sys.path]
    command = [sys.executable, "-c", MODULE.format(path=path), *map(str, arguments)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=options.limit,
            errors="replace",
        )
    except subprocess.TimeoutExpired as late:
        out = late.stdout or b""
        text = out.decode("utf-8", "replace") if isinstance(out, bytes) else out
        return -1, text, STOPPED.format(options.limit)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = lines[-1].partition(": ")[2] if lines and arguments[0] == "ovtq" else (lines or [""])[-1]
    if done.returncode < 0 or done.returncode > 2:
        reason = f"crashed with exit code {done.returncode}{': ' + reason if reason else ''}"
    return done.returncode, done.stdout, reason.replace(str(options.model_dir), options.model_dir.name)
