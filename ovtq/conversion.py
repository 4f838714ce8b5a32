"""Rewriting a model by options, in memory or from folder to folder, and what is recorded of it."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov

from ovtq import __version__, files, pipeline, staging, states, whereabouts
from ovtq import card as model_card
from ovtq.codec import kernel_files, moments
from ovtq.codec.kernel_files import CONFIG, FOLDER
from ovtq.errors import InputError, UnsupportedModel, VerificationFailed, scarcity
from ovtq.ir import cache, io
from ovtq.ir.operations import TYPES
from ovtq.models import ModelDescription, describe, projections
from ovtq.options import Checks, Options
from ovtq.passes import OwnOperations, Pass, QuantizeKv
from ovtq.pipeline import Step
from ovtq.runtime.runner import check_device
from ovtq.states import StateSpec
from ovtq.verification.extent import default_scope
from ovtq.verification.verify import Difference, calls_of, kept_precision, verify
from ovtq.wording import PROGRAM, Wording

CONTEXTS = (4096, 131072)  # tokens at which bytes are recorded
# What of the record is in the IR, too: what a host that saves the model again keeps of it.
STAMPED = ("ovtq", "schema", "preset", "passes", "target", "layers", "states", "versions")

OnProgress = Callable[[str, int, int], None]  # a stage (read, rewrite, write, verify), steps done and in all
After = Callable[[Pass, ov.Model], None]  # behind each pass


@dataclass(frozen=True)
class Layer:
    """One attention layer of a converted model; `window` is how many tokens a query can see (None: all)."""

    index: int
    window: int | None
    query_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Conversion:
    """What was done to a model: `record` is what ovtq.json holds, the rest the same as objects.

    `verification` is how far original and converted are apart where both were run, None if they were not.
    """

    record: Mapping[str, Any]
    passes: tuple[Step, ...]
    layers: tuple[Layer, ...]
    verification: Difference | None
    states: tuple[StateSpec, ...]
    target: str
    cache_precision: str | None  # of the plugin's own caches that the model asks for

    def state_bytes(self, tokens: int, *, batch: int = 1) -> int:
        """Bytes of all states after `tokens` tokens on the target. Raises InputError for less than 0 tokens."""
        return counted(self.states, tokens, self.target, self.cache_precision, batch)


@dataclass(frozen=True)
class Rewritten:
    """A rewritten model with its description, its passes and what is recorded of them."""

    model: ov.Model
    description: ModelDescription
    steps: tuple[Step, ...]  # those left out, too
    record: dict[str, Any]


def counted(these: Sequence[StateSpec], tokens: int, target: str, precision: str | None = None, batch: int = 1) -> int:
    """Bytes of states after `tokens` tokens. Raises InputError for less than 0 tokens or an unknown target."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise InputError(f"tokens must be a whole number from 0, got {tokens!r}")
    if target not in states.FLOAT_BYTES:
        raise InputError(f"target is one of {', '.join(states.FLOAT_BYTES)}, got {target!r}")
    return states.total(these, tokens, target, precision, batch)


def refuse_converted(what: Path | str, model: ov.Model) -> None:
    """Raise InputError if a model was made by ovtq."""
    stamp = io.stamp_of(model)
    if stamp:
        raise InputError(
            f"{what}: already converted ({stamp.get('preset') or 'a pass list'}, ovtq "
            f"{stamp.get('ovtq')}); convert the original model instead"
        )


def rewrite(
    model: ov.Model,
    description: ModelDescription,
    options: Options,
    passes: Sequence[Pass],
    after: After = lambda item, model: None,
) -> Rewritten:
    """Run the passes; the graph of `model` is used up. Raises the errors of `Pass.apply`."""
    target = options.target
    before = _memory(model, description.states, target)
    model, description, steps = pipeline.run(model, description, passes, after=after)
    record: dict[str, Any] = {
        "ovtq": __version__,
        "schema": states.SCHEMA,
        "preset": options.named,
        "passes": [_recorded(step) for step in steps if not step.skipped],
        "skipped": {step.name: step.skipped for step in steps if step.skipped},
        "layers": [dataclasses.asdict(layer) for layer in _layers(description)],
        "target": target,
        "states": [state.told() for state in description.states],
        "state_bytes": {"before": before, "after": _memory(model, description.states, target)},
        "paged_attention": all(
            item.paged_attention for item, step in zip(passes, steps, strict=True) if not step.skipped
        ),
    }
    record["versions"] = {"openvino": ov.__version__, "python": platform.python_version()}
    return Rewritten(model, description, tuple(steps), record)


def stamp(rewritten: Rewritten) -> None:
    """Write into the IR's rt_info what was done to it."""
    io.stamp(rewritten.model, {key: rewritten.record[key] for key in STAMPED})


def convert(
    model_dir: Path,
    out_dir: Path | None,
    options: Options,
    checks: Checks,
    *,
    force: bool = False,
    card: bool = True,
    record_to: Path | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
    after: After = lambda item, model: None,
    wording: Wording = PROGRAM,
) -> Conversion:
    """Convert a folder into another; `out_dir` None: say what would be done, write nothing but the record.

    The input is left untouched, and `out_dir` is whole or as it was. `card`: leave a README.md in it. `record_to` is a
    file that the record is written to besides. Raises OvtqError, worded as the options were given.
    """
    options.refuse_bad(wording)
    checks.refuse_bad(wording)
    source = io.model_xml(model_dir)
    io.check_outputs({"--json": record_to}, (model_dir, out_dir), (options.stats, options.calibration))
    if out_dir is not None:
        staging.tidy_up(out_dir)  # a result that a killed run set aside is there again
        was = io.check_output(model_dir, out_dir, force, wording.option("force"))
        if checks.verify:
            check_device(checks.verify_device)

    tick = _stage(on_progress, "read", 2)
    model = io.load(model_dir)
    tick()
    refuse_converted(model_dir, model)
    config = io.load_config(model_dir)
    with _foreseen(model_dir):
        description = describe(model, config)
    options, advice = options.settled(
        description, (model_dir / moments.NAME).is_file(), lambda: projections.tell(model, description.layers)
    )
    passes = tuple(item.at(model_dir) for item in options.chosen(wording, description))
    device = _device(passes, checks.verify_device) if checks.verify else None
    tick()
    weights = source.with_suffix(".bin").stat().st_size
    extent = default_scope(description, source, checks.verify_layers)
    whereabouts.at("rewriting the model")
    tick = _stage(on_progress, "rewrite", len(passes))

    def done(item: Pass, result: ov.Model) -> None:
        tick()
        after(item, result)

    with _foreseen(model_dir):
        made = rewrite(model, description, options, passes, done)
    description, record = made.description, made.record
    record["source"] = {"xml_sha256": io.text_sha256(source), "bin_bytes": weights}
    record["reason"] = advice and advice.reason
    record["verified"] = None
    kernels = description.kernels
    record["config_file"] = f"{FOLDER}/{CONFIG}" if kernels else None
    precision, found = cache.marked(made.model), None
    if out_dir is None:
        _write_record(record_to, record)
        return _told(made, found, precision)
    stamp(made)
    layers = description.layers
    with staging.staged(out_dir, was) as folder:
        whereabouts.at("writing the model")
        tick = _stage(on_progress, "write", 2)
        with _foreseen(model_dir), io.saving(made.model, folder, source) as written:
            tick()
            record["weights"] = written.how
            io.copy_rest(model_dir, folder)
            (folder / (moments.NAME + moments.PART)).unlink(missing_ok=True)  # of no use to who runs it
            for item in passes:
                item.leave(folder)
            if kernels:
                own = any(isinstance(item, OwnOperations) for item in passes)
                kernel_files.write(kernels, folder, TYPES if own else None)
            if device:  # while the rest of the weights is copied
                xml, ready = folder / source.name, written.wait_for
                tick_checked = _stage(on_progress, "verify", calls_of(layers))
                with _unwritten():
                    found = verify(source, xml, layers, device, checks.verify_seed, extent, tick_checked, ready)
                    kept = kept_precision(xml, layers, device, extent, ready)
                facts = {"device": device, "experts": not extent.joins, **dataclasses.asdict(found)}
                record["verified"] = facts | {"cache_precision": kept}
            whereabouts.at("copying its weights")
            written.wait()
            tick()
        files.write(folder / staging.RECORD, _text(record))
        if card:
            model_card.leave(model_dir, folder, record)
    _write_record(record_to, record)
    return _told(made, found, precision)


def _device(passes: Sequence[Pass], asked: str) -> str | None:
    """Where to verify: as asked for, but what only a GPU runs on a GPU, or nowhere if there is none here."""
    if asked == "CPU" and any(isinstance(item, QuantizeKv) and item.kernels for item in passes):
        return "GPU" if any(name.startswith("GPU") for name in ov.Core().available_devices) else None
    return asked


@contextmanager
def _foreseen(model_dir: Path) -> Iterator[None]:
    """Within it, whatever else is raised than our own errors is a model unlike any we know, and UnsupportedModel."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        if lack := scarcity(str(error)):
            raise InputError(lack) from error
        kind, reason = type(error).__name__, io.last_line(error)
        raise UnsupportedModel(f"{model_dir}: its graph is not as ovtq knows it ({kind}: {reason})") from error


@contextmanager
def _unwritten() -> Iterator[None]:
    """Within it, a failed verification says that there is no result."""
    try:
        yield
    except VerificationFailed as error:
        raise VerificationFailed(f"{error}; nothing was written") from error


def convert_as_given(
    model_dir: Path,
    out_dir: Path | None,
    options: Options,
    checks: Checks,
    force: bool,
    card: bool,
    on_progress: OnProgress,
) -> Conversion:
    """`convert`, as `ovtq.convert` has it done in another process."""
    return convert(model_dir, out_dir, options, checks, force=force, card=card, on_progress=on_progress)


def _recorded(step: Step) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(step).items() if name != "skipped"}


def _told(made: Rewritten, found: Difference | None, precision: str | None) -> Conversion:
    description, target = made.description, made.record["target"]
    steps = tuple(step for step in made.steps if not step.skipped)
    return Conversion(made.record, steps, _layers(description), found, description.states, target, precision)


def _layers(description: ModelDescription) -> tuple[Layer, ...]:
    return tuple(
        Layer(layer.index, layer.window, layer.query_heads, layer.kv_heads, layer.head_dim)
        for layer in description.layers
    )


def _memory(model: ov.Model, these: Sequence[StateSpec], target: str) -> dict[str, int]:
    """Bytes of the states: those there however long the text, those each token adds, and all of them at some contexts.

    A plugin's own cache is counted in the precision that the model asks for.
    """
    asked = cache.marked(model)
    at = {str(tokens): states.total(these, tokens, target, asked) for tokens in CONTEXTS}
    return {"flat": states.flat(these, target, asked), "per_token": states.per_token(these, target, asked), **at}


def _stage(on_progress: OnProgress, name: str, total: int) -> Callable[[], None]:
    """Tells that a stage begins; what is returned tells of one step more, never of more than there are."""
    done = 0
    on_progress(name, done, total)

    def tick() -> None:
        nonlocal done
        done = min(done + 1, total)
        on_progress(name, done, total)

    return tick


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def _write_record(path: Path | None, record: Mapping[str, Any]) -> None:
    if path:
        files.write(path, _text(record))
