"""Each pass: its golden graph, its numbers against numpy, its refusals, a second run; and the contract they share."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import reference
from conftest import ROOT, TINY, load
from golden import SUBJECTS, subject

from ovtq.codec.rotation import digest, hadamard_matrix, randomized_frame, randomized_hadamard
from ovtq.errors import InputError, PreconditionFailed, VerificationFailed
from ovtq.ir.cache import compiled_precisions, marked
from ovtq.ir.dump import dump
from ovtq.ir.graph import Port, consumers
from ovtq.models import ModelDescription
from ovtq.passes import (
    PASSES,
    CachePrecision,
    CentreKeys,
    DecoupleLength,
    Pass,
    QuantizeKv,
    Rewrite,
    RotateHeads,
    SimplifyMask,
    SinkRow,
    TruncateWindow,
)
from ovtq.pipeline import PRESETS
from ovtq.runtime.runner import EXACT_PROPERTIES, Runner
from ovtq.verification.verify import TOLERANCE, Call, compare, play

EPS = float(np.finfo(np.float32).eps)
# What each pass needs before it.
BEFORE: dict[str, tuple[Pass, ...]] = {
    "decouple-length": (),
    "truncate-window": (DecoupleLength(),),
    "simplify-mask": (),
    "centre-keys": (),
    "rotate-heads": (),
    "quantize-kv": (DecoupleLength(),),
    "prune-kv": (DecoupleLength(),),
    "sink-row": (DecoupleLength(), TruncateWindow()),
    "cache-precision": (),
    "check-call": (DecoupleLength(),),
    "own-operations": (DecoupleLength(), QuantizeKv(kernels=True, capacity=1024)),
}


def applied(model_dir: Path, *passes: Pass) -> Rewrite:
    model, description = load(model_dir)
    rewrite = Rewrite(model, description, 0)
    for item in passes:
        rewrite = item.apply(rewrite.model, rewrite.description)
    return rewrite


def test_one_name_three_ways() -> None:
    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__", "base", "checks", "full_cache"}
    assert files == {name.replace("-", "_") for name in PASSES}
    for name, cls in PASSES.items():
        assert cls.__name__ == "".join(part.capitalize() for part in name.split("-"))
        assert cls.__module__ == f"ovtq.passes.{name.replace('-', '_')}"


@pytest.mark.parametrize("name", SUBJECTS)
def test_golden(name: str) -> None:
    """Regenerate with `python tests/golden.py` and read the diff."""
    golden = (ROOT / "tests" / "golden" / f"{name}.txt").read_text(encoding="utf-8")
    assert subject(name, BEFORE[SUBJECTS[name].name]) == golden


@pytest.mark.parametrize("name", PASSES)
def test_a_second_run_refuses_or_is_a_rewrite_of_its_own(name: str) -> None:
    once = applied(TINY["5.5"], *BEFORE[name], SUBJECTS[name])
    if name in (
        "decouple-length",
        "centre-keys",
        "truncate-window",
        "quantize-kv",
        "prune-kv",
        "sink-row",
        "check-call",
        "own-operations",
    ):
        with pytest.raises(PreconditionFailed, match=name):
            SUBJECTS[name].apply(once.model, once.description)
        return
    before = dump(once.model)
    twice = SUBJECTS[name].apply(once.model, once.description)
    assert twice.sites == once.sites
    if name in ("simplify-mask", "cache-precision"):  # the same masks, or marks, again
        assert dump(twice.model) == before
    else:  # a rotation of the rotated
        assert dump(twice.model).count("MatMul") == before.count("MatMul") + 4 * once.sites


# ------------------------------------------------------------------------------------------ numbers

SCHEDULES = {
    "grow": [Call(5), Call(1), Call(1), Call(7), Call(1), Call(1), Call(9), Call(1)],
    "long prefill": [Call(83), Call(1), Call(1)],
    "window edges": [Call(15), Call(1), Call(1), Call(16), Call(17), Call(1), Call(32), Call(31), Call(1)],
    "blocks": [Call(150), Call(1), Call(65), Call(64), Call(1)],
    "padded blocks": [Call(150, 2, pad=90), Call(1, 2), Call(70, 2), Call(1, 2)],
    "padding": [Call(24, 3, pad=11), Call(1, 3), Call(19, 3), Call(1, 3)],
    "beams": [Call(20), Call(1, 4, beams=(0, 0, 0, 0)), Call(1, 4, beams=(1, 1, 3, 0)), Call(1, 4, beams=(3, 2, 1, 0))],
}
COMBINATIONS: dict[str, tuple[Pass, ...]] = {
    "decouple": (DecoupleLength(),),
    "truncate": (DecoupleLength(), TruncateWindow()),
    "truncate, slack": (DecoupleLength(), TruncateWindow(slack=5)),
    "truncate, cpu": (DecoupleLength(), TruncateWindow(target="cpu")),
    "truncate, slack, cpu": (DecoupleLength(), TruncateWindow(slack=5, target="cpu")),
    "simplify": (SimplifyMask(),),
    "rotate": (RotateHeads(seed=3),),
    "rotate qk": (RotateHeads(tensors="qk"),),
    "rotate v": (RotateHeads(tensors="v"),),
    "centre, rotate": (CentreKeys(sinks="move"), RotateHeads()),
    "exact": PRESETS["exact"].on("cpu"),
    "rotate first": (RotateHeads(), SimplifyMask(), DecoupleLength(), TruncateWindow()),
    "sink row": (DecoupleLength(), TruncateWindow(), SimplifyMask(), SinkRow(seed=3)),
    "sink row, exported mask": (DecoupleLength(), TruncateWindow(), SinkRow(centre="none")),
    "recent": (DecoupleLength(), TruncateWindow(), SimplifyMask(), SinkRow(seed=3, window=16)),
    "sink row, padded": (DecoupleLength(), TruncateWindow(), SimplifyMask(), SinkRow(rotate=False)),
}


class Tapped:
    """A model with more results: Q, K, V as they enter each layer's attention unrotated, and what the layer gives."""

    def __init__(self, model_dir: Path, passes: tuple[Pass, ...]) -> None:
        model, description = load(model_dir)
        self.layers = description.layers
        inner = [port.source for layer in self.layers for port in (layer.query, layer.key, layer.value)]
        outer = [Port(consumers(layer.context)[0], 0) for layer in self.layers]
        rewrite = Rewrite(model, description, 0)
        for item in passes:
            rewrite = item.apply(rewrite.model, rewrite.description)
        model = rewrite.model
        results = [ov.opset15.result(tap) for tap in (*inner, *(port.source for port in outer))]
        model = ov.Model(model.get_results() + results, model.get_sinks(), model.get_parameters())
        self.request = ov.Core().compile_model(model, "CPU", EXACT_PROPERTIES).create_infer_request()

    def step(self, ids: np.ndarray, mask: np.ndarray, beams: np.ndarray) -> tuple[np.ndarray, list, list]:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
        outputs = self.request.infer(
            {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "beam_idx": beams}
        )
        taps = [np.array(outputs[i]) for i in range(1, len(outputs))]
        n = len(self.layers)
        return np.array(outputs[0]), [taps[3 * i : 3 * i + 3] for i in range(n)], taps[3 * n :]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "passes", ["truncate", "truncate, slack", "simplify", "rotate", "exact", "sink row", "sink row, padded", "recent"]
)
def test_attention_equals_numpy(passes: str, schedule: str) -> None:
    """Every layer's attention, from its own Q, K, V, against the definition over the whole history."""
    model = Tapped(TINY["5.5"], COMBINATIONS[passes])
    random = np.random.RandomState(7)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    mask = None
    for call in SCHEDULES[schedule]:
        ids = random.randint(0, 256, (call.batch, call.tokens)).astype(np.int64)
        shown = np.ones(ids.shape, np.int64)
        shown[1:, : call.pad] = 0
        beams = np.array(call.beams or range(call.batch), np.int32)
        mask = shown if mask is None else np.concatenate([mask[beams], shown], axis=1)
        _, inner, outer = model.step(ids, mask, beams)
        old = [(k[beams], v[beams]) for k, v in history] or [(k[:, :, :0], v[:, :, :0]) for _, k, v in inner]
        history = [
            (np.concatenate([pk, k], 2), np.concatenate([pv, v], 2))
            for (pk, pv), (_, k, v) in zip(old, inner, strict=True)
        ]
        for layer, (query, _, _), (keys, values), got in zip(model.layers, inner, history, outer, strict=True):
            expected = reference.attention(query, keys, values, mask, layer.sinks, layer.scale, layer.window)
            real = shown.astype(bool)  # what padding attends to is nobody's business
            got, expected = (np.moveaxis(x, 1, 2)[real] for x in (got, expected))
            assert np.abs(got - expected).max() <= 32 * EPS * np.abs(expected).max(), (layer.index, call)


@pytest.mark.parametrize("passes", COMBINATIONS)
def test_logits_equal_the_original(tiny: Path, passes: str, tmp_path: Path) -> None:
    """After saving and reading back: equal constants are merged in a file, which is where some plugin bugs show."""
    xml = tmp_path / "openvino_model.xml"
    ov.save_model(applied(tiny, *COMBINATIONS[passes]).model, xml, compress_to_fp16=False)
    original, converted = (Runner(path, "CPU", EXACT_PROPERTIES) for path in (tiny / xml.name, xml))
    for seed, (name, calls) in enumerate(SCHEDULES.items()):
        for runner in (original, converted):
            runner.reset()
        expected, got = (play(runner, calls, 256, seed) for runner in (original, converted))
        assert compare(expected, got, 4).relative <= TOLERANCE, name


@pytest.mark.parametrize("passes", ["exact", "sink row"])
def test_random_schedules(passes: str, tmp_path: Path) -> None:
    """Two hundred calls of random length, batch and beams."""
    random = np.random.RandomState(11)
    xml = tmp_path / "openvino_model.xml"
    ov.save_model(applied(TINY["5.5"], *COMBINATIONS[passes]).model, xml, compress_to_fp16=False)
    original, converted = (Runner(path, "CPU", EXACT_PROPERTIES) for path in (TINY["5.5"] / xml.name, xml))
    calls: list[Call] = []
    while len(calls) < 200:
        batch = int(random.choice([1, 1, 2, 3]))
        pad = int(random.randint(0, 20)) if batch > 1 else 0
        calls.append(Call(pad + int(random.randint(1, 60)), batch, pad, reset=True))
        for _ in range(random.randint(3, 12)):
            tokens = int(random.choice([1, 1, 1, 2, 15, 16, 17, 40]))
            calls.append(Call(tokens, batch, beams=tuple(map(int, random.randint(0, batch, batch)))))
    expected, got = (play(runner, calls, 256, 5) for runner in (original, converted))
    assert compare(expected, got, 4).relative <= TOLERANCE


# ------------------------------------------------------------------------------------------ what they promise


def test_truncated_states_are_fixed_and_the_rest_grow() -> None:
    model = applied(TINY["5.5"], *COMBINATIONS["truncate, slack"]).model
    shapes = {v.get_info().variable_id: str(v.get_info().data_shape) for v in model.get_variables()}
    assert shapes.pop("ovtq.window") == "[?,8,20,64]"  # two layers, K and V, two KV heads each
    assert set(shapes.values()) == {"[?,2,?,64]"}
    assert len(shapes) == 4


def test_no_length_comes_from_a_state_once_decoupled(tiny: Path) -> None:
    model = applied(tiny, DecoupleLength()).model
    from_state = {"ReadValue", "Gather", "Concat", "Reshape", "Unsqueeze", "Broadcast", "Transpose", "Convert"}
    for node in model.get_ops():
        if node.get_type_name() == "ShapeOf":
            source = node.input_value(0).get_node()
            climbed = [source]
            while climbed[-1].get_type_name() in from_state and climbed[-1].get_input_size():
                climbed.append(climbed[-1].input_value(0).get_node())
            assert all(step.get_type_name() != "ReadValue" for step in climbed)


@pytest.mark.parametrize("passes", ["exact", "sink row"])
def test_full_layers_stay_fused_on_the_cpu(tiny: Path, passes: str) -> None:
    """The rotation must not cost the in-place cache and the fused attention of the full layers."""
    compiled = ov.Core().compile_model(applied(tiny, *COMBINATIONS[passes]).model, "CPU")
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert kinds.count("ScaledDotProductAttention") == 2
    assert kinds.count("MemoryInput") == 1 + 2 * 2 + (passes == "exact")  # windows, keys and values, a counter


def test_rotation_is_orthogonal_seeded_and_recorded() -> None:
    rotation = randomized_hadamard(64, 0)
    np.testing.assert_array_equal(rotation @ rotation.T, np.eye(64, dtype=np.float32))  # exact: entries are ±1/8
    assert set(np.unique(np.abs(rotation))) == {np.float32(0.125)}
    assert not np.array_equal(rotation, randomized_hadamard(64, 1))
    facts = applied(TINY["5.5"], RotateHeads()).facts
    assert facts == {"matrix_sha256": {"64": digest(rotation)}}
    assert digest(rotation) == "025dc9d66a7d86ed"  # the same on every platform and numpy


def test_rotation_spreads_an_outlier() -> None:
    spike = np.zeros(64, np.float32)
    spike[5] = 8
    np.testing.assert_allclose(np.abs(spike @ randomized_hadamard(64, 0)), 1, rtol=EPS)


@pytest.mark.parametrize(("head_dim", "width"), [(64, 80), (32, 48), (16, 32), (128, 144), (256, 272)])
def test_a_frame_is_orthonormal_and_sums_to_zero(head_dim: int, width: int) -> None:
    frame, sink = randomized_frame(head_dim, width, 3)
    rows = np.concatenate([frame, sink[None]]).astype(np.float64)
    assert np.abs(rows @ rows.T - np.eye(head_dim + 1)).max() < 2 * EPS
    assert np.abs(rows.sum(1)).max() < 8 * EPS
    assert np.ptp(np.abs(rows)) == 0  # every coordinate of a basis vector is as large
    assert not np.array_equal(frame, randomized_frame(head_dim, width, 4)[0])


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 32, 36, 40, 44, 48, 72, 76, 80, 144, 272])
def test_hadamard_matrices(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order))
    assert (matrix[0] == 1).all()


@pytest.mark.parametrize("order", [3, 6, 52, 92])
def test_no_hadamard_matrix_is_made_up(order: int) -> None:
    with pytest.raises(ValueError, match="no Hadamard matrix of order"):
        hadamard_matrix(order)


def test_a_sink_row_is_one_row_once(tiny: Path) -> None:
    """States have a row more than there are tokens: the sink's, the same in every sequence, at every time."""
    rewrite = applied(tiny, *COMBINATIONS["sink row"])
    runner = Runner(rewrite.model, "CPU", EXACT_PROPERTIES)
    frame, sink = randomized_frame(64, 80, 3)
    for batch, chunks in ((1, (5, 1, 30)), (3, (24, 1))):
        runner.reset()
        seen = 0
        for tokens in chunks:
            runner.step(np.random.RandomState(tokens).randint(0, 256, (batch, tokens)).astype(np.int64))
            seen += tokens
            states = {state.name: np.array(state.state.data) for state in runner.request.query_state()}
            for index in (1, 3):
                key, value = states[f"ovtq.{index}.key"], states[f"ovtq.{index}.value"]
                assert key.shape == value.shape == (batch, 2, 1 + seen, 80)
                assert np.abs(key[:, :, 1:] @ sink).max() < 32 * EPS * np.abs(key).max()  # no real key meets it
                assert np.abs(value[:, :, 0] @ frame.T).max() < 8 * EPS
                np.testing.assert_allclose(key[:, :, 0] @ sink, np.sqrt(80), rtol=8 * EPS)
                assert np.ptp(key[:, :, 0], axis=0).max() == 0


@pytest.mark.parametrize("precision", ["u8", "u4"])
def test_marks_are_followed_without_any_property(precision: str, tmp_path: Path) -> None:
    """Read back from the file; a property that a host does pass wins."""
    xml = tmp_path / "openvino_model.xml"
    ov.save_model(applied(TINY["5.5"], *COMBINATIONS["exact"], CachePrecision(precision)).model, xml)
    assert compiled_precisions(xml, "CPU") == [precision] * 4
    model = ov.Core().read_model(xml)
    assert marked(model) == precision
    asked = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}  # on a CPU with bf16 it would be that
    told = ov.Core().compile_model(model, "CPU", asked).get_runtime_model()
    infos = [dict(node.get_rt_info().items()) for node in told.get_ops()]
    found = [info["kv_cache_precision"].astype(str) for info in infos if "kv_cache_precision" in info]
    assert found == ["f32"] * 2


# ------------------------------------------------------------------------------------------ refusals


def test_sink_row_refuses_states_that_genai_would_cut() -> None:
    rewrite = applied(TINY["5.5"], DecoupleLength())
    with pytest.raises(PreconditionFailed, match="sink-row: run truncate-window first"):
        SinkRow().apply(rewrite.model, rewrite.description)
    assert rewrite.model.get_variables()[0].get_info().data_shape[3] == 64  # nothing was touched


def test_cache_precision_refuses_what_a_gpu_would_not_follow() -> None:
    rewrite = applied(TINY["5.5"], *COMBINATIONS["sink row"])
    with pytest.raises(PreconditionFailed, match="compresses no cache beside windows of floats"):
        CachePrecision().apply(rewrite.model, rewrite.description)
    packed = TruncateWindow(k_bits="8", v_bits="8")
    assert applied(TINY["5.5"], DecoupleLength(), packed, SinkRow(), CachePrecision()).sites == 2


def test_truncate_refuses_before_decoupling() -> None:
    model, description = load(TINY["5.5"])
    with pytest.raises(PreconditionFailed, match="run decouple-length first"):
        TruncateWindow().apply(model, description)
    load_again(model)


def test_truncate_refuses_unequal_windows() -> None:
    import dataclasses

    rewrite = applied(TINY["5.5"], DecoupleLength())
    odd = rewrite.description.with_layers({2: dataclasses.replace(rewrite.description.layers[2], window=8)})
    with pytest.raises(PreconditionFailed, match="layers 0 and 2 differ in window"):
        TruncateWindow().apply(rewrite.model, odd)


@pytest.mark.parametrize("item", [TruncateWindow(), RotateHeads(layers="full")])
def test_passes_refuse_a_model_without_their_layers(item: Pass) -> None:
    rewrite = applied(TINY["5.5"], DecoupleLength())
    keep = rewrite.description.full if isinstance(item, TruncateWindow) else rewrite.description.sliding
    description = ModelDescription(
        "gpt_oss", *(getattr(rewrite.description, n) for n in ("input_ids", "attention_mask", "beam_idx")), keep, ()
    )
    with pytest.raises(PreconditionFailed, match=re.escape(item.name)):
        item.apply(rewrite.model, description)


def load_again(model: ov.Model) -> None:
    """A refusal leaves the graph as it was: it still dumps as the file does."""
    assert dump(model) == dump(load(TINY["5.5"])[0])


def test_a_wrong_count_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, description = load(TINY["5.5"])
    monkeypatch.setattr(RotateHeads, "sites", lambda self, description: 5)
    with pytest.raises(VerificationFailed, match="rotate-heads: rewrote 4 sites, the model has 5"):
        RotateHeads().apply(model, description)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rotate-heads", {"seeds": "1"}, "rotate-heads has no option 'seeds'; it has seed, tensors, layers"),
        ("rotate-heads", {"seed": "one"}, "rotate-heads: seed needs int, got 'one'"),
        ("rotate-heads", {"seed": "-1"}, "rotate-heads: seed must be from 0 to 4294967295, got -1"),
        ("rotate-heads", {"tensors": "kv"}, "rotate-heads: tensors is one of qkv, qk, v, got 'kv'"),
        ("truncate-window", {"slack": "-3"}, "truncate-window: slack must be from 0 to 4096, got -3"),
        ("decouple-length", {"x": "1"}, "decouple-length has no option 'x'; it has none"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        PASSES[name].parse(options)
