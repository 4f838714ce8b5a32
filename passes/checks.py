"""What passes must find in a model before they touch it: each check says what is wrong, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ovtq.models.description import AttentionLayer, Exported, ModelDescription, shape_readers
from ovtq.states import StateSpec


def not_exported(layers: Iterable[AttentionLayer]) -> str:
    """Which layer has another cache by now."""
    for layer in layers:
        if not isinstance(layer.cache, Exported):
            return f"layer {layer.index} no longer has the exported KV states"
    return ""


def unequal(layers: Sequence[AttentionLayer], what: str) -> str:
    """Which layer can't be rewritten together with the first; `what` names what they must have in common."""
    for layer in layers:
        if layer.shape != layers[0].shape:
            return f"layers {layers[0].index} and {layer.index} differ in {what}"
    return ""


def coupled(description: ModelDescription) -> str:
    """Whether lengths are those of a state still."""
    return "lengths in this model come from a KV state; run decouple-length first" if shape_readers(description) else ""


def taken(states: Iterable[StateSpec], name: str) -> str:
    """Whether there is a state of that name already."""
    return f"the model has a state {name} already" if any(state.name == name for state in states) else ""
