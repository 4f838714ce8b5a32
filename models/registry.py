"""Which architecture is described by which module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import openvino as ov

from ovtq.models import decoder, gpt_oss
from ovtq.models.description import ModelDescription

# Those of whose config.json more is known than of any decoder's
ARCHITECTURES: dict[str, Callable[[ov.Model, Mapping[str, Any]], ModelDescription]] = {
    "gpt_oss": gpt_oss.describe,
}


def describe(model: ov.Model, config: Mapping[str, Any]) -> ModelDescription:
    """Find the attention layers of `model`, with the help of its config.json.

    Raises UnsupportedModel if the graph is not that of a decoder whose caches can be rewritten.
    """
    return ARCHITECTURES.get(str(config.get("model_type")), decoder.describe)(model, config)
