"""How an error calls an option: as the program that gives it does, or as the command line does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Wording:
    """As keyword arguments of `ovtq.convert`."""

    def option(self, name: str) -> str:
        """An option, `name` being its field."""
        return name

    def setting(self, item: str, name: str, value: Any, passes: Iterable[str]) -> str:
        """What is wrong with an option of a pass `item` that is not among the passes."""
        return f"{name}={value!r}: an option of {item or 'no pass'}; the passes are {', '.join(passes)}"


class CommandLineWording(Wording):
    """As flags of ovtq-convert."""

    def option(self, name: str) -> str:
        """With dashes."""
        return f"--{name.replace('_', '-')}"

    def setting(self, item: str, name: str, value: Any, passes: Iterable[str]) -> str:
        """As for --set, which the shorter flags stand for."""
        written = ".".join(filter(None, (item, name.replace("_", "-"))))
        return f"--set {written}={value}: write PASS.OPTION=VALUE with one of the passes {', '.join(passes)}"


PROGRAM, COMMAND_LINE = Wording(), CommandLineWording()
