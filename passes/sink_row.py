"""sink-row: carry the sink logits in the keys, so that attention needs no sixth input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.codec.rotation import digest, hadamard_matrix, randomized_frame, spread_width
from ovtq.errors import VerificationFailed
from ovtq.forms.bases import Choice, LayerBases, told
from ovtq.forms.basis_nodes import Matrices
from ovtq.forms.gpu.recent import PADDING, RecentRows
from ovtq.ir.graph import ALL, dim, f32, i64, id_of, new_variable, rebuild, redirect
from ovtq.models.description import AttentionLayer, Exported, ModelDescription, TokenRows
from ovtq.models.description import SinkRow as SinkRowCache
from ovtq.passes.base import BasisPass, Rewrite, basis_option, calibration_option, centre_option, option
from ovtq.passes.checks import coupled, not_exported, taken, unequal
from ovtq.states import RECENT, Growing, StateSpec, cache_name

SINK = 1.0  # the size of a coordinate of b·u
SHORT = 2.0**-6  # and of its value: of zeros, which have no range, the GPU plugin takes a scale that overflows f16


@dataclass(frozen=True)
class SinkRow(BasisPass):
    """softmax over [z, s₁ … sₙ], z being a query head's sink logit, is that of one product with a row more.

    With s = scale·q·kᵀ, orthonormal rows R (head_dim, width) and u (width,), and any c (head_dim,), keys are stored as
    (k − c)R, queries become qR + z/(scale·b)·u, and the first row of the cache is b·u − cR. No real key has a part
    along u, so all scores are what they were, less scale·q·cᵀ, which softmax does not see. Values are stored as vR,
    that of the first row is a short vector along u, and the result times Rᵀ, which takes it out, is what the attention
    gave. So a full layer becomes attention with five inputs over a cache that grows from no row at all to one row more
    than there are tokens, which is what the GPU plugin appends to in place, stores in 8 or 4 bits and never copies to
    query heads; with a sixth input it does none of this.

    In a balanced basis (`ovtq.codec.basis`) keys are (k − c)AR and queries qA⁻ᵀR + …, with an A for each KV head,
    likewise values. These may be centred, too: then that of the first row is less the centre, and the result is given
    it back.

    The query is padded with that first row, too, and its result cut off: the CPU plugin's fused attention takes as many
    new keys as queries.

    What a quantiser sees: R spreads a vector over head_dim + 16 coordinates, so that its range, hence its error, is
    smaller by √(head_dim/width) than that of a rotation. A rounded zero point, the same error in all coordinates, meets
    vectors that sum to 0. c is the mean of the key's bias as RoPE turns it (see quantize-kv). b makes the coordinates
    of b·u as large as those of a key: a larger row is stored less exactly, with a smaller one the query's part grows,
    and with it what the error of stored keys along u costs. `rotate = false` appends zeros, and one coordinate for the
    sink, instead, to measure what R is worth.

    With `window` a query reads its own token and so many before it as they are, the sink with them, and only the older
    ones from the cache, whatever that keeps of them: `ovtq/forms/gpu/recent.py` says how both are one softmax. That
    serves attention without sinks, too.

    Refuses models without full layers in exported form, those without sinks unless there is a window, those whose
    sliding layers are not truncated or whose lengths come from a state, and a head_dim for whose width no Hadamard
    matrix is known. Source: Xiao et al.
    (arXiv 2309.17453), section 3.3, for sinks as keys; TurboQuant (arXiv 2504.19874), section 3, for the rotation;
    SageAttention (arXiv 2410.02367), section 4.2, for centred keys.
    """

    name: ClassVar[str] = "sink-row"
    exact: ClassVar[bool] = True
    paged_attention: ClassVar[bool] = False
    recaches: ClassVar[bool] = True

    seed: int = option(0, "seed of the rotation's random rows and signs")
    rotate: bool = option(True, "spread vectors over all coordinates, those for the sink included")
    centre: str = centre_option()
    basis: str = basis_option()
    calibration: str = calibration_option()
    window: int = option(0, "tokens before a query's own that it reads as they are, whatever the cache keeps; 0: none")

    def __post_init__(self) -> None:
        if not 0 <= self.window <= 4096:
            raise ValueError(f"window must be from 0 to 4096, got {self.window}")
        if self.window and (self.basis != "rotation" or self.choice.centred_by == "mean"):
            raise ValueError("a window goes with basis rotation and centre bias or none")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")

    @property
    def choice(self) -> Choice:
        """How its bases are made."""
        return Choice(self.basis, self.centre, self.calibration)

    def sites(self, description: ModelDescription) -> int:
        """One per full layer."""
        return len(description.full)

    def needless(self, description: ModelDescription) -> str:
        """In a model without full layers, and, unless there is a window, in one whose attention has no sinks."""
        if not description.full:
            return "the model has no full layers"
        return (
            ""
            if self.window or any(layer.sinks is not None for layer in description.full)
            else "its attention has no sinks"
        )

    def requires(self, description: ModelDescription) -> None:
        """Refuses models without such layers, and those not decoupled yet."""
        self.refuse_if(self.needless(description))
        grown = any(isinstance(layer.cache, Exported) for layer in description.sliding)
        if grown or not (description.sliding or self.window):
            raise self.refuse(
                "run truncate-window first: GenAI's chat may cut all tokens off states that grow, but not the sink's "
                "row; seeing a state of fixed length it resets them instead"
            )
        self.refuse_if(not_exported(description.full))
        for layer in description.full:
            if layer.sinks is None and (not self.window or description.sinks):
                raise self.refuse(f"layer {layer.index} has no sinks; leave this pass out")
            try:
                if self.window:
                    spread_width(layer.head_dim, layer.head_dim + PADDING - 2)
                else:
                    hadamard_matrix(layer.head_dim + PADDING)
            except ValueError as error:
                raise self.refuse(f"layer {layer.index} has head_dim {layer.head_dim}: {error}") from None
        self.refuse_if(coupled(description) or self.choice.unfit(description.full))
        if self.window:
            self.refuse_if(unequal(description.full, "heads or head_dim") or taken(description.states, RECENT))

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Replace each layer's states and attention."""
        d = description.full[0].head_dim
        spread = np.eye(d, dtype=np.float32) if self.window else _spread(self, d)[0]  # a window has rows of its own
        bases = self.choice.of(model, description.full, (spread, spread))
        rows: RecentRows | _Rows
        if self.window:
            centres = {index: pair.key.centre for index, pair in bases.items()}
            rows = RecentRows(description, self.window, centres, self.seed, self.rotate)
        else:
            rows = _Rows(self, description, bases)
        changed = {layer.index: rows.attend(layer) for layer in description.full}
        old = [path.assign for layer in description.full for path in layer.paths]
        model = rebuild(model, drop=old, add=rows.finish())
        facts = {
            "width": rows.width,
            "matrix_sha256": rows.digest,
            **{name: fact for name, fact in told(self.choice, bases).items() if name != "rotation_sha256"},
        }
        return Rewrite(model, description.recached(changed, rows.states), len(changed), facts)

    def ensures(self, rewrite: Rewrite) -> None:
        """Each full layer has attention of five inputs."""
        found = [node for node in rewrite.model.get_ops() if node.get_type_name() == "ScaledDotProductAttention"]
        five = sum(node.get_input_size() == 5 for node in found)
        if five != len(rewrite.description.full):
            raise VerificationFailed(
                f"{self.name}: expected {len(rewrite.description.full)} attentions of five inputs, found {five}"
            )


def _spread(item: SinkRow, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal rows (head_dim, width) that vectors are spread by, and one more, (width,), for the sink."""
    width = head_dim + PADDING
    if item.rotate:
        return randomized_frame(head_dim, width, item.seed)
    return np.eye(head_dim, width, dtype=np.float32), np.eye(1, width, head_dim, dtype=np.float32)[0]


class _Rows:
    """The nodes that all full layers share, and the rewrite of one layer."""

    def __init__(self, item: SinkRow, description: ModelDescription, bases: Mapping[int, LayerBases]) -> None:
        self.bases = bases
        self.frame, self.sink = _spread(item, description.full[0].head_dim)
        self.width = len(self.sink)
        self.matrices = Matrices()
        self.description = description
        self.batch, new = (dim(description.input_ids, axis) for axis in (0, 1))
        past = op.subtract(description.length, new)
        self.first = op.subtract(i64([1]), op.minimum(past, i64([1])))  # rows before the new ones: the sink's, once
        self.masks: dict[tuple[str, int], Node] = {}
        self.assigns: list[Node] = []
        self.states: list[StateSpec] = []

    @property
    def digest(self) -> str:
        """Of the rows that vectors are spread by."""
        return digest(np.concatenate([self.frame, self.sink[None]]))

    def finish(self) -> list[Node]:
        """The Assigns, once every layer is rewritten."""
        return self.assigns

    def attend(self, layer: AttentionLayer) -> AttentionLayer:
        """Rewrite one layer."""
        H, G = layer.kv_heads, layer.group
        key, value = (size * np.sqrt(self.width, dtype=np.float32) * self.sink for size in (SINK, SHORT))
        part = layer.own_sinks.reshape(1, H * G, 1, 1) / layer.scale * key / np.square(key).sum()
        bases = self.bases[layer.index]
        less_key, less_value = (-(basis.centre[:, None] @ basis.matrix)[None] for basis in bases)  # (1, H, 1, width)
        query = op.matmul(layer.query.source, self.matrices.dual(bases.key, G), False, True)
        query = self._behind_sink(op.add(query, f32(part)), H * G, 0 * key)
        stored = op.matmul(layer.key.source, self.matrices.forward(bases.key), False, True)
        keys, _ = self._cache(layer, "key", op.add(stored, f32(less_key)), key + less_key)
        stored = op.matmul(layer.value.source, self.matrices.forward(bases.value), False, True)
        if less_value.any():
            stored, value = op.add(stored, f32(less_value)), value + less_value
        values, past = self._cache(layer, "value", stored, value)
        mask = self._mask(layer.exported.mask.source)
        context = op.scaled_dot_product_attention(query, keys, values, mask, f32(layer.scale), False)
        real = op.slice(context, self.first, i64([ALL]), i64([1]), i64([2]))
        given = op.matmul(real, self.matrices.inverse(bases.value, G), False, True)
        if less_value.any():
            given = op.add(given, f32(np.repeat(bases.value.centre, G, 0)[None, :, None]))
        redirect(layer.context, given)
        return replace(layer, context=context.output(0), cache=SinkRowCache(TokenRows(past, 1)))

    def _behind_sink(self, new: Node, heads: int, sink: np.ndarray) -> Node:
        """`new`, (batch, heads, new, width), behind the row `sink` in the first call.

        The Reshape says how many heads and coordinates there are, which the GPU plugin's kernels need, and keeps it
        from taking this Concat and that of the cache for one, which it could not do in place.
        """
        shape = op.concat([self.batch, i64([heads]), self.first, i64([self.width])], 0)
        rows = op.concat([op.broadcast(f32(sink), shape), new], 2)
        return op.reshape(rows, i64([0, heads, -1, self.width]), True)

    def _cache(self, layer: AttentionLayer, what: str, new: Node, sink: np.ndarray) -> tuple[Node, Output]:
        """All rows, (batch, query_heads, 1 + tokens, width), the state's and the new ones; and the state's own."""
        H, G, w = layer.kv_heads, layer.group, self.width
        name, rule = cache_name(layer.index, what), Growing(extra=1)
        self.states.append(StateSpec.growing(name, "f32", H, w, rule, what, [layer.index], native=True))
        variable = new_variable(self.states[-1])
        empty = op.broadcast(f32(0), op.concat([self.batch, i64([H, 0, w])], 0))
        past = op.gather(op.read_value(empty, variable), self.description.beam_idx, i64(0))
        rows = op.concat([past, self._behind_sink(new, H, sink)], 2)
        self.assigns.append(op.assign(rows, variable))
        # in the exported form, which no plugin carries out
        grouped = op.broadcast(op.unsqueeze(rows, i64([2])), i64([1, 1, G, 1, 1]), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(grouped, i64([0, H * G, -1, w]), True), past.output(0)

    def _mask(self, mask: Output) -> Node:
        """`mask`, (batch, 1, new, all), with the sink's column, always seen, and in the first call its query's row."""
        place = id_of(mask.get_node()), mask.get_index()
        if place not in self.masks:
            before = op.concat([i64([0, 0]), self.first, i64([1])], 0)
            zero = op.constant(np.float32(0))  # Pad needs a scalar
            self.masks[place] = op.pad(mask, before, i64([0, 0, 0, 0]), "constant", zero)
        return self.masks[place]
