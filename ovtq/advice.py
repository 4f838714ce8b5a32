"""Which preset to take: decided here alone, by what a model's attention is.

With sinks by what was measured of GPT-OSS (docs/benchmarks, docs/evidence.md). Without, by what each plugin fuses, and
quality by models with real weights (docs/benchmarks/real-models.md), times by docs/benchmarks/large-windows.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from ovtq.forms.window import PAYS, SHORT_WINDOW
from ovtq.models import ModelDescription


@dataclass(frozen=True)
class Advice:
    """A preset, and why that one."""

    preset: str
    reason: str


def advise(description: ModelDescription, target: str) -> Advice:
    """The preset for a model on a target, gpu or cpu, if nothing else is asked for than a right and fast model."""
    windows = [layer.window for layer in description.sliding if layer.window is not None]
    longest = max(windows, default=0)
    if description.sinks:
        if target == "gpu" and windows:
            return Advice("u8", "its attention has sinks: in the cache itself, as a row, they let a GPU keep 8 bits")
        if target == "gpu" or longest > SHORT_WINDOW or not windows:
            return Advice(
                "k6v4", "its attention has sinks, with which the plugin's own cache is kept as floats or copied"
            )
        return Advice("exact", f"sliding layers keep {longest - 1:,} tokens: less to read, and the rest as exported")
    if target == "gpu":
        return Advice(
            "u8",
            "without sinks a GPU reads its own 8-bit cache in place, rotated for less loss; packed presets (k8v4, "
            "k6v4) move more bytes per step, and are for memory alone",
        )
    reason = "the plugin's own 8-bit cache, rotated for less loss, in the exported form: as fast as exported"
    if windows:
        reason += (
            f"; sliding layers cut to their window of {longest:,} tokens would be slower than the exported model in "
            f"texts of less than some {PAYS * longest:,} tokens"
        )
    return Advice("u8", reason)


BY_TEXT = "in the bases and about the means that calibration.npz has of a text, in which it loses less again"


def gains_by_text(description: ModelDescription, found: Advice) -> bool:
    """Whether a preset is to take statistics of a text that lie beside the model.

    Where something is quantised, and the attention has no sinks: there it was measured of models with real weights
    (docs/benchmarks/real-models.md).
    """
    return not description.sinks and found.preset != "exact"


BY_WEIGHTS = "in bases by the model's weights, which say much where keys have biases"


def gains_by_weights(description: ModelDescription, found: Advice) -> bool:
    """Whether a preset is to follow a model's weights, if they tell anything, where no statistics of a text lie.

    In the plugin's own cache, and where every key has a bias: there it was measured to lose 3.5 times less than rotated
    heads, under paged attention 6.6 times, where the rotation alone loses more than the exported model.
    """
    return not description.sinks and found.preset == "u8" and all(x.key_bias is not None for x in description.layers)


def attention_of(description: ModelDescription) -> str:
    """What kind of attention a model has, in a line."""
    parts = []
    for layers, kind in ((description.full, "full"), (description.sliding, "sliding")):
        for heads in sorted({(x.query_heads, x.kv_heads, x.head_dim, x.window) for x in layers}, key=str):
            query_heads, kv_heads, head_dim, window = heads
            share = (
                f"{query_heads} query heads" if query_heads == kv_heads else f"{query_heads} query heads on {kv_heads}"
            )
            parts.append(f"{kind}{f' over {window:,} tokens' if window else ''}, {share} of {head_dim}")
    biases = sum(layer.key_bias is not None for layer in description.layers)
    return (
        f"attention: {'; '.join(parts)}; {'with' if description.sinks else 'no'} sinks; "
        f"{'keys with a bias' if biases else 'no bias of keys alone'}"
    )
