"""Model descriptions: what a pass needs to know of an architecture, found in its graph."""

if __name__ != "ovtq.models":
    raise ImportError("this folder is the package `ovtq.models`; import it by that name")

from ovtq.models.description import AttentionLayer, KVPath, ModelDescription
from ovtq.models.registry import describe

__all__ = ["AttentionLayer", "KVPath", "ModelDescription", "describe"]
