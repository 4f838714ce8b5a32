"""check-call: count past tokens in a state, and refuse a malformed call before any other node can fail at it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import openvino as ov
from openvino import Node
from openvino import opset15 as op

from ovtq.errors import VerificationFailed
from ovtq.graph import ancestors, dim, i32, i64, id_of, new_variable, rebuild, redirect
from ovtq.models.description import ModelDescription
from ovtq.passes.base import Pass, Rewrite, option

PAST = "ovtq.past"  # the name of the state that counts tokens
REFUSAL = (
    "ovtq refuses this call: it needs input_ids (batch, at least one token), attention_mask (batch, past and new "
    "tokens, or more), beam_idx (batch), each a sequence of the call before; reset_state begins a new text"
)


@dataclass(frozen=True)
class CheckCall(Pass):
    """past = the rows of a cache that holds all tokens, or a count; input_ids pass through a Reshape that may refuse.

    decouple-length takes the past length from attention_mask. Of a mask that is too long an exported model reads the
    first columns: behind this pass that is so again. On a GPU the past length is that of a cache that holds all tokens;
    on a CPU, where no cache of ovtq does, and where all are pruned, it comes from a state of its own, (batch, 1) i32.

    A call for which there is no right result is refused, by a node whose name says what a call must be, for plugins
    quote the name. Of a call that any node refuses, the CPU plugin (of an exported model, too) keeps the shapes that
    nodes had taken by then, and later calls are wrong or refused until the model is compiled again. It takes on shapes
    up to the next node whose output's shape depends on data, then runs what it has: so nothing is left over of a call
    that such a node refuses. A Reshape whose pattern is like the last one's is not looked at again, but for another
    shape of its input: of a call to refuse that is empty.

    Refuses a model whose lengths decouple-length has not taken from the inputs. Comes last, for other passes give
    layers other caches.
    """

    name: ClassVar[str] = "check-call"
    exact: ClassVar[bool] = True
    paged_attention: ClassVar[bool] = False

    target: str = option("gpu", "whose plugin the graph is made for", choices=("gpu", "cpu"))

    def sites(self, description: ModelDescription) -> int:
        """One: the inputs."""
        return 1

    def requires(self, description: ModelDescription) -> None:
        """Refuses a model whose lengths are not taken from the inputs yet."""
        if description.past is None:
            raise self.refuse("lengths in this model do not come from its inputs; run decouple-length first")

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Let the past length come from a state, and put the check behind input_ids."""
        inputs = {name: node for node in model.get_parameters() for name in node.output(0).get_names()}
        ids, mask, beams = (inputs[name] for name in ("input_ids", "attention_mask", "beam_idx"))
        batch, new = (dim(ids, axis) for axis in (0, 1))
        # By how much each of them is wrong, 0 or more: the GPU plugin has sums and maxima of lengths at once, on the host
        excess = [op.subtract(i64([1]), new)]
        for other in (dim(mask, 0), dim(beams, 0)):
            excess += [op.subtract(other, batch), op.subtract(batch, other)]
        rows = next((layer.token_rows for layer in description.layers if layer.token_rows), None)
        assigns = []
        if self.target == "cpu" or rows is None:
            variable = new_variable(PAST, [-1, 1], ov.Type.i32)
            read = op.read_value(op.broadcast(i32(0), op.concat([batch, i64([1])], 0)), variable)
            past = op.convert(op.reshape(op.slice(read, i64([0]), i64([1]), i64([1]), i64([0])), i64([1]), False), "i64")
            total = op.convert(op.add(past, new), "i32")
            assigns = [op.assign(op.broadcast(total, op.concat([batch, i64([1])], 0)), variable)]
            last = op.convert(op.reduce_max(beams, i64([0]), True), "i64")
            excess.append(op.subtract(op.add(last, i64([1])), dim(read, 0)))
            excess.append(op.negative(op.convert(op.reduce_min(beams, i64([0]), True), "i64")))
        else:
            past = rows.count()
        excess.append(op.subtract(op.add(past, new), dim(mask, 1)))
        redirect(description.past.output(0), past)

        wrong = op.maximum(functools.reduce(op.maximum, excess), i64([0]))
        checked = op.variadic_split(ids, i64(1), op.add(new, wrong))
        checked.set_friendly_name(REFUSAL)
        earlier = {id_of(node) for node in ancestors(checked.output(0))}
        for reader in list(ids.output(0).get_target_inputs()):
            if id_of(reader.get_node()) not in earlier:
                reader.replace_source_output(checked.output(0))
        model = rebuild(model, add=assigns)
        return Rewrite(model, replace(description, past=past), 1)

    def ensures(self, rewrite: Rewrite) -> None:
        """What reads tokens reads them behind the check, and no length comes from the length of attention_mask."""
        checks = [node for node in rewrite.model.get_ops() if node.get_friendly_name() == REFUSAL]
        if len(checks) != 1:
            raise VerificationFailed(f"{self.name}: expected one check of the inputs, found {len(checks)}")
        before = {id_of(node) for node in ancestors(checks[0].output(0))}
        for node in rewrite.model.get_ops():
            if node.get_type_name() == "ShapeOf" and id_of(node) not in before:
                if "attention_mask" in node.input_value(0).get_names():
                    raise VerificationFailed(f"{self.name}: {node.get_friendly_name()} reads the length of the mask")

