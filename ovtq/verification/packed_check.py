"""Holds the packed and the pruned layers of a running model to their definitions in numpy."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import openvino as ov

from ovtq.codec.coding import whole_scale
from ovtq.codec.packed_attention import PackedAttention
from ovtq.codec.packing import unpack
from ovtq.forms.pruning import PrunedAttention
from ovtq.models import AttentionLayer
from ovtq.states import POSITION, PRUNED, SCORE

CODE_TIE = 64 * float(np.finfo(np.float32).eps)  # of the largest code


class PackedCheck:
    """Holds the packed layers of a running model to `PackedAttention`, from the queries, keys and values it shows."""

    def __init__(self, layers: Sequence[AttentionLayer]) -> None:
        self.packed = [(layer, layer.packed) for layer in layers if layer.packed is not None]
        self.layers = [layer for layer, _ in self.packed]
        ports = [(port.source for port in (x.query, x.key, x.value)) for x in self.layers]
        taps = [[*inner, layer.context, *what.beside] for inner, (layer, what) in zip(ports, self.packed, strict=True)]
        self.names = [[(tap.get_node().get_friendly_name(), tap.get_index()) for tap in some] for some in taps]
        self.largest, self.exact_codes = 0.0, False
        self.pruned, self.miscounted = 0, ""  # tokens, at most, of a head; what is wrong with the graph's own count
        packed = {name for layer in self.layers for place in layer.places if place for name in place.states}
        self.read = {*packed, SCORE, POSITION, PRUNED}  # of the states
        self.states: dict[str, np.ndarray] = {}  # these, before the next call

    def tapped(self, model: ov.Model) -> ov.Model:
        """`model`, as read from its file, with what is checked as further results."""
        nodes = {node.get_friendly_name(): node for node in model.get_ops()}
        taps = [ov.opset15.result(nodes[name].output(index)) for some in self.names for name, index in some]
        return ov.Model([*model.get_results(), *taps], model.get_sinks(), model.get_parameters())

    def lossy(self, past: int) -> bool:
        """Whether a call after `past` tokens reads codes, or misses tokens that were pruned."""
        return any(packed.lossy(past) for _, packed in self.packed)

    def reset(self) -> None:
        """Forget everything but the largest difference."""
        self.states = {}
        for _, packed in self.packed:
            packed.reset()

    def step(self, request: ov.InferRequest, shown: np.ndarray, mask: np.ndarray, beams: np.ndarray) -> None:
        """Compare one call's results; `shown` (batch, new), `mask` (batch, past + new)."""
        visible, past = shown.astype(bool), mask.shape[1] - shown.shape[1]
        states = {name: state[beams] for name, state in self.states.items()}
        first = 1
        for (layer, packed), some in zip(self.packed, self.names, strict=True):
            query, keys, values, got, *beside = (request.get_output_tensor(first + k).data for k in range(len(some)))
            first += len(some)
            if isinstance(packed, PrunedAttention):  # no other has anything to be shown
                for tensor in beside:
                    packed.shown_beside(tensor.astype(np.float64), beams)
            if not packed.lossy(past):  # then results are held to the original's
                packed.remember(keys, values, beams)
                continue
            stored = functools.partial(_as_stored, states, past, layer, packed)
            packed.found(states)
            expected = packed.step(query, keys, values, mask, beams, stored)
            got, expected = (np.moveaxis(x, 1, 2)[visible] for x in (got, expected))
            error = np.abs(got - expected).max(initial=0) / np.abs(expected).max(initial=np.finfo(np.float32).tiny)
            self.largest = max(self.largest, float(error) if np.isfinite(got).all() else float("inf"))
        try:
            found = [state for state in request.query_state() if state.name in self.read]
            self.states = {state.name: np.array(state.state.data) for state in found}
        except RuntimeError:  # the GPU plugin does not give out i8 states
            self.states = {}
        self.exact_codes = bool(self.states)
        self._count(mask)

    def _count(self, mask: np.ndarray) -> None:
        """Hold the graph's own count of pruned tokens to what is by now older than the recent ones."""
        for layer in self.layers:
            if isinstance(layer.packed, PrunedAttention):
                due = layer.packed.due(mask)  # (batch,)
                self.pruned = max(self.pruned, int(due.max()))
                if PRUNED in self.states and (self.states[PRUNED][:, layer.packed.heads, 0] != due[:, None]).any():
                    self.miscounted = (
                        f"layer {layer.index} says of a text of {mask.shape[1]} tokens that it pruned "
                        + (f"{self.states[PRUNED][:, layer.packed.heads, 0].tolist()}, expected {due.tolist()}")
                    )


def _as_stored(
    states: Mapping[str, np.ndarray],
    past: int,
    layer: AttentionLayer,
    packed: PackedAttention,
    which: int,
    x: np.ndarray,
) -> np.ndarray:
    """Keys or values as the codec stores them, but with the graph's code where one is a rounding away from another.

    `states` are those that this call of the graph found, of `past` tokens, the first ones of `x`; no more are returned.
    """
    codec, x = packed.codecs[which], x[:, :, :past]
    if codec is None or not packed.older(past):  # then none is read as stored
        return x
    if not states:
        return packed.stored(which, x)
    y = packed.bases[which].into(x)
    codes, scale = codec.encode(y)
    bytes_, scales = layer.places[which].read(states)
    # a state that grows holds the first tokens, one of fixed length the last, behind rows that are not tokens yet
    count = packed.rows(past, bytes_.shape[2])
    end = past if layer.window else count
    rows = slice(bytes_.shape[2] - count, None)
    span = (end - count + packed.columns(states, count))[..., None]  # which token a row is
    some, some_scales = (np.take_along_axis(tensor, span, 2) for tensor in (codes, scale))
    tie = codec.near_tie(np.take_along_axis(y, span, 2), CODE_TIE)
    tied = tie.any(-1)  # few: unpacking all takes longer than all else here
    some[tied] = np.where(tie[tied], unpack(bytes_[:, :, rows][tied], codec.bits), some[tied])
    some_scales[tied] = scales[:, :, rows][tied]
    if packed.whole:
        some_scales = whole_scale(some_scales, scales[:, :, rows])
    for tensor, part in ((codes, some), (scale, some_scales)):
        np.put_along_axis(tensor, span, part, 2)
    return packed.restored(which, codes, scale)
