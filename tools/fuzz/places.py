"""Options of ovtq-convert, and what stands where its folders and files are looked for: links, pipes, rights, names."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path

from mutate import BIN, NUMBERS, TINY, XML, Case, Given, convert, model

FLAGS = (
    "--preset", "--passes", "--set", "--target", "--k-bits", "--v-bits", "--residual-window", "--protect", "--centre",
    "--window-bits", "--budget", "--recent-window", "--prefix", "--score", "--stats", "--mode", "--slack", "--heads",
    "--verify-device", "--verify-seed", "--verify-layers", "--json", "--dump-after", "--force", "--dry-run", "--basis",
    "--calibration", "--kernels", "--capacity", "--no-card", "--debug",
)  # fmt: skip
BARE = ("--force", "--dry-run", "--kernels", "--no-card", "--debug")
GIVEN = (
    *NUMBERS, "cpu", "gpu", "u8", "k6v4", "none", "8,4", "first:1", "last:9", "truncate-window.slack=3", "a.b=c",
    "=", "quantize-kv", "truncate-window:slack=-1", ",", "\x00", "/dev/full", "/dev/null", "/", ".", "x" * 300, "NPU",
    "\udcff", "1e999", "-0", "0x10", "1_000", " 8", "balanced", "calibrated", "weights", "GPU.7", "模型",
)  # fmt: skip


NAMES = (
    "mod el", "模型", "-x", "a,b", "x" * 200, "a'b\"c", "%s{}", "a\nb", "a\rb", "\udcff", "é" * 60, "a:b",
    "[red]a[/red]",
)  # fmt: skip


def options(given: Given) -> Case:
    """Options at and beyond their edges."""
    model(given)
    draw, more = given.draw, []
    for _ in range(draw.choice((1, 2, 3, 6))):
        flag = draw.choice(FLAGS)
        more += [flag] if draw.random() < 0.1 or flag in BARE else [f"{flag}={draw.choice(GIVEN)}"]
    arguments = [given.folder / "model", given.folder / "out", *more, "--no-verify"]
    return given.case("convert", arguments, "options")


def links(given: Given) -> Case:
    """Links and special files in the model's folder."""
    draw, place = given.draw, model(given)
    for _ in range(draw.choice((1, 2))):
        path = place / draw.choice(("extra", "config.json", XML, BIN, "sub", "tokenizer.json"))
        if os.path.lexists(path):
            path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
        way = draw.randrange(6)
        if way == 0:
            os.mkfifo(path)
        elif way == 1:
            path.mkdir()
            (path / "file").write_text("x")
        elif way == 2:
            os.link(place / "generation_config.json", path)
        else:
            path.symlink_to(
                draw.choice(("nothing", path.name, "/dev/zero", "/etc", "/etc/passwd", ".", "..", "config.json"))
            )
    return convert(given, "links and special files")


def outputs(given: Given) -> Case:
    """What stands where OUT_DIR is to be."""
    model(given)
    draw, out = given.draw, given.folder / "out"
    way = draw.randrange(7)
    if way == 0:
        out.write_text("")
    elif way == 1:
        out.symlink_to(draw.choice(("nothing", "out", "model", "/dev/null", ".")))
    elif way == 2:
        shutil.copytree(given.converted, out)
    elif way == 3:
        out.mkdir()
        (out / "ovtq.json").mkdir()
    elif way == 4:
        stem = given.folder / ".out.ovtq-0123abcd"
        Path(f"{stem}.lock").write_text(draw.choice(("", "3", "999999", "x")))
        shutil.copytree(given.converted, f"{stem}{draw.choice(('', '.old', '.gone'))}")
    elif way == 5:
        os.mkfifo(out)
    more = ["--force"] if draw.random() < 0.5 else []
    return convert(given, f"what OUT_DIR is, way {way}", more)


def names(given: Given) -> Case:
    """Odd names, and folders in one another, of the model, OUT_DIR and the record."""
    draw, folder = given.draw, given.folder
    source = model(given)
    out, more = folder / "out", ["--force"] if draw.random() < 0.5 else []
    way = draw.randrange(10)
    if way < 3:
        with contextlib.suppress(OSError, ValueError):
            source = source.rename(folder / draw.choice(NAMES))
        out = folder / draw.choice(NAMES)
    elif way == 3:
        out = draw.choice((source, source / "out", source / ".." / "model", folder, folder / "model" / "sub" / "out"))
    elif way == 4:
        (folder / "loop").symlink_to("loop")
        out = draw.choice((folder / "loop", folder / "loop" / "out"))
    elif way == 5:
        (folder / "same").symlink_to("model")
        out = draw.choice((folder / "same", folder / "same" / "out", folder / "same" / ".." / "out"))
    elif way == 6:
        out = folder / "a" / "b" / "c" / "out"
    elif way == 7:
        out = Path(draw.choice(("", " ", ".", "..", "/", "/proc/x", "/dev/null", "/dev/null/x", "~", "\x00", "/sys/x")))
    elif way == 8:
        record = draw.choice((out / "r.json", out, source / "r.json", source / "config.json", folder / "r"))
        more.append(f"--json={record}")
    else:
        (source / "sub").mkdir()
        (source / "sub" / draw.choice(NAMES[:5])).write_text("x")
        (source / draw.choice((".git", ".cache", "model_cache"))).mkdir()
    arguments = [source, out, "--preset", draw.choice(("exact", "k6v4")), "--no-verify", *more]
    place = out.relative_to(folder) if out.is_relative_to(folder) else out
    place = str(place).partition("/")[0]
    return given.case("convert", arguments, f"names, way {way}", made=("out", place) if place != "model" else ("out",))


def rights(given: Given) -> Case:
    """Files and folders that may not be read, written or entered."""
    draw, folder = given.draw, given.folder
    source = model(given, draw.choice((TINY, given.converted)))
    (folder / "parent").mkdir()
    path = draw.choice((source, source / "config.json", source / XML, source / BIN, folder / "parent", source / "sub"))
    if path.name == "sub":
        path.mkdir()
        (path / "file").write_text("x")
    path.chmod(draw.choice((0, stat.S_IRUSR, stat.S_IWUSR, stat.S_IXUSR, stat.S_IRUSR | stat.S_IXUSR)))
    if draw.random() < 0.3:
        return given.case("inspect", [source, "--context", "64"], f"rights of {path.name}")
    arguments = [source, folder / "parent" / "out", "--no-verify", "--preset", "exact"]
    return given.case("convert", arguments, f"rights of {path.name}", made=("parent",))
