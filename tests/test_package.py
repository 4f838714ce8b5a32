"""The house itself: what a wheel carries, which way imports point, and the style."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import ovtq

PACKAGES = ("ovtq", "passes", "models")
# Who may import whom: a module only from layers to its right.
LAYERS = [
    {"ovtq.demo"},
    {"ovtq.cli"},
    {"ovtq.convert", "ovtq.inspect", "ovtq.evaluate", "ovtq.bench", "ovtq.infer"},
    {"ovtq.inspect_tables", "ovtq.bench_tables", "ovtq.evaluate_tables"},
    {"ovtq.api"},
    {"ovtq.worker", "ovtq.divergence", "ovtq.needles", "ovtq.recheck", "ovtq.report", "ovtq.conversion"},
    {"ovtq.candidates", "ovtq.options"},
    {"ovtq.host", "ovtq.paged", "ovtq.gpu_cache", "ovtq.text", "ovtq.plots"},
    {"ovtq.pipeline", "ovtq.verify", "ovtq.roofline_cpu"},
    {"ovtq.closeness"},
    {"ovtq.schedule"},
    {"ovtq.passes", "ovtq.extent", "ovtq.packed_check", "ovtq.calibrate"},
    {"ovtq.full_cache"},
    {"ovtq.forms"},
    {"ovtq.attend_pruned"},
    {"ovtq.prune_branches"},
    {"ovtq.prune"},
    {"ovtq.attend_blocks", "ovtq.attend_branches", "ovtq.attend_window"},
    {"ovtq.attend_block"},
    {"ovtq.attend"},
    {"ovtq.pruning"},
    {"ovtq.scores"},
    {"ovtq.ring"},
    {"ovtq.beams"},
    {"ovtq.checks"},
    {"ovtq.models", "ovtq.runner", "ovtq.routers", "ovtq.dump", "ovtq.quantizer", "ovtq.cache", "ovtq.command"},
    {"ovtq.graph", "ovtq.io"},
    {"ovtq.packed_attention", "ovtq.triattention"},
    {"ovtq.coding"},
    {"ovtq.codec"},
    {"ovtq.codebook", "ovtq.packing"},
    {"ovtq.rotation"},
    {"ovtq.states", "ovtq.files", "ovtq.child"},
    {"ovtq.staging"},
    {"ovtq.errors", "ovtq.weights", "ovtq.roofline", "ovtq.wording", "ovtq"},
    {"ovtq.copying"},
    {"ovtq.system", "ovtq.signals", "ovtq.whereabouts"},
]


def _layer(module: str) -> int:
    package = ".".join(module.split(".")[:2])
    for index, layer in enumerate(LAYERS):
        if package in layer:
            return index
    raise AssertionError(f"{module} stands in no layer; give it one")


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] == "ovtq"]
    if not isinstance(node, ast.ImportFrom) or not node.module or node.module.split(".")[0] != "ovtq":
        return []
    if node.module != "ovtq":
        return [node.module]
    return ["ovtq" if alias.name == "__version__" else f"ovtq.{alias.name}" for alias in node.names]


def test_imports_point_one_way() -> None:
    for folder in PACKAGES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            module = ("ovtq." if folder != "ovtq" else "") + f"{folder}.{inside}"
            if module == "ovtq.__init__":
                continue
            module = module.removesuffix(".__init__")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                for target in _imported(node):
                    same = module.split(".")[:2] == target.split(".")[:2]
                    assert same or _layer(module) < _layer(target), f"{module} imports {target}"


def test_converting_needs_no_torch() -> None:
    code = "import ovtq.convert, sys; sys.exit(bool({'torch', 'transformers', 'optimum', 'nncf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_passes_and_models_have_one_name() -> None:
    for folder in ("passes", "models"):
        code = f"import {folder}"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert f"this folder is the package `ovtq.{folder}`; import it by that name" in done.stderr


def test_the_wheel_carries_every_module(tmp_path: Path) -> None:
    pytest.importorskip("build", reason="needs the extra [dev]")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True, capture_output=True
    )
    wheel = next(tmp_path.glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    tree = {
        f"{'' if folder == 'ovtq' else 'ovtq/'}{path.relative_to(ROOT).as_posix()}"
        for folder in PACKAGES
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == tree
    assert "ovtq/py.typed" in names
    assert {Path(name).name for name in names if "dist-info/licenses" in name} == {"LICENSE", "NOTICE"}
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            f"import sys; sys.path[:0] = [{str(target)!r}, {_site()!r}]\n"
            "import ovtq.passes, ovtq.models; ovtq.compress, ovtq.convert; from ovtq.convert import main\n"
            "print(ovtq.__version__, ovtq.passes.__file__)",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[0] == ovtq.__version__
    assert str(target) in done.stdout


def _site() -> str:
    return str(Path(importlib.util.find_spec("numpy").origin).parent.parent)


def test_versions_agree() -> None:
    assert importlib.metadata.version("ovtq") == ovtq.__version__
    assert f"## {ovtq.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_style() -> None:
    pytest.importorskip("ruff", reason="needs the extra [dev]")
    subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", ROOT], check=True)
