"""Statistics of a model's queries and keys before RoPE over a text, for the score of `ovtq.forms.triattention`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset15 as op

from ovtq.errors import InputError
from ovtq.forms.triattention import DISTANCES, Statistics
from ovtq.ir import io
from ovtq.models import describe
from ovtq.models.attention import projected
from ovtq.models.rope import frequencies
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner

CALL = 512  # tokens


def calibrate(model_dir: Path, ids: np.ndarray, tick: Callable[[], None] = lambda: None) -> Statistics:
    """Run a model as exported over windows of a text, ids (windows, tokens), each from an empty cache, at f32.

    Sums only are kept: of queries, and of what a score is made of and its products, from which follow the mean and the
    deviation of any score. Raises InputError for a converted model, UnsupportedModel for one that is not understood.
    """
    model = io.load(model_dir)
    if io.stamp_of(model):
        raise InputError(f"{model_dir}: already converted; calibrate with the original model instead")
    description = describe(model, io.load_config(model_dir))
    layers = description.full
    if not layers:
        raise InputError(f"{model_dir}: has no full layers, so there is nothing to prune")
    H, G, d = layers[0].kv_heads, layers[0].group, layers[0].head_dim
    omega = frequencies(model, layers[0].key.source, H, d)
    sides = [(layer.query, H * G) for layer in layers] + [(layer.key, H) for layer in layers]
    taps = [op.result(projected(port.source, heads, d)) for port, heads in sides]
    runner = Runner(ov.Model(taps, model.get_sinks(), model.get_parameters()), "CPU", EXACT_PROPERTIES)

    count, half = len(layers), d // 2
    query, length = np.zeros((count, H * G, half), complex), np.zeros((count, H * G, half))
    first, second = np.zeros((count, H, 3 * half)), np.zeros((count, H, 3 * half, 3 * half))
    for window in ids:
        runner.reset()
        for start in range(0, len(window), CALL):
            runner.step(window[None, start : start + CALL])
            for at in range(count):
                pairs = _pairs(runner, at, H * G)
                query[at] += pairs.sum(1)
                length[at] += np.abs(pairs).sum(1)
                pairs = _pairs(runner, count + at, H)
                parts = np.concatenate([pairs.real, pairs.imag, np.abs(pairs)], -1)
                first[at] += parts.sum(1)
                second[at] += parts.swapaxes(1, 2) @ parts
            tick()
    first, second = first / ids.size, second / ids.size
    raw = Statistics(
        np.array([layer.index for layer in layers]), (query / ids.size).astype(np.complex64),
        (length / ids.size).astype(np.float32), omega, DISTANCES,
        np.zeros((count, H * G)), np.ones((count, H * G)), np.array(ids.size),
        np.array(hashlib.sha256(np.ascontiguousarray(ids, np.int64).data).hexdigest()),
        np.array(io.text_sha256(io.model_xml(model_dir))),
    )  # fmt: skip
    return _standardised(raw, first, second - first[..., None] * first[..., None, :])


def _pairs(runner: Runner, result: int, heads: int) -> np.ndarray:
    """A projection's result as complex numbers, (heads, tokens, d/2)."""
    found = np.array(runner.request.get_output_tensor(result).data[0], np.float64)  # (tokens, heads·d)
    found = found.reshape(len(found), heads, 2, -1)
    return (found[:, :, 0] + 1j * found[:, :, 1]).swapaxes(0, 1)


def _standardised(raw: Statistics, mean: np.ndarray, covariance: np.ndarray) -> Statistics:
    """`raw` with the scores' means and deviations; of [k, |k_f|]: mean (layers, kv_heads, ·), covariance likewise."""
    kv_heads, heads = mean.shape[1], raw.mean_query.shape[1]
    means, deviations = np.empty((2, len(raw.layers), heads))
    for at, layer in enumerate(raw.layers):
        rows = raw.product(int(layer), kv_heads)[0]  # (kv_heads, ·, group)
        means[at] = np.einsum("hig,hi->hg", rows, mean[at]).reshape(-1)
        spread = np.einsum("hig,hij,hjg->hg", rows, covariance[at], rows)
        deviations[at] = np.sqrt(np.maximum(spread, np.finfo(np.float32).tiny)).reshape(-1)
    return replace(raw, score_mean=means, score_deviation=deviations)
