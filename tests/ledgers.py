"""Writes tests/data/ledger.json: what a decode step of the bundled model costs, with each preset (tools/gpu/ledger.py).

usage: python tests/ledgers.py [PRESET…]        (only when a count changes on purpose; then read the diff)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import GPU_TOOLS, MINI, ROOT

RECORD = ROOT / "tests" / "data" / "ledger.json"
PRESETS = ("rotate", "exact", "k8v4", "k6v4", "k4v4", "u8", "u4")
COUNTS = ("kernels", "copies", "waits", "read_per_token", "written_per_token", "flat_read", "flat_written")


def ledger(model_dir: Path) -> dict[str, object]:
    """The ledger of a model on a virtual Lunar Lake; raises RuntimeError with the tool's reason."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ledger.json"
        command = [str(part) for part in (sys.executable, GPU_TOOLS / "ledger.py", model_dir, "--json", out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(out.read_text(encoding="utf-8"))[0]


def counts(found: dict[str, object]) -> dict[str, object]:
    """What is recorded of a ledger."""
    return {key: found[key] for key in ("openvino", *COUNTS)}


if __name__ == "__main__":
    from ovtq.cli.convert import main

    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for preset in sys.argv[1:] or PRESETS:
        with tempfile.TemporaryDirectory() as scratch:
            if main([str(MINI), f"{scratch}/out", "--preset", preset, "--no-verify"]):
                sys.exit(2)
            record[preset] = counts(ledger(Path(scratch) / "out"))
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
