"""How much rounding alone moves a model's results: no conversion of it can be held to less.

A few positions of a trained model are ill-conditioned: what f32 leaves of a sum is 10 to 100 times as much there as
elsewhere, in whatever order it is added. So where a conversion is farther from the original than most models ever are,
the original is run again with its queries, keys and values turned by an orthogonal matrix and turned back, which in
exact arithmetic changes nothing, and in f32 rounds each of them otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import opset15 as op

from ovtq.errors import VerificationFailed
from ovtq.ir.graph import Port, f32, static_dim
from ovtq.models.attention import kv_path
from ovtq.models.decoder import KV
from ovtq.verification.closeness import relative

SHARES = {"largest": 1.0, "often": 0.99, "middle": 0.5}  # of positions that are no farther apart
FACTORS = {"largest": 8.0, "often": 4.0, "middle": 4.0}  # times as much as rounding a conversion may move them
RUNS = 2


@dataclass(frozen=True)
class Moved:
    """How far results are apart, in shares of their scale: at most, at 99 positions of 100, and at half of them."""

    largest: float
    often: float
    middle: float


def moved(expected: np.ndarray, got: np.ndarray) -> Moved:
    """Of results (positions, width)."""
    apart = relative(expected, got)
    return Moved(
        *(float(np.quantile(apart, share, method="higher")) if len(apart) else 0.0 for share in SHARES.values())
    )


def bounds(least: float, runs: list[Moved]) -> Moved:
    """What a conversion may move results by: `least`, or so many times as much as rounding did in any of the runs."""
    return Moved(*(max(least, *(FACTORS[name] * getattr(run, name) for run in runs)) for name in SHARES))


def within(found: Moved, bound: Moved) -> bool:
    """Whether nothing is farther apart than it may be; what is no number is."""
    return all(getattr(found, name) <= getattr(bound, name) for name in SHARES)


def turned(model: ov.Model, seed: int) -> ov.Model:
    """An exported model, or a part of one, whose queries, keys and values are turned and turned back in every layer."""
    draw = np.random.RandomState(seed)
    beams = next(node for node in model.get_parameters() if "beam_idx" in node.output(0).get_names())
    attentions = [node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    for index, node in enumerate(attentions):
        paths = (kv_path(index, what, node.input_value(at), beams) for at, what in enumerate(KV, start=1))
        for port in (Port(node, 0), *(Port(path.append, 1) for path in paths)):
            width = static_dim(port.source, 3)
            if width is None:
                raise VerificationFailed(f"the width of {port.source.get_node().get_friendly_name()} is not static")
            draws: np.ndarray = draw.standard_normal((width, width))
            turn = np.linalg.qr(draws)[0].astype(np.float32)
            there = op.matmul(port.source, f32(turn), False, False)
            port.feed(op.matmul(there, f32(turn.copy()), False, True))
    model.validate_nodes_and_infer_types()
    return model
