#!/usr/bin/env python3
"""Which versions of OpenVINO run a model and its conversions, on a virtual Lunar Lake and on the CPU.

usage: versions.py [MODEL_DIR] [--versions 2026.1.0,2026.4.1] [--presets exact,u4:sink-row.window=127] [--json FILE]

Makes an environment of every version (some 275 MB each) beside the installed devices, in OVTQ_GPU_DIR or
~/.cache/ovtq-gpu; converts the model with every preset, with this Python's own OpenVINO; and runs probe.py on each:
  * GPU, on `virtual`, f16: does it compile and take steps; the `kv_cache` nodes; the attention that is one primitive,
    the kernels it runs, and whether K and V are copied to all query heads for it. (On the virtual device a packed model
    takes the branch of a decode step whatever is asked, so its prefill fails: it gets single tokens.)
  * CPU, f32, presets made with --target cpu: largest difference of the logits, relative to the largest logit, from
    those of the model as exported in the last of the versions, over 50 tokens (a packed model has packed none by then);
    and from those of the same model in that version, over 343.
Prints tables in Markdown; versions of which the same is true share a row. Needs install-emulated (for the list of
kernels) and install-virtual.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console
from rich.progress import track

from ovtq.errors import InputError, OvtqError
from ovtq.ir.io import check_outputs, load, model_xml
from ovtq.pipeline import PRESETS
from ovtq.runtime.loading import properties
from ovtq.runtime.runner import EXACT_PROPERTIES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VERSIONS = ("2026.1.0", "2026.2.0", "2026.2.1", "2026.3.0", "2026.3.1", "2026.4.0", "2026.4.1")
STOCK = "as exported"
SCHEDULES = ("40,1,1", "1,1,1")  # on the GPU; the second where the first fails, then compiling alone
CPU_STEPS = {"as_exported": "40,1,1,7,1", "as_itself": "200,1,1,140,1"}  # by what the logits are compared with
TIMEOUT = 600  # seconds a probe


@dataclass(frozen=True)
class Probe:
    """What one run of probe.py came to: exit code (negative: a signal), reason of a failure, report if there is one."""

    code: int
    reason: str
    report: dict[str, Any]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage and line."""
        raise InputError(f"{message}; see {self.prog} --help")


def installed() -> Path:
    """The folder of the devices. Raises InputError if one is missing."""
    folder = Path(os.environ.get("OVTQ_GPU_DIR") or Path.home() / ".cache" / "ovtq-gpu").absolute()
    for device in ("emulated", "virtual"):
        if not (folder / device / "installed").exists():
            raise InputError(f"{device} is not installed in {folder}; run {HERE / f'install-{device}'}")
    return folder


def environment(folder: Path, version: str) -> Path:
    """The Python of an environment with that OpenVINO and numpy, made if it is not there. Raises InputError."""
    home = folder / f"openvino-{version}"
    python = home / "bin" / "python"
    if (home / "installed").exists():
        return python
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"openvino=={version}", "numpy"]
    for command in ([sys.executable, "-m", "venv", "--clear", home], pip):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"no environment for OpenVINO {version}: {last(done.stderr)}")
    (home / "installed").touch()
    return python


def last(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def probe(python: Path, version: str, model: Path, *args: str, log: Path | None = None) -> Probe:
    """One run of probe.py; on the virtual device if there is a launch log to write.

    Raises InputError if another OpenVINO than `version` ran.
    """
    tool = [str(HERE / "virtual")] if log else []
    extra = {"FAKE_GPU_RUNLOG": str(log)} if log else {}
    command = [*tool, str(python), str(HERE / "probe.py"), str(model), *args]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT, env={**os.environ, **extra}
        )
    except subprocess.TimeoutExpired:
        return Probe(124, f"no end within {TIMEOUT} s", {})
    if done.returncode < 0:
        return Probe(done.returncode, f"killed by {signal.Signals(-done.returncode).name}", {})
    if done.returncode:
        return Probe(done.returncode, last(done.stderr), {})
    report = json.loads(done.stdout)
    if not report["openvino"].startswith(f"{version}-"):
        raise InputError(f"{python} runs OpenVINO {report['openvino']}, not {version}; remove its environment")
    return Probe(0, "", report)


def attention_kernels(log: Path) -> list[str]:
    """Names of the attention kernels launched, without their hashes."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    names = {line.split()[1] for line in lines if line.startswith(("K sdpa", "K ovtq_attend", "K ovtq_window"))}
    return sorted({re.sub(r"_*\d{6,}.*", "", name) for name in names})


def on_gpu(python: Path, version: str, model: Path, precision: str | None) -> dict[str, Any]:
    """What becomes of a model on the virtual device; `precision` of the KV cache, None to leave it to the IR."""
    own = [f"{name}={value}" for name, value in properties(model).items() if value]  # of a model with kernels of ovtq
    cache = [f"KV_CACHE_PRECISION={precision}"] if precision else []
    config = ["--launches", "--config", "INFERENCE_PRECISION_HINT=f16", *cache, *own]
    found: dict[str, Any] = {"compiles": False, "steps": None, "reason": "", "attention_kernels": []}
    with tempfile.TemporaryDirectory() as scratch:
        for schedule in (*SCHEDULES, None):
            log = Path(scratch) / f"{schedule}.log"
            steps = ["--steps", schedule] if schedule else ["--compile-only"]
            result = probe(python, version, model, *steps, *config, log=log)
            found["attention_kernels"] = found["attention_kernels"] or attention_kernels(log)
            found["reason"] = found["reason"] or result.reason  # of the schedule that was to run
            if result.code == 3:
                return found
            if result.code == 0:
                graph, last_step = result.report["graph"], result.report.get("steps", [{}])[-1]
                caches = dict(Counter(node["dtype"] for node in graph["kv_cache"]))
                broadcast = [node["broadcast"] for node in graph["attention"]]
                return found | {
                    "compiles": True,
                    "steps": schedule,
                    "launched": [last_step.get(what) for what in ("kernels", "copies")],
                    "kv_cache": caches,
                    "attention": len(broadcast),
                    "broadcast": any(broadcast) if broadcast else None,
                    "conditions": graph["layer_types"].get("condition", 0),
                }
    return found


def on_cpu(python: Path, version: str, model: Path) -> dict[str, Any]:
    """Logits of both schedules at f32, or the reason why there are none."""
    config = ["--config", *(f"{key}={value}" for key, value in EXACT_PROPERTIES.items())]
    found: dict[str, Any] = {"reason": ""}
    with tempfile.TemporaryDirectory() as scratch:
        for name, steps in CPU_STEPS.items():
            out = Path(scratch) / "logits.npz"
            result = probe(python, version, model, "--device", "CPU", "--steps", steps, "--out", str(out), *config)
            if result.code:
                return {"reason": result.reason}
            found[name] = np.load(out)["logits"]
    return found


def difference(logits: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest expected logit."""
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def stamped(model: Path) -> str | None:
    """KV_CACHE_PRECISION among the runtime options of an IR, if it is there."""
    path, ir = ["runtime_options", "KV_CACHE_PRECISION"], load(model)
    return str(ir.get_rt_info(path).value) if ir.has_rt_info(path) else None


def converted(model: Path, presets: Sequence[str], scratch: Path) -> dict[str, dict[str, Path | str]]:
    """By device and name, the exported model first: a folder, or the line that refuses the preset."""
    found: dict[str, dict[str, Path | str]] = {device: {STOCK: model} for device in ("gpu", "cpu")}
    for device, folders in found.items():
        for preset in presets:
            name, *sets = preset.split(":")
            out = scratch / f"{preset.replace(':', '-')}-{device}"
            entry = "import sys; from ovtq.cli.entry import convert; sys.exit(convert())"
            options = ["--preset", name, "--target", device, "--no-verify"]
            options += [part for one in sets for part in ("--set", one)]
            done = subprocess.run(
                [sys.executable, "-c", entry, str(model), str(out), *options],
                capture_output=True,
                text=True,
                check=False,
            )
            folders[preset] = last(done.stderr) if done.returncode else out
    return found


def gpu_words(found: dict[str, Any]) -> list[str]:
    """The cells of a row."""
    if not found["compiles"]:
        return ["**no**", "", "", "", "", found["reason"]]
    caches = ", ".join(f"{count} {dtype}" for dtype, count in found["kv_cache"].items()) or "none"
    kernels = ", ".join(found["attention_kernels"]) or "none"
    inside = f"in {found['conditions']} branches" if found["conditions"] else "none"
    attention = f"{found['attention']}: {kernels}" if found["attention"] else f"{inside}: {kernels}"
    copied = {None: "", True: "yes", False: "no"}[found["broadcast"]]
    ran = f"{found['steps'] or 'none'}" + (f"; {SCHEDULES[0]}: {found['reason']}" if found["reason"] else "")
    launched = "" if None in found["launched"] else "{}, {}".format(*found["launched"])
    return ["yes", caches, attention, copied, launched, ran]


def cpu_words(found: dict[str, Any]) -> list[str]:
    """The cells of a row; differences to one digit, so that versions that round alike share it."""
    if found["reason"]:
        return ["**no**", "", found["reason"]]
    return ["yes", *(f"{found[name]:.0e}" if name in found else "" for name in CPU_STEPS)]


def span(versions: Sequence[str], among: Sequence[str]) -> str:
    """`2026.2.0–2026.3.1` for neighbours among all, else a list."""
    first = among.index(versions[0])
    if len(versions) > 1 and list(among[first : first + len(versions)]) == list(versions):
        return f"{versions[0]}–{versions[-1]}"
    return ", ".join(versions)


def table(title: Sequence[str], rows: dict[str, dict[str, list[str]]], versions: Sequence[str]) -> str:
    """A table in Markdown: by model, versions with equal cells in one row."""
    lines = [f"| {' | '.join(title)} |", f"|{' --- |' * len(title)}"]
    for model, by_version in rows.items():
        groups: dict[tuple[str, ...], list[str]] = {}
        for version in versions:
            groups.setdefault(tuple(by_version[version]), []).append(version)
        lines += [f"| {' | '.join((model, span(group, versions), *cells))} |" for cells, group in groups.items()]
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="versions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, nargs="?", default=ROOT / "models" / "gpt-oss-mini", metavar="MODEL_DIR")
    p.add_argument("--versions", default=",".join(VERSIONS), metavar="LIST", help="(default: %(default)s)")
    p.add_argument(
        "--presets",
        default=",".join(PRESETS),
        metavar="LIST",
        help="each may have options of its passes behind it, as of ovtq-convert --set: u4:sink-row.window=127 "
        "(default: %(default)s)",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="also write all that was found to FILE")
    options = p.parse_args(argv)
    options.versions, options.presets = options.versions.split(","), options.presets.split(",")
    if bad := [version for version in options.versions if not re.fullmatch(r"\d{4}\.\d+\.\d+", version)]:
        raise InputError(f"--versions: {bad[0]!r} is no version like {VERSIONS[-1]}")
    if bad := [preset for preset in options.presets if preset.split(":")[0] not in PRESETS]:
        raise InputError(f"--presets: no preset is named {bad[0]!r}; there are {', '.join(PRESETS)}")
    model_xml(options.model)
    if options.json:
        check_outputs({"--json": options.json}, [options.model])
    return options


def measure(options: argparse.Namespace, scratch: Path, show: Callable[..., Any]) -> None:
    folder = installed()
    versions: list[str] = options.versions
    pythons = {version: environment(folder, version) for version in show(versions, "environments")}
    models = converted(options.model.resolve(), options.presets, scratch)
    names = [STOCK, *options.presets]
    gpu: dict[str, dict[str, Any]] = {name: {} for name in names}
    cpu: dict[str, dict[str, Any]] = {name: {} for name in names}
    for version, name in show([(version, name) for version in reversed(versions) for name in names], "probes"):
        for device, found in (("gpu", gpu), ("cpu", cpu)):
            model = models[device][name]
            if isinstance(model, str):
                found[name][version] = {"compiles": False, "reason": model}
            elif device == "cpu":
                found[name][version] = on_cpu(pythons[version], version, model)
            else:
                precision = None if stamped(model) else "f16"
                found[name][version] = on_gpu(pythons[version], version, model, precision)
    expected = {name: cpu[name][versions[-1]] for name in names}
    wanted = {"as_exported": lambda name: STOCK, "as_itself": lambda name: name}
    compared = {
        name: {
            version: {"reason": found["reason"]}
            | {
                key: difference(found[key], expected[whose(name)][key])
                for key, whose in wanted.items()
                if key in found and key in expected[whose(name)]
            }
            for version, found in cpu[name].items()
        }
        for name in names
    }
    print(f"{options.model.name} on a virtual {os.environ.get('VIRTUAL_GPU', 'lnl')}, f16\n")
    words = {name: {version: gpu_words(found) for version, found in gpu[name].items()} for name in names}
    title = (
        "",
        "OpenVINO",
        "compiles",
        "`kv_cache` nodes",
        "attention as one primitive",
        "K, V copied to all heads",
        "kernels, copies of the last step",
        "steps",
    )
    print(table(title, words, versions))
    print("\non the CPU at f32, largest difference of the logits\n")
    words = {name: {version: cpu_words(found) for version, found in compared[name].items()} for name in names}
    title = ("", "OpenVINO", "runs", f"from the exported in {versions[-1]}", f"from itself in {versions[-1]}")
    print(table(title, words, versions))
    if options.json:
        record = {"versions": versions, "model": options.model.name, "gpu": gpu, "cpu": compared}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr that says what is wrong."""
    console = Console(stderr=True)
    try:
        options = parse_args(argv)
        with tempfile.TemporaryDirectory() as scratch:
            measure(
                options,
                Path(scratch),
                lambda items, name: track(
                    items, name, console=console, transient=True, disable=not console.is_terminal
                ),
            )
    except OSError as error:
        print(f"versions: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except (OvtqError, KeyboardInterrupt) as error:
        print(f"versions: {error or 'interrupted'}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
