"""Inputs of all other commands, and of the library."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mutate import FIGURES, MINI, ROOT, STATISTICS, TINY, VALUES, Case, Given, changed, garble, json_text, model
from places import GIVEN, NAMES

from ovtq.cli import bench, calibrate, convert, doctor, evaluate, infer, inspect, report

TEXT = ROOT / "tests" / "data" / "heldout.txt"
PARSERS = {
    "eval": evaluate.parser, "bench": bench.parser, "infer": infer.parser, "calibrate": calibrate.parser,
    "inspect": inspect.parser, "report": report.parser, "doctor": doctor.parser, "convert": convert.parser,
}  # fmt: skip
# How likely each is: some run a model, some several in turn.
OFTEN = {"inspect": 6, "infer": 5, "report": 5, "eval": 4, "calibrate": 4, "bench": 2, "doctor": 1, "convert": 3}
WORDS = ("stock", "stock:KV_CACHE_PRECISION=u8", "host:k6v4", "host:", "paged:stock", "nothing", "stock:a", "stock:=")


# Numbers that may be this large, and then take as long as they say.
LONG = (
    "--max-new-tokens", "--runs", "--steps", "--greedy", "--greedy-tokens", "--trials", "--contexts", "--prefill",
    "--prompts", "--depth", "--lengths", "--needles", "--tokens", "--answer-tokens", "--context", "--text",
)  # fmt: skip


def _base(command: str, given: Given, text: Path = TEXT) -> list[object]:
    """Arguments with which a command takes as little time as it can."""
    folder, place = given.folder, given.folder / "model"
    return {
        "inspect": [place, "--context", "64"],
        "infer": [place, "--prompt", "The", "--max-new-tokens", "2", "--raw"],
        "eval": [
            place, "stock:KV_CACHE_PRECISION=u8", "--text", text, "--windows", "1", "--window", "32", "--chunk", "16",
            "--trials", "0", "--greedy", "0",
        ],
        "bench": [place, "--prompt", "a", "--max-new-tokens", "2", "--runs", "1", "--one-process"],
        "calibrate": [place, "--tokens", "16", "--text", text, "--output", folder / "c.npz"],
        "doctor": [
            place, "--out", folder / "doc", "--devices", "CPU", "--presets", "exact", "--contexts", "8", "--steps", "1",
            "--no-verify",
        ],
        "convert": [place, folder / "out", "--preset", "exact", "--no-verify"],
        "report": [folder / "eval.json", "--output", folder / "r.html"],
    }[command]  # fmt: skip


MADE = {
    "eval": ("e.json", "r.html"), "bench": ("b.json", "r.html"), "calibrate": ("c.npz", "model/x.npz"),
    "doctor": ("doc",), "convert": ("out",), "report": ("r.html",),
}  # fmt: skip


def _command(given: Given) -> str:
    return given.draw.choices(list(OFTEN), list(OFTEN.values()))[0]


def _source(command: str) -> Path:
    """The smallest model that a command runs: without a tokenizer where none is needed."""
    return TINY if command in ("inspect", "doctor", "convert") else MINI


def _case(given: Given, command: str, arguments: Sequence[object], done: str, **more: Any) -> Case:
    return given.case(command, arguments, done, made=MADE.get(command, ()), **more)


def any_options(given: Given) -> Case:
    """Options of any command at and beyond their edges, those that are numbers and those that are files."""
    draw, command = given.draw, _command(given)
    (given.folder / "eval.json").write_text(json.dumps(FIGURES))
    model(given, _source(command))
    flags = [action for action in PARSERS[command]()._actions if action.option_strings]
    more: list[str] = []
    for _ in range(draw.choice((1, 1, 2, 4))):
        action = draw.choice(flags)
        name = action.option_strings[-1]
        path = draw.choice(("model/x", "model/config.json", "eval.json", "new.json", ".", "", "none/x", "/dev/full"))
        values = [one for one in GIVEN if one != "65536" or name not in LONG]
        value = draw.choice((*values, *WORDS, path if path.startswith("/") else str(given.folder / path)))
        more += [name] if action.nargs == 0 or draw.random() < 0.1 else [f"{name}={value}"]
    if draw.random() < 0.2:
        more.append(draw.choice(WORDS))
    return _case(given, command, [*_base(command, given), *more], f"options of {command}")


TOLD = (
    "config.json", "generation_config.json", "tokenizer_config.json", "openvino_tokenizer.xml", "chat_template.jinja",
)  # fmt: skip


def any_files(given: Given) -> Case:
    """What stands in a model's folder besides its graph, and the text, for the commands that run a model."""
    draw = given.draw
    command = draw.choice(("infer", "infer", "eval", "calibrate", "bench", "inspect"))
    path, text = model(given, MINI) / draw.choice(TOLD), TEXT
    if draw.random() < 0.3:
        path = text = given.folder / "text"
        shutil.copyfile(TEXT, text)
    data, way = path.read_bytes(), draw.randrange(9)
    if way < 3:
        data = json_text(changed(json.loads(data), draw), draw) if path.suffix == ".json" else garble(data, draw)
        path.write_bytes(data)
    elif way < 7:
        path.write_bytes((b"", b"\xff\xfe" + data[:50], b"\0" * 1000, b"[" * 100_000)[way - 3])
    else:
        path.unlink()
        path.mkdir() if way == 7 else os.mkfifo(path)
    arguments = _base(command, given, text)
    if command == "inspect":
        arguments += ["--text", text]
    return _case(given, command, arguments, f"{path.name}, way {way}, for {command}")


def any_places(given: Given) -> Case:
    """Files and folders that are missing, of odd names, in one another, or named twice."""
    draw, command = given.draw, _command(given)
    folder, place = given.folder, given.folder / "model"
    (folder / "eval.json").write_text(json.dumps(FIGURES))
    arguments = _base(command, given)
    way = draw.randrange(6)
    if way == 0:
        arguments[0] = draw.choice((folder / "nothing", "", TEXT, folder, "/dev/null", "owner/name", folder / NAMES[0]))
    else:
        model(given, _source(command))
    output = {"eval": "--json", "bench": "--output", "inspect": "--json", "report": "--output", "calibrate": "--output"}
    if way == 1 and command in output:  # over an input, into the model, a folder, nowhere
        shutil.copyfile(TEXT, folder / "text")
        arguments = [folder / "text" if one == TEXT else one for one in arguments]
        places = (folder / "text", place / "x.npz", place / "config.json", place, folder / "none" / "x", "/dev/null")
        arguments += [f"{output[command]}={draw.choice((*places, folder / 'eval.json'))}"]
    elif way == 2 and command in ("eval", "bench"):  # one file for two
        arguments += [f"{output[command]}={folder / 'same'}", f"--report={folder / 'same'}"]
    elif way == 3 and command == "report":
        arguments = [folder / "eval.json", *arguments]
    elif way == 4:
        (folder / "loop").symlink_to("loop")
        arguments[0] = folder / "loop"
    elif way == 5 and command == "doctor":
        arguments[arguments.index(folder / "doc")] = draw.choice((place, place / "doc", folder / "eval.json", ""))
    return _case(given, command, arguments, f"places, way {way}, of {command}")


def begun(given: Given) -> Case:
    """What an earlier run of ovtq-eval or ovtq-doctor left, which another takes up."""
    draw, folder = given.draw, given.folder
    if draw.random() < 0.6:
        model(given, MINI)
        (folder / "e.json").write_bytes(json_text(changed(FIGURES, draw), draw))
        arguments = [*_base("eval", given), f"--json={folder / 'e.json'}", "--resume"]
        return _case(given, "eval", arguments, "figures to resume", always=("e.json",))
    model(given)
    (folder / "doc").mkdir()
    facts = {"schema": 1, "model": {"name": "model"}, "contexts": [8], "steps": 1, "machine": {}, "rows": {"CPU": {}}}
    (folder / "doc" / "doctor.json").write_bytes(json_text(changed(facts, draw), draw))
    return _case(given, "doctor", _base("doctor", given), "facts to resume", always=("doc",))


def demo(given: Given) -> Case:
    """ovtq.demo, whose only argument is where to write: where it can't."""
    draw, out = given.draw, given.folder / "out"
    way = draw.randrange(5)
    if way == 0:
        out.write_text("x")
    elif way == 1:
        out.mkdir()
        (out / "mine").touch()
    elif way == 2:
        os.mkfifo(out)
    elif way == 3:
        out.symlink_to("out")
    return given.case("demo", [out if way < 4 else ""], f"the demo, way {way}")


# ------------------------------------------------------------------------------------------ archives and kernels


def archives(given: Given) -> Case:
    """Statistics whose arrays are of other types, shapes and values, or whose file is damaged."""
    draw, folder = given.draw, given.folder
    pruning = draw.random() < 0.5
    path = folder / "s.npz"
    with np.load(STATISTICS if pruning else given.base / "stats.npz") as file:
        arrays: dict[str, Any] = {name: file[name] for name in file.files}
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice(sorted(arrays) or ["form"])
        some = np.array(arrays.get(name, 0))
        ways: list[Any] = [
            lambda x: x.astype(draw.choice((np.float16, np.float64, np.int8, np.complex64, bool, "U8", "S8"))),
            lambda x: np.full(x.shape, draw.choice((np.nan, np.inf, -1, 0, 1e38, 1e-45))),
            lambda x: x.reshape(-1),
            lambda x: x[None],
            lambda x: x[..., :-1] if x.ndim else x,
            lambda x: np.zeros((0, *x.shape[1:])),
            lambda x: np.asfortranarray(x),
            lambda x: np.array(draw.choice(("text", 2**62, -1, None, [1, 2]))),
            lambda x: np.broadcast_to(x, (3, *x.shape)),
        ]
        try:
            arrays[name] = draw.choice(ways)(some)
        except (TypeError, ValueError):
            arrays.pop(name, None)
    made = io.BytesIO()
    np.savez(made, allow_pickle=True, **arrays)
    data = made.getvalue()
    path.write_bytes(garble(data, draw) if draw.random() < 0.3 else data)
    options = ["--budget", "100", "--score", "triattention", "--stats", path]
    options = options if pruning else ["--basis", "calibrated", "--calibration", path]
    return given.case("convert", [MINI, "--preset", "k6v4", "--dry-run", *options], "arrays of statistics")


def kernels(given: Given) -> Case:
    """A folder with kernels of its own, whose sources and binding are changed."""
    draw = given.draw
    place = model(given, given.base / "kernels")
    path = draw.choice(sorted((place / "ovtq_kernels").iterdir()))
    if draw.random() < 0.8:
        path.write_bytes(garble(path.read_bytes(), draw))
    else:
        path.unlink()
        path.symlink_to(draw.choice(("/dev/zero", "nothing", path.name)))
    command = draw.choice(("inspect", "infer", "convert"))
    return _case(given, command, _base(command, given), f"{path.name}, for {command}")


# ------------------------------------------------------------------------------------------ the library

OPTIONS = (
    "preset", "target", "passes", "k_bits", "v_bits", "residual_window", "protect", "centre", "kernels", "capacity",
    "window_bits", "basis", "calibration", "budget", "recent_window", "prefix", "score", "stats", "mode", "slack",
    "heads", "settings", "verify_device", "verify_seed", "verify_layers", "force", "card",
)  # fmt: skip
USUAL = ("exact", "k6v4", "u8", "cpu", "gpu", 4, 8, 100, "triattention", "balanced", [""], {"rotate-heads": {}})


FUNCTIONS = ("convert", "convert", "compress", "describe", "state_bytes", "verify", "properties", "load_state")


def library(given: Given) -> Case:
    """The public functions, with wrong folders, files, types and numbers: an OvtqError, or what they return."""
    draw, folder = given.draw, given.folder
    name = draw.choice(FUNCTIONS)
    place = model(given, draw.choice((TINY, TINY, given.converted)))
    if draw.random() < 0.3:
        path = place / draw.choice(("config.json", "openvino_model.xml", "ovtq.json"))
        if path.exists():
            path.write_bytes(garble(path.read_bytes(), draw))
    odd = (*VALUES, *USUAL, str(folder), str(folder / "nothing"), "\x00")
    known: dict[str, Any] = {"model": str(place), "out": str(folder / "out"), "tokens": 100, "more": {}}
    if name in ("convert", "compress"):
        wanted = [one for one in OPTIONS if name == "convert" or not one.startswith(("verify", "force", "card"))]
        known["more"] = {one: draw.choice(odd) for one in draw.sample(wanted, draw.choice((0, 1, 1, 2, 3)))}
    if draw.random() < 0.4:
        known[draw.choice(("model", "out", "tokens"))] = draw.choice(odd)
    if name == "load_state":
        (folder / "state.npz").write_bytes(garble(STATISTICS.read_bytes(), draw))
        known["out"] = str(folder / "state.npz")
    out = str(known["out"]).partition("/")[0]  # a name is one in the working directory, which is the case's own
    return given.case("library", [name, json.dumps(known)], f"ovtq.{name}", made=("out", out))
