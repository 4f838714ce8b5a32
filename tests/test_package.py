"""The house itself: what a wheel carries, which way imports point, and the style."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

import ovtq

PACKAGES = ("ovtq", "passes", "models")
# Who may import whom: each folder, or module of ovtq/ itself, those in the lines below its own.
FLOORS = """
demo __main__
cli
api
conversion evidence prefix
options
verification card
automatic
advice
pipeline runtime
passes
forms
models
ir
codec
states __init__ child
archives
files staging
errors wording signals system whereabouts
disk
""".strip().splitlines()


def _floor(module: str) -> int:
    place = [*module.split("."), "__init__"][1]
    found = [index for index, floor in enumerate(FLOORS) if place in floor.split()]
    assert found, f"{module} stands on no floor; give it one"
    return found[0]


def _imported(node: ast.AST) -> list[str]:
    """Modules of ours that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] == "ovtq"]
    if not isinstance(node, ast.ImportFrom) or not node.module or node.module.split(".")[0] != "ovtq":
        return []
    inside = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if _is_module(name) else node.module for name in inside]


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    beside = ROOT.joinpath(*name.split(".")[1:])  # of passes and models
    return any(x.with_suffix(".py").is_file() or (x / "__init__.py").is_file() for x in (path, beside))


def test_imports_point_one_way() -> None:
    """Between folders downwards, inside of one without circles."""
    inside: dict[str, set[str]] = {}
    for folder in PACKAGES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*path.relative_to(ROOT).with_suffix("").parts]
            module = ".".join([*(["ovtq"] if folder != "ovtq" else []), *parts]).removesuffix(".__init__")
            if module == "ovtq":  # what it gives out is imported when it is asked for
                continue
            for target in (name for node in ast.walk(ast.parse(path.read_text("utf-8"))) for name in _imported(node)):
                if module.split(".")[:2] == target.split(".")[:2]:
                    inside.setdefault(module, set()).add(target)
                else:
                    assert _floor(module) < _floor(target), f"{module} imports {target}"
    list(graphlib.TopologicalSorter(inside).static_order())


def test_converting_needs_no_torch() -> None:
    code = (
        "import ovtq.cli.convert, sys; sys.exit(bool({'torch', 'transformers', 'optimum', 'nncf'} & set(sys.modules)))"
    )
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
            "import ovtq.passes, ovtq.models; ovtq.compress, ovtq.convert; from ovtq.cli.convert import main\n"
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


@pytest.mark.slow
def test_the_tests_run_from_the_sdist(tmp_path: Path) -> None:
    """It holds every file of the repository, and what is unpacked converts and passes."""
    pytest.importorskip("build", reason="needs the extra [dev]")
    build = [sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = next(path for path in tmp_path.iterdir() if path.is_dir())
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = listing.stdout.split("\n")
    assert [name for name in listed if name and not (unpacked / name).exists()] == []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_automatic.py"]
    done = subprocess.run(
        [*command, "tests/test_convert.py::test_dry_run_writes_nothing_and_says_the_bytes"],
        cwd=unpacked, env={**os.environ, "PYTHONPATH": str(unpacked)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


# ------------------------------------------------------------------------------------------ files

# Where files are opened: what reads others' and writes ours, the system's own, locks, and the weights of an IR.
OWNERS = {"files.py", "archives.py", "system.py", "disk.py", "staging.py", "ir/weights.py", "ir/copying.py"}
PLAIN = {
    "open", "read_text", "write_text", "read_bytes", "write_bytes", "touch", "fdopen", "copyfile", "copy2", "copytree",
    "copyfileobj", "mkstemp", "NamedTemporaryFile", "TemporaryFile", "memmap", "fromfile", "tofile", "savez",
    "savez_compressed", "loadtxt", "savetxt", "genfromtxt",
}  # fmt: skip
OF_MODULES = {
    ("np", "load"),
    ("np", "save"),
    ("json", "load"),
    ("json", "dump"),
    ("pickle", "load"),
    ("shutil", "copy"),
}
# By file and call: why it may.
FREE = {
    ("ovtq/child.py", "load"): "messages of our own process, through a pipe",
    (
        "ovtq/evidence/divergence.py",
        "open",
    ): "logits of a reference, gigabytes that are mapped; damaged ones are refused",
    ("ovtq/evidence/divergence.py", "memmap"): "of a file that vanishes, which disk.scratch made",
    ("ovtq/codec/kernel_files.py", "read_text"): "a part of the package",
}


def _plain_calls(tree: ast.AST) -> list[str]:
    """Calls that read or write files, whatever these are."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call = node.func
            if isinstance(call, ast.Name) and call.id in PLAIN:
                found.append(call.id)
            elif isinstance(call, ast.Attribute):
                owner = call.value.id if isinstance(call.value, ast.Name) else ""
                if (call.attr in PLAIN and owner not in ("files", "archives")) or (owner, call.attr) in OF_MODULES:
                    found.append(call.attr)
    return found


def test_files_are_read_and_written_in_one_way() -> None:
    """What is read is a regular file, what is written is whole or not there: `ovtq.files`, `ovtq.archives`."""
    unused = set(FREE)
    for folder in PACKAGES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name.removeprefix("ovtq/") in OWNERS:
                continue
            for call in _plain_calls(ast.parse(path.read_text("utf-8"))):
                assert (name, call) in FREE, f"{name} calls {call}; ovtq.files does that"
                unused.discard((name, call))
    assert not unused


def test_a_plain_read_is_seen() -> None:
    for text in ("open(x)", "x.open('w')", "Path(x).read_text()", "np.load(x)", "json.load(x)", "os.fdopen(1)"):
        assert _plain_calls(ast.parse(text)), text
    assert not _plain_calls(ast.parse("files.copy(x, y); archives.read(x); triattention.load(x)"))


def test_versions_agree() -> None:
    assert importlib.metadata.version("ovtq") == ovtq.__version__
    assert f"## {ovtq.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_upper_bounds_are_the_next_of_what_was_tested() -> None:
    """The major version after tools/constraints.txt's, or the minor one; releasing.md says how they are raised."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (ROOT / "tools" / "constraints.txt").read_text("utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = project["optional-dependencies"]
    for asked in (*project["dependencies"], *(x for name in extras for x in extras[name])):
        need = Requirement(asked)
        if need.name == "ovtq":
            continue
        assert need.name in tested, f"{need.name} has no version in tools/constraints.txt"
        assert need.specifier.contains(tested[need.name]), f"{asked} leaves out what was tested"
        bounds = {x.operator: x.version for x in need.specifier}
        major, minor = Version(tested[need.name]).release[:2]
        if asked in extras["dev"]:  # of this repository alone, whose environments have the versions that were tested
            assert set(bounds) == {">="}
        else:
            assert bounds.get("<") in (f"{major + 1}", f"{major}.{minor + 1}"), f"{asked}: tested {tested[need.name]}"


def test_types() -> None:
    pytest.importorskip("mypy", reason="needs the extra [dev]")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "check_types.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_style() -> None:
    pytest.importorskip("ruff", reason="needs the extra [dev]")
    subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", ROOT], check=True)


def test_no_file_is_longer_than_400_lines() -> None:
    """Of the package, the tests and the tools, Python and OpenCL."""
    folders = (*PACKAGES, "tests", "tools")
    code = [path for folder in folders for kind in ("*.py", "*.cl") for path in (ROOT / folder).rglob(kind)]
    assert len(code) > 200
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in code}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
