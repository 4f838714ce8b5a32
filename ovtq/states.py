"""The states of a model: their names, what each holds after so many tokens, and the bytes of that.

Whoever makes a state makes a `StateSpec` of it. These are recorded in a converted model and in ovtq.json, and whatever
counts, fills or finds states reads them there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openvino as ov
from openvino.op.util import VariableInfo

from ovtq.errors import InputError

SCHEMA = 1  # of what is recorded

# States that layers share. Those of one layer are named by `cache_name`.
WINDOW = "ovtq.window"  # the last tokens of the sliding layers
RECENT = "ovtq.recent"  # the last tokens of the full layers
SCALES = "ovtq.scale"  # scales of all packed full layers, for a CPU
SCORE, POSITION = "ovtq.score", "ovtq.position"  # of the tokens kept: what for, and where they were in the text
PRUNED = "ovtq.pruned"  # (batch, heads, 2): how many tokens were pruned, and how many are kept
KEY_SUM = "ovtq.key_sum"  # what the score keydiff remembers
IN_PLACE = ".packed"  # how those end that kernels of ovtq write into: bytes, in what is declared as floats
PAST = "ovtq.past"  # (batch, 1): how many tokens there were, where no cache tells it

FLOAT_BYTES = {"gpu": 2, "cpu": 4}  # of a floating-point state: f16 on the GPU, as declared (f32) on the CPU
BYTES = {"i8": 1, "u8": 1, "i32": 4, "i64": 8, "boolean": 1}  # of other types
BITS = {"f32": 32, "f16": 16, "bf16": 16, "u8": 8, "i8": 8, "u4": 4, "u3": 3}
# Bytes of scale and zero point beside a row (one token of one head): on a GPU with XMX f16 and i8, f16 and f16; f32 and
# f32 on the CPU.
BESIDE = {("gpu", "u8"): 3, ("gpu", "u4"): 4, ("cpu", "u8"): 8, ("cpu", "u4"): 8}
TURBO = "TURBO "  # before the precision of that cache of the CPU plugin
TURBO_BESIDE = 4  # bytes of a row's norm in it

Precision = str | None | Mapping[str, str | None]  # of a plugin's own caches; or that of its keys and of its values


def cache_name(layers: int | Sequence[int], what: str) -> str:
    """Of the state that has the keys or values (`what`) of a layer, or of several."""
    return f"ovtq.{layers if isinstance(layers, int) else '-'.join(map(str, layers))}.{what}"


def scale_name(name: str) -> str:
    """Of the state with the scales of what the state `name` has."""
    return f"{name}.scale"


def recent_name(name: str) -> str:
    """Of the state with what the state `name` has, of recent tokens."""
    return f"{name}.recent"


def row_bytes(width: int, precision: str, target: str) -> int:
    """Bytes of one token of one head, K or V, of `width` coordinates in the cache that the plugin keeps."""
    bits = BITS[precision.removeprefix(TURBO)]
    beside = 0 if bits > 8 else TURBO_BESIDE if precision.startswith(TURBO) else BESIDE[target, precision]
    return width * bits // 8 + beside


@dataclass(frozen=True)
class Fixed:
    """As many rows at any time."""

    count: int

    def rows(self, tokens: int) -> int:
        """How many there are after `tokens` tokens."""
        return self.count


@dataclass(frozen=True)
class Growing:
    """After t tokens max(t − window, 0) of them, less the rest modulo `multiple`, and no more than `most`.

    Once there is a token, there are `extra` rows besides.
    """

    window: int = 0
    multiple: int = 1
    most: int | None = None
    extra: int = 0

    def rows(self, tokens: int) -> int:
        """How many there are after `tokens` tokens."""
        held = max(tokens - self.window, 0) // self.multiple * self.multiple
        return min(held, held if self.most is None else self.most) + (self.extra if tokens else 0)


@dataclass(frozen=True)
class StateSpec:
    """One state.

    `shape` is as declared: -1 stands first for the batch and, where it grows, for its rows. `holds` says what of:
    key, value, tokens (keys then values of each layer), scale, score, position, count, sum or past; `layers` whose, one
    after the other along the axis of heads. What is `native` the plugin keeps as its own KV cache, in a precision of
    its own; all else as declared, floating-point numbers in those of the target.
    """

    name: str
    type: str  # as OpenVINO writes it: f32, i8, i32
    shape: tuple[int, ...]
    held: Fixed | Growing
    holds: str
    layers: tuple[int, ...] = ()
    native: bool = False

    @classmethod
    def fixed(
        cls, name: str, kind: str, shape: Sequence[int], holds: str, layers: Sequence[int] = (), rows: int | None = None
    ) -> StateSpec:
        """Of a fixed length; `shape` is without the batch, its second axis is the rows unless `rows` says otherwise."""
        return cls(name, kind, (-1, *shape), Fixed(shape[1] if rows is None else rows), holds, tuple(layers))

    @classmethod
    def growing(
        cls, name: str, kind: str, heads: int, width: int, rule: Growing, holds: str, layers: Sequence[int],
        native: bool = False,
    ) -> StateSpec:  # fmt: skip
        """(batch, heads, rows, width)."""
        return cls(name, kind, (-1, heads, -1, width), rule, holds, tuple(layers), native)

    @property
    def real(self) -> bool:
        """Whether its numbers are floating-point ones."""
        return self.type not in BYTES

    @property
    def grows(self) -> bool:
        """Whether it has more rows after every longer text."""
        return isinstance(self.held, Growing) and self.held.most is None

    @property
    def element_type(self) -> ov.Type:
        """Of its numbers."""
        return getattr(ov.Type, self.type)

    def rows(self, tokens: int) -> int:
        """How many rows it has after `tokens` tokens."""
        return self.held.rows(tokens)

    def row_bytes(self, target: str, precision: Precision = None) -> int:
        """Bytes of a row of all heads, in a batch of one; of all of it, if it is of a fixed length."""
        *axes, width = self.shape[1:]
        asked = precision.get(self.holds) if isinstance(precision, Mapping) else precision
        if self.native and asked:
            row = row_bytes(width, asked, target)
        else:
            row = width * (FLOAT_BYTES[target] if self.real else BYTES[self.type])
        return row * math.prod(length for length in axes if length >= 0)

    def bytes(self, tokens: int, target: str, precision: Precision = None, batch: int = 1) -> int:
        """Bytes after `tokens` tokens, on a target, in a plugin's cache of that precision (None: as declared)."""
        rows = self.rows(tokens) if isinstance(self.held, Growing) else 1
        return batch * rows * self.row_bytes(target, precision)

    def most_flat(self, target: str, precision: Precision = None) -> int:
        """Bytes that are there whatever the length of a text, once it is long."""
        if isinstance(self.held, Fixed):
            return self.bytes(0, target, precision)
        return ((self.held.most or 0) + self.held.extra) * self.row_bytes(target, precision)

    def told(self) -> dict[str, Any]:
        """As it is recorded; `StateSpec.read` takes it back."""
        if isinstance(self.held, Fixed):
            rows: dict[str, Any] = {"count": self.held.count}
        else:
            rows = {"window": self.held.window, "multiple": self.held.multiple}
            rows |= {"most": self.held.most} if self.held.most is not None else {}
            rows |= {"extra": self.held.extra} if self.held.extra else {}
        facts = {"name": self.name, "type": self.type, "shape": [*self.shape], "rows": rows, "holds": self.holds}
        return facts | {"layers": [*self.layers], **({"native": True} if self.native else {})}

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> StateSpec:
        """The state of such a record. Raises LookupError, TypeError or ValueError for another."""
        rows = facts["rows"]
        held = Fixed(**rows) if "count" in rows else Growing(**rows)
        shape, layers = tuple(map(int, facts["shape"])), tuple(map(int, facts["layers"]))
        return cls(facts["name"], facts["type"], shape, held, facts["holds"], layers, facts.get("native", False))


def total(states: Iterable[StateSpec], tokens: int, target: str, precision: Precision = None, batch: int = 1) -> int:
    """Bytes of all states after `tokens` tokens."""
    return sum(state.bytes(tokens, target, precision, batch) for state in states)


def capacity(told: Iterable[Mapping[str, Any]]) -> int | None:
    """How many tokens there is room for, by what records tell of states; None if any number is taken."""
    return min((state["rows"]["count"] for state in told if state["holds"] == "packed"), default=None)


def per_token(states: Iterable[StateSpec], target: str, precision: Precision = None) -> int:
    """Bytes that a token adds to them, in the mean of a long text."""
    return sum(state.row_bytes(target, precision) for state in states if state.grows)


def flat(states: Iterable[StateSpec], target: str, precision: Precision = None) -> int:
    """Bytes that are there besides, whatever the length of a long text."""
    return sum(state.most_flat(target, precision) for state in states)


def other_than(states: Iterable[StateSpec], variables: Iterable[VariableInfo]) -> str:
    """What of a graph's variables is not as its states say; empty if all are."""
    left = {info.variable_id: _declared(info) for info in variables}
    for state in states:
        found = left.pop(state.name, None)
        if found != (state.type, state.shape):
            return f"expected a state {state.name} {_text(state.type, state.shape)}, found {_text(*found or ())}"
    return f"found a state {next(iter(left))} more" if left else ""


def of_model(variables: Sequence[VariableInfo], stamp: Mapping[str, Any]) -> tuple[StateSpec, ...]:
    """The states of a model that was read, from what its stamp says ({} of one as exported).

    Raises InputError if it is the stamp of another model, or of a version of ovtq that records them otherwise.
    """
    schema = stamp.get("schema", 0)
    if schema not in (0, SCHEMA):
        raise InputError(
            f"converted by ovtq {stamp.get('ovtq')}, whose records (schema {schema}) this ovtq can't read; "
            "convert the original model with this one"
        )
    if not schema:
        return _guessed(variables, stamp.get("passes", []))
    try:
        states = tuple(map(StateSpec.read, stamp["states"]))
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"its stamp tells of no states ({error!r}); convert the original model again") from None
    fault = other_than(states, variables)
    if fault:
        raise InputError(f"its states are not those in its stamp ({fault}); convert the original model again")
    return states


def _guessed(variables: Sequence[VariableInfo], steps: Sequence[Mapping[str, Any]]) -> tuple[StateSpec, ...]:
    """What they are by their names and shapes: in models as exported, and in those converted by ovtq 0.1.0.

    Its passes (`steps`) tell how many rows states that grow have, and that there is a sink's row.
    """
    rule: Mapping[str, Any] = next((step["facts"]["stored"] for step in steps if "stored" in step["facts"]), {})
    sink_row = any(step["name"] == "sink-row" for step in steps)
    found = []
    for info in variables:
        kind, shape = _declared(info)
        ours = info.variable_id.startswith("ovtq.")
        ending = info.variable_id.rpartition(".")[2]
        holds = ending if ending in ("key", "value", "scale", "score", "position") else "tokens"
        if -1 not in shape[1:]:
            held: Fixed | Growing = Fixed(shape[2] if len(shape) > 3 else 1)
        else:
            held = Growing(**rule, extra=int(sink_row)) if ours else Growing()
        native = holds in ("key", "value") and kind not in BYTES and -1 in shape[1:] and (sink_row or not ours)
        found.append(StateSpec(info.variable_id, kind, shape, held, holds, _layers(info.variable_id), native))
    return tuple(found)


def layers_named(names: Iterable[str]) -> list[int]:
    """The layers whose keys or values are in the states of these names, which `cache_name` made, in order.

    A compiled model hands out nothing else of its states.
    """
    return sorted({layer for name in names if name.startswith("ovtq.") for layer in _layers(name)})


def _layers(name: str) -> tuple[int, ...]:
    part = name.split(".")[1] if name.count(".") > 1 else ""
    return tuple(int(number) for number in part.split("-") if number.isdigit())


def _declared(info: VariableInfo) -> tuple[str, tuple[int, ...]]:
    shape = tuple(length.get_length() if length.is_static else -1 for length in info.data_shape)
    return info.data_type.get_type_name(), shape


def _text(kind: str = "none", shape: Sequence[int] = ()) -> str:
    return f"{kind}[{','.join('?' if length < 0 else str(length) for length in shape)}]" if shape else kind
