"""TriAttention's score of a key in numpy: what a model's usual queries will make of it, averaged over distances.

Before RoPE, coordinates x_f and x_{f + d/2} are a complex number; RoPE turns it by ω_f from a token to the next. With
q_f of a query head, k_f of the key, both before RoPE,

    S(k) = mean over Δ of Σ_f |E q_f|·|k_f|·cos(ω_f·Δ + arg E q_f − arg k_f)  +  Σ_f (E|q_f| − |E q_f|)·|k_f|

Source: arXiv 2604.04921, which scores anew every 128 tokens, Δ being the distances from the key to 1, 2, 4, … 2¹⁶
tokens behind the last one. Here a score is written once, when the key arrives, and Δ are these numbers themselves. Then
the mean of cos is a constant of each f, and S a product of the key before RoPE with one vector and of its lengths |k_f|
with another. A factor that all f share, such as YaRN's, is left out: scores are standardised.

Query heads that share a KV head: each one's scores are made z-scores, the highest counts. So does the paper's code
where each KV head of each layer keeps tokens of its own, with means over the tokens in the cache; a score that never
changes takes those of the text the statistics were made from.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ovtq import archives
from ovtq.errors import InputError

NAME = "triattention.npz"  # in a model's folder
DISTANCES = 2 ** np.arange(17)  # tokens, Δ
FORM = 1  # of the file
KINDS = {"mean_query": "c", "text_sha256": "US", "model_sha256": "US"}  # of numpy's types; all others are real numbers


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is known of a model's queries, for some layers: of each query head, and what scores its keys then have."""

    layers: np.ndarray  # (layers,) indices
    mean_query: np.ndarray  # E q_f, (layers, query_heads, d/2) complex
    mean_length: np.ndarray  # E|q_f|, likewise
    frequencies: np.ndarray  # ω_f, (d/2,) radians a token
    distances: np.ndarray  # Δ, (distances,) tokens
    score_mean: np.ndarray  # of S over the text's keys, (layers, query_heads)
    score_deviation: np.ndarray  # likewise
    tokens: np.ndarray  # () how many tokens the text had
    text_sha256: np.ndarray  # () of their numbers, i64
    model_sha256: np.ndarray  # () of the model's XML

    @property
    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """What a key's pairs, and their lengths, are multiplied with to make S: (layers, query_heads, d/2) each.

        The first is complex: Re(conj(k_f)·vector_f) is summed.
        """
        turn = np.exp(1j * np.outer(self.distances, self.frequencies)).mean(0)
        return self.mean_query * turn, self.mean_length - np.abs(self.mean_query)

    def scores(self, layer: int, keys: np.ndarray) -> np.ndarray:
        """The highest z-score of a KV head's query heads, (batch, kv_heads, tokens), of keys before RoPE.

        keys (batch, kv_heads, tokens, d).
        """
        at, half = self._place(layer), keys.shape[-1] // 2
        pairs = keys[..., :half] + 1j * keys[..., half:]
        turned, rest = (vector[at].reshape(keys.shape[1], -1, half) for vector in self.vectors)
        found = np.einsum("bhtf,hgf->bhgt", pairs.conj(), turned).real
        found = found + np.einsum("bhtf,hgf->bhgt", np.abs(pairs), rest)
        mean, deviation = (x[at].reshape(1, keys.shape[1], -1, 1) for x in (self.score_mean, self.score_deviation))
        return ((found - mean) / deviation).max(2)

    def product(self, layer: int, kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
        """The same as a product: z = [k, |k_f|] · first + second; (kv_heads, 3·d/2, group) and (kv_heads, group)."""
        at = self._place(layer)
        turned, rest = (vector[at] for vector in self.vectors)  # (query_heads, d/2)
        rows = np.concatenate([turned.real, turned.imag, rest], -1) / self.score_deviation[at][:, None]
        offset = -self.score_mean[at] / self.score_deviation[at]
        group = len(rows) // kv_heads
        return rows.reshape(kv_heads, group, -1).swapaxes(1, 2), offset.reshape(kv_heads, group)

    def unfit(self, layer: int, query_heads: int, head_dim: int) -> str:
        """Why it does not serve such a layer; empty if it does."""
        if layer not in self.layers:
            return f"has nothing on layer {layer}, but on {', '.join(map(str, self.layers))}"
        if self.mean_query.shape[1:] != (query_heads, head_dim // 2):
            return (
                f"is of {self.mean_query.shape[1]} query heads of {2 * self.mean_query.shape[2]}, layer {layer} has "
                f"{query_heads} of {head_dim}"
            )
        return ""

    def _place(self, layer: int) -> int:
        return int(np.flatnonzero(self.layers == layer)[0])

    def save(self, path: Path) -> None:
        """Write it; equal statistics make equal files."""
        archives.write(path, {"form": FORM, **{item.name: getattr(self, item.name) for item in fields(self)}})


def load(path: Path) -> Statistics:
    """What `Statistics.save` wrote. Raises InputError if it is something else."""

    def made(file: archives.Arrays) -> Statistics:
        if int(file["form"]) != FORM:
            raise InputError(f"{path}: statistics in form {int(file['form'])}, this ovtq reads {FORM}; make them anew")
        return Statistics(**{item.name: file[item.name] for item in fields(Statistics)})

    tool = "tools/calibrate_triattention.py"
    found = archives.read(path, f"statistics of {tool}", f"{tool} makes it", made)
    if any(getattr(found, item.name).dtype.kind not in KINDS.get(item.name, "fiu") for item in fields(Statistics)):
        raise InputError(f"{path}: damaged statistics; make them anew with tools/calibrate_triattention.py")
    numbers = (found.mean_query, found.mean_length, found.frequencies, found.score_mean, found.score_deviation)
    shape = found.mean_query.shape
    alike = len(shape) == 3 and found.mean_length.shape == shape and found.frequencies.shape == shape[2:]
    alike &= found.score_mean.shape == found.score_deviation.shape == shape[:2] and found.layers.shape == shape[:1]
    if not alike or not all(np.isfinite(x).all() for x in numbers) or not (found.score_deviation > 0).all():
        raise InputError(f"{path}: damaged statistics; make them anew with tools/calibrate_triattention.py")
    return found
