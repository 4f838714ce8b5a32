"""Where results are written: what must not be replaced, what others left there, and the order of writing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import COMMAND, TINY
from test_hostile import line

import ovtq
from ovtq import staging
from ovtq.cli.convert import main
from ovtq.errors import InputError


def test_the_working_directory_is_not_replaced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "a path is empty" in line(capsys, main, TINY["5.5"], "")
    assert "a path is empty" in line(capsys, main, "", tmp_path / "out")
    for name in (".", "..", tmp_path):
        assert "is the working directory or around it" in line(capsys, main, TINY["5.5"], name)
    with pytest.raises(InputError, match="out_dir is empty"):
        ovtq.convert(TINY["5.5"], "")
    assert os.listdir(tmp_path) == ["empty"]


def test_planted_names_are_left_alone(tmp_path: Path) -> None:
    """A lock makes nobody's folder a result, nor removes what no run has made."""
    stem = tmp_path / ".out.ovtq-0123abcd"
    Path(f"{stem}.lock").touch()
    Path(f"{stem}.old").mkdir()
    (Path(f"{stem}.old") / "evil").touch()
    target = tmp_path / "mine"
    target.mkdir()
    (target / "file").touch()
    other = tmp_path / ".out.ovtq-0123abce"
    Path(f"{other}.lock").touch()
    Path(f"{other}.gone").symlink_to(target)
    (tmp_path / ".out.ovtq-0123abcf.lock").symlink_to(target / "file")
    before = sorted(os.listdir(tmp_path))
    staging.tidy_up(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before
    assert (target / "file").exists()
    with staging.staged(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path / "out") == ["new"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_another_users_leavings_are_left_alone(tmp_path: Path) -> None:
    stem = tmp_path / ".out.ovtq-0123abcd"
    Path(f"{stem}.lock").touch()
    stem.mkdir()
    os.chown(f"{stem}.lock", 12345, 12345)
    staging.tidy_up(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [stem.name, f"{stem.name}.lock"]
    os.chown(f"{stem}.lock", 0, 0)
    staging.tidy_up(tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    made: list[Path] = []

    def make(*options: str) -> Path:
        place = tmp_path / "mounted"
        place.mkdir(exist_ok=True)
        if subprocess.run(["mount", *options, place], capture_output=True, check=False).returncode:
            pytest.skip("mounting needs root")
        made.append(place)
        return place

    yield make
    for place in made:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("bind", [False, True])
def test_a_mount_point_is_refused_at_once(
    bind: bool, mount: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A disk, or a folder of the same disk, as containers have them."""
    (tmp_path / "source").mkdir()
    place = mount("--bind", str(tmp_path / "source")) if bind else mount("-t", "tmpfs", "none")
    said = line(capsys, main, TINY["5.5"], place, "--no-verify")
    assert "something is mounted there" in said


def test_folders_made_around_it_go_with_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """After a refusal while it is written; those that were there stay."""
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="planted"), staging.staged(tmp_path / "there" / "a" / "b" / "out"):
        raise ValueError("planted")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with staging.staged(tmp_path / "there" / "a" / "b" / "out") as folder:
        (folder / "file").touch()
    assert (tmp_path / "there" / "a" / "b" / "out" / "file").exists()


def test_folders_that_a_killed_run_made_go_with_it(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    code = f"""import os
from pathlib import Path
from ovtq import staging
with staging.staged(Path({str(out)!r})):
    os._exit(9)"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(os.listdir(out.parent)) == 2
    staging.tidy_up(out)
    assert os.listdir(tmp_path) == []


def test_files_are_on_the_disk_before_the_names_change(tmp_path: Path) -> None:
    """As the system sees it: every file and folder is flushed before the old result is renamed, the names after it."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    out, log = tmp_path / "out", tmp_path / "log"
    assert main([str(TINY["5.5"]), str(out), "--no-verify", "--preset", "exact"]) == 0
    calls = "trace=fsync,rename,renameat,renameat2,openat,open,unlinkat,rmdir,mkdir,mkdirat"
    command = ["strace", "-f", "-y", "-qq", "-s", "4096", "-e", calls, "-o", log]
    done = subprocess.run(
        [*command, *COMMAND, TINY["5.5"], out, "--no-verify", "--force"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    events = [text.split(maxsplit=1)[1] for text in log.read_text().splitlines()]
    moves = [index for index, text in enumerate(events) if text.startswith("rename") and ".new" not in text]
    assert len(moves) == 3  # the old one aside, the new one in its place, the old one to be removed
    flushed = [re.search("<(.*)>", text)[1] for text in events[: moves[0]] if text.startswith("fsync")]
    names = {Path(name).name for name in flushed if ".out.ovtq-" in name}
    assert {path.name for path in out.iterdir()} <= names
    folder = next(name for name in flushed if re.fullmatch(r".*/\.out\.ovtq-[0-9a-f]{8}", name))
    assert flushed[-1] == folder  # the names in it last
    assert str(tmp_path) in flushed  # and its own name, with the lock's, before
    after = [text for text in events[moves[1] : moves[2]] if text.startswith("fsync")]
    assert any(f"<{tmp_path}>" in text for text in after)
