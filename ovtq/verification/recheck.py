"""Whether a converted folder still is what ovtq makes of a model: its recorded passes are run again and verified."""

from __future__ import annotations

from pathlib import Path

from ovtq import files, pipeline
from ovtq.codec import moments
from ovtq.errors import InputError, VerificationFailed
from ovtq.ir import io
from ovtq.models import describe
from ovtq.passes import PASSES, Pass
from ovtq.verification.extent import default_scope
from ovtq.verification.verify import Difference, verify


def passes_of(folder: Path, *others: Path) -> tuple[Pass, ...]:
    """The passes that a folder's IR was made with, from its stamp; none of a model as exported.

    The statistics that they need lie in the folder, or in one of the `others`. Raises InputError if this version of
    ovtq has no such passes or options, or if there are no such statistics.
    """
    steps = io.stamp_of(io.load(folder)).get("passes", [])
    for step in steps:
        if step["name"] not in PASSES:
            raise InputError(f"{folder}: made with a pass {step['name']!r} that this ovtq does not know")
    wanted = {step["facts"]["calibration"]["sha256"] for step in steps if "calibration" in step.get("facts", {})}
    found = [path for some in (folder, *others) if wanted and (path := some / moments.NAME).is_file()]
    same = [path.parent for path in found if {files.sha256(path)} == wanted]
    if found and not same:
        raise InputError(f"{found[0]}: not the statistics that the model was made with")
    where = same[0] if same else folder
    return tuple(
        PASSES[step["name"]].parse({name: str(value) for name, value in step["options"].items()}).at(where)
        for step in steps
    )


def recheck(model_dir: Path, converted: Path, device: str, *others: Path) -> Difference:
    """Verify `converted`, made of `model_dir`, as ovtq-convert does; packed layers are held to numpy once more.

    Statistics that its passes need lie in one of the two folders, or in one of the `others`. Raises VerificationFailed
    if it is wrong, or not what this version of ovtq writes; InputError if there are no such statistics.
    """
    model = io.load(model_dir)
    description = describe(model, io.load_config(model_dir))
    extent = default_scope(description, io.model_xml(model_dir))
    made, description, _ = pipeline.run(model, description, passes_of(converted, model_dir, *others))
    names, written = (
        {node.get_friendly_name() for node in graph.get_ops() if node.get_type_name() != "Parameter"}
        for graph in (made, io.load(converted))
    )
    if names != written:
        known = "schema" in io.stamp_of(io.load(converted))
        older = "" if known else "; made by an earlier ovtq: convert the original model again"
        raise VerificationFailed(
            f"its graph is not what its recorded passes make of the model: {len(names ^ written)} nodes differ, "
            f"such as {min(names ^ written)}{older}"
        )
    return verify(io.model_xml(model_dir), io.model_xml(converted), description.layers, device, 0, extent)
