"""What is known of a model's queries, keys and values, by layer and KV head, and the file beside a model that has it.

Moments come from a text that the model has read (`ovtq.evidence.calibration`), or from its weights
(`ovtq.models.projections`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from ovtq import archives
from ovtq.codec.turboquant import distortion
from ovtq.errors import InputError

NAME = "calibration.npz"  # in a model's folder
PART = ".part"  # behind the name of a file that an interrupted run left beside
FORM = 2  # of the file: 1 had all tokens weigh the same
PROBED = (3, 4)  # bits in which the KLD of each layer is measured
MEASURED = ("key_kld", "value_kld")  # of Moments, if it was asked for


@dataclass(frozen=True, eq=False)
class Moments:
    """Of one layer, where its tensors enter the attention (after RoPE); H = kv_heads, d = head_dim.

    Means and covariances of keys and values are weighted by how much of an error there reaches the result (see
    `ovtq.evidence.calibration.attended`). `query` is E[qᵀq] over the query heads that share a KV head, `output` the
    Gram matrix W·Wᵀ of the output projection's rows that their results meet. Errors are of 4-bit codes of text that the
    moments do not know: mean squares of a score in nats², about the mean over the keys, and of what a value adds to the
    residual stream, weighted likewise. They are of the plain rotation about zero, of the same about the mean, and of
    the balanced basis about the mean; or empty. `key_kld` and `value_kld` are what codes of PROBED bits of this layer's
    alone cost of the whole model's logits, as their mean KLD in nats, where that was measured (`ovtq.evidence.probe`).
    """

    key_mean: np.ndarray  # (H, d)
    key_covariance: np.ndarray  # (H, d, d)
    value_mean: np.ndarray
    value_covariance: np.ndarray
    query: np.ndarray  # (H, d, d)
    output: np.ndarray  # (H, d, d)
    key_errors: np.ndarray  # (3,) or (0,)
    value_errors: np.ndarray
    key_kld: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (len(PROBED),) or (0,)
    value_kld: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def about(self, which: str, centre: np.ndarray) -> np.ndarray:
        """E[(x − centre)ᵀ(x − centre)] of keys or values, (H, d, d) f64."""
        mean, covariance = (getattr(self, f"{which}_{what}").astype(np.float64) for what in ("mean", "covariance"))
        away = mean - centre
        return covariance + away[:, :, None] * away[:, None, :]

    def weight(self, which: str) -> np.ndarray:
        """What keys, or values, are multiplied with: E[qᵀq], or the output's Gram matrix, (H, d, d) f64."""
        return (self.query if which == "key" else self.output).astype(np.float64)

    def best(self, which: str) -> int:
        """What is known to lose least: the plain rotation (0), that about the mean (1), or the balanced basis (2)."""
        errors = getattr(self, f"{which}_errors")
        return int(np.argmin(errors)) if errors.size else 2

    def pays(self, which: str) -> bool:
        """Whether, as far as is known, the balanced basis loses less than the plain rotation."""
        return self.best(which) == 2

    def sensitivity(self, which: str) -> float | None:
        """What a unit of distortion of keys, or of values, costs: KLD in nats; None if it was not measured."""
        found = getattr(self, f"{which}_kld")
        if not found.size:
            return None
        head_dim = self.key_mean.shape[1]
        return float(np.mean([kld / distortion(bits, head_dim) for bits, kld in zip(PROBED, found, strict=True)]))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Moments by layer, of which text and model."""

    layers: Mapping[int, Moments]
    tokens: int  # that the moments are of
    held: int  # that the errors are of
    text_sha256: str  # of the numbers of both, i64
    model_sha256: str  # of the model's XML

    def unfit(self, layer: int, kv_heads: int, head_dim: int) -> str:
        """Why it does not serve such a layer; empty if it does."""
        if layer not in self.layers:
            return f"has nothing on layer {layer}, but on {', '.join(map(str, self.layers))}"
        found = self.layers[layer].key_mean.shape
        return f"is of {found[0]} KV heads of {found[1]}" if found != (kv_heads, head_dim) else ""

    def save(self, path: Path) -> None:
        """Write it; equal statistics make equal files."""
        arrays = {
            f"{index}.{item.name}": np.asarray(getattr(some, item.name), np.float32)
            for index, some in self.layers.items()
            for item in fields(Moments)
            if item.name not in MEASURED or getattr(some, item.name).size
        }
        facts = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "layers"}
        archives.write(path, {"form": FORM, "indices": np.array([*self.layers]), **facts, **arrays})


def load(path: Path) -> Calibration:
    """What `Calibration.save` wrote. Raises InputError if it is something else."""

    def made(file: archives.Arrays) -> Calibration:
        if int(file["form"]) != FORM:
            raise InputError(f"{path}: statistics in form {int(file['form'])}, this ovtq reads {FORM}; make them anew")
        layers = {
            int(index): Moments(
                **{
                    item.name: file[f"{index}.{item.name}"]
                    for item in fields(Moments)
                    if item.name not in MEASURED or f"{index}.{item.name}" in file
                }
            )
            for index in file["indices"]
        }
        return Calibration(
            layers, int(file["tokens"]), int(file["held"]), str(file["text_sha256"]), str(file["model_sha256"])
        )

    found = archives.read(path, "statistics of ovtq-calibrate", "ovtq-calibrate makes it", made)
    if not all(map(_sound, found.layers.values())):
        raise InputError(f"{path}: damaged statistics; make them anew with ovtq-calibrate")
    return found


def _sound(some: Moments) -> bool:
    heads, d = some.key_mean.shape if some.key_mean.ndim == 2 else (0, 0)
    shapes = {"mean": (heads, d), "errors": some.key_errors.shape, "kld": some.key_kld.shape}
    alike = all(
        getattr(some, item.name).shape == shapes.get(item.name.rpartition("_")[2], (heads, d, d))
        and np.isfinite(getattr(some, item.name)).all()
        for item in fields(Moments)
    )
    probed = (
        some.key_kld.shape in ((0,), (len(PROBED),)) and (np.concatenate([some.key_kld, some.value_kld]) >= 0).all()
    )
    return bool(heads) and alike and bool(probed) and some.key_errors.shape in ((0,), (3,))
