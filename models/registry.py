"""Which architecture is described by which module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import openvino as ov

from ovtq.errors import UnsupportedModel
from ovtq.models import gpt_oss
from ovtq.models.description import ModelDescription

ARCHITECTURES: dict[str, Callable[[ov.Model, Mapping[str, Any]], ModelDescription]] = {
    "gpt_oss": gpt_oss.describe,
}


def describe(model: ov.Model, config: Mapping[str, Any]) -> ModelDescription:
    """Find the attention layers of `model`, with the help of its config.json.

    Raises UnsupportedModel if the architecture is unknown or the graph is not of its known form.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UnsupportedModel(
            f"config.json says model_type {model_type!r}; ovtq knows {', '.join(map(repr, ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type](model, config)
