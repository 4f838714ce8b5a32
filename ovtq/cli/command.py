"""What the commands share: one line and exit code 2 for whatever is wrong, how numbers are written, progress bars."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import openvino as ov
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ovtq import __version__, system
from ovtq.errors import InputError, OvtqError, one_line, scarcity
from ovtq.ir.io import last_line

T = TypeVar("T")
MOST, MANY = 1 << 24, 10_000  # tokens, steps and the like that may be asked for; and of what fills memory by itself


# What people type who know other programs of this kind, or the flag of another command.
ELSEWHERE = {
    "--(?:(?:k|v|window)-)?bits": "bits are chosen when a model is converted: ovtq convert",
    "--(?:preset|target|budget|protect|residual-window|recent-window|centre|score|passes)": "an option of ovtq convert",
    "--budget-kld": "an option of ovtq convert",
    "--model(?:-dir)?": "the model's folder is the first argument, without a flag",
    "--output-dir": "the folder to write is the second argument, without a flag",
    "--compress-every": "there is no such step: the graph itself packs tokens as they leave the recent ones",
    "--top-[pk]": "ovtq infer takes --temperature alone; openvino_genai samples in every way",
}


class Out(Console):
    """Standard output, as plain text: no markup, nothing highlighted."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, soft_wrap=True, **options)
        if not self.is_terminal:
            self.width = 240  # a table in a file is not cut

    def on_broken_pipe(self) -> None:
        """Let the caller decide; rich would exit with 1."""
        raise BrokenPipeError


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError, one line, instead of printing usage and leaving."""

    def __init__(self, prog: str, description: str | None, **options: Any) -> None:
        super().__init__(
            prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        self.add_argument("--debug", action="store_true", help="show where an error was raised, too")
        versions = f"ovtq {__version__}, openvino {ov.__version__}"
        self.add_argument("--version", action="version", version=versions, help="print the versions of both and leave")

    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage and line; says where a flag of another place is."""
        found = [said for flag, said in ELSEWHERE.items() if re.search(rf"(?<![\w-]){flag}(?![\w-])", message)]
        raise InputError("; ".join([message, *found[:1], f"see {self.prog} --help"]))


def run(
    prog: str,
    work: Callable[[], int | None],
    errors: Console | None = None,
    interrupted: str = "interrupted",
    argv: Sequence[str] | None = None,
) -> int:
    """Exit code of `work()`: what it returns (None: 0), or 2 after one line on stderr that says what is wrong.

    Whatever is raised is such a line; with --debug among the arguments (`argv`, by default the process's) where it was
    raised stands above it.
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    errors = errors or Console(stderr=True, highlight=False)

    def fail(line: str) -> int:
        with contextlib.suppress(OSError):  # there may be nobody to tell
            if debug:
                errors.file.write(traceback.format_exc())
            errors.print(one_line(f"{prog}: {line}"), markup=False, soft_wrap=True)
        return 2

    try:
        with warnings.catch_warnings():
            if not debug:  # what numpy or a library warns of is nothing to the user, who reads one line
                warnings.simplefilter("ignore")
            return work() or 0
    except KeyboardInterrupt:
        return fail(interrupted)
    except OvtqError as error:
        return fail(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename == system.STDOUT:
            return fail(f"{system.STDOUT} can't be written to ({system.reason(error)})")
        return fail(f"{error.filename or 'system'}: {error.strerror or last_line(error)}")
    except MemoryError:
        return fail("out of memory")
    except Exception as error:
        return fail(scarcity(str(error)) or unforeseen(error))


def unforeseen(error: Exception) -> str:
    """One line about an error that nobody foresaw."""
    return f"failed where nothing should, please report it: {type(error).__name__}: {last_line(error)} (--debug: where)"


def positive(text: str) -> int:
    """A whole number of at least 1; `8k` and the like as in `tokens`."""
    value = tokens(text)
    if value < 1:
        raise ValueError
    return value


def count(text: str) -> int:
    """A whole number from 0 to MANY: of what is there all at once."""
    value = tokens(text)
    if value > MANY:
        raise argparse.ArgumentTypeError(f"{value:,} are too many; at most {MANY:,}")
    return value


positive.__name__ = count.__name__ = "number"  # argparse: "invalid number value: '0'"


def tokens(text: str) -> int:
    """A number of tokens: 300, or 8k = 8,192. A power of two may be told by its thousands, too: 131k is 131,072."""
    found = re.fullmatch(r"(\d+)([kK]?)", text.strip())
    if not found:
        raise ValueError
    number = int(found[1])
    if found[2]:
        power = 1 << (number * 1000).bit_length()  # 131k: the next power of two, 131,072, has 131 whole thousands
        number = power if number and power // 1000 == number else number * 1024
    if number > MOST:
        raise argparse.ArgumentTypeError(f"{text.strip()[:20]} is too large; at most {MOST:,}")
    return number


def turns(per_token: int, flat: int, other_per_token: int, other_flat: int) -> int | None:
    """Tokens from which on the other states are the smaller; None: never."""
    gain, lead = per_token - other_per_token, other_flat - flat
    if gain <= 0:
        return 0 if lead < 0 and gain == 0 else None
    return max(lead // gain + 1, 0)


def path_of(text: str) -> Path:
    """A path that is not empty, as a variable of a script may be that was never set."""
    if not text.strip() or "\0" in text:
        raise InputError(f"a path is empty or can't be one: {text!r}")
    return Path(text)


def listed(one: Callable[[str], T], name: str) -> Callable[[str], list[T]]:
    """The parser of a comma-separated list of what `one` parses; `name` is what argparse calls it."""

    def parse(text: str) -> list[T]:
        return [one(part) for part in text.split(",")]

    parse.__name__ = name
    return parse


def progress(errors: Console) -> Progress:
    """Bars on stderr, where it is a terminal."""
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=errors, disable=not errors.is_terminal)


@contextmanager
def phase(bars: Progress, name: str, total: int) -> Iterator[Callable[[], None]]:
    """One bar of `total` steps; yields what advances it."""
    task = bars.add_task(name, total=total)
    yield lambda: bars.advance(task)
