"""Every model family: what its graph is found to be, and each preset for each target in it, or why not.

The models are those of tools/export_families.py. The default suite runs one exact and one packed preset of each, in
short texts; `python -m pytest -m slow tests/test_families.py` runs the whole matrix, each verified as by ovtq-convert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from conftest import FAMILIES, load
from openvino import opset15 as op

import ovtq
from ovtq import pipeline
from ovtq.cli.inspect import main as inspect
from ovtq.codec.coding import unfit
from ovtq.errors import InputError, PreconditionFailed, UnsupportedModel
from ovtq.evidence.calibration import calibrate
from ovtq.ir import io
from ovtq.models import ModelDescription, describe
from ovtq.models.description import Exported
from ovtq.models.rope import mean_rotated_bias
from ovtq.passes import PASSES, CentreKeys, Pass, RotateHeads
from ovtq.runtime.paged import PagedRunner
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.verification.closeness import Played
from ovtq.verification.extent import cut, keep_initial_values, scope
from ovtq.verification.packed_check import PackedCheck
from ovtq.verification.routers import with_routers
from ovtq.verification.schedule import Call
from ovtq.verification.verify import TOLERANCE, compare, play

# windows of the layers, query heads, KV heads, head_dim, scale if it is not 1/√head_dim
GRAPHS: dict[str, tuple[list[int | None], int, int, int, float | None]] = {
    "llama3": ([None, None], 4, 2, 64, None),
    "llama3-4.57": ([None, None], 4, 2, 64, None),
    "smollm2": ([None, None], 3, 1, 64, None),
    "mistral": ([None, None], 4, 2, 64, None),
    "mistral-window": ([24, 24], 4, 2, 64, None),
    "qwen2": ([None, None], 2, 1, 64, None),
    "qwen2-window": ([None, 24], 2, 2, 64, None),
    "qwen3": ([None, None], 4, 2, 128, None),
    "qwen3-moe": ([None, None], 4, 2, 64, None),
    "gemma2": ([24, None], 4, 2, 64, None),
    "gemma2-4.57": ([24, None], 4, 2, 64, None),
    "gemma3": ([24, None], 4, 1, 256, None),
    "phi3": ([None, None], 2, 2, 96, None),
    "phi4-mini": ([None, None], 4, 2, 64, None),
    "phi": ([None, None], 2, 2, 80, None),
    "smollm3": ([None, None], 4, 2, 64, None),
    "granite": ([None, None], 4, 2, 64, 0.0625),
    "cohere2": ([24, None], 4, 2, 64, None),
    "olmo2": ([None, None], 2, 2, 64, None),
    "stablelm": ([None, None], 2, 2, 80, None),
    "falcon": ([None, None], 2, 1, 64, None),
    "gpt-neox": ([None, None], 2, 2, 64, None),
    "gptj": ([None, None], 2, 2, 64, None),
}
BIASED = {"qwen2", "qwen2-window", "phi", "stablelm"}  # a projection for the keys alone; GPT-NeoX's is for all three
PARALLEL = {"cohere2", "phi", "falcon", "gpt-neox", "gptj"}  # the MLP beside the attention
REFUSED = {
    "falcon-alibi": r"it adds 0\.\d+ to a score: no mask but a bias by position, as of ALiBi",
    "lfm2": r"1 of 3 states are no attention's keys or values, such as cache_params\.past\.conv\.0",
    "llama4": r"not that of causality, padding and a window of .* chunked attention, for one, has no window",
}
# past the window and the recent tokens of a packed layer, in long and single calls; with padding and beams; again
CALLS = [
    *(Call(130), Call(1), Call(70), Call(1), Call(1)),
    *(Call(24, 2, pad=9, reset=True), Call(110, 2), Call(1, 2, beams=(1, 0)), Call(9, reset=True), Call(1)),
]


def test_every_archive_stands_here() -> None:
    assert {path.name.removesuffix(".tar.xz") for path in FAMILIES.glob("*.xz")} == {*GRAPHS, *REFUSED}


@pytest.mark.parametrize("name", GRAPHS)
def test_what_a_graph_is_found_to_be(name: str, family: Callable[[str], Path]) -> None:
    windows, query_heads, kv_heads, head_dim, scale = GRAPHS[name]
    _, found = load(family(name))
    assert [layer.window for layer in found.layers] == windows
    for layer in found.layers:
        assert (layer.query_heads, layer.kv_heads, layer.head_dim) == (query_heads, kv_heads, head_dim)
        assert layer.scale == pytest.approx(scale or head_dim**-0.5)
        assert layer.sinks is None
        assert (layer.key_bias is not None) == (name in BIASED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, family: Callable[[str], Path]) -> None:
    folder = family(name)
    with pytest.raises(UnsupportedModel, match=REFUSED[name]):
        describe(io.load(folder), io.load_config(folder))


def _shared_states(model: ov.Model) -> None:
    first, second = _attentions(model)
    for place in (1, 2):
        second.input(place).replace_source_output(first.input_value(place))


def _causal_flag(model: ov.Model) -> None:
    for node in _attentions(model):
        causal = op.scaled_dot_product_attention(*(node.input_value(place) for place in range(3)), causal=True)
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(causal.output(0))


def _attentions(model: ov.Model) -> list[ov.Node]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_shared_states, "layers 0 and 1 share the state past_key_values.0.key"),
        (_causal_flag, "layer 0: the attention is causal by a flag, not by a mask"),
    ],
)
def test_refuses_a_graph_of_another_form(
    change: Callable[[ov.Model], None], message: str, family: Callable[[str], Path]
) -> None:
    model = io.load(family("olmo2"))
    change(model)
    with pytest.raises(UnsupportedModel, match=re.escape(message)):
        describe(model, {})


def test_a_fused_bias_is_the_projections_own(family: Callable[[str], Path]) -> None:
    """GPT-NeoX makes queries, keys and values in one product: what its bias is to keys is the mean key of no input."""
    model, description = load(family("gpt-neox"))
    layer = description.layers[0]
    mean = mean_rotated_bias(model, layer.key.source, layer.kv_heads, layer.head_dim, 16)
    runner = Runner(_biases_alone(family("gpt-neox")), "CPU", EXACT_PROPERTIES)
    runner.step(np.zeros((1, 16), np.int64))
    keys = runner.request.get_output_tensor(1).data[0]
    np.testing.assert_allclose(mean, keys.mean(1), rtol=1e-4, atol=1e-5)


def _biases_alone(folder: Path) -> ov.Model:
    """The model with the first layer's projection of zeros, and its new keys as a further result."""
    model, description = load(folder)
    key = description.layers[0].key
    product = next(
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul" and node.get_output_partial_shape(0)[-1] == 3 * 128
    )
    product.input(1).replace_source_output(op.constant(np.zeros([3 * 128, 128], np.float32)).output(0))
    return ov.Model([*model.get_results(), op.result(key.source)], model.get_sinks(), model.get_parameters())


@pytest.mark.parametrize("name", GRAPHS)
def test_the_first_layers_alone_keep_their_attentions(name: str, family: Callable[[str], Path]) -> None:
    """As of models over 2 GiB: without MLPs where these stand behind the attention, with them where beside it."""
    model, description = load(family(name))
    extent = scope(description, 2, experts=False)
    part = cut(model, extent)
    assert len(extent.joins) == (0 if name in PARALLEL else 1)
    assert len(_attentions(part)) == 2
    assert {sink.get_variable_id() for sink in part.get_sinks()} == {state.name for state in description.states}


def rewritten(folder: Path, preset: str, target: str) -> tuple[ov.Model, ModelDescription, list[pipeline.Step]]:
    model, description = load(folder)
    return pipeline.run(model, description, pipeline.PRESETS[preset].on(target, description))


def _unfit(name: str, preset: str) -> bool:
    """Whether a preset rotates or packs what can't be: heads of a width for which there is no rotation yet."""
    return unfit(("6", "4"), GRAPHS[name][3]) is not None


@pytest.mark.parametrize("name", GRAPHS)
def test_exact_and_packed_in_short_texts(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    """Logits equal to rounding where nothing is packed; packed layers equal to numpy, of the graph's own Q, K, V."""
    folder = family(name)
    if _unfit(name, "k6v4"):
        for preset in ("exact", "k6v4"):
            with pytest.raises(PreconditionFailed, match=f"has head_dim {GRAPHS[name][3]}"):
                rewritten(folder, preset, "cpu")
        return
    original = as_it_is(folder)
    for preset in ("exact", "k6v4"):
        packed = held(folder, tmp_path, original, pipeline.PRESETS[preset].on("cpu", load(folder)[1]))
        assert packed == (preset == "k6v4" and bool(load(folder)[1].full)), preset


def as_it_is(folder: Path) -> list[Played]:
    """What the exported model says in CALLS."""
    model, chosen = with_routers(io.load(folder))
    return play(Runner(model, "CPU", EXACT_PROPERTIES), CALLS, 256, 0, chosen=chosen)


def held(folder: Path, scratch: Path, original: list[Played], passes: Sequence[Pass]) -> bool:
    """Hold the model with `passes` to the original, and its packed layers to numpy; whether any call read codes."""
    model, description, _ = pipeline.run(*load(folder), passes)
    ov.save_model(model, scratch / "some.xml", compress_to_fp16=False)
    model = ov.Core().read_model(scratch / "some.xml")
    check = PackedCheck(description.layers)
    if check.layers:
        model = keep_initial_values(check.tapped(model))
    got = play(Runner(model, "CPU", EXACT_PROPERTIES), CALLS, 256, 0, check=check if check.layers else None)
    lossy, past = [], 0
    for call in CALLS:
        past = 0 if call.reset else past
        lossy.append(check.lossy(past))
        past += call.tokens
    same = [[one for one, old in zip(side, lossy, strict=True) if not old] for side in (original, got)]
    assert compare(*same, len(description.layers)).relative <= TOLERANCE, passes
    assert check.largest <= TOLERANCE, passes
    assert any(lossy) == bool(check.layers), passes
    return any(lossy)


@pytest.mark.parametrize("basis", ["weights", "calibrated"])
def test_a_single_kv_head_has_a_basis_of_its_own(basis: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    """It is one matrix for all heads, but no rotation, and another in each layer, for keys and for values."""
    folder = family("smollm2")
    assert {layer.kv_heads for layer in load(folder)[1].layers} == {1}
    stats = tmp_path / "calibration.npz"
    draw = np.random.RandomState(0)
    calibrate(folder, draw.randint(0, 256, 300), draw.randint(0, 256, 60)).save(stats)
    options = {"basis": basis, "calibration": str(stats) if basis == "calibrated" else ""}
    original = as_it_is(folder)
    for preset, target, codes in (("rotate", "cpu", False), ("k4v4", "cpu", True), ("k4v4", "gpu", True)):
        passes = pipeline.with_basis(pipeline.PRESETS[preset].on(target, load(folder)[1]), options)
        assert held(folder, tmp_path, original, passes) == codes, (preset, target)
    if basis == "calibrated":
        assert not held(folder, tmp_path, original, [CentreKeys(**options), RotateHeads(**options)])


@pytest.mark.parametrize(
    ("name", "needless"),
    [
        ("llama3", {"centre-keys", "truncate-window", "sink-row"}),
        ("mistral-window", {"centre-keys", "sink-row", "quantize-kv", "prune-kv"}),
        ("gemma2", {"centre-keys", "sink-row"}),
        ("qwen2-window", {"sink-row"}),
    ],
)
def test_a_pass_that_has_nothing_to_do_says_so_and_refuses(
    name: str, needless: set[str], family: Callable[[str], Path]
) -> None:
    model, description = load(family(name))
    found = {item: reason for item, cls in PASSES.items() if (reason := cls().needless(description))}
    assert {*found} == needless
    for item, reason in found.items():
        with pytest.raises(PreconditionFailed, match=f"{item}: {reason}"):
            PASSES[item]().apply(model, description)


def test_a_model_without_sliding_layers_or_sinks_leaves_out_what_is_for_those(family: Callable[[str], Path]) -> None:
    _, description, steps = rewritten(family("llama3"), "u8", "gpu")
    assert [step.name for step in steps if not step.skipped] == ["rotate-heads", "cache-precision"]
    assert all(isinstance(layer.cache, Exported) for layer in description.layers)
    assert pipeline.told(steps) == (
        "centre-keys: no key of this model has a bias; centre=mean, of a text, needs none; "
        "decouple-length, simplify-mask, check-call: no layer is given another cache, for which they are; "
        "truncate-window: the model has no sliding-window layers"
    )
    with pytest.raises(
        PreconditionFailed, match=r"nothing to do in this model: .*sink-row: its attention has no sinks"
    ):
        pipeline.run(*load(family("llama3")), pipeline.PRESETS["exact"].on("gpu"))  # those of a model with sinks


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("smollm3", "gemma2") else pytest.mark.slow) for name in GRAPHS]
)
def test_what_keeps_the_exported_form_stays_right_under_paged_attention(
    name: str, family: Callable[[str], Path], tmp_path: Path
) -> None:
    """GenAI's default: of a model without sinks that is `rotate` and, without windows or on a CPU, `u8`."""
    folder = family(name)
    try:
        expected = _paged(folder)
    except InputError as error:
        pytest.skip(f"as exported neither: {error}")
    if _unfit(name, "rotate"):
        pytest.skip(f"heads of {GRAPHS[name][3]} are not rotated")
    for preset in ("rotate", "u8"):
        model, *_ = rewritten(folder, preset, "cpu")
        ov.save_model(model, tmp_path / "openvino_model.xml", compress_to_fp16=False)
        got = _paged(tmp_path)
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max(), preset


def _paged(folder: Path) -> np.ndarray:
    """Logits of a text read in two calls and single tokens, (tokens, vocabulary)."""
    runner, ids = PagedRunner(folder, EXACT_PROPERTIES, 128), np.random.RandomState(5).randint(0, 256, (1, 80))
    parts = np.split(ids.astype(np.int64), [40, 77, 78, 79], 1)
    return np.concatenate([runner.step(part).reshape(part.shape[1], -1) for part in parts])


@pytest.mark.slow
def test_an_exported_u8_cache_is_wrong_for_two_sequences_behind_a_longer_text(family: Callable[[str], Path]) -> None:
    """P60: of the exported model itself, arithmetic at f32; the same calls in a fresh model are right."""
    folder = family("llama3")
    two = [Call(24, 2, pad=9, reset=True), Call(1, 2, beams=(1, 0)), Call(128, 2)]
    lost = {}
    for name, calls in (("fresh", two), ("behind", [Call(129, reset=True), Call(129), *two])):
        sides = []
        for properties in (EXACT_PROPERTIES, {**EXACT_PROPERTIES, "KV_CACHE_PRECISION": "u8"}):
            sides.append(play(Runner(io.load(folder), "CPU", properties), calls, 256, 0)[-1].results)
        lost[name] = np.abs(sides[0] - sides[1]).max() / np.abs(sides[0]).max()
    assert lost["fresh"] < 0.1
    assert not lost["behind"] < 0.1  # or no number


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gpu", "cpu"])
@pytest.mark.parametrize("preset", pipeline.PRESETS)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_preset_is_verified_as_hosts_load_it(
    name: str, preset: str, target: str, family: Callable[[str], Path], tmp_path: Path
) -> None:
    """ovtq-convert with its whole verification, in every family: written and right, or refused for a reason."""
    folder, out, refused = family(name), tmp_path / "out", ""
    try:
        made = ovtq.convert(folder, out, preset=preset, target=target)
    except PreconditionFailed as error:
        refused = str(error)
    if refused:
        assert re.search(rf"nothing to do in this model|has head_dim {GRAPHS[name][3]}", refused)
        assert not out.exists()
        return
    assert made.verification is not None
    assert made.verification.relative <= TOLERANCE
    assert made.verification.layers == len(GRAPHS[name][0])
    greedy = [_continued(path, 80) for path in (folder, out)]
    if all(step.exact for step in made.passes):
        assert greedy[0] == greedy[1]


def _continued(folder: Path, count: int) -> list[int]:
    """What a model says greedily to a text, at f32."""
    runner = Runner(io.model_xml(folder), "CPU", EXACT_PROPERTIES)
    said: list[int] = []
    ids = np.random.RandomState(3).randint(0, 256, (1, 60)).astype(np.int64)
    for _ in range(count):
        said.append(int(runner.step(ids)[0, -1].argmax()))
        ids = np.array([said[-1:]], np.int64)
    return said


@pytest.mark.parametrize(
    ("name", "target", "preset", "reason"),
    [
        ("granite", "gpu", "u8", "without sinks a GPU reads its own 8-bit cache in place"),
        ("gptj", "cpu", "u8", "the plugin's own 8-bit cache"),
        ("gemma2", "cpu", "u8", "the plugin's own 8-bit cache"),
    ],
)
def test_inspect_recommends_a_preset_for_a_reason(
    name: str,
    target: str,
    preset: str,
    reason: str,
    family: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert inspect([str(family(name)), "--target", target]) == 0
    said = capsys.readouterr().out
    assert f"recommended: {preset}: {reason}" in said
    assert f"{GRAPHS[name][1]} query heads" in said
