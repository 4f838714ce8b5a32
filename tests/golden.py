"""Writes tests/golden/*.txt: the graph of the tiny model's first two layers before and after each pass.

usage: python tests/golden.py        (only when a pass's form changes on purpose; then read the diff)
"""

from __future__ import annotations

import re
from pathlib import Path

from conftest import TINY, load

from ovtq.ir.dump import dump
from ovtq.ir.graph import Port, consumers
from ovtq.passes import PASSES, CentreKeys, CheckCall, Pass, PruneKv, QuantizeKv, SinkRow, TruncateWindow

GOLDEN = Path(__file__).resolve().parent / "golden"


SUBJECTS: dict[str, Pass] = {name: cls() for name, cls in PASSES.items()}
SUBJECTS["centre-keys"] = CentreKeys(sinks="move")
SUBJECTS["quantize-kv-cpu"] = QuantizeKv(target="cpu")
SUBJECTS["prune-kv-cpu"] = PruneKv(target="cpu")
SUBJECTS["check-call-cpu"] = CheckCall(target="cpu")
SUBJECTS["sink-row-window"] = SinkRow(window=16)
SUBJECTS["truncate-window-cpu"] = TruncateWindow(target="cpu")
SUBJECTS["truncate-window-packed"] = TruncateWindow(k_bits="6", v_bits="4")


def subject(name: str, before: tuple[Pass, ...]) -> str:
    """What the attention of layers 0 (sliding) and 1 (full) computes and stores, after `before` and the pass."""
    model, description = load(TINY["5.5"])
    outputs = [Port(consumers(layer.context)[0], 0) for layer in description.layers[:2]]
    for item in (*before, SUBJECTS[name]):
        rewrite = item.apply(model, description)
        model, description = rewrite.model, rewrite.description
    stored = [node for node in model.get_sinks() if {".0", ".1"} & set(re.findall(r"\.\d", node.get_variable_id()))]
    stored.sort(key=lambda node: node.get_variable_id())
    return dump(model, [*(port.source.get_node() for port in outputs), *stored])


if __name__ == "__main__":
    from test_passes import BEFORE

    GOLDEN.mkdir(exist_ok=True)
    for name, item in SUBJECTS.items():
        (GOLDEN / f"{name}.txt").write_text(subject(name, BEFORE[item.name]), encoding="utf-8")
