"""What a conversion is asked for: the options of ovtq-convert and of `ovtq.convert`, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ovtq import pipeline
from ovtq.advice import BY_TEXT, Advice, gains_by_text
from ovtq.automatic import AUTO, PACKED, choose
from ovtq.errors import InputError
from ovtq.forms.table import TARGETS
from ovtq.models import ModelDescription
from ovtq.passes import PASSES, Pass, PruneKv, QuantizeKv, TruncateWindow
from ovtq.passes.base import BasisPass
from ovtq.wording import PROGRAM, Wording

PACKING = ("k_bits", "v_bits", "residual_window", "protect", "centre", "kernels", "capacity")
PRUNING = ("budget", "recent_window", "prefix", "score", "stats", "mode", "slack", "heads")  # of prune-kv

PassList = str | Sequence[str | Pass]  # as on the command line, or each so or made
Settings = Mapping[str, Mapping[str, Any]]  # options by pass


@dataclass(frozen=True)
class Options:
    """Which passes run, and with which options; None: as the preset has it.

    `k_bits` to `capacity` are options of quantize-kv, or of prune-kv in its place; `window_bits` are bits of keys and
    of values that sliding layers keep; `basis` and `calibration` are options of all passes that store heads in a basis;
    `budget` puts prune-kv among the passes, and `recent_window` to `heads` are its options. `settings` are any other
    options by pass, such as {"truncate-window": {"slack": 16}}.
    """

    preset: str | None = None
    target: str = "gpu"
    passes: PassList | None = None
    k_bits: int | str | None = None
    v_bits: int | str | None = None
    residual_window: int | None = None
    protect: str | None = None
    centre: str | None = None
    kernels: bool | None = None
    capacity: int | None = None
    window_bits: Sequence[int | str] | None = None
    basis: str | None = None
    calibration: str | Path | None = None
    budget: int | None = None
    recent_window: int | None = None
    prefix: int | None = None
    score: str | None = None
    stats: str | Path | None = None
    mode: str | None = None
    slack: int | None = None
    heads: str | None = None
    settings: Settings | None = None

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
        return bool(self._given((*PACKING, *PRUNING))) or bool({QuantizeKv.name, PruneKv.name} & {*settings})

    def settled(self, description: ModelDescription, calibrated: bool = False) -> tuple[Options, Advice | None]:
        """These options with a preset in the place of `auto`, and why that one; None if another was named.

        `calibrated`: statistics of a text lie beside the model, which are used if no other basis is asked for.
        """
        if self.named != AUTO:
            return self, None
        found = choose(description, self.target, self.packs)
        if calibrated and self.basis is None and gains_by_text(description, found):
            found = replace(found, reason=f"{found.reason}; {BY_TEXT}")
            return replace(self, preset=found.preset, basis="calibrated"), found
        return replace(self, preset=found.preset), found

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
        pruning = self._given(PRUNING)
        if pruning and self.budget is None and not any(isinstance(item, PruneKv) for item in passes):
            raise InputError(f"{wording.option(next(iter(pruning)))} has no effect without {wording.option('budget')}")
        if self.capacity is not None and not self.kernels:
            raise InputError(f"{wording.option('capacity')} has no effect without {wording.option('kernels')}")
        packing = {QuantizeKv.name: self._given(PACKING)}
        if self.window_bits is not None:
            bits = self.window_bits
            if isinstance(bits, str) or not isinstance(bits, Sequence) or len(bits) != 2:
                raise InputError(f"{wording.option('window_bits')}: expected (K, V) such as (8, 4), got {bits!r}")
            packing[TruncateWindow.name] = dict(zip(("k_bits", "v_bits"), bits, strict=True)) | {"up_to": 0}
        passes = pipeline.with_settings(passes, {name: some for name, some in packing.items() if some}, wording)
        if self.budget is not None:
            passes = pipeline.with_pruning(passes, self.target, wording)
        settings = {name: dict(some) for name, some in self._settings(wording).items()}
        passes = pipeline.with_basis(passes, self._given(("basis", "calibration")), wording)
        if pruning:
            settings[PruneKv.name] = pruning | settings.get(PruneKv.name, {})
        passes = pipeline.with_settings(passes, settings, wording)
        if self.calibration is not None and not any(isinstance(x, BasisPass) and x.choice.reads_text for x in passes):
            raise InputError(
                f"{wording.option('calibration')} has no effect without {wording.option('basis')} calibrated"
            )
        return passes

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

    def _given(self, names: Sequence[str]) -> dict[str, Any]:
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

    verify: bool = True
    verify_device: str = "CPU"
    verify_seed: int = 0
    verify_layers: int | None = None

    def refuse_bad(self, wording: Wording = PROGRAM) -> None:
        """Raise InputError for a number out of range."""
        if not isinstance(self.verify_seed, int) or not 0 <= self.verify_seed < 2**32:
            raise InputError(f"{wording.option('verify_seed')} must be from 0 to {2**32 - 1}, got {self.verify_seed}")
        layers = self.verify_layers
        if layers is not None and (not isinstance(layers, int) or layers < 1):
            raise InputError(f"{wording.option('verify_layers')} must be at least 1, got {layers}")
