#!/usr/bin/env python3
"""Check the types of the package as a wheel lays it out, by the settings in pyproject.toml.

usage: check_types.py

A checkout keeps passes/ and models/ beside ovtq/, where mypy does not find `ovtq.passes` and `ovtq.models`, and takes
all that comes from them for Any. So it is given a copy with both in their places, in .mypy_cache, which keeps what it
found out: every run but the first takes seconds. Ends with mypy's exit code.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".mypy_cache"
PLACES = {"ovtq": "ovtq", "passes": "ovtq/passes", "models": "ovtq/models"}


def lay_out(target: Path) -> None:
    """Copy the sources as they are, times included, by which mypy knows what has not changed."""
    shutil.rmtree(target, ignore_errors=True)
    for folder, place in PLACES.items():
        for path in (ROOT / folder).rglob("*.py"):
            copy = target / place / path.relative_to(ROOT / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    tree = CACHE / "package"
    lay_out(tree)
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(CACHE)]
    return subprocess.run([sys.executable, "-m", "mypy", *settings, "ovtq"], cwd=tree, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
