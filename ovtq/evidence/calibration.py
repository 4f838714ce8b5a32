"""Moments of a model's queries, keys and values over a text, gathered while it reads: nothing of the text is kept."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import openvino as ov
from openvino import opset15 as op

from ovtq.codec import AdaptiveUniform
from ovtq.codec.basis import HeadBasis, balanced, rotated
from ovtq.codec.moments import Calibration, Moments
from ovtq.codec.rotation import orthogonal
from ovtq.errors import InputError
from ovtq.evidence.unfinished import Unfinished
from ovtq.ir import io
from ovtq.models import AttentionLayer, describe, projections
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

CALL = 256  # tokens
PROBED = 4  # bits in which bases are compared
EVERY = 8  # of these queries one is scored against the keys of its call


def calibrate(
    model_dir: Path,
    ids: np.ndarray,
    held: np.ndarray,
    device: str = "CPU",
    tick: Callable[[], None] = lambda: None,
    begin: int | None = None,
    unfinished: Unfinished | None = None,
) -> Calibration:
    """Run a model as exported over a text, ids (tokens,), then over `held` (tokens,), to see which basis loses less.

    In texts of CALL tokens, each from an empty cache and behind the token `begin`, if there is one, at f32 on a CPU;
    `tick` is called behind each, those that an interrupted run has read included, which are not read again. In memory
    are the sums alone: of each KV head four matrices of head_dim². Raises InputError for a converted model,
    UnsupportedModel for one not understood.
    """
    unfinished = unfinished or Unfinished()
    model = io.load(model_dir)
    if io.stamp_of(model):
        raise InputError(f"{model_dir}: already converted; calibrate with the original model instead")
    layers = describe(model, io.load_config(model_dir)).layers
    taps = [op.result(port.source) for layer in layers for port in (layer.query, layer.key, layer.value)]
    outputs = [projections.gram(layer) for layer in layers]
    read = ov.Model(taps, model.get_sinks(), model.get_parameters())
    runner = Runner(read, device, EXACT_PROPERTIES if device == "CPU" else {})
    sums = [_Sums(layer) for layer in layers]
    _read(runner, _texts(ids, begin), sums, unfinished, "sums", tick)
    found = [some.moments(output) for some, output in zip(sums, outputs, strict=True)]
    probes = [_Probe(layer, some) for layer, some in zip(layers, found, strict=True)]
    _read(runner, _texts(held, begin), probes, unfinished, "errors", tick)
    runner.close()
    made = {layer.index: probe.judged() for layer, probe in zip(layers, probes, strict=True)}
    numbers = np.ascontiguousarray(np.concatenate([ids, held]), np.int64)
    read_as = hashlib.sha256(numbers.tobytes()).hexdigest()
    return Calibration(made, len(ids), len(held), read_as, io.text_sha256(io.model_xml(model_dir)))


def _read(
    runner: Runner,
    texts: Iterator[np.ndarray],
    layers: Sequence[_Summed],
    unfinished: Unfinished,
    stage: str,
    tick: Callable[[], None],
) -> None:
    """Let each layer add what it has of each text, but for texts that an interrupted run has read."""
    done = 0
    if kept := unfinished.taken(stage):
        done = int(kept["done"])
        for at, layer in enumerate(layers):
            layer.restore({name: kept[f"{at}/{name}"] for name in layer.SUMS})
    for number, text in enumerate(texts):
        if number >= done:
            runner.reset()
            runner.step(text)
            for at, layer in enumerate(layers):
                layer.add(*_tensors(runner, at))
            sums = {f"{at}/{name}": getattr(layer, name) for at, layer in enumerate(layers) for name in layer.SUMS}
            unfinished.keep(stage, {"done": number + 1, **sums})
        tick()


def calls(tokens: int, held: int) -> int:
    """How many calls that is."""
    return -(-tokens // CALL) + -(-held // CALL)


def _texts(ids: np.ndarray, begin: int | None) -> Iterator[np.ndarray]:
    """Pieces of a text, (1, tokens), each behind the token that begins one."""
    for start in range(0, len(ids), CALL):
        piece = ids[None, start : start + CALL]
        yield piece if begin is None else np.insert(piece, 0, begin, axis=1)


def attended(layer: AttentionLayer, query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Σ p² over the queries of a text that share a KV head, of each of its keys, (kv_heads, tokens).

    So much of a squared error of a score, or of a value, reaches the result of the attention. Most of it is the first
    token's, where heads that have nothing to say look (attention sinks): what is lost of that is the same at every
    position, and nothing averages it out. With a sink of its own a layer needs no token for that, and all weigh the
    same: on the bundled model that loses less.
    """
    H, T = key.shape[:2]
    if layer.sinks is not None:
        return np.ones((H, T))
    scores = layer.scale * query.reshape(H, -1, T, query.shape[-1]) @ key[:, None].swapaxes(2, 3)
    seen = np.tril(np.ones((T, T), bool))
    if layer.window is not None:
        seen &= ~np.tril(seen, -layer.window)
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    total = np.exp(scores - top).sum(-1, keepdims=True)
    return ((np.exp(scores - top) / total) ** 2).sum((1, 2))


def _tensors(runner: Runner, layer: int) -> tuple[np.ndarray, ...]:
    """Queries, keys and values of a call, (heads, tokens, d) f64."""
    outputs = (runner.request.get_output_tensor(3 * layer + which) for which in range(3))
    query, key, value = (np.array(tensor.data[0], np.float64) for tensor in outputs)
    return query, key, value


class _Summed(ABC):
    """Something with numbers and arrays, SUMS, that an interrupted run is to go on from."""

    SUMS: ClassVar[tuple[str, ...]]

    @abstractmethod
    def add(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
        """A text's, (heads, tokens, d) each."""

    def restore(self, kept: Mapping[str, np.ndarray]) -> None:
        """Have what was kept of them."""
        for name in self.SUMS:
            setattr(self, name, np.array(kept[name]))


class _Sums(_Summed):
    """Sums of one layer; products are of vectors less the first call's mean, lest digits be lost."""

    SUMS = ("count", "query", "origins", "weight", "firsts", "seconds")

    def __init__(self, layer: AttentionLayer) -> None:
        H, d = layer.kv_heads, layer.head_dim
        self.layer, self.count = layer, np.zeros((), np.int64)
        self.query = np.zeros((H, d, d))
        self.origins = np.zeros((2, H, 1, d))  # of keys and of values
        self.weight, self.firsts, self.seconds = np.zeros(H), np.zeros((2, H, 1, d)), np.zeros((2, H, d, d))

    def add(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
        """A text's."""
        if not self.count:
            self.origins = np.stack([x.mean(1, keepdims=True) for x in (key, value)])
        rows = query.reshape(len(key), -1, query.shape[-1])
        self.query += rows.swapaxes(1, 2) @ rows / self.layer.group
        weight = attended(self.layer, query, key)
        for which, x in enumerate((key, value)):
            away = x - self.origins[which]
            of_weight = away * weight[..., None]
            self.firsts[which] += of_weight.sum(1, keepdims=True)
            self.seconds[which] += of_weight.swapaxes(1, 2) @ away
        self.weight += weight.sum(1)
        self.count = self.count + key.shape[1]

    def moments(self, output: np.ndarray) -> Moments:
        """What they come to."""
        total = self.weight[:, None, None]
        away = self.firsts / total
        covariances = self.seconds / total - away.swapaxes(2, 3) @ away
        key, value = ((origin + mean)[:, 0] for origin, mean in zip(self.origins, away, strict=True))
        nothing = np.zeros(0)
        return Moments(key, covariances[0], value, covariances[1], self.query / self.count, output, nothing, nothing)


class _Probe(_Summed):
    """What 4-bit codes of one layer's keys and values lose in each basis, over a text that the moments are not of."""

    SUMS = ("errors", "count")

    def __init__(self, layer: AttentionLayer, some: Moments) -> None:
        self.layer, self.moments = layer, some
        self.codec, spread = AdaptiveUniform(PROBED, layer.head_dim), orthogonal(layer.head_dim, 0)

        def three(which: str, mean: np.ndarray) -> list[HeadBasis]:
            best = balanced(some.about(which, mean), some.weight(which), spread, mean)
            return [rotated(spread, 0 * mean), rotated(spread, mean), best]

        self.bases = three("key", some.key_mean), three("value", some.value_mean)
        self.errors, self.count = np.zeros((2, 3)), np.zeros(())

    def add(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
        """A text's."""
        rows = self.layer.scale * query.reshape(len(key), -1, query.shape[-1])[:, ::EVERY]
        weight = attended(self.layer, query, key)
        for number, basis in enumerate(self.bases[0]):
            lost = rows @ self._error(basis, key).swapaxes(1, 2)
            lost -= (lost * weight[:, None]).sum(-1, keepdims=True) / weight.sum(-1)[:, None, None]
            self.errors[0, number] += np.einsum("hqt,ht->", lost**2, weight) / rows.shape[1]
        for number, basis in enumerate(self.bases[1]):
            lost = self._error(basis, value)
            self.errors[1, number] += np.einsum("hte,hte,ht->", lost @ self.moments.output, lost, weight)
        self.count = self.count + weight.sum()

    def _error(self, basis: HeadBasis, x: np.ndarray) -> np.ndarray:
        centred = x - basis.centre[:, None]
        return basis.back(self.codec.decode(*self.codec.encode(basis.into(centred)))) - centred

    def judged(self) -> Moments:
        """The moments with these errors; without, where nothing was read."""
        if not self.count:
            return self.moments
        key, value = self.errors / self.count
        return replace(self.moments, key_errors=key, value_errors=value)
