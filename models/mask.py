"""What an attention mask shows, found by running that part of the graph, whatever form an exporter gave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from ovtq.errors import UnsupportedModel
from ovtq.ir.graph import ancestors, id_of, redirect
from ovtq.models.description import KVPath

HIDDEN = -1e4  # what is added to a score that does not count, at the most
LONGEST = 1 << 17  # a window beyond which it is taken for none
SHORT = 600  # tokens of a text read in one call, at the most


@dataclass(frozen=True)
class _Text:
    """A call: past and new tokens, and how many of the first ones are padding, by sequence."""

    past: int
    new: int
    pads: tuple[int, ...] = (0,)

    @property
    def total(self) -> int:
        return self.past + self.new

    @property
    def shown(self) -> np.ndarray:
        """(batch, past and new tokens) i64."""
        return (np.arange(self.total) >= np.array(self.pads)[:, None]).astype(np.int64)

    def visible(self, window: int | None) -> np.ndarray:
        """What causality, the window and the padding let a query see, (batch, new, all)."""
        query, key = self.past + np.arange(self.new)[:, None], np.arange(self.total)
        band = key <= query
        if window is not None:
            band &= key > query - window
        return band & self.shown.astype(bool)[:, None]

    def inputs(self) -> dict[str, np.ndarray]:
        """What a host gives the model in such a call."""
        shown = self.shown
        return {
            "input_ids": np.zeros((len(self.pads), self.new), np.int64),
            "attention_mask": shown,
            "position_ids": np.maximum(np.cumsum(shown, 1) - 1, 0)[:, self.past :],
            "beam_idx": np.arange(len(self.pads), dtype=np.int32),
        }


def windows(masks: Sequence[Output], paths: Sequence[tuple[KVPath, KVPath]], hint: object = None) -> list[int | None]:
    """The window of each layer's mask: how many tokens a query sees, its own included; None: all.

    A mask is what the attention adds to scores, 0 or less than -10,000, or a boolean that is true where a key is seen.
    It must show key k to query q where k ≤ q, k > q − window and attention_mask has k, and nowhere else: that is held
    in texts with and without padding, from the first token on and across the window's edge. `hint` is what config.json
    says of a window, if it is a number. Raises UnsupportedModel for any other rule. Runs the masks on the CPU.
    """
    places = [(id_of(mask.get_node()), mask.get_index()) for mask in masks]
    first = {place: index for index, place in reversed(list(enumerate(places)))}  # layers share them
    mine = sorted(first.values())
    run, numbers = _compiled([masks[index] for index in mine], paths)
    if isinstance(hint, int):
        numbers.append(hint)
    long = _Text(2 * max([64, *(number for number in numbers if number <= LONGEST)]) + 40, 1)
    found = [_width(row[0, 0], long, index) for row, index in zip(run(long, mine), mine, strict=True)]
    for window in dict.fromkeys(found):
        size = min(window or 24, SHORT)
        texts = [
            _Text(0, 1),
            _Text(0, 5),
            _Text(0, size + 9),
            _Text(long.past, 7),
            _Text(max((window or 24) - 5, 0), 12),
        ]
        for text in (*texts, _Text(11, 1, (0, 4)), _Text(11, 6, (0, 7)), _Text(size + 5, 3, (5, 0))):
            expected = text.visible(window)
            real = text.shown.astype(bool)[:, text.past :]  # what a padding query sees changes nothing
            for row, index, other in zip(run(text, mine), mine, found, strict=True):
                if other == window and (row != expected)[real].any():
                    rule = "no window" if window is None else f"a window of {window}"
                    raise UnsupportedModel(
                        f"layer {index}: mask: not that of causality, padding and {rule}: of {text.new} new tokens "
                        f"behind {text.past} it shows others at {int((row != expected)[real].sum())} places; chunked "
                        "attention, for one, has no window"
                    )
    by_place = {places[index]: window for index, window in zip(mine, found, strict=True)}
    return [by_place[place] for place in places]


def _width(seen: np.ndarray, text: _Text, index: int) -> int | None:
    """How many of the last keys a single query sees; None: all."""
    which = np.flatnonzero(seen)
    if len(which) == 0 or which[-1] != text.past or len(which) != text.total - which[0]:
        raise UnsupportedModel(
            f"layer {index}: mask: a query sees {len(which)} of {text.total} keys, not the last ones"
        )
    return None if which[0] == 0 else len(which)


def _compiled(
    masks: Sequence[Output], paths: Sequence[tuple[KVPath, KVPath]]
) -> tuple[Callable[[_Text, Sequence[int]], list[np.ndarray]], list[int]]:
    """What runs the masks of one call, (batch, new, all) bool each; and the whole numbers in them.

    Lengths that they take from states and from what layers compute are given, so that nothing else is run.
    """
    kept = {
        (id_of(tensor.get_node()), tensor.get_index()): length
        for pair in paths
        for path in pair
        for tensor, length in ((path.read.output(0), "past"), (path.past, "past"), (path.appended, "total"))
    }
    shapes = {}
    for node, length in _lengths(masks, kept):
        stand_in = op.parameter(node.output(0).get_partial_shape(), node.get_output_element_type(0))
        shapes[id_of(stand_in)] = node, stand_in, length
    for node, stand_in, _ in shapes.values():  # for the time of the copy
        redirect(node.output(0), stand_in)
    try:
        needed = {id_of(node): node for mask in masks for node in ancestors(mask)}
        strange = next((node for node in needed.values() if node.get_type_name() in ("ReadValue", "MatMul")), None)
        if strange is not None:
            raise UnsupportedModel(
                f"the mask depends on {strange.get_friendly_name()}, not on lengths and inputs alone"
            )
        parameters = [node for node in needed.values() if node.get_type_name() == "Parameter"]
        part = ov.Model([op.result(mask) for mask in masks], parameters, "masks")
        feeds = [_feed(node, shapes) for node in parameters]
        compiled = ov.Core().compile_model(part.clone(), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    finally:
        for node, stand_in, _ in shapes.values():
            redirect(stand_in.output(0), node)
    numbers = [
        abs(int(np.asarray(node.get_data()).reshape(-1)[0]))
        for node in needed.values()
        if node.get_type_name() == "Constant" and node.get_element_type().is_integral() and node.get_data().size == 1
    ]

    def run(text: _Text, indices: Sequence[int]) -> list[np.ndarray]:
        results = compiled([feed(text) for feed in feeds])
        return [_shown(results[place], text, index) for place, index in enumerate(indices)]

    return run, numbers


def _lengths(masks: Sequence[Output], kept: Mapping[tuple[str, int], str]) -> list[tuple[Node, str]]:
    """The ShapeOfs of cached tokens and of what layers compute that masks depend on, and how long these are."""
    seen, todo, found = set(), [mask.get_node() for mask in masks], []
    while todo:
        node = todo.pop()
        if id_of(node) in seen:
            continue
        seen.add(id_of(node))
        length = _length(node.input_value(0), kept) if node.get_type_name() == "ShapeOf" else None
        if length:
            found.append((node, length))
        else:
            todo += [value.get_node() for value in node.input_values()]
    return found


def _length(source: Output, kept: Mapping[tuple[str, int], str]) -> str | None:
    """Whether a tensor is as long as past tokens, as all, or, made of products or embeddings, as new ones."""
    if not source.get_element_type().is_real():
        return None
    seen, todo = set(), [source]
    while todo:
        value = todo.pop(0)
        node = value.get_node()
        if (length := kept.get((id_of(node), value.get_index()))) is not None:
            return length
        table = node.get_type_name() == "Constant" and node.get_element_type().is_real()
        if node.get_type_name() == "MatMul" or (table and len(node.get_output_shape(0)) > 1):
            return "new"
        if id_of(node) not in seen and node.get_type_name() != "ShapeOf":
            seen.add(id_of(node))
            todo += node.input_values()
    return None


def _feed(node: Node, shapes: Mapping[str, tuple[Node, Node, str]]) -> Callable[[_Text], np.ndarray]:
    """What is given to one parameter of the masks in a call."""
    if id_of(node) not in shapes:
        name = node.output(0).get_any_name()
        if name not in _Text(0, 1).inputs():
            raise UnsupportedModel(f"the mask depends on the input {name}")
        return lambda text: text.inputs()[name]
    reader, _, length = shapes[id_of(node)]
    source = reader.input_value(0)
    dims = [axis.get_length() if axis.is_static else None for axis in source.get_partial_shape()]
    if [place for place, size in enumerate(dims) if size is None and place] not in ([], [1], [2]):
        raise UnsupportedModel(
            f"the mask depends on the shape {source.get_partial_shape()}, of which too little is known"
        )
    kind = node.get_element_type().to_dtype()

    def shape(text: _Text) -> np.ndarray:
        free = [len(text.pads), *[{"past": text.past, "total": text.total, "new": text.new}[length]] * 3]
        return np.array([size if given is None else given for given, size in zip(dims, free, strict=False)], kind)

    return shape


def _shown(mask: np.ndarray, text: _Text, index: int) -> np.ndarray:
    """Where a mask shows a key, (batch, new, all) bool."""
    if mask.dtype != bool:
        added = mask[(mask != 0) & ~(mask <= HIDDEN)]
        if added.size:
            raise UnsupportedModel(
                f"layer {index}: mask: it adds {added[0]:.3g} to a score: no mask but a bias by position, as of ALiBi"
            )
        mask = mask == 0
    mask = mask[None] if mask.ndim == 3 else mask
    shape = (len(text.pads), mask.shape[1] if mask.ndim == 4 else 1, text.new, text.total)
    try:
        whole = np.broadcast_to(mask, shape)
    except ValueError:
        raise UnsupportedModel(f"layer {index}: mask: its shape is {mask.shape}, expected {shape}") from None
    if (whole != whole[:, :1]).any():
        raise UnsupportedModel(f"layer {index}: mask: it differs between heads")
    return whole[:, 0]
