"""What every file of figures says of itself: with which command, of which commit, when and where it was made."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import openvino as ov

ROOT = Path(__file__).resolve().parent.parent


def made() -> dict[str, Any]:
    """Command, commit ("" where git does not tell), date, machine and versions."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"), "cores": os.cpu_count()},
        "versions": {"openvino": ov.__version__, "python": platform.python_version()},
    }


def write(path: Path | None, **figures: Any) -> None:
    """Write figures and how they were made, as JSON; nothing if no file is named."""
    if path is not None:
        path.write_text(json.dumps({"about": made(), **figures}, indent=1) + "\n", encoding="utf-8")
