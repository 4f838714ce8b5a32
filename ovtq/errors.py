"""The errors a user can act on. Each carries one line: what, where, what to do."""

from __future__ import annotations

import errno
import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# What Python, numpy and OpenVINO raise of something that is not as it should be.
FOREIGN = (
    OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
    MemoryError, ImportError,
)  # fmt: skip
LONGEST = 500  # characters of what they say
# What the system's lack of threads or memory is called, by whomever it meets.
SCARCE = (
    os.strerror(errno.EAGAIN),
    os.strerror(errno.ENOMEM),
    "bad_alloc",
    "start new thread",
    "pthread_create failed",
)


LINE = 1000  # characters of an error, at most


def one_line(text: str) -> str:
    """A text in one line, its middle left out if it is long."""
    line = " ".join(text.split()).encode("utf-8", "backslashreplace").decode("utf-8")  # names may be no text
    return line if len(line) <= LINE else f"{line[: LINE // 2]} … {line[-LINE // 2 :]}"


class OvtqError(Exception):
    """Base of all errors that the command line reports in one line with exit code 2."""

    def __str__(self) -> str:
        """In one line, whatever names and values stand in it."""
        return one_line(super().__str__())


class InputError(OvtqError):
    """A path, file or option given by the user can't be used."""


class UnsupportedModel(OvtqError):
    """The model is not one that `ovtq.models` can describe; says what was looked for and not found."""


class PreconditionFailed(OvtqError):
    """A pass refuses a model it can describe; the model was not touched."""


class VerificationFailed(OvtqError):
    """A result is not what was promised (a pass's postcondition, or the numbers of the converted model)."""


def last_line(error: BaseException) -> str:
    """The last line of an error's text: OpenVINO puts the reason there, below file names of its own sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def scarcity(text: str) -> str:
    """What to say of an error that is the system's lack of threads or memory; empty if it is none."""
    found = next((words for words in SCARCE if words in text), "")
    return found and f"the system gives no more threads or memory ({found}); ulimit -u, -v?"


@contextmanager
def foreseen(own: Collection[Exception] = ()) -> Iterator[None]:
    """Within it whatever is raised is an OvtqError; but for `own`, a caller's."""
    try:
        yield
    except FOREIGN as error:
        if any(error is one for one in own):
            raise
        if lack := scarcity(str(error)):
            raise InputError(lack) from error
        raise InputError(f"can't be done ({type(error).__name__}: {last_line(error)[:LONGEST]})") from error


def telling(function: Callable[P, R]) -> Callable[P, R]:
    """A function of the public interface: whatever is wrong with what it is given it raises as an OvtqError."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        signature.bind(*args, **kwargs)  # a call without its arguments is a TypeError all the same
        with foreseen():
            return function(*args, **kwargs)

    return told
