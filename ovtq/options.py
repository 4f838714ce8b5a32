"""What a conversion is asked for: the options of ovtq-convert and of `ovtq.convert`, as values.

Their names, defaults and meanings stand here, or, of options of a pass, there: the command line is made of these
fields, and `tests/test_options.py` holds the keywords of `ovtq.api` to them.
"""

# ruff: noqa: RUF009  (defaults are fields, made by functions)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ovtq import pipeline
from ovtq.advice import BY_TEXT, BY_WEIGHTS, Advice, gains_by_text, gains_by_weights
from ovtq.automatic import AUTO, PACKED, choose
from ovtq.codec.allotment import AUTO as ALLOTTED
from ovtq.errors import InputError
from ovtq.forms.table import TARGETS
from ovtq.models import ModelDescription
from ovtq.passes import PASSES, OwnOperations, Pass, PruneKv, QuantizeKv, TruncateWindow
from ovtq.passes.base import BasisPass, option
from ovtq.verification.extent import BIG, BIG_LAYERS
from ovtq.wording import PROGRAM, Wording

PassList = str | Sequence[str | Pass]  # as on the command line, or each so or made
Settings = Mapping[str, Mapping[str, Any]]  # options by pass
BASIS = "basis"  # the group of the options that all passes have which store heads in a basis


def _of(kind: type[Pass], meaning: str = "", group: str = "") -> Any:
    """A field that stands for the option of that name of a pass, whose meaning it has if it has none of its own.

    Options of one `group` go to the same passes: to that pass, unless another group is named.
    """
    return field(default=None, metadata={"pass": kind, "help": meaning, "group": group or kind.name})


@dataclass(frozen=True)
class Options:
    """Which passes run, and with which options; None: as the preset has it.

    `k_bits` to `capacity` are options of quantize-kv, or, but for `bits`, of prune-kv in its place; `extension` puts
    own-operations behind the passes; `window_bits` are
    bits of keys and of values that sliding layers keep; `basis` and `calibration` are options of all passes that store
    heads in a basis; `budget` puts prune-kv among the passes, and `recent_window` to `heads` are its options.
    `settings` are any other options by pass, such as {"truncate-window": {"slack": 16}}.
    """

    preset: str | None = option(
        None,
        "auto (the default) takes what was measured to be best for target and model, and says why",
        (AUTO, *pipeline.PRESETS, *pipeline.ALIASES),
    )
    target: str = option(
        "gpu",
        "where the model will run: chooses the form of packed caches that is fast there, and counts bytes at f16 (gpu) "
        "or f32 (cpu); what is made for one is not for the other: packed layers made for a GPU can be wrong on a CPU, "
        "those made for a CPU do not run on a GPU (default: gpu)",
        TARGETS,
    )
    passes: PassList | None = option(None, "passes in order, NAME[:OPTION=VALUE]…,NAME…")
    k_bits: int | str | None = _of(QuantizeKv)
    v_bits: int | str | None = _of(QuantizeKv)
    bits: str | None = _of(QuantizeKv)
    budget_kld: float | None = _of(QuantizeKv)
    residual_window: int | None = _of(
        QuantizeKv, "recent tokens kept at full precision (default: 64 in a packed preset, none in u8 and u4, on a GPU)"
    )
    protect: str | None = _of(QuantizeKv)
    centre: str | None = _of(QuantizeKv)
    kernels: bool | None = _of(QuantizeKv)
    capacity: int | None = _of(QuantizeKv)
    extension: bool | None = option(None, "with kernels: call them by operations of ovtq's own")
    window_bits: Sequence[int | str] | None = option(
        None, "pack what sliding layers keep, too: bits of a key's and of a value's coordinate (default: none,none)"
    )
    basis: str | None = _of(QuantizeKv, group=BASIS)
    calibration: str | Path | None = _of(QuantizeKv, group=BASIS)
    budget: int | None = _of(PruneKv, "keep N tokens in each full layer (default: all)")
    recent_window: int | None = _of(PruneKv)
    prefix: int | None = _of(PruneKv)
    score: str | None = _of(PruneKv)
    stats: str | Path | None = _of(PruneKv)
    mode: str | None = _of(PruneKv)
    slack: int | None = _of(PruneKv)
    heads: str | None = _of(PruneKv)
    settings: Settings | None = option(None, "change an option of a pass; may be repeated")

    @property
    def named(self) -> str | None:
        """The preset by its own name; None of a list of passes."""
        if self.passes is not None:
            return None
        return pipeline.ALIASES.get(self.preset, self.preset) if self.preset else AUTO

    @property
    def packs(self) -> bool:
        """Whether options were given that a packed or pruned cache alone has."""
        settings = self.settings if isinstance(self.settings, Mapping) else {}
        return bool(self._given(QuantizeKv.name, PruneKv.name)) or bool({QuantizeKv.name, PruneKv.name} & {*settings})

    def settled(
        self, description: ModelDescription, calibrated: bool = False, tell: Callable[[], bool] = lambda: False
    ) -> tuple[Options, Advice | None]:
        """These options with a preset in the place of `auto`, and why that one; None if another was named.

        `calibrated`: statistics of a text lie beside the model, which are used if no other basis is asked for. `tell`
        says whether the model's weights say what its heads hold; it is called where that matters.
        """
        if self.named != AUTO:
            return self, None
        found, basis, why = choose(description, self.target, self.packs), self.basis, ""
        if basis is None and calibrated and gains_by_text(description, found):
            basis, why = "calibrated", BY_TEXT
        elif basis is None and gains_by_weights(description, found) and tell():
            basis, why = "weights", BY_WEIGHTS
        if why:
            found = replace(found, reason=f"{found.reason}; {why}")
        return replace(self, preset=found.preset, basis=basis), found

    def refuse_bad(self, wording: Wording = PROGRAM) -> None:
        """Raise InputError for what is wrong whatever the model is."""
        if self.target not in TARGETS:
            raise InputError(f"{wording.option('target')} is one of {', '.join(TARGETS)}, got {self.target!r}")
        if self.named != AUTO:
            self.chosen(wording)
        elif self.packs:
            replace(self, preset=PACKED.preset).chosen(wording)

    def chosen(self, wording: Wording = PROGRAM, description: ModelDescription | None = None) -> tuple[Pass, ...]:
        """The passes of settled options, of a preset those for such a model.

        Raises InputError for options that can't be used together.
        """
        passes = self._listed(wording, description)
        pruning = self._given(PruneKv.name)
        if pruning and self.budget is None and not any(isinstance(item, PruneKv) for item in passes):
            raise InputError(f"{wording.option(next(iter(pruning)))} has no effect without {wording.option('budget')}")
        if self.capacity is not None and not self.kernels:
            raise InputError(f"{wording.option('capacity')} has no effect without {wording.option('kernels')}")
        if self.extension and not any(getattr(item, "kernels", False) for item in passes) and not self.kernels:
            raise InputError(f"{wording.option('extension')} has no effect without {wording.option('kernels')}")
        packing = {QuantizeKv.name: self._given(QuantizeKv.name)}
        if self.target == "gpu" and self.named in pipeline.NATIVE and self.residual_window is not None:
            passes = pipeline.with_window(passes, packing[QuantizeKv.name].pop("residual_window"))
        basis = self._given(BASIS)
        if self.bits == ALLOTTED and self.basis is None:
            basis["basis"] = "calibrated"  # in which losses were measured
        if self.window_bits is not None:
            bits = self.window_bits
            if isinstance(bits, str) or not isinstance(bits, Sequence) or len(bits) != 2:
                raise InputError(f"{wording.option('window_bits')}: expected (K, V) such as (8, 4), got {bits!r}")
            packing[TruncateWindow.name] = dict(zip(("k_bits", "v_bits"), bits, strict=True)) | {"up_to": 0}
        elif self.kernels and any(isinstance(item, TruncateWindow) for item in passes):
            packing[TruncateWindow.name] = {"kernels": True}
        passes = pipeline.with_settings(passes, {name: some for name, some in packing.items() if some}, wording)
        if self.budget is not None:
            passes = pipeline.with_pruning(passes, self.target, wording)
        settings = {name: dict(some) for name, some in self._settings(wording).items()}
        passes = pipeline.with_basis(passes, basis, wording)
        if pruning:
            settings[PruneKv.name] = pruning | settings.get(PruneKv.name, {})
        passes = pipeline.with_settings(passes, settings, wording)
        if self.calibration is not None and not any(isinstance(x, BasisPass) and x.choice.reads_text for x in passes):
            raise InputError(
                f"{wording.option('calibration')} has no effect without {wording.option('basis')} calibrated"
            )
        return (*passes, OwnOperations()) if self.extension else passes

    def _listed(self, wording: Wording, description: ModelDescription | None) -> tuple[Pass, ...]:
        if self.target not in TARGETS:
            raise InputError(f"{wording.option('target')} is one of {', '.join(TARGETS)}, got {self.target!r}")
        if self.passes is None:
            if self.named not in pipeline.PRESETS:
                raise InputError(f"no preset is named {self.named!r}; there are {', '.join((AUTO, *pipeline.PRESETS))}")
            return pipeline.PRESETS[self.named].on(self.target, description, pruned=self.budget is not None)
        if self.preset is not None:
            raise InputError(f"give {wording.option('preset')} or {wording.option('passes')}, not both")
        items = [self.passes] if isinstance(self.passes, str) else self.passes
        found: list[Pass] = []
        for item in items:
            if not isinstance(item, str | Pass):
                raise InputError(f"{wording.option('passes')}: {item!r} is no pass; there are {', '.join(PASSES)}")
            found += [item] if isinstance(item, Pass) else pipeline.parse_passes(item)
        if not found:
            raise InputError(f"{wording.option('passes')} names no pass")
        return pipeline.for_target(found, self.target)

    def _given(self, *groups: str) -> dict[str, Any]:
        names = [name for group in groups for name in grouped(group)]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _settings(self, wording: Wording) -> Settings:
        settings = {} if self.settings is None else self.settings
        if isinstance(settings, Mapping) and all(isinstance(some, Mapping) for some in settings.values()):
            return settings
        name = wording.option("settings")
        raise InputError(f'{name}: expected options by pass, such as {{"truncate-window": {{"slack": 16}}}}')


@dataclass(frozen=True)
class Checks:
    """How the written model is verified: whether at all, where, with which random prompts, and how many layers of it.

    `verify_layers` None: all, or the first few of a big model.
    """

    verify: bool = option(
        True, "run original and converted side by side, and refuse to write if they differ (default: on)"
    )
    verify_device: str = option("CPU", "the device both are run on (default: CPU)")
    verify_seed: int = option(0, "seed of the random prompts they read (default: 0)")
    verify_layers: int | None = option(
        None, f"run the first N layers only (default: all, or {BIG_LAYERS} of a model over {BIG >> 30} GiB)"
    )

    def refuse_bad(self, wording: Wording = PROGRAM) -> None:
        """Raise InputError for a number out of range."""
        if not isinstance(self.verify_seed, int) or not 0 <= self.verify_seed < 2**32:
            raise InputError(f"{wording.option('verify_seed')} must be from 0 to {2**32 - 1}, got {self.verify_seed}")
        layers = self.verify_layers
        if layers is not None and (not isinstance(layers, int) or layers < 1):
            raise InputError(f"{wording.option('verify_layers')} must be at least 1, got {layers}")


Asked = TypeVar("Asked", Options, Checks)


def among(kind: type[Asked], given: Mapping[str, Any]) -> Asked:
    """The options of that kind among what is `given` by name: a function's arguments, or a parsed command line."""
    return kind(**{item.name: given[item.name] for item in fields(kind)})


def grouped(group: str) -> list[str]:
    """The names of the options of a group: BASIS, or the name of the pass that they are of."""
    return [item.name for item in fields(Options) if item.metadata.get("group") == group]


def meaning(kind: type[Asked], name: str) -> str:
    """What an option means, with its choices and default if it is one of a pass, for the help text."""
    facts = kind.__dataclass_fields__[name].metadata
    return str(facts["help"] or facts["pass"].option_help()[name])
