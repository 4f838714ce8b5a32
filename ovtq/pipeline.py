"""The pipeline on one page: which passes a preset runs, in which order, and how a pass list is written.

IR dir ─ io.load ─► ov.Model ─ models.describe ─► description
                        └─► [pass: requires → run → validate → ensures]* ─► io.save ─► OUT_DIR + ovtq.json
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import openvino as ov

from ovtq.errors import InputError, PreconditionFailed
from ovtq.forms.window import LONG_WINDOW, SHORT_WINDOW
from ovtq.ir.graph import id_of
from ovtq.models import ModelDescription
from ovtq.passes import (
    PASSES,
    CachePrecision,
    CentreKeys,
    CheckCall,
    DecoupleLength,
    Pass,
    PruneKv,
    QuantizeKv,
    RotateHeads,
    SimplifyMask,
    SinkRow,
    TruncateWindow,
)
from ovtq.wording import COMMAND_LINE, Wording

SERVES_NONE = "no layer is given another cache, for which they are"


@dataclass(frozen=True)
class Preset:
    """A named list of passes and what it is for; `cpu` are the passes for a CPU, where they are others.

    `plain` are those for models whose attention has no sinks, by target, where they are others again; `pruned` those
    that prune-kv goes with.
    """

    passes: tuple[Pass, ...]
    purpose: str
    cpu: tuple[Pass, ...] | None = None
    plain: Mapping[str, tuple[Pass, ...]] | None = None
    pruned: tuple[Pass, ...] | None = None

    def on(self, target: str, description: ModelDescription | None = None, pruned: bool = False) -> tuple[Pass, ...]:
        """The passes for a target, gpu or cpu, in a model (None: one whose attention has sinks).

        `pruned`: prune-kv will be among them.
        """
        if pruned and self.pruned:
            return for_target(self.pruned, target)
        if self.plain and target in self.plain and description and not description.sinks:
            return for_target(self.plain[target], target)
        return for_target(self.cpu if target == "cpu" and self.cpu else self.passes, target)


def _packed(bits: str, purpose: str) -> Preset:
    """Exact passes, then packed full layers; keys need more bits than values."""
    passes: tuple[Pass, ...] = (
        DecoupleLength(),
        TruncateWindow(),
        SimplifyMask(),
        # rotates what it packs itself: one product takes the rotation, the decoding and the packing's order
        QuantizeKv(k_bits=bits, v_bits="4"),
        # a full layer that is protected is left as by `exact`
        RotateHeads(layers="left", tensors="v"),
        CheckCall(),
    )
    return Preset(passes, purpose, plain={"cpu": _cut(passes, LONG_WINDOW)})


def _cut(passes: Sequence[Pass], up_to: int) -> tuple[Pass, ...]:
    """`passes`, windows of more than `up_to` tokens left as exported."""
    return tuple(replace(item, up_to=up_to) if isinstance(item, TruncateWindow) else item for item in passes)


# Full layers are left to the runtime's own cache and attention.
PLAIN: tuple[Pass, ...] = (
    # lengths first: layer 0, whose state every length is read from, is one that truncate-window cuts
    DecoupleLength(),
    TruncateWindow(),
    # what is left of the exported masks serves the full layers alone
    SimplifyMask(),
    # Values alone, of the layers whose cache the runtime may quantise: with the CPU's default u8 cache that loses a
    # third less than the exported model does, and rotated keys would lose more again.
    RotateHeads(layers="full", tensors="v"),
    # last: what tells the past length is what the other passes made of the caches
    CheckCall(),
)


# For a CPU and attention without sinks: there the runtime's cache is faster than a large window that is copied.
UNCUT: tuple[Pass, ...] = tuple(
    RotateHeads(layers="left", tensors="v") if isinstance(item, RotateHeads) else item
    for item in _cut(PLAIN, SHORT_WINDOW)
)


def _native(precision: str, purpose: str) -> Preset:
    """The plugin's own compressed cache; on a GPU without sinks in the attention, and no floats in other states.

    Without sinks both plugins read their own cache in place as it is: then it is made more faithful, and nothing else,
    but that a GPU's sliding layers keep their window alone. A CPU would copy the window in every step.
    """
    faithful = (CentreKeys(), RotateHeads(), CachePrecision(precision))
    return Preset(
        passes=(
            DecoupleLength(),
            TruncateWindow(k_bits="8", v_bits="8"),
            SimplifyMask(),
            SinkRow(),
            CachePrecision(precision),
            CheckCall(),
        ),
        purpose=purpose,
        cpu=(*PLAIN, CachePrecision(precision)),
        plain={
            "gpu": (
                CentreKeys(),
                DecoupleLength(),
                TruncateWindow(k_bits="8", v_bits="8"),
                SimplifyMask(),
                RotateHeads(layers="full"),
                CachePrecision(precision),
                CheckCall(),
            ),
            "cpu": faithful,
        },
    )


PRESETS: dict[str, Preset] = {
    "exact": Preset(
        passes=(DecoupleLength(), TruncateWindow(), SimplifyMask(), SinkRow(), CheckCall()),
        purpose="lossless: sliding-window layers keep their window only; on a GPU full layers are read in place by the "
        "plugin's fused attention, 30,720 bytes per token of GPT-OSS-20B",
        cpu=PLAIN,
        plain={"gpu": PLAIN, "cpu": UNCUT},
        pruned=PLAIN,
    ),
    "rotate": Preset(
        passes=(RotateHeads(),),
        purpose="lossless, and the one for paged attention (continuous batching, draft models, prompt lookup): heads "
        "are rotated and nothing else, so that a cache which the runtime itself keeps in 4 bits loses less",
    ),
    "k8v4": _packed(
        "8",
        "safe: keys in 8 bits, values in 4; 9,600 bytes per token of GPT-OSS-20B, mean KLD 1.5e-4 on the bundled model",
    ),
    "k6v4": _packed(
        "6", "keys in 6 bits, values in 4; 8,064 bytes per token of GPT-OSS-20B, mean KLD 2.1e-4 on the bundled model"
    ),
    "k4v4": _packed(
        "4",
        "small: keys and values in 4 bits; 6,528 bytes per token of GPT-OSS-20B, mean KLD 8.2e-4 on the bundled model",
    ),
    "u8": _native(
        "u8",
        "fast: the plugin's own 8-bit cache and kernels; 15,936 bytes per token of GPT-OSS-20B on a GPU, mean KLD 9e-5 "
        "on the bundled model",
    ),
    "u4": _native("u4", "fast: the same in 4 bits; 8,448 bytes per token of GPT-OSS-20B on a GPU, mean KLD 6.8e-3"),
}
NATIVE = ("u8", "u4")  # those whose full layers the plugin compresses itself
LEAD = "beam_idx/converted_by_ovtq/pass_ATTENTION_BACKEND=SDPA"  # what beam_idx is called in an error
ALIASES = {"f16": "exact"}  # other names that are taken


def for_target(passes: Sequence[Pass], target: str) -> tuple[Pass, ...]:
    """`passes`, those that make another graph for each plugin set to `target`."""
    return tuple(item.changed({"target": target}) if hasattr(item, "target") else item for item in passes)


def with_pruning(passes: Sequence[Pass], target: str, wording: Wording = COMMAND_LINE) -> tuple[Pass, ...]:
    """`passes` with prune-kv in place of quantize-kv, whose options it takes over, or else before any rotation.

    Full layers that it prunes are no longer cached by the runtime: what rotates them is left to the others. Raises
    InputError for a list in which it has no place.
    """
    budget = wording.option("budget")
    if any(isinstance(item, SinkRow | CachePrecision | PruneKv) for item in passes):
        raise InputError(
            f"{budget} goes with the presets exact, k8v4, k6v4 and k4v4; others keep their caches otherwise"
        )
    if any(isinstance(item, QuantizeKv) and item.kernels for item in passes):
        raise InputError(f"{budget} and {wording.option('kernels')} don't go together: no kernel prunes; leave one out")
    if any(isinstance(item, QuantizeKv) and item.bits for item in passes):
        raise InputError(f"{budget} and {wording.option('bits')} don't go together; give {wording.option('k_bits')}")
    if not any(isinstance(item, DecoupleLength) for item in passes):
        raise InputError(f"{budget} needs the pass decouple-length; take the preset exact, k8v4, k6v4 or k4v4")
    done: list[Pass] = []
    for item in passes:
        if isinstance(item, QuantizeKv):
            done.append(PruneKv.packing(item))
        elif isinstance(item, RotateHeads) and item.layers != "left":
            done.append(dataclasses.replace(item, layers="left"))
        else:
            done.append(item)
    if not any(isinstance(item, PruneKv) for item in done):
        place = next((i for i, item in enumerate(done) if isinstance(item, RotateHeads)), len(done))
        done.insert(place, PruneKv(target=target))
    return tuple(done)


def with_window(passes: Sequence[Pass], window: int) -> tuple[Pass, ...]:
    """`passes` that keep the GPU plugin's cache, with so many recent tokens as they are beside it.

    What sink-row spreads by is a rotation of its own: without sinks it takes the place of rotate-heads. Raises
    InputError for a number out of range.
    """
    spread = SinkRow().changed({"window": window})
    there = SinkRow if not window or any(isinstance(item, SinkRow) for item in passes) else RotateHeads
    return tuple(spread if isinstance(item, there) else item for item in passes)


def with_basis(passes: Sequence[Pass], options: Mapping[str, Any], wording: Wording = COMMAND_LINE) -> tuple[Pass, ...]:
    """`passes` with `options`, basis and calibration, of all that have them.

    Raises InputError for a list of which none does.
    """
    own = [{name: value for name, value in options.items() if hasattr(item, name)} for item in passes]
    for name in options:
        if not any(name in some for some in own):
            raise InputError(f"{wording.option(name)} has no effect: none of the passes stores heads in a basis")
    return tuple(item.changed(some) if some else item for item, some in zip(passes, own, strict=True))


@dataclass(frozen=True)
class Step:
    """What one pass did, or, if it was left out, why."""

    name: str
    options: Mapping[str, Any]
    exact: bool
    sites: int
    facts: Mapping[str, Any]
    skipped: str = ""


def run(
    model: ov.Model,
    description: ModelDescription,
    passes: Sequence[Pass],
    after: Callable[[Pass, ov.Model], None] = lambda item, model: None,
) -> tuple[ov.Model, ModelDescription, list[Step]]:
    """Apply `passes` in order, calling `after` behind each. Raises the errors of `Pass.apply`.

    A pass for which there is nothing to do in this model is left out, and so are, if that leaves none that gives layers
    another cache, those that serve such passes. Raises PreconditionFailed if none is left.
    """
    steps = []
    idle = [item.needless(description) for item in passes if item.recaches]
    alone = all(idle) and bool(idle)
    for item in passes:
        reason = item.needless(description) or (SERVES_NONE if alone and item.serves else "")
        if reason:
            steps.append(Step(item.name, item.options, item.exact, 0, {}, reason))
            after(item, model)
            continue
        known = {id_of(node) for node in model.get_ops()}
        rewrite = item.apply(model, description)
        model, description = rewrite.model, rewrite.description
        _name_new_nodes(model, known, item.name)
        steps.append(Step(item.name, item.options, item.exact, rewrite.sites, dict(rewrite.facts)))
        after(item, model)
    if all(step.skipped for step in steps) and steps:
        raise PreconditionFailed(f"nothing to do in this model: {told(steps)}; use it as it is, or another preset")
    if not all(item.paged_attention for item in passes):
        _lead(model)
    return model, description, steps


def _lead(model: ov.Model) -> None:
    """Let the error of GenAI's paged path, which names the inputs that it has no use for, say what to do instead."""
    for parameter in model.get_parameters():
        if "beam_idx" in parameter.output(0).get_names():
            parameter.set_friendly_name(LEAD)


def told(steps: Sequence[Step]) -> str:
    """The passes that were left out and why, those of one reason together; empty if none was."""
    names: dict[str, list[str]] = {}
    for step in steps:
        if step.skipped:
            names.setdefault(step.skipped, []).append(step.name)
    return "; ".join(f"{', '.join(some)}: {reason}" for reason, some in names.items())


def _name_new_nodes(model: ov.Model, known: set[str], prefix: str) -> None:
    """Name nodes by the pass that made them: to be found in a profile, and so that equal runs write equal files."""
    new = [node for node in model.get_ordered_ops() if id_of(node) not in known]
    for number, node in enumerate(new):
        if node.get_friendly_name() == node.get_name():  # a pass may have named one itself
            node.set_friendly_name(f"ovtq/{prefix}/{node.get_type_name()}_{number}")


def parse_passes(text: str) -> tuple[Pass, ...]:
    """Passes from `name[:option=value]*[,name…]`, such as `decouple-length,truncate-window:slack=16`."""
    passes = []
    for part in filter(None, text.split(",")):
        # a later colon parts only before NAME=: values such as C:\… and first:1 have their own
        name, colon, rest = part.strip().partition(":")
        settings = re.split(r":(?=[\w-]+=)", rest) if colon else []
        if name not in PASSES:
            raise InputError(f"no pass is named {name!r}; there are {', '.join(PASSES)}")
        passes.append(PASSES[name].parse(dict(_setting(setting) for setting in settings)))
    if not passes:
        raise InputError("--passes names no pass")
    return tuple(passes)


def parse_settings(texts: Sequence[str]) -> dict[str, dict[str, str]]:
    """Options by pass, from `PASS.OPTION=VALUE` texts; a later one replaces an earlier."""
    settings: dict[str, dict[str, str]] = {}
    for text in texts:
        target, value = _setting(text)
        name, dot, field = target.partition(".")
        settings.setdefault(name if dot else "", {})[field if dot else name] = value
    return settings


def with_settings(
    passes: Sequence[Pass], settings: Mapping[str, Mapping[str, Any]] | Sequence[str], wording: Wording = COMMAND_LINE
) -> tuple[Pass, ...]:
    """`passes` with options changed: by pass, or as `PASS.OPTION=VALUE` texts.

    Raises InputError for a pass that is not among them, and as `Pass.changed` does.
    """
    changes = settings if isinstance(settings, Mapping) else parse_settings(settings)
    names = [item.name for item in passes]
    for name, options in changes.items():
        if name not in names:
            option, value = next(iter(options.items()), ("", ""))
            raise InputError(wording.setting(name, option, value, names))
    return tuple(item.changed(changes[item.name]) if item.name in changes else item for item in passes)


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise InputError(f"expected OPTION=VALUE, got {text!r}")
    return name, value
