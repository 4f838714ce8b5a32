"""What README.md and docs/ name is there: commands, flags, files, tests, links; and what is generated is current."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import MINI, ROOT

from ovtq.errors import InputError
from ovtq.passes import PASSES
from ovtq.pipeline import PRESETS, parse_passes

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tools/gpu/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
DOCS = runpy.run_path(str(ROOT / "tools" / "docs.py"))
FOLDERS = "ovtq|passes|models|tests|tools|docs"
PATH = re.compile(rf"(?<![\w./~-])((?:{FOLDERS}|\.github)/[\w./*-]*\w)(?:::(\w+))?")
RUNS_OTHERS = ("tools/gpu/emulated", "tools/gpu/virtual", "/usr/bin/time", "-v", "sudo")
PYTHONS = ("python", "python3")


class Code(NamedTuple):
    """A command, a name or a path in a page: of a fenced block, line by line, or a span."""

    text: str
    fenced: bool


def codes(text: str) -> Iterator[Code]:
    """All that a page sets as code, but for blocks of other languages than a shell's."""
    language: str | None = None
    prose: list[str] = []
    block: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            if language is not None and language in ("", "bash", "sh"):
                yield from (Code(joined, True) for joined in "\n".join(block).replace("\\\n", " ").splitlines())
            language, block = (line.strip("` ") if language is None else None), []
        elif language is None:
            prose.append(line)
        else:
            block.append(line)
    yield from (Code(span.replace("\n", " "), False) for span in re.findall(r"`([^`]+)`", "\n".join(prose)))


def faults(text: str, page: Path = ROOT / "README.md") -> list[str]:
    """What a page names that is not there."""
    found = [fault for link in links(text) if (fault := _link(link, page))]
    for code in codes(text):
        found += [f"{code.text}: {fault}" for fault in (*_paths(code.text), *_named(code), *_commands(code))]
    return found


# ---------------------------------------------------------------------------------------------- links


def links(text: str) -> list[str]:
    """The targets of a page's links and pictures; none of those in code."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))


@cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def _link(link: str, page: Path) -> str:
    if link.startswith(("https://", "http://")):
        return ""
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists():
        return f"link {link}: there is no {name}"
    if anchor and anchor not in anchors(target):
        return f"link {link}: no heading of that name"
    return ""


# ---------------------------------------------------------------------------------------------- files and names


def _paths(text: str) -> Iterator[str]:
    for name, test in PATH.findall(text):
        if any(part.isupper() for part in re.split(r"[/.]", name)):  # passes/NAME.py
            continue
        there = sorted(ROOT.glob(name))
        if not there:
            yield f"there is no {name}"
        elif test and not re.search(rf"^def {test}\(", there[0].read_text(encoding="utf-8"), re.M):
            yield f"{name} has no {test}"


@cache
def sources() -> str:
    """The code, in which states and files are named."""
    return "\n".join(path.read_text(encoding="utf-8") for folder in ("ovtq", "passes") for path in _python(folder))


def _python(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _named(code: Code) -> Iterator[str]:
    """`ovtq.forms.pruning.pruned(request)` can be imported, `ovtq.pruned` is written in the code."""
    whole = re.match(r"ovtq(\.[a-z_]\w*)+", code.text)
    if code.fenced or not whole:
        return
    *path, last = whole[0].split(".")
    if f'"{whole[0]}"' in sources():
        return
    for length in range(len(path) + 1, 0, -1):
        try:
            found = importlib.import_module(".".join([*path, last][:length]))
        except ModuleNotFoundError:
            continue
        for name in [*path, last][length:]:
            found = getattr(found, name, None)
        if found is None:
            break
        return
    yield f"there is no {whole[0]}"


# ---------------------------------------------------------------------------------------------- commands


@cache
def parser(command: str) -> argparse.ArgumentParser:
    return DOCS["parser"](command)


@cache
def tool_flags() -> frozenset[str]:
    """Flags that some script of tools/ or tests/ has."""
    return frozenset(flag for folder in ("tools", "tests") for path in _python(folder) for flag in _flags_in(path))


def _flags_in(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    switches = re.findall(r"[\"']--([\w-]+)[\"'], action=argparse\.BooleanOptionalAction", text)
    return [*re.findall(r"[\"'](--[\w-]+)[\"']", text), *(f"--no-{name}" for name in switches)]


def _commands(code: Code) -> Iterator[str]:
    """What is wrong with the commands of a line or span; a span may be flags alone, or a preset and flags."""
    for part in re.split(r"\s(?:&&|\|)\s", code.text):
        try:
            words = shlex.split(part, comments=code.fenced)
        except ValueError:
            continue  # no command: an apostrophe
        yield from _command(words, code.fenced)


def _command(words: list[str], fenced: bool) -> Iterator[str]:
    while words and (words[0] in RUNS_OTHERS or re.fullmatch(r"[A-Z_]+=\S*", words[0])):
        words = words[1:]
    if not words:
        return
    first, *rest = words
    name = Path(first).name
    if name == "ovtq" and rest and rest[0][:1] not in ("-", "…") and not rest[0].isupper():
        name, rest = f"ovtq-{rest[0]}", rest[1:]
    if name.startswith("ovtq-") and first != "~/.cache/ovtq-gpu" and not first.startswith(("tools/", "~")):
        if name not in DOCS["COMMANDS"]:
            yield f"there is no command {name}"
            return
        wrong = [*_flags(rest, [parser(name)])]
        if fenced and not wrong and "…" not in " ".join(rest):
            wrong += _tried(lambda: parser(name).parse_intermixed_args(rest))
        yield from wrong
    elif first in PRESETS:
        yield from _flags(rest, [parser("ovtq-convert")])
    elif name in PYTHONS and rest and not rest[0].startswith("-"):
        yield from _script(rest[0], rest[1:])
    elif first.startswith(("tools/", "tests/")) and first != "tools/test":
        if rest and (ROOT / first).is_file() and not os.access(ROOT / first, os.X_OK):
            yield f"{first} can't be run; write python {first}"
        yield from _script(first, rest)
    elif first.startswith("--"):
        yield from _flags(words, [parser(command) for command in DOCS["COMMANDS"]], tool_flags())
    elif name == "pip" and (extras := re.search(r"\.\[([\w,]+)\]", " ".join(rest))):
        declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        yield from (f"no extra {x}" for x in extras[1].split(",") if not re.search(rf"^{x} = \[", declared, re.M))


def _flags(
    words: list[str], parsers: list[argparse.ArgumentParser], more: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Flags that no parser knows, and values that are none of a flag's choices."""
    for number, word in enumerate(words):
        if not word.startswith("--") or word == "--":
            continue
        flag, equals, value = word.rstrip(",").partition("=")
        actions = [p._option_string_actions[flag] for p in parsers if flag in p._option_string_actions]
        if not actions and flag not in more:
            yield f"no flag {flag}"
            continue
        value = value if equals else next(iter(words[number + 1 :]), "")
        if not value or value[0] in "-{" or value.isupper():
            continue
        choices = [set(map(str, action.choices)) for action in actions if action.choices]
        if choices and len(choices) == len(actions) and not any({*value.split("|")} <= some for some in choices):
            yield f"{flag} can't be {value}"
        if flag == "--set" and actions:
            yield from _setting(value)
        if flag == "--passes" and actions and "NAME" not in value:
            yield from _tried(lambda value=value: parse_passes(value))


def _setting(text: str) -> Iterator[str]:
    name, _, option = text.partition("=")[0].partition(".")
    if name not in PASSES and not name.isupper():
        yield f"--set: no pass {name}"
    elif name in PASSES and option.replace("-", "_") not in PASSES[name].__dataclass_fields__:
        yield f"--set: {name} has no option {option}"


def _tried(work: Callable[[], object]) -> Iterator[str]:
    try:
        work()
    except InputError as error:
        yield str(error)


def _script(name: str, rest: list[str]) -> Iterator[str]:
    """A script is there, and has these flags; what follows -- is another command's."""
    path = ROOT / name
    if not path.is_file():
        return  # said of all paths
    known = _flags_in(path) if path.suffix == ".py" else None
    for word in rest[: rest.index("--")] if "--" in rest else rest:
        flag = word.partition("=")[0]
        if known is not None and word.startswith("--") and flag not in known and flag != "--help":
            yield f"{name} has no flag {flag}"


# ---------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    assert faults(page.read_text(encoding="utf-8"), page) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[x](docs/nowhere.md)", "there is no docs/nowhere.md"),
        ("[x](docs/presets.md#nowhere)", "no heading of that name"),
        ("`ovtq-convrt A B`", "no command ovtq-convrt"),
        ("`ovtq convrt A B`", "no command ovtq-convrt"),
        ("`ovtq eval A B --txt FILE`", "no flag --txt"),
        ("`ovtq-convert A B --buget 3`", "no flag --buget"),
        ("`--target tpu`", "--target can't be tpu"),
        ("`k6v4 --target tpu`", "--target can't be tpu"),
        ("`--set sink-row.rotat=false`", "sink-row has no option rotat"),
        ("`--no-such-flag`", "no flag --no-such-flag"),
        ("```bash\novtq-convert A B --preset k7v4\n```", "--preset can't be k7v4"),
        ("```bash\novtq-eval A B\n```", "--text"),
        ("```\novtq-bench A B \\\n  --contxts 256\n```", "no flag --contxts"),
        ("```bash\nFAKE_GPU=lnl tools/gpu/emulated python tools/gpu/prob.py A\n```", "there is no tools/gpu/prob.py"),
        ("`tools/gpu/ledger.py A --chips lnl`", "no flag --chips"),
        ("`python tools/docs.py --chek`", "no flag --chek"),
        ("`tools/measure_loss.py A B`", "tools/measure_loss.py can't be run"),
        ("`ovtq/attend_tpu.py`", "there is no ovtq/attend_tpu.py"),
        ("`tests/test_gpu.py::test_nothing`", "has no test_nothing"),
        ("`ovtq.forms.pruning.prund(request)`", "there is no ovtq.forms.pruning.prund"),
        ("`ovtq.recnt`", "there is no ovtq.recnt"),
        ("`pip install '.[gnai]'`", "no extra gnai"),
    ],
)
def test_what_is_not_there_is_found(text: str, fault: str) -> None:
    (found,) = faults(text)
    assert fault in found


def test_the_readme_is_an_introduction() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150


def test_the_readmes_first_screen_takes_a_newcomer_to_text() -> None:
    """In this order: install, get a model, convert, load in either host; and what a host must be told or not asked."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:48]
    steps = (
        "pip install '.[genai]'", "takes 45 GB of memory", "hf download ", "optimum-cli export openvino ",
        "ovtq convert ", "LLMPipeline(", "OVModelForCausalLM.from_pretrained(", "ovtq.read_prompt(", "`CACHE_DIR`",
        '`ATTENTION_BACKEND="PA"`', "`num_return_sequences` above 1", "`ovtq.save_state`", "`ovtq doctor`",
    )  # fmt: skip
    places = [next((number for number, line in enumerate(lines) if step in line), None) for step in steps]
    assert None not in places, dict(zip(steps, places, strict=True))
    assert places == sorted(places)


@pytest.mark.parametrize("page", ["README.md", "docs/presets.md"])
def test_every_preset_and_pass_is_told(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    told = {word for code in codes(text) for word in re.split(r"[\s,:]+", code.text)}
    expected = {*PASSES} if page == "README.md" else {*PRESETS}
    assert expected <= told


def test_figures_of_the_readme_stand_in_docs() -> None:
    """With their commands; those with a thousand's comma, which are figures."""
    docs = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md")))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {x for x in re.findall(r"\d+,\d{3}", readme) if not re.search(rf"(?<![\d,]){x}(?![\d,])", docs)} == set()


def test_generated_pages_are_current() -> None:
    stale = [path.name for path, text in DOCS["pages"]().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"{', '.join(stale)}: out of date; run: python tools/docs.py"


def test_plugin_notes_are_numbered_and_cited() -> None:
    """None is missing or there twice; and what the code and the pages cite is there."""
    notes = (ROOT / "docs" / "plugin-notes.md").read_text(encoding="utf-8")
    numbers = re.findall(r"^### (P\d\d): ", notes, re.M)
    assert sorted(numbers) == [f"P{number:02}" for number in range(1, len(numbers) + 1)]
    texts = [page.read_text(encoding="utf-8") for page in PAGES] + [sources()]
    texts += [path.read_text(encoding="utf-8") for path in (ROOT / "tools" / "gpu").glob("*.py")]
    assert {number for text in texts for number in re.findall(r"\bP\d\d\b", text)} <= {*numbers}


def test_workflows_and_forms_are_yaml() -> None:
    yaml = pytest.importorskip("yaml", reason="comes with the extra [dev]")
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert all(isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict) for path in files)


@pytest.mark.parametrize(("number", "needs"), [(0, "openvino_genai"), (1, "optimum.intel")])
def test_the_readmes_python_runs(number: int, needs: str, convert: Callable[..., Path], tmp_path: Path) -> None:
    """As it stands, with the bundled model on a CPU in the place of GPT-OSS-20B on a GPU."""
    pytest.importorskip(needs, reason="needs an extra")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    folder = convert(MINI, "--preset", "u8", "--target", "cpu")
    code = blocks[number].replace("gpt-oss-20b-kv", str(folder)).replace('"GPU"', '"CPU"')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 20
