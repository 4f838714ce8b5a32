"""Where rounding decides which experts answer."""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import Node

from ovtq.errors import UnsupportedModel
from ovtq.ir.graph import constant_of

ROUTER_TIE = 32 * float(np.finfo(np.float32).eps)  # of the largest router logit of a position


def with_routers(model: ov.Model) -> tuple[ov.Model, list[int]]:
    """`model` with the logits of its experts' routers as further results, and how many experts each one chooses.

    Raises UnsupportedModel if that is not told by a constant.
    """
    routers = [node for node in model.get_ordered_ops() if node.get_type_name() == "TopK"]
    taps = [ov.opset15.result(node.input_value(0)) for node in routers]
    chosen = [_count(node) for node in routers]
    return ov.Model([*model.get_results(), *taps], model.get_sinks(), model.get_parameters()), chosen


def _count(router: Node) -> int:
    value = constant_of(router.input_value(1))
    if value is None:
        raise UnsupportedModel(f"{router.get_friendly_name()}: how many experts it chooses is no constant")
    return int(value)


def undecided(router: np.ndarray, chosen: int) -> np.ndarray:
    """Where the last expert chosen and the first one left out, of (positions, experts), are within rounding.

    Nowhere if all are chosen.
    """
    if chosen == router.shape[-1]:
        return np.zeros(len(router), bool)
    ordered = np.sort(router, axis=-1)[:, ::-1]
    return ordered[:, chosen - 1] - ordered[:, chosen] <= ROUTER_TIE * np.abs(router).max(-1)
