"""The graph passes, one a file; `PASSES` maps their command-line names to their classes."""

if __name__ != "ovtq.passes":
    raise ImportError("this folder is the package `ovtq.passes`; import it by that name")

from ovtq.passes.base import Pass, Rewrite
from ovtq.passes.cache_precision import CachePrecision
from ovtq.passes.centre_keys import CentreKeys
from ovtq.passes.check_call import CheckCall
from ovtq.passes.decouple_length import DecoupleLength
from ovtq.passes.own_operations import OwnOperations
from ovtq.passes.prune_kv import PruneKv
from ovtq.passes.quantize_kv import QuantizeKv
from ovtq.passes.rotate_heads import RotateHeads
from ovtq.passes.simplify_mask import SimplifyMask
from ovtq.passes.sink_row import SinkRow
from ovtq.passes.truncate_window import TruncateWindow

PASSES: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        DecoupleLength,
        TruncateWindow,
        SimplifyMask,
        CentreKeys,
        RotateHeads,
        QuantizeKv,
        PruneKv,
        SinkRow,
        CachePrecision,
        CheckCall,
        OwnOperations,
    )
}

__all__ = [
    "PASSES",
    "CachePrecision",
    "CentreKeys",
    "CheckCall",
    "DecoupleLength",
    "OwnOperations",
    "Pass",
    "PruneKv",
    "QuantizeKv",
    "Rewrite",
    "RotateHeads",
    "SimplifyMask",
    "SinkRow",
    "TruncateWindow",
]
