"""The contract of a pass: requires → run → ensures."""

from __future__ import annotations

import dataclasses
import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import openvino as ov

from ovtq import files, states, system
from ovtq.codec import moments
from ovtq.errors import InputError, PreconditionFailed, VerificationFailed
from ovtq.forms.bases import CENTRES, KINDS, Choice
from ovtq.models.description import ModelDescription


@dataclass(frozen=True)
class Rewrite:
    """What a pass hands on: the model, its description now, how many sites it rewrote, and facts for the record."""

    model: ov.Model
    description: ModelDescription
    sites: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of the graph. A subclass is a frozen dataclass whose fields are its command-line options.

    `requires` refuses before anything is touched; `run` rewrites exactly `sites` places; `ensures` checks the result on
    the graph. `needless` says where a model has no place for it: then a pipeline leaves it out and tells so.
    """

    name: ClassVar[str]
    recaches: ClassVar[bool] = False  # gives layers another cache
    serves: ClassVar[bool] = False  # prepares or completes the work of those that do, and has no other use in a preset

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether its result agrees with its input to rounding; a class attribute where no option decides it."""

    @property
    @abstractmethod
    def paged_attention(self) -> bool:
        """Whether GenAI's continuous batching can still turn the result into a model with paged attention; likewise."""

    @abstractmethod
    def sites(self, description: ModelDescription) -> int:
        """How many places this pass must rewrite in such a model."""

    @abstractmethod
    def requires(self, description: ModelDescription) -> None:
        """Raise PreconditionFailed if this pass can't work on the model; must not change it."""

    def needless(self, description: ModelDescription) -> str:
        """Why there is nothing for this pass to do in such a model, which may well go without it; empty if there is."""
        return ""

    @abstractmethod
    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Rewrite the graph. May reuse the nodes of `model`, which must not be used afterwards."""

    @abstractmethod
    def ensures(self, rewrite: Rewrite) -> None:
        """Raise VerificationFailed if the graph is not what this pass promises."""

    def apply(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """requires → run → validate → count → states → ensures."""
        self.requires(description)
        expected = self.sites(description)
        rewrite = self.run(model, description)
        rewrite.model.validate_nodes_and_infer_types()
        if rewrite.sites != expected:
            raise VerificationFailed(f"{self.name}: rewrote {rewrite.sites} sites, the model has {expected}")
        variables = [variable.get_info() for variable in rewrite.model.get_variables()]
        if fault := states.other_than(rewrite.description.states, variables):
            raise VerificationFailed(f"{self.name}: {fault}")
        self.ensures(rewrite)
        return rewrite

    def refuse(self, reason: str) -> PreconditionFailed:
        """The error to raise in `requires`."""
        return PreconditionFailed(f"{self.name}: {reason}")

    def refuse_if(self, reason: str | None) -> None:
        """Raise that error if there is a reason; see `ovtq.passes.checks`."""
        if reason:
            raise self.refuse(reason)

    def at(self, folder: Path) -> Pass:
        """This pass with what it needs beside the graph taken from the model's folder. Raises InputError if missing."""
        return self

    def leave(self, folder: Path) -> None:  # noqa: B027  most leave nothing
        """Put into the folder that is written what `at` will look for there."""

    @property
    def options(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)

    @classmethod
    def option_help(cls) -> dict[str, str]:
        """Each option's name with its default and meaning, for the help text."""
        return {
            option.name: f"{option.metadata.get('help', '')}"
            + (f": {', '.join(choices)}" if (choices := option.metadata.get("choices")) else "")
            + ("" if option.default is False else f" (default: {option.default if option.default != '' else 'none'})")
            for option in dataclasses.fields(cls)
        }

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Pass:
        """Make the pass from options, texts or values. Raises InputError for an unknown option or an unusable value."""
        try:
            return cls(**cls.values(options))
        except ValueError as error:
            raise InputError(f"{cls.name}: {error}") from None

    def changed(self, options: Mapping[str, Any]) -> Pass:
        """This pass with some options changed, given as texts or values. Raises InputError as `parse` does."""
        try:
            return dataclasses.replace(self, **self.values(options))
        except ValueError as error:
            raise InputError(f"{self.name}: {error}") from None

    @classmethod
    def values(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options, texts or values, as values of the fields; their names may have dashes.

        Raises InputError for an unknown option or another type.
        """
        hints, values = get_type_hints(cls), {}
        known = {option.name: option for option in dataclasses.fields(cls)}
        for name, text in options.items():
            option = name.replace("-", "_")
            if option not in known:
                raise InputError(f"{cls.name} has no option {name!r}; it has {', '.join(known) or 'none'}")
            try:
                values[option] = _value(hints[option], text)
            except (TypeError, ValueError):
                raise InputError(f"{cls.name}: {name} needs {hints[option].__name__}, got {text!r}") from None
            choices = known[option].metadata.get("choices")
            if choices and values[option] not in choices:
                raise InputError(f"{cls.name}: {name} is one of {', '.join(choices)}, got {text!r}")
        return values


@dataclass(frozen=True)
class BasisPass(Pass):
    """A pass that stores keys and values in a basis of `ovtq.forms.bases`, of statistics where they are asked for."""

    @property
    @abstractmethod
    def choice(self) -> Choice:
        """How its bases are made, by its options; its own `calibration` is where the statistics lie."""

    @property
    def options(self) -> dict[str, Any]:
        """The fields by name, but not where the statistics lay: a copy is beside the model."""
        return {**super().options, "calibration": ""}

    def at(self, folder: Path) -> Pass:
        """With the statistics that lie in a model's folder, unless others are named, or none are needed."""
        if not self.choice.reads_text or self.choice.stats:
            return self
        path = folder / moments.NAME
        if not path.is_file():
            raise InputError(
                f"{self.name}: {path}: no such file; statistics of a text are asked for: run ovtq-calibrate "
                f"{folder} first, or name another file"
            )
        return dataclasses.replace(self, calibration=str(path))  # type: ignore[call-arg]  # a field of those that are made

    def leave(self, folder: Path) -> None:
        """The statistics, under the name that `at` knows."""
        stats, copy = self.choice.reads_text and self.choice.stats, folder / moments.NAME
        if stats and system.resolved(Path(stats)) != system.resolved(copy):
            files.copy(Path(stats), copy)


def basis_option() -> Any:
    """The field `basis`."""
    return option("rotation", "what heads are stored in: a random rotation, or balanced by statistics", choices=KINDS)


def centre_option(default: str = "auto") -> Any:
    """The field `centre`."""
    return option(
        default,
        "the vector that is subtracted from all keys: bias, the mean of their bias; mean, their mean over a text, and "
        "values less theirs; auto: mean if the basis is calibrated, else bias",
        choices=CENTRES,
    )


def calibration_option() -> Any:
    """The field `calibration`."""
    return option("", f"file of ovtq-calibrate; without: {moments.NAME} in the model's folder")


def _value(kind: type, text: Any) -> Any:
    if not isinstance(text, str):
        if kind is str and isinstance(text, int | Path) and not isinstance(text, bool):
            return str(text)  # bits, a layer's index, a file
        if isinstance(text, bool) != (kind is bool):
            raise TypeError(text)
        if kind is float:
            return float(text)
        return text if kind is bool else operator.index(text)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return kind(text)


def option(default: Any, meaning: str, choices: tuple[str, ...] = ()) -> Any:
    """A field with the meaning and the choices that the help text shows."""
    return field(default=default, metadata={"help": meaning, "choices": choices})
