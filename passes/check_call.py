"""check-call: count past tokens in a state, and refuse a malformed call before any other node can fail at it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import openvino as ov
from openvino import opset15 as op

from ovtq.errors import VerificationFailed
from ovtq.forms.table import TARGET, TARGETS
from ovtq.ir.graph import ancestors, dim, i32, i64, id_of, new_variable, rebuild, redirect
from ovtq.models.description import ModelDescription
from ovtq.passes.base import Pass, Rewrite, option
from ovtq.states import PAST, StateSpec

REFUSAL = (
    "ovtq refuses this call: it needs input_ids (batch, at least one token), attention_mask (batch, past and new "
    "tokens, or more), beam_idx (batch), each a sequence of the call before; reset_state begins a new text"
)


@dataclass(frozen=True)
class CheckCall(Pass):
    """past = the rows of a cache that holds all tokens, or a count; input_ids pass through a node that may refuse.

    decouple-length takes the past length from attention_mask. Of a mask that is too long an exported model reads the
    first columns: behind this pass that is so again. On a GPU the past length is that of a cache that holds all tokens;
    on a CPU, where no cache of ovtq does, it comes from a state of its own, (batch, 1) i32; on a GPU whose caches are
    all pruned, or windows, it stays that of attention_mask. On a CPU beam_idx is checked by value, too; a GPU would
    have to wait.

    A call for which there is no right result is refused, by a node whose name says what a call must be, for plugins
    quote the name. Of a call that any node refuses, the CPU plugin (of an exported model, too) keeps the shapes that
    nodes had taken by then, and later calls are wrong or refused until the model is compiled again. It takes on shapes
    up to the next node whose output's shape depends on data, then runs what it has: so nothing is left over of a call
    that such a node refuses, the first of all. That is a VariadicSplit into one part, longer than what it splits. (A
    Reshape is not looked at again if its pattern is that of the call refused before; and of a pattern that is made of
    lengths of inputs the plugins make [0, -1], which fits.)

    Refuses a model whose lengths decouple-length has not taken from the inputs. Comes last, for other passes give
    layers other caches.
    """

    name: ClassVar[str] = "check-call"
    exact: ClassVar[bool] = True
    paged_attention: ClassVar[bool] = False
    serves: ClassVar[bool] = True

    target: str = option("gpu", "whose plugin the graph is made for", choices=TARGETS)

    def sites(self, description: ModelDescription) -> int:
        """One: the inputs."""
        return 1

    def requires(self, description: ModelDescription) -> None:
        """Refuses a model whose lengths are not taken from the inputs yet."""
        if description.past is None:
            raise self.refuse("the past length is not that of attention_mask; run decouple-length first, this once")

    def run(self, model: ov.Model, description: ModelDescription) -> Rewrite:
        """Let the past length come from a state, and put the check behind input_ids."""
        inputs = {name: node for node in model.get_parameters() for name in node.output(0).get_names()}
        ids, mask, beams = (inputs[name] for name in ("input_ids", "attention_mask", "beam_idx"))
        batch, new = (dim(ids, axis) for axis in (0, 1))
        sequences, columns = (dim(mask, axis) for axis in (0, 1))
        beam_count, one = dim(beams, 0), i64([1])
        rows = next((layer.token_rows for layer in description.layers if layer.token_rows), None)
        assigns, first, last, held, made = [], [], [], [], []
        if TARGET[self.target].counts:
            made = [StateSpec.fixed(PAST, "i32", [1], "past", rows=1)]
            variable = new_variable(made[0])
            read = op.read_value(op.broadcast(i32(0), op.concat([batch, one], 0)), variable)
            past = op.slice(read, i64([0]), one, one, i64([0]))  # all sequences are as long
            past = op.convert(op.reshape(past, one, False), "i64")
            total = op.convert(op.add(past, new), "i32")
            assigns = [op.assign(op.broadcast(total, op.concat([batch, one], 0)), variable)]
            first, last = ([op.convert(find(beams, i64([0]), True), "i64")] for find in (op.reduce_min, op.reduce_max))
            held = [op.subtract(dim(read, 0), one)]
        elif rows:
            past = rows.count()
        else:  # pruned or windows, all of them: a count would have to be waited for, so it stays that of the mask
            past = description.past
            last, held = [i64([0])], [past]  # less than none: a mask shorter than the new tokens
        # What must not be more than what; of lengths alone, which the GPU plugin compares on the host
        these = [one, sequences, batch, beam_count, batch, op.add(past, new), *[i64([0])] * len(first), *last]
        those = [new, batch, sequences, batch, beam_count, columns, *first, *held]
        excess = op.reduce_max(op.subtract(op.concat(these, 0), op.concat(those, 0)), i64([0]), True)
        if description.past is not None and past is not description.past:
            redirect(description.past.output(0), past)

        checked = op.variadic_split(ids, i64(1), op.add(new, op.maximum(excess, i64([0]))))
        checked.set_friendly_name(REFUSAL)
        earlier = {id_of(node) for node in ancestors(checked.output(0))}
        for reader in list(ids.output(0).get_target_inputs()):
            if id_of(reader.get_node()) not in earlier:
                reader.replace_source_output(checked.output(0))
        model = rebuild(model, add=assigns)
        return Rewrite(model, replace(description, past=None).with_states(made), 1)

    def ensures(self, rewrite: Rewrite) -> None:
        """What reads tokens reads them behind the check, and no length comes from the length of attention_mask."""
        checks = [node for node in rewrite.model.get_ops() if node.get_friendly_name() == REFUSAL]
        if len(checks) != 1:
            raise VerificationFailed(f"{self.name}: expected one check of the inputs, found {len(checks)}")
        before = {id_of(node) for node in ancestors(checks[0].output(0))}
        for node in rewrite.model.get_ops():
            reads = node.get_type_name() == "ShapeOf" and "attention_mask" in node.input_value(0).get_names()
            if reads and id_of(node) not in before:
                raise VerificationFailed(f"{self.name}: {node.get_friendly_name()} reads the length of the mask")
