"""Which basis a layer's keys and values are kept in: the one place that every pass takes it from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov

from ovtq import files
from ovtq.codec import moments
from ovtq.codec.basis import HeadBasis, balanced, gain, rotated
from ovtq.codec.moments import Calibration, Moments
from ovtq.codec.rotation import digest
from ovtq.errors import UnsupportedModel
from ovtq.models import projections
from ovtq.models.description import AttentionLayer
from ovtq.models.rope import key_centre, norms

KINDS = ("rotation", "weights", "calibrated")
# Of a Gram matrix: what the rounding of weights to 4 bits leaves of a layer is nearer, another layer is not
ALIKE = 0.25
CENTRES = ("auto", "bias", "mean", "none")
# How far weights alone are followed, by what they say a rotation loses in place of the balanced basis: halfway from the
# first, all the way from the second. They take the input for white, and are wrong where they promise little.
HALFWAY, WHOLE = 1.25, 8.0


class LayerBases(NamedTuple):
    """Of a layer's keys and of its values."""

    key: HeadBasis
    value: HeadBasis


@dataclass(frozen=True)
class Choice:
    """How bases are made: `kind` is one of KINDS, `centre` one of CENTRES.

    rotation: orthonormal rows, the same for all heads. weights: balanced by what the weights say of queries, keys and
    values, as far as they are to be trusted (`share`). calibrated: by what a text says, in `stats`, a file of
    ovtq-calibrate, but where held-out text says that the plain rotation loses less. Keys are centred by the mean of
    their bias as RoPE turns it (bias), or keys and values by their means over that text (mean); auto is mean if
    calibrated, else bias.
    """

    kind: str = "rotation"
    centre: str = "auto"
    stats: str = ""

    @property
    def centred_by(self) -> str:
        """bias, mean or none."""
        return self.centre if self.centre != "auto" else "mean" if self.kind == "calibrated" else "bias"

    @property
    def reads_text(self) -> bool:
        """Whether it needs a file of ovtq-calibrate."""
        return self.kind == "calibrated" or self.centred_by == "mean"

    def calibration(self) -> Calibration | None:
        """What that file has. Raises InputError if it is none."""
        return moments.load(Path(self.stats)) if self.reads_text and self.stats else None

    def unfit(self, layers: Sequence[AttentionLayer]) -> str:
        """Why no bases can be made for these layers; empty if they can."""
        if not self.reads_text:
            return ""
        found = self.calibration()
        if found is None:
            what = "basis calibrated" if self.kind == "calibrated" else "centre mean"
            return f"{what} needs {moments.NAME}, which ovtq-calibrate makes"
        for layer in layers:
            if reason := found.unfit(layer.index, layer.kv_heads, layer.head_dim):
                return f"{self.stats} {reason}; make one of this model"
        for layer in (layers[0], layers[-1]) if layers else ():  # the first and the last
            if _of_another(found.layers[layer.index], layer):
                return (
                    f"{self.stats} is of another model, whose layer {layer.index} projects otherwise; make one of this"
                )
        return ""

    def of(
        self,
        model: ov.Model,
        layers: Sequence[AttentionLayer],
        spreads: tuple[np.ndarray, np.ndarray],
        centred: bool = True,
        known: Calibration | None = None,
    ) -> dict[int, LayerBases]:
        """The bases of some layers; `spreads`, (d, width) orthonormal rows, are the rotations of keys and of values.

        Not `centred`, they are about zero, but for what was taken from the keys already. Raises UnsupportedModel where
        the weights say nothing. `known` are statistics in place of those of the file.
        """
        known = known or self.calibration()
        return {layer.index: self._of(model, layer, known, spreads, centred) for layer in layers}

    def centres(self, model: ov.Model, layer: AttentionLayer, known: Moments | None) -> tuple[np.ndarray, np.ndarray]:
        """What is still to be taken from a layer's keys and from its values, (kv_heads, head_dim) f32."""
        nothing = np.zeros((layer.kv_heads, layer.head_dim), np.float32)
        if self.centred_by == "mean" and known is not None:
            taken = nothing if layer.key_taken is None else layer.key_taken
            value = known.value_mean if known.best("value") else nothing
            if known.best("key"):
                return known.key_mean - taken, value
            return (key_centre(model, layer, "bias") if layer.key_taken is None else nothing), value
        return key_centre(model, layer, self.centred_by), nothing

    def _of(
        self,
        model: ov.Model,
        layer: AttentionLayer,
        known: Calibration | None,
        spreads: tuple[np.ndarray, np.ndarray],
        centred: bool,
    ) -> LayerBases:
        some = known.layers[layer.index] if known else None
        nothing = np.zeros((layer.kv_heads, layer.head_dim), np.float32)
        centres = self.centres(model, layer, some) if centred else (nothing, nothing)
        if self.kind == "weights":
            try:
                some = projections.moments(model, layer)
            except UnsupportedModel as error:
                raise UnsupportedModel(f"basis weights: {error}") from None
        taken = nothing if layer.key_taken is None else layer.key_taken
        made = []
        for which, centre, spread, before in zip(("key", "value"), centres, spreads, (taken, nothing), strict=True):
            if some is None or self.kind == "rotation" or not some.pays(which):
                made.append(rotated(spread, centre))
                continue
            sigma, gamma = some.about(which, centre + before), some.weight(which)
            part = share(gain(sigma, gamma)) if self.kind == "weights" else 1.0
            made.append(balanced(sigma, gamma, spread, centre, share=part) if part else rotated(spread, centre))
        return LayerBases(*made)


def share(predicted: float) -> float:
    """How much of the way from the rotation to the balanced basis to go, of what weights alone predict to gain.

    Of losses along the way the logarithm is convex, so halfway is no worse than the geometric mean of both ends.
    """
    return 1.0 if predicted >= WHOLE else 0.5 if predicted >= HALFWAY else 0.0


def _of_another(some: Moments, layer: AttentionLayer) -> bool:
    """Whether a layer's output projection is not that which its statistics are of; no if it is not found.

    Rounded to 4 bits it still is.
    """
    try:
        found = projections.gram(layer)
    except UnsupportedModel:
        return False
    return bool(np.linalg.norm(found - some.output) > ALIKE * np.linalg.norm(found))


def told(choice: Choice, bases: Mapping[int, LayerBases]) -> dict[str, Any]:
    """What tells these bases from all others, for the record of a conversion."""
    key, value = ({index: getattr(pair, what) for index, pair in bases.items()} for what in LayerBases._fields)
    facts: dict[str, Any] = {"centre_norms": norms({index: basis.centre for index, basis in key.items()})}
    if any(basis.centre.any() for basis in value.values()):
        facts["value_centre_norms"] = norms({index: basis.centre for index, basis in value.items()})
    every = [*key.values(), *value.values()]
    if shared := [digest(basis.matrix[0]) for basis in every if basis.shared]:
        facts["rotation_sha256"] = shared[0]
    if choice.kind != "rotation":
        facts["balanced"] = {
            what: {str(index): basis.digest for index, basis in some.items() if not basis.shared}
            for what, some in (("key", key), ("value", value))
        }
        facts["condition"] = round(float(max((basis.condition.max() for basis in every), default=1.0)), 2)
    return facts | statistics(choice)


def statistics(choice: Choice) -> dict[str, Any]:
    """What tells the statistics that a choice is made by from all others; nothing if it is made by none."""
    if not (found := choice.calibration()):
        return {}
    facts = {
        "sha256": files.sha256(Path(choice.stats)), "tokens": found.tokens,
        "text_sha256": found.text_sha256, "model_sha256": found.model_sha256,
    }  # fmt: skip
    return {"calibration": facts}
