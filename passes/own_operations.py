"""own-operations: call kernels through operations of ovtq's own, which a host reads with an extension alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import openvino as ov

from ovtq.errors import VerificationFailed
from ovtq.forms.gpu.guard import GUARD, NEEDED
from ovtq.ir.graph import redirect
from ovtq.ir.operations import IN_PLACE_OF, OvtqGuard
from ovtq.models.description import ModelDescription
from ovtq.passes.base import Pass, Rewrite

NAME = (
    "ovtq's kernels, which need the extension that ovtq.load gives a host, and a GPU with the property CONFIG_FILE = "
    "the path of the file ovtq_kernels/kernels.xml in the model's folder; one of them is missing, and without it"
)  # of the guard, before what a host says of it


@dataclass(frozen=True)
class OwnOperations(Pass):
    """An operation of OpenVINO's that CONFIG_FILE binds to a kernel becomes one of ovtq's, bound to the same.

    Then no standard operation means another thing in this model, and a host that was not given the extension
    (`ovtq.load` gives it) does not read it at all. The price: shapes of their results are told by Python code, in each
    call once for each kernel.

    Refuses a model without kernels, and one that has them already. Comes last.
    """

    name: ClassVar[str] = "own-operations"
    exact: ClassVar[bool] = True
    paged_attention: ClassVar[bool] = False
    serves: ClassVar[bool] = True

    def sites(self, description: ModelDescription) -> int:
        """One: the model."""
        return 1

    def requires(self, description: ModelDescription) -> None:
        """Refuses a model in which nothing calls a kernel."""
        if not description.kernels:
            raise self.refuse("no layer has kernels; it comes after quantize-kv or truncate-window with kernels=true")

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Replace each operation, in the branches, too."""
        found = [node for body in bodies(model) for node in body.get_ordered_ops() if _bound(node)]
        if not found:
            raise self.refuse("no operation is bound to a kernel any more; run it once")
        for node in found:
            kind = IN_PLACE_OF[node.get_type_name()]
            own = kind(node.input_values(), **kind.taken(node.get_attributes()))
            own.set_friendly_name(NAME if isinstance(own, OvtqGuard) else node.get_friendly_name())
            redirect(node.output(0), own)
        return Rewrite(model, description, 1, {"operations": len(found)})

    def ensures(self, rewrite: Rewrite) -> None:
        """None is left."""
        left = {node.get_type_name() for body in bodies(rewrite.model) for node in body.get_ops() if _bound(node)}
        if left:
            raise VerificationFailed(f"{self.name}: still there: {', '.join(sorted(left))}")


def bodies(model: ov.Model) -> Iterator[ov.Model]:
    """The model, and what its Ifs branch into."""
    yield model
    for node in model.get_ops():
        if node.get_type_name() == "If":
            for number in range(2):
                yield from bodies(node.get_function(number))


def _bound(node: ov.Node) -> bool:
    return node.get_type_name() in IN_PLACE_OF and node.get_friendly_name().startswith((NEEDED, GUARD))
