"""The matrices of a basis as constants of a graph."""

from __future__ import annotations

import numpy as np
from openvino import Node

from ovtq.codec.basis import HeadBasis
from ovtq.codec.rotation import digest
from ovtq.forms.quantizer import by_batch
from ovtq.ir.graph import f32


class Matrices:
    """The matrices, stored as the CPU plugin wants weights, transposed; those that all layers share are made once.

    There and back are constants of their own: with one constant, and transpose_b on one MatMul only, the plugin takes
    the repacked weights of the one for the other's and silently gives wrong numbers.
    """

    def __init__(self) -> None:
        self.shared: dict[tuple[str, bool], Node] = {}

    def forward(self, basis: HeadBasis) -> Node:
        """x ↦ x·matrix."""
        return self._of(basis, basis.matrix, 1, False)

    def dual(self, basis: HeadBasis, group: int) -> Node:
        """q ↦ q·inverseᵀ, of query heads; of a rotation that is its matrix."""
        return self._of(basis, basis.dual, group, False)

    def inverse(self, basis: HeadBasis, group: int) -> Node:
        """y ↦ y·inverse, of query heads."""
        return self._of(basis, basis.inverse, group, True)

    def _of(self, basis: HeadBasis, tensor: np.ndarray, group: int, back: bool) -> Node:
        if not basis.shared:
            return f32(by_batch(basis.by_query(tensor.swapaxes(1, 2), group)))
        known = (digest(tensor), back)
        if known not in self.shared:
            self.shared[known] = f32(tensor[0].T)
        return self.shared[known]
