"""Operations of ovtq's own: what calls a kernel of `ovtq/codec/opencl` in place of an operation that OpenVINO has.

Each takes what the one in its place does, and its result is of the same shape. A host reads a model with them if it is
given `OPERATIONS` as an extension; no device computes them but a GPU that CONFIG_FILE gives the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import openvino as ov


class Operation(ov.Op):
    """One of them; a subclass says what its result's shape is, if it is not that of the first input.

    `stands_for` is the type of the operation in whose place it is, `sizes` are names of its attributes.
    """

    stands_for: ClassVar[str]
    sizes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, inputs: Sequence[ov.Output] | None = None, **sizes: int) -> None:
        super().__init__(self)
        self.held = dict.fromkeys(self.sizes, 0) | sizes  # a reader fills it
        if inputs is not None:
            self.set_arguments(list(inputs))
            self.constructor_validate_and_infer_types()

    def shape(self) -> list[Any]:
        """Of the result, as lengths that may be unknown."""
        return list(self.get_input_partial_shape(0))

    @classmethod
    def taken(cls, attributes: Mapping[str, Any]) -> dict[str, int]:
        """Its sizes, from the attributes of the operation that it stands for."""
        return {}

    def length(self, port: int, axis: int) -> ov.Dimension:
        """Of an input's axis."""
        return self.get_input_partial_shape(port)[axis]

    def validate_and_infer_types(self) -> None:
        """OpenVINO's: the type is that of the first input."""
        self.set_output_type(0, self.get_input_element_type(0), ov.PartialShape(self.shape()))

    def clone_with_new_inputs(self, new_inputs: list[ov.Output]) -> Operation:
        """OpenVINO's."""
        return type(self)(new_inputs, **self.held)

    def has_evaluate(self) -> bool:
        """No: without this word OpenVINO takes it to have computed what it is given as constants."""
        return False

    def evaluate(self, outputs: Any, inputs: Any) -> bool:
        """Not done."""
        return False

    def visit_attributes(self, visitor: Any) -> bool:
        """OpenVINO's: to write them, and to read them."""
        visitor.on_attributes(self.held)
        return True


class OvtqAttend(Operation):
    """(step, constants, state) → records of the parts of a history: as many times the step as constants have cells.

    (counts, scratch, state) → zero, once the past is read into the scratch, of one cell.
    """

    class_type_info = ov.DiscreteTypeInfo("OvtqAttend", "ovtq")
    stands_for = "ExperimentalDetectronPriorGridGenerator"

    def shape(self) -> list[Any]:
        """(step's rows · cells, 4)."""
        factors = [self.length(0, 0), self.length(1, 2)]
        known = all(length.is_static for length in factors)
        return [math.prod(length.get_length() for length in factors) if known else ov.Dimension(), 4]


class OvtqJoin(Operation):
    """(records, heads) → the context."""

    class_type_info = ov.DiscreteTypeInfo("OvtqJoin", "ovtq")
    stands_for = "ROIPooling"
    sizes = ("head_dim",)

    def shape(self) -> list[Any]:
        """(heads, 1, 1, head_dim)."""
        return [self.length(1, 0), 1, 1, self.held["head_dim"]]

    @classmethod
    def taken(cls, attributes: Mapping[str, Any]) -> dict[str, int]:
        """head_dim is what it pools to."""
        return {"head_dim": int(attributes["output_roi"][1])}


class OvtqAppend(Operation):
    """(state, step) → zero, once the step's tokens are in the state."""

    class_type_info = ov.DiscreteTypeInfo("OvtqAppend", "ovtq")
    stands_for = "PSROIPooling"

    def shape(self) -> list[Any]:
        """(step's rows, 1, 1, 1)."""
        return [self.length(1, 0), 1, 1, 1]


class OvtqWindow(Operation):
    """(state, parts, facts) → the context, once the last tokens are kept."""

    class_type_info = ov.DiscreteTypeInfo("OvtqWindow", "ovtq")
    stands_for = "DeformablePSROIPooling"
    sizes = ("side",)

    def shape(self) -> list[Any]:
        """(parts, 1, side, side)."""
        return [self.length(1, 0), 1, self.held["side"], self.held["side"]]

    @classmethod
    def taken(cls, attributes: Mapping[str, Any]) -> dict[str, int]:
        """The side of what it pools to."""
        return {"side": int(attributes["group_size"])}


class OvtqGuard(Operation):
    """(two) → one, where kernels run."""

    class_type_info = ov.DiscreteTypeInfo("OvtqGuard", "ovtq")
    stands_for = "Inverse"


OPERATIONS: tuple[type[Operation], ...] = (OvtqAttend, OvtqJoin, OvtqAppend, OvtqWindow, OvtqGuard)
IN_PLACE_OF = {kind.stands_for: kind for kind in OPERATIONS}
TYPES = {kind.stands_for: kind.__name__ for kind in OPERATIONS}  # by that of what it stands for


def core() -> ov.Core:
    """An `ov.Core` that reads models with them."""
    made = ov.Core()
    for kind in OPERATIONS:
        made.add_extension(kind)
    return made
